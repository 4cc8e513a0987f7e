"""replica/prune.py and replica/pins.py: what goes, what stays, and what nobody may take away."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from replica import history, lease, pins, protection, prune, retention
from replica.errors import IntegrityError, LeaseHeldError, LeaseLostError, UsageError
from replica.health import journal
from replica.lease import TERM
from replica.model import Fence
from tests.support.engine import BLOCK, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore

LAST = retention.parse("last:2")


def make_points(folder: Path, count: int = 5, *, step_seconds: float = 3600) -> Lab:
    lab = make_lab(folder, [random_blocks(1, 4)])
    for turn in range(count):
        lab.patch(BLOCK, random_blocks(50 + turn, 1))
        lab.replicate()
        clock(lab).advance(step_seconds)
    return lab


def clock(lab: Lab) -> FakeClock:
    assert isinstance(lab.host.clock, FakeClock)
    return lab.host.clock


def listed(lab: Lab) -> list[int]:
    return [one.point for one in history.points(lab.store, lab.found.keys) if not isinstance(one, Exception)]


def numbers(points: tuple[prune.PointTime, ...]) -> list[int]:
    return [one.point for one in points]


def test_the_rule_of_the_settings_decides(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    assert (
        numbers(prune.prune(lab.store, lab.host, lab.found).removed) == []
    )  # the default: each is the last of an hour
    protection.update(lab.store, lab.host, lab.found, keep="hourly:3")
    done = prune.prune(lab.store, lab.host, lab.found)
    assert (done.rule, numbers(done.removed), numbers(done.kept)) == ("hourly:3", [1, 2], [3, 4, 5])
    assert listed(lab) == [3, 4, 5]
    lab.assert_restores(3, 4, 5)
    assert numbers(prune.prune(lab.store, lab.host, lab.found).removed) == []


def test_a_plan_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    pins.pin(lab.store, lab.host, lab.found, 2)
    recording = RecordingStore(lab.store)
    planned = prune.plan(recording, lab.host, lab.found, rule=LAST)
    assert recording.writes == ()
    assert (numbers(planned.removed), numbers(planned.kept), planned.pinned) == ([1, 3], [2, 4, 5], (2,))
    assert prune.prune(lab.store, lab.host, lab.found, rule=LAST) == planned


def test_manifests_go_oldest_first_and_nothing_else_is_deleted(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    recording = RecordingStore(lab.store)
    prune.prune(recording, lab.host, lab.found, rule=LAST)
    deleted = [request.key for request in recording.writes if request.kind == "delete"]
    assert deleted == [lab.found.keys.manifest(number) for number in (1, 2, 3)]
    [remembered] = [request.key for request in recording.writes if request.key.startswith(lab.found.keys.histories)]
    assert {request.key for request in recording.writes} == {*deleted, remembered, lab.found.keys.lease}
    order = [request.key for request in recording.writes]
    assert order.index(remembered) < order.index(deleted[0])
    assert [one.point for one in journal.remembered(lab.store, lab.found.keys, 100)] == [1, 2, 3]


def test_a_vm_without_points_has_nothing_to_prune(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 2)])
    done = prune.prune(lab.store, lab.host, lab.found)
    assert (done.removed, done.kept) == ((), ())


def test_fences_stay_so_that_a_sleeper_never_publishes_where_history_was_pruned(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 2)
    sleeper = lease.acquire(lab.store, lab.found.keys, lab.host, sole_on_host=True)
    history.begin(lab.store, lab.found.keys, lab.host, sleeper)
    clock(lab).advance(TERM.total_seconds() + 1)
    other = make_host(tmp_path / "other", name="host-b", clock=clock(lab))
    for turn in range(3):
        lab.patch(BLOCK, random_blocks(80 + turn, 1))
        lab.replicate(host=other)
    prune.prune(lab.store, other, lab.found, rule=retention.parse("last:1"))
    assert listed(lab) == [6]
    assert isinstance(history.read(lab.store, lab.found.keys, 3), Fence)
    with pytest.raises(LeaseLostError):
        history.publish(lab.store, lab.found.keys, Fence(lab.found.keys.vm_id, 3, sleeper.epoch, clock(lab).now()))


def test_pruning_notes_a_lease_that_was_not_released_with_a_fence(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 3)
    lease.acquire(lab.store, lab.found.keys, lab.host, sole_on_host=True)
    clock(lab).advance(TERM.total_seconds() + 1)
    prune.prune(lab.store, make_host(name="host-b", clock=clock(lab)), lab.found, rule=LAST)
    assert isinstance(history.read(lab.store, lab.found.keys, 4), Fence)
    assert lab.replicate().point == 5


def test_another_agent_at_work_is_not_disturbed(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    lease.acquire(lab.store, lab.found.keys, make_host(name="host-b", clock=clock(lab)), sole_on_host=True)
    with pytest.raises(LeaseHeldError):
        prune.prune(lab.store, lab.host, lab.found, rule=LAST)
    assert listed(lab) == [1, 2, 3, 4, 5]


def test_a_manifest_that_cannot_be_read_is_left_and_named(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    key = lab.found.keys.manifest(2)
    lab.store.delete(key)
    lab.store.create(key, b"{}")
    done = prune.prune(lab.store, lab.host, lab.found, rule=LAST)
    assert numbers(done.removed) == [1, 3]
    assert [wrong.key for wrong in done.unreadable] == [key]
    assert lab.store.get(key) == b"{}"


def test_the_newest_point_that_can_be_read_stays_where_a_newer_one_cannot(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    key = lab.found.keys.manifest(5)
    lab.store.delete(key)
    lab.store.create(key, b"{}")
    assert numbers(prune.plan(lab.store, lab.host, lab.found, rule=retention.parse("last:1")).kept) == [4]
    assert numbers(prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1")).kept) == [4]
    lab.assert_restores(4)


def test_a_listing_that_lacks_the_newest_point_does_not_cost_it(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 3)
    lab.patch(BLOCK, random_blocks(70, 1))
    store = FaultyStore(lab.store, [Fault(FaultKind.STALE_LIST, ("list",))])
    lab.replicate(store=store)
    store.create("tenants/another", b"")  # no longer the last that was created
    store._last_created = lab.found.keys.manifest(4)
    done = prune.prune(store, lab.host, lab.found, rule=retention.parse("last:1"))
    assert numbers(done.kept) == [4]
    assert listed(lab) == [4]


def test_a_listing_that_lacks_a_pin_does_not_cost_the_point(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 4)
    store = FaultyStore(lab.store, [Fault(FaultKind.STALE_LIST, ("list",))])
    pins.pin(store, lab.host, lab.found, 2)
    assert numbers(prune.prune(store, lab.host, lab.found, rule=LAST).kept) == [2, 3, 4]
    assert listed(lab) == [2, 3, 4]
    pins.unpin(lab.store, lab.found, 2)


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_jumps_an_hour_does_not_empty_the_history(tmp_path: Path, jump: float) -> None:
    lab = make_points(tmp_path, 12, step_seconds=300)
    clock(lab).jump(jump)
    lab.patch(BLOCK, random_blocks(90, 1))
    lab.replicate()
    kept = numbers(prune.prune(lab.store, lab.host, lab.found).kept)
    assert len(kept) >= 13
    lab.assert_restores(*kept)


def test_the_point_that_was_pruned_is_asked_for_with_a_sentence(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    prune.prune(lab.store, lab.host, lab.found, rule=LAST)
    with pytest.raises(UsageError, match="no recovery point 1"):
        history.point(lab.store, lab.found.keys, 1)
    assert history.newest_number(lab.store, lab.found.keys, 5) == 5


def test_a_pin_is_recorded_once_and_lifted_once(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    made = pins.pin(lab.store, lab.host, lab.found, 2, "before the upgrade, größer")
    clock(lab).advance(60)
    assert pins.pin(lab.store, lab.host, lab.found, 2, "another reason") == made
    assert pins.pins(lab.store, lab.found) == [made]
    assert made.reason == "before the upgrade, größer"
    pins.unpin(lab.store, lab.found, 2)
    assert pins.pins(lab.store, lab.found) == []
    with pytest.raises(UsageError, match="not pinned"):
        pins.unpin(lab.store, lab.found, 2)


def test_only_points_can_be_pinned(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 2)
    for number in (0, 3, 99):
        with pytest.raises(UsageError, match="no recovery point"):
            pins.pin(lab.store, lab.host, lab.found, number)
    with pytest.raises(UsageError, match="reason"):
        pins.pin(lab.store, lab.host, lab.found, 1, "x" * 1001)
    with pytest.raises(UsageError, match="reason"):
        pins.pin(lab.store, lab.host, lab.found, 1, "\ud800")
    assert pins.numbers(lab.store, lab.found.keys) == frozenset()


def test_a_point_can_be_pinned_while_another_agent_is_at_work(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 2)
    lease.acquire(lab.store, lab.found.keys, make_host(name="host-b", clock=clock(lab)), sole_on_host=True)
    pins.pin(lab.store, lab.host, lab.found, 1)


def test_a_point_that_goes_while_it_is_being_pinned_is_not_said_to_be_pinned(tmp_path: Path) -> None:
    lab = make_points(tmp_path)

    class Racing(RecordingStore):
        def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
            prune.prune(lab.store, lab.host, lab.found, rule=LAST)
            return super().create(key, data)

    with pytest.raises(UsageError, match="pruned at the same moment"):
        pins.pin(Racing(lab.store), lab.host, lab.found, 2)
    assert pins.numbers(lab.store, lab.found.keys) == frozenset()


def test_a_damaged_pin_still_holds_and_is_named_when_it_is_read(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    pins.pin(lab.store, lab.host, lab.found, 2)
    moved = lab.store.get(lab.found.keys.pin(2))
    lab.store.create(lab.found.keys.pin(1), moved)
    assert numbers(prune.prune(lab.store, lab.host, lab.found, rule=LAST).kept) == [1, 2, 4, 5]
    with pytest.raises(IntegrityError, match="another point"):
        pins.pins(lab.store, lab.found)


def test_a_long_history_is_pruned_to_what_the_default_says(tmp_path: Path) -> None:
    lab = make_points(tmp_path, 60, step_seconds=900)
    done = prune.prune(lab.store, lab.host, lab.found)
    newest = done.kept[-1].created_at
    recent = [one for one in done.kept if newest - one.created_at <= timedelta(hours=2)]
    assert (len(recent), len(done.kept)) == (9, 9 + 12)
    assert len(done.removed) == 60 - len(done.kept)


def test_named_points_go_alone_whatever_the_rule_keeps(tmp_path: Path) -> None:
    lab = make_points(tmp_path)
    planned = prune.plan(lab.store, lab.host, lab.found, points=frozenset({2, 4}))
    assert (numbers(planned.removed), listed(lab)) == ([2, 4], [1, 2, 3, 4, 5])
    done = prune.prune(lab.store, lab.host, lab.found, points=frozenset({2, 4}))
    assert (done.rule, numbers(done.removed), numbers(done.kept)) == ("as named", [2, 4], [1, 3, 5])
    assert listed(lab) == [1, 3, 5]
    lab.assert_restores(1, 3, 5)


@pytest.mark.parametrize(
    ("number", "said"), [(5, "point 5 is the newest"), (3, "point 3 is pinned"), (9, "there is no point 9")]
)
def test_a_named_point_that_has_to_stay_keeps_all_of_them(tmp_path: Path, number: int, said: str) -> None:
    lab = make_points(tmp_path)
    pins.pin(lab.store, lab.host, lab.found, 3)
    with pytest.raises(UsageError, match=said) as raised:
        prune.prune(lab.store, lab.host, lab.found, points=frozenset({1, number}))
    assert raised.value.hint
    assert listed(lab) == [1, 2, 3, 4, 5]
