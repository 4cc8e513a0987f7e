"""A point's maps as one table against a dictionary, and the levels: few maps, each entry rewritten seldom."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from replica import blockmap, maptable
from replica.block import disk_base
from replica.blockmap import (
    LEVEL_ZERO_ENTRIES,
    MERGE_MAPS,
    BlockMap,
    Window,
    level_for,
    merge_into,
    plan_merge,
)
from replica.keys import PartId
from replica.maptable import MapPart, MapWriter, SegmentTable
from replica.model import MapPartRef, MapRef
from tests.support.engine import random_entries
from tests.unit.test_maptable import Value, as_dict

VM = "0f" * 16


class Maps:
    """Maps made of random entries, and what they say together."""

    def __init__(self, seed: int, keys: list[int], count: int) -> None:
        self.fetches: Counter[PartId] = Counter()
        self.expected: dict[int, Value] = {}
        self.refs: list[MapRef] = []
        self._parts: dict[PartId, bytes] = {}
        drawn = random.Random(seed)
        for number in range(count):
            table = SegmentTable()
            picked = sorted(drawn.sample(keys, drawn.randrange(1, len(keys))))
            entries = random_entries(seed * 100 + number, picked, table, zeros=0.4)
            self.expected.update(as_dict(entries, table))
            writer = MapWriter(VM, number + 1, 1)
            made = [*writer.append(entries, table), *writer.finish()]
            self._parts.update({one.part: one.data for one in made})
            refs = [
                MapPartRef(one.part, one.entries, one.first_key, one.last_key, len(one.data), one.checksum)
                for one in made
            ]
            self.refs.append(MapRef(0, tuple(refs)))

    def fetch(self, ref: MapPartRef) -> MapPart:
        self.fetches[ref.part] += 1
        return MapPart(self._parts[ref.part], key=f"map {ref.part}", vm_id=VM, part=ref.part)

    def opened(self) -> BlockMap:
        return BlockMap(self.refs, self.fetch)


def window_dict(window: Window) -> dict[int, Value]:
    return as_dict(window.entries, window.table)


def some_keys(drawn: random.Random) -> list[int]:
    bases = [0, 5, 60, 64, 127, 128, 700, disk_base(1), disk_base(1) + 63, disk_base(9)]
    return sorted({base + drawn.randrange(20) for base in bases for _ in range(6)})


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maptable, "PAGE_ENTRIES", 5)
    monkeypatch.setattr(maptable, "PART_ENTRIES", 13)
    monkeypatch.setattr(blockmap, "WINDOW_BLOCKS", 64)


@pytest.mark.parametrize("seed", range(8))
def test_any_window_is_the_slice_of_the_dict(seed: int) -> None:
    drawn = random.Random(seed)
    maps = Maps(seed, some_keys(drawn), drawn.randrange(1, 6))
    opened = maps.opened()
    edges = [0, 2**63, *(key + d for key in maps.expected for d in (0, 1))]
    for _ in range(60):
        first, end = sorted(drawn.sample(edges, 2))
        window = opened.window(first, end)
        assert window_dict(window) == {k: v for k, v in maps.expected.items() if first <= k < end}
        assert (window.first, window.end) == (first, end)


@pytest.mark.parametrize("seed", range(8))
def test_windows_yield_every_entry_once_in_order_and_no_empty_window(seed: int) -> None:
    drawn = random.Random(seed)
    maps = Maps(seed, some_keys(drawn), drawn.randrange(1, 6))
    for first, end in ((0, 2**64), (0, disk_base(1)), (disk_base(1), disk_base(2)), (61, 130), (200, 600)):
        windows = list(maps.opened().windows(first, end))
        found = [key for window in windows for key in window_dict(window)]
        assert found == [key for key in sorted(maps.expected) if first <= key < end]
        for window in windows:
            assert len(window.entries)
            assert window.end - window.first <= 64
            assert window.first // 64 == (window.end - 1) // 64


@pytest.mark.parametrize("seed", range(8))
def test_no_key_lies_below_the_next_one(seed: int) -> None:
    drawn = random.Random(seed)
    maps = Maps(seed, some_keys(drawn), 4)
    opened = maps.opened()
    for key in [0, *(k + d for k in maps.expected for d in (0, 1, 2))]:
        later = [k for k in maps.expected if k >= key]
        found = opened.next_key(key)
        assert (found is None) == (not later)
        assert found is None or key <= found <= min(later)
    assert opened.next_key(max(maps.expected)) == max(maps.expected)
    assert opened.next_key(max(maps.expected) + 1) is None


def test_no_maps_have_no_windows() -> None:
    empty = BlockMap([], lambda ref: pytest.fail(f"fetched {ref}"))
    assert list(empty.windows(0, 2**64)) == []
    assert len(empty.window(0, 64).entries) == 0


def test_a_part_outside_the_range_is_not_fetched() -> None:
    maps = Maps(1, list(range(100)), 2)
    list(maps.opened().windows(0, 2**48))
    assert set(maps.fetches.values()) == {1}
    maps.fetches.clear()
    maps.opened().window(0, 1)
    assert all(ref.first_key == 0 for one in maps.refs for ref in one.parts if ref.part in maps.fetches)


def test_parts_leave_the_cache_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockmap, "CACHE_BYTES", 1)
    maps = Maps(2, list(range(100)), 3)
    opened = maps.opened()
    found = {key: value for window in opened.windows(0, 2**48) for key, value in window_dict(window).items()}
    assert found == maps.expected
    assert sum(maps.fetches.values()) > len(maps.fetches)


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_a_merge_says_what_the_maps_said(keep_zeros: bool) -> None:
    maps = Maps(3, some_keys(random.Random(3)), 5)
    writer = MapWriter(VM, 9, 1)
    made = list(merge_into(writer, maps.opened(), keep_zeros=keep_zeros))
    table = SegmentTable()
    found: dict[int, Value] = {}
    for one in made:
        part = MapPart(one.data, key="merged", vm_id=VM, part=one.part)
        found.update(as_dict(part.entries_between(0, 2**63, table), table))
    assert found == {k: v for k, v in maps.expected.items() if keep_zeros or v[0] is not None}


# --- levels


@pytest.mark.parametrize(
    "entries, level", [(0, 0), (1, 0), (1024, 0), (1025, 1), (8192, 1), (8193, 2), (65536, 2), (2**30, 7)]
)
def test_a_map_has_the_level_that_its_size_is_worth(entries: int, level: int) -> None:
    assert level_for(entries) == level
    assert level == 0 or LEVEL_ZERO_ENTRIES * 8 ** (level - 1) < entries <= LEVEL_ZERO_ENTRIES * 8**level


def simulate(sizes: list[int]) -> None:
    """Run cycles of these many entries, all of different blocks; check the promises of docs/format.md each time."""
    maps: list[tuple[int, dict[int, int]]] = []  # level, and how many cycles' entries have been rewritten how often
    total = 0
    worst_level = 0
    for number, size in enumerate(sizes, 1):
        total += size
        own = level_for(size)
        worst_level = max(worst_level, own)
        kept, level = plan_merge([one for one, _ in maps], own)
        assert 0 <= kept <= len(maps)
        assert level >= own
        merged = {number: own}
        for _, history in maps[kept:]:
            merged.update(history)
        if kept < len(maps):  # what is merged was rewritten: it must have climbed, and climbs at most to this level
            for cycle, before in merged.items():
                assert cycle == number or before < level, "rewritten without climbing a level"
            merged = dict.fromkeys(merged, level)
        maps[kept:] = [(level, merged)]
        levels = [one for one, _ in maps]
        assert levels == sorted(levels, reverse=True), "levels rise from oldest to newest"
        counts = Counter(levels)
        assert max(counts.values()) <= MERGE_MAPS - 1
        assert sum(len(history) for _, history in maps) == number, "a cycle's entries were lost or doubled"
        largest = worst_level + math.log(number, 8) + 1
        assert max(levels) <= largest
        assert len(maps) <= (MERGE_MAPS - 1) * (max(levels) + 1)
        if worst_level == 0:
            assert len(maps) <= 7 * (math.log(number, 8) + 1)


def test_equal_small_deltas_keep_few_maps_and_rewrite_each_entry_once_a_level() -> None:
    simulate([1] * 10_000)


@pytest.mark.parametrize("seed", range(6))
def test_deltas_of_any_size_keep_few_maps_and_rewrite_each_entry_once_a_level(seed: int) -> None:
    drawn = random.Random(seed)
    simulate([int(2 ** drawn.uniform(0, 22 if drawn.random() < 0.1 else 11)) for _ in range(2000)])


def test_growing_and_shrinking_deltas_keep_the_promises() -> None:
    simulate([2**n for n in range(25)])
    simulate([2 ** (24 - n) for n in range(25)])
    simulate([10**6, *[5] * 600, 10**6, *[3000] * 100])


def test_a_small_change_after_a_large_initial_cycle_rewrites_nothing_of_it() -> None:
    levels = [level_for(10**7)]
    for _ in range(6):
        kept, level = plan_merge(levels, 0)
        assert (kept, level) == (len(levels), 0)
        levels.append(0)
