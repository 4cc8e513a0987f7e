"""Seeding, crashed at every write, with pruning and gc of the seed's VM in between: every listed point restores."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest

from replica import catalog, garbage, history, holds, packer, protection, prune, retention
from replica.catalog import ProtectedVm
from replica.errors import GodwitError
from replica.host import Host
from replica.lease import TERM
from replica.stores.store import Store
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import (
    READS,
    WRITES,
    CrashingStore,
    RecordingStore,
    SimulatedCrash,
    _Around,
    crash_points,
)

BLOCKS = 10
RULE = retention.parse("last:1")
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 2)
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 3)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 4)


class _Between(_Around):
    """Does something before the request of ordinal ``at`` among those of some kinds."""

    def __init__(self, inner: Store, at: int, interruption: Callable[[], None], kinds: tuple[str, ...]) -> None:
        super().__init__(inner)
        self._left = at
        self._interruption = interruption
        self._kinds = kinds
        self.interrupted = False

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        if kind in self._kinds and not self.interrupted:
            if self._left == 0:
                self.interrupted = True
                self._interruption()
            self._left -= 1
        return work()


class Pair:
    """A template of two points that share nothing, and a clone of the first that is to be seeded from it."""

    def __init__(self, folder: Path) -> None:
        first = random_blocks(1, BLOCKS)
        self.template = make_lab(folder / "template", [first], name="template")
        self.store = self.template.store
        self.template.replicate()
        self.template.write(random_blocks(2, BLOCKS))
        self.template.replicate()
        self.host = make_host(folder / "clone-state", name="host-b", clock=self.clock)
        self.path = folder / "clone.img"
        self.path.write_bytes(random_blocks(3, 2) + first[2 * BLOCK :])
        self.clone: Lab | None = None

    @property
    def clock(self) -> FakeClock:
        assert isinstance(self.template.host.clock, FakeClock)
        return self.template.host.clock

    def protect(self, store: Store | None = None) -> None:
        def attempt(seed_from: str) -> ProtectedVm:
            disks = [self.path]
            chosen = store or self.store
            found, _ = protection.protect(
                chosen, self.host, tenant="default", name="clone", disks=disks, seed_from=seed_from
            )
            return found

        try:
            found = attempt("template@1")
        except GodwitError:
            try:
                found = catalog.find(self.store, "default", "clone")  # an attempt before had got so far
            except GodwitError:
                found = attempt("template")  # or had not, and the point was pruned since
        self.clone = Lab(self.path.parent, self.store, self.host, found, (self.path,))

    def replicate(self, store: Store | None = None, host: Host | None = None) -> int:
        assert self.clone is not None
        return self.clone.replicate(store or self.store, host).cycle.reused_blocks

    def housekeeping(self, store: Store | None = None) -> None:
        """Prune the template to its newest point and collect twice without grace, as another machine would."""
        chosen = store or self.store
        host = make_host(self.path.parent / "keeper", name="host-c", clock=self.clock)
        prune.prune(chosen, host, self.template.found, rule=RULE)
        for _ in range(2):
            references = garbage.survey(chosen, "default", workers=WORKERS)
            garbage.collect(chosen, host, self.template.found, references, grace=timedelta(0), workers=WORKERS)

    def assert_all_restores(self) -> None:
        labs = [self.template, *([self.clone] if self.clone else [])]
        for lab in labs:
            for point in history.points(self.store, lab.found.keys):
                assert not isinstance(point, Exception)
                held = lab.published.get(point.point, lab.contents())
                assert lab.restore(point, host=make_host(name="elsewhere")) == held[0], (lab.found.vm.name, point.point)


def _run(work: Callable[[], object]) -> None:
    try:
        work()
    except (SimulatedCrash, GodwitError):
        return


def _seed(pair: Pair, store: Store | None = None) -> None:
    pair.protect(store)
    pair.replicate(store)


def test_crash_at_every_write_of_seeding_with_housekeeping_before_it_goes_on(tmp_path: Path) -> None:
    recording = RecordingStore((counted := Pair(tmp_path / "count")).store)
    _seed(counted, recording)
    total = len(recording.writes)
    assert total >= 10  # the VM's four objects, hold, lease, hold again, segment, map, manifest, hold, lease
    seeded = 0
    for at, mode in crash_points(total):
        pair = Pair(tmp_path / f"{at}-{mode.value}")
        store = CrashingStore(pair.store, at=at, mode=mode)
        _run(lambda pair=pair, store=store: _seed(pair, store))  # type: ignore[misc]
        assert store.crashed
        pair.housekeeping()
        pair.assert_all_restores()
        pair.clock.advance(TERM.total_seconds() + 1)
        pair.protect()
        seeded += pair.replicate() > 0
        pair.assert_all_restores()
        pair.housekeeping()
        pair.housekeeping()
        pair.assert_all_restores()
        assert pair.clone is not None
        assert list(history.points(pair.store, pair.clone.found.keys))
        assert list(holds.holds(pair.store, pair.template.found.keys)) == [] or at < 5
    assert (
        seeded >= 16
    )  # of four ways at each write from the hold to the manifest: what was cut off goes on being seeded


def test_housekeeping_before_every_request_of_a_seeded_cycle(tmp_path: Path) -> None:
    at = 0
    while True:
        pair = Pair(tmp_path / f"{at}")
        pair.protect()
        store = _Between(pair.store, at, pair.housekeeping, (*READS, *WRITES))
        # The hold is there from the beginning, so nothing that the cycle refers to goes.
        assert pair.replicate(store) == BLOCKS - 2
        if not store.interrupted:
            break
        pair.assert_all_restores()
        pair.housekeeping()
        pair.assert_all_restores()
        at += 1
    assert at > 12
    numbers = [
        one.point for one in history.points(pair.store, pair.template.found.keys) if not isinstance(one, Exception)
    ]
    assert numbers == [1, 2]


def test_a_seeded_vm_before_every_request_of_housekeeping(tmp_path: Path) -> None:
    at = seeded = 0
    while True:
        pair = Pair(tmp_path / f"{at}")

        def interruption(pair: Pair = pair) -> None:
            _run(lambda: _seed(pair))

        store = _Between(pair.store, at, interruption, (*READS, *WRITES))
        _run(lambda pair=pair, store=store: pair.housekeeping(store))  # type: ignore[misc]
        if not store.interrupted:
            break
        pair.assert_all_restores()
        if pair.clone is not None:
            seeded += pair.clone.restore(1) == pair.path.read_bytes()
        for _ in range(2):
            pair.housekeeping()
        pair.assert_all_restores()
        at += 1
    assert at > 20
    assert seeded > 5


def test_the_first_cycle_between_two_requests_of_housekeeping(tmp_path: Path) -> None:
    """The clone is protected beforehand; while the tenant is surveyed it publishes, and its hold goes."""
    at = 0
    while True:
        pair = Pair(tmp_path / f"{at}")
        pair.protect()
        store = _Between(pair.store, at, lambda pair=pair: _run(pair.replicate), (*READS, *WRITES))  # type: ignore[misc]
        _run(lambda pair=pair, store=store: pair.housekeeping(store))  # type: ignore[misc]
        if not store.interrupted:
            break
        pair.assert_all_restores()
        for _ in range(2):
            pair.housekeeping()
        pair.assert_all_restores()
        assert pair.clone is not None
        assert pair.clone.restore(1) == pair.path.read_bytes()
        at += 1
    assert at > 20
