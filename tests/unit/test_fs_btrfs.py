"""btrfs as mkfs.btrfs makes it and as Linux left it in a sample; compressed extents; damaged ones."""

from __future__ import annotations

import gzip
import random
from contextlib import suppress
from pathlib import Path

import pytest

from conversion.device import Slice
from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.filesystems.btrfs import BtrfsFileSystem
from conversion.filesystems.lzo import decompress_lzo
from conversion.filesystems.walk import crc32c
from tests.support.linux_filesystems import DamagedDevice, FileDevice, check_links, check_tree, run, sample_tree
from vhdx.formats import open_disk

SAMPLE = Path(__file__).parents[3] / "shared/samples/vhdx/btrfs.vhdx.gz"
KINDS = {
    "crc32c": (),
    "xxhash": ("--csum", "xxhash"),
    "sha256": ("--csum", "sha256", "-m", "single"),
    "blake2": ("--csum", "blake2", "-n", "4096"),
    "mixed": ("--mixed", "-O", "^no-holes"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    sample_tree(folder / "@")
    return folder


def make(image: Path, tree: Path, *options: str) -> Path:
    with image.open("wb") as file:
        file.truncate(160 << 20)
    run("mkfs.btrfs", "-q", "-L", "a label", "--rootdir", tree, *options, image)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_mkfs_wrote(kind: str, tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, *KINDS[kind])
    reader = BtrfsFileSystem(FileDevice(image))
    assert reader.kind == "btrfs"
    assert reader.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
    assert reader.label == "a label"
    assert not reader.is_dirty
    check_tree(reader, tree)
    assert reader.read_file("/@/relative") == b"guest\n"
    assert reader.extents("/@/large") is None  # data have checksums
    assert [(one.id, one.path) for one in reader.subvolumes()] == [(5, "")]
    assert reader.default_subvolume_id() == 5
    assert reader.subvolume("@") is None  # a folder
    with pytest.raises(DamagedError, match="more than 1000"):
        reader.read_file("/@/large", largest_bytes=1000)


def test_links(tree: Path, tmp_path: Path) -> None:
    reader = BtrfsFileSystem(FileDevice(make(tmp_path / "image", tree / "@")))
    check_links(reader)


def test_the_other_copy_of_metadata_is_read(tree: Path, tmp_path: Path) -> None:
    device = FileDevice(make(tmp_path / "image", tree).read_bytes())
    marks = places_of_nodes(device)
    first, second = next(places for places in marks.values() if len(places) == 2)
    check_tree(BtrfsFileSystem(DamagedDevice(device, {first + 200: 0x5A, first + 201: 0xA5})), tree)
    both = {at + 200 + more: 0x5A for at in (first, second) for more in range(8)}
    with pytest.raises(DamagedError, match="checksum"):
        check_tree(BtrfsFileSystem(DamagedDevice(device, both)), tree)


def places_of_nodes(device: FileDevice) -> dict[int, list[int]]:
    """Return where the copies of each node of the newest generation are, by address."""
    reader = BtrfsFileSystem(device)
    fsid = device.read_at(0x10020, 16)
    found: dict[int, list[int]] = {}
    root = reader._tree_of(5)  # the tree that every test here reads
    for at in range(1 << 20, device.size, 16384):
        header = device.read_at(at, 101)
        if header[32:48] == fsid and int.from_bytes(header[48:56], "little") == root:
            found.setdefault(root, []).append(at)
    return found


def test_an_unknown_feature_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    raw = bytearray(make(tmp_path / "image", tree).read_bytes())
    raw[0x100BD] |= 0x20
    raw[0x10000:0x10004] = (crc32c(0xFFFFFFFF, raw[0x10020:0x11000]) ^ 0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(UnsupportedError, match="extent_tree_v2"):
        BtrfsFileSystem(FileDevice(bytes(raw)))


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"there is no {SAMPLE}")
def test_a_sample_that_linux_made(tmp_path: Path) -> None:
    path = tmp_path / "btrfs.vhdx"
    path.write_bytes(gzip.decompress(SAMPLE.read_bytes()))
    with open_disk(path) as disk:
        reader = BtrfsFileSystem(Slice(disk, 1 << 20, disk.size - (1 << 20)))
        assert reader.uuid == "5e0c7724-5a3e-4ec9-8b6f-a1342cc65d09"
        assert [entry.name for entry in reader.list_folder("/") or ()] == ["folder", "opt", "subvolume"]
        paths = [one.path for one in reader.subvolumes()]
        assert paths[0] == ""
        assert len(paths) > 1
        for one in reader.subvolumes()[1:]:
            inside, view = reader.list_folder(f"/{one.path}"), reader.subvolume(one.path)
            assert view is not None
            assert inside is not None
            assert view.list_folder("/") == inside


def test_damage_ends_in_an_error_of_ours(tree: Path, tmp_path: Path) -> None:
    raw = make(tmp_path / "image", tree, "-m", "single", "-n", "4096").read_bytes()
    device = FileDevice(raw)
    fsid = raw[0x10020:0x10030]
    nodes = [at for at in range(0, len(raw), 4096) if raw[at + 32 : at + 48] == fsid]
    chance = random.Random(9)
    assert survives(DamagedDevice(device, {}))
    failures = 0
    for _ in range(60):
        changed: dict[int, int] = {}
        for at in chance.choices(nodes, k=chance.choice([1, 2, 5])):
            node = bytearray(raw[at : at + 4096])
            for _ in range(chance.choice([1, 3])):
                node[chance.choice([chance.randrange(32, 400), chance.randrange(32, 4096)])] = chance.randrange(256)
            node[:4] = (crc32c(0xFFFFFFFF, node[32:]) ^ 0xFFFFFFFF).to_bytes(4, "little")
            changed |= {at + index: value for index, value in enumerate(node) if raw[at + index] != value}
        failures += not survives(DamagedDevice(device, changed))
    assert failures
    for size in [0, 65536, 65536 + 4095, 70000, 1 << 20]:
        assert not survives(DamagedDevice(device, {}, size))


def survives(device: DamagedDevice) -> bool:
    """Read everything; return whether nothing was found amiss. Only the project's own errors may leave."""
    try:
        reader = BtrfsFileSystem(device)
        reader.subvolumes()
        reader.default_subvolume_id()
        pending, seen = ["/"], 0
        while pending and seen < 200:
            folder = pending.pop()
            for entry in reader.list_folder(folder) or ():
                seen += 1
                path = f"{folder}/{entry.name}"
                if entry.kind == "folder" and path.count("/") < 6:
                    pending.append(path)
                else:
                    reader.read_file(path, largest_bytes=2 << 20)
                    reader.extents(path)
    except ConversionError:
        return False
    return True


def test_lzo_by_hand() -> None:
    end = b"\x11\0\0"
    assert decompress_lzo(bytes([17 + 5]) + b"hello" + end, 100) == b"hello"
    # Four literals, then 20 bytes from 4 back (a long match), then the end.
    assert decompress_lzo(bytes([17 + 4]) + b"abcd" + bytes([0x20 | 18, 3 << 2, 0]) + end, 100) == b"abcd" * 6
    for damaged in (
        b"",
        b"\x11",
        bytes([17 + 5]) + b"hel",
        bytes([17 + 4]) + b"abcd" + bytes([0x20 | 18, 0xFF, 0xFF]) + end,
    ):
        with pytest.raises(ValueError, match=r"too early|outside"):
            decompress_lzo(damaged, 100)
    with pytest.raises(ValueError, match=r"outside|more than"):
        decompress_lzo(bytes([17 + 4]) + b"abcd" + bytes([0x20 | 31, 3 << 2, 0]) + end, 20)
    chance = random.Random(2)
    for _ in range(2000):
        with suppress(ValueError):
            assert len(decompress_lzo(chance.randbytes(chance.randrange(1, 60)), 4096)) <= 4096
