"""Which plots a VM's page shows: RPO, churn, lag and cycle time, and what was stored, over one span of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Final

from replica.health.assessment import Assessment
from replica.health.observation import Observation
from replica.health.plot import Series, binned, plot, span_for
from replica.health.rules import RULES

MOST_BINS: Final = 84
MOST_WITH_TITLES: Final = 200  # machines: beyond, a browser would have to hold too much
MOST_PLOTTED: Final = 300


@dataclass(frozen=True, slots=True)
class Detail:
    """How fine the plots of a page are: ``bins`` of time, and whether each tells its values under the pointer."""

    bins: int
    titles: bool


def detail_for(machines: int) -> Detail:
    """Return how fine plots can be so that a page of so many machines stays light."""
    if machines > MOST_WITH_TITLES:
        return Detail(MOST_BINS // 3, titles=False)
    return Detail(MOST_BINS if machines <= MOST_WITH_TITLES // 4 else MOST_BINS // 2, titles=True)


def plots(one: Assessment, detail: Detail) -> str:
    """Return the plots of a VM, or a sentence where there is nothing to plot."""
    seen = one.seen
    timeline = seen.timeline
    if not timeline:
        return "<h4>Over time</h4><p>There is no recovery point yet.</p>"
    span = span_for((point.created_at for point in timeline), seen.at, detail.bins)
    cycles = [point for point in timeline if point.by_cycle]

    def average(values: Iterator[tuple[datetime, float]]) -> tuple[float | None, ...]:
        return binned(span, values, lambda found: sum(found) / len(found))

    made = [
        plot(
            "RPO",
            "seconds",
            span,
            [Series("largest reached", binned(span, exposures(seen), max))],
            limit=RULES["rpo-late"].threshold_for(seen.interval_seconds),
            titles=detail.titles,
        ),
        plot(
            "Churn",
            "bytes",
            span,
            [Series("changed in a cycle", average((p.created_at, p.changed_bytes) for p in cycles), bars=True)],
            titles=detail.titles,
        ),
        plot(
            "Lag and cycle time",
            "seconds",
            span,
            [
                Series("lag", binned(span, ((p.created_at, p.latency_seconds) for p in cycles), max)),
                Series("cycle", binned(span, ((p.created_at, p.seconds) for p in cycles), max), style=2),
            ],
            limit=RULES["latency"].threshold_for(seen.interval_seconds),
            titles=detail.titles,
        ),
        plot(
            "Stored",
            "bytes",
            span,
            [Series("stored by a cycle", average((p.created_at, p.stored_bytes) for p in cycles), style=2, bars=True)],
            titles=detail.titles,
        ),
    ]
    return f'<h4>Over time</h4><div class="plots">{"".join(made)}</div>'


def exposures(seen: Observation) -> Iterator[tuple[datetime, float]]:
    """Yield what the RPO had grown to whenever a point made it small again, and what it is now.

    Points that were removed, or not read, lie between some: they shared the time equally, as far as is known.
    """
    restorable = [one for one in seen.timeline if one.point not in seen.damaged and not one.rewritten]
    for one, later in pairwise(restorable):
        grown = (later.published_at - one.created_at).total_seconds() / max(1, later.point - one.point)
        yield later.published_at, max(0.0, grown)
    if restorable:
        yield seen.at, max(0.0, (seen.at - restorable[-1].created_at).total_seconds())
