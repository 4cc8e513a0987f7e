"""Digests of an agent's VMs: written down once a minute where something changed, beside everything else it does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from replica.daemon import timing
from replica.daemon.events import problem
from replica.daemon.fleet import Member, MemberState
from replica.daemon.units import Result, Task, Unit, Verdict
from replica.health.publishing import Watched

if TYPE_CHECKING:
    from replica.daemon.agent import Agent
    from replica.daemon.membership import Membership

DIGEST_SECONDS: Final = 60.0  # between two turns
FIRST_SECONDS: Final = 5.0  # until the first
_TELLS: Final = (Task.PRUNE, Task.VERIFY, Task.DRILL)  # what changes more of a VM than the agent knows


class Digesting:
    """When digests are written, and what is put into doubt by what else is done."""

    def __init__(self, agent: Agent, members: Membership) -> None:
        self._agent = agent
        self._members = members
        self._due: float | None = agent.monotonic() + FIRST_SECONDS if agent.purpose.digests else None
        self._failures = 0

    def next_due(self) -> float | None:
        """Return when the next turn begins; None while one is under way, or where there are none."""
        return self._due if self._members.settled else None

    def start_due(self) -> None:
        """Begin a turn, if it is time and it is known which VMs there are."""
        if self._due is None or self._agent.monotonic() < self._due or not self._members.settled:
            return
        self._due = None
        watched = tuple(_watched(one) for one in self._members.all.values() if one.state is not MemberState.ELSEWHERE)
        self._agent.begin(replace(self._agent.unit(Task.DIGEST), watched=watched))

    def finish(self, result: Result) -> None:
        """Take note of what became of a turn, and put the next one down."""
        if result.verdict is Verdict.ABANDONED:
            return
        if result.error is None:
            self._failures = 0
            self._due = self._agent.monotonic() + DIGEST_SECONDS
            return
        self._failures += 1
        pause_seconds = timing.retry_seconds(self._failures)
        self._due = self._agent.monotonic() + pause_seconds
        if self._failures == 1:
            self._agent.say("digest.failed", None, **problem(result.error), retry_in_seconds=pause_seconds)

    def note(self, unit: Unit, result: Result) -> None:
        """Have a VM looked at where a unit of work did more than it tells."""
        publisher = self._agent.site.publisher
        if publisher is None or unit.found is None or result.verdict is Verdict.ABANDONED:
            return
        fails = unit.task is Task.CYCLE and result.verdict is not Verdict.DONE
        if fails or (unit.task in _TELLS and result.fields.get("removed") != 0):
            publisher.note_doubt(unit.found.keys.vm_id)


def _watched(member: Member) -> Watched:
    error = member.error or {}
    message, hint = error.get("message"), error.get("hint")
    # That a cycle is under way at this very moment is old by the time that anybody reads it.
    state = MemberState.WAITING if member.state is MemberState.RUNNING else member.state
    return Watched(
        found=member.facts.found,
        state=state.value,
        sources=member.facts.sources,
        failures=member.failures,
        error=None if message is None else str(message),
        hint=None if hint is None else str(hint),
        missed=member.missed,
        next_at=member.next_at,
    )
