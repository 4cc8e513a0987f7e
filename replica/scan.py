"""The change source that always works: reads what a disk holds and compares its hashes with the newest point's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from replica.block import (
    BLOCK_BYTES,
    Digest,
    HashArray,
    KeyArray,
    disk_base,
    hash_blocks,
    zero_hash,
)
from replica.blockmap import WINDOW_BLOCKS, BlockMap, Window
from replica.leftovers import Leftovers
from replica.maptable import Entries, SegmentTable, newest_wins
from replica.seeding import SeedPoint
from replica.segment import FrameCompressor, Frames
from vhdx.disk import Disk, Extents

BATCH_BLOCKS: Final = 64  # 4 MiB: what one task reads, hashes and compresses
# So many changed blocks of a window (of 4 GiB) are read whether the disk holds anything there or not: that is less work
# than to ask, which takes every file of a chain, and finds zeros as well.
FEW_BLOCKS: Final = 64

Ranges: TypeAlias = list[tuple[int, int]]  # half-open, block numbers
Distrust: TypeAlias = Callable[[Window], npt.NDArray[np.bool_]]  # which entries of a window are of damaged frames


@dataclass(frozen=True, slots=True)
class Known:
    """What the newest point says of a window's blocks, dense: whether each is data, and its hash if so.

    What the store has of the ``distrusted`` ones (None: of none) is damaged: they are stored again in any case.
    """

    is_data: npt.NDArray[np.bool_]
    hashes: HashArray
    distrusted: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A task: at most ``BATCH_BLOCKS`` to read and compare, and blocks that the disk no longer holds."""

    disk: Disk
    base: int  # key of the disk's block 0
    window: int  # number of the window that all of them lie in
    ranges: Ranges
    known: Known | None
    vanished: Entries | None = None


@dataclass(slots=True)
class Changes:
    """What is to be stored of a batch, and how the disk's digest moves."""

    window: int
    frames: Frames | None = None  # blocks to store
    found: tuple[Entries, SegmentTable] | None = None  # blocks that are stored already
    zeros: list[KeyArray] = field(default_factory=list)  # blocks that were data and now are zero
    added: Digest = field(default_factory=Digest)
    removed: Digest = field(default_factory=Digest)
    added_blocks: int = 0
    removed_blocks: int = 0
    read_bytes: int = 0

    def differing(self) -> Iterator[KeyArray]:
        """Yield the keys of all blocks that differ from the newest point's."""
        if self.frames is not None:
            yield self.frames.keys
        if self.found is not None:
            yield self.found[0].keys
        yield from self.zeros


def plan(
    disk: Disk,
    disk_number: int,
    known: BlockMap,
    changed: Callable[[], Iterator[Extents]] | None = None,
    distrust: Distrust | None = None,
) -> Iterator[Batch]:
    """Yield the tasks that find everything in which ``disk`` differs from ``known``, in ascending order.

    ``changed`` yields the only extents that may differ; without it all that the disk holds is compared. ``distrust``
    tells which blocks to store again although they do not differ; only those that are compared can be.
    Memory: a window of the map laid out densely, about 1.1 MiB.
    """
    base = disk_base(disk_number)
    if changed is not None:
        yield from _plan_changed(disk, base, known, changed(), distrust)
        return
    held = _windows_of(disk.allocated())
    mapped = known.windows(base, disk_base(disk_number + 1))
    next_held, next_mapped = next(held, None), next(mapped, None)
    while next_held is not None or next_mapped is not None:
        held_number = next_held[0] if next_held else None
        mapped_number = (next_mapped.first - base) // WINDOW_BLOCKS if next_mapped else None
        number = min(n for n in (held_number, mapped_number) if n is not None)
        ranges: Ranges = []
        window: Window | None = None
        if next_held is not None and held_number == number:
            ranges, next_held = next_held[1], next(held, None)
        if next_mapped is not None and mapped_number == number:
            window, next_mapped = next_mapped, next(mapped, None)
        yield from _window_batches(disk, base, number, ranges, window, distrust)


def _plan_changed(
    disk: Disk, base: int, known: BlockMap, changed: Iterator[Extents], distrust: Distrust | None
) -> Iterator[Batch]:
    for number, touched in _windows_of(changed):
        first = number * WINDOW_BLOCKS
        start, end = first * BLOCK_BYTES, min((first + WINDOW_BLOCKS) * BLOCK_BYTES, disk.size)
        last = -(-disk.size // BLOCK_BYTES)
        ranges = [(start, min(stop, last)) for start, stop in touched if start < last]
        if sum(stop - start for start, stop in touched) > FEW_BLOCKS:
            held = [found for _, found in _windows_of(disk.allocated(start, end))]
            ranges = _common(held[0], touched) if held else []
        window = known.window(base + first, base + first + WINDOW_BLOCKS)
        entries = window.entries.take(_within(window.entries.keys - np.uint64(base), touched))
        inside = replace(window, entries=entries) if len(entries) else None
        yield from _window_batches(disk, base, number, ranges, inside, distrust)


def _within(blocks: KeyArray, ranges: Ranges) -> npt.NDArray[np.bool_]:
    """Tell which of the ascending ``blocks`` lie in one of ``ranges``."""
    edges = np.array(ranges, np.uint64).reshape(-1)
    return np.equal(np.searchsorted(edges, blocks, side="right") % 2, 1)


def _common(first: Ranges, second: Ranges) -> Ranges:
    """Return what two lists of ranges have in common."""
    common: Ranges = []
    one = other = 0
    while one < len(first) and other < len(second):
        start, end = max(first[one][0], second[other][0]), min(first[one][1], second[other][1])
        if start < end:
            common.append((start, end))
        if first[one][1] < second[other][1]:
            one += 1
        else:
            other += 1
    return common


def _windows_of(found: Iterator[Extents]) -> Iterator[tuple[int, Ranges]]:
    """Yield window numbers with the ranges of blocks in them that the extents touch; ascending, ranges merged."""
    number, ranges = -1, Ranges()
    for extents in found:
        starts = extents[:, 0] // BLOCK_BYTES
        ends = -(-extents[:, 1] // BLOCK_BYTES)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            while start < end:
                if start // WINDOW_BLOCKS != number:
                    if ranges:
                        yield number, ranges
                    number, ranges = start // WINDOW_BLOCKS, []
                stop = min(end, (number + 1) * WINDOW_BLOCKS)
                if ranges and start <= ranges[-1][1]:
                    ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
                else:
                    ranges.append((start, stop))
                start = stop
    if ranges:
        yield number, ranges


def _window_batches(
    disk: Disk, base: int, number: int, ranges: Ranges, window: Window | None, distrust: Distrust | None
) -> Iterator[Batch]:
    known, vanished = None, None
    if window is not None:
        data = window.entries.take(window.entries.is_data)
        places = (data.keys - np.uint64(base + number * WINDOW_BLOCKS)).astype(np.intp)
        known = Known(
            np.zeros(WINDOW_BLOCKS, np.bool_),
            np.zeros((WINDOW_BLOCKS, 2), np.uint64),
            None if distrust is None else np.zeros(WINDOW_BLOCKS, np.bool_),
        )
        if distrust is not None and known.distrusted is not None:
            known.distrusted[places] = distrust(replace(window, entries=data))
        known.is_data[places] = True
        known.hashes[places] = data.hashes
        held = np.zeros(WINDOW_BLOCKS, np.bool_)
        for start, end in ranges:
            held[start - number * WINDOW_BLOCKS : end - number * WINDOW_BLOCKS] = True
        gone = data.take(~held[places])
        vanished = gone if len(gone) else None
    if vanished is not None:
        yield Batch(disk, base, number, [], None, vanished)
    batch: Ranges = []
    room = BATCH_BLOCKS
    for start, end in ranges:
        while start < end:
            stop = min(end, start + room)
            batch.append((start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield Batch(disk, base, number, batch, known)
                batch, room = [], BATCH_BLOCKS
    if batch:
        yield Batch(disk, base, number, batch, known)


class Comparer:
    """Does the tasks: reads, hashes, compares, compresses. Callable from several threads; each has its own buffer."""

    def __init__(
        self, *, hash_seed: int, compression_level: int, leftovers: Leftovers, seed_point: SeedPoint | None = None
    ) -> None:
        self._seed = hash_seed
        self._level = compression_level
        self._zero_hash = zero_hash(hash_seed)
        self._leftovers = leftovers
        self._seed_point = seed_point
        self._local = threading.local()

    def __call__(self, batch: Batch) -> Changes:
        """Do one task. Raises DiskError where the disk cannot be read."""
        changes = Changes(batch.window)
        if batch.vanished is not None:
            changes.zeros.append(batch.vanished.keys)
            changes.removed.add(batch.vanished.keys, batch.vanished.hashes)
            changes.removed_blocks += len(batch.vanished)
        if batch.ranges:
            self._compare(batch, changes)
        return changes

    def _compare(self, batch: Batch, changes: Changes) -> None:
        data = self._read(batch)
        changes.read_bytes = len(data)
        hashes = hash_blocks(data, self._seed)
        blocks = np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in batch.ranges])
        # As with a block that has not changed, the hash decides: its bits are as many for zeros as for anything else.
        zero = np.asarray(np.all(hashes == self._zero_hash, axis=1))
        if batch.known is None:
            picked = np.flatnonzero(~zero)
        else:
            places = blocks - batch.window * WINDOW_BLOCKS
            was_data, old = batch.known.is_data[places], batch.known.hashes[places]
            changed = zero | np.any(hashes != old, axis=1) | ~was_data
            if batch.known.distrusted is not None:
                changed |= batch.known.distrusted[places]
            replaced = np.flatnonzero(was_data & changed)
            if len(replaced):
                keys = blocks[replaced].astype(np.uint64) + np.uint64(batch.base)
                changes.removed.add(keys, old[replaced])
                changes.removed_blocks += len(replaced)
                cleared = zero[replaced]
                if cleared.any():
                    changes.zeros.append(keys[cleared])
            picked = np.flatnonzero(changed & ~zero)
        if len(picked):
            keys = blocks[picked].astype(np.uint64) + np.uint64(batch.base)
            self._store(data, picked, keys, hashes[picked], changes)

    def _store(
        self, data: memoryview, picked: npt.NDArray[np.intp], keys: KeyArray, hashes: HashArray, changes: Changes
    ) -> None:
        changes.added.add(keys, hashes)
        changes.added_blocks = len(keys)
        found, table, is_found = self._leftovers.find(keys, hashes)
        if self._seed_point is not None and not is_found.all():
            left = np.flatnonzero(~is_found)
            equal, is_equal = self._seed_point.find(data, picked[left], keys[left], hashes[left], table)
            found = newest_wins([found, equal])
            is_found[left[is_equal]] = True
        if len(found):
            changes.found = (found, table)
            picked, keys, hashes = picked[~is_found], keys[~is_found], hashes[~is_found]
        if len(picked):
            changes.frames = self._compressor().compress(data, picked, keys, hashes)

    def _read(self, batch: Batch) -> memoryview:
        buffer = self._buffer()
        filled = 0
        size = batch.disk.size
        for start, end in batch.ranges:
            length = min(end * BLOCK_BYTES, size) - start * BLOCK_BYTES
            batch.disk.read_into(start * BLOCK_BYTES, buffer[filled : filled + length])
            filled += (end - start) * BLOCK_BYTES
            if length < (end - start) * BLOCK_BYTES:  # the disk ends within its last block: pad with zeros
                pad = (end - start) * BLOCK_BYTES - length
                buffer[filled - pad : filled] = bytes(pad)
        return buffer[:filled]

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(BATCH_BLOCKS * BLOCK_BYTES))
        buffer: memoryview = self._local.buffer
        return buffer

    def _compressor(self) -> FrameCompressor:
        if not hasattr(self._local, "compressor"):
            self._local.compressor = FrameCompressor(self._level)
        compressor: FrameCompressor = self._local.compressor
        return compressor
