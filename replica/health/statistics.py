"""Statistics of a VM's cycles over a window of time, from samples of its points. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

from replica.health.observation import Observation, PointSample

MEASURABLE_BYTES = 16 << 20  # a cycle that read less says little of the rate


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the cycles of a window did; None where no cycle tells."""

    window_seconds: int
    points: int  # that were published, those that retention removed meanwhile included
    misses: int
    average_latency_seconds: float | None
    largest_latency_seconds: float | None
    average_stored_bytes: float | None
    largest_stored_bytes: int | None
    unsettled: int  # points that were to be application-consistent and are not
    resynchronisations: int
    rate_bytes_per_second: float | None  # at which the source was read

    @property
    def missed_percent(self) -> float:
        """Missed cycles, of all that were due."""
        due = self.points + self.misses
        return 100.0 * self.misses / due if due else 0.0


def statistics(seen: Observation, window: timedelta) -> Statistics:
    """Return the statistics of the window that ends now."""
    inside = [one for one in seen.timeline if one.created_at > seen.at - window]
    deltas = [one for one in inside if one.by_cycle]
    latencies = [one.latency_seconds for one in deltas]
    stored = [one.stored_bytes for one in deltas]
    points, misses = _cycles(seen, window)
    return Statistics(
        window_seconds=int(window.total_seconds()),
        points=points,
        misses=misses,
        average_latency_seconds=sum(latencies) / len(latencies) if latencies else None,
        largest_latency_seconds=max(latencies, default=None),
        average_stored_bytes=sum(stored) / len(stored) if stored else None,
        largest_stored_bytes=max(stored, default=None),
        unsettled=sum(one.not_quiesced for one in inside),
        resynchronisations=len(resynchronised(inside)),
        rate_bytes_per_second=_rate(seen.timeline),
    )


def resynchronised(samples: Sequence[PointSample]) -> list[PointSample]:
    """Return the points for which all was compared although changes were tracked for the one before."""
    cycles = [one for one in samples if not one.rewritten]
    return [later for one, later in pairwise(cycles) if later.found_by == "scan" and one.found_by not in ("", "scan")]


def _cycles(seen: Observation, window: timedelta) -> tuple[int, int]:
    """Return how many points were published in the window, and how many cycles were missed.

    Numbers are given one after the other, so those between two samples are points that retention removed since, and
    no misses. A gap is measured in the VM's own intervals; a clock that was set back makes no gap.
    """
    start = seen.at - window
    timeline = [one for one in seen.timeline if not one.rewritten]
    rewritten = [one.point for one in seen.timeline if one.rewritten]
    if not timeline:
        return 0, 0
    interval = seen.interval_seconds
    points, misses = 0, 0.0
    for one, later in pairwise(timeline):
        if later.created_at <= start:
            continue
        gap = (later.created_at - one.created_at).total_seconds()
        made = later.point - one.point - sum(one.point < number < later.point for number in rewritten)
        share = 1.0
        if one.created_at < start and gap > 0:  # the part of the gap that lies in the window
            share = (later.created_at - start).total_seconds() / gap
        missed = max(0, round(gap / interval) - made)
        points += max(1, round(made * share))
        misses += missed * share
    if timeline[0].created_at > start:
        points += 1
    newest = timeline[-1]
    since = min(seen.known_at - newest.created_at, window).total_seconds()
    # The cycle that is due now has an interval's time to end before it counts as missed.
    return points, round(misses) + max(0, int(since // interval) - 1)


def _rate(samples: Sequence[PointSample]) -> float | None:
    measured = [one for one in samples if not one.rewritten and one.read_bytes >= MEASURABLE_BYTES and one.seconds > 0]
    if not measured:
        return None
    return sum(one.read_bytes for one in measured) / sum(one.seconds for one in measured)


def resynchronisation_seconds(seen: Observation) -> float | None:
    """Return how long comparing everything would take at the rate that was measured, None where none was."""
    newest, rate = seen.newest, _rate(seen.timeline)
    return newest.data_bytes / rate if newest is not None and rate else None
