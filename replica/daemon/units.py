"""The units of the agent's work: plain functions of a store's address and ids, run through any executor.

Each returns a ``Result`` and raises nothing: what went wrong is in it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from typing import Final

from replica import catalog, cycle, garbage, history, immutability, lease, prune, verify
from replica.catalog import ProtectedVm
from replica.cycle import Basis
from replica.daemon.here import Here
from replica.daemon.site import Site
from replica.daemon.stopping import AbandonedError, Where
from replica.errors import (
    ConfigurationError,
    FormatVersionError,
    GodwitError,
    IntegrityError,
    LeaseHeldError,
    StandingError,
    StoreError,
    TenantKeyError,
    UsageError,
)
from replica.failover import transitions
from replica.failover.transitions import Command
from replica.health import gathering, journal
from replica.health.publishing import Watched
from replica.model import Settings, Standing
from replica.pipeline import ordered
from replica.plans import sweeping
from replica.stores.store import Store

LOOKS_AT_ONCE: Final = 8


class Task(StrEnum):
    """What the agent does, for a VM or, where a unit has none, for the tenant."""

    CYCLE = "cycle"
    PRUNE = "prune"
    VERIFY = "verify"
    RETAIN = "retain"
    DRILL = "drill"
    GC = "gc"
    REFRESH = "refresh"
    METRICS = "metrics"
    DIGEST = "digest"


class Verdict(Enum):
    """What an outcome means for what comes next."""

    DONE = "done"
    RETRY = "retry"  # it may succeed later
    STOP = "stop"  # it will not, before somebody did something
    BUSY = "busy"  # another agent is at work
    SKIP = "skip"  # the VM's standing forbids it
    ABANDONED = "abandoned"


_STOPS: Final = (ConfigurationError, TenantKeyError, IntegrityError, FormatVersionError, UsageError)


def judge(error: BaseException) -> Verdict:
    """Return what an error means. What is not known to be in vain is tried again."""
    if isinstance(error, AbandonedError):
        return Verdict.ABANDONED
    if isinstance(error, StandingError):
        return Verdict.SKIP
    if isinstance(error, LeaseHeldError):
        return Verdict.BUSY
    return Verdict.STOP if isinstance(error, _STOPS) else Verdict.RETRY


@dataclass(frozen=True, slots=True)
class Facts:
    """What the agent knows of a VM."""

    found: ProtectedVm
    settings_version: int
    interval_seconds: int
    standing: Standing
    stands: str  # the rest of a sentence about the VM
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.found.vm.name

    @property
    def replicates(self) -> bool:
        """Whether the VM's standing allows cycles."""
        return self.standing in transitions.ALLOWED[Command.REPLICATE]


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work."""

    task: Task
    store_url: str
    tenant: str
    found: ProtectedVm | None = None
    settings_version: int = 0  # that are known
    begun_at: datetime | None = None
    names: tuple[str, ...] = ()  # of a refresh: those that need no look; of gc and metrics: the VMs concerned
    patterns: tuple[str, ...] = ()
    watched: tuple[Watched, ...] = ()  # of digests: the VMs, and how it goes with them
    elsewhere: tuple[Facts, ...] = ()  # of a refresh: VMs whose disks could not be read here, and maybe can be now


@dataclass(frozen=True, slots=True)
class Listing:
    """What a refresh found: all names that are chosen, and what each VM that was looked at is, or why that failed.

    ``unreachable`` are those of which the store tells nothing at present.
    """

    names: frozenset[str]
    facts: Mapping[str, Facts | GodwitError]
    missing: Mapping[str, str]  # of those looked at, by name: a disk that cannot be read here
    renewal: timedelta | None  # how often locks are to be prolonged, where the store has any
    unreachable: Mapping[str, GodwitError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a unit: ``fields`` are what its event says."""

    verdict: Verdict = Verdict.DONE
    fields: Mapping[str, object] = field(default_factory=dict)
    error: BaseException | None = None
    facts: Facts | None = None  # where the settings were found to be other ones
    before: datetime | None = None  # the instant of the point that a cycle continued
    listing: Listing | None = None
    event: str | None = None  # where it is not the usual one
    text: str | None = None
    own: bool = False  # BUSY, with this very agent's other work


def perform(unit: Unit, site: Site) -> Result:
    """Do a unit of work."""
    try:
        return _WORK[unit.task](unit, site)
    except Exception as error:  # whatever it is, the other VMs go on
        own = isinstance(error, LeaseHeldError) and unit.found is not None and _is_collected(unit.found, site)
        return Result(judge(error), error=error, own=own)


def _is_collected(found: ProtectedVm, site: Site) -> bool:
    return site.collecting == found.keys.vm_id


def look(store: Store, found: ProtectedVm) -> Facts:
    """Return what is to be known of a VM now: two requests."""
    return facts_of(found, catalog.settings_in_force(store, found))


def facts_of(found: ProtectedVm, settings: Settings) -> Facts:
    """Return what is to be known of a VM with these settings."""
    state = settings.state
    paths = tuple(one.path for one in settings.sources)
    return Facts(found, settings.version, settings.interval_seconds, state.standing, transitions.say(state), paths)


def _cycle(unit: Unit, site: Site) -> Result:
    store, found = site.store(unit.store_url, for_cycles=True), _vm(unit)
    with lease.holding(store, found.keys, site.host) as held:
        basis = Basis(history.begin(store, found.keys, site.host, held))
        version = held.settings_version
        with site.told_of(found.vm.name) as progress:
            point = cycle.run(store, site.host, found, held, basis, workers=site.workers, progress=progress)
        epoch = held.epoch
    if site.publisher is not None:
        site.publisher.note_cycle(found.keys.vm_id, point, epoch, version)
    fields = {
        "point": point.point,
        "created_at": point.created_at,
        "consistency": point.consistency.value,
        "read_bytes": point.cycle.read_bytes,
        "changed_blocks": point.cycle.changed_blocks,
        "stored_bytes": point.cycle.stored_bytes,
        "seconds": round(point.cycle.seconds, 3),
    }
    continued = basis.point
    # A point that was rewritten has the time of an older one, and tells nothing of when a cycle was made last.
    before = None if continued is None or continued.repeats else continued.created_at
    return Result(fields=fields, facts=_changed(store, unit, version), before=before)


def _changed(store: Store, unit: Unit, version: int) -> Facts | None:
    """Return what is new of a VM whose settings are another version than was known; the cycle is done in any case."""
    if version == unit.settings_version:
        return None
    try:
        return look(store, _vm(unit))
    except GodwitError:  # the next cycle finds them changed again
        return None


def _prune(unit: Unit, site: Site) -> Result:
    store, found = site.store(unit.store_url, where=Where.BETWEEN_BATCHES), _vm(unit)
    planned = prune.plan(store, site.host, found)
    if not planned.removed:
        return Result(fields={"removed": 0, "kept": len(planned.kept), "unreadable": len(planned.unreadable)})
    done = prune.prune(store, site.host, found)
    return Result(
        fields={
            "removed": len(done.removed),
            "kept": len(done.kept),
            "locked": len(done.locked),
            "unreadable": len(done.unreadable),
        }
    )


def _verify(unit: Unit, site: Site) -> Result:
    store, found = site.store(unit.store_url), _vm(unit)
    report = verify.verify(
        store, site.host, found, sample=site.terms.verify, workers=site.workers, progress=site.care.progress
    )
    if not report.verdicts and not report.unreadable:
        return Result(fields={"points": 0})
    journal.record_event(store, site.host, found.keys, journal.verification(report, site.host.clock.now()), mark=False)
    fields = {
        "points": len(report.verdicts),
        "damaged_points": sorted(one.point for one in report.verdicts if not one.restores),
        "unreadable": len(report.unreadable),
        "read_bytes": 0 if report.sample is None else report.sample.read_bytes,
        "total_bytes": 0 if report.sample is None else report.sample.total_bytes,
    }
    return Result(fields=fields, event="verify.damage" if report.damaged else None)


def _retain(unit: Unit, site: Site) -> Result:
    store = site.store(unit.store_url)
    done = immutability.prolong(store, site.host, _vm(unit), workers=site.workers)
    fields = {
        "objects": done.objects,
        "prolonged": done.prolonged,
        "locked_until": done.locked_until,
        "missing": len(done.missing),
    }
    return Result(fields=fields, event="retain.missing" if done.missing else None)


def _drill(unit: Unit, site: Site) -> Result:
    assert site.drill is not None, "scheduled only where there is one"
    return Result(fields=site.drill(site.store(unit.store_url), site.host, _vm(unit)))


def _gc(unit: Unit, site: Site) -> Result:
    store = site.store(unit.store_url)
    references = garbage.survey(store, unit.tenant, workers=site.workers)
    deleted = reclaimed = waiting = busy = 0
    errors: list[GodwitError] = []
    for name in unit.names:
        try:
            found = catalog.find(store, unit.tenant, name)
            site.collecting = found.keys.vm_id
            done = garbage.collect(store, site.host, found, references, workers=site.workers)
        except AbandonedError:
            raise
        except GodwitError as error:
            errors.append(error)
            continue
        finally:
            site.collecting = None
        deleted, reclaimed = deleted + done.deleted.objects, reclaimed + done.deleted.bytes
        waiting, busy = waiting + done.waiting.bytes, busy + (done.busy is not None)
    gathering.sweep(store, unit.tenant, site.host.clock.now())
    sweeping.sweep(store, unit.tenant, site.host.clock.now())
    fields = {"deleted_objects": deleted, "reclaimed_bytes": reclaimed, "waiting_bytes": waiting, "busy_vms": busy}
    if errors:
        return Result(judge(errors[0]), {**fields, "failed_vms": len(errors)}, errors[0])
    return Result(fields=fields)


def _refresh(unit: Unit, site: Site) -> Result:
    store = site.store(unit.store_url)
    wherever = bool(unit.patterns)  # what was chosen is replicated, and fails where its disks are not here
    names = [one for one in catalog.names(store, unit.tenant) if is_chosen(one, unit.patterns)]
    terms = catalog.read_store(store).terms
    known = frozenset(unit.names)
    facts: dict[str, Facts | GodwitError] = {}
    missing: dict[str, str] = {}
    here = Here()

    def one(name: str) -> Facts | GodwitError:
        try:
            return look(store, catalog.find(store, unit.tenant, name))
        except AbandonedError:
            raise
        except GodwitError as error:
            return error

    wanted = [name for name in names if name not in known]
    with (
        ThreadPoolExecutor(LOOKS_AT_ONCE, "look") as pool,
        closing(ordered(pool, one, wanted, limit=LOOKS_AT_ONCE * 4)) as results,
    ):
        for name, found in zip(wanted, results, strict=True):
            facts[name] = found
            if isinstance(found, Facts) and not wherever and (lacking := here.missing(found.sources)):
                missing[name] = lacking
    listed = frozenset(names)
    for known_facts in unit.elsewhere:
        name = known_facts.name
        if name in listed and name not in facts and here.missing(known_facts.sources) is None:
            facts[name] = known_facts
    unreachable = {name: one for name, one in facts.items() if isinstance(one, GodwitError) and _tells_nothing(one)}
    if unreachable and len(unreachable) == len(names):
        raise next(iter(unreachable.values()))  # nothing is known of any: it is the store, and not a VM
    told = {name: one for name, one in facts.items() if name not in unreachable}
    return Result(listing=Listing(listed, told, missing, None if terms is None else terms.renewal, unreachable))


def _tells_nothing(error: GodwitError) -> bool:
    return isinstance(error, StoreError) and judge(error) is Verdict.RETRY


def is_chosen(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the agent is to look after a VM of that name: none of the patterns, or one that fits."""
    return not patterns or any(name == one or fnmatch.fnmatchcase(name, one) for one in patterns)


def _metrics(unit: Unit, site: Site) -> Result:
    from replica.health.assessment import assess  # noqa: PLC0415 - only where they are asked for
    from replica.health.metrics import metrics  # noqa: PLC0415
    from replica.health.observing import Depth, observe_all  # noqa: PLC0415

    store = site.store(unit.store_url)
    seen = observe_all(store, site.host, unit.tenant, unit.names, Depth(points=2))
    return Result(text=metrics([assess(one) for one in seen], site.host.clock.now().timestamp()))


def _digest(unit: Unit, site: Site) -> Result:
    assert site.publisher is not None, "scheduled only where there is one"
    done = site.publisher.publish(site.store(unit.store_url), unit.watched)
    return Result(fields={"written": done.written, "looked_at": done.looked_at, "waiting": done.waiting})


def _vm(unit: Unit) -> ProtectedVm:
    assert unit.found is not None, unit.task
    return unit.found


_WORK: Final[Mapping[Task, Callable[[Unit, Site], Result]]] = {
    Task.CYCLE: _cycle,
    Task.PRUNE: _prune,
    Task.VERIFY: _verify,
    Task.RETAIN: _retain,
    Task.DRILL: _drill,
    Task.GC: _gc,
    Task.REFRESH: _refresh,
    Task.METRICS: _metrics,
    Task.DIGEST: _digest,
}
