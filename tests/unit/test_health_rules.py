"""Every rule of health on each side of its threshold: one thing is changed about a VM at which nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from replica.errors import UsageError
from replica.health.assessment import Readiness, ReplicationState, assess, check_window
from replica.health.observation import AgentNote, Event, EventKind, FreeSpace, Observation, PointSample
from replica.health.rules import RULES, Aspect, Severity
from replica.health.statistics import statistics
from replica.model import Standing
from tests.support.health import MINUTE, NOW, every, healthy, sample

HOUR, DAY, SECOND = timedelta(hours=1), timedelta(days=1), timedelta(seconds=1)
OLDEST = healthy().samples[:1]


def newest_aged(age: timedelta, **changes: object) -> Observation:
    """Return a VM whose newest point has that age, made every five minutes until then."""
    return healthy(samples=(*OLDEST, *every(5 * MINUTE, 200, newest_age=age, last=2000)), **changes)


def newest_changed(**changes: object) -> Observation:
    seen = healthy()
    return replace(seen, samples=(*seen.samples[:-1], replace(seen.samples[-1], **changes)))  # type: ignore[arg-type]


def all_changed(change: Callable[[PointSample], PointSample]) -> Observation:
    seen = healthy()
    return replace(seen, samples=tuple(change(one) for one in seen.samples))


def latencies(seconds: float) -> Observation:
    return all_changed(lambda one: replace(one, published_at=one.created_at + timedelta(seconds=seconds)))


def drilled(age: timedelta, result: str = "passed") -> Observation:
    return healthy(drills=(Event(EventKind.DRILL, NOW - age, result),))


def verified(age: timedelta) -> Observation:
    return healthy(last_verify=Event(EventKind.VERIFY, NOW - age, "whole"))


def compared(times: int) -> Observation:
    """Return a VM of which so many cycles of the window compared everything, each after one that did not."""
    seen = healthy()
    chosen = {seen.samples[-2 * number - 1].point for number in range(times)}
    return replace(
        seen,
        samples=tuple(replace(one, found_by="scan") if one.point in chosen else one for one in seen.samples),
    )


def with_gap(cycles: int) -> Observation:
    """Return a VM that missed so many cycles in a row, six hours ago, of the 144 of the window."""
    points = every(5 * MINUTE, 72, last=2000)
    before = tuple(
        sample(2000 - 72 - back, NOW - points[0].created_at + (cycles + 1 + back) * 5 * MINUTE) for back in range(200)
    )
    return healthy(samples=(*OLDEST, *reversed(before), *points))


def free(percent: float) -> Observation:
    return healthy(free_space=FreeSpace("/vms", int(percent * 1000), 100_000))


def set_back(seconds: float) -> Observation:
    seen = healthy()
    before, newest = seen.samples[-2:]
    early = replace(newest, created_at=before.created_at - timedelta(seconds=seconds))
    return replace(seen, samples=(*seen.samples[:-1], early))


def by_agent(age: timedelta = MINUTE, *, state: str = "waiting", failures: int = 0) -> Observation:
    """Return a VM as the digest of an agent tells it that was written so long ago."""
    note = AgentNote("host-a", NOW - age, state, failures, "the disk is gone" if failures else None)
    return healthy(as_of=NOW - age, agent=note)


def forecast(hours: float) -> Observation:
    """Return a VM that was read at 1 MiB/s and holds what takes so many hours."""
    size = int(hours * 3600) << 20
    return all_changed(lambda one: replace(one, read_bytes=16 << 20, seconds=16.0, data_bytes=size))


@dataclass(frozen=True)
class Case:
    rule: str
    quiet: Observation  # just on this side of the threshold
    speaks: Observation  # just beyond
    observed: object = None  # what the reason says was observed


AWAY = {"standing_since": NOW - HOUR, "recovery_host": "host-b"}
RAN_OUT = {"lease_held": True, "lease_expires_at": NOW - SECOND}

CASES = [
    Case("unreadable", healthy(), Observation("", "web 1", NOW, unread="lease.json: it is damaged"), True),
    Case(
        "key-missing", healthy(encrypted=True), Observation("", "web 1", NOW, unread="no key", key_missing=True), True
    ),
    Case("no-point", healthy(), healthy(samples=(), listed=0), True),
    Case(
        "nothing-restorable",
        healthy(samples=healthy().samples[-2:], damaged=frozenset({2000})),
        healthy(samples=healthy().samples[-2:], damaged=frozenset({1999, 2000})),
        True,
    ),
    Case("newest-damaged", healthy(damaged=frozenset({1900})), healthy(damaged=frozenset({1999, 2000})), 2),
    Case("older-damaged", healthy(damaged=frozenset({2000})), healthy(damaged=frozenset({1900})), 1),
    Case("rpo-late", newest_aged(30 * MINUTE), newest_aged(30 * MINUTE + SECOND), 1801.0),
    Case(
        "rpo-late", newest_aged(2 * HOUR, interval_seconds=3600), newest_aged(2 * HOUR + SECOND, interval_seconds=3600)
    ),
    Case("rpo-critical", newest_aged(4 * HOUR), newest_aged(4 * HOUR + SECOND), 14401.0),
    Case("rpo-critical", newest_aged(12 * HOUR, interval_seconds=3600), newest_aged(13 * HOUR, interval_seconds=3600)),
    # RPO is of restorable points: a newer one that is damaged counts for nothing.
    Case("rpo-late", healthy(), healthy(damaged=frozenset(range(1993, 2001))), 2520.0),
    Case("cannot-send", newest_aged(HOUR, leftovers=True), newest_aged(HOUR + SECOND, leftovers=True), 3601.0),
    Case("cannot-send", newest_aged(HOUR, **RAN_OUT), newest_aged(2 * HOUR, **RAN_OUT), 7200.0),
    Case(
        "cannot-send",
        newest_aged(4 * HOUR, interval_seconds=3600, leftovers=True),
        newest_aged(4 * HOUR + SECOND, interval_seconds=3600, leftovers=True),
        14401.0,
    ),
    Case("cycle-cut-off", healthy(), healthy(leftovers=True), True),
    Case("cycle-cut-off", healthy(lease_held=True, lease_expires_at=NOW + SECOND), healthy(**RAN_OUT), True),
    Case("cycle-cut-off", newest_aged(2 * HOUR, leftovers=True), newest_aged(HOUR, leftovers=True), True),
    Case("missed-cycles", with_gap(28), with_gap(32)),
    Case("latency", latencies(300), latencies(301), 301.0),
    Case("latency", replace(latencies(300), interval_seconds=60), replace(latencies(301), interval_seconds=60), 301.0),
    Case(
        "latency",
        replace(latencies(3600), interval_seconds=3600),
        replace(latencies(3601), interval_seconds=3600),
        3601.0,
    ),
    Case("resynchronising-often", compared(2), compared(3), 3),
    Case("not-quiesced", healthy(), newest_changed(not_quiesced=True), True),
    Case("checkpoint-not-followed", healthy(), newest_changed(not_followed=True), True),
    Case(  # it failed over since: what its source runs on does not count
        "checkpoint-not-followed",
        replace(newest_changed(not_followed=True), standing=Standing.COMMITTED, standing_since=NOW - HOUR),
        newest_changed(not_followed=True),
    ),
    Case(
        "not-protected", healthy(standing=Standing.REPROTECTED), healthy(standing=Standing.FAILED_OVER, **AWAY), 3600.0
    ),
    Case(
        "not-protected", healthy(standing=Standing.FAILING_OVER), healthy(standing=Standing.COMMITTED, **AWAY), 3600.0
    ),
    Case("clock-skew", newest_aged(-60 * SECOND), newest_aged(-61 * SECOND), 61.0),
    Case("clock-skew", set_back(60), set_back(61), 61.0),
    Case("clock-skew", healthy(store_skew_seconds=-60.0), healthy(store_skew_seconds=-61.0), 61.0),
    Case(
        "clock-skew",
        newest_changed(published_at=NOW - 2 * MINUTE - 60 * SECOND),
        newest_changed(published_at=NOW - 2 * MINUTE - 61 * SECOND),
        61.0,
    ),
    Case("agent-silent", by_agent(age=15 * MINUTE), by_agent(age=15 * MINUTE + SECOND), 901.0),
    Case("agent-failing", by_agent(failures=2), by_agent(failures=3), 3),
    Case("agent-failing", by_agent(state="retrying"), by_agent(state="stopped"), 0),
    Case("clock-skew", healthy(source_skew_seconds=60.0), healthy(source_skew_seconds=61.0), 61.0),
    Case("drill-never", healthy(), healthy(drills=()), True),
    Case("drill-failed", drilled(DAY), drilled(DAY, "failed"), "failed"),
    Case("drill-old", drilled(90 * DAY), drilled(90 * DAY + SECOND), 90 * 86400 + 1.0),
    Case("not-convertible", healthy(convertibility=None), healthy(convertibility="refused"), "refused"),
    Case("not-convertible", healthy(convertibility="not needed"), healthy(convertibility="refused"), "refused"),
    Case("verify-never", healthy(samples=(), listed=0, last_verify=None), healthy(last_verify=None), True),
    Case("verify-old", verified(7 * DAY), verified(7 * DAY + SECOND), 7 * 86400 + 1.0),
    # 'daily:7' promises six days less a tenth at the least; a day's grace is given.
    Case(
        "history-short",
        healthy(samples=(sample(1700, 4.4 * DAY), *healthy().samples[1:])),
        healthy(samples=(sample(1700, 4.39 * DAY), *healthy().samples[1:])),
    ),
    # Nothing is promised of what was before the VM, or its rule, was there.
    Case(
        "history-short",
        healthy(samples=healthy().samples[1:], protected_since=NOW - DAY),
        healthy(samples=healthy().samples[1:]),
    ),
    Case(
        "history-short",
        healthy(samples=healthy().samples[1:], retention_since=NOW - DAY),
        healthy(samples=healthy().samples[1:]),
    ),
    Case("chain-long", newest_changed(chain_files=8), newest_changed(chain_files=9), 9),
    Case("free-space", free(10), free(9.99), 9.99),
    Case("resynchronisation-long", forecast(8), forecast(8.01)),
]


def test_nothing_is_wrong_with_what_the_cases_change() -> None:
    judged = assess(healthy())
    assert (judged.reasons, judged.doubts) == ((), ())
    assert (judged.health, judged.readiness) == (Severity.NORMAL, Readiness.READY)
    assert judged.state is ReplicationState.REPLICATING


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(RULES)


def found(seen: Observation, rule: str) -> list[object]:
    judged = assess(seen)
    return [one for one in {*judged.reasons, *judged.doubts} if one.rule_id == rule]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_rule_is_quiet_up_to_its_threshold_and_speaks_beyond(case: Case) -> None:
    assert found(case.quiet, case.rule) == []
    judged = assess(case.speaks)
    rule = RULES[case.rule]
    [reason] = [one for one in {*judged.reasons, *judged.doubts} if one.rule_id == case.rule]
    assert (reason.severity, reason.threshold) == (rule.severity, rule.threshold_for(case.speaks.interval_seconds))
    assert reason.remedy == rule.remedy and reason.evidence
    if case.observed is not None:
        assert reason.observed == pytest.approx(case.observed)
    if rule.aspect is Aspect.HEALTH:
        assert judged.health.rank >= rule.severity.rank
    else:
        assert reason in judged.doubts


def wrong_side(case: Case) -> bool:
    return bool(found(case.quiet, case.rule)) or not found(case.speaks, case.rule)


NUMBERS = sorted(name for name, rule in RULES.items() if rule.threshold)  # a threshold of 0 is that there is any
INTERVALS = sorted(name for name, rule in RULES.items() if rule.intervals)


@pytest.mark.parametrize("rule", NUMBERS)
@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_the_cases_of_a_rule_stand_so_close_to_its_threshold_that_no_other_would_do(
    rule: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = RULES[rule].threshold
    assert threshold is not None
    other = threshold + (1 if factor > 1 else -1) if RULES[rule].unit in ("count", "files") else threshold * factor
    monkeypatch.setitem(RULES, rule, replace(RULES[rule], threshold=other))
    assert any(wrong_side(case) for case in CASES if case.rule == rule)


@pytest.mark.parametrize("rule", INTERVALS)
@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_the_same_of_thresholds_that_are_counted_in_intervals(
    rule: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, rule, replace(RULES[rule], intervals=RULES[rule].intervals * factor))
    assert any(wrong_side(case) for case in CASES if case.rule == rule)


def test_the_gravest_reason_comes_first_and_decides() -> None:
    judged = assess(newest_aged(5 * HOUR, leftovers=True))
    assert judged.health is Severity.CRITICAL
    assert [one.rule_id for one in judged.reasons] == ["rpo-critical", "cannot-send", "missed-cycles"]


def test_readiness_stands_beside_health_and_does_not_change_it() -> None:
    judged = assess(drilled(DAY, "failed"))
    assert (judged.health, judged.readiness) == (Severity.NORMAL, Readiness.NOT_READY)
    assert assess(healthy(drills=())).readiness is Readiness.UNPROVEN
    assert assess(newest_changed(chain_files=30)).readiness is Readiness.READY


def test_a_vm_that_failed_over_is_not_told_to_be_late() -> None:
    seen = newest_aged(9 * HOUR, standing=Standing.FAILED_OVER, leftovers=True, **AWAY)
    judged = assess(seen)
    assert [one.rule_id for one in judged.reasons] == ["not-protected"]
    assert judged.state is ReplicationState.FAILED_OVER


def test_a_clock_that_is_ahead_makes_no_rpo_of_nothing() -> None:
    judged = assess(newest_aged(-HOUR))
    assert judged.rpo_seconds is None
    assert [one.rule_id for one in judged.reasons] == ["clock-skew"]
    assert assess(newest_aged(-30 * SECOND)).rpo_seconds == 0.0


def test_points_that_retention_removed_are_no_misses() -> None:
    kept = tuple(one for one in every(5 * MINUTE, 144, last=2000) if one.point > 1976 or one.point % 12 == 0)
    counted = statistics(healthy(samples=kept), timedelta(hours=12))
    assert (counted.points, counted.misses) == (141, 0)  # from 1860 on


def test_the_cycle_that_is_due_is_no_miss_yet() -> None:
    for age, misses in ((9 * MINUTE, 0), (10 * MINUTE, 1), (14 * MINUTE, 1), (15 * MINUTE, 2)):
        counted = statistics(newest_aged(age), timedelta(hours=12))
        assert counted.misses == misses, age


def test_a_whole_window_without_a_cycle_is_missed_whole() -> None:
    counted = statistics(newest_aged(3 * DAY), timedelta(hours=12))
    assert (counted.points, counted.missed_percent) == (0, 100.0)


@pytest.mark.parametrize("window", [timedelta(minutes=59), timedelta(days=7, seconds=1)])
def test_a_window_beyond_an_hour_to_a_week_is_refused(window: timedelta) -> None:
    with pytest.raises(UsageError, match="1 hour to 7 days"):
        check_window(window)


def test_states_are_told_apart() -> None:
    holding = {"lease_held": True, "lease_expires_at": NOW + MINUTE}
    told = {
        ReplicationState.READY: healthy(samples=(), listed=0),
        ReplicationState.INITIAL: healthy(samples=(), listed=0, **holding),
        ReplicationState.REPLICATING: healthy(leftovers=True, **holding),
        ReplicationState.ERROR: healthy(leftovers=True),
        ReplicationState.REVERSED: healthy(standing=Standing.REPROTECTED),
        ReplicationState.FAILING_BACK: healthy(standing=Standing.FAILING_BACK),
        ReplicationState.COMMITTED: healthy(standing=Standing.COMMITTED),
        ReplicationState.UNKNOWN: Observation("", "x", NOW, unread="damaged"),
    }
    assert {state: assess(seen).state for state, seen in told.items()} == {state: state for state in told}
