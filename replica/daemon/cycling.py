"""The cycles of an agent's VMs: each at its turn, so many at once, the one that waits longest first."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from replica.daemon import timing
from replica.daemon.agenda import Agenda
from replica.daemon.events import problem
from replica.daemon.fleet import Member, MemberState
from replica.daemon.units import Facts, Result, Task, Unit, Verdict

if TYPE_CHECKING:
    from replica.daemon.agent import Agent
    from replica.daemon.membership import Membership

OWN_BUSY_SECONDS: Final = 5.0  # the agent's own garbage collection gives the lease back every 10 seconds


class Cycling:
    """What is due, and what becomes of each VM with what became of its cycle."""

    def __init__(self, agent: Agent, members: Membership, *, once: bool) -> None:
        self._agent = agent
        self._members = members
        self._once = once
        self._agenda: Agenda[str] = Agenda()
        self._not_well: set[str] = set()  # names whose only cycle was not done; for ``once``
        self._made: set[str] = set()  # ids of VMs of which this run made a point

    @property
    def all_had_one(self) -> bool:
        """Whether nothing is due or under way any more: what ``once`` waits for."""
        return not len(self._agenda) and not self._agent.under_way(Task.CYCLE)

    @property
    def all_well(self) -> bool:
        """Whether the last cycle of every VM that had one was done."""
        return not self._not_well and not self._members.unreadable

    def next_due(self) -> float | None:
        """Return when the next cycle can begin; None where that is not a question of time."""
        return self._agenda.next() if self._has_room() else None

    def _has_room(self) -> bool:
        return self._agent.under_way(Task.CYCLE) < self._agent.site.terms.concurrency

    def start_due(self) -> None:
        """Begin the cycles that are due, as many as may be under way at once."""
        now = self._agent.monotonic()
        while self._has_room() and (name := self._agenda.take(now)) is not None:
            member = self._members.all[name]
            if member.pruning:  # it holds the lease
                member.due_after_pruning = True
                continue
            self._begin(member)

    def _begin(self, member: Member) -> None:
        member.state = MemberState.RUNNING
        member.next_at = None
        self._agent.say("cycle.started", member.name)
        facts = member.facts
        unit = replace(self._agent.unit(Task.CYCLE), found=facts.found, settings_version=facts.settings_version)
        self._agent.begin(replace(unit, begun_at=self._agent.now()))

    # --- members come and go

    def add(self, member: Member) -> None:
        """Give a VM its turns."""
        if not member.facts.replicates:
            self._skip(member)
            return
        now = self._agent.now().timestamp()
        last = member.begun_at.timestamp() if member.begun_at is not None else None
        period = float(member.facts.interval_seconds)
        due = timing.first_due(now, last, period, timing.phase(member.vm_id, Task.CYCLE))
        self._put_down(member, 0.0 if self._once else due - now)

    def drop(self, member: Member) -> None:
        """Give a VM no more turns; a cycle that is under way goes on."""
        self._agenda.drop(member.name)

    def resume(self, member: Member) -> None:
        """Replicate a VM again, as soon as may be."""
        member.state = MemberState.WAITING
        member.failures, member.error = 0, None
        self._put_down(member, 0.0)

    def try_again(self) -> None:
        """Try all again at once that failed, whatever they were told before."""
        for member in self._members.all.values():
            if member.state in (MemberState.STOPPED, MemberState.RETRYING, MemberState.BUSY):
                self.resume(member)

    def after_pruning(self, member: Member) -> None:
        """Let a cycle begin that waited for the end of pruning."""
        if member.due_after_pruning:
            member.due_after_pruning = False
            self._put_down(member, 0.0)

    def _put_down(self, member: Member, seconds: float) -> None:
        self._agenda.set(member.name, self._agent.monotonic() + seconds)
        member.next_at = self._agent.now() + timedelta(seconds=seconds)

    # --- what became of a cycle

    def finish(self, unit: Unit, result: Result) -> None:
        """Take note of what became of a cycle, and put the next one down."""
        assert unit.found is not None
        name = unit.found.vm.name
        well = result.verdict in (Verdict.DONE, Verdict.SKIP)
        (self._not_well.discard if well else self._not_well.add)(name)
        member = self._members.all.get(name)
        if member is None or member.facts.found != unit.found or member.state is not MemberState.RUNNING:
            # It left while it was replicated: what was done is told all the same.
            event = {Verdict.DONE: "cycle.done", Verdict.ABANDONED: "cycle.abandoned"}.get(
                result.verdict, "cycle.failed"
            )
            self._agent.say(event, name, **result.fields, **(problem(result.error) if result.error else {}))
            return
        self._agent.caring.after_cycle(member)
        if result.verdict is Verdict.ABANDONED:
            member.state = MemberState.WAITING
            self._agent.say("cycle.abandoned", name)
            return
        handle = {
            Verdict.DONE: self._done,
            Verdict.RETRY: self._failed,
            Verdict.BUSY: self._busy,
            Verdict.STOP: self._stopped,
            Verdict.SKIP: self._refused,
        }[result.verdict]
        handle(member, unit, result)
        if self._once:
            self._agenda.drop(name)
            member.next_at = None

    def _done(self, member: Member, unit: Unit, result: Result) -> None:
        assert unit.begun_at is not None
        if result.facts is not None:
            self._take_facts(member, result.facts)
        period, phase = float(member.facts.interval_seconds), timing.phase(member.vm_id, Task.CYCLE)
        missed = 0
        last = self._before(member, result)
        if last is not None and not self._once:
            early = timing.tolerance(period)
            missed = max(
                0, timing.missed_slots(last.timestamp() + early, unit.begun_at.timestamp() + early, period, phase) - 1
            )
        member.begun_at = unit.begun_at
        self._made.add(member.vm_id)
        member.last = {**result.fields, "at": self._agent.now()}
        member.failures = member.busy = 0
        member.error = None
        member.state = MemberState.WAITING
        now = self._agent.now().timestamp()
        self._put_down(member, timing.next_slot(now + timing.tolerance(period), period, phase) - now)
        self._agent.say("cycle.done", member.name, **result.fields, next_at=member.next_at)
        if missed:
            member.missed += missed
            self._agent.say("cycle.missed", member.name, turns=missed)
        if not member.facts.replicates:
            self._agenda.drop(member.name)
            self._skip(member)

    def _before(self, member: Member, result: Result) -> datetime | None:
        """Return when the cycle before began that made a point.

        The first of this run asks the point itself: what an earlier run wrote down may lack its last cycles.
        """
        if member.vm_id in self._made or result.before is None:
            return member.begun_at
        return result.before

    def _take_facts(self, member: Member, facts: Facts) -> None:
        member.facts = facts
        self._agent.say(
            "vm.changed",
            member.name,
            settings_version=facts.settings_version,
            interval_seconds=facts.interval_seconds,
        )

    def _failed(self, member: Member, _: Unit, result: Result) -> None:
        assert result.error is not None
        member.failures += 1
        member.busy = 0
        member.state = MemberState.RETRYING
        member.error = problem(result.error)
        pause_seconds = timing.retry_seconds(member.failures)
        self._put_down(member, pause_seconds)
        self._agent.say(
            "cycle.failed", member.name, **member.error, failures=member.failures, retry_in_seconds=pause_seconds
        )

    def _busy(self, member: Member, _: Unit, result: Result) -> None:
        assert result.error is not None
        if result.own:
            member.state = MemberState.WAITING
            self._put_down(member, OWN_BUSY_SECONDS)
            return
        member.busy += 1
        member.state = MemberState.BUSY
        member.error = problem(result.error)
        self._put_down(member, timing.retry_seconds(member.busy))
        if member.busy == 1:  # then it is known
            self._agent.say("cycle.busy", member.name, **member.error)

    def _stopped(self, member: Member, _: Unit, result: Result) -> None:
        assert result.error is not None
        member.state = MemberState.STOPPED
        member.next_at = None
        member.error = problem(result.error)
        self._agent.say("vm.stopped", member.name, **member.error)
        self._members.look_later(member, member.facts.interval_seconds)

    def _refused(self, member: Member, _: Unit, result: Result) -> None:
        assert result.error is not None
        self._skip(member, str(result.error))

    def _skip(self, member: Member, why: str | None = None) -> None:
        member.state = MemberState.SKIPPED
        member.next_at = None
        facts = member.facts
        self._agent.say("vm.skipped", member.name, standing=facts.standing.value, message=why or facts.stands)
        self._members.look_later(member, facts.interval_seconds)
