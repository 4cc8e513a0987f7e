"""Free sectors of a disk: what no partition and no table occupies, and taking pieces of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class FreeSectors:
    """Half-open ranges of sectors, sorted and apart from each other."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def between(cls, occupied: Iterable[tuple[int, int]], sectors: int) -> FreeSectors:
        """Return what of [0, sectors) lies outside of the occupied ranges, which may overlap and come in any order."""
        free, position = [], 0
        for first, end in sorted(occupied):
            if first > position:
                free.append((position, min(first, sectors)))
            position = max(position, end)
        if position < sectors:
            free.append((position, sectors))
        return cls([(first, end) for first, end in free if first < end])

    def without(self, first: int, end: int) -> FreeSectors:
        """Return what is left when [first, end) is taken."""
        left = []
        for start, stop in self.ranges:
            left += [piece for piece in ((start, min(stop, first)), (max(start, end), stop)) if piece[0] < piece[1]]
        return FreeSectors(left)

    def places(self, sectors: int) -> list[int]:
        """Return the first sector of every range that has room for ``sectors``, ascending."""
        return [start for start, stop in self.ranges if stop - start >= sectors]
