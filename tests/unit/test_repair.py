"""Repair: whatever is lost, the newest point becomes whole from the source; what cannot be healed is said plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from replica import garbage, history, lease, manifest, packer
from replica.errors import IntegrityError, LeaseHeldError, LeaseLostError, StoreRefusedError
from replica.lease import TERM
from replica.model import Fence
from replica.repair import Plan, Repair, plan, repair
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData, Store
from replica.verify import restorable, verify
from tests.support.damage import KINDS, exchange, harm, listed, maps, restoring, segments
from tests.support.encryption import encrypted_lab, sealed
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cycle of a few blocks write several segments."""
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 6)


def _three_points(made: Lab) -> Lab:
    made.replicate()
    made.patch(2 * BLOCK, random_blocks(3, 2))
    made.replicate()
    made.patch(BLOCK, random_blocks(4, 1), 1)
    made.replicate()
    return made


def _disks() -> list[bytes]:
    return [random_blocks(1, 10) + b"tail" * 128, bytes(BLOCK) + random_blocks(2, 3)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Three points: the second changes blocks of the first, the third others. Nothing is cached."""
    return _three_points(make_lab(tmp_path, _disks(), host=make_host()))


def look(lab: Lab, *, quick: bool = False, store: Store | None = None) -> Plan:
    return plan(store or lab.store, lab.host, lab.found, quick=quick, workers=WORKERS)


def mend(lab: Lab, *, quick: bool = False, store: Store | None = None) -> Repair:
    planned = look(lab, quick=quick, store=store)
    assert planned.is_needed
    done = repair(store or lab.store, lab.host, lab.found, planned, workers=WORKERS)
    if done.point is not None:
        lab.published[done.point.point] = lab.contents()
    return done


def assert_honest(lab: Lab, done: Repair) -> None:
    """Check that the newest point is whole, and that just those points restore which are said to."""
    assert done.is_whole
    restores = set(restoring(lab))
    assert max(restores) == listed(lab)[-1].point
    assert set(restorable(done.report)) == restores
    again = verify(lab.store, make_host(), lab.found, full=True, workers=WORKERS)
    assert set(restorable(again)) == restores
    assert lab.published[max(restores)] == lab.contents()


def damages() -> list[tuple[str, int, str]]:
    return [(what, point, kind) for what in ("segments", "maps") for point in (1, 2, 3) for kind in KINDS]


@pytest.mark.parametrize("what, point, kind", damages())
@pytest.mark.parametrize("encrypted", [False, True], ids=["in clear", "encrypted"])
def test_the_newest_point_becomes_whole_whatever_was_lost(
    tmp_path: Path, what: str, point: int, kind: str, encrypted: bool
) -> None:
    beneath = MemoryStore("beneath")
    lab = (
        encrypted_lab(tmp_path, _disks(), beneath, host=make_host())
        if encrypted
        else make_lab(tmp_path, _disks(), store=beneath, host=make_host())
    )
    _three_points(lab)
    key = (segments if what == "segments" else maps)(lab, point)[0]
    harm(beneath, key, kind)
    if encrypted:
        lab.store = sealed(beneath)
    assert 3 not in set(restoring(lab)) or (what, kind) == ("segments", "flipped")
    done = mend(lab)
    assert_honest(lab, done)
    if point == 3 and what == "segments":
        assert set(restoring(lab)) >= {1, 2, 3}  # all that it held is in the source still


def test_every_place_in_a_segment(lab: Lab) -> None:
    key = segments(lab, 1)[0]
    data = lab.store.get(key)
    for at in (0, 20, 63, 64, 1000, len(data) - 300, len(data) - 60, len(data) - 1):
        exchange(lab.store, key, data)
        harm(lab.store, key, "flipped", at=at)
        assert_honest(lab, mend(lab))


def test_what_the_source_still_holds_is_put_back_for_every_point(lab: Lab) -> None:
    key = segments(lab, 3)[0]
    before = lab.store.get(key)
    harm(lab.store, key, "missing")
    done = mend(lab)
    assert done.healed == (key,)
    assert set(restoring(lab)) == {1, 2, 3, 4}
    assert not done.report.damaged
    assert lab.store.get(key) == before


def test_a_segment_that_no_point_is_harmed_by_is_put_back_without_a_new_point(lab: Lab) -> None:
    key = segments(lab, 2)[0]
    data = lab.store.get(key)
    harm(lab.store, key, "flipped", at=len(data) - 1)
    planned = look(lab)
    assert not planned.resends
    done = mend(lab)
    assert done.point is None
    assert lab.store.get(key) == data
    assert_honest(lab, done)


def test_blocks_that_the_source_no_longer_holds_stay_lost_and_are_named(lab: Lab) -> None:
    (first, *_) = segments(lab, 1)
    harm(lab.store, first, "missing")
    for number, path in enumerate(lab.paths):
        size = path.stat().st_size
        lab.patch(0, random_blocks(50 + number, 20)[:size], number)
    done = mend(lab)
    assert_honest(lab, done)
    assert set(restoring(lab)) == {4}
    assert done.healed == ()
    (unhealed,) = done.unhealed
    assert unhealed.key == first
    assert "no longer holds" in unhealed.why
    (named,) = done.report.objects
    assert (named.key, named.points) == (first, (1, 2, 3))


def test_nothing_to_repair_and_nothing_written(lab: Lab) -> None:
    recording = RecordingStore(lab.store)
    assert not look(lab, store=recording).is_needed
    assert recording.writes == ()


def test_quick_finds_what_is_missing_and_full_what_is_flipped(lab: Lab) -> None:
    key = segments(lab, 2)[0]
    harm(lab.store, key, "flipped")
    assert not look(lab, quick=True).is_needed
    assert look(lab).resends
    lab.store.delete(key)
    assert_honest(lab, mend(lab, quick=True))


def test_damage_that_the_newest_point_does_not_need_costs_no_new_point(lab: Lab) -> None:
    lab.patch(2 * BLOCK, random_blocks(7, 2))  # all that point 2 wrote
    lab.replicate()
    (key,) = segments(lab, 2)
    harm(lab.store, key, "missing")
    planned = look(lab)
    assert not planned.resends
    assert list(restorable(planned.report)) == [1, 4]
    done = mend(lab)
    assert done.point is None
    assert done.is_whole
    assert done.report.damaged
    assert [one.key for one in done.unhealed] == [key]
    assert set(restoring(lab)) == {1, 4}


def test_a_map_is_put_back_from_the_copy_that_this_machine_keeps(tmp_path: Path) -> None:
    lab = _three_points(make_lab(tmp_path, _disks(), host=make_host(tmp_path / "state")))
    (key,) = maps(lab, 3)
    before = lab.store.get(key)
    for kind in KINDS:
        harm(lab.store, key, kind)
        done = mend(lab)
        assert (done.point, done.healed) == (None, (key,))
        assert lab.store.get(key) == before
        assert_honest(lab, done)


def test_where_no_map_can_be_read_everything_is_sent_again(lab: Lab) -> None:
    for number in (1, 2, 3):
        for key in maps(lab, number):
            harm(lab.store, key, "flipped")
    planned = look(lab)
    assert (planned.basis, planned.resends) == (None, True)
    done = mend(lab)
    assert_honest(lab, done)
    assert done.point is not None
    assert done.point.previous == 0
    assert set(restoring(lab)) == {4}
    lab.patch(5 * BLOCK, random_blocks(9, 1))
    assert lab.replicate().previous == 4
    assert set(restoring(lab)) == {4, 5}


def test_maps_that_lie_are_not_built_upon(lab: Lab) -> None:
    point = history.point(lab.store, lab.found.keys, 3)
    exchange(lab.store, lab.found.keys.manifest(3), manifest.encode(replace(point, maps=point.maps[:-1])))
    done = mend(lab)
    assert done.point is not None
    assert done.point.previous == 2
    assert_honest(lab, done)


# --- manifests


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_manifest_that_cannot_be_read_gives_way_to_a_fence_and_gc_works_again(lab: Lab, number: int) -> None:
    harm(lab.store, lab.found.keys.manifest(number), "flipped")
    with pytest.raises(IntegrityError):
        garbage.survey(lab.store, "default")
    planned = look(lab)
    assert planned.manifests == (number,)
    assert planned.resends is (number == 3)
    done = mend(lab)
    assert done.replaced_manifests == (number,)
    assert_honest(lab, done)
    assert isinstance(history.read(lab.store, lab.found.keys, number), Fence)
    assert set(restoring(lab)) == {*({1, 2, 3} - {number}), *([4] if number == 3 else [])}
    references = garbage.survey(lab.store, "default")
    garbage.collect(lab.store, lab.host, lab.found, references, grace=timedelta(0))
    garbage.collect(lab.store, lab.host, lab.found, garbage.survey(lab.store, "default"), grace=timedelta(0))
    lab.replicate()
    assert len(set(restoring(lab))) >= 3


def test_a_manifest_of_a_flipped_version_gives_way_as_any_other_that_is_damaged(lab: Lab) -> None:
    key = lab.found.keys.manifest(2)
    data = lab.store.get(key)
    lab.store.delete(key)
    lab.store.create(key, data.replace(b'"format":1', b'"format":9'))
    done = mend(lab)
    assert done.replaced_manifests == (2,)
    assert_honest(lab, done)


def test_the_newest_manifest_is_replaced_also_where_the_lease_does_not_know_its_number(lab: Lab) -> None:
    state, tag = lease.read(lab.store, lab.found.keys)
    lab.store.replace(lab.found.keys.lease, lease.encode(replace(state, point=2, leftovers=True)), tag=tag)
    harm(lab.store, lab.found.keys.manifest(3), "flipped")
    with pytest.raises(IntegrityError):
        lab.replicate()
    done = mend(lab)
    assert done.replaced_manifests == (3,)
    assert_honest(lab, done)


def test_a_manifest_of_a_later_version_is_left_alone(lab: Lab) -> None:
    key = lab.found.keys.manifest(2)
    later = lab.store.get(key).replace(b'"format":1', b'"format":7').replace(b'"checksum":"', b'"checksum":"all-')
    exchange(lab.store, key, later)
    assert look(lab).manifests == ()
    harm(lab.store, segments(lab, 3)[0], "missing")
    done = mend(lab)
    assert done.is_whole
    assert lab.store.get(key) == later


# --- who else is at work


def _sleep_through_the_term(lab: Lab) -> None:
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(TERM.total_seconds() + 1)


class _Interrupting(RecordingStore):
    """Lets somebody else work just before an object is replaced."""

    def __init__(self, inner: Store, key: str, interruption: Callable[[], object]) -> None:
        super().__init__(inner)
        self._key = key
        self._interruption: Callable[[], object] | None = interruption

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        if key == self._key and self._interruption is not None:
            interruption, self._interruption = self._interruption, None
            interruption()
        return super().replace(key, data, tag=tag)


@pytest.mark.parametrize("what", ["segment", "manifest"])
def test_one_that_slept_while_another_repaired_undoes_nothing(lab: Lab, what: str) -> None:
    key = segments(lab, 3)[0] if what == "segment" else lab.found.keys.manifest(2)
    harm(lab.store, key, "flipped")
    other = replace(lab, host=make_host(name="host-b", clock=lab.host.clock))  # type: ignore[arg-type]

    def another() -> None:
        _sleep_through_the_term(lab)
        mend(other)

    with pytest.raises(LeaseLostError):
        mend(lab, store=_Interrupting(lab.store, key, another))
    assert not verify(lab.store, make_host(), lab.found, full=True, workers=WORKERS).damaged
    assert set(restoring(lab)) >= ({1, 2, 3} if what == "segment" else {1, 3})


def test_while_another_holds_the_lease_nothing_is_written(lab: Lab) -> None:
    harm(lab.store, segments(lab, 1)[0], "missing")
    planned = look(lab)
    recording = RecordingStore(lab.store)
    with (
        lease.holding(lab.store, lab.found.keys, make_host(name="host-b", clock=lab.host.clock)),  # type: ignore[arg-type]
        pytest.raises(LeaseHeldError),
    ):
        repair(recording, lab.host, lab.found, planned, workers=WORKERS)
    assert recording.writes == ()


def test_a_point_that_was_made_since_the_plan_is_built_upon(lab: Lab) -> None:
    harm(lab.store, segments(lab, 1)[0], "missing")
    planned = look(lab)
    lab.patch(4 * BLOCK, random_blocks(77, 1))
    lab.replicate()
    done = repair(lab.store, lab.host, lab.found, planned, workers=WORKERS)
    assert done.point is not None
    assert (done.point.point, done.point.previous) == (5, 4)
    lab.published[5] = lab.contents()
    assert_honest(lab, done)


def test_what_an_unfinished_repair_left_is_not_trusted(lab: Lab) -> None:
    harm(lab.store, segments(lab, 1)[0], "missing")
    broken = FaultyStore(lab.store, [Fault(FaultKind.FULL, ("create",), "*/manifests/*")])
    planned = look(lab)
    with pytest.raises(Exception, match="no room"):
        repair(broken, lab.host, lab.found, planned, workers=WORKERS)
    for key in segments(lab, 4):
        harm(lab.store, key, "flipped", at=70)
    # its number is written to again under a later epoch, beside what was left
    done = mend(lab)
    assert_honest(lab, done)


def test_a_store_that_refuses_to_replace_objects_costs_only_the_healing(lab: Lab) -> None:
    class Refusing(RecordingStore):
        def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
            if "/segments/" in key:
                raise StoreRefusedError("access denied", key=key)
            return super().replace(key, data, tag=tag)

    key = segments(lab, 3)[0]
    harm(lab.store, key, "flipped")
    done = mend(lab, store=Refusing(lab.store))
    assert done.is_whole
    assert done.healed == ()
    assert "refuses" in done.unhealed[0].why
    assert set(restoring(lab)) == {1, 2, 4}


def test_damage_changes_hands_only_for_fences(lab: Lab) -> None:
    """All that repair replaces is the lease, and what was damaged; it deletes nothing."""
    harmed = {segments(lab, 3)[0], lab.found.keys.manifest(2)}
    for key in harmed:
        harm(lab.store, key, "flipped")
    recording = RecordingStore(lab.store)
    mend(lab, store=recording)
    replaced = {request.key for request in recording.writes if request.kind == "replace"}
    assert replaced == {lab.found.keys.lease, *harmed}
    assert not any(request.kind == "delete" for request in recording.writes)
