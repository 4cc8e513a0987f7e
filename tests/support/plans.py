"""Several protected VMs in one store, a hypervisor in memory, and operators who run plans from several hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from replica import catalog
from replica.catalog import ProtectedVm
from replica.failback.home import Homecoming
from replica.failover.means import Means
from replica.failover.offer import Offer
from replica.host import Host
from replica.lease import TERM
from replica.model import Point, Settings, SourceDisk, State
from replica.plans import graph, reading
from replica.plans.engine import Told
from replica.plans.model import Plan
from replica.plans.running import Operator
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from tests.support.drills import FakeGuest, GuestPlatform
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks, restore_disk
from tests.support.failover import SHARED
from tests.support.fake_platform import FakePlatform, FakeProvider, Hypervisor
from vhdx.progress import Progress

VMS = ("db", "app", "web")


def plan_of(text: str) -> Plan:
    """Return a plan without mistakes."""
    plan, mistakes = reading.read(text)
    assert mistakes == []
    assert graph.mistakes(plan) == []
    return plan


@dataclass(slots=True)
class Estate:
    """VMs, a hypervisor that outlives whoever uses it, and what operators said and saw."""

    folder: Path
    store: MemoryStore
    clock: FakeClock
    labs: Mapping[str, Lab]
    hypervisor: Hypervisor = field(default_factory=Hypervisor)
    offers: Mapping[str, Offer] = field(default_factory=lambda: SHARED)
    asked: list[str] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    shut_down: list[str] = field(default_factory=list)
    answer: bool | None = True
    guest: FakeGuest | None = None
    hosts: int = 0

    def host(self, name: str = "host-a") -> Host:
        self.hosts += 1
        return make_host(self.folder / name, name=name, clock=self.clock, seed=hash_of(name) + self.hosts)

    def means(
        self, name: str, *, store: Store | None = None, host: Host | None = None, platform: FakePlatform | None = None
    ) -> Means:
        lab = self.labs[name]
        chosen = platform or self.platform()

        @contextmanager
        def stopped(sources: object, **_: object):  # type: ignore[no-untyped-def]
            self.shut_down.append(name)
            yield _Off()

        return Means(
            store or self.store,
            host or lab.host,
            lab.found,
            lambda _: chosen,
            FakeProvider(),
            self.offers,
            WORKERS,
            stopped=stopped,
            sleep=self.clock.advance,
        )

    def platform(self) -> FakePlatform:
        if self.guest is None:
            return FakePlatform(self.hypervisor)
        return GuestPlatform(self.hypervisor, guest=self.guest)

    def operator(
        self,
        *,
        store: Store | None = None,
        host: Host | None = None,
        platform: FakePlatform | None = None,
        watch: Callable[[Told], None] | None = None,
    ) -> Operator:
        chosen = host or self.host()

        def ask(question: str) -> bool | None:
            self.asked.append(question)
            return self.answer

        return Operator(
            store or self.store,
            chosen,
            catalog.DEFAULT_TENANT,
            lambda name: self.means(name, store=store, host=chosen, platform=platform),
            ask,
            lambda name: lambda means, state, newest, progress: self.bring(name, state, newest, progress),
            watch or self.told.append,
        )

    def other_host(self, name: str = "host-b") -> Host:
        """Return another machine, once leases and runs that a dead one held have run out."""
        self.clock.advance(TERM.total_seconds() + 1)
        return self.host(name)

    def bring(
        self, name: str, state: State, newest: Point, progress: Progress
    ) -> tuple[tuple[SourceDisk, ...], Homecoming]:
        assert state.home is not None
        lab = self.labs[name]
        for number, path in enumerate(lab.paths):
            path.write_bytes(restore_disk(self.store, lab.host, lab.found, newest, number))
        return state.home.sources, Homecoming(newest.point, (), (), 0)

    def settings(self, name: str) -> Settings:
        return catalog.settings_in_force(self.store, self.labs[name].found)

    def state(self, name: str) -> State:
        return self.settings(name).state

    def standings(self) -> dict[str, str]:
        return {name: self.state(name).standing.value for name in self.labs}

    def found(self, name: str) -> ProtectedVm:
        return self.labs[name].found

    def copy(self) -> Estate:
        """Return the same estate once more: another store with the same objects, another hypervisor."""
        store = MemoryStore("copy")
        store._objects = dict(self.store._objects)
        clock = FakeClock(self.clock.now())
        labs = {
            name: replace(lab, store=store, host=replace(lab.host, clock=clock), published=dict(lab.published))
            for name, lab in self.labs.items()
        }
        return Estate(self.folder, store, clock, labs, offers=self.offers, guest=self.guest)


class _Off:
    def check(self) -> None:
        return None

    def finish(self) -> None:
        return None


def hash_of(name: str) -> int:
    return sum(name.encode()) * 1000


def make_estate(folder: Path, names: tuple[str, ...] = VMS, *, points: int = 1, apart_seconds: float = 10.0) -> Estate:
    """Return VMs of one small disk each. Their points are made one VM after the other, ``apart_seconds`` apart."""
    clock = FakeClock()
    store = MemoryStore("estate")
    labs = {}
    for number, name in enumerate(names):
        host = make_host(folder / "source" / name, name=f"source-{name}", clock=clock)
        labs[name] = make_lab(folder / name, [random_blocks(number, 2)], store=store, host=host, name=name)
    for round_ in range(points):
        for number, lab in enumerate(labs.values()):
            if round_:
                lab.patch(BLOCK, random_blocks(100 * round_ + number, 1))
            lab.replicate()
            clock.advance(apart_seconds)
    return Estate(folder, store, clock, labs)
