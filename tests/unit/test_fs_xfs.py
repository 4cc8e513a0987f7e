"""XFS as mkfs.xfs makes it, fragmented files by hand, the log, and damaged ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.filesystems.walk import crc32c
from conversion.filesystems.xfs import XfsFileSystem
from tests.support.linux_filesystems import DamagedDevice, FileDevice, check_links, check_tree, run, sample_tree

KINDS = {
    "v5": (),
    "v4": ("-m", "crc=0"),
    "small blocks": ("-b", "size=1024", "-n", "size=8192", "-i", "size=512"),
    "no ftype": ("-m", "crc=0", "-n", "ftype=0"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sample_tree(tmp_path_factory.mktemp("tree"), names=0)
    (folder / "many").rmdir()
    (folder / "many").mkdir()
    for number in range(400):
        (folder / f"many/a_name_that_makes_folders_large_{number}").write_text(f"{number}\n")
    return folder


def make(image: Path, tree: Path, *options: str) -> Path:
    with image.open("wb") as file:
        file.truncate(300 << 20)
    proto = image.with_suffix(".proto")
    proto.write_text("/dev/null\n0 0\n" + described(tree) + "$\n")
    run("mkfs.xfs", "-q", "-L", "a label", "-p", proto, *options, image)
    return image


def described(folder: Path, name: str = "") -> str:
    """Return mkfs.xfs's description of a folder."""
    lines = f"{name} d--755 0 0\n"
    for item in sorted(folder.iterdir()):
        if item.is_symlink():
            lines += f"{item.name} l--777 0 0 {item.readlink()}\n"
        elif item.is_dir():
            lines += described(item, item.name) + "$\n"
        else:
            lines += f"{item.name} ---644 0 0 {item}\n"
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_mkfs_wrote(kind: str, tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, *KINDS[kind])
    reader = XfsFileSystem(FileDevice(image))
    assert reader.kind == "xfs"
    assert reader.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
    assert reader.label == "a label"
    assert not reader.is_dirty
    check_tree(reader, tree)
    check_links(reader)
    extents = reader.extents("large")
    assert extents is not None
    device = FileDevice(image)
    assert b"".join(device.read_at(at, size) for at, size in extents) == (tree / "large").read_bytes()
    with pytest.raises(DamagedError, match="more than 1000"):
        reader.read_file("large", largest_bytes=1000)


def inode_offset(image: Path, name: str) -> int:
    found = run("xfs_db", "-r", "-c", f"path /{name}", "-c", "daddr", image)
    sector = int(found.split()[-1])
    index = int(run("xfs_db", "-r", "-c", f"path /{name}", "-c", "print v3.inumber", image).split()[-1]) % 8
    return sector * 512 // 4096 * 4096 + index * 512


def test_a_tree_of_extents(tree: Path, tmp_path: Path) -> None:
    """A file that lies in two pieces, with a hole between, found through a tree instead of a list."""
    image = make(tmp_path / "image", tree)
    content = bytearray(image.read_bytes())
    at = inode_offset(image, "block")
    inode = bytearray(content[at : at + 512])
    assert inode[:2] == b"IN"
    record = bytes(inode[176:192])
    high, low = struct.unpack(">QQ", record)
    second = struct.pack(">QQ", high | 2 << 9, low)  # the same block again, as the file's third
    where = 70 << 20  # in the last group nothing is used
    blocks = int(run("xfs_db", "-r", "-c", "sb 0", "-c", "print agblocks", image).split()[-1])
    log = int(run("xfs_db", "-r", "-c", "sb 0", "-c", "print agblklog", image).split()[-1])
    group, within = divmod(where // 4096, blocks)
    assert not any(content[where : where + 4096])
    fsid = content[32:48]
    head = struct.pack(">4sHHQQQQ16sQ", b"BMA3", 0, 2, 2**64 - 1, 2**64 - 1, where // 512, 0, bytes(fsid), 0)
    node = bytearray((head + bytes(8) + record + second).ljust(4096, b"\0"))
    node[64:68] = sealed(node, 64)
    content[where : where + 4096] = node
    inode[5], inode[56:64], inode[76:80] = 3, (3 * 4096).to_bytes(8, "big"), (2).to_bytes(4, "big")
    room = (512 - 176 - 4) // 16
    fork = struct.pack(">HHQ", 1, 1, 0).ljust(4 + room * 8, b"\0") + struct.pack(">Q", group << log | within)
    inode[176:512] = fork.ljust(336, b"\0")
    inode[100:104] = sealed(inode, 100)
    content[at : at + 512] = inode
    block = (tree / "block").read_bytes()
    assert XfsFileSystem(FileDevice(bytes(content))).read_file("block") == block + bytes(4096) + block
    content[where + 100] ^= 1
    with pytest.raises(DamagedError, match="checksum"):
        XfsFileSystem(FileDevice(bytes(content))).read_file("block")


def sealed(block: bytes | bytearray, at: int) -> bytes:
    blank = bytes(block[:at]) + bytes(4) + bytes(block[at + 4 :])
    return (crc32c(0xFFFFFFFF, blank) ^ 0xFFFFFFFF).to_bytes(4, "little")


def test_a_log_that_does_not_end_in_an_unmount_is_dirty(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree)
    device = FileDevice(image)
    converted = run("xfs_db", "-r", "-c", "sb 0", "-c", f"convert fsblock {log_start(image)} byte", image)
    start = int(converted.split()[1].strip("()"))
    assert device.read_at(start, 4) == bytes.fromhex("feedbabe")
    written_on = {start + 512 * number + 3: 1 for number in range(2, 6)}
    for changed in ({start + 512 + 9: 0}, {start + 43: 2}, written_on, {start: 0}):
        assert XfsFileSystem(DamagedDevice(device, changed)).is_dirty, changed
    assert not XfsFileSystem(DamagedDevice(device, {})).is_dirty


def log_start(image: Path) -> str:
    return run("xfs_db", "-r", "-c", "sb 0", "-c", "print logstart", image).split()[-1]


def test_an_unknown_feature_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree)
    sector = bytearray(image.read_bytes()[:512])
    sector[218] |= 0x80
    sector[224:228] = sealed(sector, 224)
    changed = {at: sector[at] for at in (218, *range(224, 228))}
    with pytest.raises(UnsupportedError, match="0x8000"):
        XfsFileSystem(DamagedDevice(FileDevice(image), changed))


@pytest.mark.parametrize("kind", ["v5", "v4"])
def test_damage_ends_in_an_error_of_ours(kind: str, tree: Path, tmp_path: Path) -> None:
    image = FileDevice(make(tmp_path / "image", tree, *KINDS[kind]).read_bytes())
    chance = random.Random(3)
    used = [at for at in range(0, 4 << 20, 512) if any(image.read_at(at, 512))]
    assert survives(DamagedDevice(image, {}))
    failures = 0
    for _ in range(40):
        places = [*chance.choices(used, k=chance.choice([1, 3, 30])), *chance.choices(used[:200], k=20)]
        changed = {at + chance.randrange(512): chance.choice([0, 1, 255, chance.randrange(256)]) for at in places}
        failures += not survives(DamagedDevice(image, changed))
    assert failures
    for size in [0, 511, 512, 4096, 65536]:
        assert not survives(DamagedDevice(image, {}, size))


def survives(device: DamagedDevice) -> bool:
    """Read everything; return whether nothing was found amiss. Only the project's own errors may leave."""
    try:
        reader = XfsFileSystem(device)
        assert reader.is_dirty in {True, False}
        pending, seen = ["/"], 0
        while pending and seen < 300:
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
