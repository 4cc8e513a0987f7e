"""Hashing what an open disk holds, block by block: for comparing it with maps, and for its digest."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from replica.block import BLOCK_BYTES, Digest, HashArray, block_count, hash_blocks, zero_hash
from replica.blockmap import WINDOW_BLOCKS
from replica.failback.difference import WINDOW_BYTES, Dense
from replica.failback.ranges import whole_blocks
from replica.pipeline import ordered
from replica.workers import Workers
from vhdx.disk import Disk, Extents
from vhdx.extents import EMPTY, clipped, merged, total_length
from vhdx.progress import Progress, silent

BATCH_BYTES: Final = 4 << 20

Numbers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hashed:
    """Blocks of a disk that were read: their numbers, ascending, their hashes, and which of them are zeros."""

    numbers: Numbers
    hashes: HashArray
    is_zero: npt.NDArray[np.bool_]


class Hasher:
    """Reads and hashes, several batches at once. Memory: 4 MiB for each batch under way, and 2.5 MiB."""

    def __init__(self, hash_seed: int, workers: Workers, progress: Progress = silent, phase: str = "comparing") -> None:
        self._seed = hash_seed
        self._workers = workers
        self._zero = zero_hash(hash_seed)
        self._progress = progress
        self._phase = phase
        self._done = 0

    def hashed(self, disk: Disk, extents: Extents) -> Iterator[Hashed]:
        """Yield the blocks of ``extents`` (whole blocks) as ``disk`` holds them. Raises DiskError."""
        total = self._done + total_length(extents)

        def work(batch: tuple[int, int]) -> Hashed:
            start, end = batch
            numbers = np.arange(start // BLOCK_BYTES, block_count(end), dtype=np.int64)
            buffer = memoryview(bytearray(len(numbers) * BLOCK_BYTES))  # what lies past the disk's end is zeros
            inside = min(end, disk.size) - start
            if inside > 0:
                disk.read_into(start, buffer[:inside])
            hashes = hash_blocks(buffer, self._seed)
            return Hashed(numbers, hashes, np.asarray(np.all(hashes == self._zero, axis=1)))

        with (
            ThreadPoolExecutor(self._workers.threads, "hash") as pool,
            closing(ordered(pool, work, _batches(extents), limit=self._workers.batches)) as results,
        ):
            for one in results:
                yield one
                self._done += len(one.numbers) * BLOCK_BYTES
                self._progress(min(self._done, total), total, self._phase)

    def windows(self, disk: Disk, size: int) -> Iterator[tuple[int, Dense]]:
        """Yield the number and content of each window of [0, size) in which ``disk`` holds data, ascending."""
        for number in range(-(-size // WINDOW_BYTES)):
            held = held_blocks(disk, number * WINDOW_BYTES, min(size, (number + 1) * WINDOW_BYTES))
            if not len(held):
                continue
            dense = Dense.empty()
            for one in self.hashed(disk, held):
                places = one.numbers[~one.is_zero] - number * WINDOW_BLOCKS
                dense.is_data[places] = True
                dense.hashes[places] = one.hashes[~one.is_zero]
            yield number, dense

    def digest(self, disk: Disk) -> tuple[Digest, int]:
        """Return the digest of all that ``disk`` holds, as manifests have it, and how many blocks are data."""
        digest, count = Digest(), 0
        for number, dense in self.windows(disk, disk.size):
            places = np.flatnonzero(dense.is_data)
            digest.add((places + number * WINDOW_BLOCKS).astype(np.uint64), dense.hashes[places])
            count += len(places)
        return digest, count


def held_blocks(disk: Disk, start: int, end: int) -> Extents:
    """Return the whole blocks within [start, end), which begins on one, that may hold data."""
    stop = min(end, disk.size)
    if start >= stop:
        return EMPTY
    return clipped(whole_blocks(merged(list(disk.allocated(start, stop))), end), start, end)


def _batches(extents: Extents) -> Iterator[tuple[int, int]]:
    for start, end in extents.tolist():
        for offset in range(start, end, BATCH_BYTES):
            yield offset, min(end, offset + BATCH_BYTES)
