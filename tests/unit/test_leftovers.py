"""What unfinished cycles left: found by key and hash, whatever is damaged left aside."""

from __future__ import annotations

import random

import numpy as np
import pytest

from replica import leftovers
from replica.block import BLOCK_BYTES, disk_base, hash_blocks
from replica.keys import PartId, VmKeys
from replica.leftovers import Leftovers
from replica.maptable import Entries, SegmentTable
from replica.segment import FrameCompressor, SegmentWriter
from replica.stores.memory import MemoryStore
from tests.support.engine import random_blocks
from tests.support.store_doubles import RecordingStore

KEYS = VmKeys("default", "0f" * 16)
SEED = 5


def put_segment(store: MemoryStore, part: PartId, keys: list[int], data: bytes) -> bytes:
    view = memoryview(data)
    frames = FrameCompressor(1).compress(view, np.arange(len(keys)), np.array(keys, np.uint64), hash_blocks(view, SEED))
    writer = SegmentWriter(KEYS.vm_id, part)
    writer.append(frames)
    sealed = bytes(writer.seal())
    store.create(KEYS.segment(part), sealed)
    return sealed


def find(left: Leftovers, keys: list[int], data: bytes) -> tuple[Entries, SegmentTable, list[bool]]:
    entries, table, is_found = left.find(np.array(keys, np.uint64), hash_blocks(memoryview(data), SEED))
    return entries, table, is_found.tolist()


def test_only_blocks_of_the_same_key_and_content_are_found() -> None:
    store = MemoryStore()
    data = random_blocks(1, 4)
    sealed = put_segment(store, PartId(3, 1, 0), [10, 11, 12, disk_base(1)], data)
    left = Leftovers.after(store, KEYS, 2)
    asked = [9, 10, 11, 12, disk_base(1)]
    other = random_blocks(2, 1)
    content = [
        data[:BLOCK_BYTES],
        data[:BLOCK_BYTES],
        other,
        data[2 * BLOCK_BYTES : 3 * BLOCK_BYTES],
        data[3 * BLOCK_BYTES :],
    ]
    entries, table, is_found = find(left, asked, b"".join(content))
    assert is_found == [False, True, False, True, True]
    assert entries.keys.tolist() == [10, 12, disk_base(1)]
    (ref,) = table.refs
    assert (ref.vm_id, ref.part, ref.size) == (KEYS.vm_id, PartId(3, 1, 0), len(sealed))
    assert entries.segments.tolist() == [0, 0, 0]
    assert (entries.hashes == hash_blocks(memoryview(b"".join(content)), SEED)[[1, 3, 4]]).all()
    ends = entries.offsets + entries.lengths
    assert entries.offsets.min() >= 64
    assert ends.max() < len(sealed)


def test_segments_of_published_points_are_not_leftovers() -> None:
    store = MemoryStore()
    for point in (1, 2, 3, 12):
        put_segment(store, PartId(point, 1, 0), [point], random_blocks(point, 1))
    assert len(Leftovers.after(store, KEYS, 2)) == 2
    assert len(Leftovers.after(store, KEYS, 12)) == 0
    assert len(Leftovers.after(store, KEYS, 0)) == 4


def test_several_cycles_that_were_cut_off_are_all_used() -> None:
    store = MemoryStore()
    data = random_blocks(1, 3)
    put_segment(store, PartId(1, 1, 0), [0, 1], data[: 2 * BLOCK_BYTES])
    put_segment(store, PartId(1, 2, 0), [1, 2], random_blocks(9, 1) + data[2 * BLOCK_BYTES :])
    put_segment(store, PartId(2, 3, 7), [1], data[BLOCK_BYTES : 2 * BLOCK_BYTES])
    entries, table, is_found = find(Leftovers.after(store, KEYS, 0), [0, 1, 2], data)
    assert is_found == [True] * 3
    assert [table.refs[number].part for number in entries.segments.tolist()] == [
        PartId(1, 1, 0),
        PartId(1, 1, 0),
        PartId(1, 2, 0),
    ]


def test_nothing_left_finds_nothing_and_asks_nothing() -> None:
    data = random_blocks(1, 2)
    assert find(Leftovers(), [0, 1], data)[2] == [False, False]
    assert find(Leftovers.after(MemoryStore(), KEYS, 0), [0, 1], data)[2] == [False, False]
    store = MemoryStore()
    put_segment(store, PartId(1, 1, 0), [5], random_blocks(1, 1))
    assert find(Leftovers.after(store, KEYS, 0), [], b"")[2] == []


def test_damaged_segments_are_left_aside() -> None:
    store = MemoryStore()
    data = random_blocks(1, 3)
    sealed = put_segment(store, PartId(1, 1, 0), [0, 1, 2], data)
    drawn = random.Random(1)
    damaged = [sealed[:-1], sealed[:100], sealed[:10], b"", sealed[64:], sealed + b"x"]
    for at in [0, 9, 30, 57, *(drawn.randrange(len(sealed) - 180, len(sealed)) for _ in range(20))]:
        if len(sealed) - 32 <= at < len(sealed) - 16:
            continue  # the checksum over everything is not asked for here
        damaged.append(sealed[:at] + bytes([sealed[at] ^ 4]) + sealed[at + 1 :])
    for ordinal, content in enumerate(damaged, 1):
        store.create(KEYS.segment(PartId(1, 1, ordinal)), content)
    store.create(KEYS.segments + "00000000000000000001/stray", b"not ours")
    # A whole segment under the wrong key is not what its key says either.
    store.create(KEYS.segment(PartId(1, 2, 0)), sealed)
    left = Leftovers.after(store, KEYS, 0)
    assert len(left) == 1
    assert find(left, [0, 1, 2], data)[2] == [True] * 3


def test_many_segments_hold_few_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "INDEXES_HELD", 2)
    store = MemoryStore()
    data = random_blocks(1, 12)
    for n in range(6):
        put_segment(store, PartId(1, 1, n), [2 * n, 2 * n + 1], data[2 * n * BLOCK_BYTES : (2 * n + 2) * BLOCK_BYTES])
    recording = RecordingStore(store)
    left = Leftovers.after(recording, KEYS, 0)
    recording.forget()
    entries, _, is_found = find(left, list(range(12)), data)
    assert is_found == [True] * 12
    assert entries.keys.tolist() == list(range(12))
    assert recording.counts["get"] > 0  # indexes that had to leave were read again
    recording.forget()
    assert find(left, [10, 11], data[10 * BLOCK_BYTES :])[2] == [True, True]
    assert recording.counts["get"] == 0
