"""Every write of pruning and of garbage collection, crashed at; and both beside cycles: every listed point restores."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest

from replica import garbage, history, lease, packer, pins, prune, retention, verify
from replica.errors import GodwitError, LeaseHeldError, ObjectExistsError
from replica.garbage import Collection
from replica.host import Host
from replica.lease import TERM
from replica.model import Point
from replica.prune import Pruning
from replica.stores.store import Store
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash, crash_points

BLOCKS = 12
POINTS = 6
RULE = retention.parse("last:2")
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cycle of few blocks write several segments, few maps be merged, and deletions come in several batches."""
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 3)
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 3)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 2)
    monkeypatch.setattr(garbage, "BATCH_OBJECTS", 4)
    monkeypatch.setattr(prune, "BATCH_POINTS", 2)


def _lab(folder: Path, *, points: int = POINTS) -> Lab:
    """Return a VM with several points, an hour apart, each of which changed most blocks of the one before."""
    lab = make_lab(folder, [random_blocks(1, BLOCKS)])
    lab.replicate()
    for turn in range(2, points + 1):
        _change(lab, turn)
        lab.replicate()
    return lab


def _change(lab: Lab, turn: int) -> None:
    _pass(lab, 3600)
    for block in range(BLOCKS - 2):
        lab.patch(block * BLOCK, random_blocks(turn * 100 + block, 1))


def _pass(lab: Lab, seconds: float) -> None:
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(seconds)


def _other(lab: Lab) -> Host:
    assert isinstance(lab.host.clock, FakeClock)
    return make_host(lab.folder / "other", name="host-b", clock=lab.host.clock)


def _prune(lab: Lab, store: Store | None = None, host: Host | None = None) -> Pruning:
    return prune.prune(store or lab.store, host or lab.host, lab.found, rule=RULE)


def _gc(lab: Lab, store: Store | None = None, host: Host | None = None, *, grace: float = 0) -> Collection:
    chosen = store or lab.store
    references = garbage.survey(chosen, lab.found.keys.tenant, workers=WORKERS)
    return garbage.collect(
        chosen, host or lab.host, lab.found, references, grace=timedelta(seconds=grace), workers=WORKERS
    )


def _numbers(lab: Lab) -> list[int]:
    found = list(history.points(lab.store, lab.found.keys))
    assert all(isinstance(one, Point) for one in found)
    return [one.point for one in found if isinstance(one, Point)]


def _assert_every_listed_point_restores(lab: Lab) -> list[int]:
    numbers = _numbers(lab)
    for number in numbers:
        assert lab.restore(number, host=make_host(name="elsewhere")) == lab.published[number][0], number
    return numbers


def _stored(lab: Lab) -> set[str]:
    keys = lab.found.keys
    return {info.key for prefix in (keys.segments, keys.maps) for info in lab.store.list(prefix)}


def _run(work: Callable[[], T]) -> T | None:
    try:
        return work()
    except (SimulatedCrash, GodwitError):
        return None


def test_what_was_pruned_is_gone_and_its_room_with_it(tmp_path: Path) -> None:
    lab = _lab(tmp_path / "lab")
    before = _stored(lab)
    assert [one.point for one in _prune(lab).removed] == [1, 2, 3, 4]
    assert _stored(lab) == before
    first = _gc(lab)
    assert first.condemned == first.waiting
    assert first.condemned.objects > 4
    assert _stored(lab) == before
    second = _gc(lab)
    assert second.deleted == first.condemned
    assert (second.waiting.objects, second.condemned.objects) == (0, 0)
    assert len(_stored(lab)) == len(before) - second.deleted.objects
    assert _assert_every_listed_point_restores(lab) == [5, 6]
    assert list(lab.store.list(lab.found.keys.condemned)) == []
    # Nothing is left that the points do not need: a fresh store with those points alone would hold no less.
    assert _gc(lab).condemned.objects == 0


def test_crash_at_every_write_of_pruning(tmp_path: Path) -> None:
    recording = RecordingStore((counted := _lab(tmp_path / "count")).store)
    _prune(counted, recording)
    assert len(recording.writes) == 9  # lease, what is remembered, check, 2 points, check, 2 points, release
    for at, mode in crash_points(len(recording.writes)):
        lab = _lab(tmp_path / f"{at}-{mode.value}")
        pins.pin(lab.store, lab.host, lab.found, 2)
        pins.unpin(lab.store, lab.found, 2)
        store = CrashingStore(lab.store, at=at, mode=mode)
        _run(lambda lab=lab, store=store: _prune(lab, store))  # type: ignore[misc]
        assert store.crashed
        left = _assert_every_listed_point_restores(lab)
        assert left == list(range(POINTS - len(left) + 1, POINTS + 1))  # oldest first, the newest stays
        _gc(lab)
        _gc(lab)
        assert _assert_every_listed_point_restores(lab) == left
        _prune(lab)
        assert _assert_every_listed_point_restores(lab) == [5, 6]
        _change(lab, 7)
        assert lab.replicate().previous == 6
        _assert_every_listed_point_restores(lab)


def test_crash_at_every_write_of_both_runs_of_garbage_collection(tmp_path: Path) -> None:
    counted = _lab(tmp_path / "count")
    _prune(counted)
    recording = RecordingStore(counted.store)
    _gc(counted, recording)
    first_run = len(recording.writes)
    _gc(counted, recording)
    total = len(recording.writes)
    left = _stored(counted)
    assert first_run == 1  # the list of what is condemned
    assert total > 12
    for at, mode in crash_points(total):
        lab = _lab(tmp_path / f"{at}-{mode.value}")
        _prune(lab)
        store = CrashingStore(lab.store, at=at, mode=mode)
        for _ in range(2):
            if not store.crashed:
                _run(lambda lab=lab, store=store: _gc(lab, store))  # type: ignore[misc]
        assert store.crashed
        assert _assert_every_listed_point_restores(lab) == [5, 6]
        for _ in range(2):
            assert _gc(lab).busy is None
        assert _stored(lab) == left
        assert list(lab.store.list(lab.found.keys.condemned)) == []
        _change(lab, 7)
        lab.replicate()
        assert len(_assert_every_listed_point_restores(lab)) == 3


class _Between(RecordingStore):
    """Lets somebody else work before the request of ordinal ``at`` of those that are ``chosen``."""

    def __init__(
        self,
        inner: Store,
        at: int,
        interruption: Callable[[], object],
        *,
        chosen: tuple[str, ...] = ("create", "replace"),
    ) -> None:
        super().__init__(inner)
        self._at = at
        self._interruption = interruption
        self._chosen = chosen
        self._met = 0
        self.interrupted = False

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        if kind in self._chosen:
            self._met += 1
            if self._met - 1 == self._at:
                self.interrupted = True
                self._interruption()
        return super()._call(kind, key, sent, work)


def _housekeeping(lab: Lab, host: Host) -> None:
    """Prune and collect as far as the lease lets, without any grace."""
    _run(lambda: _prune(lab, host=host))
    for _ in range(2):
        _run(lambda: _gc(lab, host=host))


def _lab_with_leftovers(folder: Path) -> Lab:
    """Return a VM whose last cycle was cut off after some of its segments, so that the next makes use of them."""
    lab = _lab(folder, points=4)
    _change(lab, 5)
    store = CrashingStore(lab.store, at=2, mode=CrashMode.AFTER)
    _run(lambda: lab.replicate(store=store))
    assert store.crashed
    return lab


@pytest.mark.parametrize("asleep", [False, True], ids=["at work", "asleep until its lease ran out"])
def test_housekeeping_at_every_write_of_a_cycle(tmp_path: Path, asleep: bool) -> None:
    """Every cycle makes use of what one before it left, while another machine prunes and collects."""
    at = published = 0
    while True:
        lab = _lab_with_leftovers(tmp_path / f"{at}")
        other = _other(lab)

        def interruption(lab: Lab = lab, other: Host = other) -> None:
            if asleep:
                _pass(lab, TERM.total_seconds() + 1)
            _housekeeping(lab, other)

        store = _Between(lab.store, at, interruption)
        point = _run(lambda lab=lab, store=store: lab.replicate(store=store))  # type: ignore[misc]
        if not store.interrupted:
            break
        for number in _numbers(lab):  # a cycle that lost its lease after its manifest was created did publish
            if number not in lab.published:
                lab.published[number] = lab.contents()
        _assert_every_listed_point_restores(lab)
        if point is not None:
            published += 1
            assert point.cycle.reused_blocks > 0
        _pass(lab, TERM.total_seconds() + 1)
        _change(lab, 6)
        lab.replicate(host=other)
        _housekeeping(lab, other)
        assert len(_assert_every_listed_point_restores(lab)) == 2
        at += 1
    assert at > 5
    # Housekeeping never costs a cycle that is at work; one that lost its lease publishes nothing or hears of it.
    assert published == (0 if asleep else at)


def test_a_cycle_before_every_request_of_housekeeping(tmp_path: Path) -> None:
    """A whole cycle wherever the lease is free, also between the survey, the list of the condemned and the deletes."""
    at = fitted = 0
    while True:
        lab = _lab_with_leftovers(tmp_path / f"{at}")
        _run(lambda lab=lab: _prune(lab))  # type: ignore[misc]
        _gc(lab)
        other = _other(lab)
        published: list[int] = []

        def interruption(lab: Lab = lab, other: Host = other, published: list[int] = published) -> None:
            try:
                published.append(lab.replicate(host=other).point)
            except LeaseHeldError:
                return

        store = _Between(lab.store, at, interruption, chosen=("create", "replace", "delete", "get", "head", "list"))

        def work(lab: Lab = lab, store: Store = store) -> None:
            _prune(lab, store)
            _gc(lab, store)
            _gc(lab, store)

        _run(work)
        if not store.interrupted:
            break
        fitted += len(published)
        left = _assert_every_listed_point_restores(lab)
        assert set(published) <= set(left)
        at += 1
    assert fitted > at / 4


def test_a_collector_that_slept_while_others_replicated_deletes_nothing_more(tmp_path: Path) -> None:
    """Between two batches its lease runs out and another takes over: the next look at the lease ends it."""
    counted = _lab(tmp_path / "count")
    _prune(counted)
    _gc(counted)
    recording = RecordingStore(counted.store)
    _gc(counted, recording)
    writes = [(request.kind, request.key) for request in recording.writes]
    checks = [at for at, (kind, key) in enumerate(writes) if kind == "replace" and key == counted.found.keys.lease]
    assert len(checks) > 4
    for at in checks[1:-1]:
        lab = _lab(tmp_path / f"{at}")
        _prune(lab)
        _gc(lab)

        def interruption(lab: Lab = lab) -> None:
            _pass(lab, TERM.total_seconds() + 1)
            _change(lab, 7)
            lab.replicate(host=_other(lab))

        store = _Between(lab.store, at, interruption, chosen=("create", "replace", "delete"))
        with pytest.raises(GodwitError, match="took over"):
            _gc(lab, store)
        assert store.interrupted
        after = [request.kind for request in store.writes][at + 1 :]
        assert "delete" not in after
        assert _assert_every_listed_point_restores(lab) == [5, 6, 8]  # 7 is the fence of whoever took over


def test_a_pruner_that_slept_while_others_replicated_deletes_nothing_more(tmp_path: Path) -> None:
    lab = _lab(tmp_path / "lab")

    def interruption() -> None:
        _pass(lab, TERM.total_seconds() + 1)
        held = lease.acquire(lab.store, lab.found.keys, _other(lab), sole_on_host=True)
        held.release()

    store = _Between(lab.store, 4, interruption, chosen=("create", "replace", "delete"))  # the check before batch two
    with pytest.raises(GodwitError, match="took over"):
        _prune(lab, store)
    assert _assert_every_listed_point_restores(lab) == [3, 4, 5, 6]


@pytest.mark.parametrize("request_kind", ["get", "list", "replace", "delete"])
def test_a_point_that_is_pinned_at_any_moment_of_pruning_stays_if_the_pin_was_accepted(
    tmp_path: Path, request_kind: str
) -> None:
    at = accepted = 0
    while True:
        lab = _lab(tmp_path / f"{at}")
        pinned: list[int] = []

        def interruption(lab: Lab = lab, pinned: list[int] = pinned) -> None:
            if _run(lambda: pins.pin(lab.store, lab.host, lab.found, 2)) is not None:
                pinned.append(2)

        store = _Between(lab.store, at, interruption, chosen=(request_kind,))
        done = _prune(lab, store)
        if not store.interrupted:
            break
        left = _assert_every_listed_point_restores(lab)
        assert set(left) == {*pinned, 5, 6}
        assert [one.point for one in done.removed] == [n for n in (1, 2, 3, 4) if n not in pinned]
        accepted += len(pinned)
        at += 1
    assert accepted > 0


def _arrive_late(lab: Lab, number: int, data: bytes) -> None:
    """Let the first attempt of a manifest's PUT, long since repeated with success, reach the store now."""
    lab.store.create(lab.found.keys.manifest(number), data)


def test_a_manifest_that_arrives_again_after_it_was_pruned_restores_until_it_is_pruned_again(tmp_path: Path) -> None:
    """As long as gc has not deleted what the point needs, which is the grace period at the least."""
    for runs in (0, 1):
        lab = _lab(tmp_path / str(runs))
        data = lab.store.get(lab.found.keys.manifest(2))
        _prune(lab)
        for _ in range(runs):
            _gc(lab, grace=3600)
        references = garbage.survey(lab.store, lab.found.keys.tenant, workers=WORKERS)
        _arrive_late(lab, 2, data)  # even between a collector's survey and what it deletes
        _pass(lab, 3600)
        garbage.collect(lab.store, lab.host, lab.found, references, grace=timedelta(hours=1), workers=WORKERS)
        assert _assert_every_listed_point_restores(lab) == [2, 5, 6]
        assert [one.point for one in _prune(lab).removed] == [2]
        _gc(lab)
        _gc(lab)
        assert _assert_every_listed_point_restores(lab) == [5, 6]


def test_a_manifest_that_arrives_after_gc_is_damage_that_costs_no_other_point_and_is_pruned(tmp_path: Path) -> None:
    lab = _lab(tmp_path / "lab")
    data = lab.store.get(lab.found.keys.manifest(2))
    _prune(lab)
    _gc(lab)
    _gc(lab)
    _arrive_late(lab, 2, data)
    report = verify.verify(lab.store, lab.host, lab.found, workers=WORKERS)
    assert {one.point: one.restores for one in report.verdicts} == {2: False, 5: True, 6: True}
    with pytest.raises(GodwitError, match="nothing was deleted"):
        _gc(lab)
    _change(lab, 7)
    assert lab.replicate().previous == 6
    assert [one.point for one in _prune(lab).removed] == [2, 5]
    assert _gc(lab).condemned.objects > 0
    assert _assert_every_listed_point_restores(lab) == [6, 7]


def test_what_a_dead_writer_sent_meets_the_fence_however_late_it_arrives(tmp_path: Path) -> None:
    """Also where all that was published before and since is pruned."""
    lab = _lab(tmp_path / "lab")
    _change(lab, 7)
    sent: dict[str, bytes] = {}

    class Swallowing(RecordingStore):
        def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
            if "/manifests/" in key:
                sent[key] = bytes(data)
                raise SimulatedCrash
            return super().create(key, data)

    _run(lambda: lab.replicate(store=Swallowing(lab.store)))
    assert list(sent) == [lab.found.keys.manifest(7)]
    _pass(lab, TERM.total_seconds() + 1)
    for turn in (8, 9, 10):
        _change(lab, turn)
        lab.replicate(host=_other(lab))
    _prune(lab)
    _gc(lab)
    _gc(lab)
    with pytest.raises(ObjectExistsError):
        lab.store.create(lab.found.keys.manifest(7), sent[lab.found.keys.manifest(7)])
    assert _assert_every_listed_point_restores(lab) == [9, 10]
