"""Writing to a VHDX: what reaches the file, in how many calls, and what hostile or odd images do not make it do."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.support.crash_files import RecordingFiles, scratch_folder
from tests.support.vhdx_builder import ImageBuilder, parent_of
from vhdx.chain import open_vhdx, parent_linkages
from vhdx.change import merge_image, plan_merge, plan_resize, resize_image
from vhdx.check import check_disk
from vhdx.compact import compact_disk
from vhdx.create import create_disk
from vhdx.errors import (
    CorruptDiskError,
    DiskBusyError,
    DiskError,
    OsError,
    OutOfRangeError,
    ParentError,
    ReadOnlyError,
    UnsupportedDiskError,
)
from vhdx.merge import merge_into_parent
from vhdx.osfile import File, OsFiles, PortableFile
from vhdx.pending import PendingSectors
from vhdx.relink import add_linkage, find_children, free_place, relink, set_locator
from vhdx.resize import resize_disk
from vhdx.structures import HEADER_OFFSETS, Header, PayloadState, encode_bat_entry
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable, writer_of

MIB = 1 << 20
BAT_OFFSET = 3 * MIB  # where create_disk puts it


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def disk_path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=8 * MIB, block_size=MIB)
    return path


@pytest.fixture
def child_path(tmp_path: Path) -> Path:
    parent = tmp_path / "parent.vhdx"
    create_disk(parent, size=8 * MIB, block_size=MIB)
    with open_writable(parent) as disk:
        disk.write_at(0, b"P" * 8 * MIB)
    path = tmp_path / "child.vhdx"
    create_disk(path, parent=parent, block_size=MIB)
    return path


def poke_bat(path: Path, index: int, entry: int) -> None:
    with path.open("r+b") as file:
        file.seek(BAT_OFFSET + index * 8)
        file.write(struct.pack("<Q", entry))


def read(path: Path) -> bytes:
    with open_vhdx(path) as disk:
        return disk.read_at(0, disk.size)


def errors(path: Path) -> list[str]:
    return [str(finding) for finding in check_disk(path).findings if finding.severity != "info"]


def test_a_big_write_to_fresh_blocks_is_one_write_of_payload(disk_path: Path) -> None:
    files = RecordingFiles(disk_path.parent)
    with open_writable(disk_path, files=files) as disk:
        disk.write_at(0, b"x" * 6 * MIB)
        payload = [effect for effect in files.effects if effect.kind == "write" and len(effect.data) > 4096]
    assert [len(effect.data) for effect in payload] == [6 * MIB]


def test_many_writes_between_two_flushes_make_one_log_entry(disk_path: Path) -> None:
    files = RecordingFiles(disk_path.parent)
    with open_writable(disk_path, files=files) as disk:
        for block in range(8):
            disk.write_at(block * MIB, b"x" * MIB)
        disk.flush()
        log = [effect for effect in files.effects if effect.kind == "write" and MIB <= effect.offset < 2 * MIB]
        assert len(log) == 1
        before = len(files.effects)
        disk.write_at(0, b"y" * MIB)  # no metadata changes: the flush is a plain one
        disk.flush()
        assert [effect.kind for effect in files.effects[before:]] == ["write", "fsync"]


def test_memory_for_pending_metadata_is_bounded_by_commits(tmp_path: Path) -> None:
    create_disk(tmp_path / "parent.vhdx", size=20 << 30, block_size=MIB)
    create_disk(tmp_path / "child.vhdx", parent=tmp_path / "parent.vhdx", block_size=32 * MIB)
    with open_writable(tmp_path / "child.vhdx") as disk:
        for number in range(400):  # each in a sector of its own of the bitmap
            disk.write_at(number * 40 * MIB, b"x" * 512)
        assert len(writer_of(disk)._pending) < 100
    with open_vhdx(tmp_path / "child.vhdx") as disk:
        assert all(disk.read_at(number * 40 * MIB, 1024) == b"x" * 512 + bytes(512) for number in range(400))
    assert errors(tmp_path / "child.vhdx") == []


def test_a_partial_block_shows_its_parent_even_over_stale_bits(child_path: Path) -> None:
    with open_writable(child_path) as disk:
        disk.write_at(2 * MIB, b"stale" * 200_000)
        writer_of(disk).set_payload_entry(2, PayloadState.NOT_PRESENT)
    with open_writable(child_path) as disk:
        assert disk.read_at(2 * MIB, 5) == b"PPPPP"
        disk.write_at(2 * MIB + 4096, b"new" * 1000)
        assert disk.read_at(2 * MIB, 4099) == b"P" * 4096 + b"new"
    assert read(child_path)[2 * MIB + 512 : 2 * MIB + 4099] == b"P" * (4096 - 512) + b"new"


@pytest.mark.parametrize("state", [PayloadState.UNDEFINED, PayloadState.UNMAPPED, PayloadState.ZERO])
def test_a_write_into_a_block_of_zeros_hides_the_parent_all_over(child_path: Path, state: PayloadState) -> None:
    poke_bat(child_path, 3, state)
    with open_writable(child_path) as disk:
        disk.write_at(3 * MIB + 100, b"new")
    assert read(child_path)[3 * MIB : 4 * MIB] == bytes(100) + b"new" + bytes(MIB - 103)


def test_trimming_a_child_hides_the_parent(child_path: Path) -> None:
    with open_writable(child_path) as disk:
        disk.trim(MIB - 100, MIB + 300)
        assert disk.image.bat.payload_entry(1) & 7 == PayloadState.ZERO
    content = read(child_path)
    assert content[: MIB - 100] == b"P" * (MIB - 100)
    assert not any(content[MIB - 100 : 2 * MIB + 200])
    assert content[2 * MIB + 200 :] == b"P" * (6 * MIB - 200)


def test_trimming_gives_places_back_and_they_are_used_again(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(0, b"x" * 8 * MIB)
        disk.flush()
        size = disk_path.stat().st_size
        for _ in range(5):
            disk.trim(0, 4 * MIB)
            disk.flush()
            disk.write_at(0, b"y" * 100)
            disk.write_at(MIB, b"y" * 3 * MIB)
            disk.flush()
    assert disk_path.stat().st_size == size
    assert read(disk_path) == b"y" * 100 + bytes(MIB - 100) + b"y" * 3 * MIB + b"x" * 4 * MIB


def test_trimming_up_to_the_end_frees_a_last_block_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=MIB + 512, block_size=MIB)
    with open_writable(path) as disk:
        disk.write_at(0, b"x" * (MIB + 512))
        disk.trim(MIB, 512)
        assert disk.image.bat.payload_entry(1) & 7 == PayloadState.ZERO


def test_a_fixed_disk_keeps_its_blocks_when_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=4 * MIB, block_size=MIB, kind="fixed")
    with open_writable(path) as disk:
        disk.write_at(0, b"x" * 4 * MIB)
        disk.trim(5, 3 * MIB)
        assert (disk.image.bat.payload_states(0, 4) == PayloadState.FULLY_PRESENT).all()
    assert read(path) == b"x" * 5 + bytes(3 * MIB) + b"x" * (MIB - 5)


@pytest.mark.parametrize("offset", [0, MIB, 2 * MIB, BAT_OFFSET])
def test_a_block_on_the_disks_own_structures_is_not_written_to(disk_path: Path, offset: int) -> None:
    poke_bat(disk_path, 1, encode_bat_entry(PayloadState.FULLY_PRESENT, offset))
    with open_writable(disk_path) as disk:
        requests: list[Callable[[], None]] = [
            lambda: disk.write_at(MIB, b"x"),
            lambda: disk.trim(MIB, 512),
            lambda: disk.trim(MIB, MIB),
        ]
        for request in requests:
            with pytest.raises(CorruptDiskError):
                request()


@pytest.mark.parametrize("state", [4, 5, PayloadState.PARTIALLY_PRESENT])
def test_a_state_that_a_dynamic_disk_cannot_have_is_refused(disk_path: Path, state: int) -> None:
    poke_bat(disk_path, 1, 9 * MIB | state)
    with open_writable(disk_path) as disk, pytest.raises(CorruptDiskError):
        disk.write_at(MIB, b"x")


def test_a_partial_block_without_a_bitmap_is_refused(child_path: Path) -> None:
    with open_writable(child_path) as disk:
        disk.write_at(MIB, b"x" * 512)
        bitmap = disk.image.geometry.bitmap_index(0)
    poke_bat(child_path, bitmap, 0)
    with open_writable(child_path) as disk, pytest.raises(CorruptDiskError):
        disk.write_at(MIB + 512, b"y" * 512)


def test_new_blocks_go_behind_those_that_a_cut_file_lost(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(0, b"x" * 3 * MIB)
    with disk_path.open("r+b") as file:
        file.truncate(5 * MIB)
    with open_writable(disk_path) as disk:
        disk.write_at(5 * MIB, b"y" * MIB)
    with open_vhdx(disk_path) as disk:
        places = [disk.image.bat.payload_entry(block) & ~7 for block in (0, 1, 2, 5)]
    assert len(set(places)) == 4


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (8 * MIB, 1), (8 * MIB - 1, 2)])
def test_requests_outside_the_disk_are_refused(disk_path: Path, offset: int, length: int) -> None:
    with open_writable(disk_path) as disk:
        requests: list[Callable[[], None]] = [
            lambda: disk.write_at(offset, bytes(length)),
            lambda: disk.trim(offset, length),
            lambda: writer_of(disk).write_at(offset, bytes(length)),
            lambda: writer_of(disk).trim(offset, length),
        ]
        for request in requests:
            with pytest.raises(OutOfRangeError):
                request()


def test_requests_of_nothing_change_nothing(disk_path: Path) -> None:
    before = disk_path.read_bytes()
    with open_writable(disk_path) as disk:
        disk.write_at(5, b"")
        disk.trim(5, 0)
        disk.flush()
    assert disk_path.read_bytes() == before


def test_a_second_writer_is_refused_and_a_reader_is_not(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        with pytest.raises(DiskBusyError):
            open_writable(disk_path)
        disk.write_at(0, b"seen after a flush")
        disk.flush()
        assert read(disk_path)[:18] == b"seen after a flush"
    with open_vhdx(disk_path) as disk, pytest.raises(ReadOnlyError):
        disk.write_at(0, b"x")


def test_parents_are_opened_for_reading_and_may_have_other_children_open(child_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.vhdx"
    create_disk(other, parent=tmp_path / "parent.vhdx")
    parent = (tmp_path / "parent.vhdx").read_bytes()
    with open_writable(child_path) as one, open_writable(other) as two:
        one.write_at(0, b"one")
        two.write_at(0, b"two")
    assert read(child_path)[:4] == b"oneP"
    assert read(other)[:4] == b"twoP"
    assert (tmp_path / "parent.vhdx").read_bytes() == parent


def test_a_child_without_its_parent_takes_whole_sectors_and_refuses_parts(child_path: Path, tmp_path: Path) -> None:
    (tmp_path / "parent.vhdx").unlink()
    with open_writable(child_path) as disk:
        disk.write_at(4096, b"x" * 1024)
        assert disk.read_at(4096, 1024) == b"x" * 1024
        with pytest.raises(ParentError):
            disk.write_at(5, b"x")


def test_writing_to_a_parent_makes_its_children_refuse_it(child_path: Path, tmp_path: Path) -> None:
    with open_writable(tmp_path / "parent.vhdx") as disk:
        disk.write_at(0, b"changed")
    with pytest.raises(ParentError):
        open_vhdx(child_path)


@pytest.mark.parametrize("call", [VhdxDisk.flush, VhdxDisk.close])
def test_after_a_failed_commit_no_more_is_written(disk_path: Path, call: Callable[[VhdxDisk], None]) -> None:
    files = RecordingFiles(disk_path.parent)
    disk = open_writable(disk_path, files=files)
    disk.write_at(0, b"x" * 5000)
    files.fail_at = len(files.effects) + 1
    with pytest.raises(OsError):
        call(disk)
    count = len(files.effects)
    with pytest.raises(DiskError):
        disk.write_at(0, b"y")
    disk.close()
    assert len(files.effects) == count


class PortableFiles(OsFiles):
    """The operating system's files through seek, read and write alone, as Windows has them."""

    def open(self, path: Path, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
        return PortableFile(path, writable=writable or create, create=create)


def test_everything_works_through_portable_files(tmp_path: Path) -> None:
    files, path, child = PortableFiles(), tmp_path / "disk.vhdx", tmp_path / "child.vhdx"
    with create_disk(path, size=8 * MIB, block_size=MIB, bulk=True, files=files) as bulk:
        bulk.write_at(0, b"P" * 8 * MIB)
        bulk.commit()
    create_disk(child, parent=path, block_size=MIB, files=files)
    with open_writable(child, files=files) as disk:
        disk.write_at(MIB - 3, b"child" * 1000)
        disk.flush()
        disk.trim(3 * MIB + 7, 2 * MIB)
    expected = read(child)
    assert expected[MIB - 3 : MIB + 2] == b"child"
    assert expected[3 * MIB + 7 : 5 * MIB + 7] == bytes(2 * MIB)
    resize_disk(child, 9 * MIB, files=files)
    assert merge_into_parent(child, files=files) == path
    compact_disk(path, files=files)
    assert read(path) == expected + bytes(MIB)
    assert errors(path) == []


# -- resizing, merging, compacting: what the crash tests do not look at ----------------------------------------------


def test_growing_hides_what_stood_past_the_old_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=MIB + 512, block_size=MIB)
    with open_writable(path) as disk:
        disk.write_at(0, b"x" * (MIB + 512))
        place = disk.image.bat.payload_entry(1) & ~7
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"G" * MIB)
    poke_bat(path, 2, encode_bat_entry(PayloadState.FULLY_PRESENT, place))
    resize_disk(path, 4 * MIB)
    assert read(path)[MIB:] == b"G" * 512 + bytes(3 * MIB - 512)
    assert errors(path) == []


def test_shrinking_refuses_data_and_gives_the_files_end_back(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(0, b"x" * 8 * MIB)
    with pytest.raises(OutOfRangeError):
        resize_disk(disk_path, 4 * MIB)
    assert read(disk_path) == b"x" * 8 * MIB
    with open_writable(disk_path) as disk:
        disk.trim(4 * MIB, 2 * MIB)
        disk.write_at(6 * MIB, bytes(2 * MIB))
    size = disk_path.stat().st_size
    resize_disk(disk_path, 4 * MIB)
    assert read(disk_path) == b"x" * 4 * MIB
    assert disk_path.stat().st_size <= size - 4 * MIB
    assert errors(disk_path) == []


@pytest.mark.parametrize("size", [0, -512, 1000, (64 << 40) + 512])
def test_sizes_that_the_format_cannot_have_are_refused(disk_path: Path, size: int) -> None:
    with pytest.raises(OutOfRangeError):
        resize_disk(disk_path, size)


def test_a_parent_is_not_resized_and_a_child_does_not_shrink_below_it(child_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ParentError, match=r"child\.vhdx"):
        resize_disk(tmp_path / "parent.vhdx", 9 * MIB)
    with pytest.raises(ParentError):
        resize_disk(child_path, 7 * MIB)
    resize_disk(child_path, 9 * MIB)
    assert read(child_path) == b"P" * 8 * MIB + bytes(MIB)


def test_the_plan_of_a_resize_refuses_what_resizing_would(child_path: Path, disk_path: Path, tmp_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(disk.size - 3, b"end")
    (tmp_path / "raw").write_bytes(bytes(2 * MIB) + b"e" * MIB)
    for path, size in (
        (tmp_path / "parent.vhdx", 9 * MIB),
        (child_path, 7 * MIB),
        (disk_path, MIB),
        (disk_path, 65 << 40),
        (tmp_path / "raw", 2 * MIB),
    ):
        with pytest.raises(DiskError):
            plan_resize(path, size)
        with pytest.raises(DiskError):
            resize_image(path, size)
    assert plan_resize(tmp_path / "raw", 4 * MIB).old_size == 3 * MIB


def test_resizing_to_the_largest_size_and_writing_at_its_end(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(5, b"kept")
    resize_disk(disk_path, 64 << 40)
    with open_writable(disk_path) as disk:
        disk.write_at((64 << 40) - 7, b"the end")
    with open_vhdx(disk_path) as disk:
        assert disk.read_at(5, 4) == b"kept"
        assert disk.read_at((64 << 40) - 7, 7) == b"the end"


def test_a_grown_child_merges_into_a_grown_parent(child_path: Path, tmp_path: Path) -> None:
    resize_disk(child_path, 10 * MIB)
    with open_writable(child_path) as disk:
        disk.write_at(9 * MIB, b"far")
    expected = read(child_path)
    assert merge_into_parent(child_path) == tmp_path / "parent.vhdx"
    assert read(tmp_path / "parent.vhdx") == expected
    assert not child_path.exists()


def test_a_locator_too_large_for_one_log_entry_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    junk = tuple((f"junk{number}", "x" * 30000) for number in range(10))
    path = ImageBuilder(4 * MIB, parent_values=(*parent_of(UUID(int=9), "parent.vhdx"), *junk)).write(tmp_path / "c")
    before = path.read_bytes()
    with pytest.raises(UnsupportedDiskError, match="too large"):
        add_linkage(path, UUID(int=10))
    with open_vhdx(path) as disk:
        assert parent_linkages(disk.image) == (UUID(int=9),)
    assert path.read_bytes()[3 * MIB :] == before[3 * MIB :]


@pytest.mark.parametrize("state", [PayloadState.UNMAPPED, PayloadState.UNDEFINED])
def test_a_place_that_an_unmapped_block_has_kept_is_given_to_no_other(tmp_path: Path, state: PayloadState) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=8 * MIB, block_size=MIB)
    with open_writable(path) as disk:
        for block in (5, 3, 6):
            disk.write_at(block * MIB, b"%d" % block * MIB)
        places = [disk.image.bat.payload_entry(block) >> 20 << 20 for block in (5, 3, 6)]
    for block, place in ((5, places[0]), (6, places[2])):  # as a program leaves them that lets blocks keep their places
        poke_bat(path, block, place | state)
    resize_disk(path, 7 * MIB)
    assert path.stat().st_size >= places[2] + MIB  # whoever writes to block 6 may do so in place
    compact_disk(path)
    assert path.stat().st_size == places[0] + MIB
    with open_vhdx(path) as disk:
        assert disk.read_at(0, disk.size) == bytes(3 * MIB) + b"3" * MIB + bytes(3 * MIB)
        assert disk.image.bat.payload_entries(0, 7).tolist() == [0, 0, 0, places[0] | 6, 0, state, state]


def test_a_full_log_is_emptied_and_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=140 * MIB, block_size=MIB)
    seen = []
    with open_writable(path) as disk:
        for block in range(140):  # two sectors of the log each, which has 256
            disk.write_at(block * MIB, b"%d" % block)
            disk.flush()
            with open_vhdx(path) as crashed:
                assert crashed.read_at(block * MIB, 3) == (b"%d" % block).ljust(3, b"\0")
                replay = crashed.image.replay
                assert replay is not None
                seen.append((replay.log_guid, [entry.position for entry in replay.entries], replay.torn))
    assert len({guid for guid, _, _ in seen}) == 2
    assert [positions for _, positions, _ in seen] == [[block % 128 * 8192] for block in range(140)]
    assert not any(torn for _, _, torn in seen)


def test_merging_refuses_a_parent_with_other_children(child_path: Path, tmp_path: Path) -> None:
    create_disk(tmp_path / "other.vhdx", parent=tmp_path / "parent.vhdx")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ParentError, match=r"other\.vhdx"):
        merge_into_parent(child_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("where", ["beside the child", "in an allowed folder"])
def test_siblings_in_other_folders_than_the_parents_are_seen(tmp_path: Path, where: str) -> None:
    for name in ("base", "vm", "other"):
        (tmp_path / name).mkdir()
    parent, child = tmp_path / "base" / "parent.vhdx", tmp_path / "vm" / "child.vhdx"
    create_disk(parent, size=8 * MIB, block_size=MIB)
    create_disk(child, parent=parent)
    sibling = tmp_path / ("vm" if where == "beside the child" else "other") / "sibling.vhdx"
    create_disk(sibling, parent=parent)
    folders = [tmp_path / "base", tmp_path / "other"]
    before = {path: path.read_bytes() for path in (parent, child, sibling)}
    for merge in (merge_into_parent, plan_merge, merge_image):
        with pytest.raises(ParentError, match=r"sibling\.vhdx"):
            merge(child, allowed_folders=folders)
    with pytest.raises(ParentError, match=r"sibling\.vhdx"):
        resize_disk(parent, 9 * MIB, allowed_folders=[sibling.parent])
    assert {path: path.read_bytes() for path in (parent, child, sibling)} == before
    sibling.unlink()
    assert merge_into_parent(child, allowed_folders=folders) == parent


def test_a_sibling_is_seen_behind_another_file_that_has_the_parents_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    parent = tmp_path / "parent.vhdx"
    create_disk(parent, size=8 * MIB, block_size=MIB)
    for name in ("child.vhdx", "sibling.vhdx"):
        create_disk(tmp_path / name, parent=parent)
    with open_writable(tmp_path / "sibling.vhdx", with_parents=False) as disk:
        locator = disk.image.metadata.parent_locator
        assert locator is not None
        linkage = locator.values[0]
        paths = (("relative_path", ".\\sub\\parent.vhdx"), ("volume_path", "\\\\?\\Volume{0}\\parent.vhdx"))
        set_locator(disk, replace(locator, values=(linkage, *paths)))
    create_disk(tmp_path / "sub" / "parent.vhdx", size=8 * MIB, block_size=MIB)
    with open_vhdx(tmp_path / "sibling.vhdx") as disk:
        assert disk.parent is not None
        assert disk.parent.path == parent
    with pytest.raises(ParentError, match=r"sibling\.vhdx"):
        merge_into_parent(tmp_path / "child.vhdx")


def test_grandchildren_beside_the_parent_are_linked_to_it(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    parent, child, grandchild = tmp_path / "parent.vhdx", tmp_path / "vm" / "child.vhdx", tmp_path / "grand.vhdx"
    create_disk(parent, size=8 * MIB, block_size=MIB)
    create_disk(child, parent=parent)
    with open_writable(child, allowed_folders=[tmp_path]) as disk:
        disk.write_at(5 * MIB, b"child")
    create_disk(grandchild, parent=child)
    assert merge_image(child, allowed_folders=[tmp_path]).grandchildren == (grandchild,)
    with open_vhdx(grandchild) as disk:
        assert [link.path for link in disk.chain] == [grandchild, parent]
        assert disk.read_at(5 * MIB, 5) == b"child"


def test_growing_a_disk_whose_file_ends_inside_its_last_block_completes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=5 * MIB, block_size=2 * MIB, kind="fixed")
    with open_writable(path) as disk:
        disk.write_at(5 * MIB - 3, b"end")
    os.truncate(path, path.stat().st_size - MIB)  # as QEMU makes fixed disks: the file ends where the disk does
    resize_disk(path, 6 * MIB)
    with open_vhdx(path) as disk:
        assert disk.read_at(5 * MIB - 3, MIB + 3) == b"end" + bytes(MIB)
    assert check_disk(path).findings == ()


def test_merging_changes_the_parents_guid_and_refuses_disks_without_one(child_path: Path, tmp_path: Path) -> None:
    with open_vhdx(tmp_path / "parent.vhdx") as disk:
        before = disk.image.data_write_guid
    merge_into_parent(child_path, keep_child=True)
    with open_vhdx(tmp_path / "parent.vhdx") as disk:
        assert disk.image.data_write_guid != before
    assert read(child_path) == b"P" * 8 * MIB
    with pytest.raises(ParentError):
        merge_into_parent(tmp_path / "parent.vhdx")


def test_merging_waits_for_no_other_writer(child_path: Path, tmp_path: Path) -> None:
    child = child_path.read_bytes()
    with open_writable(tmp_path / "parent.vhdx"), pytest.raises(DiskBusyError):
        merge_into_parent(child_path)
    assert child_path.read_bytes() == child


def test_children_are_found_by_their_locators(child_path: Path, tmp_path: Path) -> None:
    create_disk(tmp_path / "grandchild.avhdx", parent=child_path)
    (tmp_path / "noise.vhdx").write_bytes(b"no disk")
    assert [(child.path.name, child.is_current) for child in find_children(tmp_path / "parent.vhdx")] == [
        ("child.vhdx", True)
    ]
    with open_writable(tmp_path / "parent.vhdx") as disk:
        disk.write_at(0, b"x")
    assert [(child.path.name, child.is_current) for child in find_children(tmp_path / "parent.vhdx")] == [
        ("child.vhdx", False)
    ]


def test_relinking_finds_a_parent_that_moved(child_path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a name that is longer than the one before.vhdx"
    (tmp_path / "parent.vhdx").rename(moved)
    for _ in range(3):
        relink(child_path, moved)
        assert read(child_path) == b"P" * 8 * MIB
    assert errors(child_path) == []
    create_disk(tmp_path / "big.vhdx", size=8 * MIB, sector_size=4096)
    with pytest.raises(ParentError):
        relink(child_path, tmp_path / "big.vhdx")
    with pytest.raises(ParentError):
        relink(moved, tmp_path / "big.vhdx")


@pytest.mark.parametrize(
    ("taken", "length", "place"),
    [
        ([], 100, 65536),
        ([(65536, 8), (65544, 50)], 100, 65594),
        ([(65536, 8), (66000, 50)], 456, 65544),
        ([(65536, 8), (66000, 50)], 457, 66050),
        ([(65536, MIB - 65536)], 1, None),
        ([(65536, MIB - 65536 - 100)], 100, MIB - 100),
    ],
)
def test_room_among_metadata_items_is_found(taken: list[tuple[int, int]], length: int, place: int | None) -> None:
    assert free_place(taken, length, MIB) == place


def test_compacting_copies_holes_over_whatever_stood_in_the_gap(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        for block in range(6):
            disk.write_at(block * MIB, b"x" * MIB)
        disk.flush()
        disk.write_at(6 * MIB, b"mostly a hole")
        gap = disk.image.bat.payload_entry(0) & ~7
    poke_bat(disk_path, 0, PayloadState.NOT_PRESENT)
    assert (disk_path.stat().st_size, gap) == (4 * MIB + 7 * MIB, 4 * MIB)
    result = compact_disk(disk_path)
    assert (result.blocks_moved, result.blocks_released, result.size_after) == (1, 0, 10 * MIB)
    expected = bytes(MIB) + b"x" * 5 * MIB + b"mostly a hole"
    assert read(disk_path) == expected.ljust(8 * MIB, b"\0")
    assert errors(disk_path) == []


def test_compacting_refuses_blocks_that_overlap(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(0, b"x" * 4 * MIB)
        place = disk.image.bat.payload_entry(0) & ~7
    poke_bat(disk_path, 6, encode_bat_entry(PayloadState.FULLY_PRESENT, place))
    with pytest.raises(CorruptDiskError):
        compact_disk(disk_path)


def test_compacting_what_is_compact_changes_nothing(disk_path: Path) -> None:
    with open_writable(disk_path) as disk:
        disk.write_at(0, b"x" * 2 * MIB)
    before = disk_path.read_bytes()
    result = compact_disk(disk_path)
    assert (result.size_before, result.blocks_moved, result.blocks_released) == (result.size_after, 0, 0)
    assert disk_path.read_bytes() == before


# -- pending sectors ---------------------------------------------------------------------------------------------------


class Bytes:
    """A file in memory, as much of one as pending sectors need."""

    path = Path("memory")
    writable = True

    def __init__(self, content: bytes) -> None:
        self.content = content

    def size(self) -> int:
        return len(self.content)

    def pread(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        data = self.pread(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("first", "last"), [(0, 0), (0, 1), (3, 6), (7, 9), (0, 8), (5, 40), (32767, 32769), (4, 70_001), (8, 65_536)]
)
def test_bits_are_set_as_one_by_one(first: int, last: int, value: bool) -> None:
    content = bytes([0b01010101]) * 20_000
    file: Any = Bytes(content)
    pending = PendingSectors(file)
    pending.set_bits(100, first, last, value=value)
    number = int.from_bytes(content[100:], "little")
    mask = ((1 << last) - 1) & ~((1 << first) - 1)
    number = number | mask if value else number & ~mask
    assert pending.pread(100, 19_900) == number.to_bytes(19_900, "little")
    assert pending.pread(0, 100) == content[:100]
    assert pending.pread(3, 30_000) == pending.pread(0, 20_000)[3:]


def test_a_parent_far_away_is_relinked_by_a_long_path(child_path: Path, tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(12):
        folder = folder / ("d" * 200)
    folder.mkdir(parents=True)
    (tmp_path / "parent.vhdx").rename(folder / "parent.vhdx")
    relink(child_path, folder / "parent.vhdx")
    assert read(child_path) == b"P" * 8 * MIB


@pytest.mark.parametrize("change", [{"log_length": 0}, {"log_version": 1}])
def test_a_disk_with_an_unusable_log_is_refused_for_writing_and_let_go(disk_path: Path, change: dict[str, Any]) -> None:
    content = disk_path.read_bytes()
    for offset in HEADER_OFFSETS:
        header = Header.decode(content[offset : offset + 4096], offset=offset)
        content = content[:offset] + replace(header, **change).encode() + content[offset + 4096 :]
    disk_path.write_bytes(content)
    for _ in range(2):  # the second try would find the first one's lock
        with pytest.raises(UnsupportedDiskError):
            open_writable(disk_path)
    assert disk_path.read_bytes() == content
