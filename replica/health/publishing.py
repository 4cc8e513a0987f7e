"""Publishing: an agent's digests, kept true from what it does itself, and by looking where that is not enough."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from replica import changes, keys
from replica.catalog import ProtectedVm
from replica.errors import (
    FormatVersionError,
    GodwitError,
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreUnavailableError,
)
from replica.health import digest
from replica.health.digest import Digest
from replica.health.observation import AgentNote, FreeSpace, Observation, sample_of
from replica.health.observing import Depth, convertibility_of, free_space, observe
from replica.host import Host
from replica.model import Point
from replica.stores.skew import skew_of
from replica.stores.store import Store

HEARTBEAT: Final = timedelta(minutes=5)  # a digest is written that often though nothing changed
LOOK_AGAIN: Final = timedelta(days=1)  # in case something happened that nobody marked
MOST_LOOKS: Final = 256  # VMs that are looked at in one turn
AT_ONCE: Final = 8
LEAST_CHANGE_PERCENT: Final = 0.5  # of the room on a file system: less is nothing new
DEPTH: Final = Depth(drills=digest.MOST_DRILLS)


@dataclass(frozen=True, slots=True)
class Watched:
    """A VM that the agent looks after, and how it goes with it there."""

    found: ProtectedVm
    state: str
    sources: tuple[str, ...] = ()  # where its disks are, to see how much room there is
    failures: int = 0
    error: str | None = None
    hint: str | None = None
    missed: int = 0
    next_at: datetime | None = None

    def note(self, host: Host, now: datetime) -> AgentNote:
        """Return what the digest says of it."""
        return AgentNote(
            host.host_name, now, self.state, self.failures, self.error, self.hint, self.missed, self.next_at
        )


@dataclass(frozen=True, slots=True)
class Published:
    """What a turn came to: digests written, VMs looked at, and VMs that are still to be."""

    written: int
    looked_at: int
    waiting: int


@dataclass(slots=True)
class _Known:
    """What is known of a VM. ``doubted``: it is to be looked at; ``notes`` counts what was noted since the start."""

    seen: Observation
    looked_at: datetime
    doubted: bool = False
    notes: int = 0


@dataclass(slots=True)
class _Slot:
    """One digest: whose it is, and how it lies in the store."""

    sealed: bool
    vm_ids: set[str] = field(default_factory=set)
    tag: str | None = None
    written_at: datetime | None = None
    written: tuple[Observation, ...] | None = None


class Publisher:
    """The digests of one machine. Notes may come from any thread; one turn at a time."""

    def __init__(self, host: Host, tenant: str) -> None:
        self._host = host
        self._tenant = tenant
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._slots: dict[int, _Slot] = {}
        self._loaded = False

    # --- what the agent notes

    def note_cycle(self, vm_id: str, point: Point, epoch: int, settings_version: int) -> None:
        """Take note of a point that this machine made under a lease of that epoch."""
        with self._lock:
            known = self._known.get(vm_id)
            if known is None:
                return  # the next turn looks at it
            seen, newest = known.seen, known.seen.newest
            follows = newest is None or point.previous == newest.point
            known.doubted |= not follows or settings_version != seen.settings_version
            known.notes += 1
            known.seen = digest.shortened(
                replace(
                    seen,
                    at=self._host.clock.now(),
                    as_of=None,
                    samples=(*(one for one in seen.samples if one.point != point.point), sample_of(point)),
                    listed=seen.listed + 1,
                    lease_held=False,
                    lease_expires_at=self._host.clock.now(),
                    leftovers=False,
                    source_host=self._host.host_name,
                    epoch=epoch,
                    settings_version=settings_version,
                    convertibility=convertibility_of(point),
                )
            )

    def note_doubt(self, vm_id: str) -> None:
        """Have a VM looked at in the next turn: something happened of which not all is known."""
        with self._lock:
            known = self._known.get(vm_id)
            if known is not None:
                known.doubted = True
                known.notes += 1

    # --- a turn

    def publish(self, store: Store, watched: Sequence[Watched]) -> Published:
        """Write the digests that changed, or were not written for long; look at VMs first where that is needed.

        One LIST, and for each VM that is looked at two more and some GETs; one PUT for each digest that is written.
        Raises StoreError, TenantKeyError.
        """
        if not self._loaded:
            self._load(store)
            self._loaded = True
        wanted = {one.found.keys.vm_id: one for one in watched}
        marks = list(changes.listed(store, self._tenant))
        with self._lock:
            self._known = {vm_id: known for vm_id, known in self._known.items() if vm_id in wanted}
            self._heed(marks)
            looks = self._doubted(wanted)
        chosen = looks[:MOST_LOOKS]
        waiting = len(looks) - self._look(store, [wanted[vm_id] for vm_id in chosen])
        now = self._host.clock.now()
        with self._lock:
            self._assign()
            for vm_id, known in self._known.items():
                known.seen = self._measured(known.seen, wanted[vm_id])
            seen = {
                vm_id: replace(
                    known.seen,
                    as_of=known.seen.known_at if known.doubted else now,
                    agent=wanted[vm_id].note(self._host, now),
                    store_skew_seconds=skew_of(store),
                )
                for vm_id, known in self._known.items()
            }
        written = sum(self._write(store, number, seen, now) for number in sorted(self._slots))
        return Published(written, len(chosen), waiting)

    def _measured(self, seen: Observation, one: Watched) -> Observation:
        """Return what is known with the room that there is now, unless that changed by little."""
        space, before = free_space(self._host, one.sources), seen.free_space
        if space is None or (before is not None and before.path == space.path and _is_near(before, space)):
            return seen
        return replace(seen, free_space=space)

    def _heed(self, marks: Iterable[changes.Mark]) -> None:
        for mark in marks:
            known = self._known.get(mark.vm_id)
            if known is not None and not mark.is_known(known.seen.settings_version, known.seen.event_at):
                known.doubted = True

    def _doubted(self, wanted: Iterable[str]) -> list[str]:
        """Return the VMs to look at: those that nothing is known of first."""
        before = self._host.clock.now() - LOOK_AGAIN
        unknown = [vm_id for vm_id in wanted if vm_id not in self._known]
        doubted = [vm_id for vm_id, known in self._known.items() if known.doubted or known.looked_at < before]
        return unknown + doubted

    def _look(self, store: Store, chosen: Sequence[Watched]) -> int:
        """Look at VMs, and return how many could be. Raises StoreUnavailableError."""

        def look(one: Watched) -> bool:
            vm_id = one.found.keys.vm_id
            with self._lock:
                known = self._known.get(vm_id)
                notes = 0 if known is None else known.notes
            points = () if known is None else known.seen.samples
            try:
                seen = observe(store, self._host, one.found, DEPTH, {each.point: each for each in points})
            except StoreUnavailableError:
                raise
            except GodwitError:  # a report looks at it directly, and tells why that fails
                with self._lock:
                    self._known.pop(vm_id, None)
                return False
            with self._lock:
                self._take(vm_id, seen, known, notes)
            return True

        if not chosen:
            return 0
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="digest") as pool:
            return sum(pool.map(look, chosen))

    def _take(self, vm_id: str, seen: Observation, known: _Known | None, notes: int) -> None:
        if known is not None:
            before = known.seen
            listed = {one.point for one in seen.samples}
            removed = [one for one in before.timeline if one.point not in listed]
            newest, newest_before = seen.newest, before.newest
            if newest is not None and newest_before is not None and newest.point == newest_before.point:
                seen = replace(seen, convertibility=before.convertibility)  # its manifest was not read again
            seen = replace(seen, remembered=tuple(removed))
        current = self._known.get(vm_id)
        # What was noted while it was looked at may be newer than what was seen: it is looked at once more.
        overtaken = current is not None and current.notes != notes
        self._known[vm_id] = _Known(
            digest.shortened(seen), self._host.clock.now(), overtaken, notes if current is None else current.notes
        )

    # --- slots

    def _load(self, store: Store) -> None:
        """Take up what this machine wrote before: what it said may have changed, so all of it is looked at again."""
        prefix = f"{keys.digests(self._tenant)}{self._host.host_id}-"
        opener = digest.Opener(store, self._tenant)
        for info in list(store.list(prefix)):
            place = keys.digest_of(info.key)
            if place is None:
                continue
            slot = self._slots[place[1]] = _Slot(sealed=False)
            try:
                data, slot.tag = store.get_tagged(info.key)
                found, slot.sealed = digest.decode(data, key=info.key, sealer=opener)
            except ObjectMissingError:
                del self._slots[place[1]]
                continue
            except (IntegrityError, FormatVersionError):
                continue  # written anew, once it is needed
            for seen in found.seen:
                if seen.vm_id not in self._known:
                    slot.vm_ids.add(seen.vm_id)
                    self._known[seen.vm_id] = _Known(seen, seen.known_at, doubted=True)

    def _assign(self) -> None:
        """Give every VM a place: it keeps the one that it has."""
        homeless = set(self._known)
        for slot in self._slots.values():
            slot.vm_ids &= homeless
            homeless -= slot.vm_ids
        for vm_id in sorted(homeless):
            sealed = self._known[vm_id].seen.encrypted
            self._slot_for(sealed).vm_ids.add(vm_id)

    def _slot_for(self, sealed: bool) -> _Slot:
        for number in sorted(self._slots):
            slot = self._slots[number]
            if len(slot.vm_ids) < digest.MOST_VMS and (slot.sealed == sealed or not slot.vm_ids):
                slot.sealed = sealed
                return slot
        number = next(number for number in range(len(self._slots) + 1) if number not in self._slots)
        self._slots[number] = _Slot(sealed)
        return self._slots[number]

    def _write(self, store: Store, number: int, seen: dict[str, Observation], now: datetime) -> bool:
        """Write a digest if that is due. Another process of this machine that does the same is written over."""
        slot = self._slots[number]
        told = tuple(seen[vm_id] for vm_id in sorted(slot.vm_ids))
        comparable = tuple(_comparable(one) for one in told)
        due = slot.written_at is None or now - slot.written_at >= HEARTBEAT or now < slot.written_at
        if not told and (slot.written == () or slot.tag is None):
            return False
        if not due and comparable == slot.written:
            return False
        made = Digest(self._tenant, number, self._host.host_id, self._host.host_name, now, told)
        data = digest.encode(made, digest.fleet_sealer(store, self._tenant) if slot.sealed else None)
        for _ in range(2):
            try:
                slot.tag = (
                    store.create(made.key, data) if slot.tag is None else store.replace(made.key, data, tag=slot.tag)
                )
            except (ObjectChangedError, ObjectExistsError):
                slot.tag = store.head(made.key).tag
            except ObjectMissingError:
                slot.tag = None
            else:
                slot.written, slot.written_at = comparable, now
                return True
        return False


def _is_near(one: FreeSpace, other: FreeSpace) -> bool:
    return one.total_bytes == other.total_bytes and abs(one.percent - other.percent) < LEAST_CHANGE_PERCENT


def _comparable(seen: Observation) -> Observation:
    """Return what makes a difference: not what changes with every look."""
    note = seen.agent
    assert note is not None
    return replace(
        seen,
        at=datetime.min,
        as_of=None,
        store_skew_seconds=None,
        agent=replace(note, written_at=datetime.min),
    )
