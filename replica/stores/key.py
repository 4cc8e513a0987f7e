"""Object keys: which strings may be one, the same for every store, so that a store copied elsewhere keeps working."""

from __future__ import annotations

from typing import Final

from replica.errors import UsageError

KEY_LIMIT_BYTES: Final = 900  # S3 allows 1024 bytes; the rest is left to the prefix in the store's address
PART_LIMIT_BYTES: Final = 240  # file systems allow 255; temporaries and copies want a few more
RESERVED_PART: Final = ".godwit"  # the file store keeps its marker, locks and temporaries in a folder of this name

_FORBIDDEN: Final = frozenset('\\<>:"|?*')


def check_key(key: str) -> str:
    """Return ``key`` if it may name an object. Raises UsageError.

    Printable ASCII, ``/`` between parts; no part is empty, ``.`` or ``..``, ends in a dot or space (Windows drops
    them) or holds a character that Windows file systems or S3 treat specially; the first is not ``.godwit``.
    """
    parts = _check_characters(key).split("/")
    for part in parts:
        if not part or part[-1] in ". " or part[0] == " ":
            raise _refusal(key, "a part is empty, '.', '..', or ends in a dot or begins or ends with a space")
        if len(part) > PART_LIMIT_BYTES:
            raise _refusal(key, f"a part is longer than {PART_LIMIT_BYTES} bytes")
    if parts[0] == RESERVED_PART:
        raise _refusal(key, f"'{RESERVED_PART}' is reserved for the store itself")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if keys may begin with it: empty, or the beginning of a valid key. Raises UsageError."""
    parts = _check_characters(prefix).split("/")
    # The last part may be cut anywhere, even after a dot; those before it are whole.
    for part in parts[:-1]:
        if not part or part[-1] in ". " or part[0] == " ":
            raise _refusal(prefix, "a part is empty, '.', '..', or ends in a dot or begins or ends with a space")
    return prefix


def _check_characters(key: str) -> str:
    if len(key) > KEY_LIMIT_BYTES:
        raise _refusal(key[:80] + "…", f"longer than {KEY_LIMIT_BYTES} bytes")
    if not key.isascii() or not key.isprintable() or not _FORBIDDEN.isdisjoint(key):
        raise _refusal(key, 'only printable ASCII without \\ < > : " | ? * is allowed')
    return key


def _refusal(key: str, reason: str) -> UsageError:
    return UsageError(f"not a valid object key ({reason})", key=repr(key))
