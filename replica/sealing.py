"""Sealing: objects and keys under AES-256-GCM, in chunks that open one by one (docs/format.md, section 7).

The cryptography package is loaded when something is sealed or opened for the first time. Beside this module only
``replica.signing`` knows it.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from typing import TYPE_CHECKING, Final

from replica.errors import FormatVersionError, IntegrityError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SUITE: Final = 1
KEY_BYTES: Final = 32
CHUNK_BYTES: Final = 65536
MAGIC: Final = b"GWSEALED"
FORMAT: Final = 1

_HEADER: Final = struct.Struct("<8sHB5x")
_PLACE: Final = struct.Struct("<QB")
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
HEADER_BYTES: Final = _HEADER.size
CHUNK_OVERHEAD_BYTES: Final = _NONCE_BYTES + _TAG_BYTES
STORED_CHUNK_BYTES: Final = CHUNK_BYTES + CHUNK_OVERHEAD_BYTES
assert HEADER_BYTES == 16
assert STORED_CHUNK_BYTES == 65564

_OUR_HEADER: Final = _HEADER.pack(MAGIC, FORMAT, SUITE)


def new_key() -> bytes:
    """Return 32 random bytes."""
    return secrets.token_bytes(KEY_BYTES)


def derive(key: bytes, purpose: bytes) -> bytes:
    """Return the 32-byte key for one purpose: HKDF-Expand with SHA-256, whose one step this is."""
    return hmac.digest(key, purpose + b"\x01", "sha256")


def stored_size(size: int) -> int:
    """Return how many bytes ``size`` bytes have once they are sealed."""
    return HEADER_BYTES + size + max(1, -(-size // CHUNK_BYTES)) * CHUNK_OVERHEAD_BYTES


def plain_size(stored: int) -> int | None:
    """Return how many bytes a sealed object of ``stored`` bytes holds; None where none has that size."""
    body = stored - HEADER_BYTES
    size = body - max(1, -(-body // STORED_CHUNK_BYTES)) * CHUNK_OVERHEAD_BYTES
    return size if size >= 0 and stored_size(size) == stored else None


def wrap(key: bytes, secret: bytes, bound_to: bytes) -> bytes:
    """Return ``secret`` sealed under ``key``, to be opened with the same ``bound_to`` alone."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, secret, bound_to)


def unwrap(key: bytes, wrapped: bytes, bound_to: bytes) -> bytes | None:
    """Return what was wrapped, or None where ``key`` or ``bound_to`` are others, or the bytes were changed."""
    return _decrypt(_cipher(key), wrapped, bound_to) if len(wrapped) >= CHUNK_OVERHEAD_BYTES else None


class Sealer:
    """Seals and opens the objects of one VM under its data key. Callable from several threads at once."""

    __slots__ = ("_data_key",)

    def __init__(self, data_key: bytes) -> None:
        assert len(data_key) == KEY_BYTES
        self._data_key = data_key

    def seal(self, key: str, data: bytes | bytearray | memoryview) -> bytearray:
        """Return the object that holds ``data`` under the object key ``key``. Memory: the size of the result."""
        cipher = self._cipher(key)
        view = memoryview(data).cast("B")
        # A random start for each object, counted up: no two chunks under one key ever share a nonce, also not those of
        # an object that is written anew, as the lease is.
        base = int.from_bytes(secrets.token_bytes(_NONCE_BYTES), "big")
        count = max(1, -(-len(view) // CHUNK_BYTES))
        sealed = bytearray(stored_size(len(view)))
        room = memoryview(sealed)
        room[:HEADER_BYTES] = _OUR_HEADER
        for number in range(count):
            nonce = (base ^ number).to_bytes(_NONCE_BYTES, "big")
            chunk = view[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
            at = HEADER_BYTES + number * STORED_CHUNK_BYTES
            start, end = at + _NONCE_BYTES, at + len(chunk) + CHUNK_OVERHEAD_BYTES
            room[at:start] = nonce
            cipher.encrypt_into(nonce, chunk, _bound(key, number, number == count - 1), room[start:end])
        return sealed

    def open(self, key: str, stored: bytes | bytearray) -> bytes:
        """Return what the whole object holds. Raises IntegrityError, FormatVersionError."""
        try:
            _check_header(key, stored)
        except FormatVersionError as error:
            if self._is_ours(key, stored):
                raise IntegrityError("the object's header is damaged", key=key) from error
            raise
        if plain_size(len(stored)) is None:
            raise IntegrityError(f"a sealed object cannot have {len(stored)} bytes: it was cut", key=key)
        return self._open_chunks(key, memoryview(stored)[HEADER_BYTES:], 0, is_whole=True)

    def _is_ours(self, key: str, stored: bytes | bytearray) -> bool:
        """Whether the object was sealed by this format, whatever its header says: each chunk is bound to its header."""
        try:
            self._open_chunks(key, memoryview(stored)[HEADER_BYTES:], 0, is_whole=True)
        except IntegrityError:
            return False
        return True

    def open_chunks(self, key: str, stored: bytes | bytearray, first: int) -> bytes:
        """Return what consecutive chunks hold, ``first`` being the number of the first. Raises IntegrityError."""
        return self._open_chunks(key, memoryview(stored), first, is_whole=False)

    def _cipher(self, key: str) -> AESGCM:
        return _cipher(derive(self._data_key, b"godwit object\0" + key.encode()))

    def _open_chunks(self, key: str, stored: memoryview, first: int, *, is_whole: bool) -> bytes:
        cipher = self._cipher(key)
        parts: list[bytes] = []
        base: int | None = None
        for at in range(0, len(stored), STORED_CHUNK_BYTES):
            number = first + len(parts)
            chunk = stored[at : at + STORED_CHUNK_BYTES]
            ends = at + STORED_CHUNK_BYTES >= len(stored)
            found = int.from_bytes(chunk[:_NONCE_BYTES], "big") ^ number
            if base is not None and found != base:
                raise _forged(key, number)
            base = found
            opened = None
            # Whether a full chunk is the object's last cannot be seen where only a range was asked for.
            for is_last in (True,) if ends and is_whole else (False, True) if ends else (False,):
                if opened is None and len(chunk) >= CHUNK_OVERHEAD_BYTES:
                    opened = _decrypt(cipher, chunk, _bound(key, number, is_last))
            if opened is None:
                raise _forged(key, number)
            parts.append(opened)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def is_sealed(stored: bytes | bytearray) -> bool:
    """Whether the object begins as sealed ones do."""
    return stored[: len(MAGIC)] == MAGIC


def _check_header(key: str, stored: bytes | bytearray) -> None:
    if not is_sealed(stored):
        raise IntegrityError("the object is not encrypted although its VM is: it was damaged or exchanged", key=key)
    if len(stored) < HEADER_BYTES:
        raise IntegrityError(f"the object ends after {len(stored)} bytes, inside its header", key=key)
    _, version, suite = _HEADER.unpack_from(stored)
    if version > FORMAT or suite > SUITE:
        raise FormatVersionError(
            f"the object is encrypted by suite {suite} of format {version}, which this godwit does not know",
            key=key,
            hint="use a newer godwit",
        )
    if stored[:HEADER_BYTES] != _OUR_HEADER:
        raise IntegrityError("the object's header is damaged", key=key)


def _forged(key: str, number: int) -> IntegrityError:
    return IntegrityError(
        f"chunk {number} of the object does not open with the VM's key: it was damaged, or belongs elsewhere", key=key
    )


def _bound(key: str, number: int, is_last: bool) -> bytes:
    return _OUR_HEADER + _PLACE.pack(number, is_last) + key.encode()


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - only what is encrypted needs it

    return AESGCM(key)


def _decrypt(cipher: AESGCM, sealed: bytes | memoryview, bound_to: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415

    try:
        return cipher.decrypt(bytes(sealed[:_NONCE_BYTES]), sealed[_NONCE_BYTES:], bound_to)
    except InvalidTag:
        return None
