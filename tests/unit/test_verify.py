"""Verification: what is missing, short or changed is found and named; points that do not need it stay good."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from replica import history
from replica.errors import IntegrityError, StoreUnavailableError
from replica.model import Point
from replica.stores.memory import MemoryStore
from replica.verify import Report, restorable, verify
from tests.support.engine import BLOCK, WORKERS, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Three points: the second changes blocks of the first, the third others."""
    made = make_lab(tmp_path, [random_blocks(1, 10), bytes(BLOCK) + random_blocks(2, 3)], host=make_host())
    made.replicate()
    made.patch(2 * BLOCK, random_blocks(3, 2))
    made.replicate()
    made.patch(BLOCK, random_blocks(4, 1), 1)
    made.replicate()
    return made


def check(lab: Lab, *, full: bool, store: object = None) -> Report:
    return verify(store or lab.store, lab.host, lab.found, full=full, workers=WORKERS)  # type: ignore[arg-type]


def segments(lab: Lab, point: int) -> list[str]:
    return [info.key for info in lab.store.list(f"{lab.found.keys.segments}{point:020}/")]


def maps(lab: Lab, point: int) -> list[str]:
    return [info.key for info in lab.store.list(f"{lab.found.keys.prefix}maps/{point:020}/")]


def change(lab: Lab, key: str, data: bytes) -> None:
    lab.store.delete(key)
    lab.store.create(key, data)


def flip(lab: Lab, key: str, at: int) -> None:
    data = bytearray(lab.store.get(key))
    data[at] ^= 0x10
    change(lab, key, bytes(data))


def names(report: Report) -> set[str | None]:
    return {damage.key for verdict in report.verdicts for damage in verdict.damage} | {
        damage.key for damage in report.unreadable
    }


@pytest.mark.parametrize("full", [False, True])
def test_a_store_without_damage_is_found_good(lab: Lab, full: bool) -> None:
    report = check(lab, full=full)
    assert not report.damaged
    assert report.full is full
    assert list(restorable(report)) == [1, 2, 3]
    assert all(verdict.objects >= 2 for verdict in report.verdicts)


def test_full_reads_every_block_and_quick_none(lab: Lab) -> None:
    recording = RecordingStore(lab.store)
    check(lab, full=False, store=recording)
    assert not any(r.kind == "get" and "/segments/" in r.key for r in recording.requests)
    assert recording.writes == ()
    recording.forget()
    report = check(lab, full=True, store=recording)
    assert recording.writes == ()
    assert report.verdicts[0].read_bytes >= 13 * BLOCK


@pytest.mark.parametrize("full", [False, True])
def test_a_missing_segment_is_named_and_points_without_it_stay_good(lab: Lab, full: bool) -> None:
    (key,) = segments(lab, 2)
    lab.store.delete(key)
    report = check(lab, full=full)
    assert report.damaged
    assert list(restorable(report)) == [1]
    assert names(report) == {key}
    assert "missing" in report.verdicts[1].damage[0].message
    lab.assert_restores(1)
    with pytest.raises(IntegrityError) as caught:
        lab.restore(2)
    assert caught.value.key == key


@pytest.mark.parametrize("full", [False, True])
def test_a_segment_that_is_short_or_long_is_named(lab: Lab, full: bool) -> None:
    (key,) = segments(lab, 3)
    data = lab.store.get(key)
    for wrong in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
        change(lab, key, wrong)
        report = check(lab, full=full)
        assert list(restorable(report)) == [1, 2]
        assert names(report) == {key}
        assert f"{len(data)}" in report.verdicts[2].damage[0].message


def test_any_flipped_bit_of_a_frame_is_found_and_named(lab: Lab) -> None:
    (key,) = segments(lab, 2)
    data = lab.store.get(key)
    end = int.from_bytes(data[-64:-56], "little")
    drawn = random.Random(1)
    for at in [64, end - 1, *(drawn.randrange(64, end) for _ in range(25))]:
        flip(lab, key, at)
        report = check(lab, full=True)
        assert list(restorable(report)) == [1]
        assert names(report) == {key}
        change(lab, key, data)
    assert not check(lab, full=True).damaged


@pytest.mark.parametrize("full", [False, True])
def test_any_flipped_bit_of_a_map_is_found_and_named(lab: Lab, full: bool) -> None:
    (key,) = maps(lab, 2)
    data = lab.store.get(key)
    for at in range(0, len(data), 1 if not full else 29):
        flip(lab, key, at)
        report = check(lab, full=full)
        assert list(restorable(report)) == [1]
        assert names(report) == {key}
        change(lab, key, data)


@pytest.mark.parametrize("full", [False, True])
def test_a_missing_map_is_named(lab: Lab, full: bool) -> None:
    (key,) = maps(lab, 3)
    lab.store.delete(key)
    report = check(lab, full=full)
    assert list(restorable(report)) == [1, 2]
    assert names(report) == {key}


@pytest.mark.parametrize("full", [False, True])
def test_any_flipped_bit_of_a_manifest_is_found_and_hides_no_other(lab: Lab, full: bool) -> None:
    key = lab.found.keys.manifest(2)
    data = lab.store.get(key)
    for at in range(0, len(data), 17 if not full else 97):
        flip(lab, key, at)
        report = check(lab, full=full)
        assert report.damaged
        assert list(restorable(report)) == [1, 3]
        assert names(report) == {key}
        change(lab, key, data)


def test_the_cache_does_not_hide_a_damaged_map(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "vm", [random_blocks(1, 4)], host=make_host(tmp_path / "state"))
    lab.replicate()
    (key,) = maps(lab, 1)
    flip(lab, key, 100)
    lab.assert_restores()  # from the cache
    for full in (False, True):
        assert names(check(lab, full=full)) == {key}


def test_maps_of_another_point_do_not_pass(lab: Lab) -> None:
    """A manifest whose maps lost one says another digest than its blocks have."""
    from dataclasses import replace  # noqa: PLC0415

    from replica import manifest  # noqa: PLC0415

    point = history.point(lab.store, lab.found.keys, 3)
    for fewer in (point.maps[:-1], point.maps[1:], tuple(reversed(point.maps))):
        change(lab, lab.found.keys.manifest(3), manifest.encode(replace(point, maps=fewer)))
        report = check(lab, full=True)
        assert list(restorable(report)) == [1, 2]
        assert "digest" in report.verdicts[2].damage[0].message


def test_one_point_can_be_verified_alone(lab: Lab) -> None:
    lab.store.delete(segments(lab, 3)[0])
    good, bad = (history.point(lab.store, lab.found.keys, number) for number in (2, 3))
    for points, damaged in (([good], False), ([bad], True)):
        report = verify(lab.store, lab.host, lab.found, points=points, full=True, workers=WORKERS)
        assert (len(report.verdicts), report.damaged) == (1, damaged)


def test_a_segment_that_points_share_is_looked_at_once(lab: Lab) -> None:
    recording = RecordingStore(lab.store)
    check(lab, full=False, store=recording)
    heads = [r.key for r in recording.requests if r.kind == "head" and "/segments/" in r.key]
    assert len(heads) == len(set(heads)) == 3


def test_a_vm_without_points_has_an_empty_report(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [bytes(BLOCK)])
    report = check(lab, full=True)
    assert (report.verdicts, report.unreadable, report.damaged) == ((), (), False)


def test_a_point_of_zeros_alone_is_good(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [bytes(5 * BLOCK)])
    point = lab.replicate()
    assert isinstance(point, Point)
    assert not check(lab, full=True).damaged
    lab.assert_restores()


def test_a_store_that_does_not_answer_is_an_error_and_no_verdict(lab: Lab) -> None:
    assert isinstance(lab.store, MemoryStore)
    for kind in ("head", "list", "get"):
        with pytest.raises(StoreUnavailableError):
            check(lab, full=True, store=FaultyStore(lab.store, [Fault(FaultKind.ERROR, (kind,))]))


def test_full_verify_finds_a_flip_anywhere_in_a_segment_and_says_which_points_it_harms(lab: Lab) -> None:
    key = segments(lab, 1)[0]
    size = lab.store.head(key).size
    for at in [*range(0, 64, 3), *range(64, size - 64, max(1, size // 40)), *range(size - 600, size, 7)]:
        flip(lab, key, at)
        report = check(lab, full=True)
        assert report.damaged
        assert key in {damage.key for damage in report.segments}, at
        for verdict in report.verdicts:
            if verdict.restores:
                lab.assert_restores(verdict.point)
        flip(lab, key, at)
    assert not check(lab, full=True).damaged


def test_what_points_share_is_read_once(lab: Lab) -> None:
    recording = RecordingStore(lab.store)
    assert not check(lab, full=True, store=recording).damaged
    fetched = [request for request in recording.requests if request.kind == "get" and "/segments/" in request.key]
    stored = sum(lab.store.head(key).size for point in (1, 2, 3) for key in segments(lab, point))
    assert sum(request.size for request in fetched) < 2 * stored  # once whole, once frame by frame
