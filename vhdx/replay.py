"""A file as it reads once its log has been replayed: the log's changes laid over it, nothing written.

``Overlay`` is what the log changes, as disjoint ranges; ``ReplayedFile`` reads a file through it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vhdx.osfile import File


class ReadableFile(Protocol):
    """The reading half of ``vhdx.osfile.File``."""

    @property
    def path(self) -> Path:
        """The path it was opened by."""

    def size(self) -> int:
        """Return the file's length, bytes."""

    def pread(self, offset: int, length: int) -> bytes:
        """Return the bytes from ``offset``; fewer only where the file ends."""

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` and return the bytes filled; fewer only where the file ends."""

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield ranges within [start, end), ascending, outside which the file holds nothing but zeros."""


@dataclass(frozen=True, slots=True)
class Change:
    """A range of the file, [start, end), and what it is to hold: ``data`` of that length, or zeros where None."""

    start: int
    end: int
    data: bytes | None


class Overlay:
    """Changes to a file, disjoint and ascending."""

    def __init__(self, changes: Sequence[Change] = ()) -> None:
        self.changes = tuple(changes)
        self._starts = [change.start for change in self.changes]

    def __bool__(self) -> bool:
        return bool(self.changes)

    @classmethod
    def of(cls, writes: Sequence[Change]) -> Overlay:
        """Return what remains of ``writes``, which may overlap, when each is applied after those before it."""
        bounds = sorted({bound for write in writes for bound in (write.start, write.end)})
        place = {bound: index for index, bound in enumerate(bounds)}
        # Paint from the newest to the oldest; skip[i] leads from a cell that has its owner to the next without one,
        # so each cell is visited once however the writes overlap.
        owner: list[int] = [-1] * len(bounds)
        skip = list(range(len(bounds) + 1))
        for index in range(len(writes) - 1, -1, -1):
            cell, stop = _find(skip, place[writes[index].start]), place[writes[index].end]
            while cell < stop:
                owner[cell] = index
                skip[cell] = cell + 1
                cell = _find(skip, cell + 1)
        return cls(list(_joined(writes, bounds, owner)))

    def overlapping(self, start: int, end: int) -> Iterator[Change]:
        """Yield the changes that reach into [start, end)."""
        first = max(0, bisect_right(self._starts, start) - 1)
        for position in range(first, len(self.changes)):  # a slice would copy all that follows
            change = self.changes[position]
            if change.start >= end:
                return
            if change.end > start:
                yield change


def _find(skip: list[int], cell: int) -> int:
    root = cell
    while skip[root] != root:
        root = skip[root]
    while skip[cell] != root:
        skip[cell], cell = root, skip[cell]
    return root


def _joined(writes: Sequence[Change], bounds: list[int], owner: list[int]) -> Iterator[Change]:
    """Yield the painted cells as changes, neighbours of one owner or of zeros joined."""
    zero_start = zero_end = -1
    cell = 0
    while cell < len(bounds) - 1:
        index = owner[cell]
        first = cell
        cell += 1
        if index < 0:
            continue
        while cell < len(bounds) - 1 and owner[cell] == index:
            cell += 1
        start, end, write = bounds[first], bounds[cell], writes[index]
        if write.data is None and zero_end == start:
            zero_end = end
            continue
        if zero_end > zero_start:
            yield Change(zero_start, zero_end, None)
        zero_start = zero_end = -1
        if write.data is None:
            zero_start, zero_end = start, end
        else:
            yield Change(start, end, write.data[start - write.start : end - write.start])
    if zero_end > zero_start:
        yield Change(zero_start, zero_end, None)


class ReplayedFile:
    """A file read through an overlay; ``size_after`` is its length once the log has been replayed."""

    def __init__(self, file: File, overlay: Overlay, size_after: int) -> None:
        self._file = file
        self._overlay = overlay
        self._size_after = size_after

    @property
    def path(self) -> Path:
        """The path of the file underneath."""
        return self._file.path

    def size(self) -> int:
        """Return the length after replay, bytes."""
        return max(self._file.size(), self._size_after)

    def pread(self, offset: int, length: int) -> bytes:
        """Return the bytes from ``offset``; fewer only where the replayed file ends."""
        buffer = bytearray(max(0, min(length, self.size() - offset)))
        return bytes(buffer[: self.pread_into(offset, memoryview(buffer))])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only where the replayed file ends."""
        filled = self._file.pread_into(offset, buffer)
        length = max(filled, min(len(buffer), self.size() - offset))
        if filled < length:  # what replay adds to the file's length reads as zeros
            buffer[filled:length] = bytes(length - filled)
        for change in self._overlay.overlapping(offset, offset + length):
            start, end = max(offset, change.start), min(offset + length, change.end)
            if change.data is None:
                buffer[start - offset : end - offset] = bytes(end - start)
            else:
                buffer[start - offset : end - offset] = change.data[start - change.start : end - change.start]
        return length

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the whole range: the overlay may put data anywhere."""
        end = min(end, self.size())
        if start < end:
            yield start, end
