"""Observing: looks at VMs in a store with few requests, and at this machine where it holds their disks. Reads only."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from replica import catalog, history, lease
from replica.catalog import ProtectedVm
from replica.errors import (
    FormatVersionError,
    GodwitError,
    IntegrityError,
    NoStoreError,
    ObjectMissingError,
    StoreUnavailableError,
    TenantKeyError,
    UsageError,
)
from replica.health import journal
from replica.health.journal import EventKey
from replica.health.observation import Event, EventKind, FreeSpace, Observation, PointSample, sample_of
from replica.host import Host
from replica.keys import VmKeys, point_of
from replica.model import Point, Settings
from replica.stores.skew import skew_of
from replica.stores.store import Store
from replica.vault import vault_of

MOST_VERIFICATIONS: Final = 8
NEWEST: Final = 3  # points that are read in any case, besides the oldest
LARGEST_CHANGES: Final = 32
MOST_DAMAGED: Final = 64  # manifests that are asked for in search of one that restores


@dataclass(frozen=True, slots=True)
class Depth:
    """How closely to look at a VM."""

    points: int = 8  # whose manifests are read at most, spread over all that are listed
    remembered: int = 0  # removed points that are asked for
    drills: int = 1  # of the last ones, how many are read


BRIEF: Final = Depth()
CLOSE: Final = Depth(points=200, remembered=2000, drills=10)
CHARTS: Final = Depth(points=64, remembered=400, drills=10)


def observe_all(
    store: Store, host: Host, tenant: str, names: Iterable[str], depth: Depth = BRIEF, *, at_once: int = 8
) -> Iterator[Observation]:
    """Yield an observation of each VM, in the order of the names; what cannot be read is one that says so.

    ``at_once`` VMs are looked at beside each other. Raises StoreUnavailableError where the store does not answer.
    """
    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="health") as pool:
        for found in pool.map(lambda name: _observe_listed(store, host, tenant, name, depth), names):
            if found is not None:
                yield found


def _observe_listed(store: Store, host: Host, tenant: str, name: str, depth: Depth) -> Observation | None:
    try:
        return observe_named(store, host, tenant, name, depth)
    except UsageError:  # it is protected no more, since the names were listed
        return None


def observe_named(store: Store, host: Host, tenant: str, name: str, depth: Depth = BRIEF) -> Observation:
    """Observe the VM of that name; what cannot be read is an observation that says so, with the error's hint.

    Raises UsageError where there is no such VM, StoreUnavailableError where the store does not answer: that tells
    nothing of the VM.
    """
    try:
        return observe(store, host, catalog.find(store, tenant, name), depth)
    except (UsageError, NoStoreError, StoreUnavailableError):
        raise
    except GodwitError as error:
        told = f"{error}{f' ({error.hint})' if error.hint else ''}"
        missing = isinstance(error, TenantKeyError)
        return Observation("", name, host.clock.now(), unread=told, key_missing=missing, encrypted=missing)


def observe(
    store: Store,
    host: Host,
    found: ProtectedVm,
    depth: Depth = BRIEF,
    known: Mapping[int, PointSample] | None = None,
) -> Observation:
    """Observe a VM: lease, settings, one LIST of manifests and one of events, and the manifests that ``depth`` allows.

    Points that are ``known`` already, and still listed, are told without their manifests being read.
    Raises IntegrityError, FormatVersionError, TenantKeyError, StoreError.
    """
    vm_keys = found.keys
    state, _ = lease.read(store, vm_keys)
    settings = catalog.read_settings(store, vm_keys, state.settings_version)
    numbers = sorted({n for info in store.list(vm_keys.manifests) if (n := point_of(info.key)) is not None})
    warnings: list[str] = []
    told = journal.event_keys(store, vm_keys)
    drills = _read_events(store, [one for one in told if one.kind is EventKind.DRILL][-depth.drills :], warnings)
    verify, known_bad = _verifications(store, [one for one in told if one.kind is EventKind.VERIFY], warnings)
    points, broken = _read_points(store, vm_keys, numbers, known_bad, depth, known or {})
    newest = points[-1] if points and isinstance(points[-1], Point) else None
    vault = vault_of(store)
    return Observation(
        vm_id=found.vm.vm_id,
        name=found.vm.name,
        at=host.clock.now(),
        encrypted=vault is not None and vault.is_encrypted(vm_keys),
        protected_since=found.vm.created_at,
        interval_seconds=settings.interval_seconds,
        retention=settings.retention,
        retention_since=_retention_since(settings),
        standing=settings.state.standing,
        standing_since=settings.change.at if settings.change is not None else None,
        recovery_host=settings.state.machine.host_name if settings.state.machine is not None else "",
        source_host=state.holder.host_name if state.holder is not None else "",
        lease_held=state.held,
        lease_expires_at=state.expires_at,
        leftovers=state.leftovers,
        samples=tuple(sample_of(one) if isinstance(one, Point) else one for one in points),
        remembered=tuple(journal.remembered(store, vm_keys, depth.remembered)) if depth.remembered else (),
        listed=len(numbers),
        damaged=(broken | known_bad) & frozenset(numbers),
        last_verify=verify,
        drills=drills,
        changes=tuple((one.at, one.result) for one in told if one.kind is EventKind.HEALTH)[-LARGEST_CHANGES:],
        convertibility=convertibility_of(newest),
        free_space=free_space(host, [one.path for one in settings.sources]),
        store_skew_seconds=skew_of(store),
        epoch=state.epoch,
        settings_version=settings.version,
        event_at=told[-1].at if told else None,
        warnings=tuple(warnings),
    )


def convertibility_of(point: Point | None) -> str | None:
    """Return what a point's manifest says of whether its OS disk converts, None where it says nothing."""
    said = getattr(point, "convertibility", None)
    said = getattr(said, "verdict", said)
    return None if said is None else str(getattr(said, "value", said))


def _read_points(
    store: Store,
    vm_keys: VmKeys,
    numbers: list[int],
    known_bad: frozenset[int],
    depth: Depth,
    known: Mapping[int, PointSample],
) -> tuple[list[Point | PointSample], frozenset[int]]:
    """Return points in ascending number, the newest and the oldest that can be read with them, and what cannot be.

    From the newest downwards until one restores, as far as is known; then spread evenly over the rest.
    """
    found: dict[int, Point | PointSample] = {number: known[number] for number in numbers if number in known}
    broken: set[int] = set()

    def read(number: int) -> bool:
        """Return whether the number is a point that restores."""
        if number in found or number in broken:
            return number in found and number not in known_bad
        try:
            one = history.read(store, vm_keys, number)
        except ObjectMissingError:  # removed meanwhile
            return False
        except (IntegrityError, FormatVersionError):
            broken.add(number)
            return False
        if isinstance(one, Point):
            found[number] = one
        return isinstance(one, Point) and number not in known_bad

    restores = 0
    for number in reversed(numbers[-MOST_DAMAGED:]):
        restores += read(number)
        if restores and len(found) >= min(NEWEST, depth.points):
            break
    for number in numbers[:NEWEST]:  # a fence, or a damaged one, is not the oldest point
        if read(number):
            break
    rest = [number for number in numbers if number not in found and number not in broken]
    for number in _spread(rest, depth.points - len(found)):
        read(number)
    return [found[number] for number in sorted(found)], frozenset(broken)


def _spread(numbers: list[int], count: int) -> list[int]:
    """Return ``count`` of the numbers, those near the end a little denser: that is where the window of health lies."""
    if count >= len(numbers):
        return numbers
    last = len(numbers) - 1
    return sorted({numbers[round(last * (1 - (step / count) ** 2))] for step in range(max(0, count))})


def _verifications(store: Store, told: list[EventKey], warnings: list[str]) -> tuple[Event | None, frozenset[int]]:
    """Return the last verification, and the points that were found damaged since all was last found whole."""
    if not told:
        return None, frozenset()
    last_whole = max((place for place, one in enumerate(told) if one.result == "whole"), default=-1)
    damaged = [one for one in told[last_whole + 1 :] if one.result == "damaged"][-MOST_VERIFICATIONS:]
    read = _read_events(store, sorted({*damaged, told[-1]}, key=lambda one: one.key), warnings)
    last = next((one for one in read if one.at == told[-1].at), None)
    bad = frozenset(number for one in read if one.result == "damaged" for number in one.points)
    return last, bad


def _read_events(store: Store, told: list[EventKey], warnings: list[str]) -> tuple[Event, ...]:
    read = []
    for one in told:
        try:
            read.append(journal.read_event(store, one))
        except (IntegrityError, FormatVersionError, ObjectMissingError) as error:
            warnings.append(str(error))
    return tuple(read)


def _retention_since(settings: Settings) -> datetime | None:
    change = settings.change
    return change.at if change is not None and change.command == "protect --update" else None


def free_space(host: Host, disks: Iterable[str]) -> FreeSpace | None:
    """Return the least room of the file systems that one of the disks lies on here, None where none does."""
    found = []
    for one in disks:
        path = Path(one)
        if not path.is_absolute():  # of a running machine: it tells no folder
            continue
        try:
            if path.exists():
                usage = shutil.disk_usage(path.parent)
                found.append(FreeSpace(str(path.parent), usage.free, usage.total))
        except (OSError, ValueError):
            continue
    if found and host.state_folder is not None:
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(host.state_folder)
            found.append(FreeSpace(str(host.state_folder), usage.free, usage.total))
    return min(found, key=lambda one: one.percent, default=None)
