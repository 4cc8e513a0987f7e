from __future__ import annotations

import os
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from tests.support.vhd_files import write_child
from vhdx.disk import Disk
from vhdx.errors import (
    CorruptDiskError,
    DiskError,
    FormatUnknownError,
    OsError,
    OutOfRangeError,
    ParentError,
    ReadOnlyError,
)
from vhdx.vhd import FixedVhdDisk, SparseVhdDisk, open_vhd
from vhdx.vhd_create import create_dynamic, create_fixed
from vhdx.vhd_layout import read_layout, table_problems
from vhdx.vhd_parent import timestamp_problem

KIB = 1 << 10
MIB = 1 << 20
SECTOR = 512


def sector(seed: int) -> bytes:
    return bytes([seed % 255 + 1]) * SECTOR


def extents_of(disk: Disk, *args: int) -> list[list[int]]:
    windows = list(disk.allocated(*args))
    return np.concatenate(windows).tolist() if windows else []


@pytest.fixture
def dynamic(tmp_path: Path) -> Path:
    """A dynamic disk of 16 MiB in blocks of 512 KiB, blocks 2, 5 and 31 written."""
    path = tmp_path / "dynamic.vhd"
    create_dynamic(path, 16 * MIB, block_size=512 * KIB, identifier=UUID(int=1))
    with open_vhd(path, writable=True) as disk:
        for block in (5, 2, 31):
            disk.write_at(block * 512 * KIB + 700, bytes([block]) * 1000)
    return path


# --- fixed


def test_a_fixed_disk_is_whole_mebibytes_with_a_footer_behind(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    create_fixed(path, 5 * MIB + 512)
    assert path.stat().st_size == 6 * MIB + 512
    with open_vhd(path, writable=True) as disk:
        assert isinstance(disk, FixedVhdDisk)
        assert disk.size == 6 * MIB
        disk.write_at(6 * MIB - 4, b"last")
        with pytest.raises(OutOfRangeError):
            disk.write_at(6 * MIB, b"x")
        assert extents_of(disk)[-1][1] == 6 * MIB
    with open_vhd(path) as disk:
        assert disk.read_at(6 * MIB - 4, 4) == b"last"


def test_a_fixed_disk_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    create_fixed(path, 5 * MIB)
    data = path.read_bytes()
    path.write_bytes(data[:MIB] + data[-512:])
    with pytest.raises(CorruptDiskError, match="only 1048576"):
        open_vhd(path)
    path.write_bytes(data[:-512])
    with pytest.raises(FormatUnknownError):
        open_vhd(path)


def test_a_footer_of_511_bytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    create_fixed(path, MIB)
    path.write_bytes(path.read_bytes()[:-1])
    with open_vhd(path) as disk:
        assert disk.size == MIB


@pytest.mark.parametrize("create", [create_fixed, create_dynamic])
@pytest.mark.parametrize("size", [0, -512, (2040 << 30) + 512])
def test_sizes_that_the_format_cannot_have_are_refused(
    tmp_path: Path, create: Callable[[Path, int], None], size: int
) -> None:
    with pytest.raises(OutOfRangeError):
        create(tmp_path / "x.vhd", size)
    assert not (tmp_path / "x.vhd").exists()


@pytest.mark.parametrize("create", [create_fixed, create_dynamic])
def test_the_largest_disk_can_be_made(tmp_path: Path, create: Callable[[Path, int], None]) -> None:
    path = tmp_path / "large.vhd"
    create(path, 2040 << 30)
    with open_vhd(path, writable=True) as disk:
        assert disk.size == 2040 << 30
        disk.write_at(disk.size - 512, sector(3))
        disk.flush()
        assert disk.read_at(disk.size - 512, 512) == sector(3)


@pytest.mark.parametrize("create", [create_fixed, create_dynamic])
def test_a_file_that_exists_is_never_overwritten(tmp_path: Path, create: Callable[[Path, int], None]) -> None:
    path = tmp_path / "x.vhd"
    path.write_bytes(b"precious")
    with pytest.raises(OsError):
        create(path, MIB)
    assert path.read_bytes() == b"precious"


# --- dynamic


def test_a_dynamic_disk_holds_only_the_blocks_written(dynamic: Path) -> None:
    with open_vhd(dynamic) as disk:
        assert extents_of(disk) == [[b * 512 * KIB, (b + 1) * 512 * KIB] for b in (2, 5, 31)]
        assert extents_of(disk, 1 * MIB + 5, 3 * MIB - 100) == [[1 * MIB + 5, 1536 * KIB], [2560 * KIB, 3 * MIB - 100]]
        content = disk.read_at(0, disk.size)
    expected = bytearray(16 * MIB)
    for block in (2, 5, 31):
        expected[block * 512 * KIB + 700 : block * 512 * KIB + 1700] = bytes([block]) * 1000
    assert content == expected
    assert dynamic.stat().st_size < 2 * MIB


def test_allocated_is_cut_at_windows_and_nowhere_else(dynamic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_vhd(dynamic, writable=True) as disk:
        disk.write_at(0, bytes(8 * MIB))
        monkeypatch.setattr("vhdx.vhd.WINDOW_BLOCKS", 4)
        windows = [window.tolist() for window in disk.allocated()]
    assert windows[:4] == [[[n * 2 * MIB, (n + 1) * 2 * MIB]] for n in range(4)]


@pytest.mark.parametrize("damage", ["cut", "zeros", "flip"])
def test_the_copy_of_the_footer_serves_where_the_footer_is_damaged(dynamic: Path, damage: str) -> None:
    data = dynamic.read_bytes()
    with open_vhd(dynamic) as disk:
        content = disk.read_at(0, disk.size)
    match damage:
        case "cut":
            data = data[:-512]
        case "zeros":
            data = data[:-512] + bytes(512)
        case "flip":
            data = data[:-100] + b"\xff" + data[-99:]
    dynamic.write_bytes(data)
    with open_vhd(dynamic) as disk:
        assert disk.read_at(0, disk.size) == content
        assert isinstance(disk, SparseVhdDisk)
        assert "copy at the start is used" in disk.layout.problems[0].message
    with open_vhd(dynamic, writable=True) as disk:
        disk.write_at(0, b"more")
    with open_vhd(dynamic) as disk:
        assert isinstance(disk, SparseVhdDisk)
        assert disk.layout.problems == ()
        assert disk.read_at(0, disk.size) == b"more" + content[4:]


def test_a_damaged_copy_of_the_footer_is_reported_and_repaired_by_growth(dynamic: Path) -> None:
    data = bytearray(dynamic.read_bytes())
    data[20] ^= 1
    dynamic.write_bytes(data)
    with open_vhd(dynamic, writable=True) as disk:
        assert isinstance(disk, SparseVhdDisk)
        assert "copy of the footer" in disk.layout.problems[0].message
        disk.write_at(0, b"more")
    with open_vhd(dynamic) as disk:
        assert isinstance(disk, SparseVhdDisk)
        assert disk.layout.problems == ()


def test_both_footers_damaged_is_corrupt(dynamic: Path) -> None:
    data = bytearray(dynamic.read_bytes())
    data[20] ^= 1
    data[-20] ^= 1
    dynamic.write_bytes(data)
    with pytest.raises(CorruptDiskError, match="checksum") as caught:
        open_vhd(dynamic)
    assert caught.value.path == str(dynamic)


@pytest.mark.parametrize("create", [create_fixed, create_dynamic])
def test_a_guests_own_vhd_at_the_end_of_a_cut_off_file_is_not_taken_for_the_footer(
    dynamic: Path, tmp_path: Path, create: Callable[[Path, int], None]
) -> None:
    inner = tmp_path / "inner.vhd"
    create(inner, 4 * MIB)
    last = 31 * 512 * KIB  # the block that lies last in the file
    with open_vhd(dynamic, writable=True) as disk:
        disk.write_at(last + 512 * KIB - 512, inner.read_bytes()[-512:])
        content = disk.read_at(0, disk.size)
    dynamic.write_bytes(dynamic.read_bytes()[:-512])
    with open_vhd(dynamic) as disk:
        assert disk.size == 16 * MIB
        assert disk.read_at(0, disk.size) == content


def test_a_fixed_disk_that_begins_with_a_dynamic_vhd_stays_a_fixed_disk(dynamic: Path, tmp_path: Path) -> None:
    path = tmp_path / "outer.vhd"
    create_fixed(path, 4 * MIB)
    with open_vhd(path, writable=True) as disk:
        disk.write_at(0, dynamic.read_bytes())
    with open_vhd(path) as disk:
        assert isinstance(disk, FixedVhdDisk)
        assert disk.size == 4 * MIB


def rewrite_table(path: Path, change: Callable[[list[int]], None]) -> None:
    with path.open("r+b") as file:
        file.seek(1536)
        table = list(struct.unpack(">32I", file.read(128)))
        change(table)
        file.seek(1536)
        file.write(struct.pack(">32I", *table))


@pytest.mark.parametrize(
    "block, entry, words",
    [
        (0, 0, "block 0 lies over the header"),
        (0, 0xFFFFFFFE, "block 0 reaches past the end"),
        (7, None, "overlaps another block"),
    ],
)
def test_a_wrong_entry_is_found_harms_no_other_block_and_forbids_writing(
    dynamic: Path, block: int, entry: int | None, words: str
) -> None:
    with open_vhd(dynamic) as disk:
        content = disk.read_at(0, disk.size)

    def change(table: list[int]) -> None:
        table[block] = table[5] + 1 if entry is None else entry

    rewrite_table(dynamic, change)
    with open_vhd(dynamic) as disk:
        assert isinstance(disk, SparseVhdDisk)
        assert words in " ".join(problem.message for problem in table_problems(disk.layout))
        assert disk.read_at(5 * 512 * KIB, 512 * KIB) == content[5 * 512 * KIB : 6 * 512 * KIB]
        if entry == 0xFFFFFFFE:
            with pytest.raises(CorruptDiskError, match="block 0 reaches past"):
                disk.read_at(0, 1)
    before = dynamic.read_bytes()
    with pytest.raises(CorruptDiskError, match="nothing can be written"):
        open_vhd(dynamic, writable=True)
    assert dynamic.read_bytes() == before


def test_a_table_full_of_wrong_entries_is_reported_in_bounded_length(tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    create_dynamic(path, 16 * MIB, block_size=4096)
    with path.open("r+b") as file:
        file.seek(1536)
        file.write(bytes(4 * 4096))
    with open_vhd(path) as disk:
        assert isinstance(disk, SparseVhdDisk)
        assert len(table_problems(disk.layout)) < 500


def test_absent_sectors_of_a_present_block_read_as_zeros_until_written(dynamic: Path) -> None:
    with dynamic.open("r+b") as file:
        file.seek(1536 + 2 * 4)
        place = struct.unpack(">I", file.read(4))[0] * SECTOR
        file.seek(place)
        file.write(b"\x40" + bytes(511))  # only sector 1
    with open_vhd(dynamic, writable=True) as disk:
        start = 2 * 512 * KIB
        assert disk.read_at(start, 3 * SECTOR) == bytes(512) + bytes(188) + b"\2" * 324 + bytes(512)
        disk.write_at(start + 2 * SECTOR + 10, b"new")
    with open_vhd(dynamic) as disk:
        assert disk.read_at(start + 2 * SECTOR, SECTOR) == bytes(10) + b"new" + bytes(499)
        assert disk.read_at(start + 3 * SECTOR, 512 * KIB - 3 * SECTOR) == bytes(512 * KIB - 3 * SECTOR)
        assert isinstance(disk, SparseVhdDisk)
        own = np.concatenate(list(disk.changed(start, start + 512 * KIB)))
        assert own.tolist() == [[start + SECTOR, start + 3 * SECTOR]]


def test_trim_makes_zeros_and_gives_storage_back(dynamic: Path) -> None:
    with open_vhd(dynamic, writable=True) as disk:
        disk.write_at(MIB, os.urandom(512 * KIB))
        disk.flush()
        before = dynamic.stat().st_blocks
        disk.trim(0, 16 * MIB)
        assert disk.read_at(0, disk.size) == bytes(disk.size)
        assert dynamic.stat().st_blocks < before


def test_a_disk_opened_for_reading_is_not_written(dynamic: Path) -> None:
    before = dynamic.read_bytes()
    with open_vhd(dynamic) as disk:
        assert disk.read_only
        with pytest.raises(ReadOnlyError):
            disk.write_at(0, b"x")
        with pytest.raises(ReadOnlyError):
            disk.trim(0, 1)
    assert dynamic.read_bytes() == before


def test_what_was_flushed_is_found_by_the_next_reader_and_tables_follow_payload(tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    create_dynamic(path, 64 * MIB)
    disk = open_vhd(path, writable=True)
    disk.write_at(5 * MIB, b"unflushed")
    with open_vhd(path) as other:
        assert other.read_at(5 * MIB, 9) == bytes(9)
    disk.flush()
    with open_vhd(path) as other:
        assert other.read_at(5 * MIB, 9) == b"unflushed"
    disk.close()
    disk.close()


# --- hostile


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1000, 1535, 1536, 1540, 1663, 2048, 300000])
def test_every_truncation_opens_rightly_or_gives_our_error(dynamic: Path, length: int) -> None:
    with open_vhd(dynamic) as disk:
        content = disk.read_at(0, disk.size)
    dynamic.write_bytes(dynamic.read_bytes()[:length])
    try:
        with open_vhd(dynamic) as disk:
            for start in range(0, disk.size, 512 * KIB):
                try:
                    piece = disk.read_at(start, 512 * KIB)
                except CorruptDiskError:
                    continue
                assert piece == content[start : start + 512 * KIB]
    except DiskError as error:
        assert error.path == str(dynamic)


def reseal(data: bytearray, start: int, length: int, field: int) -> None:
    data[start + field : start + field + 4] = bytes(4)
    total = ~sum(data[start : start + length]) & 0xFFFFFFFF
    data[start + field : start + field + 4] = total.to_bytes(4, "big")


@pytest.mark.parametrize(
    "field, value, width",
    [
        (512 + 16, 0, 8),
        (512 + 16, 2**64 - 1, 8),
        (512 + 16, 2**63, 8),
        (512 + 16, 600, 8),
        (512 + 28, 0, 4),
        (512 + 28, 31, 4),
        (512 + 28, 2**32 - 1, 4),
        (512 + 32, 4096, 4),
        (512 + 32, 2**31, 4),
    ],
)
def test_contradictory_fields_with_right_checksums_give_our_error_or_harm_nothing(
    dynamic: Path, field: int, value: int, width: int
) -> None:
    data = bytearray(dynamic.read_bytes())
    data[field : field + width] = value.to_bytes(width, "big")
    reseal(data, 512, 1024, 36)
    dynamic.write_bytes(data)
    try:
        with open_vhd(dynamic) as disk:
            disk.read_at(0, 4096)
    except DiskError as error:
        assert error.path == str(dynamic)
    else:
        assert (field, value) == (512 + 28, 2**32 - 1)  # a table that claims to be longer than it must be


@pytest.mark.parametrize("value", [0, 100, 511, 2**63, 2**64 - 1, 10**7])
def test_a_header_placed_nowhere_is_corrupt(dynamic: Path, value: int) -> None:
    data = bytearray(dynamic.read_bytes())
    for start in (0, len(data) - 512):
        data[start + 16 : start + 24] = value.to_bytes(8, "big")
        reseal(data, start, 512, 64)
    dynamic.write_bytes(data)
    with pytest.raises(CorruptDiskError):
        open_vhd(dynamic)


def test_a_disk_with_more_blocks_than_memory_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutOfRangeError, match="larger block size"):
        create_dynamic(tmp_path / "x.vhd", 2040 << 30, block_size=4096)


# --- differencing


@pytest.fixture
def chain(dynamic: Path, tmp_path: Path) -> Path:
    """A grandchild of ``dynamic`` through a child; each names its parent in another way."""
    child = write_child(
        tmp_path / "child.vhd",
        size=16 * MIB,
        parent=UUID(int=1),
        sectors={2048 + 1: sector(20), 9000: sector(21)},
        relative=".\\dynamic.vhd",
        absolute="C:\\VMs\\dynamic.vhd",
    )
    path = tmp_path / "grandchild.vhd"
    write_child(
        path,
        size=16 * MIB,
        parent=child,
        sectors={2048 + 1: sector(30), 2048 + 3: sector(31), 32767: sector(32)},
        absolute=str(tmp_path / "child.vhd"),
        block_size=512 * KIB,
    )
    return path


def expected_chain(dynamic: Path) -> bytearray:
    with open_vhd(dynamic) as disk:
        content = bytearray(disk.read_at(0, disk.size))
    for number, seed in ((9000, 21), (2048 + 1, 30), (2048 + 3, 31), (32767, 32)):
        content[number * SECTOR : (number + 1) * SECTOR] = sector(seed)
    return content


def test_a_chain_reads_through_all_parents(chain: Path, dynamic: Path) -> None:
    content = expected_chain(dynamic)
    with open_vhd(chain) as disk:
        assert disk.read_at(0, disk.size) == content
        assert disk.read_at(2048 * SECTOR + 100, 2000) == content[2048 * SECTOR + 100 :][:2000]
        union = extents_of(disk)
        covered = np.zeros(disk.size // SECTOR, dtype=bool)
        for start, end in union:
            covered[start // SECTOR : -(-end // SECTOR)] = True
        held = np.frombuffer(bytes(content), dtype=np.uint8).reshape(-1, SECTOR).any(axis=1)
        assert not (held & ~covered).any()
        assert isinstance(disk, SparseVhdDisk)
        assert np.concatenate(list(disk.changed())).tolist() == [
            [2049 * SECTOR, 2050 * SECTOR],
            [2051 * SECTOR, 2052 * SECTOR],
            [32767 * SECTOR, 32768 * SECTOR],
        ]


def test_writing_to_a_child_leaves_the_parents_alone(chain: Path, dynamic: Path, tmp_path: Path) -> None:
    content = expected_chain(dynamic)
    parents = [dynamic.read_bytes(), (tmp_path / "child.vhd").read_bytes()]
    writes = [(2048 * SECTOR + 100, b"part of a sector"), (8 * MIB - 3, b"over a border"), (1, os.urandom(3 * MIB))]
    with open_vhd(chain, writable=True) as disk:
        for offset, data in writes:
            disk.write_at(offset, data)
            content[offset : offset + len(data)] = data
        disk.trim(9000 * SECTOR - 10, 2000)
        content[9000 * SECTOR - 10 : 9000 * SECTOR + 1990] = bytes(2000)
        assert disk.read_at(0, disk.size) == content
    with open_vhd(chain) as disk:
        assert disk.read_at(0, disk.size) == content
    assert [dynamic.read_bytes(), (tmp_path / "child.vhd").read_bytes()] == parents


def test_what_the_child_holds_is_read_although_the_parent_is_missing(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "child.vhd").unlink()
    with open_vhd(chain) as disk:
        assert disk.read_at(2049 * SECTOR, SECTOR) == sector(30)
        assert isinstance(disk, SparseVhdDisk)
        assert len(np.concatenate(list(disk.changed()))) == 3
        with pytest.raises(ParentError, match=r"child\.vhd"):
            disk.read_at(2048 * SECTOR, 2 * SECTOR)
        with pytest.raises(ParentError):
            list(disk.allocated())


def test_another_disk_in_the_parents_place_is_refused(chain: Path, dynamic: Path) -> None:
    dynamic.unlink()
    create_dynamic(dynamic, 16 * MIB, identifier=UUID(int=99))
    with open_vhd(chain) as disk, pytest.raises(ParentError, match="another disk"):
        disk.read_at(0, 1)


def test_a_loop_of_parents_is_named(tmp_path: Path) -> None:
    a, b = uuid4(), uuid4()
    write_child(tmp_path / "a.vhd", size=MIB, parent=b, sectors={}, relative=".\\b.vhd", identifier=a)
    write_child(tmp_path / "b.vhd", size=MIB, parent=a, sectors={}, relative=".\\a.vhd", identifier=b)
    with open_vhd(tmp_path / "a.vhd") as disk, pytest.raises(ParentError, match=r"loop.*a\.vhd.*b\.vhd.*a\.vhd"):
        disk.read_at(0, 1)


@pytest.mark.parametrize("way", ["relative", "absolute", "link"])
def test_parents_outside_the_allowed_folders_are_not_opened(tmp_path: Path, way: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    create_dynamic(outside / "parent.vhd", MIB, identifier=UUID(int=1))
    relative, absolute = None, None
    match way:
        case "relative":
            relative = "..\\outside\\parent.vhd"
        case "absolute":
            absolute = str(outside / "parent.vhd")
        case "link":
            relative = ".\\link.vhd"
            (inside / "link.vhd").symlink_to(outside / "parent.vhd")
    child = inside / "child.vhd"
    write_child(child, size=MIB, parent=UUID(int=1), sectors={}, relative=relative, absolute=absolute)
    with open_vhd(child) as disk, pytest.raises(ParentError, match="outside the allowed folders"):
        disk.read_at(0, 1)
    with open_vhd(child, allowed_folders=[outside]) as disk:
        assert disk.read_at(0, 1) == b"\0"


def test_a_chain_copied_from_windows_is_found_beside_the_child_or_in_an_allowed_folder(tmp_path: Path) -> None:
    (tmp_path / "parents").mkdir()
    create_dynamic(tmp_path / "parents" / "base.vhd", MIB, identifier=UUID(int=1))
    child = tmp_path / "child.vhd"
    write_child(child, size=MIB, parent=UUID(int=1), sectors={}, absolute="D:\\Hyper-V\\disks\\base.vhd")
    with open_vhd(child) as disk, pytest.raises(ParentError, match=r"D:\\Hyper-V"):
        disk.read_at(0, 1)
    with open_vhd(child, allowed_folders=[tmp_path / "parents"]) as disk:
        assert disk.read_at(0, 1) == b"\0"


@pytest.mark.parametrize("relative", ["\0", "a\0b", "", ".\\" * 3000, "\\\\server\\share\\x.vhd", "."])
def test_odd_parent_paths_give_our_error(tmp_path: Path, relative: str) -> None:
    child = tmp_path / "child.vhd"
    write_child(child, size=MIB, parent=UUID(int=1), sectors={}, relative=relative)
    with open_vhd(child) as disk, pytest.raises(ParentError):
        disk.read_at(0, 1)


def test_a_parents_time_that_is_not_the_noted_one_is_a_warning(tmp_path: Path) -> None:
    noted = datetime(2026, 2, 3, tzinfo=UTC)
    base = tmp_path / "base.vhd"
    create_dynamic(base, MIB, identifier=UUID(int=1))
    write_child(
        tmp_path / "child.vhd", size=MIB, parent=UUID(int=1), sectors={}, relative="base.vhd", parent_modified=noted
    )
    with open_vhd(tmp_path / "child.vhd") as disk, open_vhd(base) as parent:
        layout = read_layout(disk.file)
        problem = timestamp_problem(layout, parent)
        assert problem is not None and problem.severity == "warning"
        os.utime(base, (noted.timestamp(), noted.timestamp() + 1))
        assert timestamp_problem(layout, parent) is None


def test_a_child_larger_than_its_parent_reads_zeros_behind_it(tmp_path: Path) -> None:
    create_dynamic(tmp_path / "base.vhd", MIB, identifier=UUID(int=1))
    with open_vhd(tmp_path / "base.vhd", writable=True) as disk:
        disk.write_at(MIB - 4, b"tail")
    write_child(tmp_path / "child.vhd", size=3 * MIB, parent=UUID(int=1), sectors={}, relative="base.vhd")
    with open_vhd(tmp_path / "child.vhd") as disk:
        assert disk.read_at(MIB - 4, 2 * MIB + 4) == b"tail" + bytes(2 * MIB)
        assert extents_of(disk) == [[0, MIB]]
