"""Proof that nothing was lost: the source's disks compared with the point that was made of them last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from replica.blockmap import BlockMap
from replica.errors import SourceError
from replica.failover.turn import Turn
from replica.leftovers import Leftovers
from replica.mapstore import MapStore, map_cache
from replica.model import Point
from replica.pipeline import ordered
from replica.scan import Comparer, plan
from replica.source import OpenDisk, OpenSource, Wanted, change_source, open_for_reading
from replica.workers import Workers


def prove(turn: Turn, point: Point, *, workers: Workers, open_disk: OpenDisk = open_for_reading) -> None:
    """Return if the source's disks hold what ``point`` does. Raises SourceError, DiskError where they do not.

    A disk whose own record of changes says that there was none is believed; of any other all is read and compared by
    hash. Nothing is written.
    """
    before = {disk.number: disk for disk in point.disks}
    wanted = Wanted(
        vm_id=turn.found.vm.vm_id,
        point=point.point + 1,
        sources=tuple(sorted(turn.settings.sources, key=lambda one: one.number)),
        before=before,
        randomness=turn.host.randomness,
        based_on=point.point,
    )
    known = BlockMap(point.maps, MapStore(turn.store, turn.found.keys, map_cache(turn.host)).fetch)
    comparer = Comparer(hash_seed=turn.found.vm.hash_seed, compression_level=1, leftovers=Leftovers())
    with (
        change_source(wanted.sources, open_disk).open(wanted) as instant,
        ThreadPoolExecutor(workers.threads, "compare") as pool,
    ):
        for one in instant.disks:
            record = before.get(one.source.number)
            if record is None or record.size != one.disk.size or _differs(turn, one, known, comparer, pool, workers):
                raise SourceError(
                    f"the disk was written to after point {point.point} was made of it",
                    path=one.source.path,
                    hint="is the VM running, or was it started? shut it down, and fail over again",
                )
    instant.dismiss()


def _differs(
    turn: Turn, one: OpenSource, known: BlockMap, comparer: Comparer, pool: ThreadPoolExecutor, workers: Workers
) -> bool:
    tasks = plan(one.disk, one.source.number, known, one.found.changed)
    results = ordered(pool, comparer, tasks, limit=workers.batches, tick=turn.held.renew_if_due)
    with closing(results):
        for changes in results:
            if changes.added_blocks or changes.removed_blocks:
                return True
            turn.held.renew_if_due()
    return False
