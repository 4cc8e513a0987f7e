"""Hostile VHDX files: whatever is cut, flipped or contradicts itself ends in a DiskError, soon and in little memory."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.vhdx_builder import (
    BAT_OFFSET,
    LOG_OFFSET,
    METADATA_OFFSET,
    Block,
    ImageBuilder,
    parent_of,
    ring,
)
from vhdx.chain import open_vhdx
from vhdx.check import check_disk
from vhdx.errors import CorruptDiskError, DiskError, FormatUnknownError
from vhdx.log import LogEntry
from vhdx.replay import Change
from vhdx.structures import (
    BAT_REGION,
    HEADER_OFFSETS,
    HEADER_SIZE,
    METADATA_REGION,
    MIB,
    REGION_TABLE_OFFSETS,
    TABLE_SIZE,
    UINT64,
    RegionEntry,
    RegionTable,
    sealed,
)
from vhdx.structures import PayloadState as State

LOG = UUID(int=0x106)
READ_LIMIT = MIB
MEMORY_LIMIT = 48 * MIB


def child_builder() -> ImageBuilder:
    """Return a differencing disk with every kind of block and a log to replay."""
    builder = ImageBuilder(
        8 * MIB,
        parent_values=(*parent_of(UUID(int=7), "..\\parent.vhdx"), ("absolute_win32_path", "C:\\vm\\parent.vhdx")),
        log_guid=LOG,
    )
    data = bytes(range(256)) * 4096
    builder.blocks = {
        0: Block(State.FULLY_PRESENT, data),
        1: Block(State.PARTIALLY_PRESENT, data, [index % 3 == 0 for index in range(2048)]),
        2: Block(State.ZERO),
        3: Block(State.UNMAPPED),
        5: Block(State.PARTIALLY_PRESENT, data, [True] * 2048),
    }
    place = BAT_OFFSET + 2 * MIB
    writes = (Change(place, place + 4096, data[:4096]), Change(place + 8192, place + 65536, None))
    builder.log = ring(LogEntry(3, LOG, 0, 8 * MIB, 8 * MIB, writes), LogEntry(4, LOG, 0, 8 * MIB, 8 * MIB, writes[:1]))
    return builder


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    ImageBuilder(8 * MIB, data_write_guid=UUID(int=7)).write(folder / "parent.vhdx")
    return child_builder().write(folder / "child.vhdx")


def exercise(path: Path) -> bool:
    """Open, read, map and check; only DiskError may come out. Return whether all of it went well."""
    well = True
    try:
        check_disk(path)
    except DiskError:
        well = False
    try:
        with open_vhdx(path) as disk:
            for offset in (0, max(0, disk.size // 2 - READ_LIMIT // 2), max(0, disk.size - READ_LIMIT)):
                disk.read_at(offset, min(READ_LIMIT, disk.size - offset))
            for start in (0, max(0, disk.size - (1 << 40))):
                for _ in disk.allocated(start, min(disk.size, start + (1 << 40))):
                    pass
                for _ in disk.changed(start, min(disk.size, start + (1 << 40))):
                    pass
    except DiskError:
        well = False
    return well


def test_the_undamaged_disk_passes(child: Path) -> None:
    assert exercise(child)
    assert check_disk(child).sound


def structures() -> Iterator[tuple[int, int]]:
    """Yield the used bytes of every structure of the child: offset and length."""
    yield 0, 16
    for offset in HEADER_OFFSETS:
        yield offset, 80
    for offset in REGION_TABLE_OFFSETS:
        yield offset, 16 + 2 * 32
    yield METADATA_OFFSET, 32 + 6 * 32
    yield METADATA_OFFSET + TABLE_SIZE, 8 + 8 + 16 + 4 + 4 + 20 + 5 * 12 + 60
    yield BAT_OFFSET, 8 * 8
    yield BAT_OFFSET + 4096 * 8, 8  # the sector bitmap's entry
    yield LOG_OFFSET, 64 + 2 * 32
    yield LOG_OFFSET + 4096, 16


RESEALED = {**dict.fromkeys(HEADER_OFFSETS, HEADER_SIZE), **dict.fromkeys(REGION_TABLE_OFFSETS, TABLE_SIZE)}


@pytest.mark.parametrize("reseal", [False, True], ids=["flipped", "flipped and checksummed again"])
def test_any_damaged_byte_of_any_structure_is_answered_with_our_errors(child: Path, reseal: bool) -> None:
    generator = random.Random(5)
    failed = 0
    with child.open("rb+") as file:
        for offset, length in structures():
            size = RESEALED.get(offset, 2 * 4096 if offset == LOG_OFFSET else length)
            if reseal and offset not in RESEALED and offset != LOG_OFFSET:
                continue
            file.seek(offset)
            original = file.read(max(size, length))
            for position in range(length):
                damaged = bytearray(original)
                if generator.random() < 0.3:
                    damaged[position] = generator.choice([0, 0x7F, 0xFF])
                else:
                    damaged[position] ^= 1 << generator.randrange(8)
                file.seek(offset)
                file.write(sealed(damaged) if reseal else damaged)
                file.flush()
                failed += not exercise(child)
            file.seek(offset)
            file.write(original)
            file.flush()
    assert failed > 20
    assert exercise(child)


def test_every_truncation_is_answered_with_our_errors(child: Path, tmp_path: Path) -> None:
    whole = child.read_bytes()
    shutil.copy(child.with_name("parent.vhdx"), tmp_path)
    generator = random.Random(6)
    edges = {offset + delta for offset, length in structures() for delta in (-1, 0, 1, length - 1, length)}
    edges |= {boundary + delta for boundary in range(0, len(whole), MIB) for delta in (-1, 0, 1)}
    edges |= {generator.randrange(len(whole)) for _ in range(60)}
    path = tmp_path / "cut.vhdx"
    for length in sorted(edge for edge in edges if 0 <= edge < len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((CorruptDiskError, FormatUnknownError)), open_vhdx(path) as disk:
            disk.read_at(0, disk.size)
        assert not check_disk(path).sound


@pytest.mark.parametrize(
    ("bat", "metadata", "message"),
    [
        ((MIB, MIB), (2 * MIB, MIB), "the log and"),  # over the log
        ((3 * MIB, MIB), (3 * MIB, MIB), "overlap"),
        ((2 * MIB, 2 * MIB), (3 * MIB, MIB), "overlap"),
        ((1 << 62, MIB), (2 * MIB, MIB), "past the end"),
        (((1 << 64) - MIB, MIB), (2 * MIB, MIB), "past the end"),
        ((3 * MIB, 4095 * MIB), (2 * MIB, MIB), "past the end"),
        ((3 * MIB, 0), (2 * MIB, MIB), "aligned"),
        ((0, MIB), (2 * MIB, MIB), "aligned"),
        ((3 * MIB + 1, MIB), (2 * MIB, MIB), "aligned"),
    ],
)
def test_regions_out_of_place_are_refused(
    tmp_path: Path, bat: tuple[int, int], metadata: tuple[int, int], message: str
) -> None:
    path = ImageBuilder(8 * MIB).write(tmp_path / "disk.vhdx")
    table = RegionTable((RegionEntry(BAT_REGION, *bat, True), RegionEntry(METADATA_REGION, *metadata, True))).encode()
    with path.open("rb+") as file:
        for offset in REGION_TABLE_OFFSETS:
            file.seek(offset)
            file.write(table)
    with pytest.raises(CorruptDiskError, match=message):
        open_vhdx(path)
    assert not check_disk(path).sound


@pytest.mark.parametrize(
    "place",
    [(0, MIB), (MIB + 512, MIB), (1 << 60, MIB), (MIB, 4095 * MIB), (MIB, 100), (1 << 63, 1 << 31)],
)
def test_a_log_out_of_place_is_refused(tmp_path: Path, place: tuple[int, int]) -> None:
    builder = child_builder()
    path = builder.write(tmp_path / "disk.vhdx")
    header = replace(builder.header(3), log_offset=place[0], log_length=place[1])
    with path.open("rb+") as file:
        file.seek(HEADER_OFFSETS[0])
        file.write(header.encode())
    with pytest.raises(CorruptDiskError, match="log"):
        open_vhdx(path)
    assert not check_disk(path).sound


def test_metadata_items_out_of_place_are_refused(child: Path, tmp_path: Path) -> None:
    whole = child.read_bytes()
    path = tmp_path / "disk.vhdx"
    for offset, length in [(0, 8), (65535, 8), (1 << 31, 8), (0xFFFFFFFF, 8), (MIB - 4, 8), (65536, 0), (65540, 8)]:
        data = bytearray(whole)
        data[METADATA_OFFSET + 32 + 16 : METADATA_OFFSET + 32 + 20] = offset.to_bytes(4, "little")
        data[METADATA_OFFSET + 32 + 20 : METADATA_OFFSET + 32 + 24] = length.to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(CorruptDiskError):
            open_vhdx(path)
        assert [finding.rule for finding in check_disk(path).errors] == ["metadata"]


def test_a_small_file_cannot_make_us_use_much_memory(tmp_path: Path) -> None:
    # A sparse file of some KiB that claims the largest disk, whose table and log say as much as they can.
    builder = ImageBuilder(1 << 46, log_guid=LOG)
    zeros = [Change(offset << 12, (1 << 47) + (offset << 12), None) for offset in range(4000)]
    builder.log = ring(LogEntry(1, LOG, 0, 0, 1 << 47, tuple(zeros)))
    path = builder.write(tmp_path / "disk.vhdx")
    tracemalloc.start()
    try:
        exercise(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT


@pytest.mark.parametrize("seed", range(4))
def test_random_bat_entries_are_answered_with_our_errors(child: Path, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    data = bytearray(child.read_bytes())
    path = tmp_path / "disk.vhdx"
    for _ in range(40):
        for index in (*range(8), 4096):
            entry = generator.choice(
                [generator.getrandbits(64), generator.randrange(16) << 20 | generator.randrange(8)]
            )
            data[BAT_OFFSET + index * 8 : BAT_OFFSET + index * 8 + 8] = UINT64.pack(entry)
        path.write_bytes(data)
        exercise(path)
