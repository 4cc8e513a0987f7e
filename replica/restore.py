"""Restores disks of a recovery point into files: all is checked, and a file gets its name once it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from replica.block import BLOCK_BYTES, Digest, block_count, disk_base
from replica.blockmap import BlockMap, Window
from replica.catalog import ProtectedVm
from replica.errors import IntegrityError
from replica.host import Host
from replica.mapstore import MapStore, map_cache
from replica.model import DiskRecord, Point
from replica.pipeline import ordered
from replica.reader import BlockReader, Fetch, digest_of, plan_fetches
from replica.stores.store import Store
from replica.workers import BATCHES_PER_THREAD, Workers
from vhdx.disk import Extents, ReadableBuffer
from vhdx.progress import Progress, silent


class Target(Protocol):
    """A new disk being filled: what was never written reads as zeros."""

    def prepare(self, extents: Extents) -> None:
        """Make room for the extents; afterwards threads may write there at once."""

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``."""


class Nowhere:
    """A target that keeps nothing: restoring into it verifies."""

    def prepare(self, extents: Extents) -> None:
        """Do nothing."""

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class DiskCheck:
    """What restoring a disk found: all of it was checked against the manifest's digest."""

    disk: DiskRecord
    data_blocks: int

    @property
    def data_bytes(self) -> int:
        """Bytes of blocks that are not zero."""
        return self.data_blocks * BLOCK_BYTES


class PointReader:
    """Reads one recovery point."""

    def __init__(self, store: Store, host: Host, found: ProtectedVm, point: Point, workers: Workers) -> None:
        self._fetches = workers.fetches(store.url)
        self._point = point
        self._map = BlockMap(point.maps, MapStore(store, found.keys, map_cache(host)).fetch)
        self._reader = BlockReader(store, found.keys.tenant, found.vm.hash_seed)

    def restore(
        self,
        disk: DiskRecord,
        target: Target,
        progress: Progress = silent,
        *,
        phase: str = "restoring",
        needed: Callable[[Window], Window] = lambda window: window,
    ) -> DiskCheck:
        """Write every data block of ``disk`` into ``target``, each checked against the hash taken when it was read.

        ``needed`` tells which blocks of a window to read: all, or for verification those not read before. The digest
        is over all of them in any case. Memory: about 12 MiB for each thread and what the map holds. Raises
        IntegrityError naming the object that is damaged; what was written until then must be thrown away.
        """
        digest = Digest()
        blocks = done = 0

        def fetches() -> Iterator[Fetch]:
            nonlocal blocks
            base = disk_base(disk.number)
            for window in self._map.windows(base, base + block_count(disk.size)):
                found, count = digest_of(window)
                digest.combine(found, Digest())
                blocks += count
                numbers = window.entries.keys[window.entries.is_data].astype(np.int64) - base
                target.prepare(extents_of(numbers, disk.size))
                yield from plan_fetches(needed(window))

        def work(fetch: Fetch) -> int:
            read = self._reader.read(fetch)
            for number, data in zip(read.numbers, read.data, strict=True):
                room = disk.size - number * BLOCK_BYTES
                target.write_at(number * BLOCK_BYTES, data if room >= BLOCK_BYTES else memoryview(data)[:room])
            return len(read.numbers) * BLOCK_BYTES

        with ThreadPoolExecutor(self._fetches, "restore") as pool:
            results = ordered(pool, work, fetches(), limit=self._fetches * BATCHES_PER_THREAD)
            with closing(results):
                for count in results:
                    done += count
                    progress(done, disk.data_blocks * BLOCK_BYTES, phase)
        if digest != disk.digest or blocks != disk.data_blocks:
            raise IntegrityError(
                f"disk {disk.number} of point {self._point.point} holds other blocks than were replicated: "
                f"its maps are damaged (digest {digest}, expected {disk.digest})",
            )
        return DiskCheck(disk, blocks)


def extents_of(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> Extents:
    """Return the extents of blocks given by ascending number, neighbours as one, cut at the disk's end."""
    edges = np.flatnonzero(np.diff(numbers) != 1)
    first = numbers[np.concatenate(([0], edges + 1))] if len(numbers) else numbers
    last = numbers[np.concatenate((edges, [len(numbers) - 1]))] if len(numbers) else numbers
    extents: Extents = np.stack((first * BLOCK_BYTES, np.minimum((last + 1) * BLOCK_BYTES, size)), axis=1)
    return extents
