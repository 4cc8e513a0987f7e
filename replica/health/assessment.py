"""Assessments: what the rules say of an observation. Pure: an observation in, reasons out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Final, TypeAlias

from replica.errors import UsageError
from replica.health.observation import Observation
from replica.health.rules import RULES, Aspect, Rule, Severity
from replica.health.statistics import Statistics, resynchronisation_seconds, statistics
from replica.health.units import duration_text
from replica.model import Standing
from replica.retention import DEFAULT_TEXT, parse

WINDOW: Final = timedelta(hours=12)
SHORTEST_WINDOW: Final = timedelta(hours=1)
LONGEST_WINDOW: Final = timedelta(days=7)
LARGEST_SKEW_SECONDS: Final = 60.0

_PERIOD_DAYS: Final = {"hourly": 1 / 24, "daily": 1, "weekly": 7, "monthly": 31, "yearly": 366}
_AWAY: Final = (Standing.FAILING_OVER, Standing.FAILED_OVER, Standing.COMMITTED)

Observed: TypeAlias = float | str | bool


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a VM is not as it should be. ``observed`` and ``threshold`` are in the rule's unit."""

    rule_id: str
    severity: Severity
    threshold: float | None
    unit: str
    observed: Observed
    evidence: str
    remedy: str


class ReplicationState(StrEnum):
    """What replication of a VM is doing."""

    READY = "ready for initial replication"
    INITIAL = "initial replication in progress"
    REPLICATING = "replicating"
    REVERSED = "replicating from the recovery machine"
    FAILING_OVER = "failing over"
    FAILED_OVER = "failed over, waiting for commit"
    COMMITTED = "failed over"
    FAILING_BACK = "failing back"
    ERROR = "error"
    UNKNOWN = "unknown"


class Readiness(StrEnum):
    """Whether a recovery would succeed, as far as was tried."""

    READY = "ready"
    UNPROVEN = "unproven"  # nothing speaks against it, but not all was tried
    NOT_READY = "not ready"


@dataclass(frozen=True, slots=True)
class Assessment:
    """The judgement on a VM: reasons gravest first, of health and, beside it, of readiness."""

    seen: Observation
    health: Severity
    reasons: tuple[Reason, ...]
    readiness: Readiness
    doubts: tuple[Reason, ...]
    state: ReplicationState
    statistics: Statistics
    rpo_seconds: float | None  # None where there is nothing restorable, or the clocks do not tell
    resynchronisation_seconds: float | None


def check_window(window: timedelta) -> timedelta:
    """Return the window over which cycles are counted. Raises UsageError beyond an hour to a week."""
    if not SHORTEST_WINDOW <= window <= LONGEST_WINDOW:
        raise UsageError("the window of health is from 1 hour to 7 days", hint="12h is the default")
    return window


def assess(seen: Observation, window: timedelta = WINDOW) -> Assessment:
    """Judge an observation by all rules."""
    counted = statistics(seen, window)
    if seen.unread is not None:
        rule = RULES["key-missing" if seen.key_missing else "unreadable"]
        reasons: tuple[Reason, ...] = (_reason(rule, seen, True, seen.unread),)
        doubts = reasons if seen.key_missing else ()
        # Without its key nothing can be told of a VM: that is no sign of health either.
        return Assessment(
            seen, Severity.CRITICAL, reasons, Readiness.NOT_READY, doubts, ReplicationState.UNKNOWN, counted, None, None
        )
    found = [_reason(RULES[name], seen, *said) for name, look in _LOOKS.items() for said in look(seen, counted)]
    found.sort(key=lambda reason: -reason.severity.rank)
    reasons = tuple(one for one in found if RULES[one.rule_id].aspect is Aspect.HEALTH)
    doubts = tuple(one for one in found if RULES[one.rule_id].aspect is Aspect.READINESS)
    rpo = rpo_seconds(seen)
    return Assessment(
        seen=seen,
        health=max((one.severity for one in reasons), key=lambda one: one.rank, default=Severity.NORMAL),
        reasons=reasons,
        readiness=_readiness(seen, doubts),
        doubts=doubts,
        state=_state(seen),
        statistics=counted,
        rpo_seconds=rpo,
        resynchronisation_seconds=resynchronisation_seconds(seen),
    )


def rpo_seconds(seen: Observation) -> float | None:
    """Return the age of the newest restorable point, None where its time is further ahead than clocks may differ."""
    if seen.rpo is None or seen.rpo.total_seconds() < -LARGEST_SKEW_SECONDS:
        return None
    return max(0.0, seen.rpo.total_seconds())


def _reason(rule: Rule, seen: Observation, observed: Observed, evidence: str) -> Reason:
    threshold = rule.threshold_for(seen.interval_seconds)
    return Reason(rule.rule_id, rule.severity, threshold, rule.unit, observed, evidence, rule.remedy)


def _readiness(seen: Observation, doubts: tuple[Reason, ...]) -> Readiness:
    if seen.newest_restorable is None or any(one.severity is Severity.CRITICAL for one in doubts):
        return Readiness.NOT_READY
    proven = seen.last_drill is not None and not any(one.rule_id.startswith(("drill-", "verify-")) for one in doubts)
    return Readiness.READY if proven else Readiness.UNPROVEN


def _state(seen: Observation) -> ReplicationState:
    alive = seen.lease_held and seen.lease_expires_at is not None and seen.lease_expires_at > seen.known_at
    states = {
        Standing.FAILING_OVER: ReplicationState.FAILING_OVER,
        Standing.FAILED_OVER: ReplicationState.FAILED_OVER,
        Standing.COMMITTED: ReplicationState.COMMITTED,
        Standing.FAILING_BACK: ReplicationState.FAILING_BACK,
    }
    if seen.standing in states:
        return states[seen.standing]
    if not seen.listed:
        return ReplicationState.INITIAL if alive else ReplicationState.READY
    if not alive and _cut_off(seen):
        return ReplicationState.ERROR
    return ReplicationState.REVERSED if seen.standing is Standing.REPROTECTED else ReplicationState.REPLICATING


def _cut_off(seen: Observation) -> bool:
    """Whether the last cycle ended without a point: it said so, or its lease ran out while it was held."""
    ran_out = seen.lease_held and seen.lease_expires_at is not None and seen.lease_expires_at <= seen.known_at
    return (seen.leftovers and not seen.lease_held) or ran_out


# --- what the rules look at: each yields what was observed and the evidence, where the rule speaks

_Said: TypeAlias = Iterator[tuple[Observed, str]]


def _exceeds(rule_id: str, seen: Observation, observed: float) -> bool:
    threshold = RULES[rule_id].threshold_for(seen.interval_seconds)
    return threshold is not None and observed > threshold


def _no_point(seen: Observation, _: Statistics) -> _Said:
    if not seen.listed:
        since = f", protected since {_time(seen.protected_since)}" if seen.protected_since else ""
        yield True, f"there is no recovery point yet{since}"


def _nothing_restorable(seen: Observation, _: Statistics) -> _Said:
    if seen.listed and seen.newest_restorable is None:
        yield True, f"{seen.listed} points are listed, none of those looked at restores: {_numbers(seen.damaged)}"


def _newest_damaged(seen: Observation, _: Statistics) -> _Said:
    good = seen.newest_restorable
    newer = [number for number in seen.damaged if good is not None and number > good.point]
    if good is not None and _exceeds("newest-damaged", seen, len(newer)):
        yield len(newer), f"damaged: {_numbers(newer)}; point {good.point} of {_time(good.created_at)} restores"


def _older_damaged(seen: Observation, _: Statistics) -> _Said:
    good = seen.newest_restorable
    older = [number for number in seen.damaged if good is not None and number < good.point]
    if _exceeds("older-damaged", seen, len(older)):
        yield len(older), f"damaged: {_numbers(older)}"


def _rpo(rule_id: str) -> Callable[[Observation, Statistics], _Said]:
    def look(seen: Observation, _: Statistics) -> _Said:
        age, newest = rpo_seconds(seen), seen.newest_restorable
        if age is None or newest is None or seen.standing in _AWAY:
            return
        graver = rule_id != "rpo-critical" and _exceeds("rpo-critical", seen, age)
        if _exceeds(rule_id, seen, age) and not graver:
            yield age, f"point {newest.point} of {_time(newest.created_at)}, published {_time(newest.published_at)}"

    return look


def _cannot_send(seen: Observation, _: Statistics) -> _Said:
    if _is_too_long_cut_off(seen) and seen.newest is not None:
        age = (seen.at - seen.newest.created_at).total_seconds()
        yield age, _how_cut_off(seen)


def _cycle_cut_off(seen: Observation, _: Statistics) -> _Said:
    if _cut_off(seen) and seen.standing not in _AWAY and not _is_too_long_cut_off(seen):
        yield True, _how_cut_off(seen)


def _is_too_long_cut_off(seen: Observation) -> bool:
    if seen.newest is None or not _cut_off(seen) or seen.standing in _AWAY:
        return False
    return _exceeds("cannot-send", seen, (seen.at - seen.newest.created_at).total_seconds())


def _how_cut_off(seen: Observation) -> str:
    where = f" on {seen.source_host}" if seen.source_host else ""
    if seen.lease_held and seen.lease_expires_at is not None:
        return f"a cycle{where} never ended: its lease ran out {_time(seen.lease_expires_at)}"
    return f"the last cycle{where} ended by an error"


def _missed(seen: Observation, counted: Statistics) -> _Said:
    if seen.standing not in _AWAY and _exceeds("missed-cycles", seen, counted.missed_percent):
        yield (
            counted.missed_percent,
            f"{counted.points} made, {counted.misses} missed, one due every {duration_text(seen.interval_seconds)}",
        )


def _latency(seen: Observation, counted: Statistics) -> _Said:
    average = counted.average_latency_seconds
    if average is not None and _exceeds("latency", seen, average):
        yield average, f"the longest took {counted.largest_latency_seconds:.0f} s"


def _resynchronising(seen: Observation, counted: Statistics) -> _Said:
    if _exceeds("resynchronising-often", seen, counted.resynchronisations):
        yield counted.resynchronisations, "found by comparing, where the point before was found by tracking"


def _not_quiesced(seen: Observation, counted: Statistics) -> _Said:
    if seen.newest is not None and seen.newest.not_quiesced:
        yield True, f"point {seen.newest.point}, and {counted.unsettled} of the window's in all"


def _not_followed(seen: Observation, _: Statistics) -> _Said:
    if seen.newest is not None and seen.newest.not_followed and seen.standing not in _AWAY:
        yield True, f"point {seen.newest.point} holds an earlier state then; 'godwit replicate' names those disks"


def _not_protected(seen: Observation, _: Statistics) -> _Said:
    if seen.standing in (Standing.FAILED_OVER, Standing.COMMITTED):
        since = seen.standing_since or seen.at
        where = f" on {seen.recovery_host}" if seen.recovery_host else ""
        yield max(0.0, (seen.at - since).total_seconds()), f"{seen.standing.value} since {_time(since)}{where}"


def _clock_skew(seen: Observation, _: Statistics) -> _Said:
    found = [*_skews(seen)]
    if found:
        worst, evidence = max(found, key=lambda one: one[0])
        if _exceeds("clock-skew", seen, worst):
            yield worst, evidence


def _skews(seen: Observation) -> Iterator[tuple[float, str]]:
    if seen.store_skew_seconds is not None:
        yield abs(seen.store_skew_seconds), "this machine's clock beside the store's"
    if seen.source_skew_seconds is not None:
        whose = f"the clock of {seen.agent.host_name}" if seen.agent is not None else "the agent's clock"
        yield abs(seen.source_skew_seconds), f"{whose} beside the store's"
    newest = seen.newest
    if newest is None:
        return
    yield (
        (newest.created_at - seen.at).total_seconds(),
        f"the newest point's time, {_time(newest.created_at)}, is to come",
    )
    day_ago = seen.at - timedelta(days=1)
    for one, later in pairwise(seen.samples):
        if later.published_at > day_ago:
            back = (one.created_at - later.created_at).total_seconds()
            yield back, f"the clock was set back between points {one.point} and {later.point}"
    yield (
        (newest.created_at - newest.published_at).total_seconds(),
        f"point {newest.point} was published before its time",
    )


def _agent_silent(seen: Observation, _: Statistics) -> _Said:
    note = seen.agent
    if note is not None:
        age = (seen.at - note.written_at).total_seconds()
        if _exceeds("agent-silent", seen, age):
            yield (
                age,
                f"the agent on {note.host_name} was last heard of {_time(note.written_at)}: all told here is of then",
            )


def _agent_failing(seen: Observation, _: Statistics) -> _Said:
    note = seen.agent
    if note is not None and (note.state == "stopped" or _exceeds("agent-failing", seen, note.failures)):
        yield note.failures, f"{note.error or note.state}{f' ({note.hint})' if note.hint else ''}, on {note.host_name}"


def _drill_never(seen: Observation, _: Statistics) -> _Said:
    if seen.last_drill is None:
        yield True, "never"


def _drill_failed(seen: Observation, _: Statistics) -> _Said:
    last = seen.last_drill
    if last is not None and last.result != "passed":
        yield last.result, f"{_time(last.at)}{': ' if last.detail else ''}{last.detail}"


def _drill_old(seen: Observation, _: Statistics) -> _Said:
    passed = next((one for one in reversed(seen.drills) if one.result == "passed"), None)
    if passed is not None:
        age = (seen.at - passed.at).total_seconds()
        if _exceeds("drill-old", seen, age):
            yield age, f"the last that passed was {_time(passed.at)}"


def _not_convertible(seen: Observation, _: Statistics) -> _Said:
    if seen.convertibility is not None and seen.convertibility not in ("convertible", "not needed", "unknown"):
        yield seen.convertibility, "as the newest point's manifest says"


def _verify_never(seen: Observation, _: Statistics) -> _Said:
    if seen.listed and seen.last_verify is None:
        yield True, "never"


def _verify_old(seen: Observation, _: Statistics) -> _Said:
    if seen.last_verify is not None:
        age = (seen.at - seen.last_verify.at).total_seconds()
        if _exceeds("verify-old", seen, age):
            yield age, f"{_time(seen.last_verify.at)}: {seen.last_verify.result}"


def _history_short(seen: Observation, _: Statistics) -> _Said:
    promised, oldest = promised_seconds(seen), seen.samples[0] if seen.samples else None
    if promised is None or oldest is None:
        return
    lacking = promised - (seen.at - oldest.created_at).total_seconds()
    if _exceeds("history-short", seen, lacking):
        yield (
            lacking,
            f"oldest: point {oldest.point} of {_time(oldest.created_at)}; rule: {seen.retention or DEFAULT_TEXT}",
        )


def promised_seconds(seen: Observation) -> float | None:
    """Return how far back the retention rule reaches by now, at the least; None where that is not known.

    Of each period its last point is kept, so one period less than their number is certain, and of a VM that is
    younger than that, its age less a period.
    """
    since = max((one for one in (seen.protected_since, seen.retention_since) if one is not None), default=None)
    if since is None:
        return None
    try:
        rule = parse(seen.retention or DEFAULT_TEXT)
    except UsageError:  # a term that only a later version knows
        return None
    age = (seen.at - since).total_seconds()
    spans = [min(rule.everything.total_seconds(), age)]
    for name, count in rule.periods.items():
        period = _PERIOD_DAYS[name] * 86400
        spans.append(min((count - 1) * period * 0.9, age - period))
    return max(0.0, *spans) if spans else None


def _chain_long(seen: Observation, _: Statistics) -> _Said:
    if seen.newest is not None and _exceeds("chain-long", seen, seen.newest.chain_files):
        yield seen.newest.chain_files, f"point {seen.newest.point} was read through that many files"


def _free_space(seen: Observation, _: Statistics) -> _Said:
    space, least = seen.free_space, RULES["free-space"].threshold
    if space is not None and least is not None and space.percent < least:
        yield space.percent, f"{space.free_bytes} bytes of {space.total_bytes} free at {space.path}"


def _resynchronisation_long(seen: Observation, _: Statistics) -> _Said:
    forecast = resynchronisation_seconds(seen)
    if forecast is not None and seen.newest is not None and _exceeds("resynchronisation-long", seen, forecast):
        yield forecast, f"{seen.newest.data_bytes} bytes are allocated"


_LOOKS: Final[Mapping[str, Callable[[Observation, Statistics], _Said]]] = {
    "no-point": _no_point,
    "nothing-restorable": _nothing_restorable,
    "newest-damaged": _newest_damaged,
    "older-damaged": _older_damaged,
    "rpo-critical": _rpo("rpo-critical"),
    "rpo-late": _rpo("rpo-late"),
    "cannot-send": _cannot_send,
    "cycle-cut-off": _cycle_cut_off,
    "missed-cycles": _missed,
    "latency": _latency,
    "resynchronising-often": _resynchronising,
    "not-quiesced": _not_quiesced,
    "checkpoint-not-followed": _not_followed,
    "not-protected": _not_protected,
    "clock-skew": _clock_skew,
    "agent-silent": _agent_silent,
    "agent-failing": _agent_failing,
    "drill-never": _drill_never,
    "drill-failed": _drill_failed,
    "drill-old": _drill_old,
    "not-convertible": _not_convertible,
    "verify-never": _verify_never,
    "verify-old": _verify_old,
    "history-short": _history_short,
    "chain-long": _chain_long,
    "free-space": _free_space,
    "resynchronisation-long": _resynchronisation_long,
}


def _time(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _numbers(numbers: frozenset[int] | list[int], most: int = 8) -> str:
    shown = ", ".join(str(number) for number in sorted(numbers, reverse=True)[:most])
    return f"{shown} and {len(numbers) - most} more" if len(numbers) > most else shown
