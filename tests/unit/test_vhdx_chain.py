"""Parents of VHDX disks: where they are looked for, what may be opened, and which are the right ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.vhdx_builder import Block, ImageBuilder, parent_of
from vhdx.chain import MAX_CHAIN_LENGTH, candidate_paths, open_vhdx, parent_linkages, parent_paths
from vhdx.errors import CorruptDiskError, ParentError, UnsupportedDiskError
from vhdx.structures import MIB, PayloadState
from vhdx.vhdx import VhdxDisk

PARENT = UUID("83ed0ec3-24c8-49a6-a959-5e4bf1288bfb")
DATA = b"parent" * (MIB // 6) + b"last"


def write_parent(path: Path, guid: UUID = PARENT, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    builder = ImageBuilder(options.pop("size", 2 * MIB), data_write_guid=guid, **options)
    builder.blocks[0] = Block(PayloadState.FULLY_PRESENT, DATA)
    return builder.write(path)


def write_child(path: Path, *values: tuple[str, str], linkage: str | None = f"{{{PARENT}}}", **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    linked = (("parent_linkage", linkage),) if linkage is not None else ()
    return ImageBuilder(options.pop("size", 2 * MIB), parent_values=(*linked, *values), **options).write(path)


def reads_parent(path: Path, allowed: Sequence[Path] = ()) -> Path:
    with open_vhdx(path, allowed_folders=allowed) as disk:
        assert disk.read_at(0, MIB) == DATA
        assert disk.parent is not None
        return disk.parent.path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("relative_path", "parent.vhdx"),
        ("relative_path", ".\\parent.vhdx"),
        ("relative_path", "..\\vm\\parent.vhdx"),
        ("absolute_win32_path", "\\\\?\\d:\\disks\\vm\\parent.vhdx"),
        ("absolute_win32_path", "C:\\Users\\Public\\parent.vhdx"),
        ("absolute_win32_path", "\\\\server\\share\\vm\\parent.vhdx"),
        ("volume_path", "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\path2\\parent.vhdx"),
        ("relative_path", "parent.vhdx\0\0"),
    ],
)
def test_windows_paths_lead_to_a_parent_beside_the_child(tmp_path: Path, key: str, value: str) -> None:
    parent = write_parent(tmp_path / "vm" / "parent.vhdx")
    assert reads_parent(write_child(tmp_path / "vm" / "child.vhdx", (key, value))) == parent


def test_the_end_of_an_absolute_path_is_found_in_an_allowed_folder(tmp_path: Path) -> None:
    parent = write_parent(tmp_path / "mount" / "base" / "gold" / "parent.vhdx")
    child = write_child(tmp_path / "vm" / "child.vhdx", ("absolute_win32_path", "E:\\base\\gold\\parent.vhdx"))
    assert reads_parent(child, [tmp_path / "mount"]) == parent


def test_paths_are_tried_in_order_and_a_stale_one_is_passed_over(tmp_path: Path) -> None:
    write_parent(tmp_path / "stale.vhdx", UUID(int=1))
    right = write_parent(tmp_path / "right.vhdx")
    child = write_child(
        tmp_path / "child.vhdx",
        ("volume_path", "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\stale.vhdx"),
        ("absolute_win32_path", "C:\\right.vhdx"),
        ("relative_path", ".\\gone.vhdx"),
    )
    assert reads_parent(child) == right
    image = open_vhdx(child, with_parents=False).image
    assert list(parent_paths(image)) == ["relative_path", "absolute_win32_path", "volume_path"]
    assert parent_linkages(image) == (PARENT,)
    image.close()


def test_a_path_of_this_system_is_opened_inside_allowed_folders_only(tmp_path: Path) -> None:
    parent = write_parent(tmp_path / "base" / "parent.vhdx")
    child = write_child(tmp_path / "vm" / "child.vhdx", ("absolute_win32_path", str(parent)))
    assert reads_parent(child, [tmp_path / "base"]) == parent
    with open_vhdx(child) as disk, pytest.raises(ParentError, match="outside the allowed folders") as raised:
        disk.read_at(0, 512)
    assert str(parent) in str(raised.value)


def test_relative_paths_and_links_cannot_leave_the_allowed_folders(tmp_path: Path) -> None:
    parent = write_parent(tmp_path / "secret" / "parent.vhdx")
    outward = write_child(tmp_path / "vm" / "outward.vhdx", ("relative_path", "..\\secret\\parent.vhdx"))
    (tmp_path / "vm" / "link.vhdx").symlink_to(parent)
    linked = write_child(tmp_path / "vm" / "linked.vhdx", ("relative_path", "link.vhdx"))
    for child in (outward, linked):
        with open_vhdx(child) as disk:
            assert disk.parent is None
            with pytest.raises(ParentError, match="outside the allowed folders"):
                disk.read_at(0, 512)
        assert reads_parent(child, [tmp_path / "secret"]) == parent


def test_the_end_of_a_path_never_climbs_out_of_an_allowed_folder(tmp_path: Path) -> None:
    paths = {"absolute_win32_path": "C:\\a\\..\\..\\b.vhdx"}
    found = list(candidate_paths(paths, child_folder=tmp_path, allowed=[tmp_path]))
    assert found == [tmp_path / "b.vhdx"]


def test_a_changed_parent_is_refused_and_both_guids_named(tmp_path: Path) -> None:
    other = UUID(int=0xC0FFEE)
    write_parent(tmp_path / "parent.vhdx", other)
    child = write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx"))
    with pytest.raises(ParentError, match="changed") as raised:
        open_vhdx(child)
    assert str(other) in str(raised.value) and str(PARENT) in str(raised.value)


def test_the_second_linkage_is_accepted_and_a_zero_one_is_not(tmp_path: Path) -> None:
    write_parent(tmp_path / "parent.vhdx")
    values = (("parent_linkage2", f"{{{str(PARENT).upper()}}}"), ("relative_path", "parent.vhdx"))
    reads_parent(write_child(tmp_path / "child.vhdx", *values, linkage=f"{{{UUID(int=4)}}}"))
    zero = f"{{{UUID(int=0)}}}"
    write_parent(tmp_path / "parent.vhdx", UUID(int=0))
    with pytest.raises(ParentError, match="changed"):
        open_vhdx(write_child(tmp_path / "zero.vhdx", ("parent_linkage2", zero), ("relative_path", "parent.vhdx")))


@pytest.mark.parametrize("linkage", [None, "garbage", "{12345678}"])
def test_a_locator_without_a_usable_linkage_is_corruption(tmp_path: Path, linkage: str | None) -> None:
    write_parent(tmp_path / "parent.vhdx")
    with pytest.raises(CorruptDiskError, match="parent_linkage"):
        open_vhdx(write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx"), linkage=linkage))


def test_a_child_whose_parent_is_missing_opens_for_its_own_part(tmp_path: Path) -> None:
    child = ImageBuilder(3 * MIB, parent_values=parent_of(PARENT, "gone.vhdx"))
    child.blocks[1] = Block(PayloadState.FULLY_PRESENT, b"own!" * (MIB // 4))
    with open_vhdx(child.write(tmp_path / "child.vhdx")) as disk:
        assert disk.read_at(MIB, MIB) == b"own!" * (MIB // 4)
        assert [extents.tolist() for extents in disk.stored()] == [[[MIB, 2 * MIB]]]
        assert [extents.tolist() for extents in disk.changed()] == [[[MIB, 2 * MIB]]]
        with pytest.raises(ParentError, match=r"missing.*gone\.vhdx"):
            disk.read_at(0, 512)
        with pytest.raises(ParentError, match="missing"):
            disk.allocated()


def test_a_grandparent_that_is_missing_is_told_when_it_is_needed(tmp_path: Path) -> None:
    write_child(tmp_path / "middle.vhdx", ("relative_path", "gone.vhdx"))
    builder = ImageBuilder(2 * MIB, parent_values=parent_of(UUID(int=0xDA7A), "middle.vhdx"))
    with open_vhdx(builder.write(tmp_path / "top.vhdx")) as disk:
        assert disk.parent is not None and disk.parent.parent_error is not None
        with pytest.raises(ParentError, match=r"gone\.vhdx") as raised:
            disk.read_at(0, 512)
        assert raised.value.path == str(tmp_path / "middle.vhdx")


def test_a_loop_is_named_file_by_file(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "b")):
        guid = UUID(int=ord(name))
        builder = ImageBuilder(
            MIB, data_write_guid=guid, parent_values=parent_of(UUID(int=ord(parent)), f"{parent}.vhdx")
        )
        builder.write(tmp_path / f"{name}.vhdx")
    with pytest.raises(ParentError, match=r"loop: \S*b\.vhdx -> \S*c\.vhdx -> \S*b\.vhdx"):
        open_vhdx(tmp_path / "a.vhdx")


def test_a_disk_that_is_its_own_parent_is_a_loop(tmp_path: Path) -> None:
    builder = ImageBuilder(MIB, data_write_guid=PARENT, parent_values=parent_of(PARENT, "self.vhdx"))
    with pytest.raises(ParentError, match="loop"):
        open_vhdx(builder.write(tmp_path / "self.vhdx"))


def deep_chain(folder: Path, count: int) -> Path:
    write_parent(folder / "0.vhdx", UUID(int=1))
    for number in range(1, count):
        values = parent_of(UUID(int=number), f"{number - 1}.vhdx")
        ImageBuilder(2 * MIB, data_write_guid=UUID(int=number + 1), parent_values=values).write(
            folder / f"{number}.vhdx"
        )
    return folder / f"{count - 1}.vhdx"


def test_a_chain_is_read_to_its_bound_and_refused_beyond(tmp_path: Path) -> None:
    path = deep_chain(tmp_path, MAX_CHAIN_LENGTH + 1)
    with pytest.raises(ParentError, match=f"more than {MAX_CHAIN_LENGTH}"):
        open_vhdx(path)
    with open_vhdx(tmp_path / f"{MAX_CHAIN_LENGTH - 1}.vhdx") as disk:
        assert len(disk.chain) == MAX_CHAIN_LENGTH
        assert disk.read_at(0, MIB) == DATA


def test_sector_sizes_must_agree(tmp_path: Path) -> None:
    write_parent(tmp_path / "parent.vhdx", sector_size=4096)
    with pytest.raises(ParentError, match=r"512 bytes.*4096"):
        open_vhdx(write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx")))


def test_past_the_end_of_a_smaller_parent_there_are_zeros(tmp_path: Path) -> None:
    write_parent(tmp_path / "parent.vhdx", size=MIB - 512)
    with open_vhdx(write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx"), size=5 * MIB)) as disk:
        assert disk.read_at(0, 2 * MIB) == DATA[: MIB - 512] + bytes(MIB + 512)
        assert [extents.tolist() for extents in disk.allocated()] == [[[0, MIB - 512]]]


def test_a_parent_that_is_no_vhdx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parent.vhdx").write_bytes(b"conectix" * 1000)
    with pytest.raises(ParentError, match="cannot be opened"):
        open_vhdx(write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX systems")
def test_a_locator_cannot_make_a_pipe_or_folder_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "x" * 300, "bad\0name", ""):
        values = (("relative_path", name or "."),)
        with open_vhdx(write_child(tmp_path / "child.vhdx", *values)) as disk:
            assert disk.parent is None
            with pytest.raises(ParentError, match="missing"):
                disk.read_at(0, 512)


def test_an_unknown_kind_of_locator_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.vhdx_builder.VHDX_PARENT_LOCATOR", UUID(int=0xBAD))
    with pytest.raises(UnsupportedDiskError, match=str(UUID(int=0xBAD))):
        open_vhdx(write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx")))


def test_changes_since_a_disk_that_is_no_ancestor_are_refused(tmp_path: Path) -> None:
    write_parent(tmp_path / "parent.vhdx")
    with open_vhdx(write_child(tmp_path / "child.vhdx", ("relative_path", "parent.vhdx"))) as disk:
        assert isinstance(disk, VhdxDisk)
        with pytest.raises(ParentError, match="no parent"):
            disk.changed_since(tmp_path / "elsewhere.vhdx")


def test_a_link_smaller_than_its_parent_hides_the_rest_of_it_in_reads_and_maps(tmp_path: Path) -> None:
    base = ImageBuilder(3 * MIB, data_write_guid=UUID(int=1))
    base.blocks = {block: Block(PayloadState.FULLY_PRESENT, b"base" * (MIB // 4)) for block in range(3)}
    base.write(tmp_path / "base.vhdx")
    cut = MIB + 3 * 512
    ImageBuilder(cut, data_write_guid=UUID(int=2), parent_values=parent_of(UUID(int=1), "base.vhdx")).write(
        tmp_path / "middle.vhdx"
    )
    top = ImageBuilder(4 * MIB, parent_values=parent_of(UUID(int=2), "middle.vhdx"))
    with open_vhdx(top.write(tmp_path / "top.vhdx")) as disk:
        assert disk.read_at(0, 4 * MIB) == b"base" * (cut // 4) + bytes(4 * MIB - cut)
        assert [extents.tolist() for extents in disk.allocated()] == [[[0, cut]]]
        # What the base has past the middle's end is gone, so a copy of the base must be told of it.
        assert [extents.tolist() for extents in disk.changed_since(tmp_path / "base.vhdx")] == [[[cut, 3 * MIB]]]
        assert list(disk.changed_since(tmp_path / "middle.vhdx")) == []
