"""A point's content as a whole: its maps laid over one another, read by range; and when maps are merged into levels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from replica.block import disk_base
from replica.maptable import EncodedPart, Entries, MapPart, MapWriter, SegmentTable, newest_wins
from replica.model import MapPartRef, MapRef

WINDOW_BLOCKS: Final = 65536  # 4 GiB of disk; divides every disk's base key
MERGE_MAPS: Final = 8
LEVEL_ZERO_ENTRIES: Final = 1024
CACHE_BYTES: Final = 96 << 20

FetchPart: TypeAlias = Callable[[MapPartRef], MapPart]


@dataclass(frozen=True, slots=True)
class Window:
    """The entries of the block keys [first, end), newest winning, with the table that their segments count in."""

    first: int
    end: int
    entries: Entries
    table: SegmentTable


class BlockMap:
    """The maps of a point, oldest first, as one table.

    Memory: decoded parts up to ``CACHE_BYTES`` (at least one), and a window (about 40 bytes a block, 2.5 MiB).
    """

    def __init__(self, maps: Sequence[MapRef], fetch: FetchPart) -> None:
        self._maps = maps
        self._fetch = fetch
        self._cache: OrderedDict[MapPartRef, MapPart] = OrderedDict()

    def window(self, first: int, end: int) -> Window:
        """Return what the maps say of the block keys [first, end). Raises IntegrityError or StoreError."""
        table = SegmentTable()
        found = [
            self._part(ref).entries_between(first, end, table)
            for one in self._maps
            for ref in one.parts
            if ref.first_key < end and ref.last_key >= first
        ]
        return Window(first, end, newest_wins(found), table)

    def next_key(self, key: int) -> int | None:
        """Return a key of at least ``key`` below which, from ``key`` on, no map has an entry; None where none has."""
        nearest: int | None = None
        for one in self._maps:
            for ref in one.parts:
                if ref.last_key < key:
                    continue
                found = ref.first_key if ref.first_key >= key else self._part(ref).next_key(key)
                if found is not None and (nearest is None or found < nearest):
                    nearest = found
                break  # later parts of the map begin later
        return nearest

    def windows(self, first: int, end: int) -> Iterator[Window]:
        """Yield the windows of [first, end) that have entries, ascending, aligned to ``WINDOW_BLOCKS``."""
        position = self.next_key(first)
        while position is not None and position < end:
            start = max(first, position // WINDOW_BLOCKS * WINDOW_BLOCKS)
            stop = min(end, (position // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS)
            window = self.window(start, stop)
            if len(window.entries):
                yield window
            position = self.next_key(stop)

    def _part(self, ref: MapPartRef) -> MapPart:
        part = self._cache.get(ref)
        if part is None:
            part = self._cache[ref] = self._fetch(ref)
            while sum(held.size for held in self._cache) > CACHE_BYTES and len(self._cache) > 1:
                self._cache.popitem(last=False)
        self._cache.move_to_end(ref)
        return part


def level_for(entries: int) -> int:
    """Return the level that a map of so many entries is worth."""
    level = 0
    while LEVEL_ZERO_ENTRIES << (3 * level) < entries:
        level += 1
    return level


def plan_merge(levels: Sequence[int], new_level: int) -> tuple[int, int]:
    """Decide what a new map is merged with. ``levels`` are those of the maps before it, oldest first.

    Return how many of the oldest maps stay as they are, and the level of the map that takes the place of all others.
    """
    kept = len(levels)
    while kept and levels[kept - 1] < new_level:
        kept -= 1
    while True:
        same = 0
        while same < kept and levels[kept - 1 - same] == new_level:
            same += 1
        if same + 1 < MERGE_MAPS:
            return kept, new_level
        kept -= same
        new_level += 1


def merge_into(
    writer: MapWriter, merged: BlockMap, *, keep_zeros: bool, disks: Collection[int] | None = None
) -> Iterator[EncodedPart]:
    """Write the entries of ``merged`` through ``writer``, without ``keep_zeros`` only data; yield the parts.

    ``disks`` are the numbers of the disks that the new point has: entries of others are left out, since nobody asks
    for them. None keeps all.
    """
    ranges = [(0, 1 << 64)] if disks is None else [(disk_base(one), disk_base(one + 1)) for one in sorted(disks)]
    for first, end in ranges:
        for window in merged.windows(first, end):
            entries = window.entries if keep_zeros else window.entries.take(window.entries.is_data)
            yield from writer.append(entries, window.table)
    yield from writer.finish()
