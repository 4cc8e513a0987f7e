"""replica/retention.py: rules are read with clear errors, and keep what they say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replica import catalog, protection, retention
from replica.errors import UsageError
from tests.support.engine import make_lab, random_blocks

NOON = datetime(2026, 3, 15, 12, 0, tzinfo=UTC)  # a Sunday


def every(step: timedelta, count: int, *, end: datetime = NOON) -> dict[int, datetime]:
    """Return ``count`` points, numbered from 1, the last of them at ``end``."""
    return {number: end - step * (count - number) for number in range(1, count + 1)}


def kept_times(text: str, points: dict[int, datetime]) -> list[str]:
    kept = retention.keep(retention.parse(text), points)
    return [f"{points[number]:%m-%d %H:%M}" for number in sorted(kept)]


@pytest.mark.parametrize(
    ("text", "usual"),
    [
        (retention.DEFAULT_TEXT, retention.DEFAULT_TEXT),
        ("default", retention.DEFAULT_TEXT),
        (" Daily:7 , ALL : 120m ", "all:2h,daily:7"),
        ("yearly:3,monthly:1,last:5,all:90s", "all:90s,last:5,monthly:1,yearly:3"),
        ("all:14d", "all:2w"),
    ],
)
def test_a_rule_is_written_back_in_its_usual_form(text: str, usual: str) -> None:
    rule = retention.parse(text)
    assert str(rule) == usual
    assert retention.parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("all", "'all'"),
        ("all:2h,", "''"),
        ("fortnightly:2", "'fortnightly:2'"),
        ("daily", "'daily'"),
        ("daily:0", "'daily:0'"),
        ("daily:-1", "'daily:-1'"),
        ("daily:1d", "'daily:1d'"),
        ("daily:7:7", "'daily:7:7'"),
        ("daily:100001", "'daily:100001'"),
        ("daily:٣", "'daily:٣'"),
        ("all:2", "'all:2'"),
        ("all:0h", "'all:0h'"),
        ("all:2y", "'all:2y'"),
        ("all:36501d", "'all:36501d'"),
        ("daily:7,daily:8", "'daily' is said twice"),
    ],
)
def test_a_rule_that_is_none_is_refused_by_the_term_that_is_wrong(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        retention.parse(text)
    assert named in str(caught.value)
    assert retention.DEFAULT_TEXT in (caught.value.hint or "")


def test_the_default_keeps_all_for_two_hours_then_hourly_daily_weekly_and_monthly() -> None:
    points = every(timedelta(minutes=5), 12 * 24 * 800)
    kept = sorted(retention.keep(retention.DEFAULT, points))
    ages = [NOON - points[number] for number in kept]
    assert sum(age <= timedelta(hours=2) for age in ages) == 25
    assert sum(timedelta(hours=2) < age <= timedelta(days=1) for age in ages) == 21
    # Six days, three weeks and ten months more: where a week's or month's last point is a day's, it is counted once.
    assert [f"{points[number]:%y-%m-%d}" for number in kept if NOON - points[number] > timedelta(days=1)] == [
        *("25-04-30", "25-05-31", "25-06-30", "25-07-31", "25-08-31", "25-09-30", "25-10-31", "25-11-30"),
        *("25-12-31", "26-01-31", "26-02-22", "26-02-28", "26-03-01"),
        *("26-03-08", "26-03-09", "26-03-10", "26-03-11", "26-03-12", "26-03-13"),
    ]


def test_a_period_is_represented_by_its_last_point() -> None:
    points = every(timedelta(minutes=20), 9)
    assert kept_times("hourly:3", points) == ["03-15 10:40", "03-15 11:40", "03-15 12:00"]
    assert kept_times("last:2,daily:1", points) == ["03-15 11:40", "03-15 12:00"]


def test_weeks_begin_on_monday() -> None:
    assert kept_times("weekly:2", every(timedelta(days=1), 10)) == ["03-08 12:00", "03-15 12:00"]


def test_the_newest_and_pinned_points_stay_whatever_the_rule() -> None:
    points = every(timedelta(days=40), 5)
    rule = retention.parse("all:1s")
    assert retention.keep(rule, points) == {5}
    assert retention.keep(rule, points, pinned=[2, 99]) == {2, 5}
    assert retention.keep(rule, {}, pinned=[2]) == frozenset()


def test_a_vm_that_was_off_for_long_keeps_its_points() -> None:
    old = every(timedelta(hours=1), 48, end=NOON - timedelta(days=500))
    kept = retention.keep(retention.DEFAULT, {**old, 49: NOON})
    assert len(kept) >= 24


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)])
@pytest.mark.parametrize("at", range(2, 49, 5))
def test_a_clock_that_jumps_an_hour_costs_no_more_than_the_difference(jump: timedelta, at: int) -> None:
    steady = every(timedelta(minutes=5), 48)
    jumped = {number: moment + (jump if number >= at else timedelta()) for number, moment in steady.items()}
    kept = retention.keep(retention.DEFAULT, jumped)
    newest = [number for number, moment in steady.items() if NOON - moment <= timedelta(hours=1)]
    assert kept >= set(newest)  # of two hours an hour is left at least
    hours = {moment.hour for number, moment in steady.items() if number in kept}
    assert len(hours) >= 4  # and of every hour before a point, give or take the one that was doubled or skipped


def test_a_clock_that_was_years_ahead_for_one_point_does_not_drop_the_rest() -> None:
    points = every(timedelta(minutes=5), 200)
    for wrong in (100, 200):
        jumped = {**points, wrong: NOON + timedelta(days=3650)}
        assert len(retention.keep(retention.DEFAULT, jumped)) >= 17


def test_times_at_the_ends_of_the_calendar_are_no_trouble() -> None:
    points = {1: datetime.min.replace(tzinfo=UTC), 2: NOON, 3: datetime.max.replace(tzinfo=UTC)}
    rule = retention.parse("all:36500d,hourly:9,daily:9,weekly:9,monthly:9,yearly:9")
    assert retention.keep(rule, points) == {1, 2, 3}


def test_the_rule_is_recorded_with_the_vm_changed_and_left(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 2)])
    assert catalog.settings_in_force(lab.store, lab.found).retention is None
    assert b"retention" not in lab.store.get(lab.found.keys.settings(1))
    protection.update(lab.store, lab.host, lab.found, keep="daily:3, all:60m")
    assert catalog.settings_in_force(lab.store, lab.found).retention == "all:1h,daily:3"
    protection.update(lab.store, lab.host, lab.found, interval_seconds=60)
    assert catalog.settings_in_force(lab.store, lab.found).retention == "all:1h,daily:3"
    with pytest.raises(UsageError, match="'often'"):
        protection.update(lab.store, lab.host, lab.found, keep="often")
    other, settings = protection.protect(
        lab.store, lab.host, tenant="default", name="second", disks=lab.paths, keep="last:9"
    )
    assert settings.retention == "last:9"
    assert catalog.settings_in_force(lab.store, other).retention == "last:9"
