"""A disk of a recovery point, read from the store as it is asked for: what instant recovery and conversions look at."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from replica.block import BLOCK_BYTES, block_count, disk_base
from replica.blockcache import BlockCache
from replica.blockmap import BlockMap, Window
from replica.catalog import ProtectedVm
from replica.host import Host
from replica.mapstore import MapStore, map_cache
from replica.model import DiskRecord, Point
from replica.reader import BlockReader, Fetch, plan_fetches
from replica.restore import extents_of
from replica.stores.store import Store
from replica.workers import Workers
from vhdx.disk import Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import OutOfRangeError, ReadOnlyError

INDEX_BLOCKS: Final = 8192  # 512 MiB of disk, whose entries are looked up at once
INDEX_WINDOWS: Final = 64  # kept: about 40 bytes a block, 20 MiB in all
AHEAD_BLOCKS: Final = 64  # read ahead of a reader that goes on where one was before: a whole fetch
FAR_AHEAD_BLOCKS: Final = 256  # and of one that has read so far in a row as a whole fetch reaches

_ZERO: Final = bytes(BLOCK_BYTES)


class PointView:
    """A ``vhdx.disk.Disk`` for reading. Threads may read at once; every block is checked before it is handed out.

    Memory: the cache's, 20 MiB of map, and 4 MiB for each fetch in flight. Raises IntegrityError and StoreError beside
    what a Disk raises.
    """

    format = "point"
    read_only = True

    def __init__(
        self,
        store: Store,
        host: Host,
        found: ProtectedVm,
        point: Point,
        disk: DiskRecord,
        *,
        cache: BlockCache | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._disk = disk
        self._map = BlockMap(point.maps, MapStore(store, found.keys, map_cache(host)).fetch)
        self._reader = BlockReader(store, found.keys.tenant, found.vm.hash_seed)
        self._cache = cache or BlockCache()
        fetches = (workers or Workers()).fetches(store.url)
        self._pool = ThreadPoolExecutor(fetches, "view")
        self._lock = threading.Lock()  # over what follows
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._coming: dict[int, Future[None]] = {}  # block → the fetch that will bring it
        self._map_lock = threading.Lock()
        self._most_ahead = fetches * AHEAD_BLOCKS
        self.path = Path(f"{found.vm.name}, point {point.point}, disk {disk.number}")

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._disk.size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._disk.sector_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        if length < 0:
            self._check(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``; whoever goes on where one has read has the next blocks fetched ahead."""
        view = memoryview(buffer).cast("B")
        at = 0
        # In pieces, so that a reader of very much at once does not hold all of it twice.
        piece = self._most_ahead * BLOCK_BYTES
        for start in range(0, len(view), piece):
            for part in self.read_parts(offset + start, min(piece, len(view) - start)):
                view[at : at + len(part)] = part
                at += len(part)
        self._check(offset, len(view))

    def read_parts(self, offset: int, length: int) -> list[memoryview]:
        """Return the bytes of a range as views of the blocks they lie in, without copying them."""
        self._check(offset, length)
        if not length:
            return []
        first, end = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1
        parts = [memoryview(block) for block in self._blocks(first, end)]
        parts[-1] = parts[-1][: offset + length - (end - 1) * BLOCK_BYTES]
        parts[0] = parts[0][offset - first * BLOCK_BYTES :]
        return parts

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents of blocks that hold data, as ``Disk`` says."""
        end = self.size if end is None else min(end, self.size)
        position = max(0, start) // BLOCK_BYTES
        while position * BLOCK_BYTES < end:
            with self._map_lock:
                key = self._map.next_key(self._base + position)
            if key is None or key - self._base >= block_count(end):
                return
            window = self._window((key - self._base) // INDEX_BLOCKS)
            keys = window.entries.keys[window.entries.is_data].astype(np.int64) - self._base
            extents = np.clip(extents_of(keys, self.size), start, end)
            extents = extents[extents[:, 0] < extents[:, 1]]
            if len(extents):
                yield extents
            position = ((key - self._base) // INDEX_BLOCKS + 1) * INDEX_BLOCKS

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Refuse: a recovery point never changes."""
        raise ReadOnlyError("a recovery point is not written to", path=str(self.path))

    def trim(self, offset: int, length: int) -> None:
        """Refuse: a recovery point never changes."""
        raise ReadOnlyError("a recovery point is not written to", path=str(self.path))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """End the fetches and forget the cache. Safe to repeat."""
        self._pool.shutdown(cancel_futures=True)
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _base(self) -> int:
        return disk_base(self._disk.number)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(
                f"{length} bytes at {offset} reach outside the disk of {self.size} bytes", path=str(self.path)
            )

    def _blocks(self, first: int, end: int) -> list[Any]:
        """Return the blocks [first, end), each a buffer of 65,536 bytes."""
        found: dict[int, Any] = {}
        missing = range(first, end)
        for _ in range(3):  # a small cache may lose a block before it is taken; the last turn below cannot
            waiting = self._request(missing, found)
            if missing == range(first, end):
                self._look_ahead(first, end)
            for future in waiting:
                future.result()
            missing = [number for number in missing if number not in found]  # type: ignore[assignment]
            if not missing:
                break
        for number in missing:
            found[number] = self._fetch_one(number)
        return [found[number] for number in range(first, end)]

    def _request(self, numbers: Sequence[int], found: dict[int, Any]) -> list[Future[None]]:
        """Put the blocks that are at hand into ``found``; return what brings the others."""
        absent: list[int] = []
        waiting: dict[int, Future[None]] = {}
        for number in numbers:
            block = self._cache.get(number)
            if block is not None:
                found[number] = block
            else:
                absent.append(number)
        for window_number, group in _grouped(absent):
            window = self._window(window_number)
            keys = np.array(group, np.uint64) + np.uint64(self._base)
            at = np.searchsorted(window.entries.keys, keys)
            at_most = np.minimum(at, max(0, len(window.entries) - 1))
            held = (
                (window.entries.keys[at_most] == keys) & window.entries.is_data[at_most]
                if len(window.entries)
                else np.zeros(len(keys), np.bool_)
            )
            for number in np.array(group)[~held].tolist():
                found[number] = _ZERO
            with self._lock:
                chosen = []
                for number, row in zip(np.array(group)[held].tolist(), at[held].tolist(), strict=True):
                    if number in self._coming:
                        waiting[id(self._coming[number])] = self._coming[number]
                    else:
                        chosen.append(row)
                if chosen:
                    entries = window.entries.take(np.array(chosen, np.intp))
                    for fetch in plan_fetches(Window(window.first, window.end, entries, window.table)):
                        future = self._start(fetch)
                        waiting[id(future)] = future
        return list(waiting.values())

    def _start(self, fetch: Fetch) -> Future[None]:
        numbers = (fetch.entries.keys - np.uint64(self._base)).tolist()
        future = self._pool.submit(self._bring, fetch, numbers)
        for number in numbers:
            self._coming[number] = future
        return future

    def _bring(self, fetch: Fetch, numbers: list[int]) -> None:
        try:
            read = self._reader.read(fetch)
            for number, block in zip(numbers, read.data, strict=True):
                self._cache.put(number, bytes(block))  # a copy: a view would keep the whole fetch
        finally:
            with self._lock:
                for number in numbers:
                    self._coming.pop(number, None)

    def _fetch_one(self, number: int) -> Any:
        window = self._window(number // INDEX_BLOCKS)
        at = window.entries.keys == np.uint64(self._base + number)
        for fetch in plan_fetches(Window(window.first, window.end, window.entries.take(at), window.table)):
            return self._reader.read(fetch).data[0]
        return _ZERO

    def _window(self, number: int) -> Window:
        with self._lock:
            window = self._windows.get(number)
            if window is not None:
                self._windows.move_to_end(number)
                return window
        with self._map_lock:
            first = self._base + number * INDEX_BLOCKS
            last = self._base + block_count(self.size)
            window = self._map.window(first, min(first + INDEX_BLOCKS, last))
        with self._lock:
            self._windows[number] = window
            while len(self._windows) > INDEX_WINDOWS:
                self._windows.popitem(last=False)
        return window

    def _look_ahead(self, first: int, end: int) -> None:
        """Begin to fetch what follows, where what goes before was read, and half of what follows is not on its way."""
        ahead = FAR_AHEAD_BLOCKS if self._is_known(first - AHEAD_BLOCKS) else AHEAD_BLOCKS
        stop = min(end + ahead, block_count(self.size))
        if end < stop and self._is_known(first - 1) and not self._is_known(min(end + ahead // 2, stop - 1)):
            with self._lock:
                busy = len(self._coming) > self._most_ahead
            if not busy:
                self._request(range(end, stop), {})

    def _is_known(self, number: int) -> bool:
        with self._lock:
            if number in self._coming:
                return True
        return self._cache.holds(number)


def _grouped(numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (index window, its numbers) of ascending block numbers."""
    group: list[int] = []
    for number in numbers:
        if group and number // INDEX_BLOCKS != group[0] // INDEX_BLOCKS:
            yield group[0] // INDEX_BLOCKS, group
            group = []
        group.append(number)
    if group:
        yield group[0] // INDEX_BLOCKS, group
