"""Runs measures in turn, several times over, and keeps every figure: a drift of the machine then hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Measure:
    """Something to be timed. ``prepare`` runs before each time, untimed; ``size`` is the bytes that it deals with."""

    name: str
    size: int
    work: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median time, seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """MiB a second at the median."""
        return self.size / self.median / (1 << 20)


def run_in_turn(measures: Sequence[Measure], runs: int) -> None:
    """Time each measure ``runs`` times, one after the other in each round."""
    for _ in range(runs):
        for measure in measures:
            measure.prepare()
            gc.collect()
            start = time.perf_counter()
            measure.work()
            measure.seconds.append(time.perf_counter() - start)


def ratios(measure: Measure, limit: Measure) -> list[float]:
    """Return the share of the limit that was reached, round by round."""
    return [
        (measure.size / own) / (limit.size / theirs) for own, theirs in zip(measure.seconds, limit.seconds, strict=True)
    ]
