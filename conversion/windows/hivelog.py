"""The logs beside a dirty hive: what of them has to be applied before the hive may be read or edited.

A crash-consistent copy of a running Windows mostly has its hives in the middle of a write. The new format of the logs
(Windows 8.1 and later) is a chain of entries, each hashed and numbered; the old one a bitmap with the pages it names.
Described in Maxim Suhanov's "Windows registry file format specification", under "Format of transaction log files" and
"Multiple transaction log files".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy

from conversion.errors import DamagedError
from conversion.windows.hive import (
    BASE_BLOCK_BYTES,
    BIN_UNIT_BYTES,
    CHECKSUM_OFFSET,
    LARGEST_HIVE_BYTES,
    BaseBlock,
    checksum,
)
from conversion.windows.hiveedit import seal

LARGEST_LOG_BYTES: Final = 64 << 20
ENTRY: Final = struct.Struct("<4sIIIIIQQ")
PAGE: Final = struct.Struct("<II")
assert ENTRY.size == 40
assert PAGE.size == 8

_SEED: Final = 0x82EF4D887A4E55C5
_SECTOR: Final = 512
_NEW_LOG: Final = 6  # file type
_OLD_LOGS: Final = frozenset({1, 2})
_FLAG_LOCKED: Final = 1


@dataclass(frozen=True, slots=True)
class Recovery:
    """A hive after its logs. ``content`` is clean, at least as long as the file it came from."""

    content: bytes
    was_dirty: bool
    entries: int  # entries, or pages of an old log, that were applied
    highest_sequence: int  # no log beside the hive holds an entry above it


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of a log. ``pages`` are (offset from the first bin, content)."""

    sequence: int
    flags: int
    bins_bytes: int
    pages: tuple[tuple[int, bytes], ...]


def marvin32(data: bytes, seed: int = _SEED) -> int:
    """Return the 64-bit Marvin32 hash of ``data``.

    Every step needs the one before, so this runs word by word: about 0.3 s for a MiB, and only for entries that are
    about to be applied.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    whole = len(data) & ~3
    tail = data[whole:] + b"\x80"
    words = numpy.frombuffer(data, dtype="<u4", count=whole // 4).tolist()
    words += [int.from_bytes(tail.ljust(4, b"\0"), "little"), 0]
    for word in words:
        low = (low + word) & 0xFFFFFFFF
        high ^= low
        low = ((low << 20 | low >> 12) + high) & 0xFFFFFFFF
        high = (high << 9 | high >> 23) & 0xFFFFFFFF ^ low
        low = ((low << 27 | low >> 5) + high) & 0xFFFFFFFF
        high = (high << 19 | high >> 13) & 0xFFFFFFFF
    return high << 32 | low


def recover(content: bytes, logs: Sequence[bytes | None] = (), *, subject: str = "registry hive") -> Recovery:
    """Return the hive as Windows would see it: clean, with the logs' entries applied where it was dirty.

    ``logs`` are the files beside it (LOG1, LOG2; an old single LOG), None or empty where absent. Raises DamagedError
    where a dirty hive has no log that fits it.
    """
    readable = [log for log in logs if log and len(log) > _SECTOR and log[:4] == b"regf"]
    readable = [log for log in readable if BaseBlock.decode(log, subject=f"log of {subject}").intact]
    if any(len(log) > LARGEST_LOG_BYTES for log in readable):
        raise DamagedError("a log larger than 64 MiB", subject=subject)
    base = BaseBlock.decode(content, subject=subject)
    highest = max([_highest(log) for log in readable], default=0)
    if not base.is_dirty:
        return Recovery(content, False, 0, max(highest, base.primary_sequence))
    of_kind = [(log, BaseBlock.decode(log, subject=subject).file_type) for log in readable]
    new = [log for log, kind in of_kind if kind == _NEW_LOG]
    old = [log for log, kind in of_kind if kind in _OLD_LOGS]
    if new:  # an old log beside new ones is left from setup
        return _apply_entries(content, base, new, highest, subject)
    if old:
        return _apply_old(content, base, old, subject)
    raise DamagedError(
        "a write to the hive did not end, and no log beside it tells how it should",
        subject=subject,
        hint="take an application-consistent point, or shut Windows down cleanly, and convert that",
    )


def _unfitting(subject: str) -> DamagedError:
    return DamagedError(
        "a write to the hive did not end, and the logs beside it do not belong to it or are damaged",
        subject=subject,
        hint="take an application-consistent point, or shut Windows down cleanly, and convert that",
    )


# The new format


def entries_of(log: bytes) -> Iterator[LogEntry]:
    """Yield the entries of a log of the new format up to the first that is damaged or not the next in number."""
    expected: int | None = None
    for at, size, sequence in _headers(log):
        if expected is not None and sequence != expected:
            return
        entry = _entry(log[at : at + size])
        if entry is None:
            return
        yield entry
        expected = sequence + 1


def _headers(log: bytes) -> Iterator[tuple[int, int, int]]:
    at = _SECTOR
    while at + ENTRY.size <= len(log):
        signature, size, _, sequence = struct.unpack_from("<4sIII", log, at)
        if signature != b"HvLE" or size % _SECTOR or not _SECTOR <= size <= len(log) - at:
            return
        yield at, size, sequence
        at += size


def _highest(log: bytes) -> int:
    """Return the highest sequence number that stands anywhere in a log, damaged entries included."""
    base = BaseBlock.decode(log, subject="log")
    entries = [sequence for _, _, sequence in _headers(log)] if base.file_type == _NEW_LOG else []
    return max(base.primary_sequence, *entries) if entries else base.primary_sequence


def _entry(entry: bytes) -> LogEntry | None:
    """Return an entry whose hashes and bounds hold, None for any other."""
    _, size, flags, sequence, bins, count, first_hash, second_hash = ENTRY.unpack_from(entry)
    at = ENTRY.size + PAGE.size * count
    if at > size or bins % BIN_UNIT_BYTES or not 0 < bins <= LARGEST_HIVE_BYTES:
        return None
    if second_hash != marvin32(entry[:32]) or first_hash != marvin32(entry[ENTRY.size :]):
        return None
    pages: list[tuple[int, bytes]] = []
    for offset, length in PAGE.iter_unpack(entry[ENTRY.size : at]):
        if at + length > size or offset + length > bins:
            return None
        pages.append((offset, entry[at : at + length]))
        at += length
    return LogEntry(sequence, flags, bins, tuple(pages))


def _apply_entries(content: bytes, base: BaseBlock, logs: list[bytes], highest: int, subject: str) -> Recovery:
    """Apply both logs, the one that begins earlier first.

    A hive whose base block is damaged does not tell how far it had come, so that only the later log is used for it,
    as Windows does.
    """
    begins = [(BaseBlock.decode(log, subject=subject).primary_sequence, index) for index, log in enumerate(logs)]
    ordered = [logs[index] for _, index in sorted(begins)]
    hive = bytearray(content)
    if not base.intact:
        ordered = ordered[-1:]
        hive[:_SECTOR] = _as_hive(ordered[0])
    least = base.secondary_sequence if base.intact else 0
    applied, count = None, 0
    for log in ordered:
        begins_at = BaseBlock.decode(log, subject=subject).primary_sequence
        if begins_at < least or (applied is not None and begins_at != applied + 1):
            continue
        for index, entry in enumerate(entries_of(log)):
            if index == 0 and entry.sequence != begins_at:
                break
            _apply(hive, entry)
            applied, count = entry.sequence, count + 1
    if applied is None:
        raise _unfitting(subject)
    seal(hive, applied)
    return Recovery(bytes(hive), True, count, max(highest, applied, base.primary_sequence if base.intact else 0))


def _apply(hive: bytearray, entry: LogEntry) -> None:
    missing = BASE_BLOCK_BYTES + entry.bins_bytes - len(hive)
    if missing > 0:
        hive += bytes(missing)
    struct.pack_into("<I", hive, 40, entry.bins_bytes)
    flags = struct.unpack_from("<I", hive, 144)[0]
    struct.pack_into("<I", hive, 144, flags & ~_FLAG_LOCKED | entry.flags & _FLAG_LOCKED)
    for offset, page in entry.pages:
        start = BASE_BLOCK_BYTES + offset
        hive[start : start + len(page)] = page


def _as_hive(log: bytes) -> bytes:
    """Return the base block that a log begins with, as a hive's."""
    block = bytearray(log[:_SECTOR])
    struct.pack_into("<I", block, 28, 0)
    struct.pack_into("<I", block, CHECKSUM_OFFSET, checksum(block))
    return bytes(block)


# The old format


def _apply_old(content: bytes, base: BaseBlock, logs: list[bytes], subject: str) -> Recovery:
    """Apply the one log that fits: written at the time that the hive names, and whole."""
    for log in logs:
        block = BaseBlock.decode(log, subject=subject)
        fits = block.primary_sequence == block.secondary_sequence
        if fits and block.written == _written(content, base):
            pages = _dirty_pages(log, block, subject)
            hive = bytearray(content)
            if not base.intact:
                hive[:_SECTOR] = _as_hive(log)
            missing = BASE_BLOCK_BYTES + block.bins_bytes - len(hive)
            if missing > 0:
                hive += bytes(missing)
            struct.pack_into("<I", hive, 40, block.bins_bytes)
            for number, page in pages:
                start = BASE_BLOCK_BYTES + number * _SECTOR
                hive[start : start + _SECTOR] = page
            sequence = max(block.primary_sequence, base.primary_sequence if base.intact else 0)
            seal(hive, sequence)
            return Recovery(bytes(hive), True, len(pages), sequence)
    raise _unfitting(subject)


def _written(content: bytes, base: BaseBlock) -> int:
    """Return when the hive was written: its first bin repeats that, for when the base block is damaged."""
    if base.intact or len(content) < BASE_BLOCK_BYTES + 28:
        return base.written
    return int(struct.unpack_from("<Q", content, BASE_BLOCK_BYTES + 20)[0])


def _dirty_pages(log: bytes, block: BaseBlock, subject: str) -> list[tuple[int, bytes]]:
    bits = block.bins_bytes // _SECTOR
    start = _SECTOR + 4
    bitmap = log[start : start + bits // 8]
    if log[_SECTOR:start] != b"DIRT" or block.bins_bytes % BIN_UNIT_BYTES or len(bitmap) != bits // 8 or not bits:
        raise DamagedError("a log of the old format contradicts itself", subject=subject)
    dirty = numpy.flatnonzero(numpy.unpackbits(numpy.frombuffer(bitmap, dtype=numpy.uint8), bitorder="little")).tolist()
    first = -(-(start + bits // 8) // _SECTOR) * _SECTOR
    if first + len(dirty) * _SECTOR > len(log):
        raise DamagedError("a log of the old format ends before its last page", subject=subject)
    return [(number, log[first + at * _SECTOR : first + (at + 1) * _SECTOR]) for at, number in enumerate(dirty)]
