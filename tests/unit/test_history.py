"""A VM's history: finding the newest point, fencing off whoever slept, and damage that hides nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from replica import catalog, history, lease, manifest
from replica.errors import (
    GodwitError,
    IntegrityError,
    LeaseLostError,
    ObjectExistsError,
    SourceError,
    StoreUnavailableError,
    UsageError,
)
from replica.host import Host
from replica.model import Fence, Point
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData
from tests.support.engine import BLOCK, START, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import CrashingStore, CrashMode, Fault, FaultKind, FaultyStore, RecordingStore
from vhdx.disk import Disk
from vhdx.formats import open_disk


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path, [random_blocks(1, 12)], host=make_host())


def other_host(lab: Lab, name: str = "host-b") -> Host:
    return make_host(name=name, clock=clock_of(lab))


def clock_of(lab: Lab) -> FakeClock:
    assert isinstance(lab.host.clock, FakeClock)
    return lab.host.clock


def memory(lab: Lab) -> MemoryStore:
    assert isinstance(lab.store, MemoryStore)
    return lab.store


def overwrite(lab: Lab, key: str, data: bytes) -> None:
    lab.store.delete(key)
    lab.store.create(key, data)


def manifests(lab: Lab) -> list[Point | Fence]:
    return [
        history.read(lab.store, lab.found.keys, number)
        for number in range(1, 50)
        if any(info.key == lab.found.keys.manifest(number) for info in lab.store.list(lab.found.keys.manifests))
    ]


class Sleeping:
    """A store whose writer falls asleep before its n-th create of a manifest, while others go on."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.inner = memory(lab)
        self.slept = False
        self.published: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def create(self, key: str, data: ObjectData) -> str:
        if "/manifests/" in key and not self.slept:
            self.slept = True
            clock_of(self.lab).advance(lease.TERM.total_seconds() + 1)
            self.while_asleep()
        tag = self.inner.create(key, data)
        self.published.append(key)
        return tag

    def while_asleep(self) -> None:
        self.lab.replicate(host=other_host(self.lab))


def test_a_writer_that_wakes_up_after_a_take_over_publishes_nothing(lab: Lab) -> None:
    lab.replicate()
    lab.patch(BLOCK, b"changed")
    sleeping = Sleeping(lab)
    with pytest.raises(LeaseLostError) as caught:
        lab.replicate(sleeping)  # type: ignore[arg-type]
    assert caught.value.exit_code == 11
    assert not any("/manifests/" in key for key in sleeping.published)
    found = manifests(lab)
    assert [(type(one), one.point, one.epoch) for one in found] == [(Point, 1, 1), (Fence, 2, 3), (Point, 3, 3)]
    lab.assert_restores()
    lab.replicate()
    lab.assert_restores()


def test_a_writer_that_wakes_up_after_new_settings_publishes_nothing(lab: Lab) -> None:
    lab.replicate()

    class Changing(Sleeping):
        def while_asleep(self) -> None:
            catalog.update_settings(self.lab.store, other_host(self.lab), self.lab.found, interval_seconds=77)

    sleeping = Changing(lab)
    with pytest.raises(LeaseLostError):
        lab.replicate(sleeping)  # type: ignore[arg-type]
    assert not any("/manifests/" in key for key in sleeping.published)
    assert lab.replicate().epoch > 2
    lab.assert_restores()


def test_a_sleeper_that_was_faster_than_the_fence_keeps_its_point(lab: Lab) -> None:
    lab.replicate()
    lab.patch(0, b"x" * 100)
    dying = CrashingStore(lab.store, at=_ordinal_of_release(lab), mode=CrashMode.BEFORE)
    with pytest.raises(BaseException, match="before replace"):
        lab.replicate(dying)
    lab.published[2] = lab.contents()
    clock_of(lab).advance(lease.TERM.total_seconds() + 1)
    lab.patch(0, b"y" * 100)
    point = lab.replicate(host=other_host(lab))
    assert [(type(one), one.point) for one in manifests(lab)] == [(Point, 1), (Point, 2), (Fence, 3), (Point, 4)]
    assert (point.point, point.previous) == (4, 2)
    assert point.cycle.changed_blocks == 1
    lab.assert_restores()


def _ordinal_of_release(lab: Lab) -> int:
    """Return which write of a cycle like the one to come is its last."""
    trial = make_lab(lab.folder / "trial", [lab.paths[0].read_bytes()], host=make_host(seed=5))
    trial.replicate()
    trial.patch(0, b"z" * 100)
    recording = RecordingStore(trial.store)
    trial.replicate(recording)
    assert recording.writes[-1].kind == "replace"
    return len(recording.writes) - 1


@pytest.mark.parametrize("mode", list(CrashMode))
def test_the_newest_number_is_found_after_a_release_that_was_lost(lab: Lab, mode: CrashMode) -> None:
    lab.replicate()
    lab.patch(0, b"x" * 100)
    with pytest.raises(BaseException):  # noqa: B017 - a crash or an error, as the mode has it
        lab.replicate(CrashingStore(lab.store, at=_ordinal_of_release(lab), mode=mode))
    newest = history.newest(lab.store, lab.found.keys)
    assert newest is not None
    assert newest.point == 2
    lab.published[2] = lab.contents()
    lab.assert_restores()
    clock_of(lab).advance(lease.TERM.total_seconds() + 1)
    assert lab.replicate().previous == 2
    lab.assert_restores()


def test_a_manifest_whose_answer_was_lost_is_found_by_the_next_cycle(lab: Lab) -> None:
    lab.replicate()
    lab.patch(0, b"x" * 100)
    faulty = FaultyStore(lab.store, [Fault(FaultKind.APPLIED_ERROR, ("create",), "*/manifests/*")])
    with pytest.raises(StoreUnavailableError):
        lab.replicate(faulty)
    lab.published[2] = lab.contents()
    assert lab.replicate().previous == 2
    lab.assert_restores()


def test_many_failed_cycles_leave_numbers_that_count_up(lab: Lab) -> None:
    lab.replicate()
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            lab.replicate(FaultyStore(lab.store, [Fault(FaultKind.ERROR, ("create",), "*/manifests/*")]))
    assert lab.replicate().point == 2
    lab.assert_restores()


def test_a_cycle_makes_no_list_and_few_requests(lab: Lab) -> None:
    lab.replicate()
    lab.patch(0, b"x")
    recording = RecordingStore(lab.store)
    lab.replicate(recording)
    assert recording.counts["list"] == 0
    assert len(recording.requests) < 15


def test_a_point_of_a_later_epoch_stops_a_writer(lab: Lab) -> None:
    point = lab.replicate()
    overwrite(lab, lab.found.keys.manifest(1), manifest.encode(replace(point, epoch=9)))
    with pytest.raises(LeaseLostError, match="later epoch"):
        lab.replicate()


def test_a_fence_of_a_later_epoch_stops_a_taker(lab: Lab) -> None:
    lab.replicate()
    lease.acquire(lab.store, lab.found.keys, lab.host, sole_on_host=False)
    clock_of(lab).advance(lease.TERM.total_seconds() + 1)
    lab.store.create(lab.found.keys.manifest(2), manifest.encode(Fence(lab.found.vm.vm_id, 2, 99, START)))
    with pytest.raises(LeaseLostError, match="later epoch"):
        lab.replicate(host=other_host(lab))


def test_a_taker_that_sleeps_before_it_fences_does_not_step_over_the_fence_of_the_next(lab: Lab) -> None:
    lab.replicate()
    lease.acquire(lab.store, lab.found.keys, lab.host, sole_on_host=False)  # dies

    class SleepingTaker(Sleeping):
        def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
            done = self.inner.replace(key, data, tag=tag)
            if not self.slept:
                self.slept = True
                clock_of(lab).advance(lease.TERM.total_seconds() + 1)
                with pytest.raises(StoreUnavailableError):  # the next one fences, and dies before it publishes
                    lab.replicate(
                        FaultyStore(lab.store, [Fault(FaultKind.ERROR, ("create",), "*/manifests/*", skip=1)]),
                        other_host(lab),
                    )
            return done

    clock_of(lab).advance(lease.TERM.total_seconds() + 1)
    sleeping = SleepingTaker(lab)
    with pytest.raises(LeaseLostError):
        lab.replicate(sleeping, other_host(lab, "host-c"))  # type: ignore[arg-type]
    assert not any("/manifests/" in key for key in sleeping.published)
    assert [(type(one), one.point) for one in manifests(lab)] == [(Point, 1), (Fence, 2)]
    assert lab.replicate().point == 3
    lab.assert_restores()


def test_points_lists_damage_beside_what_is_good(lab: Lab) -> None:
    for number in range(4):
        lab.patch(number * BLOCK, b"change")
        lab.replicate()
    overwrite(lab, lab.found.keys.manifest(2), b'{"body":')
    lab.store.create(lab.found.keys.manifests + "README.json", b"not ours")
    listed = list(history.points(lab.store, lab.found.keys))
    assert [one.point if isinstance(one, Point) else one.key for one in listed] == [
        1,
        lab.found.keys.manifest(2),
        3,
        4,
    ]
    assert isinstance(listed[1], IntegrityError)
    lab.assert_restores(1, 3, 4)


def test_a_manifest_of_a_later_version_hides_no_other(lab: Lab) -> None:
    for number in range(3):
        lab.patch(number * BLOCK, b"change")
        lab.replicate()
    key = lab.found.keys.manifest(2)
    overwrite(lab, key, lab.store.get(key).replace(b'"format":1,"kind"', b'"format":2,"kind"'))
    listed = list(history.points(lab.store, lab.found.keys))
    assert [one.point if isinstance(one, Point) else "later" for one in listed] == [1, "later", 3]


def test_a_point_is_asked_for_by_its_number(lab: Lab) -> None:
    lab.replicate()
    lab.store.create(lab.found.keys.manifest(2), manifest.encode(Fence(lab.found.vm.vm_id, 2, 1, START)))
    assert history.point(lab.store, lab.found.keys, 1).point == 1
    for number in (2, 3, 0, -1, 10**18):
        with pytest.raises(UsageError, match=str(number)):
            history.point(lab.store, lab.found.keys, number)


def test_the_newest_point_is_found_below_fences_and_gaps(lab: Lab) -> None:
    assert history.newest(lab.store, lab.found.keys) is None
    with pytest.raises(UsageError, match="no recovery point yet"):
        catalog.newest_point(lab.store, lab.found)
    lab.replicate()
    for number in (2, 3):
        lab.store.create(lab.found.keys.manifest(number), manifest.encode(Fence(lab.found.vm.vm_id, number, 1, START)))
    assert history.newest_number(lab.store, lab.found.keys, 1) == 3
    assert catalog.newest_point(lab.store, lab.found).point == 1
    lab.store.delete(lab.found.keys.manifest(2))
    found = history.point_at_or_before(lab.store, lab.found.keys, 3)
    assert found is not None
    assert found.point == 1


def test_a_number_is_published_once(lab: Lab) -> None:
    point = lab.replicate()
    with pytest.raises(LeaseLostError, match="nothing was published") as caught:
        history.publish(lab.store, lab.found.keys, replace(point, epoch=5))
    assert isinstance(caught.value.__cause__, ObjectExistsError)
    assert history.read(lab.store, lab.found.keys, 1) == point


def test_a_cycle_that_fails_publishes_nothing_and_the_next_uses_what_it_stored(lab: Lab) -> None:
    def fails_at_the_end(path: Path) -> Disk:
        disk = open_disk(path)
        path.touch()
        return disk

    clock_of(lab).advance(10)
    before = {info.key for info in lab.store.list("")}

    class Touching:
        def __call__(self, path: Path) -> Disk:
            return fails_at_the_end(path)

    recording = RecordingStore(lab.store)
    original = recording.create

    def create(key: str, data: ObjectData) -> str:
        lab.patch(0, lab.paths[0].read_bytes()[:1])  # the same byte again: the file's time changes
        return original(key, data)

    recording.create = create  # type: ignore[method-assign]
    with pytest.raises(SourceError, match="changed while"):
        lab.replicate(recording, open_disk=Touching())
    after = {info.key for info in lab.store.list("")}
    assert not any("/manifests/" in key for key in after - before)
    assert any("/segments/" in key for key in after - before)
    point = lab.replicate()
    assert (point.point, point.cycle.reused_blocks, point.cycle.stored_bytes) == (1, 12, 0)
    lab.assert_restores()


def test_every_error_of_a_store_is_ours(lab: Lab) -> None:
    lab.replicate()
    lab.patch(0, b"x")
    for kind in ("get", "get_tagged", "head", "create", "replace"):
        for fault in (FaultKind.ERROR, FaultKind.SLOW_DOWN, FaultKind.FULL, FaultKind.SHORT_BODY):
            for skip in (0, 2):
                faulty = FaultyStore(lab.store, [Fault(fault, (kind,), skip=skip)])
                try:
                    lab.replicate(faulty, make_host(name=f"{kind}{fault}{skip}", clock=clock_of(lab)))
                except GodwitError:
                    clock_of(lab).advance(lease.TERM.total_seconds() + 1)
    lab.assert_restores()
