"""An agent whose units of work are the real ones, on a store that has faults and a clock that tests move.

Each unit runs in a thread of its own, and one of all threads at a time: where it waits, for the store, for bandwidth or
between two attempts, the clock goes on to whatever comes next. So cycles are under way together for as long as they
would be, an hour takes seconds, and the same seed gives the same hour.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from replica.daemon.agent import Agent, Ending, Purpose
from replica.daemon.bandwidth import Bucket
from replica.daemon.events import Event
from replica.daemon.limited import LimitedStore
from replica.daemon.mailbox import Message, Word
from replica.daemon.site import Site
from replica.daemon.stopping import Stopper
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Result, Task, Unit, perform
from replica.errors import StoreUnavailableError
from replica.host import Host
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import Store
from replica.vault import Vault
from tests.support.engine import WORKERS, FakeClock
from tests.support.store_doubles import WRITES, Fault, FaultyStore, _Around

WAIT_SECONDS = 120.0
URL = "memory:world"

T = TypeVar("T")


class _Worker:
    """A thread that works only when it is let."""

    def __init__(self, world: World, job: Callable[[], None]) -> None:
        self.go = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.turn = 0  # which of its waits it is in: a wake-up for an earlier one is none
        self.thread = threading.Thread(target=self._run, args=(world, job), daemon=True)

    def _run(self, world: World, job: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            job()
        except BaseException as error:  # the test's own; raised again where the test looks
            self.error = error
        finally:
            world.back.release()


class WorldStopper(Stopper):
    """A word to stop whose waits are the world's."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._waiting: set[_Worker] = set()

    def abandon(self) -> None:
        super().abandon()
        for worker in tuple(self._waiting):
            self._world.wake(worker)

    def sleep(self, seconds: float) -> None:
        if not self.abandoned:
            worker = self._world.current
            if worker is not None:
                self._waiting.add(worker)
            try:
                self._world.sleep(seconds)
            finally:
                if worker is not None:
                    self._waiting.discard(worker)
        self.check()


class _Line(_Around):
    """The line to the store: every call takes a while, and is written down."""

    def __init__(self, inner: Store, world: World) -> None:
        super().__init__(inner)
        self._world = world

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        world = self._world
        world.sleep(world.latency_seconds * world.draw.uniform(0.5, 1.5))
        if kind in WRITES:
            world.crossed.append((world.seconds, kind, key, sent))
        if world.is_away(key):
            raise StoreUnavailableError("simulated: this part of the store is away", key=key)
        result = work()
        got = result[0] if kind == "get_tagged" else result  # type: ignore[index]
        if kind in ("get", "get_tagged") and isinstance(got, bytes):
            world.crossed.append((world.seconds, kind, key, len(got)))
        return result


@dataclass
class World:
    """A store with its faults, a host, and agents that come one after the other."""

    store: Store
    host: Host
    terms: AgentTerms
    faults: Sequence[Fault] = ()
    seed: int = 0
    latency_seconds: float = 0.05
    patience: Patience = field(default_factory=lambda: Patience(limit_seconds=20.0))
    before_unit: Callable[[Unit], None] = lambda unit: None
    after_unit: Callable[[Unit, Result], None] = lambda unit, result: None
    is_away: Callable[[str], bool] = lambda key: False
    events: list[tuple[float, Event]] = field(default_factory=list)
    begun: list[tuple[float, Task, str | None]] = field(default_factory=list)
    crossed: list[tuple[float, str, str, int]] = field(default_factory=list)  # when, kind, key, bytes
    most_at_once: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # cycles; all else

    def __post_init__(self) -> None:
        assert isinstance(self.host.clock, FakeClock)
        self.clock: FakeClock = self.host.clock
        self.draw = random.Random(self.seed)
        self.back = threading.Semaphore(0)
        self.current: _Worker | None = None
        self.faulty = FaultyStore(self.store, self.faults, seed=self.seed, retry_after_seconds=7.0)
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._inbox: list[Message] = []
        self._running = {True: 0, False: 0}
        self._began = self.clock.monotonic()

    # --- time

    @property
    def seconds(self) -> float:
        """How much time has passed."""
        return self.clock.monotonic() - self._began

    def at(self, seconds: float, happen: Callable[[], object]) -> None:
        """Have something happen so long after the beginning, between two steps of whatever is under way."""
        self._put_down(self._began + seconds, happen)

    def _put_down(self, due: float, happen: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (due, next(self._count), happen))

    def sleep(self, seconds: float) -> None:
        """Let whoever calls wait: a unit until it is its turn again, the test by moving the clock."""
        worker = self.current
        if worker is None:
            self.clock.advance(seconds)
            return
        worker.turn += 1
        turn = worker.turn
        self._put_down(self.clock.monotonic() + seconds, lambda: self._resume(worker, turn))
        self.back.release()
        assert worker.go.acquire(timeout=WAIT_SECONDS), "nobody lets it go on"

    def wake(self, worker: _Worker) -> None:
        """Let a wait end now."""
        turn = worker.turn
        self._put_down(self.clock.monotonic(), lambda: self._resume(worker, turn))

    def _resume(self, worker: _Worker, turn: int) -> None:
        if worker.turn != turn:
            return
        worker.turn += 1
        before, self.current = self.current, worker
        worker.go.release()
        assert self.back.acquire(timeout=WAIT_SECONDS), "a unit hangs"
        self.current = before
        if worker.error is not None:
            raise worker.error

    # --- what the agent sees

    def put(self, message: Message) -> None:
        self._inbox.append(message)

    def get(self, seconds: float) -> Message | None:
        end = self.clock.monotonic() + (max(seconds, 1e-6) if seconds > 0 else 0.0)
        while not self._inbox:
            if not self._heap or self._heap[0][0] > end:
                self.clock.advance(max(0.0, end - self.clock.monotonic()))
                return None
            due, _, happen = heapq.heappop(self._heap)
            self.clock.advance(max(0.0, due - self.clock.monotonic()))
            happen()
        return self._inbox.pop(0)

    def perform(self, unit: Unit, site: Site, finished: Callable[[Result], None]) -> None:
        counts = unit.task is Task.CYCLE
        self.begun.append((self.seconds, unit.task, None if unit.found is None else unit.found.vm.name))
        self._running[counts] += 1
        self.most_at_once[counts] = max(self.most_at_once[counts], self._running[counts])
        self.before_unit(unit)

        def work() -> None:
            result = perform(unit, site)
            self._running[counts] -= 1
            self.after_unit(unit, result)
            finished(result)

        worker = _Worker(self, work)
        worker.thread.start()
        self._resume(worker, worker.turn)

    # --- agents

    def site(self) -> Site:
        """Return what an agent's units run on: the store as ``replica.daemon.site.opened`` opens it."""

        def opened(_: str, site: Site, stopper: Stopper) -> Store:
            limited = LimitedStore(_Line(self.faulty, self), site.bucket, stopper.sleep)
            chance = random.Random(self.seed).random
            return ResilientStore(
                limited, self.patience, sleep=stopper.sleep, clock=self.clock.monotonic, chance=chance
            )

        return Site(
            self.host,
            Vault(lambda: None),
            WORKERS,
            self.terms,
            Bucket(self.terms.limits, self.clock),
            cycles=WorldStopper(self),
            care=WorldStopper(self),
            open_store=opened,
        )

    def run(self, until_seconds: float, *, status_folder: Path | None = None, care: bool = True) -> Ending:
        """Run an agent until that long after the beginning, and then tell it to stop."""
        self.at(until_seconds, lambda: self.put(Word.STOP))
        agent = Agent(
            self.site(),
            Purpose(URL, "default", care=care, status_folder=status_folder),
            tell=lambda event: self.events.append((self.seconds, event)),
            mailbox=self,
            perform=self.perform,
            reload=lambda: self.terms,
        )
        return agent.run()

    def told(self, *names: str, vm: str | None = None) -> list[tuple[float, Event]]:
        """Return when events of these names were told, and the events."""
        return [(at, one) for at, one in self.events if one.name in names and vm in (None, one.vm)]
