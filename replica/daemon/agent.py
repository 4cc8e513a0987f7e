"""The agent's loop: starts what is due, takes note of what became of it, and stops in good order.

One thread decides; units of work run elsewhere and report to its mailbox. What it knows of VMs is in ``membership``,
what it does for them in ``cycling`` and ``caring``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from replica.daemon import statusfile
from replica.daemon.caring import Caring
from replica.daemon.cycling import Cycling
from replica.daemon.digesting import Digesting
from replica.daemon.events import Event, Tell, problem
from replica.daemon.mailbox import Finished, Mailbox, Message, Perform, Word
from replica.daemon.membership import Membership
from replica.daemon.site import Site
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Task, Unit
from replica.errors import GodwitError
from replica.health.publishing import Publisher
from vhdx.errors import DiskError

LONGEST_PAUSE_SECONDS: Final = 60.0
STATUS_SECONDS: Final = 5.0  # between two writings of the status file, at least
ABANDON_SECONDS: Final = 30.0  # that work may take to notice that it was given up


@dataclass(frozen=True, slots=True)
class Purpose:
    """What the agent is to do. ``once``: a cycle for each VM, and no more."""

    store_url: str
    tenant: str
    once: bool = False
    care: bool = True  # retention, garbage, verification, locks and drills beside cycles
    status_folder: Path | None = None
    digests: bool = False  # written for whoever reports on the tenant


@dataclass(frozen=True, slots=True)
class Ending:
    """How it ended: whether every cycle that was asked for was done, and whether nothing is under way any more."""

    complete: bool
    clean: bool


class Agent:
    """Looks after the VMs of a host until it is told to stop.

    ``reload`` rereads the configuration; it raises GodwitError where that is wrong. ``metrics_text`` is the newest text
    of metrics, where any are asked for.
    """

    def __init__(
        self,
        site: Site,
        purpose: Purpose,
        *,
        tell: Tell,
        mailbox: Mailbox,
        perform: Perform,
        reload: Callable[[], AgentTerms] | None = None,
    ) -> None:
        self._site = site
        self._purpose = purpose
        self._tell = tell
        self._mailbox = mailbox
        self._perform = perform
        self._reload = reload
        self._under_way: dict[int, Unit] = {}
        self._units = 0
        self._stopping_at: float | None = None
        self._given_up_at: float | None = None
        self._began = site.host.clock.now()
        self._saved = -STATUS_SECONDS
        self._save_failed = False
        self.metrics_text: str | None = None
        self._members = Membership(self)
        self._cycles = Cycling(self, self._members, once=purpose.once)
        self._caring = Caring(self, self._members)
        if purpose.digests and site.publisher is None:
            site.publisher = Publisher(site.host, purpose.tenant)
        self._digesting = Digesting(self, self._members)

    # --- what its parts ask of it

    @property
    def site(self) -> Site:
        """What units of work run on."""
        return self._site

    @property
    def purpose(self) -> Purpose:
        """What it is to do."""
        return self._purpose

    @property
    def cycles(self) -> Cycling:
        """The cycles."""
        return self._cycles

    @property
    def caring(self) -> Caring:
        """All else that is done for VMs."""
        return self._caring

    def now(self) -> datetime:
        """Return the present moment."""
        return self._site.host.clock.now()

    def monotonic(self) -> float:
        """Return seconds that never jump: what due times are counted in."""
        return self._site.host.clock.monotonic()

    def say(self, name: str, vm: str | None, **fields: object) -> None:
        """Tell an event."""
        self._tell(Event(name, self.now(), vm, fields))

    def unit(self, task: Task) -> Unit:
        """Return a unit of that task, for the tenant."""
        return Unit(task, self._purpose.store_url, self._purpose.tenant)

    def begin(self, unit: Unit) -> None:
        """Have a unit performed."""
        self._units += 1
        number = self._units
        self._under_way[number] = unit
        self._perform(unit, self._site, lambda result: self._mailbox.put(Finished(number, unit, result)))

    def under_way(self, *tasks: Task) -> int:
        """Return how many units of these tasks are under way."""
        return sum(unit.task in tasks for unit in self._under_way.values())

    # --- the loop

    def run(self) -> Ending:
        """Work until told to stop, or, if ``once``, until every VM had its cycle."""
        self._start()
        while not self._is_over():
            if self._stopping_at is None:
                self._members.start_due()
                self._cycles.start_due()
                if self._purpose.care:
                    self._caring.start_due()
                self._digesting.start_due()
            message = self._mailbox.get(self._pause())
            while message is not None:
                self._take(message)
                message = self._mailbox.get(0)
            self._save()
        return self._end()

    def _start(self) -> None:
        folder = self._purpose.status_folder
        told = None if folder is None else statusfile.read(folder)
        if told is not None and told.get("store") == self._purpose.store_url:
            vms = told.get("vms")
            self._members.remembered = (
                vms if told.get("tenant") == self._purpose.tenant and isinstance(vms, dict) else {}
            )
        self.say(
            "agent.started",
            None,
            store=self._purpose.store_url,
            tenant=self._purpose.tenant,
            host_name=self._site.host.host_name,
            process=os.getpid(),
            concurrency=self._site.terms.concurrency,
        )

    def _is_over(self) -> bool:
        if self._stopping_at is None:
            if not (self._purpose.once and self._members.asked and self._cycles.all_had_one):
                return False
            self._stop(grace_seconds=0.0)
        if not self._under_way:
            return True
        now = self.monotonic()
        assert self._stopping_at is not None
        if self._given_up_at is None:
            if now >= self._stopping_at:
                self._site.cycles.abandon()
                self._given_up_at = now
                names = [unit.found.vm.name for unit in self._under_way.values() if unit.found is not None]
                self.say("agent.abandoning", None, vms=sorted(set(names)))
            return False
        return now >= self._given_up_at + ABANDON_SECONDS

    def _pause(self) -> float:
        now = self.monotonic()
        if self._stopping_at is not None:
            end = self._stopping_at if self._given_up_at is None else self._given_up_at + ABANDON_SECONDS
            return min(LONGEST_PAUSE_SECONDS, max(0.0, end - now))
        moments = [self._members.next_due(), self._cycles.next_due(), self._digesting.next_due()]
        if self._purpose.care:
            moments.append(self._caring.next_due())
        pauses = [moment - now for moment in moments if moment is not None]
        if self._purpose.status_folder is not None and self.under_way(Task.CYCLE):
            pauses.append(STATUS_SECONDS)  # the status file tells how far cycles are
        return max(0.0, min([LONGEST_PAUSE_SECONDS, *pauses]))

    def _take(self, message: Message) -> None:
        if message is Word.STOP:
            self._stop(float(self._site.terms.grace_seconds))
        elif message is Word.RELOAD:
            self._take_terms()
        elif isinstance(message, Finished):
            unit = self._under_way.pop(message.number)
            self._digesting.note(unit, message.result)
            if unit.task is Task.DIGEST:
                self._digesting.finish(message.result)
            elif unit.task is Task.REFRESH:
                self._members.finish(unit, message.result)
            elif unit.task is Task.CYCLE:
                self._cycles.finish(unit, message.result)
            else:
                self._caring.finish(unit, message.result)

    def _stop(self, grace_seconds: float) -> None:
        if self._stopping_at is not None:
            return
        self._stopping_at = self.monotonic() + grace_seconds
        self._site.care.abandon()
        running = [one.found.vm.name for one in self._under_way.values() if one.task is Task.CYCLE and one.found]
        if not self._purpose.once:
            self.say("agent.stopping", None, running=sorted(running), grace_seconds=grace_seconds)

    def _take_terms(self) -> None:
        """Reread the configuration, and try again whatever waits for that."""
        if self._stopping_at is not None:
            return
        if self._reload is not None:
            try:
                terms = self._reload()
            except (GodwitError, DiskError) as error:
                self.say("config.refused", None, **problem(error))
                return
            self._site.terms = terms
            self._site.bucket.limits = terms.limits
        self.say("config.reloaded", None, concurrency=self._site.terms.concurrency)
        self._members.look_again()
        self._cycles.try_again()
        self._caring.plan_anew()

    # --- status and end

    def status(self) -> dict[str, object]:
        """Return what the status file says."""
        state = "running" if self._stopping_at is None else "stopping"
        return {
            "state": state if self._under_way or self._stopping_at is None else "stopped",
            "process": os.getpid(),
            "host_name": self._site.host.host_name,
            "store": self._purpose.store_url,
            "tenant": self._purpose.tenant,
            "started_at": self._began,
            "written_at": self.now(),
            "limit_bytes_per_second": self._site.bucket.limits.at(self.now()),
            "vms": {
                name: {**member.document(), "progress": self._site.progress.get(name)}
                for name, member in self._members.all.items()
            },
            "unreadable": dict(self._members.unreadable),
        }

    def _save(self, *, at_once: bool = False) -> None:
        folder = self._purpose.status_folder
        if folder is None or (not at_once and self.monotonic() < self._saved + STATUS_SECONDS):
            return
        self._saved = self.monotonic()
        try:
            statusfile.write(folder, self.status())
            self._save_failed = False
        except (OSError, DiskError) as error:
            if not self._save_failed:
                self.say("status.failed", None, message=str(error))
            self._save_failed = True

    def _end(self) -> Ending:
        clean = not self._under_way
        self._save(at_once=True)
        if not clean:
            self.say("agent.stuck", None, tasks=sorted({unit.task.value for unit in self._under_way.values()}))
        self.say("agent.stopped", None, clean=clean)
        return Ending(complete=self._cycles.all_well and self._members.settled, clean=clean)
