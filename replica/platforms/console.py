"""What a guest says on its serial port, from the file that it goes into: a guest may say any amount."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol, runtime_checkable

PIECE_BYTES: Final = 1 << 20  # that are read at once, at the most


@runtime_checkable
class HasConsole(Protocol):
    """A platform that keeps what its machines say on their serial ports."""

    def console(self, name: str) -> str:
        """Return the last of it, up to ``PIECE_BYTES``. Raises PlatformError."""

    def said(self, name: str, start_bytes: int) -> bytes:
        """Return what comes from there on, up to ``PIECE_BYTES``; nothing where no more was said. PlatformError."""


def last_of(path: Path) -> str:
    """Return the end of the file, up to ``PIECE_BYTES``; nothing where there is none. Raises OSError."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - PIECE_BYTES))
            return file.read(PIECE_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def piece_of(path: Path, start_bytes: int) -> bytes:
    """Return up to ``PIECE_BYTES`` of the file from there on; nothing where there is none. Raises OSError."""
    try:
        with path.open("rb") as file:
            file.seek(start_bytes)
            return file.read(PIECE_BYTES)
    except FileNotFoundError:
        return b""
