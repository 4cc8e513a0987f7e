"""Where a recovery machine's first delta begins: the point it was started from, and what tells its disks apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from conversion.manifest import Manifest
from replica.failback.ranges import extents_from
from vhdx.disk import Extents
from vhdx.extents import EMPTY, clipped, merged


@dataclass(frozen=True, slots=True)
class Departure:
    """A recovery machine was started from ``point``; since then the bitmap of that name records on each of its disks.

    ``converted``: by disk number, the ranges in which the disk that it was started with was not the point's. Where
    ``bitmap`` is None, or anything about it is in doubt, all is compared.
    """

    point: int
    bitmap: str | None
    converted: dict[int, Extents] = field(default_factory=dict)

    def ranges(self, number: int) -> Extents:
        """Return what was converted of a disk."""
        return self.converted.get(number, EMPTY)


def departure(point: int, bitmap: str | None, conversions: Iterable[tuple[int, Manifest]]) -> Departure:
    """Return the departure from what a standing holds: ``conversions`` are manifests by the number of the disk."""
    return Departure(point, bitmap, {number: converted_ranges(manifest) for number, manifest in conversions})


def recorded_and(also: Extents, recorded: Iterable[Extents], size: int) -> Iterator[Extents]:
    """Yield what a bitmap of a disk of ``size`` recorded, and ``also``, in ascending windows."""
    done = 0
    for window in recorded:
        end = int(window[-1, 1])
        yield merged([window, clipped(also, done, end)])
        done = end
    rest = clipped(also, done, size)
    if len(rest):
        yield rest


def converted_ranges(manifest: Manifest) -> Extents:
    """Return where a conversion wrote."""
    ranges = [(one.offset, one.end) for component in manifest.components for one in component.ranges]
    return extents_from(ranges)
