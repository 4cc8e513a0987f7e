"""Every write of a replication cycle, crashed at in every way: what was published restores, the next cycle goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replica import history, lease, packer
from replica.errors import GodwitError, LeaseHeldError, LeaseLostError
from replica.host import Host
from replica.lease import TERM
from replica.model import Point
from replica.stores.memory import MemoryStore
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import Store
from tests.support.encryption import encrypted_lab
from tests.support.engine import BLOCK, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash, crash_points

BLOCKS = 24
CHANGED = range(2, 20, 2)


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cycle of a few blocks write several segments."""
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 3)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 2)


def _lab(folder: Path, *, encrypted: bool = False) -> Lab:
    """Return a VM of two disks with one point, changed since: blocks written, one zeroed, on both disks."""
    disks = [random_blocks(1, BLOCKS), random_blocks(2, 5) + b"tail" * 128]
    lab = encrypted_lab(folder, disks, MemoryStore("lab")) if encrypted else make_lab(folder, disks)
    lab.replicate()
    _change(lab, seed=100)
    return lab


def _change(lab: Lab, seed: int) -> None:
    for block in CHANGED:
        lab.patch(block * BLOCK, random_blocks(seed + block, 1))
    lab.patch(7 * BLOCK, bytes(BLOCK))
    lab.patch(BLOCK, random_blocks(seed + 99, 1), number=1)


def _writes_of_a_cycle(folder: Path) -> int:
    lab = _lab(folder)
    recording = RecordingStore(lab.store)
    lab.replicate(store=recording)
    return len(recording.writes)


def _points(lab: Lab) -> list[Point]:
    found = list(history.points(lab.store, lab.found.keys))
    assert all(isinstance(one, Point) for one in found)
    return [one for one in found if isinstance(one, Point)]


def _assert_every_point_restores(lab: Lab, states: list[tuple[bytes, ...]]) -> None:
    """Check that the points are the states, in order: none lost, none mixed."""
    points = _points(lab)
    assert len(points) == len(states)
    for point, state in zip(points, states, strict=True):
        for number, held in enumerate(state):
            assert lab.restore(point, number, host=make_host(name="elsewhere")) == held


def _run_until_it_ends(lab: Lab, store: Store) -> None:
    try:
        lab.replicate(store=store)
    except (SimulatedCrash, GodwitError):
        lab.published.pop(2, None)


def test_a_cycle_makes_writes_enough_to_be_worth_crashing(tmp_path: Path) -> None:
    # lease, segments (3 frames each), map, manifest, lease
    assert _writes_of_a_cycle(tmp_path) >= 7


@pytest.mark.parametrize(
    "successor, encrypted",
    [("the same machine", False), ("another machine", False), ("another machine", True)],
    ids=["the same machine", "another machine", "another machine, encrypted"],
)
def test_crash_at_every_write(tmp_path: Path, successor: str, encrypted: bool) -> None:
    total = _writes_of_a_cycle(tmp_path / "count")
    reused = 0
    for at, mode in crash_points(total):
        lab = _lab(tmp_path / f"{at}-{mode.value}", encrypted=encrypted)
        first, second = lab.published[1], lab.contents()
        store = CrashingStore(lab.store, at=at, mode=mode)
        _run_until_it_ends(lab, store)
        assert store.crashed

        left = [first, second] if len(_points(lab)) == 2 else [first]
        _assert_every_point_restores(lab, left)

        _change(lab, seed=100)  # the same bytes again: what was uploaded is still of use
        lab.patch(20 * BLOCK, random_blocks(777, 1))
        point = _next_cycle(lab, successor)
        reused += point.cycle.reused_blocks
        _assert_every_point_restores(lab, [*left, lab.contents()])
    assert reused > 20 * len(CHANGED) / 3  # far more than a lucky block: whole segments were used again


def _next_cycle(lab: Lab, successor: str) -> Point:
    """Replicate after the crash: on the same machine at once, on another once the dead one's term has run out."""
    if successor == "the same machine":
        return lab.replicate()
    assert isinstance(lab.host.clock, FakeClock)
    other = make_host(lab.folder / "other", name="host-b", clock=lab.host.clock)
    try:
        return lab.replicate(host=other)
    except LeaseHeldError:
        lab.host.clock.advance(TERM.total_seconds() + 1)
        return lab.replicate(host=other)


def test_lost_answers_are_read_back_when_the_store_is_wrapped(tmp_path: Path) -> None:
    for at in range(_writes_of_a_cycle(tmp_path / "count")):
        lab = _lab(tmp_path / str(at))
        crashing = CrashingStore(lab.store, at=at, mode=CrashMode.APPLIED_ERROR)
        wrapped = ResilientStore(crashing, Patience(attempts=3), sleep=lambda seconds: None)
        lab.replicate(store=wrapped)
        assert crashing.crashed
        lab.assert_restores()


def test_crash_at_every_write_of_the_cycle_after_a_crash(tmp_path: Path) -> None:
    """A crash while recovering from a crash: the fence, and the use of what was left, are crashed at too."""

    def twice_crashed(folder: Path, at: int, mode: CrashMode) -> tuple[Lab, CrashingStore]:
        lab = _lab(folder)
        _run_until_it_ends(lab, CrashingStore(lab.store, at=3, mode=CrashMode.AFTER))
        second = CrashingStore(lab.store, at=at, mode=mode)
        _run_until_it_ends(lab, second)
        return lab, second

    at = 0
    while True:
        reached = False
        for mode in (CrashMode.BEFORE, CrashMode.AFTER):
            lab, store = twice_crashed(tmp_path / f"{at}-{mode.value}", at, mode)
            reached = reached or store.crashed
            states = [lab.published[1]]
            if len(_points(lab)) == 2:
                states.append(lab.contents())
            _assert_every_point_restores(lab, states)
            lab.replicate()
            _assert_every_point_restores(lab, [*states, lab.contents()])
        if not reached:
            break
        at += 1
    assert at >= 6


def test_the_first_cycle_crashed_at_every_write(tmp_path: Path) -> None:
    def fresh(folder: Path) -> Lab:
        return make_lab(folder, [random_blocks(5, 10)])

    counted = fresh(tmp_path / "count")
    recording = RecordingStore(counted.store)
    counted.replicate(store=recording)
    for at, mode in crash_points(len(recording.writes)):
        lab = fresh(tmp_path / f"{at}-{mode.value}")
        _run_until_it_ends(lab, CrashingStore(lab.store, at=at, mode=mode))
        states = [lab.contents()] * len(_points(lab))
        _assert_every_point_restores(lab, states)
        lab.replicate()
        _assert_every_point_restores(lab, [*states, lab.contents()])


class _Interrupting(RecordingStore):
    """Lets somebody else work just before the first manifest is created."""

    def __init__(self, inner: Store, interruption: Callable[[], object]) -> None:
        super().__init__(inner)
        self._interruption: Callable[[], object] | None = interruption

    def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
        if "/manifests/" in key and self._interruption is not None:
            interruption, self._interruption = self._interruption, None
            interruption()
        return super().create(key, data)


def _sleep_through_the_term(lab: Lab) -> Host:
    """Let the first machine's lease run out; return another machine."""
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(TERM.total_seconds() + 1)
    return make_host(lab.folder / "other", name="host-b", clock=lab.host.clock)


def test_a_writer_that_slept_while_another_published_publishes_nothing(tmp_path: Path) -> None:
    lab = _lab(tmp_path)
    states = [lab.published[1], lab.contents()]
    store = _Interrupting(lab.store, lambda: lab.replicate(host=_sleep_through_the_term(lab)))
    with pytest.raises(LeaseLostError, match="another agent"):
        lab.replicate(store=store)
    _assert_every_point_restores(lab, states)


def test_a_writer_whose_lease_was_taken_publishes_nothing_although_the_other_has_not_yet(tmp_path: Path) -> None:
    lab = _lab(tmp_path)
    states = [lab.published[1]]

    def take_over() -> None:
        other = _sleep_through_the_term(lab)
        held = lease.acquire(lab.store, lab.found.keys, other, sole_on_host=True)
        history.begin(lab.store, lab.found.keys, other, held)

    with pytest.raises(LeaseLostError, match="another agent"):
        lab.replicate(store=_Interrupting(lab.store, take_over))
    _assert_every_point_restores(lab, states)


def test_two_agents_that_alternate_lose_nothing(tmp_path: Path) -> None:
    lab = _lab(tmp_path)
    other = make_host(tmp_path / "other", name="host-b")
    states = [lab.published[1]]
    for turn in range(6):
        _change(lab, seed=turn * 1000)
        lab.replicate(host=other if turn % 2 else lab.host)
        states.append(lab.contents())
    _assert_every_point_restores(lab, states)
    epochs = [point.epoch for point in _points(lab)]
    assert epochs == sorted(set(epochs))
