"""What a machine's disks were when a recovery machine was started from a point: where its first delta begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # half-open, bytes, ascending, apart from each other


@dataclass(frozen=True, slots=True)
class ReverseDisk:
    """A disk of the recovery machine: the bitmap that records since its start, and what was changed before that.

    ``changed`` are the ranges in which the disk that the machine started from differed from the point: what the
    conversion wrote. ``bitmap`` is None where the platform keeps none: all is compared then.
    """

    number: int
    bitmap: str | None
    changed: Ranges = ()


@dataclass(frozen=True, slots=True)
class ReverseBase:
    """The ``point`` that a recovery machine was started from, and what tells its disks apart from it."""

    point: int
    disks: tuple[ReverseDisk, ...] = field(default=())

    def disk(self, number: int) -> ReverseDisk | None:
        """Return what is known of a disk."""
        return next((one for one in self.disks if one.number == number), None)

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "point": self.point,
            "disks": [
                {"number": one.number, "bitmap": one.bitmap, "changed": [list(pair) for pair in one.changed]}
                for one in self.disks
            ],
        }


def changed_ranges(written: list[tuple[int, bytes]]) -> Ranges:
    """Return where a conversion wrote, from the (offset, data) of its overlay; ranges that touch are one."""
    ranges: list[tuple[int, int]] = []
    for offset, data in sorted(written, key=lambda one: one[0]):
        end = offset + len(data)
        if ranges and offset <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((offset, end))
    return tuple(ranges)
