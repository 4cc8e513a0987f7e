"""Immutability: what is locked in a store stays until its date, and this sees to it that what points need stays locked.

What is promised, by whom it is kept, and what it costs is set out in docs/immutability.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from replica import catalog, history, keys, locking, prune
from replica.catalog import ProtectedVm
from replica.errors import ConfigurationError, NoStoreError, ObjectMissingError
from replica.host import Host
from replica.keys import VmKeys
from replica.locking import Locks, Terms
from replica.mapstore import MapStore
from replica.model import MapPartRef
from replica.pipeline import ordered
from replica.retention import Rule
from replica.stores.store import Store
from replica.workers import Workers

_KINDS: Final = ("settings/", "manifests/", "maps/", "segments/", "conversions/")


@dataclass(frozen=True, slots=True)
class Prolongation:
    """What a run saw to: ``objects`` that kept points need, of which so many were ``prolonged``.

    ``locked_until`` is the end of the lock that ends first, after the run; ``missing`` are objects that are gone.
    """

    terms: Terms
    objects: int
    prolonged: int
    locked_until: datetime
    missing: tuple[str, ...]


def prepare(store: Store, period: timedelta) -> Terms:
    """Return the terms of a store that is to be made, having tried out that its locks hold; one may be there already.

    Raises ConfigurationError where the store has no locks, StoreRefusedError where they do not hold, UsageError.
    """
    terms = Terms(period)
    locks = Locks(store)
    with contextlib.suppress(NoStoreError):
        require_terms(catalog.read_store(store).terms, terms)
    locks.check()
    return terms


def require_terms(found: locking.Terms | None, wanted: Terms | None) -> None:
    """Check that a store that exists keeps what is asked for. Raises ConfigurationError."""
    if wanted is not None and found != wanted:
        kept = "nothing" if found is None else f"points for {found.period}"
        raise ConfigurationError(
            f"this already is a store, which keeps {kept} immutable; that was settled when it was made",
            hint="make a new store under another prefix, and protect the VMs there",
        )


def prolong(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    rule: Rule | None = None,
    dry_run: bool = False,
    workers: Workers | None = None,
) -> Prolongation:
    """Prolong the locks of what the points need that the retention rule keeps, where they end too soon.

    Nothing that is locked ever ends earlier by it, so it needs no lease, and runs beside everything else; points that
    are published meanwhile are locked by their own cycle, and what they share with earlier ones by the run before.
    Raises ConfigurationError where the store has no locks, IntegrityError where a map cannot be read.
    """
    terms = catalog.read_store(store).terms
    if terms is None:
        raise ConfigurationError(
            "the points of this store are not immutable", hint="'godwit init URL --immutable-for 30d' makes one"
        )
    locks = Locks(store)
    chosen = workers or Workers()
    now = host.clock.now()
    versions = _Versions(locks)
    needed = {key: versions.of(key) for key in _needed(store, host, found, rule, chosen)}

    def see_to(key: str) -> tuple[datetime, bool]:
        version = needed[key]
        assert version is not None
        until = locks.locked_until(key, version)
        if until is not None and not terms.is_due(until, now):
            return until, False
        if not dry_run:
            locks.lock(key, version, terms.lock_until(now))
        return terms.lock_until(now), True

    present = [key for key, version in needed.items() if version is not None]
    ends, prolonged = [terms.lock_until(now)], 0
    with ThreadPoolExecutor(chosen.uploads, "prolong") as pool:
        results = ordered(pool, see_to, present, limit=chosen.uploads * 4)
        with closing(results):
            for until, was_due in results:
                ends.append(until)
                prolonged += was_due
    missing = tuple(key for key, version in needed.items() if version is None)
    return Prolongation(terms, len(present), prolonged, min(ends), missing)


class _Versions:
    """What was written first under each key, asked for folder by folder: a thousand of them cost one request."""

    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self._folders: dict[str, dict[str, str]] = {}

    def of(self, key: str) -> str | None:
        """Return the version, None where nothing was ever written there or all of it was deleted."""
        vm = keys.vm_of(key)
        folder = key
        if vm is not None:
            kind = next((one for one in _KINDS if key.startswith(vm.prefix + one)), None)
            folder = key if kind is None else vm.prefix + kind
        if folder not in self._folders:
            self._folders[folder] = self._locks.first_versions(folder)
        return self._folders[folder].get(key)


def _needed(store: Store, host: Host, found: ProtectedVm, rule: Rule | None, workers: Workers) -> Iterator[str]:
    """Yield the keys of all that the kept points need, and of what leads to them, each once."""
    tenant = found.keys.tenant
    yield keys.STORE
    yield keys.name(tenant, found.vm.name)
    for info in store.list(keys.tenant_keys(tenant)):
        yield info.key
    yield found.keys.vm
    settings = catalog.settings_in_force(store, found)
    yield found.keys.settings(settings.version)
    for one in settings.state.conversions:
        yield found.keys.conversion(one.point, one.disk)
    parts: dict[MapPartRef, None] = {}
    for kept in prune.plan(store, host, found, rule=rule).kept:
        try:
            point = history.read(store, found.keys, kept.point)
        except ObjectMissingError:  # pruned since
            continue
        yield found.keys.manifest(kept.point)
        parts.update(dict.fromkeys(ref for each in getattr(point, "maps", ()) for ref in each.parts))
    maps = MapStore(store, found.keys, None)
    others: dict[VmKeys, None] = {}
    segments: dict[str, None] = {}
    with ThreadPoolExecutor(workers.threads, "maps") as pool:
        read = ordered(pool, lambda ref: list(maps.fetch(ref).segment_refs()), parts, limit=workers.threads)
        with closing(read):
            for ref, refs in zip(parts, read, strict=True):
                yield found.keys.map_part(ref.part)
                for segment in refs:
                    owner = VmKeys(tenant, segment.vm_id)
                    if owner != found.keys:
                        others[owner] = None
                    segments[owner.segment(segment.part)] = None
    for owner in others:
        yield owner.vm  # it holds the key of the segments, where they are sealed
    yield from segments
