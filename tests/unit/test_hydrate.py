"""Hydration: points become files of any format, whole or not at all, wherever the store's names would lead."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from replica import hydrate
from replica.block import Digest
from replica.errors import IntegrityError, StoreError, UsageError
from replica.hydrate import FORMATS, choose_disks, file_name, restore_files, target_paths
from replica.model import DiskRecord, Point
from tests.support.engine import BLOCK, WORKERS, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore
from vhdx.errors import DiskError, OsError
from vhdx.formats import open_disk
from vhdx.osfile import OsFiles


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    disks = [
        random_blocks(1, 5) + bytes(3 * BLOCK) + random_blocks(2, 2) + b"tail" * 128,
        bytes(BLOCK * 20) + b"x" * 512,
    ]
    return make_lab(tmp_path / "source", disks, host=make_host())


def restore(
    lab: Lab, paths: list[Path], format_: str = "raw", disks: list[int] | None = None, **options: object
) -> None:
    point = lab.replicate() if not lab.published else newest(lab)
    chosen = [point.disks[number] for number in (range(len(paths)) if disks is None else disks)]
    restore_files(
        lab.store,
        lab.host,
        lab.found,
        point,
        disks=chosen,
        paths=paths,
        format_=format_,  # type: ignore[arg-type]
        workers=WORKERS,
        **options,  # type: ignore[arg-type]
    )


def newest(lab: Lab) -> Point:
    from replica.catalog import newest_point  # noqa: PLC0415

    return newest_point(lab.store, lab.found)


def record(name: str, number: int = 3) -> DiskRecord:
    return DiskRecord(number, name, 1 << 20, 512, "raw", "scsi", 0, Digest())


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("format_", [one for one in FORMATS if one != "qcow2"])
def test_every_format_holds_the_disk_byte_for_byte(lab: Lab, tmp_path: Path, format_: str) -> None:
    paths = [tmp_path / "new" / "folder" / f"disk{n}{hydrate.SUFFIXES[format_]}" for n in range(2)]
    restore(lab, paths, format_)
    for path, source in zip(paths, lab.contents(), strict=True):
        with open_disk(path) as disk:
            data = disk.read_at(0, disk.size)
            assert data[: len(source)] == source
            assert not any(data[len(source) :])
            assert disk.size == len(source) or (format_.startswith("vhd") and disk.size - len(source) < 2 << 20)
    assert files_below(tmp_path / "new") == sorted(f"folder/{path.name}" for path in paths)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..",
        ".",
        "/",
        "\\\\server\\share",
        "a\x00b",
        "x\n\x1b[31m",
        "",
        " . ",
        "C:evil",
        ".hidden",
        "日" * 100,
        "é" * 250,
        "a" * 5000,
        "CON",
        "\u202egnp",
    ],
)
def test_a_disk_name_of_the_store_becomes_a_plain_file_in_the_folder(name: str, tmp_path: Path) -> None:
    (path,) = target_paths([record(name)], tmp_path / "to", "vhdx", is_folder=True)
    assert path.parent == tmp_path / "to"
    assert path.suffix == ".vhdx"
    assert not path.name.startswith(".")
    assert all(c.isprintable() for c in path.name)
    assert len(path.name.encode()) < 220
    path.parent.mkdir()
    path.touch()
    assert files_below(tmp_path) == [f"to/{path.name}"]


def test_a_name_that_says_nothing_becomes_the_number() -> None:
    assert file_name(record("..", 7)) == "disk7"
    assert file_name(record("os disk-1_a", 7)) == "os disk-1_a"


def test_a_restore_into_a_folder_uses_hostile_names_safely(lab: Lab, tmp_path: Path) -> None:
    point = lab.replicate()
    hostile = replace(point.disks[0], name="../../../escaped" + "日" * 200)
    paths = target_paths([hostile], tmp_path / "to", "raw", is_folder=True)
    restore_files(lab.store, lab.host, lab.found, point, disks=[hostile], paths=paths, format_="raw", workers=WORKERS)
    assert paths[0].read_bytes() == lab.contents()[0]
    assert paths[0].parent == tmp_path / "to"


def test_where_disks_go(tmp_path: Path) -> None:
    one, two = record("os", 0), record("data", 1)
    file, folder = tmp_path / "x.img", tmp_path / "there"
    folder.mkdir()
    assert target_paths([one], file, "raw", is_folder=False) == [file]
    assert target_paths([one], folder, "raw", is_folder=False) == [folder / "os.img"]
    assert target_paths([one, two], file, "vhd", is_folder=False) == [file / "os.vhd", file / "data.vhd"]


def test_disks_are_chosen_by_number_or_name(lab: Lab) -> None:
    point = lab.replicate()
    assert choose_disks(point, []) == list(point.disks)
    assert choose_disks(point, ["disk1", "0"]) == [point.disks[1], point.disks[0]]
    with pytest.raises(UsageError, match="no disk '7'") as caught:
        choose_disks(point, ["7"])
    assert "0 (disk0), 1 (disk1)" in (caught.value.hint or "")


def test_two_disks_are_never_restored_into_one_file(lab: Lab, tmp_path: Path) -> None:
    for paths in ([tmp_path / "a.img"] * 2, [tmp_path / "a.img", tmp_path / "b" / ".." / "a.img"]):
        with pytest.raises(UsageError, match="one file"):
            restore(lab, paths)
    assert not (tmp_path / "a.img").exists()


def test_a_file_that_exists_is_kept_unless_told_otherwise(lab: Lab, tmp_path: Path) -> None:
    first, second = tmp_path / "a.img", tmp_path / "b.img"
    second.write_bytes(b"precious")
    with pytest.raises(OsError, match="exists"):
        restore(lab, [first, second])
    assert second.read_bytes() == b"precious"
    assert not first.exists()
    restore(lab, [first, second], overwrite=True)
    assert (first.read_bytes(), second.read_bytes()) == lab.contents()


@pytest.mark.parametrize("format_", ["raw", "vhdx", "vhd"])
def test_a_restore_that_fails_leaves_what_was_there(lab: Lab, tmp_path: Path, format_: str) -> None:
    lab.replicate()
    target = tmp_path / "to" / "disk.x"
    target.parent.mkdir()
    target.write_bytes(b"precious")
    good = lab.store
    lab.store = FaultyStore(good, [Fault(FaultKind.SHORT_BODY, ("get",), "*/segments/*")])
    with pytest.raises(IntegrityError, match="cut"):
        restore_one(lab, target, format_)
    lab.store = FaultyStore(good, [Fault(FaultKind.ERROR, ("get",), "*/segments/*")])
    with pytest.raises(StoreError):
        restore_one(lab, target, format_)
    assert files_below(target.parent) == ["disk.x"]
    assert target.read_bytes() == b"precious"


def restore_one(lab: Lab, path: Path, format_: str) -> None:
    restore(lab, [path], format_, disks=[0], overwrite=True)


def test_too_little_room_is_said_before_anything_is_written(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 8 * BLOCK  # seven blocks of data and the tail
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UsageError, match=f"{needed} bytes of data and only {needed - 1} bytes are free"):
        restore(lab, [tmp_path / "to" / "a.img"], disks=[0])
    assert files_below(tmp_path / "to") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    restore(lab, [tmp_path / "to" / "a.img"], disks=[0])


def test_a_file_system_that_fills_up_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    class Full(OsFiles):
        def link_exclusive(self, temporary: Path, target: Path) -> bool:
            raise OsError("cannot give the finished file its name: No space left on device", path=str(target))

    with pytest.raises(DiskError, match="No space left"):
        restore(lab, [tmp_path / "to" / "a.img"], disks=[0], files=Full())
    assert files_below(tmp_path / "to") == []


def test_a_folder_that_cannot_be_made_is_our_error(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OsError) as caught:
        restore(lab, [tmp_path / "file" / "a.img"], disks=[0])
    assert str(tmp_path / "file") in str(caught.value)
    with pytest.raises(OsError):
        restore(lab, [tmp_path / ("x" * 300) / "a.img"], disks=[0])


def test_a_raw_restore_is_sparse(lab: Lab, tmp_path: Path) -> None:
    lab.write(bytes(64 << 20), 1)
    lab.patch(32 << 20, b"x", 1)
    restore(lab, [tmp_path / "a.img"], disks=[1])
    assert os.stat(tmp_path / "a.img").st_size == 64 << 20  # noqa: PTH116
    assert os.stat(tmp_path / "a.img").st_blocks * 512 < 1 << 20  # noqa: PTH116
