"""New VHDX files say what they were asked to say, and refuse what the format cannot have."""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.crash_files import scratch_folder
from vhdx.chain import open_vhdx, parent_linkages, parent_paths
from vhdx.check import check_disk
from vhdx.create import create_disk, relative_windows_path
from vhdx.errors import DiskError, OsError, OutOfRangeError, ParentError, UnsupportedDiskError
from vhdx.structures import PayloadState
from vhdx.writer import open_writable

MIB = 1 << 20
TIB = 1 << 40


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


def findings(path: Path) -> list[str]:
    return [str(finding) for finding in check_disk(path).findings]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("block_size", [MIB, 32 * MIB, 256 * MIB])
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_a_new_disk_opens_empty_with_what_was_asked(
    tmp_path: Path, kind: Any, block_size: int, sector_size: int
) -> None:
    path = tmp_path / "disk.vhdx"
    size = 300 * MIB + sector_size
    create_disk(
        path, size=size, kind=kind, block_size=block_size, sector_size=sector_size, physical_sector_size=sector_size
    )
    assert findings(path) == []
    with open_vhdx(path) as disk:
        metadata = disk.image.metadata
        assert (disk.size, disk.sector_size, metadata.physical_sector_size) == (size, sector_size, sector_size)
        assert metadata.file_parameters.block_size == block_size
        assert metadata.file_parameters.leave_blocks_allocated == (kind == "fixed")
        states = disk.image.bat.payload_states(0, disk.image.geometry.block_count)
        wanted = PayloadState.FULLY_PRESENT if kind == "fixed" else PayloadState.NOT_PRESENT
        assert (states == wanted).all()
        assert not any(disk.read_at(0, 100_000))
        assert not any(disk.read_at(size - 100_000, 100_000))
        assert disk.image.header.data_write_guid != uuid.UUID(int=0)
    assert leftovers(tmp_path) == []


def test_the_default_sizes_are_those_of_hyper_v(tmp_path: Path) -> None:
    create_disk(tmp_path / "a.vhdx", size=MIB)
    create_disk(tmp_path / "b.avhdx", parent=tmp_path / "a.vhdx")
    with open_vhdx(tmp_path / "b.avhdx") as disk:
        assert disk.parent is not None
        for link, block_size in ((disk.parent, 32 * MIB), (disk, 2 * MIB)):
            assert link.image.metadata.file_parameters.block_size == block_size
            assert (link.sector_size, link.image.metadata.physical_sector_size) == (512, 4096)
            assert link.image.header.log_length == MIB
            assert link.image.creator == "Godwit"


def test_the_largest_disk_is_small_on_storage(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=64 * TIB, block_size=MIB)
    assert path.stat().st_blocks * 512 < 2 * MIB  # of 515 MiB, nearly all of it BAT
    with open_vhdx(path) as disk:
        assert disk.size == 64 * TIB
        assert disk.read_at(64 * TIB - 512, 512) == bytes(512)


def test_guids_come_from_the_factory(tmp_path: Path) -> None:
    guids = [uuid.UUID(int=number) for number in range(1, 4)]
    create_disk(tmp_path / "a.vhdx", size=MIB, new_guid=iter(guids).__next__)
    with open_vhdx(tmp_path / "a.vhdx") as disk:
        header = disk.image.header
        assert [header.file_write_guid, header.data_write_guid, disk.image.metadata.disk_id] == guids


@pytest.mark.skipif(os.sep == "\\", reason="names that Windows does not have")
@pytest.mark.parametrize("name", ["back\\slash.vhdx", os.fsdecode(b"no-unicode-\xff.vhdx")])
def test_a_parent_that_no_locator_can_name_is_refused(tmp_path: Path, name: str) -> None:
    create_disk(tmp_path / name, size=MIB)
    with pytest.raises(UnsupportedDiskError, match="cannot name this path") as caught:
        create_disk(tmp_path / "child.vhdx", parent=tmp_path / name)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_child_finds_its_parent_and_reads_through_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    parent, child = tmp_path / "base" / "parent.vhdx", tmp_path / "child.avhdx"
    create_disk(parent, size=5 * MIB, sector_size=4096)
    with open_writable(parent) as disk:
        disk.write_at(3 * MIB, b"from the parent")
        disk.flush()
        guid = disk.image.header.data_write_guid
    create_disk(child, parent=parent)
    with open_vhdx(child, allowed_folders=[tmp_path]) as disk:
        assert disk.size == 5 * MIB
        assert disk.sector_size == 4096
        assert disk.read_at(3 * MIB, 15) == b"from the parent"
        assert parent_linkages(disk.image) == (guid,)
        assert parent_paths(disk.image)["relative_path"] == ".\\base\\parent.vhdx"
    assert findings(child) == []


@pytest.mark.parametrize(
    ("relative", "text"),
    [("parent.vhdx", ".\\parent.vhdx"), ("../../a/b.vhdx", "..\\..\\a\\b.vhdx"), ("a/b.vhdx", ".\\a\\b.vhdx")],
)
def test_relative_paths_are_written_as_windows_reads_them(relative: str, text: str) -> None:
    assert relative_windows_path(relative) == text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": 0}, OutOfRangeError),
        ({}, OutOfRangeError),
        ({"size": -512}, OutOfRangeError),
        ({"size": 1000}, OutOfRangeError),
        ({"size": 64 * TIB + 512}, OutOfRangeError),
        ({"size": 512 * 3, "sector_size": 4096}, OutOfRangeError),
        ({"size": MIB, "sector_size": 1024}, UnsupportedDiskError),
        ({"size": MIB, "physical_sector_size": 0}, UnsupportedDiskError),
        ({"size": MIB, "block_size": MIB // 2}, UnsupportedDiskError),
        ({"size": MIB, "block_size": 3 * MIB}, UnsupportedDiskError),
        ({"size": MIB, "block_size": 512 * MIB}, UnsupportedDiskError),
        ({"size": MIB, "kind": "sparse"}, UnsupportedDiskError),
        ({"size": MIB, "kind": "differencing"}, ParentError),
        ({"parent": "parent.vhdx", "kind": "fixed"}, ParentError),
        ({"parent": "parent.vhdx", "sector_size": 4096}, ParentError),
        ({"parent": "parent.vhdx", "size": MIB}, ParentError),
        ({"parent": "none.vhdx"}, OsError),
        ({"parent": "parent.vhdx", "bulk": True}, UnsupportedDiskError),
    ],
)
def test_what_the_format_cannot_have_is_refused_and_nothing_is_left(
    tmp_path: Path, options: dict[str, Any], error: type[DiskError]
) -> None:
    create_disk(tmp_path / "parent.vhdx", size=2 * MIB)
    if "parent" in options:
        options = options | {"parent": tmp_path / options["parent"]}
    with pytest.raises(error):
        create_disk(tmp_path / "disk.vhdx", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["parent.vhdx"]


def test_a_file_that_exists_is_kept_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    path.write_bytes(b"precious")
    with pytest.raises(OsError):
        create_disk(path, size=MIB)
    with pytest.raises(OsError):
        create_disk(path, size=MIB, bulk=True)
    assert path.read_bytes() == b"precious"
    create_disk(path, size=MIB, overwrite=True)
    with open_vhdx(path) as disk:
        assert disk.size == MIB


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = create_disk(path, size=MIB, bulk=True)
    path.write_bytes(b"precious")
    with pytest.raises(OsError):
        disk.commit()
    assert path.read_bytes() == b"precious"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_bulk_writes_in_any_order_read_back(tmp_path: Path, kind: Any, sector_size: int) -> None:
    path = tmp_path / "disk.vhdx"
    size = 40 * MIB
    chance = random.Random(3)
    model = bytearray(size)
    disk = create_disk(path, bulk=True, size=size, kind=kind, block_size=MIB, sector_size=sector_size)
    assert not path.exists()
    for _ in range(60):
        offset = chance.randrange(size)
        data = chance.randbytes(min(size - offset, chance.choice([1, 4096, 70_000, 3 * MIB])))
        disk.write_at(offset, data)
        model[offset : offset + len(data)] = data
    disk.trim(7 * MIB + 5, 2 * MIB)
    model[7 * MIB + 5 : 9 * MIB + 5] = bytes(2 * MIB)
    assert disk.read_at(0, size) == model
    held = np.concatenate(list(disk.allocated()))
    outside = bytearray(model)
    for start, end in held.tolist():
        outside[start:end] = bytes(end - start)
    assert not any(outside)
    disk.commit()
    assert findings(path) == []
    with open_vhdx(path) as opened:
        assert opened.read_at(0, size) == model


def test_bulk_blocks_that_were_prepared_take_writes_from_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    size = 6000 * MIB  # more blocks than a page of the table, and more than one chunk
    extents = np.array([[MIB, 20 * MIB], [511 * MIB + 5, 514 * MIB], [4095 * MIB, 4097 * MIB + 1]], dtype=np.int64)
    disk = create_disk(path, bulk=True, size=size, block_size=MIB)
    disk.prepare(extents)
    disk.prepare(extents)
    pieces = [
        (offset, min(offset + 300_000, end)) for start, end in extents.tolist() for offset in range(start, end, 300_000)
    ]
    before = len(list(disk.allocated()))

    def write(number: int) -> None:
        for start, end in pieces[number::4]:
            disk.write_at(start, random.Random(start).randbytes(end - start))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(disk.allocated())) == before
    disk.commit()
    assert findings(path) == []
    with open_vhdx(path) as opened:
        for start, end in pieces:
            assert opened.read_at(start, end - start) == random.Random(start).randbytes(end - start)
        assert not any(opened.read_at(0, MIB))
        assert not any(opened.read_at(20 * MIB, MIB))


def test_bulk_blocks_may_be_prepared_while_others_are_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    windows, window = 60, 16 * MIB
    disk = create_disk(path, bulk=True, size=windows * window, block_size=MIB)

    def write(number: int) -> None:
        for start in range(number * window, (number + 1) * window, 4 * MIB):
            disk.write_at(start, start.to_bytes(8, "little"))

    with ThreadPoolExecutor(3) as pool:
        written = []
        for number in range(windows):
            disk.prepare(np.array([[number * window, (number + 1) * window]], dtype=np.int64))
            written.append(pool.submit(write, number))
        for one in written:
            one.result()
    disk.commit()
    with open_vhdx(path) as opened:
        for start in range(0, windows * window, 4 * MIB):
            assert opened.read_at(start, 16) == start.to_bytes(8, "little") + bytes(8)


def test_a_big_bulk_write_is_one_write_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = create_disk(tmp_path / "disk.vhdx", bulk=True, size=64 * MIB, block_size=MIB)
    disk.prepare(np.array([[0, 32 * MIB]], dtype=np.int64))
    calls: list[int] = []
    real = disk._file.pwrite

    def pwrite(offset: int, data: memoryview) -> None:
        calls.append(len(data))
        real(offset, data)

    monkeypatch.setattr(disk._file, "pwrite", pwrite)
    disk.write_at(5, bytes(20 * MIB))
    disk.write_at(32 * MIB, bytes(9 * MIB))
    assert calls == [20 * MIB, 9 * MIB]
    disk.abort()


def test_a_bulk_disk_that_is_left_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with create_disk(tmp_path / "disk.vhdx", bulk=True, size=MIB) as disk:
        disk.write_at(0, b"x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiskError):
        disk.write_at(0, b"x")
    disk.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (MIB, 1), (MIB - 1, 2)])
def test_bulk_requests_outside_the_disk_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    with create_disk(tmp_path / "disk.vhdx", bulk=True, size=MIB) as disk:
        for request in (lambda: disk.write_at(offset, bytes(length)), lambda: disk.read_at(offset, length)):
            with pytest.raises(OutOfRangeError):
                request()
        with pytest.raises(OutOfRangeError):
            disk.prepare(np.array([[offset, offset + length]], dtype=np.int64))
