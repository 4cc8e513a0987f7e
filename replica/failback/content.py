"""What a home disk is to hold: the newest point, taken from the home disk where both agree, converted back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from replica.failback.difference import WINDOW_BYTES, Difference
from replica.failback.ranges import extents_from, whole_blocks
from replica.view import PointView
from vhdx.disk import Disk, Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import OutOfRangeError, ReadOnlyError
from vhdx.extents import clipped, merged


class ExactView(PointView):
    """A view that fetches what is asked for and never more: readers go from difference to difference."""

    def _look_ahead(self, first: int, end: int) -> None:
        return None


class _ReadOnly:
    """The writing half of a disk that is only read."""

    format = "point"
    read_only = True
    path: Path

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Refuse."""
        raise ReadOnlyError("a recovery point is not written to", path=str(self.path))

    def trim(self, offset: int, length: int) -> None:
        """Refuse."""
        raise ReadOnlyError("a recovery point is not written to", path=str(self.path))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: what is below is its owner's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class HomeView(_ReadOnly):
    """The newest point as a ``Disk``: blocks in which the home disk differs from the store, all others from it."""

    def __init__(self, home: Disk, point: PointView, difference: Difference) -> None:
        self._home = home
        self._point = point
        self._difference = difference
        self.path = point.path

    @property
    def size(self) -> int:
        """Virtual size, bytes: the newest point's."""
        return self._point.size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes: the home disk's."""
        return self._home.sector_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        buffer = bytearray(max(0, length))
        _check(self, offset, length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``."""
        view = memoryview(buffer).cast("B")
        end = offset + len(view)
        _check(self, offset, len(view))
        inside = min(end, self._home.size) - offset
        if inside > 0:
            self._home.read_into(offset, view[:inside])
        if inside < len(view):
            view[max(0, inside) :] = bytes(len(view) - max(0, inside))
        for start, stop in clipped(self._difference.zeros, offset, end).tolist():
            view[start - offset : stop - offset] = bytes(stop - start)
        for start, stop in clipped(self._difference.data, offset, end).tolist():
            self._point.read_into(start, view[start - offset : stop - offset])

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that may hold data, as ``Disk`` says."""
        end = self.size if end is None else min(end, self.size)
        for first in range(start // WINDOW_BYTES * WINDOW_BYTES, end, WINDOW_BYTES):
            low, high = max(start, first), min(end, first + WINDOW_BYTES)
            parts = [clipped(self._difference.data, low, high)]
            if low < min(high, self._home.size):
                parts += list(self._home.allocated(low, min(high, self._home.size)))
            window = merged(parts)
            if len(window):
                yield window


class LaidOver(_ReadOnly):
    """A ``Disk`` with ranges laid over it: what a conversion would write. ``ranges`` are (offset, data), ascending."""

    def __init__(self, below: Disk, ranges: Sequence[tuple[int, bytes]]) -> None:
        self._below = below
        self._ranges = ranges
        self._extents: Extents = extents_from((offset, offset + len(data)) for offset, data in ranges)
        self._starts = np.array([offset for offset, _ in ranges], np.int64)
        self.path = below.path

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._below.size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._below.sector_size

    @property
    def touched(self) -> Extents:
        """The whole blocks that anything is laid over."""
        return whole_blocks(self._extents, self.size)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        _check(self, offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``."""
        view = memoryview(buffer).cast("B")
        self._below.read_into(offset, view)
        end = offset + len(view)
        at = max(0, int(np.searchsorted(self._starts, offset, side="right")) - 1)
        while at < len(self._ranges) and self._ranges[at][0] < end:
            start, data = self._ranges[at]
            low, high = max(offset, start), min(end, start + len(data))
            if low < high:
                view[low - offset : high - offset] = data[low - start : high - start]
            at += 1

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that may hold data, as ``Disk`` says."""
        end = self.size if end is None else min(end, self.size)
        for first in range(start // WINDOW_BYTES * WINDOW_BYTES, end, WINDOW_BYTES):
            low, high = max(start, first), min(end, first + WINDOW_BYTES)
            window = merged([*self._below.allocated(low, high), clipped(self._extents, low, high)])
            if len(window):
                yield window


def _check(disk: HomeView | LaidOver, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > disk.size:
        raise OutOfRangeError(
            f"{length} bytes at {offset} reach outside the disk of {disk.size} bytes", path=str(disk.path)
        )
