"""Gathering: the fleet from its digests, an object for a hundred VMs, with what those leave out looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from replica import catalog, changes, keys
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError, StoreError, TenantKeyError
from replica.health import digest
from replica.health.digest import Digest, Rows
from replica.health.observation import Observation
from replica.health.observing import BRIEF, Depth, observe_all
from replica.host import Host
from replica.stores.skew import skew_of
from replica.stores.store import ObjectInfo, Store
from replica.vault import vault_of

AT_ONCE: Final = 8
STALE: Final = timedelta(days=30)  # digests that were written so long ago are of no use to anybody


@dataclass(frozen=True, slots=True)
class Gathered:
    """The VMs in the order of their names; ``digests`` were read of those listed, ``direct`` VMs were looked at."""

    seen: tuple[Observation, ...]
    digests: int
    direct: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """A digest as it was read, or why it could not be."""

    tag: str
    found: Digest | None
    sealed: bool = False
    problem: str = ""


class Gatherer:
    """Gathers a tenant's VMs as often as asked, and reads only digests that changed since.

    ``rows`` chooses which points of each VM are read. What is looked at directly is so again after ``direct_for``.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        tenant: str,
        *,
        depth: Depth = BRIEF,
        rows: Rows = digest.brief_rows,
        at_once: int = AT_ONCE,
        direct_for: timedelta = timedelta(0),
    ) -> None:
        self._store = store
        self._host = host
        self._tenant = tenant
        self._depth = depth
        self._rows = rows
        self._at_once = at_once
        self._direct_for = direct_for
        self._read: dict[str, _Read] = {}
        self._direct: dict[str, Observation] = {}

    def gather(self, *, fresh: bool = False) -> Gathered:
        """Return the VMs as they are told now; ``fresh``: every one is looked at, as if there were no digests.

        Raises NoStoreError, StoreUnavailableError.
        """
        catalog.read_store(self._store)
        names = list(catalog.names(self._store, self._tenant))
        told = {} if fresh else self._told()
        rest = [name for name in names if name not in told]
        direct = self._look(rest)
        now, skew = self._host.clock.now(), skew_of(self._store)
        seen = []
        for name in names:
            one = told.get(name) or direct.get(name)
            if one is not None:  # it is protected no more, since the names were listed
                seen.append(replace(one, at=now, store_skew_seconds=skew) if name in told else one)
        warnings = tuple(one.problem for one in self._read.values() if one.problem)
        return Gathered(tuple(seen), 0 if fresh else len(self._read), len(direct), warnings)

    def _told(self) -> dict[str, Observation]:
        """Return what digests say of each VM, without those that changed since, by name."""
        self._refresh(list(self._store.list(keys.digests(self._tenant))))
        before = vault_of(self._store)
        requires = before is not None and before.require
        best: dict[str, Observation] = {}
        for one in sorted(self._read.values(), key=lambda one: one.sealed):
            for seen in one.found.seen if one.found is not None else ():
                if requires and not one.sealed:
                    continue
                known = best.get(seen.name)
                if known is None or _is_later(seen, known):
                    best[seen.name] = seen
        marks = unknown_marks(changes.listed(self._store, self._tenant), best.values())
        return {name: seen for name, seen in best.items() if seen.vm_id not in marks}

    def _refresh(self, listed: list[ObjectInfo]) -> None:
        """Read the digests that are new or changed, and forget those that are gone."""
        opener = digest.Opener(self._store, self._tenant)
        kept = {
            info.key: known
            for info in listed
            if (known := self._read.get(info.key)) is not None and known.tag == info.tag
        }
        wanted = [info for info in listed if info.key not in kept and keys.digest_of(info.key) is not None]

        def read(info: ObjectInfo) -> _Read:
            try:
                data = self._store.get(info.key)
                found, sealed = digest.decode(data, key=info.key, sealer=opener, rows=self._rows)
            except ObjectMissingError:
                return _Read("", None)
            except (IntegrityError, FormatVersionError, TenantKeyError) as error:
                return _Read(info.tag, None, problem=str(error))
            return _Read(info.tag, found, sealed)

        if wanted:
            with ThreadPoolExecutor(self._at_once, thread_name_prefix="digests") as pool:
                kept |= zip((info.key for info in wanted), pool.map(read, wanted), strict=True)
        self._read = {key: kept[key] for key in sorted(kept)}

    def _look(self, names: Iterable[str]) -> dict[str, Observation]:
        """Return VMs as they are, or as they were seen not long ago."""
        now = self._host.clock.now()
        wanted = list(names)
        kept = {
            name: one
            for name in wanted
            if (one := self._direct.get(name)) is not None and timedelta(0) <= now - one.at < self._direct_for
        }
        rest = [name for name in wanted if name not in kept]
        looked = observe_all(self._store, self._host, self._tenant, rest, self._depth, at_once=self._at_once)
        self._direct = kept | {one.name: one for one in looked}
        return self._direct


def _is_later(one: Observation, other: Observation) -> bool:
    """Whether the first of two words on a name counts: what is encrypted before what claims not to be.

    A VM that was protected later under the same name is another one.
    """
    if one.vm_id != other.vm_id and one.protected_since is not None and other.protected_since is not None:
        return one.protected_since > other.protected_since
    if one.encrypted != other.encrypted:
        return one.encrypted
    return digest.order(one) > digest.order(other)


def unknown_marks(marks: Iterable[changes.Mark], told: Iterable[Observation]) -> frozenset[str]:
    """Return the ids of the VMs that were changed in a way that what is told of them does not know."""
    known: Mapping[str, Observation] = {one.vm_id: one for one in told}
    found = set()
    for mark in marks:
        seen = known.get(mark.vm_id)
        if seen is not None and not mark.is_known(seen.settings_version, seen.event_at):
            found.add(mark.vm_id)
    return frozenset(found)


def sweep(store: Store, tenant: str, now: datetime) -> int:
    """Delete digests that nobody has written for long, and marks that are known; return how many objects went.

    What cannot be read stays, as it may be a later version's. Where the store fails the rest is left for the next time.
    """
    gone = 0
    with contextlib.suppress(StoreError):
        for key in _swept(store, tenant, now):
            store.delete(key)
            gone += 1
    return gone


def _swept(store: Store, tenant: str, now: datetime) -> list[str]:
    """Return what is to be deleted."""
    opener = digest.Opener(store, tenant)
    told: dict[str, list[Observation]] = {}
    gone: list[str] = []
    all_read = True
    for info in list(store.list(keys.digests(tenant))):
        if keys.digest_of(info.key) is None:
            continue
        try:
            found, _ = digest.decode(store.get(info.key), key=info.key, sealer=opener, rows=digest.brief_rows)
        except (ObjectMissingError, FormatVersionError, IntegrityError, TenantKeyError):
            all_read = False
            continue
        if now - found.written_at > STALE:
            gone.append(info.key)
            continue
        for seen in found.seen:
            told.setdefault(seen.vm_id, []).append(seen)
    gone += [
        mark.key
        for mark in changes.listed(store, tenant)
        if (mark.vm_id in told or all_read)
        and all(mark.is_known(seen.settings_version, seen.event_at) for seen in told.get(mark.vm_id, ()))
    ]
    return gone
