"""One replication cycle of one VM: from its disks to a new recovery point, in the order of docs/ordering.md."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from replica import catalog, history, holds, lease
from replica.block import Digest
from replica.blockmap import BlockMap
from replica.catalog import ProtectedVm
from replica.errors import GodwitError
from replica.failback.departure import Departure, departure
from replica.failover import conversions, transitions
from replica.failover.transitions import Command
from replica.generation.convertibility import Convertibility
from replica.generation.freshness import Freshness
from replica.host import Host
from replica.keys import VmKeys
from replica.lease import Lease
from replica.leftovers import Leftovers
from replica.mapstore import MapBuilder, MapStore, map_cache
from replica.model import CycleStatistics, DiskRecord, Point
from replica.packer import Packer
from replica.pipeline import Uploads, ordered
from replica.scan import Changes, Comparer, Distrust, plan
from replica.seeding import SeedPoint, open_seed
from replica.source import OpenDisk, OpenSource, Wanted, change_source, open_for_reading
from replica.stores.store import Store
from replica.tracking import SCAN, Found
from replica.workers import Workers
from vhdx.extents import total_length
from vhdx.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class _Tracked:
    """A disk of the VM, what it was in the newest point, and how its changes are found."""

    source: OpenSource
    before: DiskRecord | None
    found: Found

    def bytes_to_read(self) -> int:
        """Return how many bytes are to be compared, at most."""
        disk = self.source.disk
        extents = self.found.changed() if self.found.changed else disk.allocated()
        return sum(total_length(part) for part in extents)


@dataclass(slots=True)
class _Totals:
    """What the cycle did so far."""

    read_bytes: int = 0
    changed_blocks: int = 0
    zero_blocks: int = 0
    reused_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Basis:
    """What a cycle builds upon: a point (None: it is the first), and which of its blocks are stored anew.

    With ``distrust``, everything is compared by hash, and nothing that an unfinished cycle left is made use of.
    """

    point: Point | None
    distrust: Distrust | None = None


def replicate(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    workers: Workers | None = None,
    progress: Progress = silent,
    open_disk: OpenDisk = open_for_reading,
    rescan: bool = False,
) -> Point:
    """Make a recovery point of the VM as it is now, and return it.

    ``rescan``: compare all that the disks hold by hash, whatever their files tell of what changed.
    Raises StandingError where the VM's standing forbids it (docs/failover.md), LeaseHeldError where another agent is at
    work, LeaseLostError where one took over, SourceError or DiskError where a disk cannot be read or changed
    meanwhile, StoreError. After an error nothing was published, and what was uploaded is used by the next cycle.
    """
    with lease.holding(store, found.keys, host) as held:
        basis = Basis(history.begin(store, found.keys, host, held))
        return run(
            store, host, found, held, basis, workers=workers, progress=progress, open_disk=open_disk, rescan=rescan
        )


def run(
    store: Store,
    host: Host,
    found: ProtectedVm,
    held: Lease,
    basis: Basis,
    *,
    workers: Workers | None = None,
    progress: Progress = silent,
    open_disk: OpenDisk = open_for_reading,
    rescan: bool = False,
) -> Point:
    """Do what ``replicate`` does, under a lease that is held already, older writers being fenced off."""
    cycle = _Cycle(store, host, found, held, basis, workers or Workers(), progress)
    return cycle.run(open_disk, rescan=rescan)


class _Cycle:
    """A cycle under a lease."""

    def __init__(
        self,
        store: Store,
        host: Host,
        found: ProtectedVm,
        held: Lease,
        basis: Basis,
        workers: Workers,
        progress: Progress,
    ) -> None:
        self._store = store
        self._host = host
        self._found = found
        self._held = held
        self._workers = workers
        self._progress = progress
        self._settings = catalog.read_settings(store, found.keys, held.settings_version)
        transitions.require(found.vm.name, self._settings.state, Command.REPLICATE)
        self._previous = basis.point
        self._distrust = basis.distrust
        self._number = held.point + 1
        self._totals = _Totals()

    def run(self, open_disk: OpenDisk, *, rescan: bool) -> Point:
        """Read, store, publish."""
        started, created_at = self._host.clock.monotonic(), self._host.clock.now()
        before = self._previous.maps if self._previous else ()
        map_store = MapStore(self._store, self._found.keys, map_cache(self._host))
        wanted = self._wanted()
        with change_source(wanted.sources, open_disk).open(wanted) as instant, self._uploads() as uploads:
            maps = MapBuilder(
                map_store,
                self._found.vm.vm_id,
                self._number,
                self._held.epoch,
                before,
                disks=[one.number for one in wanted.sources],
                before_write=uploads.drain,
            )
            packer = Packer(self._store, self._found.keys, maps, uploads, point=self._number, epoch=self._held.epoch)
            tracked = [
                _Tracked(one, wanted.before.get(one.source.number), self._scan(rescan) or one.found)
                for one in instant.disks
            ]
            freshness = self._freshness(tracked)
            records = self._compare_all(tracked, BlockMap(before, map_store.fetch), packer, freshness)
            convertibility = self._convertibility(freshness, tracked)
            packer.finish()
            refs = maps.finish()
        point = Point(
            vm_id=self._found.vm.vm_id,
            point=self._number,
            epoch=self._held.epoch,
            previous=self._previous.point if self._previous else 0,
            created_at=created_at,
            published_at=self._host.clock.now(),
            consistency=instant.consistency,
            vm_name=self._found.vm.name,
            machine=self._settings.machine,
            disks=records,
            maps=refs,
            cycle=CycleStatistics(
                read_bytes=self._totals.read_bytes,
                changed_blocks=self._totals.changed_blocks,
                zero_blocks=self._totals.zero_blocks,
                reused_blocks=self._totals.reused_blocks,
                stored_bytes=packer.stored_bytes,
                segments=packer.segments,
                seconds=self._host.clock.monotonic() - started,
            ),
            convertibility=convertibility,
        )
        history.publish(self._store, self._found.keys, point)
        self._held.settle(self._number)
        self._tell_of_convertibility(point)
        if self._settings.seed is not None and self._previous is None:
            seed = self._settings.seed
            holds.release(self._store, VmKeys(self._found.keys.tenant, seed.vm_id), seed.point, self._found.keys)
        instant.acknowledge()
        map_store.forget_all_but(ref for one in refs for ref in one.parts)
        return point

    def _scan(self, rescan: bool) -> Found | None:
        """Return that all is to be compared, and why; None where what the source tells of changes is enough."""
        if self._distrust is not None:
            return Found(SCAN, "damage in the store is repaired")
        return Found(SCAN, "asked for") if rescan else None

    @contextmanager
    def _uploads(self) -> Iterator[Uploads]:
        with ThreadPoolExecutor(self._workers.uploads, "upload") as pool:
            uploads = Uploads(pool, limit=self._workers.uploads, tick=self._held.renew_if_due)
            try:
                yield uploads
            finally:
                uploads.abandon()

    def _wanted(self) -> Wanted:
        return Wanted(
            vm_id=self._found.vm.vm_id,
            point=self._number,
            sources=tuple(sorted(self._settings.sources, key=lambda one: one.number)),
            before={disk.number: disk for disk in (self._previous.disks if self._previous else ())},
            randomness=self._host.randomness,
            based_on=self._previous.origin if self._previous else 0,
            departure=self._departure(),
        )

    def _departure(self) -> Departure | None:
        """Return where a recovery machine's first delta begins, as long as that is from the newest point."""
        reverse = self._settings.state.reverse
        if reverse is None:
            return None
        if self._previous is None or self._previous.point != reverse.point:  # its manifests need not be read any more
            return Departure(reverse.point, reverse.bitmap)
        return departure(
            reverse.point,
            reverse.bitmap,
            [(one.disk, conversions.read(self._store, self._found, one)) for one in reverse.conversions],
        )

    def _freshness(self, disks: list[_Tracked]) -> Freshness | None:
        if not self._host.inspects:
            return None
        before = self._previous.convertibility if self._previous is not None else None
        opened = [(one.source.source.number, one.source.disk.size) for one in disks]
        return Freshness(before, generation=self._settings.machine.generation, disks=opened)

    def _convertibility(self, freshness: Freshness | None, disks: list[_Tracked]) -> Convertibility | None:
        """Return the verdict on what this point holds: the disks are read as of its instant, while uploads go on."""
        if freshness is None:
            return None
        opened = [(one.source.source.number, one.source.disk) for one in disks]
        clock = self._host.clock
        return freshness.verdict(opened, now=clock.now(), monotonic=clock.monotonic)

    def _tell_of_convertibility(self, point: Point) -> None:
        """Record that the verdict became another. The point exists: what comes after can fail it no more."""
        before = self._previous.convertibility if self._previous is not None else None
        now = point.convertibility
        if before is None or now is None or before.verdict is now.verdict:
            return
        from replica.health import journal  # noqa: PLC0415 - as good as no cycle has such news

        with suppress(GodwitError):
            journal.record_event(self._store, self._host, self._found.keys, journal.judgement(point, before, now))

    def _compare_all(
        self, disks: list[_Tracked], known: BlockMap, packer: Packer, freshness: Freshness | None
    ) -> tuple[DiskRecord, ...]:
        comparer = Comparer(
            hash_seed=self._found.vm.hash_seed,
            compression_level=self._settings.compression_level,
            leftovers=self._leftovers(),
            seed_point=self._seed_point(),
        )
        total = sum(one.bytes_to_read() for one in disks) if self._progress is not silent else 0
        with ThreadPoolExecutor(self._workers.threads, "compare") as pool:
            return tuple(self._compare(one, known, comparer, packer, pool, total, freshness) for one in disks)

    def _seed_point(self) -> SeedPoint | None:
        seed = None if self._previous or self._distrust else self._settings.seed
        return None if seed is None else open_seed(self._store, self._host, self._found.keys, seed)

    def _leftovers(self) -> Leftovers:
        if not self._held.leftovers or self._distrust is not None:
            return Leftovers()
        return Leftovers.after(self._store, self._found.keys, self._previous.point if self._previous else 0)

    def _compare(
        self,
        tracked: _Tracked,
        known: BlockMap,
        comparer: Comparer,
        packer: Packer,
        pool: ThreadPoolExecutor,
        total_bytes: int,
        freshness: Freshness | None,
    ) -> DiskRecord:
        one, before = tracked.source, tracked.before
        number = one.source.number
        digest = Digest(before.digest.first, before.digest.second) if before else Digest()
        blocks = before.data_blocks if before else 0
        results = ordered(
            pool,
            comparer,
            plan(one.disk, number, known, tracked.found.changed, self._distrust),
            limit=self._workers.batches,
            tick=self._held.renew_if_due,
        )
        with closing(results):
            for changes in results:
                packer.add(number, changes)
                if freshness is not None:
                    for keys in changes.differing():
                        freshness.note(keys)
                digest.combine(changes.added, changes.removed)
                blocks += changes.added_blocks - changes.removed_blocks
                self._count(changes)
                self._held.renew_if_due()
                self._progress(self._totals.read_bytes, max(total_bytes, self._totals.read_bytes), "replicating")
        return DiskRecord(
            number=number,
            name=one.source.name,
            size=one.disk.size,
            sector_size=one.disk.sector_size,
            format=one.disk.format,
            bus=one.source.bus,
            data_blocks=blocks,
            digest=digest,
            source={
                **one.about,
                **self._conversion(number),
                "found_by": tracked.found.kind,
                "because": tracked.found.why,
            },
        )

    def _conversion(self, number: int) -> dict[str, str]:
        """Return by what the disk was converted to the generation that it is replicated as, for the manifest."""
        reverse = self._settings.state.reverse
        refs = [] if reverse is None else [one for one in reverse.conversions if one.disk == number]
        return {"conversion": str(refs[0].point)} if refs else {}

    def _count(self, changes: Changes) -> None:
        self._totals.read_bytes += changes.read_bytes
        self._totals.changed_blocks += changes.added_blocks
        self._totals.zero_blocks += sum(map(len, changes.zeros))
        self._totals.reused_blocks += len(changes.found[0]) if changes.found else 0
