"""A FAT volume cut at any sector of any change: every older file is there and reads right, and repair loses none."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from conversion.filesystems.fat import FatFileSystem
from tests.support.block_devices import MemoryDevice
from tests.support.fat_images import fsck, make_volume, repaired

SECTOR = 512
# What fsck.vfat says of a volume that was cut: nothing that would cost an older file.
GRAVE = ("share", "circular", "beyond", "Bad", "bad", "Contains a free cluster", "Renaming", "Duplicate", "rectory")


def content_of(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


OLD = {
    "/old file": content_of(700, 1),
    "/FOLDER/old one with a long name": content_of(3000, 2),
    "/FOLDER/OTHER": content_of(512, 3),
    "/changed": content_of(2500, 4),
}

CHANGES: dict[str, tuple[Callable[[FatFileSystem], None], str, bytes | None]] = {
    # what is done, to which file, and what it holds afterwards (None: it is gone, or was a folder)
    "create": (
        lambda fs: fs.create_file("/FOLDER/new one", content_of(2000, 5)),
        "/FOLDER/new one",
        content_of(2000, 5),
    ),
    "create over sectors": (
        lambda fs: fs.create_file("/FOLDER/" + "n" * 200, content_of(2000, 5)),
        "/FOLDER/" + "n" * 200,
        content_of(2000, 5),
    ),
    "create in a hole": (
        lambda fs: fs.create_file("/HOLES/" + "n" * 60, content_of(900, 5)),
        "/HOLES/" + "n" * 60,
        content_of(900, 5),
    ),
    "create in a full folder": (
        lambda fs: fs.create_file("/FULL/" + "n" * 60, content_of(900, 5)),
        "/FULL/" + "n" * 60,
        content_of(900, 5),
    ),
    "create empty": (lambda fs: fs.create_file("/EMPTY", b""), "/EMPTY", b""),
    "overwrite": (
        lambda fs: fs.create_file("/changed", content_of(3000, 6), overwrite=True),
        "/changed",
        content_of(3000, 6),
    ),
    "remove": (lambda fs: fs.remove_file("/FOLDER/OTHER"), "/FOLDER/OTHER", None),
    "remove over sectors": (lambda fs: fs.remove_file("/LONG/" + "m" * 250), "/LONG/" + "m" * 250, None),
    "make folder": (lambda fs: fs.make_folder("/FOLDER/a new folder"), "/FOLDER/a new folder", None),
    "remove folder": (lambda fs: fs.remove_folder("/a folder to remove"), "/a folder to remove", None),
}


@pytest.fixture(params=[("-F12", "-s1"), ("-F32", "-s1")], ids=["fat12", "fat32"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bytearray, dict[str, bytes]]:
    volume = make_volume(tmp_path, 256 << 10, *request.param)
    files = dict(OLD)
    filesystem = FatFileSystem(MemoryDevice(volume))
    for folder in ("/FOLDER", "/HOLES", "/FULL", "/LONG", "/a folder to remove"):
        filesystem.make_folder(folder)
    files |= {f"/HOLES/H{number}": b"x" * number for number in range(30)}
    files |= {f"/FULL/F{number}": b"y" * number for number in range(30)}  # with . and .. two sectors are full
    files["/LONG/" + "m" * 250] = b"long"
    for name, data in files.items():
        filesystem.create_file(name, data)
    for number in range(12, 19):  # six slots are needed, the hole crosses the border of two sectors
        filesystem.remove_file(f"/HOLES/H{number}")
        del files[f"/HOLES/H{number}"]
    code, said = fsck(volume, tmp_path)
    assert code == 0, said
    return volume, files


@pytest.mark.parametrize("change", CHANGES)
def test_a_cut_at_any_sector_costs_no_older_file(
    volume: tuple[bytearray, dict[str, bytes]], change: str, tmp_path: Path
) -> None:
    before, files = volume
    do, subject, content = CHANGES[change]
    device = MemoryDevice(bytearray(before))
    do(FatFileSystem(device))
    code, said = fsck(device.content, tmp_path)
    assert code == 0, said
    old = files.get(subject)
    disk = bytearray(before)
    cuts = sectors_of(device.writes)
    assert cuts
    seen = {check(disk, files, subject, {old})}
    for number, (offset, data) in enumerate(cuts):
        disk[offset : offset + len(data)] = data
        seen.add(check(disk, files, subject, {old, content}))
        said = fsck(disk, tmp_path)[1]
        assert not any(word in said for word in GRAVE), said
        if number % 3 == 0:
            check(repaired(disk, tmp_path), files, subject, {old, content})
    assert disk == device.content
    assert seen == {old, content}


def check(disk: bytearray, files: dict[str, bytes], subject: str, allowed: set[bytes | None]) -> bytes | None:
    """Compare the older files; return what ``subject`` holds, which is the old or the new and nothing else."""
    filesystem = FatFileSystem(MemoryDevice(disk))
    for name, data in files.items():
        if name != subject:
            assert filesystem.read_file(name) == data, name
    # No alias shows without its long name, and nothing that was deleted or never there.
    for folder in {name.rpartition("/")[0] for name in (*files, subject)}:
        known = {name.rpartition("/")[2] for name in (*files, subject) if name.rpartition("/")[0] == folder}
        listed = {entry.name for entry in filesystem.list_folder(folder) or () if entry.kind == "file"}
        assert {name for name in listed - known if not name.startswith("FSCK")} == set()  # fsck.vfat's finds apart
    found = filesystem.read_file(subject)
    assert found in allowed
    return found


def sectors_of(writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Return the writes cut at the borders of sectors: what a disk writes whole or not at all."""
    pieces: list[tuple[int, bytes]] = []
    for offset, data in writes:
        done = 0
        while done < len(data):
            length = min(len(data) - done, SECTOR - (offset + done) % SECTOR)
            pieces.append((offset + done, data[done : done + length]))
            done += length
    return pieces
