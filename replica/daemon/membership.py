"""Which VMs the agent looks after: found in the store, looked at again where something may have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from replica.daemon import timing
from replica.daemon.agenda import Agenda
from replica.daemon.events import problem
from replica.daemon.fleet import IDLE, Member, MemberState
from replica.daemon.units import Facts, Listing, Result, Task, Unit, Verdict, is_chosen
from replica.errors import GodwitError

if TYPE_CHECKING:
    from replica.daemon.agent import Agent

UNREADABLE_SECONDS: Final = 300.0  # between two looks at a VM whose records could not be read
UNREACHABLE_SECONDS: Final = 60.0  # between two looks at one of which the store told nothing
ELSEWHERE_SECONDS: Final = 3600.0  # between two looks at one whose disks are not here


class Membership:
    """The VMs by name, and the refreshes that find them."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._looks: Agenda[str] = Agenda()  # names that the next refresh looks at again, once they are due
        self._refresh_at: float | None = 0.0  # None while one is under way
        self._failures = 0
        self._refreshed = False
        self.all: dict[str, Member] = {}
        self.unreadable: dict[str, dict[str, object]] = {}
        self.remembered: Mapping[str, Any] = {}

    @property
    def settled(self) -> bool:
        """Whether it is known which VMs there are."""
        return self._refreshed

    @property
    def asked(self) -> bool:
        """Whether the store was asked which there are, and be it in vain."""
        return self._refreshed or self._failures > 0

    def next_due(self) -> float | None:
        """Return when the next refresh begins."""
        return self._refresh_at

    def start_due(self) -> None:
        """Begin a refresh, if it is time."""
        now = self._agent.monotonic()
        if self._refresh_at is None or now < self._refresh_at:
            return
        again = set()
        while (name := self._looks.take(now)) is not None:
            again.add(name)
        known = sorted((self.all.keys() | self.unreadable.keys()) - again)
        elsewhere = [one.facts for one in self.all.values() if one.state is MemberState.ELSEWHERE]
        self._refresh_at = None
        self._agent.begin(
            replace(
                self._agent.unit(Task.REFRESH),
                names=tuple(known),
                patterns=self._agent.site.terms.vms,
                elsewhere=tuple(elsewhere),
            )
        )

    def look_later(self, member: Member, seconds: float) -> None:
        """Have a VM that is not replicated looked at again, in case its settings change."""
        self._looks.set(member.name, self._agent.monotonic() + seconds)

    def look_again(self) -> None:
        """Have everything looked at again that is not replicated, and those that are not chosen any more leave."""
        now = self._agent.monotonic()
        for name, member in list(self.all.items()):
            if not is_chosen(name, self._agent.site.terms.vms):
                self._remove(name)
            elif member.state in IDLE:
                self._looks.set(name, now)
        for name in self.unreadable:
            self._looks.set(name, now)
        self._failures = 0
        if self._refresh_at is not None:
            self._refresh_at = now

    def finish(self, unit: Unit, result: Result) -> None:
        """Take note of what a refresh found."""
        now = self._agent.monotonic()
        if result.verdict is Verdict.ABANDONED:
            return
        if result.listing is None:
            assert result.error is not None
            self._failures += 1
            pause_seconds = timing.retry_seconds(self._failures)
            self._refresh_at = now + pause_seconds
            self._agent.say("vms.failed", None, **problem(result.error), retry_in_seconds=pause_seconds)
            for name in (self.all.keys() | self.unreadable.keys()) - set(unit.names):
                self._looks.set(name, self._refresh_at)
            return
        self._failures = 0
        self._refreshed = True
        self._refresh_at = now + self._agent.site.terms.refresh_seconds
        self._agent.caring.renewal = result.listing.renewal
        self._take(result.listing)

    def _take(self, listing: Listing) -> None:
        for name in [one for one in (*self.all, *self.unreadable) if one not in listing.names]:
            self._remove(name)
        for name, facts in listing.facts.items():
            if not isinstance(facts, Facts):
                self._cannot_read(name, facts)
                continue
            self.unreadable.pop(name, None)
            known = self.all.get(name)
            if known is not None and known.facts.found != facts.found:  # protected anew under the same name
                self._remove(name)
                known = None
            missing = listing.missing.get(name)
            if known is None:
                self._add(facts, missing)
            else:
                self._look_at(known, facts, missing)

        for name, error in listing.unreachable.items():
            self._cannot_reach(name, error)

    def _add(self, facts: Facts, missing: str | None) -> None:
        member = self.all[facts.name] = Member(facts)
        told = self.remembered.get(facts.name)
        if isinstance(told, dict):
            member.remember(told)
        if missing is not None:
            member.state = MemberState.ELSEWHERE
            self._agent.say("vm.elsewhere", facts.name, missing=missing)
            self.look_later(member, ELSEWHERE_SECONDS)
            return
        self._agent.say("vm.added", facts.name, interval_seconds=facts.interval_seconds)
        self._agent.cycles.add(member)
        self._agent.caring.add(member)

    def _look_at(self, member: Member, facts: Facts, missing: str | None) -> None:
        """Take note of what a VM is now that was not replicated when it was looked at last."""
        changed = facts.settings_version != member.facts.settings_version
        member.facts = facts
        if missing is not None:
            if member.state is not MemberState.ELSEWHERE:
                member.state = MemberState.ELSEWHERE
                self._agent.cycles.drop(member)
                self._agent.caring.drop(member)
                self._agent.say("vm.elsewhere", member.name, missing=missing)
            self.look_later(member, ELSEWHERE_SECONDS)
        elif member.state is MemberState.ELSEWHERE:
            member.state = MemberState.WAITING
            self._looks.drop(member.name)
            self._agent.say("vm.added", member.name, interval_seconds=facts.interval_seconds)
            self._agent.cycles.add(member)
            self._agent.caring.add(member)
        elif (member.state is MemberState.STOPPED and changed) or (
            member.state is MemberState.SKIPPED and facts.replicates
        ):
            self._agent.say("vm.resumed", member.name, settings_version=facts.settings_version)
            self._agent.cycles.resume(member)
        elif member.state in IDLE:
            self.look_later(member, facts.interval_seconds)

    def _cannot_read(self, name: str, error: GodwitError) -> None:
        told = problem(error)
        if self.unreadable.get(name) != told:
            self._agent.say("vm.stopped", name, **told)
        self.unreadable[name] = told
        member = self.all.pop(name, None)
        if member is not None:
            self._agent.cycles.drop(member)
            self._agent.caring.drop(member)
        self._looks.set(name, self._agent.monotonic() + UNREADABLE_SECONDS)

    def _cannot_reach(self, name: str, error: GodwitError) -> None:
        """Have a VM looked at again of which the store told nothing at present; what is known of it stays."""
        if name not in self.all:
            told = problem(error)
            if name not in self.unreadable:
                self._agent.say("vm.unreachable", name, **told)
            self.unreadable[name] = told
        self._looks.set(name, self._agent.monotonic() + UNREACHABLE_SECONDS)

    def _remove(self, name: str) -> None:
        self._looks.drop(name)
        self.unreadable.pop(name, None)
        member = self.all.pop(name, None)
        if member is not None:
            self._agent.cycles.drop(member)
            self._agent.caring.drop(member)
        self._agent.say("vm.removed", name)
