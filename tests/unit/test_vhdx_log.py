"""The log: entries round trip, the active sequence is found, torn writes are left out, and replay is what it says."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.vhdx_builder import ring
from vhdx.errors import CorruptDiskError, UnsupportedDiskError
from vhdx.log import LogEntry, ReplayPlan, descriptor_sectors, plan_replay
from vhdx.osfile import open_file
from vhdx.replay import Change, Overlay, ReplayedFile
from vhdx.structures import MIB

GUID = UUID(int=0x106)
SECTOR = 4096


def sector(seed: int) -> bytes:
    return bytes((seed + index * 7) % 251 for index in range(SECTOR))


def entry(number: int, tail: int, *writes: Change, guid: UUID = GUID, flushed: int = 0, last: int = 0) -> LogEntry:
    return LogEntry(number, guid, tail, flushed, last, writes)


def data_write(offset: int, seed: int) -> Change:
    return Change(offset, offset + SECTOR, sector(seed))


def plan(log: bytes, file_size: int = 8 * MIB) -> ReplayPlan:
    return plan_replay(log, log_guid=GUID, file_size=file_size, log_offset=MIB)


def numbers(log: bytes) -> list[int]:
    return [found.sequence_number for found in plan(log).entries]


def three(first: int = 5) -> list[LogEntry]:
    """Three entries of two sectors each, the newest of which needs all."""
    return [entry(first + index, 0, data_write((index + 2) * MIB, index)) for index in range(3)]


def test_an_entry_has_the_layout_of_the_specification() -> None:
    raw = entry(0x1_0000_0002, 8192, data_write(MIB, 3), Change(2 * MIB, 3 * MIB, None), flushed=7, last=9).encode()
    assert len(raw) == 2 * SECTOR
    assert raw[:4] == b"loge"
    assert int.from_bytes(raw[8:12], "little") == 2 * SECTOR
    assert int.from_bytes(raw[12:16], "little") == 8192
    assert int.from_bytes(raw[16:24], "little") == 0x1_0000_0002
    assert int.from_bytes(raw[24:28], "little") == 2
    assert raw[32:48] == GUID.bytes_le
    assert (raw[48], raw[56]) == (7, 9)
    assert raw[64:68] == b"desc"
    assert raw[68:72] == sector(3)[-4:]  # trailing bytes
    assert raw[72:80] == sector(3)[:8]  # leading bytes
    assert raw[96:100] == b"zero"
    assert int.from_bytes(raw[104:112], "little") == MIB
    assert raw[SECTOR : SECTOR + 8] == b"data" + b"\1\0\0\0"
    assert raw[-4:] == b"\2\0\0\0"


@pytest.mark.parametrize("count", [1, 126, 127, 254, 255])
def test_entries_round_trip_however_many_descriptor_sectors_they_need(count: int) -> None:
    writes = tuple(data_write(index * SECTOR, index) for index in range(count))
    log = ring(entry(9, 0, *writes), length=2 * MIB)
    found = plan(log)
    assert found.entries[0].writes == writes
    assert found.entries[0].length == (descriptor_sectors(count) + count) * SECTOR


def test_a_long_write_becomes_one_descriptor_for_each_sector() -> None:
    content = b"".join(sector(seed) for seed in range(5))
    found = plan(ring(entry(1, 0, Change(MIB, MIB + len(content), content))))
    assert b"".join(change.data or b"" for change in found.overlay.changes) == content


def test_the_sequence_runs_from_the_newest_entry_s_tail() -> None:
    first, second, third = three()
    assert numbers(ring(first, second, third)) == [5, 6, 7]
    assert numbers(ring(first, second, LogEntry(7, GUID, 2 * SECTOR, 0, 0, third.writes))) == [6, 7]
    assert numbers(ring(first, second, LogEntry(7, GUID, 4 * SECTOR, 0, 0, third.writes))) == [7]


def test_a_torn_tail_is_left_out() -> None:
    log = bytearray(ring(*three()))
    log[5 * SECTOR + 100] ^= 1  # in the data sector of the third
    found = plan(bytes(log))
    assert [item.sequence_number for item in found.entries] == [5, 6]
    assert found.torn == 1


def test_a_gap_in_the_sequence_numbers_ends_the_sequence() -> None:
    first, second, third = three()
    later = LogEntry(9, GUID, 0, 0, 0, third.writes)
    assert numbers(ring(first, second, later)) == [5, 6]


def test_the_highest_of_several_sequences_is_active_and_may_wrap_round_the_ring() -> None:
    old = [entry(number, 10 * SECTOR, data_write(3 * MIB, number)) for number in (2, 3)]
    new = [entry(number, MIB - 2 * SECTOR, data_write(4 * MIB, number)) for number in (7, 8)]
    log = bytearray(MIB)
    log[10 * SECTOR : 14 * SECTOR] = old[0].encode() + old[1].encode()
    log[-2 * SECTOR :] = new[0].encode()
    log[: 2 * SECTOR] = new[1].encode()
    assert numbers(bytes(log)) == [7, 8]


def test_an_entry_that_itself_wraps_round_the_ring_is_read() -> None:
    raw = entry(4, MIB - SECTOR, data_write(2 * MIB, 1)).encode()
    log = raw[SECTOR:] + bytes(MIB - 2 * SECTOR) + raw[:SECTOR]
    assert numbers(log) == [4]


def test_entries_of_another_log_are_not_seen() -> None:
    first, second, _ = three()
    foreign = entry(50, 4 * SECTOR, data_write(MIB, 9), guid=UUID(int=77))
    assert numbers(ring(first, second, foreign)) == [5, 6]
    assert numbers(ring(foreign)) == []


def test_a_first_entry_cut_off_by_a_crash_leaves_nothing_to_replay() -> None:
    log = bytearray(ring(entry(1, 0, data_write(MIB, 1))))
    log[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    found = plan(bytes(log))
    assert (found.entries, found.torn, bool(found.overlay)) == ((), 1, False)


def test_entries_that_make_no_sequence_are_corruption() -> None:
    log = bytearray(ring(*three()))
    for position in (0, 2, 4):
        log[(position + 1) * SECTOR + 9] ^= 255
    with pytest.raises(CorruptDiskError, match="no valid sequence"):
        plan(bytes(log))


def test_a_newest_entry_whose_tail_is_not_in_its_sequence_is_corruption() -> None:
    with pytest.raises(CorruptDiskError, match="no valid sequence"):
        plan(ring(entry(3, 40 * SECTOR, data_write(MIB, 1))))


def test_a_file_shorter_than_the_log_says_is_corruption() -> None:
    log = ring(entry(1, 0, data_write(MIB, 1), flushed=9 * MIB, last=12 * MIB))
    with pytest.raises(CorruptDiskError, match=str(9 * MIB)):
        plan(log, file_size=9 * MIB - 1)
    assert plan(log, file_size=9 * MIB).size_after == 12 * MIB


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 6 * SECTOR - 1), st.integers(1, 255))
def test_a_damaged_byte_anywhere_loses_at_most_what_follows_it(position: int, difference: int) -> None:
    log = bytearray(ring(*three()))
    log[position] ^= difference
    hit = position // (2 * SECTOR)
    try:
        found = plan(bytes(log))
    except CorruptDiskError:
        assert hit == 0  # the tail of every entry is the first: without it there is no sequence
        return
    survivors = [item.sequence_number for item in found.entries]
    assert survivors == [5, 6, 7][:hit] if hit else survivors == []


def test_a_log_of_more_changes_than_are_held_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = tuple(Change(4096 * number, 4096 * (number + 1), None) for number in range(300))
    log = ring(entry(1, 0, *zeros[:200]), entry(2, 0, *zeros[200:]))
    monkeypatch.setattr("vhdx.log.MAX_WRITES", 300)
    assert len(plan(log).entries) == 2
    monkeypatch.setattr("vhdx.log.MAX_WRITES", 299)
    with pytest.raises(UnsupportedDiskError, match="299 changes") as caught:
        plan(log)
    assert caught.value.hint


def test_many_overlapping_claims_cost_one_pass() -> None:
    # Every sector claims to begin an entry as long as the whole log.
    header = bytearray(entry(1, 0, data_write(MIB, 1)).encode()[:SECTOR])
    header[8:12] = (16 * MIB).to_bytes(4, "little")
    with pytest.raises(CorruptDiskError, match="4096 entries"):
        plan(bytes(header) * (16 * MIB // SECTOR))


@st.composite
def writes(draw: st.DrawFn) -> list[Change]:
    changes = []
    for seed in range(draw(st.integers(0, 12))):
        start = draw(st.integers(0, 30))
        if draw(st.booleans()):
            changes.append(data_write(start * SECTOR, seed))
        else:
            changes.append(Change(start * SECTOR, (start + draw(st.integers(1, 9))) * SECTOR, None))
    return changes


@settings(deadline=None, max_examples=150)
@given(writes(), st.integers(0, 45 * SECTOR), st.integers(0, 9 * SECTOR), st.integers(0, 40 * SECTOR))
def test_a_replayed_file_reads_as_if_each_write_had_been_made(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change], offset: int, length: int, size_after: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "replayed"
    content = b"".join(sector(100 + index) for index in range(20))
    path.write_bytes(content)
    model = bytearray(content.ljust(max(size_after, len(content)), b"\0"))
    for change in changes:
        model[change.start : change.end] = (
            b""
            if change.start >= len(model)
            else (change.data or bytes(change.end - change.start))[: len(model) - change.start]
        )
    overlay = Overlay.of(changes)
    ends = [change.end for change in overlay.changes]
    starts = [change.start for change in overlay.changes]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    with_log = ReplayedFile(open_file(path), overlay, size_after)
    assert with_log.size() == len(model)
    assert with_log.pread(offset, length) == bytes(model[offset : offset + length])
    buffer = bytearray(length)
    filled = with_log.pread_into(offset, memoryview(buffer))
    assert buffer[:filled] == model[offset : offset + length]
    assert Path(path).read_bytes() == content
