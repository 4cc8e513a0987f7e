"""Rewriting: makes a point that holds what the newest holds, and needs no thin segments (docs/ordering.md).

What the newest point needs of them is copied, frame by frame as it is stored; the map of the new point is written
whole, so that it names none of them. They go, by gc, when no older point needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from replica import catalog, history, lease, usage
from replica.block import BLOCK_BITS, disk_base
from replica.blockmap import WINDOW_BLOCKS, BlockMap, Window
from replica.catalog import ProtectedVm
from replica.errors import IntegrityError, LeaseHeldError, ObjectMissingError, StoreRefusedError
from replica.host import Host
from replica.keys import VmKeys
from replica.lease import Lease
from replica.mapstore import MapBuilder, MapStore, map_cache
from replica.maptable import Entries, SegmentRef
from replica.model import CycleStatistics, Point, Standing
from replica.packer import Packer
from replica.pipeline import Uploads, ordered
from replica.reader import BlockReader, Fetch, plan_fetches
from replica.scan import Changes
from replica.segment import INDEX_ROW, Frames
from replica.stores.store import Store
from replica.usage import DiskCheck, Terms, Thin
from replica.workers import Workers


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What a run did, or would do.

    ``point`` is the number of the point that was made, 0 for none; ``copied_bytes`` what was copied, and
    ``stored_bytes`` what the new segments take; ``damaged`` segments of which not all could be read: they stay.
    ``busy`` says why nothing was done although there was something to do.
    """

    thin: Thin
    point: int = 0
    copied_bytes: int = 0
    stored_bytes: int = 0
    damaged: tuple[str, ...] = ()
    busy: str | None = None


def plan(
    store: Store,
    host: Host,
    found: ProtectedVm,
    terms: Terms = usage.DEFAULT,
    *,
    is_lent: Callable[[SegmentRef], bool] = lambda ref: False,
) -> Thin:
    """Find the thin segments of a VM's newest point, changing nothing. ``is_lent``: whether another VM refers to one.

    Reads all of that point's maps, from this machine's cache where it has them. Raises IntegrityError.
    """
    newest = history.newest(store, found.keys) if terms.percent > 0 else None
    if newest is None:
        return Thin()
    maps = MapStore(store, found.keys, map_cache(host))
    return usage.thin(usage.of_point(newest, maps.fetch), found.keys, terms, is_lent)


def rewrite(store: Store, host: Host, found: ProtectedVm, thin: Thin, *, workers: Workers | None = None) -> Rewriting:
    """Make a point of the newest one's content that does not refer to ``thin``, under the VM's lease.

    Cut off at any instant, every point restores; what was written is garbage then. Where a cycle was cut off before,
    whose segments the next cycle is to make use of, that one comes first; and so does what a failover has begun.
    Raises LeaseLostError where another agent took over, IntegrityError where the maps are damaged, StoreError.
    """
    if not thin.segments:
        return Rewriting(thin)
    try:
        with lease.holding(store, found.keys, host) as held:
            newest = history.begin(store, found.keys, host, held)
            if newest is None:
                return Rewriting(thin)
            standing = catalog.read_settings(store, found.keys, held.settings_version).state.standing
            if standing is not Standing.PROTECTED:
                return Rewriting(thin, busy=f"the VM is {standing.value}; that comes first")
            if held.leftovers:
                return Rewriting(thin, busy="a cycle was cut off; the next one makes use of what it stored")
            return _Rewriter(store, host, found, held, newest, thin, workers or Workers()).run()
    except LeaseHeldError as error:
        return Rewriting(thin, busy=error.message)


class _Rewriter:
    """Writes the new point, under a lease."""

    def __init__(
        self,
        store: Store,
        host: Host,
        found: ProtectedVm,
        held: Lease,
        newest: Point,
        thin: Thin,
        workers: Workers,
    ) -> None:
        self._store = store
        self._host = host
        self._found = found
        self._held = held
        self._newest = newest
        self._thin = thin
        self._workers = workers
        self._number = held.point + 1
        self._reader = BlockReader(store, found.keys.tenant, found.vm.hash_seed)
        self._copied_bytes = 0
        self._damaged: dict[str, None] = {}

    def run(self) -> Rewriting:
        started = self._host.clock.monotonic()
        map_store = MapStore(self._store, self._found.keys, map_cache(self._host))
        with ThreadPoolExecutor(self._workers.uploads, "upload") as pool:
            uploads = Uploads(pool, limit=self._workers.uploads, tick=self._held.renew_if_due)
            try:
                maps = MapBuilder(
                    map_store,
                    self._found.vm.vm_id,
                    self._number,
                    self._held.epoch,
                    (),
                    disks=[disk.number for disk in self._newest.disks],
                    before_write=uploads.drain,
                )
                packer = Packer(
                    self._store, self._found.keys, maps, uploads, point=self._number, epoch=self._held.epoch
                )
                self._copy_all(BlockMap(self._newest.maps, map_store.fetch), packer)
                packer.finish()
                refs = maps.finish()
            except StoreRefusedError as error:
                # Credentials that may delete need not be such that may add. What was written before is garbage.
                return Rewriting(self._thin, busy=error.message)
            finally:
                uploads.abandon()
        made = replace(
            self._newest,
            point=self._number,
            epoch=self._held.epoch,
            previous=self._newest.point,
            published_at=self._host.clock.now(),
            maps=refs,
            cycle=CycleStatistics(
                read_bytes=0,
                changed_blocks=0,
                zero_blocks=0,
                reused_blocks=0,
                stored_bytes=packer.stored_bytes,
                segments=packer.segments,
                seconds=self._host.clock.monotonic() - started,
            ),
            repeats=self._newest.origin,
        )
        history.publish(self._store, self._found.keys, made)
        self._held.settle(self._number)
        map_store.forget_all_but(ref for one in refs for ref in one.parts)
        return Rewriting(self._thin, self._number, self._copied_bytes, packer.stored_bytes, tuple(self._damaged))

    def _copy_all(self, block_map: BlockMap, packer: Packer) -> None:
        """Give the packer every data block of the point: the frame where its segment is thin, else its old place."""
        with ThreadPoolExecutor(self._workers.threads, "copy") as pool:
            # In order of their numbers, which is that of the map, whatever the machine's order of disks is.
            for disk in sorted(self._newest.disks, key=lambda one: one.number):
                check = DiskCheck(disk)
                for window in block_map.windows(disk_base(disk.number), disk_base(disk.number + 1)):
                    check.add(window)
                    for changes in self._changes(window, pool):
                        packer.add(disk.number, changes)
                        self._held.renew_if_due()
                # What is published must be what the point held, also where a map part lies and nobody has looked yet.
                check.finish()

    def _changes(self, window: Window, pool: ThreadPoolExecutor) -> Iterator[Changes]:
        number = (window.first & ((1 << BLOCK_BITS) - 1)) // WINDOW_BLOCKS
        data = window.entries.take(window.entries.is_data)
        is_thin = np.array([ref in self._thin.segments for ref in window.table.refs], np.bool_)
        picked = is_thin[data.segments]
        kept = data.take(~picked)
        if len(kept):
            yield Changes(number, found=(kept, window.table))
        fetches = plan_fetches(replace(window, entries=data.take(picked)))
        results = ordered(pool, self._copy, fetches, limit=self._workers.batches, tick=self._held.renew_if_due)
        with closing(results):
            for fetch, frames in results:
                if frames is None:
                    self._damaged[self._key(fetch)] = None
                    yield Changes(number, found=(_by_key(fetch.entries), window.table))
                else:
                    self._copied_bytes += int(frames.lengths.sum()) + len(frames.lengths) * INDEX_ROW.itemsize
                    yield Changes(number, frames=frames)

    def _copy(self, fetch: Fetch) -> tuple[Fetch, Frames | None]:
        """Return the frames of a fetch as they are stored, every block checked; None where one of them is damaged."""
        try:
            data = self._store.get(self._key(fetch), start=fetch.start, length=fetch.length)
            if len(data) != fetch.length:
                return fetch, None
            self._reader.unpack(fetch, data)
        except (IntegrityError, ObjectMissingError):
            return fetch, None
        entries = fetch.entries
        starts = (entries.offsets - np.uint32(fetch.start)).tolist()
        payload = [data[start : start + length] for start, length in zip(starts, entries.lengths.tolist(), strict=True)]
        return fetch, Frames(entries.keys, entries.hashes, entries.lengths, entries.codecs, payload)

    def _key(self, fetch: Fetch) -> str:
        return VmKeys(self._found.keys.tenant, fetch.ref.vm_id).segment(fetch.ref.part)


def _by_key(entries: Entries) -> Entries:
    return entries.take(np.argsort(entries.keys, kind="stable"))
