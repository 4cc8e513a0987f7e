"""The board: what a live view of a tenant shows at one moment, in the order that is asked for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from replica.daemon.localagent import RUNNING, LocalAgent, LocalVm
from replica.health.assessment import Assessment, Readiness
from replica.health.report import HealthReport
from replica.health.rules import Severity

MOST_TOLD: Final = 5  # running VMs, next turns


class Sorting(StrEnum):
    """By what the VMs are ordered; each puts first what is to be looked at first."""

    HEALTH = "health"
    RPO = "rpo"  # the oldest first
    LATE = "late"  # by how many intervals
    CHURN = "churn"  # what changed for the newest point
    NEXT = "next"  # whose turn comes first
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Row:
    """One VM. ``state`` is its agent's word where there is one, else what replication does."""

    name: str
    health: Severity
    readiness: Readiness
    rpo_seconds: float | None
    wanted_seconds: int
    state: str
    next_at: datetime | None
    churn_bytes: int
    why: tuple[str, ...]
    error: str | None
    as_of: datetime | None

    @property
    def late(self) -> float:
        """The RPO in intervals; what has none is later than all."""
        return float("inf") if self.rpo_seconds is None else self.rpo_seconds / max(1, self.wanted_seconds)


@dataclass(frozen=True, slots=True)
class Board:
    """One frame."""

    at: datetime
    rows: tuple[Row, ...]
    health: Mapping[Severity, int]
    readiness: Mapping[Readiness, int]
    late: int  # VMs whose RPO is more than two intervals
    digests: int
    direct: int
    oldest_word_seconds: float | None  # the age of what digests tell that is oldest
    agent: LocalAgent | None
    problem: str | None = None  # why nothing newer is known

    @property
    def worst(self) -> Row | None:
        """The VM whose RPO is largest."""
        return max((one for one in self.rows if one.rpo_seconds is not None), key=_rpo, default=None)

    @property
    def running(self) -> tuple[LocalVm, ...]:
        """The VMs that this machine's agent replicates at the moment."""
        told = self.agent.vms.values() if self.agent is not None else ()
        return tuple(sorted((one for one in told if one.state == RUNNING), key=lambda one: one.name))[:MOST_TOLD]

    @property
    def coming(self) -> tuple[LocalVm, ...]:
        """The VMs whose turn comes next at this machine's agent."""
        told = self.agent.vms.values() if self.agent is not None else ()
        waiting = [(one.next_at, one.name, one) for one in told if one.next_at is not None]
        return tuple(one for _, _, one in sorted(waiting, key=lambda each: each[:2])[:MOST_TOLD])

    @property
    def failing(self) -> tuple[LocalVm, ...]:
        """The VMs of this machine's agent whose last cycle failed, most failures first."""
        told = self.agent.vms.values() if self.agent is not None else ()
        failed = [one for one in told if one.error is not None]
        return tuple(sorted(failed, key=lambda one: (-one.failures, one.name))[:MOST_TOLD])


def board(
    made: HealthReport, agent: LocalAgent | None, sorting: Sorting = Sorting.HEALTH, problem: str | None = None
) -> Board:
    """Return the board of a report, with what this machine's agent does."""
    here = agent.vms if agent is not None and agent.is_heard_of(made.made_at) else {}
    rows = sorted((_row(one, here.get(one.seen.name)) for one in made.assessments), key=_ORDER[sorting])
    return Board(
        at=made.made_at,
        rows=tuple(rows),
        health={one: sum(row.health is one for row in rows) for one in Severity},
        readiness={one: sum(row.readiness is one for row in rows) for one in Readiness},
        late=sum(row.late > 2 for row in rows),
        digests=made.digests,
        direct=made.direct,
        oldest_word_seconds=made.oldest_word_seconds,
        agent=agent,
        problem=problem,
    )


def _row(one: Assessment, here: LocalVm | None) -> Row:
    seen, note = one.seen, one.seen.agent
    if here is not None and here.state != "elsewhere" and here.vm_id in (seen.vm_id, ""):
        state, next_at, error = here.state, here.next_at, here.error  # it knows better than its digest
    elif note is not None:
        state, next_at, error = note.state or one.state.value, note.next_at, note.error
    else:
        state, next_at, error = one.state.value, None, seen.unread
    return Row(
        name=seen.name,
        health=one.health,
        readiness=one.readiness,
        rpo_seconds=one.rpo_seconds,
        wanted_seconds=seen.interval_seconds,
        state=state,
        next_at=next_at,
        churn_bytes=seen.newest.changed_bytes if seen.newest is not None else 0,
        why=tuple(reason.rule_id for reason in one.reasons),
        error=error,
        as_of=seen.as_of,
    )


def _rpo(row: Row) -> float:
    return float("inf") if row.rpo_seconds is None else row.rpo_seconds


_ORDER: Final[Mapping[Sorting, Callable[[Row], Any]]] = {
    Sorting.HEALTH: lambda row: (-row.health.rank, -row.late, row.name),
    Sorting.RPO: lambda row: (-_rpo(row), row.name),
    Sorting.LATE: lambda row: (-row.late, row.name),
    Sorting.CHURN: lambda row: (-row.churn_bytes, row.name),
    Sorting.NEXT: lambda row: (row.next_at is None, row.next_at.timestamp() if row.next_at else 0.0, row.name),
    Sorting.NAME: lambda row: row.name,
}
