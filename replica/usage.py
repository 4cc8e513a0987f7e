"""Usage: how many bytes of each segment a recovery point needs, and which segments are thin. Only reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from replica.block import Digest, disk_base
from replica.blockmap import BlockMap, FetchPart, Window
from replica.errors import IntegrityError
from replica.keys import VmKeys
from replica.maptable import MapPart, SegmentRef
from replica.model import DiskRecord, MapPartRef, Point
from replica.pipeline import nothing
from replica.reader import digest_of
from replica.segment import HEADER_BYTES, INDEX_ROW, TRAILER_BYTES

THIN_PERCENT: Final = 25
REWRITTEN_BYTES: Final = 256 << 20  # copied in one run at the most
LEAST_GAIN_BYTES: Final = 16 << 20
FIXED_BYTES: Final = HEADER_BYTES + TRAILER_BYTES  # of a segment, however little is in it
GAIN_PER_MAP_BYTE: Final = 4  # a run writes the whole map anew: it has to be worth that


@dataclass(frozen=True, slots=True)
class Terms:
    """When segments are rewritten: a segment is thin of which the newest point needs less than ``percent``.

    In one run no more than ``most_bytes`` are copied, and nothing is done that would not free ``least_gain_bytes``.
    """

    percent: int = THIN_PERCENT
    most_bytes: int = REWRITTEN_BYTES
    least_gain_bytes: int = LEAST_GAIN_BYTES


DEFAULT: Final = Terms()


@dataclass(slots=True)
class Usage:
    """The segments that a point's maps name, each with the bytes of its frames, and their index, that the point needs.

    Memory: about 400 bytes for each segment.
    """

    needed: dict[SegmentRef, int] = field(default_factory=dict)
    map_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Thin:
    """Segments to be rewritten: what is copied of them, the room that they take, and what going without them frees."""

    segments: frozenset[SegmentRef] = frozenset()
    copied_bytes: int = 0
    total_bytes: int = 0

    @property
    def gain_bytes(self) -> int:
        """The room that is freed, once no older point needs the segments."""
        return self.total_bytes - self.copied_bytes


def of_point(point: Point, fetch: FetchPart, *, tick: Callable[[], None] = nothing) -> Usage:
    """Read all maps of a point. Raises IntegrityError where they cannot be read, or are not what the manifest says."""
    usage = Usage()
    seen: set[MapPartRef] = set()

    def noted(ref: MapPartRef) -> MapPart:
        part = fetch(ref)
        if ref not in seen:
            seen.add(ref)
            for segment in part.segment_refs():
                usage.needed.setdefault(segment, 0)
        return part

    block_map = BlockMap(point.maps, noted)
    for disk in point.disks:
        check = DiskCheck(disk)
        for window in block_map.windows(disk_base(disk.number), disk_base(disk.number + 1)):
            check.add(window)
            _count(usage, window)
            tick()
        check.finish()
    for ref in (ref for one in point.maps for ref in one.parts):
        usage.map_bytes += ref.size
        if ref not in seen:  # it tells of disks alone that the point no longer has
            noted(ref)
    return usage


def _count(usage: Usage, window: Window) -> None:
    data = window.entries.take(window.entries.is_data)
    sizes = data.lengths + np.uint32(INDEX_ROW.itemsize)
    sums = np.bincount(data.segments, weights=sizes, minlength=len(window.table.refs))
    for ref, length in zip(window.table.refs, sums.tolist(), strict=True):
        usage.needed[ref] += int(length)


class DiskCheck:
    """Holds what maps say of a disk against what the manifest says of it."""

    def __init__(self, disk: DiskRecord) -> None:
        self._disk = disk
        self._digest = Digest()
        self._blocks = 0

    def add(self, window: Window) -> None:
        """Count a window in."""
        digest, blocks = digest_of(window)
        self._digest.combine(digest, Digest())
        self._blocks += blocks

    def finish(self) -> None:
        """Raise IntegrityError where the windows were others than those that the manifest was made for."""
        if (self._digest, self._blocks) != (self._disk.digest, self._disk.data_blocks):
            raise IntegrityError(
                f"the maps of {self._disk.name} hold other blocks than the newest point's manifest says",
                hint="'godwit verify' tells what that costs, and 'godwit repair' puts right what can be",
            )


def thin(usage: Usage, keys: VmKeys, terms: Terms, is_lent: Callable[[SegmentRef], bool]) -> Thin:
    """Choose the segments of the VM to be rewritten, the thinnest first; none where it would not be worth it.

    A segment that another VM refers to (``is_lent``), or that is another VM's, would stay whatever is done here.
    """
    found = [
        (needed / ref.size, ref, needed)
        for ref, needed in usage.needed.items()
        if needed * 100 < (ref.size - FIXED_BYTES) * terms.percent and ref.vm_id == keys.vm_id and not is_lent(ref)
    ]
    chosen: set[SegmentRef] = set()
    copied = total = 0
    for _, ref, needed in sorted(found):
        if copied + needed > terms.most_bytes:
            break
        chosen.add(ref)
        copied += needed
        total += ref.size
    made = Thin(frozenset(chosen), copied, total)
    least = max(terms.least_gain_bytes, GAIN_PER_MAP_BYTE * usage.map_bytes)
    return made if made.gain_bytes >= least else Thin()
