"""Which segments a sampled verification reads on which day: a keyed rotation that needs no record of where it stands.

Every segment has a home day in a round of so many days, by a hash under the VM's seed. What a day's budget cannot take
goes on to the next day that can. The days of a round are a power of two with a fifth to spare: so a segment keeps its
day while others come and go, and a round that becomes twice as long, or half, has each segment on a day that was its
own before, or will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import xxhash

from replica.maptable import SegmentRef

LONGEST_ROUND_DAYS: Final = 1 << 16
SPARE: Final = 1.25


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be read in a day: bytes, or a share (over 0, up to 1) of all. Just one of the two is given."""

    size_bytes: int | None = None
    share: float | None = None

    def of(self, total_bytes: int) -> int:
        """Return the budget in bytes."""
        return self.size_bytes if self.size_bytes is not None else int((self.share or 1.0) * total_bytes)


@dataclass(frozen=True, slots=True)
class Turn:
    """The segments whose turn it is on one day of a round."""

    day: int  # from 0
    days: int
    segments: tuple[SegmentRef, ...]


def turn(refs: Sequence[SegmentRef], *, seed: int, budget: Budget, now: datetime) -> Turn:
    """Return those of the segments that are to be read today.

    While the segments are the same, each has its turn on just one of any ``days`` days in a row. A day's segments are
    within the budget, but for one that alone is larger.
    """
    total_bytes = sum(ref.size for ref in refs)
    budget_bytes = max(1, budget.of(total_bytes))
    hashed = sorted((_hash(ref, seed), ref) for ref in refs)
    days = 1
    while days < LONGEST_ROUND_DAYS:
        if total_bytes <= budget_bytes * days and (days == 1 or total_bytes * SPARE <= budget_bytes * days):
            break
        if days >= len(refs) * 2:  # nothing becomes smaller than a segment
            break
        days *= 2
    homes = _spread(hashed, days, budget_bytes)
    today = now.toordinal() % days
    return Turn(today, days, tuple(ref for ref in refs if homes[ref] == today))


def _spread(hashed: Sequence[tuple[int, SegmentRef]], days: int, budget_bytes: int) -> dict[SegmentRef, int]:
    """Return the day of each segment."""
    loads = [0] * days
    homes = {}
    for value, ref in hashed:
        home = value % days
        for step in range(days):
            day = (home + step) % days
            if not loads[day] or loads[day] + ref.size <= budget_bytes:
                break
        else:  # no day can take it within the budget: it may happen where segments are almost as large as that
            day = min(range(days), key=lambda one: loads[one])
        loads[day] += ref.size
        homes[ref] = day
    return homes


def _hash(ref: SegmentRef, seed: int) -> int:
    name = f"{ref.vm_id}/{ref.part.point}/{ref.part.epoch}/{ref.part.ordinal}"
    return xxhash.xxh3_64_intdigest(name.encode(), seed)
