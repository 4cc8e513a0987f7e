"""Sampled verification: a round reads everything once, in days within the budget; damage is found on its day."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import packer
from replica.damage import Report
from replica.keys import PartId
from replica.maptable import SegmentRef
from replica.sampling import Budget, turn
from replica.verify import verify
from tests.support.damage import harm
from tests.support.engine import BLOCK, START, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import RecordingStore

DAY = 86400.0
FULL = 16 << 20


def made(count: int, *, first: int = 0, size: int = FULL) -> list[SegmentRef]:
    return [SegmentRef("ab" * 16, PartId(1 + number, 1, 0), size) for number in range(first, first + count)]


def a_round(refs: list[SegmentRef], budget: Budget, *, start: datetime = START, seed: int = 7) -> list[set[SegmentRef]]:
    days = turn(refs, seed=seed, budget=budget, now=start).days
    turns = [turn(refs, seed=seed, budget=budget, now=start + timedelta(days=day)) for day in range(days)]
    assert {one.days for one in turns} == {days}
    return [set(one.segments) for one in turns]


@given(
    sizes=st.lists(st.integers(200, FULL), max_size=120),
    budget=st.one_of(
        st.integers(1, 200 * FULL).map(lambda size: Budget(size_bytes=size)),
        st.floats(0.001, 1.0).map(lambda share: Budget(share=share)),
    ),
    seed=st.integers(0, 2**64 - 1),
    start=st.datetimes(datetime(2020, 1, 1), datetime(2120, 1, 1)),
)
@settings(max_examples=60, deadline=None)
def test_a_round_reads_everything_just_once(sizes: list[int], budget: Budget, seed: int, start: datetime) -> None:
    refs = [SegmentRef("cd" * 16, PartId(1 + n, 1, 0), size) for n, size in enumerate(sizes)]
    days = a_round(refs, budget, start=start.replace(tzinfo=UTC), seed=seed)
    assert Counter(ref for day in days for ref in day) == Counter(refs)


@pytest.mark.parametrize("count, budget_segments", [(1000, 10), (1000, 999), (64, 5), (5000, 640), (10, 1)])
def test_days_stay_within_the_budget_and_a_round_is_not_much_longer_than_it_must_be(
    count: int, budget_segments: int
) -> None:
    days = a_round(made(count), Budget(size_bytes=budget_segments * FULL))
    assert max(len(day) for day in days) <= budget_segments
    assert len(days) <= 2.5 * count / budget_segments + 1


def test_a_budget_that_holds_everything_reads_it_every_day() -> None:
    assert len(a_round(made(20), Budget(size_bytes=20 * FULL))) == 1
    assert len(a_round(made(20), Budget(share=1.0))) == 1
    assert a_round([], Budget(share=0.1)) == [set()]


def test_a_segment_larger_than_the_budget_has_a_day_alone() -> None:
    days = a_round(made(9), Budget(size_bytes=1 << 20))
    assert max(map(len, days)) == 1


def test_the_order_follows_from_the_seed_and_nobody_without_it_can_tell() -> None:
    refs = made(200)
    first, second = (a_round(refs, Budget(share=0.1), seed=seed) for seed in (1, 2))
    assert first == a_round(list(reversed(refs)), Budget(share=0.1), seed=1)
    assert first != second


def test_while_segments_come_and_go_those_that_stay_are_all_read_within_a_round() -> None:
    """Each day five new segments come and the oldest five go; what lives for a round and some days is read."""
    budget = Budget(size_bytes=30 * FULL)
    read: Counter[SegmentRef] = Counter()
    days = 40
    for day in range(days):
        refs = made(600, first=5 * day)
        read.update(turn(refs, seed=3, budget=budget, now=START + timedelta(days=day)).segments)
    stayed = set(made(600)) & set(made(600, first=5 * (days - 1)))
    assert len(stayed) > 300
    missed = [ref for ref in stayed if not read[ref]]
    assert len(missed) <= len(stayed) // 50


# --- on a store


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Two points in some twenty segments."""
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 3)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 3)
    made = make_lab(tmp_path, [random_blocks(1, 50)], host=make_host())
    made.replicate()
    made.patch(2 * BLOCK, random_blocks(3, 9))
    made.replicate()
    return made


def sampled(lab: Lab, budget: Budget) -> Report:
    return verify(lab.store, lab.host, lab.found, sample=budget, workers=WORKERS)


def pass_a_day(lab: Lab) -> None:
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(DAY)


def test_the_share_is_reported_and_every_object_is_fetched_once_in_a_round(lab: Lab) -> None:
    recording = RecordingStore(lab.store)
    lab.store = recording
    first = sampled(lab, Budget(share=0.2)).sample
    assert first is not None
    assert 1 < first.days <= 16
    recording.forget()
    total = 0
    for _ in range(first.days):
        one = sampled(lab, Budget(share=0.2)).sample
        assert one is not None
        assert (one.days, one.total_bytes) == (first.days, first.total_bytes)
        assert one.read_bytes <= 0.2 * one.total_bytes
        assert one.percent == pytest.approx(100 * one.read_bytes / one.total_bytes)
        total += one.read_bytes
        pass_a_day(lab)
    fetched = Counter(r.key for r in recording.requests if r.kind == "get" and "/segments/" in r.key)
    assert len(fetched) == first.total_segments >= 19
    assert set(fetched.values()) == {1}
    assert total == first.total_bytes
    assert recording.writes == ()


def test_a_flipped_bit_is_found_on_its_day_with_all_that_it_harms(lab: Lab) -> None:
    keys = [info.key for info in lab.store.list(lab.found.keys.segments)]
    key = keys[5]
    harm(lab.store, key, "flipped")
    reports: list[Report] = []
    while not reports or len(reports) < reports[0].sample.days:  # type: ignore[union-attr]
        reports.append(sampled(lab, Budget(share=0.25)))
        pass_a_day(lab)
    found = [report for report in reports if report.damaged]
    assert len(found) == 1
    (named,) = found[0].objects
    full = verify(lab.store, lab.host, lab.found, full=True, workers=WORKERS)
    assert (named,) == full.objects
    assert named.key == key
    assert named.points


def test_what_is_missing_is_found_on_any_day(lab: Lab) -> None:
    key = next(info.key for info in lab.store.list(lab.found.keys.segments))
    lab.store.delete(key)
    for _ in range(3):
        assert [one.key for one in sampled(lab, Budget(share=0.1)).objects] == [key]
        pass_a_day(lab)
