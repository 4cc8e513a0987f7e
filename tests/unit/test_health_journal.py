from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from replica import verify
from replica.errors import IntegrityError, UsageError
from replica.health import journal
from replica.health.observation import Event, EventKind
from tests.support.engine import START, Lab, make_lab, random_blocks
from tests.support.health import MINUTE, every, sample


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path, [random_blocks(1, 4)])


def keys_below(lab: Lab, prefix: str) -> list[str]:
    return [info.key for info in lab.store.list(prefix)]


def test_an_event_says_in_its_key_what_it_is_and_reads_back(lab: Lab) -> None:
    passed = Event(EventKind.DRILL, START, "passed", "host-b", (7,), 93.5, "the guest answered")
    failed = Event(EventKind.DRILL, START + MINUTE, "failed", "host-b", (8,), 600.0, "no answer")
    for event in (failed, passed):
        journal.record_event(lab.store, lab.host, lab.found.keys, event)
    told = journal.event_keys(lab.store, lab.found.keys)
    assert [(one.kind, one.at, one.result) for one in told] == [
        (EventKind.DRILL, START, "passed"),
        (EventKind.DRILL, START + MINUTE, "failed"),
    ]
    assert [journal.read_event(lab.store, one) for one in told] == [passed, failed]
    assert [one.result for one in journal.event_keys(lab.store, lab.found.keys, since=START + MINUTE / 2)] == ["failed"]


def test_two_events_of_one_moment_do_not_meet(lab: Lab) -> None:
    event = Event(EventKind.HEALTH, START, "warning")
    assert journal.record_event(lab.store, lab.host, lab.found.keys, event) != journal.record_event(
        lab.store, lab.host, lab.found.keys, event
    )


def test_a_result_that_is_no_word_is_refused(lab: Lab) -> None:
    with pytest.raises(UsageError, match="no result"):
        journal.record_event(lab.store, lab.host, lab.found.keys, Event(EventKind.DRILL, START, "passed/../../x"))


def test_an_event_under_another_s_key_is_found_out(lab: Lab) -> None:
    key = journal.record_event(lab.store, lab.host, lab.found.keys, Event(EventKind.DRILL, START, "failed"))
    forged = key.replace("-failed-", "-passed-")
    lab.store.create(forged, lab.store.get(key))
    [told] = [one for one in journal.event_keys(lab.store, lab.found.keys) if one.key == forged]
    with pytest.raises(IntegrityError, match="mixed up"):
        journal.read_event(lab.store, told)


def test_keys_of_later_versions_are_left_alone(lab: Lab) -> None:
    prefix = lab.found.keys.events
    for name in ("20260101T000000000000Z-plan-passed", "20269901T000000000000Z-drill-passed", "x"):
        lab.store.create(f"{prefix}{name}-00000000.json", b"{}")
    assert journal.event_keys(lab.store, lab.found.keys) == []


def test_a_verification_becomes_an_event(lab: Lab) -> None:
    lab.replicate()
    lab.patch(0, random_blocks(5, 1))
    lab.replicate()
    whole = journal.verification(verify.verify(lab.store, lab.host, lab.found, full=True), START)
    assert (whole.result, whole.points) == ("whole", ())
    assert journal.verification(verify.verify(lab.store, lab.host, lab.found), START).result == "partial"
    [segment] = [key for key in keys_below(lab, lab.found.keys.segments) if f"{2:020}" in key]
    lab.store.delete(segment)
    damaged = journal.verification(verify.verify(lab.store, lab.host, lab.found), START)
    assert (damaged.result, damaged.points) == ("damaged", (2,))


def test_removed_points_are_remembered_as_they_were(lab: Lab) -> None:
    points = every(5 * MINUTE, 50)
    points = (
        *points[:-1],
        replace(points[-1], not_quiesced=True, not_followed=True, found_by="scan", rewritten=True, seconds=1.234),
    )
    assert journal.remember(lab.store, lab.found.keys, reversed(points)) == 1
    assert tuple(journal.remembered(lab.store, lab.found.keys, 100)) == points
    assert [one.point for one in journal.remembered(lab.store, lab.found.keys, 3)] == [48, 49, 50]


def test_remembering_twice_counts_once(lab: Lab) -> None:
    points = every(5 * MINUTE, 50)
    journal.remember(lab.store, lab.found.keys, points)
    assert journal.remember(lab.store, lab.found.keys, points) == 0
    assert journal.remember(lab.store, lab.found.keys, points[:20]) == 1
    assert [one.point for one in journal.remembered(lab.store, lab.found.keys, 100)] == list(range(1, 51))


def test_a_piece_is_bounded_and_several_are_joined(lab: Lab) -> None:
    points = every(MINUTE, journal.LARGEST_PIECE_POINTS + 5)
    assert journal.remember(lab.store, lab.found.keys, points) == 2
    assert len(journal.remembered(lab.store, lab.found.keys, 100_000)) == len(points)
    size = sum(info.size for info in lab.store.list(lab.found.keys.histories))
    assert size / len(points) < 120


def test_reading_stops_where_it_has_enough(lab: Lab) -> None:
    for day in range(3):
        points = [sample(day * 10 + number, timedelta(days=3 - day)) for number in range(1, 10)]
        journal.remember(lab.store, lab.found.keys, points)
    [oldest, *_] = keys_below(lab, lab.found.keys.histories)
    lab.store.delete(oldest)
    lab.store.create(oldest, b"damaged, and not looked at")
    assert [one.point for one in journal.remembered(lab.store, lab.found.keys, 9)] == list(range(21, 30))


@pytest.mark.parametrize(
    "change",
    [
        {"point": [1]},
        {"created_at_ms": [10**18] * 3},
        {"consistency": ["crash", "crash", 3]},
        {"consistency": ["wrong"] * 3},
        {"stored_bytes": "x"},
        {"flags": None},
    ],
)
def test_a_damaged_piece_hides_no_other(lab: Lab, change: dict[str, object]) -> None:
    from replica import record  # noqa: PLC0415

    journal.remember(lab.store, lab.found.keys, [sample(n, MINUTE) for n in (1, 2, 3)])
    [key] = keys_below(lab, lab.found.keys.histories)
    body = record.decode("history", lab.store.get(key), key=key).values
    lab.store.create(key.replace("3.json", "9.json"), record.encode("history", {**body, **change}))
    assert [one.point for one in journal.remembered(lab.store, lab.found.keys, 100)] == [1, 2, 3]
