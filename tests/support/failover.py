"""A VM that can be failed over: a lab of raw files, a hypervisor in memory, and operators on several hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from replica import catalog
from replica.failback.home import Homecoming
from replica.failover import returning, settling
from replica.failover.failover import Failover, Order, failover
from replica.failover.means import Means
from replica.failover.offer import Offer
from replica.failover.returning import Failback
from replica.host import Host
from replica.lease import TERM
from replica.model import FailoverKind, Point, Settings, SourceDisk, Standing, State
from replica.stores.store import Store
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.fake_platform import FakePlatform, FakeProvider, Hypervisor
from vhdx.progress import Progress

SHARED: Mapping[str, Offer] = {"qemu": Offer(is_local=False)}  # as a hypervisor that any host can reach
LOCAL: Mapping[str, Offer] = {"qemu": Offer()}

TEST = Order(FailoverKind.TEST)
PLANNED = Order(FailoverKind.PLANNED)
UNPLANNED = Order(FailoverKind.UNPLANNED)


@dataclass(slots=True)
class Site:
    """A protected VM with two points and a change since, its hypervisor, and what was brought home."""

    lab: Lab
    hypervisor: Hypervisor
    offers: Mapping[str, Offer] = field(default_factory=lambda: SHARED)
    brought: list[int] = field(default_factory=list)

    @property
    def state(self) -> State:
        return self.settings.state

    @property
    def settings(self) -> Settings:
        return catalog.settings_in_force(self.lab.store, self.lab.found)

    @property
    def standing(self) -> Standing:
        return self.state.standing

    def means(
        self, *, store: Store | None = None, host: Host | None = None, platform: FakePlatform | None = None
    ) -> Means:
        chosen = platform or FakePlatform(self.hypervisor)
        return Means(
            store or self.lab.store,
            host or self.lab.host,
            self.lab.found,
            lambda name: chosen,
            FakeProvider(),
            self.offers,
            WORKERS,
            sleep=lambda seconds: None,
        )

    def other_host(self) -> Host:
        """Return another machine, once a lease that a dead one left has run out."""
        clock = self.lab.host.clock
        assert isinstance(clock, FakeClock)
        clock.advance(TERM.total_seconds() + 1)
        return make_host(self.lab.folder / "other", name="host-b", clock=clock)

    def failover(self, order: Order = PLANNED, means: Means | None = None) -> Failover:
        return failover(means or self.means(), order)

    def commit(self, means: Means | None = None) -> State:
        return settling.commit(means or self.means())

    def cleanup(self, *tests: str, means: Means | None = None, everything: bool = False) -> settling.Cleanup:
        return settling.cleanup(means or self.means(), tests, everything=everything)

    def reprotect(self, means: Means | None = None) -> Settings:
        """Reprotect; the recovery machine's disks are files, as the newest point holds them."""
        state = self.state
        if state.machine is not None:
            for number in range(len(self.lab.paths)):
                path = self.hypervisor.paths(state.machine.name, number)
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(self.lab.restore(state.machine.point, number))
        return returning.reprotect(means or self.means())

    def failback(self, means: Means | None = None, *, lost: bool = False) -> Failback:
        return returning.failback(means or self.means(), self._bring, lost=lost)

    def _bring(
        self, means: Means, state: State, newest: Point, progress: Progress
    ) -> tuple[tuple[SourceDisk, ...], Homecoming]:
        assert state.standing is Standing.FAILING_BACK
        assert state.home is not None
        self.brought.append(newest.point)
        for number, path in enumerate(self.lab.paths):
            path.write_bytes(self.lab.restore(newest, number))
        return state.home.sources, Homecoming(newest.point, (), (), 0)

    def reach(self, standing: Standing) -> None:
        """Bring the VM to a standing, the usual way."""
        if standing is Standing.PROTECTED:
            return
        if standing is Standing.FAILING_OVER:
            self._cut_off(lambda means: self.failover(UNPLANNED, means), "start")
            return
        self.failover(UNPLANNED)
        if standing is Standing.FAILED_OVER:
            return
        self.commit()
        if standing is Standing.COMMITTED:
            return
        self.reprotect()
        if standing is Standing.FAILING_BACK:
            self._cut_off(self.failback, "stop")
        assert self.standing is standing

    def _cut_off(self, work: object, refused: str) -> None:
        from replica.errors import PlatformError  # noqa: PLC0415

        try:
            work(self.means(platform=FakePlatform(self.hypervisor, refuses=frozenset({refused}))))  # type: ignore[operator]
        except PlatformError:
            return
        raise AssertionError("it was not cut off")


def make_site(folder: Path, *, offers: Mapping[str, Offer] = SHARED) -> Site:
    """Return a VM of two disks with two points, that was written to since."""
    lab = make_lab(folder, [random_blocks(1, 6), random_blocks(2, 2)])
    lab.replicate()
    lab.patch(BLOCK, random_blocks(3, 1))
    lab.replicate()
    lab.patch(2 * BLOCK, random_blocks(4, 1))
    return Site(lab, Hypervisor(lambda name, number: folder / "machines" / name / f"{number}.img"), offers)
