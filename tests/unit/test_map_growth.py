"""How maps grow: the objects read to restore the newest of n points, and what is written for it, through real maps."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from replica.blockmap import BlockMap, plan_merge
from replica.keys import VmKeys
from replica.mapstore import MapBuilder, MapStore
from replica.maptable import MapPart, SegmentTable
from replica.model import MapPartRef, MapRef
from replica.stores.memory import MemoryStore
from tests.support.engine import random_entries
from tests.unit.test_maptable import Value, as_dict

KEYS = VmKeys("default", "0f" * 16)
BLOCKS = 1 << 24  # 1 TiB
POINTS = (10, 100, 1000, 10_000)
REAL = 1000  # of that many points maps are made
DOCUMENT = Path(__file__).parents[2] / "docs" / "requests.md"


class Growing:
    """The maps of a VM whose every cycle changes some blocks; nothing else of a cycle is done."""

    def __init__(self, seed: int, blocks: int) -> None:
        self.maps: tuple[MapRef, ...] = ()
        self.said: dict[int, Value] = {}
        self.fetched: Counter[MapPartRef] = Counter()
        self.written: list[int] = []  # bytes of map for each point
        self.rewritten = 0  # entries that were written again, as parts of merged maps
        self._drawn = random.Random(seed)
        self._blocks = blocks
        self._store = MapStore(MemoryStore("growth"), KEYS, None)

    def cycle(self) -> None:
        point = len(self.written) + 1
        table = SegmentTable()
        keys = sorted(self._drawn.sample(range(BLOCKS), self._blocks))
        entries = random_entries(point, keys, table, zeros=0.0)
        builder = MapBuilder(self._store, KEYS.vm_id, point, 1, self.maps, disks=[0], before_write=lambda: None)
        builder.append(entries, table)
        before, self.maps = self.maps, builder.finish()
        self.said.update(as_dict(entries, table))
        new = [part for one in self.maps if one not in before for part in one.parts]
        self.written.append(sum(part.size for part in new))
        self.rewritten += sum(part.entries for part in new) - self._blocks

    def fetch(self, ref: MapPartRef) -> MapPart:
        self.fetched[ref] += 1
        return self._store.fetch(ref)

    def read(self) -> dict[int, Value]:
        """Read all that the newest point's maps say, as a restore does."""
        self.fetched.clear()
        windows = BlockMap(self.maps, self.fetch).windows(0, 1 << 48)
        return {key: value for one in windows for key, value in as_dict(one.entries, one.table).items()}


def planned() -> dict[int, tuple[int, int, float]]:
    """For n points of one block each: maps of the newest, the most so far, how often an entry was written again."""
    maps: list[tuple[int, int]] = []  # level, entries
    found, most, rewritten = {}, 0, 0
    for number in range(1, max(POINTS) + 1):
        kept, level = plan_merge([one for one, _ in maps], 0)
        merged = sum(entries for _, entries in maps[kept:])
        maps[kept:] = [(level, merged + 1)]
        rewritten += merged
        most = max(most, len(maps))
        if number in POINTS:
            found[number] = len(maps), most, round(rewritten / number, 1)
    return found


def test_real_maps_grow_as_they_are_planned_to() -> None:
    made, most, found = Growing(1, blocks=1), 0, {}
    for number in range(1, REAL + 1):
        made.cycle()
        parts = sum(len(one.parts) for one in made.maps)
        most = max(most, parts)
        if number in POINTS:
            assert made.read() == made.said
            assert len(made.fetched) == parts
            assert set(made.fetched.values()) == {1}
            found[number] = parts, most, round(made.rewritten / number, 1)
    assert found == {number: row for number, row in planned().items() if number <= REAL}


def test_the_maps_that_a_restore_reads_grow_with_the_logarithm_of_the_points() -> None:
    rows = planned()
    for points, (_, most, rewritten) in rows.items():
        assert most <= 7 * (math.log(points, 8) + 1)
        assert rewritten <= math.log(points, 8)
    assert all(rows[more][1] - rows[fewer][1] <= 8 for fewer, more in pairwise(POINTS))


def test_cycles_of_a_hundred_blocks_write_little_of_maps_but_when_many_are_merged() -> None:
    made = Growing(2, blocks=100)
    for _ in range(66):
        made.cycle()
    assert made.read() == made.said
    large = [size for size in made.written if size > 48 << 10]
    assert len(large) == 1  # the sixty-fourth
    assert max(large) < 512 << 10


def test_the_document_says_the_same() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    said = {int(n.replace(",", "")): (int(now), int(most), float(again)) for n, now, most, again in rows}
    assert said == planned()
