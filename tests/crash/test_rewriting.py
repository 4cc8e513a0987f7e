"""Every write of rewriting thin segments, crashed at; and rewriting beside cycles, pruning and gc."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest

from replica import garbage, history, prune, retention, rewriting
from replica.errors import GodwitError, LeaseHeldError, LeaseLostError
from replica.host import Host
from replica.lease import TERM
from replica.model import Point
from replica.rewriting import Rewriting
from replica.stores.memory import MemoryStore
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import Store
from replica.usage import Terms
from tests.support.encryption import encrypted_lab
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import (
    READS,
    WRITES,
    CrashingStore,
    CrashMode,
    RecordingStore,
    SimulatedCrash,
    _Around,
    crash_points,
)

BLOCKS = 18
TERMS = Terms(percent=90, least_gain_bytes=1)
RULE = retention.parse("last:2")
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few blocks make several segments and map parts, which all are worth rewriting."""
    for name, value in (
        ("blockmap.MERGE_MAPS", 3),
        ("packer.SEGMENT_FRAMES", 3),
        ("packer.WAITING_ENTRIES", 4),
        ("scan.BATCH_BLOCKS", 2),
        ("maptable.PART_ENTRIES", 9),
        ("maptable.PAGE_ENTRIES", 2),
        ("usage.GAIN_PER_MAP_BYTE", 0),
        ("garbage.BATCH_OBJECTS", 4),
    ):
        monkeypatch.setattr(f"replica.{name}", value)


def _lab(folder: Path, *, encrypted: bool = False) -> Lab:
    """Return a VM of two disks, of whose first segments some blocks are needed still."""
    disks = [random_blocks(1, BLOCKS), random_blocks(2, 4)]
    lab = encrypted_lab(folder, disks, MemoryStore("lab")) if encrypted else make_lab(folder, disks)
    lab.replicate()
    for turn in range(2):
        _change(lab, turn)
        lab.replicate()
    return lab


def _change(lab: Lab, turn: int, *, seconds: float = 3600) -> None:
    _pass(lab, seconds)
    for block in range(turn, BLOCKS, 3):
        lab.patch(block * BLOCK, random_blocks(turn * 100 + block, 1))


def _pass(lab: Lab, seconds: float) -> None:
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(seconds)


def _other(lab: Lab) -> Host:
    assert isinstance(lab.host.clock, FakeClock)
    return make_host(lab.folder / "other", name="host-b", clock=lab.host.clock)


def _rewrite(lab: Lab, store: Store | None = None, host: Host | None = None) -> Rewriting:
    chosen, where = store or lab.store, host or lab.host
    thin = rewriting.plan(chosen, where, lab.found, TERMS)
    return rewriting.rewrite(chosen, where, lab.found, thin, workers=WORKERS)


def _housekeeping(lab: Lab, host: Host) -> None:
    """Prune and collect, without grace, as far as the lease lets."""
    _run(lambda: prune.prune(lab.store, host, lab.found, rule=RULE))
    for _ in range(2):
        references = garbage.survey(lab.store, lab.found.keys.tenant, workers=WORKERS)
        _run(
            lambda references=references: garbage.collect(  # type: ignore[misc]
                lab.store, host, lab.found, references, grace=timedelta(0), workers=WORKERS
            )
        )


def _run(work: Callable[[], T]) -> T | None:
    try:
        return work()
    except (SimulatedCrash, GodwitError):
        return None


def _assert_every_point_restores(lab: Lab) -> list[int]:
    """Restore what is listed; a point that repeats another holds what that one held."""
    numbers = []
    for one in history.points(lab.store, lab.found.keys):
        assert isinstance(one, Point), one
        held = lab.published.setdefault(one.point, lab.published[one.repeats] if one.repeats else lab.contents())
        for number in range(len(held)):
            assert lab.restore(one, number, host=make_host(name="elsewhere")) == held[number], one.point
        numbers.append(one.point)
    return numbers


def _writes(folder: Path) -> int:
    lab = _lab(folder)
    recording = RecordingStore(lab.store)
    done = _rewrite(lab, recording)
    assert len(done.thin.segments) > 3
    assert done.point == 4
    return len(recording.writes)


@pytest.mark.parametrize("encrypted", [False, True], ids=["in clear", "encrypted"])
def test_crash_at_every_write_of_a_rewriting(tmp_path: Path, encrypted: bool) -> None:
    total = _writes(tmp_path / "count")
    assert total >= 8  # lease, segments, map parts, manifest, lease
    for at, mode in crash_points(total):
        if encrypted and mode not in (CrashMode.BEFORE, CrashMode.AFTER):
            continue
        lab = _lab(tmp_path / f"{at}-{mode.value}", encrypted=encrypted)
        store = CrashingStore(lab.store, at=at, mode=mode)
        _run(lambda lab=lab, store=store: _rewrite(lab, store))  # type: ignore[misc]
        assert store.crashed
        assert _assert_every_point_restores(lab) in ([1, 2, 3], [1, 2, 3, 4])
        _change(lab, 2)
        lab.replicate()
        assert _rewrite(lab).busy is None
        _housekeeping(lab, lab.host)
        assert len(_assert_every_point_restores(lab)) in (2, 3)
        # Nothing that was cut off takes room for good.
        references = garbage.survey(lab.store, lab.found.keys.tenant, workers=WORKERS)
        keys = lab.found.keys
        stored = [info.key for prefix in (keys.maps, keys.segments) for info in lab.store.list(prefix)]
        assert all(key in references for key in stored)


def test_answers_that_were_lost_are_read_back(tmp_path: Path) -> None:
    for at in range(_writes(tmp_path / "count")):
        lab = _lab(tmp_path / str(at))
        crashing = CrashingStore(lab.store, at=at, mode=CrashMode.APPLIED_ERROR)
        done = _rewrite(lab, ResilientStore(crashing, Patience(attempts=3), sleep=lambda seconds: None))
        assert crashing.crashed
        assert done.point == 4
        assert _assert_every_point_restores(lab) == [1, 2, 3, 4]


class _Between(_Around):
    """Does something before the request of ordinal ``at`` among those of some kinds."""

    def __init__(self, inner: Store, at: int, interruption: Callable[[], object], kinds: tuple[str, ...]) -> None:
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


@pytest.mark.parametrize("asleep", [False, True], ids=["at work", "asleep until its lease ran out"])
def test_cycles_and_housekeeping_before_every_request_of_a_rewriting(tmp_path: Path, asleep: bool) -> None:
    at = published = cycles = 0
    while True:
        lab = _lab(tmp_path / str(at))
        other = _other(lab)

        def interruption(lab: Lab = lab, other: Host = other) -> int:
            _change(lab, 2, seconds=TERM.total_seconds() + 1 if asleep else 1)
            try:
                lab.replicate(host=other)
            except LeaseHeldError:
                return 0
            finally:
                _housekeeping(lab, other)
            return 1

        store = _Between(lab.store, at, interruption, (*READS, *WRITES))
        done = _run(lambda lab=lab, store=store: _rewrite(lab, store))  # type: ignore[misc]
        if not store.interrupted:
            break
        left = _assert_every_point_restores(lab)
        cycles += max(lab.published) > 3
        published += bool(done and done.point)
        _pass(lab, TERM.total_seconds() + 1)
        _change(lab, 3)
        point = lab.replicate()
        assert point.previous == max(left)
        _housekeeping(lab, lab.host)
        _assert_every_point_restores(lab)
        at += 1
    assert at > 15
    assert cycles > at / 4
    assert published > at / (8 if asleep else 4)


def test_a_rewriting_before_every_request_of_a_cycle(tmp_path: Path) -> None:
    """Where the lease is free it comes between; where it is not it leaves everything to a later run."""
    at = rewritten = refused = 0
    while True:
        lab = _lab(tmp_path / str(at))
        _change(lab, 2)
        other = _other(lab)
        outcomes: list[Rewriting] = []

        def interruption(lab: Lab = lab, other: Host = other, outcomes: list[Rewriting] = outcomes) -> None:
            outcomes.append(_rewrite(lab, host=other))

        store = _Between(lab.store, at, interruption, (*READS, *WRITES))
        made = _run(lambda lab=lab, store=store: lab.replicate(store=store))  # type: ignore[misc]
        if not store.interrupted:
            break
        rewritten += bool(outcomes[0].point)
        refused += outcomes[0].busy is not None
        if made is None:
            lab.published.pop(5, None)
        _assert_every_point_restores(lab)
        at += 1
    assert rewritten > 0
    assert refused > rewritten


def test_one_that_slept_while_another_took_over_publishes_nothing(tmp_path: Path) -> None:
    lab = _lab(tmp_path)

    class Asleep(_Around):
        def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
            if kind == "create" and "/manifests/" in key:
                _pass(lab, TERM.total_seconds() + 1)
                lab.patch(0, random_blocks(77, 1))
                lab.replicate(host=_other(lab))
            return work()

    with pytest.raises(LeaseLostError):
        _rewrite(lab, Asleep(lab.store))
    assert _assert_every_point_restores(lab) == [1, 2, 3, 5]
