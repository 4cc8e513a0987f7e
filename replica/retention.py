"""Retention: which recovery points a rule keeps. Pure: points' numbers and times in, numbers out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from replica.errors import UsageError

DEFAULT_TEXT: Final = "all:2h,hourly:24,daily:7,weekly:4,monthly:12"
LARGEST_COUNT: Final = 100_000
LONGEST_SPAN: Final = timedelta(days=36_500)
LARGEST_JUMP: Final = timedelta(days=1)  # a clock set back by no more than this costs no recent point

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SPAN: Final = re.compile(r"([0-9]{1,12})([smhdw])")
_COUNT: Final = re.compile(r"[0-9]{1,12}")

# Which period a moment lies in. Weeks begin on Monday; all periods are those of UTC.
PERIODS: Final[Mapping[str, Callable[[datetime], int]]] = {
    "hourly": lambda moment: moment.toordinal() * 24 + moment.hour,
    "daily": lambda moment: moment.toordinal(),
    "weekly": lambda moment: (moment.toordinal() - 1) // 7,
    "monthly": lambda moment: moment.year * 12 + moment.month,
    "yearly": lambda moment: moment.year,
}
TERMS: Final = ("all", "last", *PERIODS)


@dataclass(frozen=True, slots=True)
class Rule:
    """A retention rule.

    ``everything`` is the span before the newest point in which all points are kept, ``last`` how many of the newest
    are kept whatever their age, ``periods`` of how many hours, days, weeks, months and years the last point is.
    """

    everything: timedelta
    last: int
    periods: Mapping[str, int]

    def __str__(self) -> str:
        """Render as it is written, the terms in their usual order."""
        terms = [f"all:{_span_text(self.everything)}"] if self.everything else []
        terms += [f"last:{self.last}"] if self.last else []
        return ",".join([*terms, *(f"{name}:{self.periods[name]}" for name in PERIODS if name in self.periods)])


def parse(text: str) -> Rule:
    """Return the rule that ``text`` says, such as ``all:2h,hourly:24,daily:7``; ``default`` says the default.

    Raises UsageError naming the term that is wrong.
    """
    if text.strip().lower() == "default":
        text = DEFAULT_TEXT
    everything, counts = timedelta(), dict[str, int]()
    seen: set[str] = set()
    for term in text.lower().split(","):
        name, colon, value = (part.strip() for part in term.partition(":"))
        if name not in TERMS or not colon:
            raise _wrong(text, f"{term.strip()!r} is no term of it", f"terms are {', '.join(TERMS)}, each with a value")
        if name in seen:
            raise _wrong(text, f"{name!r} is said twice", "say each term once")
        seen.add(name)
        if name == "all":
            everything = _parse_span(text, value)
        else:
            counts[name] = _parse_count(text, name, value)
    last = counts.pop("last", 0)
    return Rule(everything, last, {name: counts[name] for name in PERIODS if name in counts})


def _parse_span(text: str, value: str) -> timedelta:
    match = _SPAN.fullmatch(value)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_SPAN.total_seconds():
        raise _wrong(text, f"'all:{value}' has no span of time", "write all:30m, all:2h or all:1d; 36500d is the most")
    return timedelta(seconds=seconds)


def _parse_count(text: str, name: str, value: str) -> int:
    count = int(value) if _COUNT.fullmatch(value) else 0
    if not 0 < count <= LARGEST_COUNT:
        raise _wrong(text, f"'{name}:{value}' has no count", f"write {name}:N with N from 1 to {LARGEST_COUNT}")
    return count


def _wrong(text: str, what: str, hint: str) -> UsageError:
    return UsageError(f"{text!r:.200} is no retention rule: {what}", hint=f"{hint}; the default is {DEFAULT_TEXT}")


def _span_text(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    unit = next(unit for unit in reversed(_UNITS) if seconds % _UNITS[unit] == 0)
    return f"{seconds // _UNITS[unit]}{unit}"


DEFAULT: Final = parse(DEFAULT_TEXT)


def keep(
    rule: Rule,
    points: Mapping[int, datetime],
    pinned: Collection[int] = (),
    repeated: Collection[int] = (),
) -> frozenset[int]:
    """Return which of ``points``, times by number, are kept: by the rule, because they are pinned, and the newest.

    ``repeated`` are those of which a later point of the same time holds the same: they are none of the ``last``.

    What is kept of what was kept is the same again. The present time plays no part: spans are counted back from the
    newest point and periods from point to point, so that a VM that made no points for long keeps those it has. Points
    are in the order of their numbers, whatever a clock that jumped made of their times; a period is represented by
    the last of its points.
    """
    if not points:
        return frozenset()
    newest_first = sorted(points, reverse=True)
    times = {number: moment.astimezone(UTC) for number, moment in points.items()}
    last = [number for number in newest_first if number not in repeated][: rule.last]
    kept = {newest_first[0], *last, *(number for number in pinned if number in points)}
    if rule.everything:
        kept.update(_recent(newest_first, times, rule.everything))
    for name, count in rule.periods.items():
        kept.update(_representatives(newest_first, times, PERIODS[name], count))
    return frozenset(kept)


def _recent(newest_first: list[int], times: Mapping[int, datetime], span: timedelta) -> list[int]:
    reference = times[newest_first[0]]
    # Differences, not sums: a time near the end of the calendar must not overflow.
    return [
        number
        for number in newest_first
        if reference - times[number] <= span and times[number] - reference <= max(span, LARGEST_JUMP)
    ]


def _representatives(
    newest_first: list[int], times: Mapping[int, datetime], period_of: Callable[[datetime], int], count: int
) -> list[int]:
    found: dict[int, int] = {}
    for number in newest_first:
        found.setdefault(period_of(times[number]), number)
        if len(found) == count:
            break
    return list(found.values())
