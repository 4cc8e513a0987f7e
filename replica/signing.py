"""Signing: this host's Ed25519 key, what it signs, and whether a signature is right.

Beside ``replica.sealing`` the one module that knows the cryptography package, which is loaded when it is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replica.errors import ConfigurationError

KEY_FILE: Final = "signing-key"
KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_KEY: Final = re.compile(rb"([0-9a-f]{64})\n?")


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key, and the public one that goes with it; 32 bytes each."""

    private: bytes
    public: bytes

    def __repr__(self) -> str:
        return f"SigningKey({self.fingerprint})"  # never the private half, wherever this is shown

    @property
    def fingerprint(self) -> str:
        """By what people know the key."""
        return fingerprint(self.public)

    def sign(self, data: bytes) -> bytes:
        """Return the signature of ``data``, 64 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

        return Ed25519PrivateKey.from_private_bytes(self.private).sign(data)


def fingerprint(public: bytes) -> str:
    """Return by what people know a public key: its SHA-256, 64 hex digits."""
    return hashlib.sha256(public).hexdigest()


def is_signed(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether ``signature`` is that of ``data`` by the holder of the ``public`` key; False for what is no key."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def host_key(state_folder: Path | None) -> SigningKey:
    """Return this host's key, made the first time it is asked for, readable by its owner alone.

    Raises ConfigurationError where it cannot be kept, can be read by others, or is no key.
    """
    if state_folder is None:
        raise ConfigurationError(
            "this machine has no state folder that can be written, and so none to keep its signing key in",
            hint="set state_folder in godwit.toml, or GODWIT_STATE",
        )
    path = state_folder / KEY_FILE
    try:
        if not path.exists():
            _make(path)
        return _read(path)
    except OSError as error:
        raise ConfigurationError(
            f"the signing key can be neither read nor made: {error.strerror}", path=str(path)
        ) from error


def _make(path: Path) -> None:
    """Write a new key under its name at once; one that somebody else made meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES).hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> SigningKey:
    with path.open("rb") as file:
        held = _KEY.fullmatch(file.read(256))
        mode = os.fstat(file.fileno()).st_mode
    if held is None:
        raise ConfigurationError(
            "the file is no signing key",
            path=str(path),
            hint="put it back from a backup, or delete it: the next drill makes another, known by another fingerprint",
        )
    if sys.platform != "win32" and mode & 0o077:
        raise ConfigurationError(
            "others than its owner can read the signing key, and sign with it",
            path=str(path),
            hint=f"chmod 600 {path}; if anybody may have read it, delete it",
        )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    private = bytes.fromhex(held[1].decode())
    return SigningKey(private, Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())
