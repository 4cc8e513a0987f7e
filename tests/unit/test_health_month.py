"""A month in the life of a VM, told by hand beside what the report makes of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from replica import retention
from replica.health import charts
from replica.health.assessment import Assessment, Readiness, assess
from replica.health.observation import Event, EventKind, Observation, PointSample
from replica.health.rules import Severity
from replica.health.statistics import statistics
from tests.support.health import NOW, sample

START = NOW - timedelta(days=30)  # 1 March 2026, 12:00 UTC
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
RULE = retention.parse("all:2h,hourly:24,daily:14")


def month() -> list[tuple[datetime, PointSample]]:
    """Return when each point was there, by a true clock, and the point: one every 15 minutes for 30 days, but:

    day 4, 10:00 to 13:00   the store could not be reached: 12 cycles missed
    day 9, 08:00            tracking was lost: one cycle compared everything and took 40 minutes (2 more missed)
    day 15, 00:00 to 06:00  the source's clock was 20 minutes ahead, then set back
    day 21, 02:00           the machine was off until day 22, 02:00: 96 cycles missed
    """
    made: list[tuple[datetime, PointSample]] = []
    moment, number = START, 1
    while moment < NOW:
        since = moment - START
        if 4 * DAY + 10 * HOUR <= since < 4 * DAY + 13 * HOUR or 21 * DAY + 2 * HOUR <= since < 22 * DAY + 2 * HOUR:
            moment += 15 * MINUTE
            continue
        skew = 20 * MINUTE if 15 * DAY <= since < 15 * DAY + 6 * HOUR else timedelta()
        lost = since == 9 * DAY + 8 * HOUR
        took = 40 * MINUTE if lost else 30 * timedelta(seconds=1)
        at = moment + skew
        one = sample(number, NOW - at, published_at=at + took, seconds=took.total_seconds(), is_first=number == 1)
        made.append((moment + took, replace(one, found_by="scan") if lost else one))
        number += 1
        moment += 45 * MINUTE if lost else 15 * MINUTE
    return made


POINTS = month()


def damaged_at(now: datetime, there: list[PointSample]) -> frozenset[int]:
    """Return what verification had found damaged by then, and nobody had put right.

    day 12, 12:10           the points of 10:00 to 12:00 are found damaged: 9 of them; at 14:00 they were repaired
    """
    since = now - START
    if not 12 * DAY + 12 * HOUR + 10 * MINUTE <= since < 12 * DAY + 14 * HOUR:
        return frozenset()
    first, last = START + 12 * DAY + 10 * HOUR, START + 12 * DAY + 12 * HOUR
    return frozenset(one.point for one in there if first <= one.created_at <= last)


def seen_at(now: datetime, points: list[tuple[datetime, PointSample]] = POINTS) -> Observation:
    """What a report finds at a moment of the month: what the rule kept, and beside it what was remembered."""
    there = [one for published_at, one in points if published_at <= now]
    kept = retention.keep(RULE, {one.point: one.created_at for one in there})
    return Observation(
        vm_id="0" * 32,
        name="web 1",
        at=now,
        protected_since=START,
        interval_seconds=900,
        retention=str(RULE),
        samples=tuple(one for one in there if one.point in kept),
        remembered=tuple(one for one in there if one.point not in kept),
        listed=len(kept),
        damaged=damaged_at(now, there),
        last_verify=Event(EventKind.VERIFY, now - HOUR, "partial"),
        drills=(Event(EventKind.DRILL, START + DAY, "passed"),),
    )


def judged(days: float, hours: float = 0, minutes: float = 0) -> Assessment:
    return assess(seen_at(START + timedelta(days=days, hours=hours, minutes=minutes)))


# When one looks; the reasons there are then; RPO in minutes.
DIARY = [
    ((0, 1, 5), [], 5),
    ((3, 0, 5), [], 5),
    # The store cannot be reached. Two intervals are half an hour.
    ((4, 10, 14), [], 29),
    ((4, 10, 16), ["rpo-late"], 31),
    ((4, 12, 59), ["rpo-late", "missed-cycles"], 194),  # 11 missed of 48
    ((4, 13, 1), ["missed-cycles"], 1),  # it is back, and 12 missed cycles stay in the window
    ((4, 23, 5), [], 5),
    # One resynchronisation takes long, and is no alarm by itself: the mean of its window is over a minute.
    ((9, 8, 39), ["rpo-late"], 54),
    ((9, 8, 41), ["rpo-late"], 41),
    ((9, 9, 1), [], 1),
    # The newest points are damaged: what counts is the age of the newest that restores, that of 09:45. The point of
    # 12:15 restores, whatever those before it are.
    ((12, 12, 9), [], 9),
    ((12, 12, 11), ["newest-damaged", "rpo-late"], 146),
    ((12, 12, 16), ["older-damaged"], 1),
    ((12, 14, 1), [], 1),
    # The clock is ahead: the age cannot be told, and that is said. It is set back: that is said for a day.
    ((15, 3, 1), ["clock-skew"], None),
    ((15, 6, 1), ["clock-skew"], 1),
    ((16, 7, 5), [], 5),
    # The machine is off for a day.
    ((21, 4, 0), ["rpo-late"], 135),
    ((21, 4, 30), ["rpo-late", "missed-cycles"], 165),  # 10 missed of 48
    ((21, 6, 0), ["rpo-critical", "missed-cycles"], 255),
    ((22, 1, 59), ["rpo-critical", "missed-cycles"], 1454),
    ((22, 2, 1), ["missed-cycles"], 1),
    ((22, 14, 1), [], 1),
    ((29, 23, 59), [], 14),
]


@pytest.mark.parametrize("moment, reasons, rpo_minutes", DIARY, ids=lambda value: str(value).replace(" ", ""))
def test_the_month_as_it_was(moment: tuple[float, ...], reasons: list[str], rpo_minutes: int | None) -> None:
    found = judged(*moment)
    assert [one.rule_id for one in found.reasons] == reasons
    told = None if found.rpo_seconds is None else int(found.rpo_seconds // 60)
    assert told == rpo_minutes


def test_what_the_whole_month_came_to() -> None:
    # 30 days of 96 cycles are 2,880; 12, 96 and 2 were missed. The clock that was put ahead makes it look one more.
    assert len(POINTS) == 2880 - 12 - 96 - 2
    counted = statistics(seen_at(NOW), 31 * DAY)
    assert (counted.points, counted.resynchronisations) == (len(POINTS), 1)
    assert counted.misses == 111
    assert counted.largest_latency_seconds == 2400


def test_misses_are_counted_from_kept_points_alone() -> None:
    """What retention removed is no miss, also where nobody remembers it."""
    for moment in ((4, 12, 59), (22, 2, 1), (29, 23, 59)):
        seen = seen_at(START + timedelta(days=moment[0], hours=moment[1], minutes=moment[2]))
        forgetful = assess(replace(seen, remembered=()))
        assert [one.rule_id for one in forgetful.reasons] == [one.rule_id for one in assess(seen).reasons], moment


def test_the_largest_rpo_of_each_trouble_is_in_the_plot() -> None:
    reached = sorted((int(grown / 60), moment) for moment, grown in charts.exposures(seen_at(NOW)))[-3:]
    assert [minutes for minutes, _ in reached] == [55, 195, 1455]
    assert [moment - START for _, moment in reached] == [
        9 * DAY + 8 * HOUR + 40 * MINUTE,
        4 * DAY + 13 * HOUR + MINUTE / 2,
        22 * DAY + 2 * HOUR + MINUTE / 2,
    ]


def test_readiness_all_month_long() -> None:
    # A drill on the second day; the history is as long as the rule promises from the first day to the last.
    for day in range(2, 30):
        found = judged(day, 23, 59)
        assert (found.readiness, found.doubts) == (Readiness.READY, ()), day
    later = assess(replace(seen_at(NOW), at=START + 92 * DAY))
    assert later.health is Severity.CRITICAL
    assert {one.rule_id for one in later.doubts} >= {"drill-old", "verify-old"}
