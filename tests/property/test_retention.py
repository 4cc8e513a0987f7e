"""Retention against a naive model, over points of any times: what is kept, kept again, and in any order."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from replica import retention
from replica.retention import Rule

START = datetime(2025, 12, 1, tzinfo=UTC)
FORMATS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-W%V", "monthly": "%Y-%m", "yearly": "%Y"}


@st.composite
def histories(draw: st.DrawFn) -> dict[int, datetime]:
    """Points with gaps between their numbers, mostly ascending in time, their clock set about now and then."""
    moment, number, points = START, 0, {}
    for _ in range(draw(st.integers(0, 40))):
        number += draw(st.integers(1, 3))
        moment += timedelta(seconds=draw(st.one_of(st.integers(0, 7200), st.integers(0, 90 * 86400))))
        moment += timedelta(seconds=draw(st.sampled_from([0] * 8 + [3600, -3600, 400 * 86400, -400 * 86400])))
        points[number] = moment
    return points


rules = st.builds(
    lambda seconds, last, periods: Rule(timedelta(seconds=seconds), last, periods),
    st.sampled_from([0, 600, 7200, 86400 * 3]),
    st.integers(0, 4),
    st.dictionaries(st.sampled_from(sorted(retention.PERIODS)), st.integers(1, 6)),
)


def naive(rule: Rule, points: dict[int, datetime], pinned: set[int]) -> set[int]:
    """Ask of each point by itself whether it is kept."""
    return {number for number in points if _is_kept(number, rule, points, pinned)}


def _is_kept(number: int, rule: Rule, points: dict[int, datetime], pinned: set[int]) -> bool:
    later = [other for other in points if other > number]
    if not later or number in pinned or len(later) < rule.last:
        return True
    before_newest = (points[max(points)] - points[number]).total_seconds()
    span = rule.everything.total_seconds()
    if span and -max(span, 86400) <= before_newest <= span:
        return True
    for name, count in rule.periods.items():
        periods_after = {points[other].strftime(FORMATS[name]) for other in later}
        if points[number].strftime(FORMATS[name]) not in periods_after and len(periods_after) < count:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(histories(), rules, st.sets(st.integers(1, 60), max_size=4))
def test_what_is_kept_is_what_a_naive_reading_of_the_rule_keeps(
    points: dict[int, datetime], rule: Rule, pinned: set[int]
) -> None:
    assert retention.keep(rule, points, pinned) == naive(rule, points, pinned)


@settings(max_examples=200, deadline=None)
@given(histories(), rules, st.sets(st.integers(1, 60), max_size=4), st.randoms())
def test_keeping_twice_keeps_the_same_in_whatever_order_points_come(
    points: dict[int, datetime], rule: Rule, pinned: set[int], drawn: random.Random
) -> None:
    kept = retention.keep(rule, points, pinned)
    shuffled = list(points.items())
    drawn.shuffle(shuffled)
    assert retention.keep(rule, dict(shuffled), pinned) == kept
    assert retention.keep(rule, {number: points[number] for number in kept}, pinned) == kept


@settings(max_examples=200, deadline=None)
@given(histories(), rules, st.integers(1, 40), st.sampled_from([-3600, 3600]))
def test_a_jump_of_an_hour_drops_no_more_than_one_period_each(
    points: dict[int, datetime], rule: Rule, at: int, jump: int
) -> None:
    jumped = {n: moment + timedelta(seconds=jump if n >= at else 0) for n, moment in points.items()}
    kept = retention.keep(rule, jumped)
    assert bool(kept) == bool(points)
    for name, count in rule.periods.items():
        periods = {jumped[n].strftime(FORMATS[name]) for n in jumped}
        assert len({jumped[n].strftime(FORMATS[name]) for n in kept}) >= min(count, len(periods))
