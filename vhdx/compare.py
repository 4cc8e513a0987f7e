"""Whether two disks hold the same, read only where either may hold anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from vhdx.disk import Disk, Extents
from vhdx.extents import EMPTY, merged, runs_of
from vhdx.pieces import Buffers, worked
from vhdx.progress import Progress, silent

SECTOR_SIZE: Final = 512  # what differences are told in, whatever sectors the disks have
WINDOW_BYTES: Final = 64 << 30  # extents are collected for so much of the disks at a time
CHUNK_BYTES: Final = 2 << 20  # and read in pieces of this size


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found: sizes in bytes, and the first sector that differs, None where the content is the same.

    What one disk has past the end of the other counts as the same where it is zeros.
    """

    first_size: int
    second_size: int
    first_difference: int | None

    @property
    def same_content(self) -> bool:
        """Whether no byte differs."""
        return self.first_difference is None

    @property
    def identical(self) -> bool:
        """Whether neither content nor size differs."""
        return self.same_content and self.first_size == self.second_size


def compare(first: Disk, second: Disk, *, progress: Progress = silent) -> Comparison:
    """Compare two disks up to the first difference. Raises DiskError where either cannot be read."""
    found = next((int(window[0, 0]) for window in differences(first, second, progress=progress)), None)
    return Comparison(first.size, second.size, found)


def differences(first: Disk, second: Disk, *, progress: Progress = silent) -> Iterator[Extents]:
    """Yield the extents in which two disks differ, in whole sectors of 512 bytes, ascending."""
    size = max(first.size, second.size)
    buffers = Buffers(CHUNK_BYTES, count=2)

    def differing(piece: tuple[int, int]) -> tuple[int, Extents]:
        taken = buffers.take()
        try:
            _read(first, *piece, taken[0])
            _read(second, *piece, taken[1])
            return piece[1], _different_sectors(*piece, *taken)
        finally:
            buffers.give_back(taken)

    done = 0
    for end, different in worked(_pieces(first, second, size), differing):
        # Progress counts bytes of the disks, not of what is read: how much there is to read is not known ahead.
        done = max(done, end)
        progress(done, size, "comparing")
        if len(different):
            yield np.minimum(different, size)
    progress(size, size, "comparing")


def _pieces(first: Disk, second: Disk, size: int) -> Iterator[tuple[int, int]]:
    """Cut what either disk holds into pieces of whole sectors, of at most ``CHUNK_BYTES``."""
    for window_start in range(0, size, WINDOW_BYTES):
        window_end = min(size, window_start + WINDOW_BYTES)
        held = merged([*_held(first, window_start, window_end), *_held(second, window_start, window_end)])
        for start, end in held.tolist():
            last = min(size, -(-end // SECTOR_SIZE) * SECTOR_SIZE)
            for position in range(start // SECTOR_SIZE * SECTOR_SIZE, last, CHUNK_BYTES):
                yield position, min(last, position + CHUNK_BYTES)


def _held(disk: Disk, start: int, end: int) -> list[Extents]:
    end = min(end, disk.size)
    return list(disk.allocated(start, end)) if start < end else []


def _read(disk: Disk, start: int, end: int, buffer: bytearray) -> None:
    """Fill ``buffer`` with [start, end) of a disk, with zeros past the disk's end and up to a whole sector."""
    view = memoryview(buffer)[: -(-(end - start) // SECTOR_SIZE) * SECTOR_SIZE]
    readable = max(0, min(end, disk.size) - start)
    if readable:
        disk.read_into(start, view[:readable])
    view[readable:] = bytes(len(view) - readable)


def _different_sectors(start: int, end: int, one: bytearray, other: bytearray) -> Extents:
    length = -(-(end - start) // SECTOR_SIZE) * SECTOR_SIZE
    first, second = (np.frombuffer(buffer, dtype=np.uint64, count=length // 8) for buffer in (one, other))
    if np.array_equal(first, second):  # most are
        return EMPTY
    unequal = (first != second).reshape(-1, SECTOR_SIZE // 8).any(axis=1)
    return runs_of(unequal) * SECTOR_SIZE + start
