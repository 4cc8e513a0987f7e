"""What damage costs: which points, disks and byte ranges, against what an oracle finds block by block."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import catalog, packer
from replica.damage import RANGES_NAMED, Report, merged, on_disks, ranges_of
from replica.verify import verify
from tests.support.damage import exchange, harm, maps, segments
from tests.support.engine import BLOCK, WORKERS, Lab, make_host, make_lab, random_blocks

numbers = st.lists(st.integers(0, 300), unique=True).map(sorted)


@given(keys=numbers)
@settings(max_examples=60, deadline=None)
def test_ranges_hold_just_the_keys(keys: list[int]) -> None:
    ranges = ranges_of(np.array(keys, np.uint64)).tolist()
    assert [key for start, end in ranges for key in range(start, end)] == keys
    assert all(one[1] < later[0] for one, later in pairwise(ranges))


@given(parts=st.lists(numbers, max_size=5))
@settings(max_examples=60, deadline=None)
def test_merged_ranges_are_the_union(parts: list[list[int]]) -> None:
    joined = merged([ranges_of(np.array(keys, np.uint64)) for keys in parts]).tolist()
    assert [key for start, end in joined for key in range(start, end)] == sorted(
        {key for keys in parts for key in keys}
    )
    assert all(one[1] < later[0] for one, later in pairwise(joined))


def check(lab: Lab, *, full: bool) -> Report:
    return verify(lab.store, lab.host, lab.found, full=full, workers=WORKERS)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Two points of two disks: the second changed blocks 2 and 3 of the first disk."""
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 64)
    made = make_lab(tmp_path, [random_blocks(1, 10) + b"tail" * 128, random_blocks(2, 3)], host=make_host())
    made.replicate()
    made.patch(2 * BLOCK, random_blocks(3, 2))
    made.replicate()
    return made


@pytest.mark.parametrize("full", [False, True])
def test_a_lost_segment_costs_each_point_what_it_still_takes_from_it(lab: Lab, full: bool) -> None:
    (key,) = segments(lab, 1)
    lab.store.delete(key)
    report = check(lab, full=full)
    first, second = report.verdicts
    size = 10 * BLOCK + 512
    (of_first,), (of_second,) = first.damage, second.damage
    assert [(disk.number, disk.damaged_bytes, disk.ranges_bytes) for disk in of_first.disks] == [
        (0, size, ((0, size),)),
        (1, 3 * BLOCK, ((0, 3 * BLOCK),)),
    ]
    assert [(disk.number, disk.damaged_bytes, disk.ranges_bytes) for disk in of_second.disks] == [
        (0, size - 2 * BLOCK, ((0, 2 * BLOCK), (4 * BLOCK, size))),
        (1, 3 * BLOCK, ((0, 3 * BLOCK),)),
    ]
    (named,) = report.objects
    assert (named.key, named.points, named.disks[0].damaged_bytes) == (key, (1, 2), size)
    assert report.newest_whole is None


def test_a_flip_costs_only_its_block(lab: Lab) -> None:
    """The oracle: flip a bit inside of each frame, and look which block the report names."""
    (key,) = segments(lab, 1)
    data = lab.store.get(key)
    count = int.from_bytes(data[-56:-52], "little")
    index = int.from_bytes(data[-64:-56], "little")
    for row in range(count):
        at = index + row * 40
        block_key = int.from_bytes(data[at : at + 8], "little")
        offset = int.from_bytes(data[at + 8 : at + 12], "little")
        exchange(lab.store, key, data)
        harm(lab.store, key, "flipped", at=offset + 5)
        report = check(lab, full=True)
        (named,) = report.objects
        (disk,) = named.disks
        block = block_key & (1 << 48) - 1
        assert disk.number == block_key >> 48
        assert disk.ranges_bytes[0][0] == block * BLOCK
        assert disk.ranges == 1
        assert named.points == ((1,) if block_key in (2, 3) else (1, 2))
        assert report.verdicts[0].whole_disks == (1 - disk.number,)
        assert report.newest_whole == (2 if block_key in (2, 3) else None)


def test_a_block_that_a_newer_map_replaced_harms_the_newer_point_no_more(lab: Lab) -> None:
    lab.patch(2 * BLOCK, random_blocks(9, 2))
    lab.replicate()
    harm(lab.store, segments(lab, 2)[0], "missing")
    for full in (False, True):
        report = check(lab, full=full)
        assert [verdict.restores for verdict in report.verdicts] == [True, False, True]
        assert report.newest_whole == 3
    lab.assert_restores(1, 3)


@pytest.mark.parametrize("full", [False, True])
def test_a_damaged_map_costs_the_range_that_it_spoke_of(lab: Lab, full: bool) -> None:
    (key,) = maps(lab, 2)
    harm(lab.store, key, "flipped")
    report = check(lab, full=full)
    (named,) = report.objects
    assert (named.key, named.points) == (key, (2,))
    assert [(disk.number, disk.ranges_bytes) for disk in named.disks] == [(0, ((2 * BLOCK, 4 * BLOCK),))]
    assert report.verdicts[1].whole_disks == (1,)
    assert report.newest_whole == 1
    assert lab.restore(2, 1) == lab.contents()[1]


def test_a_damaged_segment_counts_also_for_a_point_of_which_a_map_is_damaged(lab: Lab) -> None:
    lab.store.delete(lab.found.keys.manifest(1))
    (segment,), (key,) = segments(lab, 1), maps(lab, 2)
    harm(lab.store, segment, "flipped", at=70)
    harm(lab.store, key, "flipped")
    report = check(lab, full=True)
    assert {one.key: one.points for one in report.objects} == {segment: (2,), key: (2,)}


def test_ranges_are_named_up_to_a_bound_and_counted_beyond(lab: Lab) -> None:
    point = catalog.newest_point(lab.store, lab.found)
    keys = np.arange(0, 10, 2, dtype=np.uint64)
    (damage,) = on_disks(ranges_of(keys), point.disks)
    assert (damage.ranges, len(damage.ranges_bytes)) == (5, 5)
    many = ranges_of(np.arange(0, 4 * RANGES_NAMED, 2, dtype=np.uint64))
    (damage,) = on_disks(many, [replace(point.disks[0], size=1 << 40)])
    assert (damage.ranges, len(damage.ranges_bytes)) == (2 * RANGES_NAMED, RANGES_NAMED)
    assert damage.damaged_bytes == 2 * RANGES_NAMED * BLOCK
