"""How many bytes a second may go to and from the store: windows of the day, and the bucket that keeps to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo
from typing import Final

from replica.host import Clock

LEAST_BYTES_PER_SECOND: Final = 64 * 1024  # a lease must stay renewable, and a segment must get through within hours
BURST_SECONDS: Final = 1.0
LONGEST_LOOK_BACK: Final = timedelta(days=1)
LONGEST_WAIT_SECONDS: Final = 60.0
_MINUTE: Final = timedelta(minutes=1)
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True)
class Window:
    """A limit that is in force from ``start`` until before ``end``, as clocks on the walls of ``zone`` show them.

    It goes over midnight where ``end`` is not after ``start``, and then belongs to the day on which it begins. Without
    both it is in force all day. ``limit`` None is no limit. Where clocks are put forward, what lies in the hour that
    does not exist begins when that is over; where they are put back, an hour that comes twice counts twice.
    """

    limit: int | None  # bytes a second
    start: time | None = None
    end: time | None = None
    days: frozenset[int] = frozenset(range(7))  # Monday is 0
    zone: tzinfo = UTC

    def covers(self, moment: datetime) -> bool:
        """Whether the window is in force at an aware moment."""
        local = moment.astimezone(self.zone)
        today, now = local.weekday(), local.time()
        if self.start is None or self.end is None:
            return today in self.days
        if self.start < self.end:
            return today in self.days and self.start <= now < self.end
        if now >= self.start:
            return today in self.days
        return now < self.end and (today - 1) % 7 in self.days


@dataclass(frozen=True, slots=True)
class Limits:
    """Windows, of which the first that covers a moment has the say; where none does, there is no limit."""

    windows: tuple[Window, ...] = ()

    def at(self, moment: datetime) -> int | None:
        """Return bytes a second, None for as many as there may be."""
        for window in self.windows:
            if window.covers(moment):
                return window.limit
        return None


class Bucket:
    """Lets bytes through at the rate of the limits in force, in the order in which they were asked for.

    All cycles of an agent share one. After a pause a second's worth goes at once. A request of more than that waits
    until as much has come together, so that the average holds over any span longer than one request takes. Limits are
    the same throughout a minute of the clock, since no window and no zone begins within one.
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = clock.monotonic()
        self._taken = 0.0  # bytes that were asked for, since the beginning
        self._earned = float(limits.at(clock.now()) or 0) * BURST_SECONDS  # and those that may have gone by now

    @property
    def limits(self) -> Limits:
        """What is in force; can be replaced at any time."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        with self._lock:
            self._advance()
            self._limits = limits

    def take(self, size_bytes: int, sleep: Callable[[float], None]) -> None:
        """Return when that many bytes more may go, waiting by ``sleep``, which may raise: then nothing is to go."""
        with self._lock:
            self._advance()
            self._taken += size_bytes
            mine = self._taken
        while pause_seconds := self._pause(mine):
            sleep(pause_seconds)

    def note(self, size_bytes: int) -> None:
        """Count bytes that went without asking; who asks next waits for them."""
        with self._lock:
            self._advance()
            self._taken += size_bytes

    def _pause(self, mine: float) -> float:
        """Return how long to wait before looking again, 0 where the request may go."""
        with self._lock:
            self._advance()
            missing = mine - self._earned
            now = self._clock.now()
            limit = self._limits.at(now)
            if missing < 1e-3 or limit is None:  # less than a byte: what floating point leaves
                return 0.0
            until_next_minute = 60.0 - now.second - now.microsecond / 1e6
            return max(0.001, min(missing / limit, until_next_minute, LONGEST_WAIT_SECONDS))

    def _advance(self) -> None:
        """Credit what the time since the last look allows, minute by minute."""
        monotonic = self._clock.monotonic()
        span = min(timedelta(seconds=monotonic - self._seen), LONGEST_LOOK_BACK)
        self._seen = monotonic
        now = self._clock.now()
        moment = now - span
        while moment < now:
            limit = self._limits.at(moment)
            end = min(now, moment.replace(second=0, microsecond=0) + _MINUTE)
            if limit is None:
                self._earned = max(self._earned, self._taken)
            else:
                # Never beyond a second's worth ahead, but what was earned at a higher limit is not taken back.
                most = max(self._earned, self._taken + limit * BURST_SECONDS)
                self._earned = min(most, self._earned + limit * (end - moment).total_seconds())
            moment = end
