"""An agent on a clock that tests move: its units take the time, and have the outcome, that the test says."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from replica.catalog import ProtectedVm
from replica.daemon.agent import Agent, Ending, Purpose
from replica.daemon.bandwidth import Bucket
from replica.daemon.events import Event
from replica.daemon.mailbox import Message, Word
from replica.daemon.site import Site
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Facts, Listing, Result, Task, Unit, Verdict
from replica.errors import GodwitError
from replica.keys import VmKeys
from replica.model import Standing, Vm
from replica.vault import Vault
from replica.workers import Workers
from tests.support.engine import START, FakeClock, make_host

Act = Callable[[Unit], tuple[float, Result]]  # seconds that it takes, and what becomes of it


def facts(
    name: str, interval_seconds: int = 300, *, version: int = 1, standing: Standing = Standing.PROTECTED
) -> Facts:
    """Return a VM that needs no store."""
    vm_id = f"{sum(ord(c) * 257**n for n, c in enumerate(name)) % (1 << 128):032x}"
    found = ProtectedVm(VmKeys("default", vm_id), Vm(vm_id, name, START, 1))
    return Facts(found, version, interval_seconds, standing, "so it stands", (f"/disks/{name}",))


def done(point: int = 1) -> Result:
    """Return what a cycle says that went well."""
    return Result(fields={"point": point})


@dataclass
class Simulation:
    """Stands in for threads and mailbox. Time passes only where the agent waits, and then at once."""

    fleet: dict[str, Facts] = field(default_factory=dict)
    terms: AgentTerms = field(default_factory=AgentTerms)
    act: Act = field(default=lambda unit: (1.0, done()))
    missing: dict[str, str] = field(default_factory=dict)
    unreachable: dict[str, GodwitError] = field(default_factory=dict)
    renewal: timedelta | None = None
    refresh_error: Exception | None = None
    clock: FakeClock = field(default_factory=FakeClock)
    events: list[Event] = field(default_factory=list)
    begun: list[tuple[float, Unit]] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.host = make_host(clock=self.clock)
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._inbox: list[Message] = []
        self._running = 0
        self._began = self.clock.monotonic()
        self.mailbox = self

    # --- what the agent sees

    def put(self, message: Message) -> None:
        self._inbox.append(message)

    def get(self, seconds: float) -> Message | None:
        # No wait is so short that a clock of floating point stands still.
        end = self.clock.monotonic() + (max(seconds, 1e-6) if seconds > 0 else 0.0)
        while not self._inbox:
            if not self._queue or self._queue[0][0] > end:
                self._advance(end)
                return None
            due, _, happen = heapq.heappop(self._queue)
            self._advance(due)
            happen()
        return self._inbox.pop(0)

    def _advance(self, until: float) -> None:
        self.clock.advance(max(0.0, until - self.clock.monotonic()))

    def perform(self, unit: Unit, site: Site, finished: Callable[[Result], None]) -> None:
        self.begun.append((self.seconds, unit))
        seconds, result = (0.1, self._refresh(unit)) if unit.task is Task.REFRESH else self.act(unit)
        counts = unit.task is Task.CYCLE
        self._running += counts
        self.most_at_once = max(self.most_at_once, self._running)

        def end() -> None:
            self._running -= counts
            stopper = site.cycles if counts else site.care
            finished(Result(Verdict.ABANDONED) if stopper.abandoned else result)

        self._put_down(seconds, end)

    def _refresh(self, unit: Unit) -> Result:
        if self.refresh_error is not None:
            return Result(Verdict.RETRY, error=self.refresh_error)
        known = frozenset(unit.names)
        looked = {name: one for name, one in self.fleet.items() if name not in known}
        looked |= {one.name: self.fleet[one.name] for one in unit.elsewhere if one.name not in self.missing}
        missing = {name: path for name, path in self.missing.items() if name in looked}
        away = {name: error for name, error in self.unreachable.items() if looked.pop(name, None) is not None}
        return Result(listing=Listing(frozenset(self.fleet), looked, missing, self.renewal, away))

    # --- what the test does

    @property
    def seconds(self) -> float:
        """How much time has passed."""
        return self.clock.monotonic() - self._began

    def at(self, seconds: float, happen: Callable[[], object]) -> None:
        """Have something happen so long after the beginning."""
        self._put_down(seconds - self.seconds, happen)

    def _put_down(self, seconds: float, happen: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (self.clock.monotonic() + seconds, next(self._count), happen))

    def agent(self, *, once: bool = False, care: bool = False, status_folder: Path | None = None) -> Agent:
        site = Site(
            self.host,
            Vault(lambda: None),
            Workers(),
            self.terms,
            Bucket(self.terms.limits, self.clock),
            drill=lambda *_: {},
        )
        return Agent(
            site,
            Purpose("memory:none", "default", once=once, care=care, status_folder=status_folder),
            tell=self.events.append,
            mailbox=self,
            perform=self.perform,
            reload=lambda: self.terms,
        )

    def run(
        self, seconds: float, *, once: bool = False, care: bool = False, status_folder: Path | None = None
    ) -> Ending:
        """Run an agent for so long, then tell it to stop."""
        self.at(self.seconds + seconds, lambda: self.put(Word.STOP))
        return self.agent(once=once, care=care, status_folder=status_folder).run()

    def begins(self, task: Task = Task.CYCLE, name: str | None = None) -> list[float]:
        """Return when units of the task began, in seconds since the beginning."""
        return [at for at, unit in self.begun if unit.task is task and name in (None, _name(unit))]

    def told(self, *names: str, vm: str | None = None) -> list[Event]:
        """Return the events of these names."""
        return [one for one in self.events if one.name in names and vm in (None, one.vm)]


def _name(unit: Unit) -> str | None:
    return None if unit.found is None else unit.found.vm.name


def fleet(names: Iterable[str], interval_seconds: int = 300) -> dict[str, Facts]:
    """Return VMs of these names."""
    return {name: facts(name, interval_seconds) for name in names}


def changed(one: Facts, **fields: object) -> Facts:
    """Return a VM with other settings."""
    return replace(one, settings_version=one.settings_version + 1, **fields)  # type: ignore[arg-type]
