"""Whether two disks hold the same, read only where either may hold anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from vhdx.disk import Disk, Extents
from vhdx.extents import merged, runs_of
from vhdx.progress import Progress, silent

SECTOR_SIZE: Final = 512  # what differences are told in, whatever sectors the disks have
WINDOW_BYTES: Final = 64 << 30  # extents are collected for so much of the disks at a time
CHUNK_BYTES: Final = 4 << 20  # and read in pieces of this size


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
    buffers = (bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES))
    done = 0
    for window_start in range(0, size, WINDOW_BYTES):
        window_end = min(size, window_start + WINDOW_BYTES)
        held = merged([*_held(first, window_start, window_end), *_held(second, window_start, window_end)])
        # Progress counts bytes of the disks, not of what is read: how much there is to read is not known ahead.
        for start, end in held.tolist():
            for position in range(start // SECTOR_SIZE * SECTOR_SIZE, end, CHUNK_BYTES):
                length = min(CHUNK_BYTES, size - position, -(-(end - position) // SECTOR_SIZE) * SECTOR_SIZE)
                different = _different_sectors(first, second, position, length, buffers)
                if len(different):
                    yield np.minimum(different, size)
                done = max(done, position + length)
                progress(done, size, "comparing")
    progress(size, size, "comparing")


def _held(disk: Disk, start: int, end: int) -> list[Extents]:
    end = min(end, disk.size)
    return list(disk.allocated(start, end)) if start < end else []


def _different_sectors(
    first: Disk, second: Disk, position: int, length: int, buffers: tuple[bytearray, bytearray]
) -> Extents:
    padded = -(-length // SECTOR_SIZE) * SECTOR_SIZE
    words = []
    for disk, buffer in zip((first, second), buffers, strict=True):
        view = memoryview(buffer)[:padded]
        readable = max(0, min(length, disk.size - position))
        disk.read_into(position, view[:readable])
        view[readable:] = bytes(padded - readable)
        words.append(np.frombuffer(view, dtype=np.uint64))
    unequal = (words[0] != words[1]).reshape(-1, SECTOR_SIZE // 8).any(axis=1)
    return runs_of(unequal) * SECTOR_SIZE + position
