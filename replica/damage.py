"""What verification finds wrong, as values: damaged objects, the points and byte ranges that they cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from replica.block import BLOCK_BYTES, KeyArray, block_count, disk_base
from replica.model import DiskRecord

RANGES_NAMED: Final = 16

KeyRanges: TypeAlias = npt.NDArray[np.uint64]  # shape (n, 2): half-open ranges of block keys, ascending, apart


@dataclass(frozen=True, slots=True)
class DiskDamage:
    """What of one disk cannot be read: half-open byte ranges, ascending, the first ``RANGES_NAMED`` of them."""

    number: int
    name: str
    damaged_bytes: int  # in all ranges
    ranges: int  # how many there are
    ranges_bytes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: the object concerned, what was found, and what that costs a point's disks."""

    key: str | None
    message: str
    disks: tuple[DiskDamage, ...] = ()


@dataclass(frozen=True, slots=True)
class PointVerdict:
    """What verification found of one point; it restores if nothing is damaged."""

    point: int
    damage: tuple[Damage, ...]
    objects: int
    read_bytes: int
    whole_disks: tuple[int, ...] = ()  # numbers of the disks that restore in any case

    @property
    def restores(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.damage


@dataclass(frozen=True, slots=True)
class DamagedObject:
    """An object that is damaged or missing, and all that it costs: points ascending, ranges of all of them together."""

    key: str | None
    message: str
    points: tuple[int, ...]
    disks: tuple[DiskDamage, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a sampled verification read: the share of one day, of a round in which everything has its turn once."""

    day: int  # of the round, from 0
    days: int  # of a round
    segments: int
    read_bytes: int
    total_segments: int
    total_bytes: int

    @property
    def percent(self) -> float:
        """The share of the bytes that was read."""
        return 100.0 * self.read_bytes / self.total_bytes if self.total_bytes else 100.0


@dataclass(frozen=True, slots=True)
class Report:
    """What verification found. ``full``: every block was read and hashed; otherwise only presence and sizes.

    With ``sample`` a part of the segments was read as well.
    """

    full: bool
    verdicts: tuple[PointVerdict, ...]
    unreadable: tuple[Damage, ...]  # manifests that cannot be read, so that their points are unknown
    segments: tuple[Damage, ...] = ()  # segments that are not as they were written, whether a point is harmed or not
    objects: tuple[DamagedObject, ...] = ()
    sample: Sample | None = None

    @property
    def damaged(self) -> bool:
        """Whether anything was found wrong."""
        return bool(self.unreadable or self.segments) or not all(verdict.restores for verdict in self.verdicts)

    @property
    def newest_whole(self) -> int | None:
        """The number of the newest point in which nothing was found wrong, None where there is none."""
        return max((verdict.point for verdict in self.verdicts if verdict.restores), default=None)


def no_ranges() -> KeyRanges:
    """Return no ranges."""
    return np.empty((0, 2), np.uint64)


def ranges_of(keys: KeyArray) -> KeyRanges:
    """Return the ranges that ascending block keys make up."""
    if not len(keys):
        return no_ranges()
    edges = np.flatnonzero(np.diff(keys) != 1)
    first = keys[np.concatenate(([0], edges + 1))]
    last = keys[np.concatenate((edges, [len(keys) - 1]))]
    return np.stack((first, last + np.uint64(1)), axis=1)


def merged(parts: Sequence[KeyRanges]) -> KeyRanges:
    """Return all ranges together; those that touch or overlap become one."""
    joined = np.concatenate(parts) if parts else no_ranges()
    if len(joined) < 2:
        return joined
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    reach = np.maximum.accumulate(joined[:, 1])
    starts = np.concatenate(([0], np.flatnonzero(joined[1:, 0] > reach[:-1]) + 1))
    ends = np.concatenate((starts[1:] - 1, [len(joined) - 1]))
    return np.stack((joined[starts, 0], reach[ends]), axis=1)


def on_disks(ranges: KeyRanges, disks: Iterable[DiskRecord]) -> tuple[DiskDamage, ...]:
    """Return what merged ranges of block keys mean on each of the disks; disks that they do not touch are left out."""
    found = []
    for disk in disks:
        base, end = np.uint64(disk_base(disk.number)), np.uint64(disk_base(disk.number) + block_count(disk.size))
        own = ranges[(ranges[:, 0] < end) & (ranges[:, 1] > base)]
        if not len(own):
            continue
        blocks = (np.clip(own, base, end) - base).astype(np.int64)
        places = np.minimum(blocks * BLOCK_BYTES, disk.size)
        named = tuple((int(start), int(stop)) for start, stop in places[:RANGES_NAMED].tolist())
        total = int((places[:, 1] - places[:, 0]).sum())
        found.append(DiskDamage(disk.number, disk.name, total, len(places), named))
    return tuple(found)
