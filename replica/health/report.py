"""Reports: the health of one VM or of a whole tenant, gathered and judged, as values and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from replica.health.assessment import WINDOW, Assessment, assess
from replica.health.digest import brief_rows
from replica.health.gathering import Gathered, Gatherer
from replica.health.observing import BRIEF, Depth, observe_named
from replica.health.rules import Severity
from replica.host import Host
from replica.stores.store import Store


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What was found of the VMs that were asked for, in the order of their names."""

    made_at: datetime
    assessments: tuple[Assessment, ...]
    digests: int = 0  # that were read
    direct: int = 0  # VMs that were looked at, since no digest told of them
    warnings: tuple[str, ...] = ()  # digests that could not be read

    @property
    def oldest_word_seconds(self) -> float | None:
        """The age of what digests tell that is oldest, None where none was read."""
        told = [one.seen.as_of for one in self.assessments if one.seen.as_of is not None]
        return max(0.0, (self.made_at - min(told)).total_seconds()) if told else None

    @property
    def health(self) -> Severity:
        """That of the VM that is worst."""
        return max((one.health for one in self.assessments), key=lambda one: one.rank, default=Severity.NORMAL)


def report(
    store: Store,
    host: Host,
    tenant: str,
    names: Iterable[str] | None = None,
    *,
    depth: Depth = BRIEF,
    window: timedelta = WINDOW,
    at_once: int = 8,
    fresh: bool = False,
) -> HealthReport:
    """Judge the VMs of those names, each looked at, or all of the tenant, told by digests where there are any.

    It reads only. With ``fresh`` no digest is read. A VM that cannot be read is in the report as such. Raises
    UsageError for a name that no VM has, NoStoreError, StoreUnavailableError.
    """
    if names is None:
        rows = brief_rows if depth.points <= BRIEF.points else range
        gathered = Gatherer(store, host, tenant, depth=depth, rows=rows, at_once=at_once).gather(fresh=fresh)
        return judged(gathered, host, window)
    observed = [observe_named(store, host, tenant, name, depth) for name in names]
    return HealthReport(host.clock.now(), tuple(assess(one, window) for one in observed))


def judged(gathered: Gathered, host: Host, window: timedelta = WINDOW) -> HealthReport:
    """Judge what was gathered."""
    found = tuple(assess(one, window) for one in gathered.seen)
    return HealthReport(host.clock.now(), found, gathered.digests, gathered.direct, gathered.warnings)


def document(one: Assessment) -> dict[str, Any]:
    """Return an assessment in terms of JSON (times as they are). Fields only grow."""
    seen, newest, good = one.seen, one.seen.newest, one.seen.newest_restorable
    return {
        "name": seen.name,
        "vm_id": seen.vm_id or None,
        "health": one.health.value,
        "state": one.state.value,
        "rpo_seconds": one.rpo_seconds,
        "interval_seconds": None if seen.unread else seen.interval_seconds,
        "reasons": [asdict(reason) for reason in one.reasons],
        "readiness": one.readiness.value,
        "doubts": [asdict(reason) for reason in one.doubts],
        "newest_point": newest.point if newest else None,
        "newest_restorable_point": good.point if good else None,
        "newest_restorable_at": good.created_at if good else None,
        "points": seen.listed,
        "damaged_points": sorted(seen.damaged),
        "statistics": {**asdict(one.statistics), "missed_percent": one.statistics.missed_percent},
        "last_drill": asdict(seen.last_drill) if seen.last_drill else None,
        "last_verify": asdict(seen.last_verify) if seen.last_verify else None,
        "convertibility": seen.convertibility,
        "encrypted": seen.encrypted,
        "standing": seen.standing.value,
        "source_host": seen.source_host or None,
        "chain_files": newest.chain_files if newest and newest.chain_files else None,
        "free_space": asdict(seen.free_space) if seen.free_space else None,
        "store_skew_seconds": seen.store_skew_seconds,
        "source_skew_seconds": seen.source_skew_seconds,
        "resynchronisation_seconds": one.resynchronisation_seconds,
        "as_of": seen.as_of,
        "agent": asdict(seen.agent) if seen.agent else None,
        "warnings": list(seen.warnings),
    }
