"""In which blocks two states of a disk differ, told by the hashes that maps hold: nothing else is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from replica.block import BLOCK_BYTES, HashArray, block_count, disk_base
from replica.blockmap import WINDOW_BLOCKS, BlockMap, FetchPart, Window
from replica.failback.ranges import subtracted
from replica.maptable import Entries
from replica.model import MapRef
from vhdx.disk import Extents
from vhdx.extents import EMPTY, merged, runs_of, total_length

Flags = npt.NDArray[np.bool_]
WINDOW_BYTES: Final = WINDOW_BLOCKS * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Difference:
    """Blocks in which a newer state differs: those that hold data in it, and those that are zeros in it.

    Extents of whole blocks, bytes, the last cut at the disk's end. Memory: 16 bytes for each run of blocks.
    """

    data: Extents
    zeros: Extents

    @property
    def all(self) -> Extents:
        """Both together."""
        return merged([self.data, self.zeros])

    @property
    def bytes(self) -> int:
        """What both cover."""
        return total_length(self.data) + total_length(self.zeros)

    def without(self, extents: Extents) -> Difference:
        """Return what lies outside of ``extents``."""
        return Difference(subtracted(self.data, extents), subtracted(self.zeros, extents))


NO_DIFFERENCE: Final = Difference(EMPTY, EMPTY)


@dataclass(frozen=True, slots=True)
class Dense:
    """A window's blocks laid out by number: whether each is data, and its hash if so. About 1.1 MiB."""

    is_data: Flags
    hashes: HashArray

    @classmethod
    def empty(cls) -> Dense:
        """Return a window of zeros."""
        return cls(np.zeros(WINDOW_BLOCKS, np.bool_), np.zeros((WINDOW_BLOCKS, 2), np.uint64))

    @classmethod
    def of(cls, window: Window) -> Dense:
        """Lay out a whole window of a map."""
        dense = cls.empty()
        data = window.entries.take(window.entries.is_data)
        places = (data.keys - np.uint64(window.first)).astype(np.intp)
        dense.is_data[places] = True
        dense.hashes[places] = data.hashes
        return dense

    def differs(self, other: Dense) -> Flags:
        """Return which blocks differ."""
        unequal: Flags = np.any(self.hashes != other.hashes, axis=1)
        unequal &= self.is_data
        return unequal | np.not_equal(self.is_data, other.is_data)


class Gathered:
    """Collects runs of blocks, window by window."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._parts: list[Extents] = []

    def add(self, window: int, flags: Flags) -> None:
        """Add the blocks of a window that are flagged."""
        runs = (runs_of(flags) + window * WINDOW_BLOCKS) * BLOCK_BYTES
        if len(runs):
            runs = runs[runs[:, 0] < self._size]
            self._parts.append(np.minimum(runs, self._size))

    def extents(self) -> Extents:
        """Return all that was added, runs joined across windows."""
        return merged(self._parts)


@dataclass(frozen=True, slots=True)
class Maps:
    """A point's maps: all of them as one, and as one those that another point has not."""

    all: BlockMap
    own: BlockMap


def maps_of(base: Sequence[MapRef], newest: Sequence[MapRef], fetch: FetchPart) -> tuple[Maps, Maps]:
    """Return the maps of two points of one VM. Where they differ, what only one of them has says anything."""
    common = 0
    while common < min(len(base), len(newest)) and base[common] == newest[common]:
        common += 1
    return (
        Maps(BlockMap(base, fetch), BlockMap(base[common:], fetch)),
        Maps(BlockMap(newest, fetch), BlockMap(newest[common:], fetch)),
    )


def differing(base: Maps, newest: Maps, disk: int, size: int) -> Difference:
    """Return where the disk of that number and ``size`` differs in ``newest`` from ``base``.

    Only windows are looked at of which the maps that they do not share say anything. Memory: a window of each laid out
    densely, about 2.5 MiB, and the result. Raises IntegrityError, StoreError.
    """
    data, zeros = Gathered(size), Gathered(size)
    for number in windows_in_use([base.own, newest.own], disk, size):
        after = dense_window(newest.all, disk, number)
        unequal = after.differs(dense_window(base.all, disk, number))
        data.add(number, unequal & after.is_data)
        zeros.add(number, unequal & ~after.is_data)
    return Difference(data.extents(), zeros.extents())


def dense_window(known: BlockMap, disk: int, number: int) -> Dense:
    """Return a window of a disk, by its number, laid out densely."""
    first = disk_base(disk) + number * WINDOW_BLOCKS
    return Dense.of(known.window(first, first + WINDOW_BLOCKS))


def windows_in_use(maps: Sequence[BlockMap], disk: int, size: int) -> Iterator[int]:
    """Yield the numbers of the windows in which any of the maps has entries."""
    first = disk_base(disk)
    end = first + block_count(size)
    position = first
    while position < end:
        keys = [key for key in (one.next_key(position) for one in maps) if key is not None and key < end]
        if not keys:
            return
        number = (min(keys) - first) // WINDOW_BLOCKS
        yield number
        position = first + (number + 1) * WINDOW_BLOCKS


def within(entries: Entries, disk: int, extents: Extents) -> Flags:
    """Return which of a window's entries are of blocks that begin in ``extents``."""
    offsets = (entries.keys - np.uint64(disk_base(disk))).astype(np.int64) * BLOCK_BYTES
    return np.equal(np.searchsorted(extents.reshape(-1), offsets, side="right") % 2, 1)


def blocks_of(extents: Extents) -> Iterator[tuple[int, int]]:
    """Yield (offset, end) of each block of extents that begin on blocks."""
    for start, end in extents.tolist():
        for offset in range(start, end, BLOCK_BYTES):
            yield offset, min(end, offset + BLOCK_BYTES)
