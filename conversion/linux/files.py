"""Reading a guest's files so that a strange one is a fact and never an error."""

from __future__ import annotations

from conversion.errors import ConversionError
from conversion.filesystems.filesystem import Entry, FileSystem
from conversion.linux.system import Volume

LARGEST_TEXT_BYTES = 4 << 20


def text_of(file_system: FileSystem, path: str) -> str | None:
    """Return a small text file; None where there is none, or it cannot be read."""
    content = bytes_of(file_system, path)
    return None if content is None else content.decode("utf-8", "replace").replace("\0", "")


def bytes_of(file_system: FileSystem, path: str, *, largest_bytes: int = LARGEST_TEXT_BYTES) -> bytes | None:
    """Return a file; None where there is none, or it cannot be read."""
    try:
        return file_system.read_file(path, largest_bytes=largest_bytes)
    except ConversionError:
        return None


def names_in(file_system: FileSystem, path: str) -> tuple[Entry, ...]:
    """Return a folder's entries; none where there is no folder, or it cannot be read."""
    try:
        return file_system.list_folder(path) or ()
    except ConversionError:
        return ()


def window(volume: Volume, path: str, offset: int, length: int) -> bytes | None:
    """Return bytes of a file that may be too large to be read whole; fewer at its end, None where it is none."""
    if volume.file_system is None:
        return None
    try:
        extents = volume.file_system.extents(path)
    except ConversionError:
        return None
    if extents is None:
        content = bytes_of(volume.file_system, path, largest_bytes=64 << 20)
        return None if content is None else content[offset : offset + length]
    return b"".join(volume.device.read_at(at, count) for at, count in places_of(extents, offset, length))


def places_of(extents: tuple[tuple[int, int], ...], offset: int, length: int) -> list[tuple[int, int]]:
    """Return where bytes [offset, offset + length) of a file lie, given where all of it does."""
    found, start = [], 0
    for at, count in extents:
        first, end = max(offset, start), min(offset + length, start + count)
        if first < end:
            found.append((at + first - start, end - first))
        start += count
    return found
