"""When things are due: a place of its own in each period for every VM, and the pauses after failures. Pure."""

from __future__ import annotations

import math
from typing import Final

import xxhash

# Minutes after the first, second, … failure in a row, and then again and again: those of Azure Site Recovery.
RETRY_MINUTES: Final = (1, 2, 4, 8, 10)
RETRY_LATER_MINUTES: Final = 30
SPREAD_SECONDS: Final = 300.0  # over which what is overdue when an agent starts is spread, at the most


def retry_seconds(failures: int) -> float:
    """Return how long to wait after so many failures in a row (from 1)."""
    if failures <= len(RETRY_MINUTES):
        return RETRY_MINUTES[failures - 1] * 60.0
    return RETRY_LATER_MINUTES * 60.0


def phase(vm_id: str, task: str) -> float:
    """Return where in each period a VM has its turn, in [0, 1): the same on every machine and after every start."""
    return xxhash.xxh3_64_intdigest(f"{task}/{vm_id}".encode()) / 2.0**64


def next_slot(after: float, period: float, at_phase: float) -> float:
    """Return the first moment later than ``after`` whose turn it is; all in seconds, moments since 1970."""
    offset = at_phase * period
    slot = math.floor((after - offset) / period) * period + offset
    while slot <= after:  # once, as a rule; twice where floating point rounds
        slot += period
    return slot


def tolerance(period: float) -> float:
    """Return by how many seconds something may begin before its turn, and count as begun at it: clocks differ."""
    return min(1.0, period / 10)


def missed_slots(begun: float, ended: float, period: float, at_phase: float) -> int:
    """Return how many turns came while what began at ``begun`` was under way until ``ended``."""
    first = next_slot(begun, period, at_phase)
    return 0 if first > ended else 1 + math.floor((ended - first) / period + 1e-9)


def first_due(now: float, last: float | None, period: float, at_phase: float) -> float:
    """Return when something is due first that was last done at ``last``, None for never or not known.

    At its turn; or earlier, spread over some minutes, where it would be overdue until then.
    """
    slot = next_slot(now, period, at_phase)
    if period <= SPREAD_SECONDS:
        return slot
    if last is not None and now >= last and slot - last <= period + tolerance(period):
        return slot
    return min(slot, now + at_phase * SPREAD_SECONDS)
