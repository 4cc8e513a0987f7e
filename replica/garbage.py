"""Garbage collection: finds segments and maps that no recovery point refers to, and deletes them after a grace period.

Why nothing that is needed goes, whoever else is at work, is set out in docs/ordering.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from replica import catalog, condemned, history, lease
from replica.catalog import ProtectedVm
from replica.condemned import CondemnedList
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    LeaseHeldError,
    ObjectLockedError,
    ObjectMissingError,
)
from replica.host import Host
from replica.keys import PartId, VmKeys, part_of, point_of
from replica.mapstore import MapStore
from replica.maptable import SegmentRef
from replica.model import Fence, MapPartRef, Point
from replica.pipeline import ordered
from replica.stores.store import Store
from replica.workers import Workers

GRACE: Final = timedelta(hours=1)
BATCH_OBJECTS: Final = 256  # deleted between two looks at the lease
HOLD_SECONDS: Final = 10.0  # then the lease is given back, so that a cycle that waits is not kept waiting


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of objects and their bytes."""

    objects: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Collection:
    """What a run did, or would do: what it condemned, what it deleted, and what now waits for its grace to end.

    ``locked`` is what is due but stays until its lock has ended, where the store locks; it counts among what waits.
    ``busy`` says who held the VM's lease, so that what is due was left to a later run; None where nobody did.
    """

    condemned: Amount
    deleted: Amount
    waiting: Amount
    busy: str | None = None
    locked: Amount = Amount()


class References:
    """What the recovery points of VMs refer to, of their own and of each other.

    Memory: about 100 bytes for each segment and map part that is referred to, and the map parts being read, one for
    each thread, of up to 50 MiB.
    """

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers
        self._newest: dict[str, int] = {}
        self._manifests: set[tuple[str, int]] = set()
        self._parts: set[tuple[str, MapPartRef]] = set()
        self._live: dict[tuple[str, str], set[int]] = {}
        self._lent: set[SegmentRef] = set()

    def add(self, found: ProtectedVm) -> None:
        """Read a VM's whole history. Raises IntegrityError where a part of it cannot be read."""
        try:
            newest = history.newest(self._store, found.keys)
        except (IntegrityError, FormatVersionError) as error:
            raise _unsafe(found, error) from error
        # Known before anything is listed: what was written for later points is none of this run's business.
        self._newest[found.keys.vm_id] = newest.point if newest else 0
        self.catch_up(found, newest)

    def catch_up(self, found: ProtectedVm, newest: Point | None) -> None:
        """Read what has come to the history since. Raises IntegrityError where a part of it cannot be read."""
        try:
            points = list(self._unseen(found.keys, newest))
            self._follow(found.keys, points)
        except (IntegrityError, FormatVersionError) as error:
            raise _unsafe(found, error) from error

    def newest(self, vm_id: str) -> int:
        """Return the VM's newest point before its history was read, 0 for none or a VM that was not listed yet."""
        return self._newest.get(vm_id, 0)

    def is_lent(self, segment: SegmentRef) -> bool:
        """Whether a VM refers to the segment that is another's."""
        return segment in self._lent

    def __contains__(self, key: str) -> bool:
        """Whether a segment or map part is referred to, by its key."""
        part = part_of(key)
        assert part is not None, key
        vm_id, kind = key.split("/")[3:5]
        return _number(part) in self._live.get((vm_id, kind), ())

    def _unseen(self, keys: VmKeys, newest: Point | None) -> Iterator[Point]:
        # A store whose listing lags may not show the newest point yet.
        if newest is not None and (keys.vm_id, newest.point) not in self._manifests:
            self._manifests.add((keys.vm_id, newest.point))
            yield newest
        listed = (point_of(info.key) for info in self._store.list(keys.manifests))
        unseen = [n for n in listed if n is not None and (keys.vm_id, n) not in self._manifests]
        if not unseen:
            return
        with ThreadPoolExecutor(self._workers.uploads, "manifests") as pool:
            results = ordered(pool, lambda n: self._read(keys, n), unseen, limit=self._workers.uploads * 4)
            with closing(results):
                for manifest in results:
                    if manifest is not None:
                        self._manifests.add((keys.vm_id, manifest.point))
                    if isinstance(manifest, Point):
                        yield manifest

    def _read(self, keys: VmKeys, number: int) -> Point | Fence | None:
        try:
            return history.read(self._store, keys, number)
        except ObjectMissingError:  # pruned
            return None

    def _follow(self, keys: VmKeys, points: list[Point]) -> None:
        namers: dict[MapPartRef, list[int]] = {}
        for point in points:
            for ref in (ref for one in point.maps for ref in one.parts):
                if (keys.vm_id, ref) not in self._parts:
                    namers.setdefault(ref, []).append(point.point)
        maps = MapStore(self._store, keys, None)  # no cache: what the store holds is what has to be understood

        def read(ref: MapPartRef) -> list[SegmentRef]:
            try:
                return list(maps.fetch(ref).segment_refs())
            except IntegrityError:
                if self._are_gone(keys, namers[ref]):
                    return []
                raise

        with ThreadPoolExecutor(self._workers.threads, "references") as pool:
            results = ordered(pool, read, namers, limit=self._workers.threads)
            with closing(results):
                for ref, segments in zip(namers, results, strict=True):
                    self._add(keys.vm_id, "maps", ref.part)
                    for segment in segments:
                        self._add(segment.vm_id, "segments", segment.part)
                        if segment.vm_id != keys.vm_id:
                            self._lent.add(segment)
                    self._parts.add((keys.vm_id, ref))

    def _are_gone(self, keys: VmKeys, points: list[int]) -> bool:
        """Whether the points were pruned since they were read, so that their maps may rightly be gone too."""
        for number in points:
            try:
                self._store.head(keys.manifest(number))
            except ObjectMissingError:
                continue
            return False
        return True

    def _add(self, vm_id: str, kind: str, part: PartId) -> None:
        self._live.setdefault((vm_id, kind), set()).add(_number(part))


def _number(part: PartId) -> int:
    """Return the id as one number, which is half as large in memory."""
    return part.point << 52 | part.epoch << 20 | part.ordinal


def _unsafe(found: ProtectedVm, error: IntegrityError | FormatVersionError) -> IntegrityError:
    return IntegrityError(
        f"{error.message}; nothing was deleted, since what {found.vm.name} needs cannot be known",
        key=error.key,
        hint=f"'godwit verify {found.vm.name}' names what is damaged, 'godwit repair' mends what it can; a point that "
        f"is lost for good goes by 'godwit prune {found.vm.name} --point P'"
        if isinstance(error, IntegrityError)
        else error.hint,
    )


def survey(store: Store, tenant: str, *, workers: Workers | None = None) -> References:
    """Read what all VMs of a tenant refer to: a VM's segments may be needed by another that was seeded from it.

    Raises IntegrityError where any of it cannot be read.
    """
    references = References(store, workers or Workers())
    for name in catalog.names(store, tenant):
        references.add(catalog.find(store, tenant, name))
    return references


def collect(
    store: Store,
    host: Host,
    found: ProtectedVm,
    references: References,
    *,
    grace: timedelta = GRACE,
    dry_run: bool = False,
    workers: Workers | None = None,
) -> Collection:
    """Condemn the VM's objects that no point needs, and delete those that were condemned long enough ago.

    ``references`` is a survey of the VM's tenant, made just now. What is deleted was found unreferenced twice,
    ``grace`` apart at least, and once more under the VM's lease. Cut off at any instant, every point restores, and the
    next run goes on.
    Raises LeaseLostError where another agent took over, IntegrityError as ``References.catch_up`` does.
    """
    now = host.clock.now()
    garbage = dict(_unreferenced(store, found.keys, references))
    everything = _amount(garbage)
    lists = list(condemned.read_all(store, found.keys, now))
    known = {key for one in lists for key in one.sizes}
    new = {key: size for key, size in garbage.items() if key not in known}
    due = [one for one in lists if one.is_due(now, grace)]
    if dry_run:
        locked = Amount()
        deleted, busy = _amount({key: garbage[key] for one in due for key in one.sizes if key in garbage}), None
    else:
        if new:
            condemned.write(store, host, found.keys, new)
        work = _Deletion(store, host, found, references, garbage, workers or Workers())
        busy = work.run(due)
        deleted, locked = work.deleted, work.locked
    waiting = Amount(everything.objects - deleted.objects, everything.bytes - deleted.bytes)
    return Collection(_amount(new), deleted, waiting, busy, locked)


def _amount(sizes: dict[str, int]) -> Amount:
    return Amount(len(sizes), sum(sizes.values()))


def _unreferenced(store: Store, keys: VmKeys, references: References) -> Iterator[tuple[str, int]]:
    """Yield keys, relative to the VM's prefix, and sizes."""
    newest = references.newest(keys.vm_id)
    for prefix in (keys.maps, keys.segments):
        for info in store.list(prefix):
            part = part_of(info.key)
            if part is None:
                continue
            if part.point > newest:  # a cycle at work, or what the next one will make use of
                break
            if info.key not in references:
                yield info.key.removeprefix(keys.prefix), info.size


class _Deletion:
    """Deletes what is due, under the lease."""

    def __init__(
        self,
        store: Store,
        host: Host,
        found: ProtectedVm,
        references: References,
        garbage: dict[str, int],
        workers: Workers,
    ) -> None:
        self._store = store
        self._host = host
        self._found = found
        self._references = references
        self._garbage = garbage
        self._workers = workers
        self.deleted = Amount()
        self._locked: set[str] = set()

    @property
    def locked(self) -> Amount:
        """What could not be deleted because it is locked."""
        return _amount({key: self._garbage[key] for key in self._locked})

    def run(self, due: Iterable[CondemnedList]) -> str | None:
        """Delete; return None, or who holds the lease where that leaves something to a later run."""
        steps = deque(self._steps(due))
        while steps:
            try:
                with lease.holding(self._store, self._found.keys, self._host) as held:
                    newest = history.begin(self._store, self._found.keys, self._host, held)
                    # No writer is at work now: what is in the history here is all that anything can build on.
                    self._references.catch_up(self._found, newest)
                    until = self._host.clock.monotonic() + HOLD_SECONDS
                    while steps and self._host.clock.monotonic() < until:
                        held.check()
                        steps.popleft()()
            except LeaseHeldError as error:
                return error.message
        return None

    def _steps(self, due: Iterable[CondemnedList]) -> Iterator[Callable[[], None]]:
        for one in due:
            keys = [key for key in one.sizes if key in self._garbage]
            for start in range(0, len(keys), BATCH_OBJECTS):
                batch = keys[start : start + BATCH_OBJECTS]
                yield lambda batch=batch: self._delete(batch)  # type: ignore[misc]
            yield lambda one=one: self._strike(one)  # type: ignore[misc]

    def _strike(self, one: CondemnedList) -> None:
        """Delete a list that has been worked off; one that names what is still locked is needed again."""
        if self._locked.isdisjoint(one.sizes):
            self._store.delete(self._found.keys.condemned_list(one.number))

    def _delete(self, batch: list[str]) -> None:
        chosen = [key for key in batch if key in self._garbage]
        chosen = [key for key in chosen if self._found.keys.prefix + key not in self._references]
        with ThreadPoolExecutor(self._workers.uploads, "delete") as pool:
            results = ordered(pool, self._try_to_delete, chosen, limit=self._workers.uploads * 4)
            with closing(results):
                gone = [key for key, is_gone in zip(chosen, results, strict=True) if is_gone]
        for key in gone:  # an object may be on two lists, where two collectors met
            size = self._garbage.pop(key)
            self.deleted = Amount(self.deleted.objects + 1, self.deleted.bytes + size)

    def _try_to_delete(self, key: str) -> bool:
        try:
            self._store.delete(self._found.keys.prefix + key)
        except ObjectLockedError:
            self._locked.add(key)
            return False
        return True
