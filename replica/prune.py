"""Pruning: takes the points that the retention rule does not keep out of a VM's history (docs/ordering.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from replica import catalog, history, holds, lease, pins, retention
from replica.catalog import ProtectedVm
from replica.errors import ObjectExistsError, ObjectLockedError, ObjectMissingError, StoreRefusedError, UsageError
from replica.health import journal
from replica.health.observation import sample_of
from replica.host import Host
from replica.keys import VmKeys
from replica.lease import Lease
from replica.model import Point, Settings
from replica.retention import Rule
from replica.stores.store import Store

BATCH_POINTS: Final = 64


@dataclass(frozen=True, slots=True)
class PointTime:
    """A point by its number, and when its instant was taken."""

    point: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A manifest that cannot be read. It is left as it is."""

    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Pruning:
    """What pruning did, or would do: points oldest first."""

    rule: str
    removed: tuple[PointTime, ...]
    kept: tuple[PointTime, ...]
    pinned: tuple[int, ...]  # of the kept points: pinned, being seeded from, or what machines were started from
    unreadable: tuple[Unreadable, ...]
    locked: tuple[int, ...] = ()  # those of the kept points that stay only because their manifests are still locked


def plan(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    rule: Rule | None = None,
    points: frozenset[int] | None = None,
) -> Pruning:
    """Return what pruning would do now, changing nothing.

    ``rule`` stands in for the one of the VM's settings. With ``points`` those go, and no rule is asked. Raises
    UsageError where one of them has to stay, or is none.
    """
    settings = catalog.settings_in_force(store, found)
    chosen = points or rule or retention.parse(settings.retention or retention.DEFAULT_TEXT)
    state, _ = lease.read(store, found.keys)
    number = history.newest_number(store, found.keys, state.point)
    newest = history.point_at_or_before(store, found.keys, number, damaged_too=False)
    return _plan(store, host, found.keys, chosen, newest, settings, {})


def prune(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    rule: Rule | None = None,
    points: frozenset[int] | None = None,
) -> Pruning:
    """Delete the manifests of the points that are not kept, oldest first; return what was done.

    The newest point that can be read, pinned ones, and manifests that cannot be read stay; so do fences, which hold
    their numbers for good. What the points referred to is left to garbage collection. Cut off at any instant, every
    point that is still listed restores, and the next run goes on.
    Where the store locks what points need, a point whose manifest is still locked is left for a later run.
    ``rule`` and ``points`` as in ``plan``. Raises LeaseHeldError where another agent is at work, LeaseLostError where
    one took over, StoreError, UsageError as ``plan``.
    """
    with lease.holding(store, found.keys, host) as held:
        newest = history.begin(store, found.keys, host, held)
        settings = catalog.read_settings(store, found.keys, held.settings_version)
        holds.sweep(store, host, found.keys)
        chosen = points or rule or retention.parse(settings.retention or retention.DEFAULT_TEXT)
        seen: dict[int, Point] = {}
        planned = _plan(store, host, found.keys, chosen, newest, settings, seen)
        with contextlib.suppress(StoreRefusedError):  # a gap in reports, which must not keep points from going
            journal.remember(store, found.keys, (sample_of(seen[one.point]) for one in planned.removed))
        locked: set[int] = set()
        removed = frozenset(_remove_all(store, found.keys, held, planned.removed, locked))
    # A point that was pinned since the plan was made has stayed, and so has one that is locked.
    stayed = tuple(one for one in planned.removed if one not in removed)
    return replace(
        planned,
        removed=tuple(one for one in planned.removed if one in removed),
        kept=tuple(sorted((*planned.kept, *stayed), key=lambda one: one.point)),
        pinned=tuple(sorted((*planned.pinned, *(one.point for one in stayed if one.point not in locked)))),
        locked=tuple(sorted(locked)),
    )


def _plan(
    store: Store,
    host: Host,
    keys: VmKeys,
    rule: Rule | frozenset[int],
    newest: Point | None,
    settings: Settings,
    seen: dict[int, Point],
) -> Pruning:
    """Return what is to be removed; the points themselves come into ``seen``."""
    # A store whose listing lags may not show the newest point yet: it is known, and counts.
    times = {} if newest is None else {newest.point: newest.created_at}
    origins = {} if newest is None else {newest.point: newest.origin}
    unreadable = []
    if newest is not None:
        seen[newest.point] = newest
    for one in history.points(store, keys):
        if isinstance(one, Point):
            seen[one.point] = one
            times[one.point] = one.created_at
            origins[one.point] = one.origin
        else:
            unreadable.append(Unreadable(one.key, str(one)))
    pinned = pins.numbers(store, keys) | holds.in_force(store, keys, host.clock.now())
    pinned |= settings.state.points  # machines run from them; which these are changes under the lease only
    latest = {origins[number]: number for number in sorted(origins)}
    repeated = origins.keys() - latest.values()
    if isinstance(rule, frozenset):
        _require_removable(rule, newest, times, pinned)
        kept = frozenset(times) - rule
        told = "as named"
    else:
        kept = frozenset(retention.keep(rule, times, pinned, repeated))
        told = str(rule)
    ordered = [PointTime(number, times[number]) for number in sorted(times)]
    return Pruning(
        rule=told,
        removed=tuple(one for one in ordered if one.point not in kept),
        kept=tuple(one for one in ordered if one.point in kept),
        pinned=tuple(sorted(pinned & kept)),
        unreadable=tuple(unreadable),
    )


def _require_removable(
    points: frozenset[int], newest: Point | None, times: Mapping[int, datetime], pinned: frozenset[int]
) -> None:
    for number in sorted(points):
        if number not in times:
            raise UsageError(
                f"there is no point {number} that can be read",
                hint="'godwit points' lists them; 'godwit repair' strikes those whose manifest is damaged",
            )
        if newest is not None and number == newest.point:
            raise UsageError(
                f"point {number} is the newest: the next cycle builds on it",
                hint="where it is damaged, 'godwit repair' makes a new one; then this one can go",
            )
        if number in pinned:
            raise UsageError(
                f"point {number} is pinned, a VM is being seeded from it, or a machine was started from it",
                hint="'godwit unpin' or 'godwit cleanup' lets it go",
            )


def _remove_all(
    store: Store, keys: VmKeys, held: Lease, doomed: tuple[PointTime, ...], locked: set[int]
) -> Iterator[PointTime]:
    for start in range(0, len(doomed), BATCH_POINTS):
        batch = doomed[start : start + BATCH_POINTS]
        yield from _remove(store, keys, held, batch, locked)


def _remove(store: Store, keys: VmKeys, held: Lease, batch: tuple[PointTime, ...], locked: set[int]) -> list[PointTime]:
    """Delete the manifests of those that are not pinned by now; return which they were, and note what is ``locked``."""
    pinned = pins.numbers(store, keys) | holds.numbers(store, keys)
    held.check()
    removed: dict[PointTime, bytes] = {}
    for one in batch:
        if one.point in pinned:
            continue
        key = keys.manifest(one.point)
        try:
            data = store.get(key)
            store.delete(key)
        except ObjectMissingError:
            continue
        except ObjectLockedError:
            locked.add(one.point)
            continue
        removed[one] = data
    # Pinning writes the pin and then looks for the manifest, and holding does likewise; here it is the other way round,
    # so that one of the two sees the other. What was deleted while it was being pinned is put back: all that it refers
    # to is still there.
    being_seeded_from = holds.numbers(store, keys) if removed else frozenset()
    for one in [one for one in removed if one.point in being_seeded_from or pins.is_pinned(store, keys, one.point)]:
        with contextlib.suppress(ObjectExistsError):
            store.create(keys.manifest(one.point), removed[one])
        del removed[one]
    return list(removed)
