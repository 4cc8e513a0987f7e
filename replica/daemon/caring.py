"""What an agent does for its VMs beside cycles, one thing at a time: retention, verification, locks, drills, gc."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from replica.daemon import timing
from replica.daemon.agenda import Agenda
from replica.daemon.events import problem
from replica.daemon.fleet import Care, Member, MemberState
from replica.daemon.units import Result, Task, Unit, Verdict

if TYPE_CHECKING:
    from replica.daemon.agent import Agent
    from replica.daemon.membership import Membership

DAY_SECONDS: Final = 86400.0
METRICS_SECONDS: Final = 300.0
PER_VM: Final = (Task.PRUNE, Task.VERIFY, Task.RETAIN, Task.DRILL)
FOR_ALL: Final = (Task.GC, Task.METRICS)
_IDLE: Final = (MemberState.STOPPED, MemberState.ELSEWHERE)


class Caring:
    """What is due for which VM, and what became of it. Each has turns of its own, as cycles have."""

    def __init__(self, agent: Agent, members: Membership) -> None:
        self._agent = agent
        self._members = members
        self._agenda: Agenda[tuple[str | None, Task]] = Agenda()
        self._renewal: timedelta | None = None
        self._all: dict[Task, Care] = {}
        self._planned = False

    @property
    def renewal(self) -> timedelta | None:
        """How often locks must be prolonged at least; None where the store has none."""
        return self._renewal

    @renewal.setter
    def renewal(self, value: timedelta | None) -> None:
        changed = value != self._renewal
        self._renewal = value
        if changed or not self._planned:
            self.plan_anew()

    def _period(self, task: Task) -> float | None:
        terms, site = self._agent.site.terms, self._agent.site
        seconds: float | None
        if task is Task.PRUNE:
            seconds = terms.prune_seconds
        elif task is Task.VERIFY:
            seconds = DAY_SECONDS if terms.verify is not None else None
        elif task is Task.RETAIN:  # twice as often as it must be, so that one that fails can be made up for
            seconds = self._renewal.total_seconds() / 2 if terms.retain and self._renewal is not None else None
        elif task is Task.DRILL:
            seconds = terms.drill_seconds if site.drill is not None else None
        elif task is Task.GC:
            seconds = terms.gc_seconds
        else:
            seconds = METRICS_SECONDS if terms.metrics is not None else None
        return None if seconds is None else max(1.0, float(seconds))

    def plan_anew(self) -> None:
        """Put everything down anew, by the terms as they are now."""
        self._planned = True
        for task in FOR_ALL:
            self._put_down(None, task)
        for member in self._members.all.values():
            self.add(member)

    def add(self, member: Member) -> None:
        """Put down what is to be done for a VM."""
        for task in PER_VM:
            self._put_down(member, task)

    def drop(self, member: Member) -> None:
        """Strike what was to be done for a VM."""
        for task in PER_VM:
            self._agenda.drop((member.name, task))

    def _put_down(self, member: Member | None, task: Task) -> None:
        key = (None if member is None else member.name, task)
        period = self._period(task)
        if period is None or (member is not None and member.state is MemberState.ELSEWHERE):
            self._agenda.drop(key)
            return
        now = self._agent.now().timestamp()
        care = self._care(member, task)
        last = care.at.timestamp() if care.at is not None else None
        if task is Task.METRICS and last is None:
            due = now
        else:
            # What was never done waits for its turn: there is nothing yet that it could be late for.
            due = timing.first_due(now, now if last is None else last, period, self._phase(member, task))
        self._agenda.set(key, self._agent.monotonic() + due - now)

    def _phase(self, member: Member | None, task: Task) -> float:
        return timing.phase(self._agent.site.host.host_id if member is None else member.vm_id, task)

    def _care(self, member: Member | None, task: Task) -> Care:
        return (self._all if member is None else member.care).setdefault(task, Care())

    # --- the work

    def _has_room(self) -> bool:
        return not self._agent.under_way(*PER_VM, *FOR_ALL)

    def next_due(self) -> float | None:
        """Return when the next thing can begin; None where that is not a question of time."""
        return self._agenda.next() if self._has_room() else None

    def start_due(self) -> None:
        """Begin what has been due for the longest."""
        now = self._agent.monotonic()
        while self._has_room() and (key := self._agenda.take(now)) is not None:
            name, task = key
            if name is None:
                names = tuple(one.name for one in self._members.all.values() if one.state is not MemberState.ELSEWHERE)
                self._agent.begin(replace(self._agent.unit(task), names=names))
                continue
            member = self._members.all[name]
            if member.state in _IDLE:
                self._again(member, task)
            elif task is Task.PRUNE and member.state is MemberState.RUNNING:  # which holds the lease
                member.prune_after_cycle = True
            else:
                member.pruning = task is Task.PRUNE
                self._agent.begin(replace(self._agent.unit(task), found=member.facts.found))

    def after_cycle(self, member: Member) -> None:
        """Let pruning begin that waited for the end of a cycle."""
        if member.prune_after_cycle:
            member.prune_after_cycle = False
            self._agenda.set((member.name, Task.PRUNE), self._agent.monotonic())

    def _again(self, member: Member | None, task: Task) -> None:
        """Put the next turn down."""
        period = self._period(task)
        if period is None:
            return
        now = self._agent.now().timestamp()
        due = timing.next_slot(now, period, self._phase(member, task))
        self._agenda.set((None if member is None else member.name, task), self._agent.monotonic() + due - now)

    def finish(self, unit: Unit, result: Result) -> None:
        """Take note of what became of something, and put it down again."""
        name = None if unit.found is None else unit.found.vm.name
        member = None if name is None else self._members.all.get(name)
        event = result.event or f"{unit.task.value}.{'done' if result.verdict is Verdict.DONE else 'failed'}"
        self._tell(event, name, unit, result)
        if name is not None and member is None:
            return  # it left
        care = self._care(member, unit.task)
        if member is not None and unit.task is Task.PRUNE:
            member.pruning = False
            self._agent.cycles.after_pruning(member)
        if result.verdict is Verdict.ABANDONED:
            return
        if result.verdict in (Verdict.RETRY, Verdict.BUSY):
            care.failures += 1
            pause_seconds = timing.retry_seconds(care.failures)
            self._agenda.set((name, unit.task), self._agent.monotonic() + pause_seconds)
            return
        care.failures = 0
        care.at, care.event = self._agent.now(), event
        self._again(member, unit.task)

    def _tell(self, event: str, name: str | None, unit: Unit, result: Result) -> None:
        if unit.task is Task.METRICS and result.text is not None:
            self._agent.metrics_text = result.text
        elif result.verdict not in (Verdict.ABANDONED, Verdict.BUSY):  # another agent at work is no news
            told = {} if result.error is None else problem(result.error)
            self._agent.say(event, name, **result.fields, **told)
