"""NTFS volumes made by mkntfs and ntfs-3g: read alike, overwritten in place, and damaged without harm to the reader."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from conversion.device import Slice
from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.filesystems.filesystem import Entry, FileSystem
from conversion.filesystems.ntfs import NtfsFileSystem, is_bitlocker, is_hibernated, is_ntfs
from conversion.overlay import Overlay
from tests.support.block_devices import FileDevice, MemoryDevice
from tests.support.ntfs_images import cat, make_volume, opened, run

MIB = 1 << 20
HIVE = "/Windows/System32/config/SYSTEM"
PLAIN = (HIVE, "/Ünïcode 😀 näme.txt", "/fragmented", "/short/A long file name.text", "/exact")


def content_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    path = make_volume(tmp_path_factory.mktemp("ntfs") / "volume.img", 8 * MIB, cluster_bytes=1024)
    files = {
        HIVE: content_of(300_001),
        "/Ünïcode 😀 näme.txt": content_of(5000, 2),
        "/short/A long file name.text": content_of(3000, 3),
        "/exact": content_of(4096, 4),
        "/tiny": b"resident",
        "/empty": b"",
        "/fragmented": content_of(400 * 1024, 5),
        "/sparse": bytes(500_000) + b"abc" + bytes(499_997),
        "/packed/text": b"hello world " * 20_000,
        "/compacted": content_of(9000, 6),
    }
    with opened(path) as volume:
        for folder in ("/Windows/System32/config", "/short", "/others", "/packed"):
            volume.make_folders(folder)
        volume.compress_folder("/packed")
        for name in (*PLAIN, "/tiny", "/empty", "/packed/text"):
            if name != "/fragmented":
                volume.write(name, files[name])
        volume.give_short_name("/short/A long file name.text", "ALONGF~1.TEX")
        volume.write("/sparse", b"abc", offset=500_000, size=1_000_000)
        volume.compress_for_system("/compacted", files["/compacted"])
        for at in range(0, 400 * 1024, 1024):  # what comes between is others'
            volume.write("/fragmented", files["/fragmented"][at : at + 1024], offset=at)
            volume.write(f"/others/{at}", bytes(1024))
    return path, files


@pytest.fixture
def volume(filled: tuple[Path, dict[str, bytes]]) -> tuple[MemoryDevice, dict[str, bytes]]:
    return MemoryDevice(bytearray(filled[0].read_bytes())), filled[1]


def test_a_volume_is_read_as_ntfs_3g_reads_it(
    filled: tuple[Path, dict[str, bytes]], volume: tuple[MemoryDevice, dict[str, bytes]]
) -> None:
    path, files = filled
    filesystem: FileSystem = NtfsFileSystem(volume[0])
    for name, data in files.items():
        assert filesystem.read_file(name) == data, name
        assert filesystem.read_file(name.upper()) == data, name
        if name != "/compacted":  # ntfs-3g needs a plug-in for these
            assert cat(path, name) == data
    assert filesystem.kind == "ntfs"
    assert filesystem.label == "Godwit"
    assert filesystem.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", str(path)).decode().strip()
    assert filesystem.read_file("/short/alongf~1.tex") == files["/short/A long file name.text"]
    for missing in ("/nothing", "/nothing/below", "/tiny/below", "/Windows", "/Windows\\System32\\config\\SYSTEM", "/"):
        assert filesystem.read_file(missing) is None
        assert filesystem.extents(missing) is None
    assert filesystem.list_folder("/short") == (Entry("A long file name.text", "file", 3000),)
    assert filesystem.list_folder("/WINDOWS/") == (Entry("System32", "folder", 0),)
    assert filesystem.list_folder("/tiny") is None
    assert filesystem.list_folder("/nothing") is None
    root = filesystem.list_folder("/")
    assert root is not None
    assert {entry.name for entry in root} >= {"Windows", "short", "tiny", "empty", "fragmented"}
    assert not [entry for entry in root if entry.name.startswith("$")]
    assert list(root) == sorted(root, key=lambda entry: entry.name)
    with pytest.raises(DamagedError, match="at most 5"):
        filesystem.read_file("/tiny", largest_bytes=5)
    assert volume[0].writes == []


def test_extents_are_exactly_where_the_bytes_lie(
    filled: tuple[Path, dict[str, bytes]], volume: tuple[MemoryDevice, dict[str, bytes]]
) -> None:
    device, files = volume
    filesystem = NtfsFileSystem(device)
    for name in PLAIN:
        extents = filesystem.extents(name)
        assert extents is not None, name
        assert b"".join(device.read_at(*extent) for extent in extents) == files[name], name
    assert len(filesystem.extents("/fragmented") or ()) > 20
    assert filesystem.extents("/empty") == ()
    for name in ("/tiny", "/sparse", "/packed/text", "/compacted"):
        assert filesystem.extents(name) is None, name
    said = run("ntfscluster", "-f", "-F", HIVE, str(filled[0])).decode()
    row = said[said.index("0x80 - non-resident") :].splitlines()[2].split()
    assert (filesystem.extents(HIVE) or ())[0][0] == int(row[1]) * filesystem.cluster_bytes
    assert (filesystem.sector_bytes, filesystem.cluster_bytes) == (512, 1024)


def test_a_file_is_overwritten_in_place(
    filled: tuple[Path, dict[str, bytes]], volume: tuple[MemoryDevice, dict[str, bytes]], tmp_path: Path
) -> None:
    device, files = volume
    overlay = Overlay(device)
    filesystem = NtfsFileSystem(Slice(overlay, 0, overlay.size))
    after = {name: content_of(len(files[name]), 9) for name in PLAIN}
    for name, data in after.items():
        assert filesystem.read_file(name) == files[name]
        filesystem.overwrite_file(name.lower(), data)
        assert filesystem.read_file(name) == data
    assert device.writes == []
    path = tmp_path / "written.img"
    path.write_bytes(overlay.read_at(0, overlay.size))
    for name in files.keys() - {"/compacted"}:
        assert cat(path, name) == after.get(name, files[name]), name
    run("ntfsfix", "-n", str(path))
    changed = sum(length for _, data in overlay.written() for length in [len(data)])
    assert changed < sum(len(data) for data in after.values()) + 512 * 500


def test_what_cannot_be_overwritten_is_refused_untouched(volume: tuple[MemoryDevice, dict[str, bytes]]) -> None:
    device, files = volume
    filesystem = NtfsFileSystem(device)
    for name in ("/tiny", "/sparse", "/packed/text", "/compacted"):
        with pytest.raises(UnsupportedError):
            filesystem.overwrite_file(name, files[name])
    for name, data, match in (
        (HIVE, files[HIVE] + b"x", "cannot replace 300001"),
        (HIVE, b"", "cannot replace"),
        ("/nothing", b"", "no such file"),
        ("/Windows", b"", "no such file"),
    ):
        with pytest.raises(ConversionError, match=match):
            filesystem.overwrite_file(name, data)
    assert device.writes == []


def test_a_device_that_only_reads_takes_no_overwriting(filled: tuple[Path, dict[str, bytes]]) -> None:
    path, files = filled
    filesystem = NtfsFileSystem(FileDevice(path))
    with pytest.raises(ConversionError, match="takes no writes"):
        filesystem.overwrite_file(HIVE, files[HIVE])


def test_a_file_that_is_not_written_to_its_end_has_no_extents(tmp_path: Path) -> None:
    path = make_volume(tmp_path / "volume.img", 8 * MIB)
    with opened(path) as volume:
        volume.write("/grown", content_of(10_000))
    run("ntfsfallocate", "-f", "-l", "50000", str(path), "/grown")
    filesystem = NtfsFileSystem(FileDevice(path))
    data = filesystem.read_file("/grown")
    assert data == cat(path, "/grown") == content_of(10_000) + bytes(40_000)
    assert filesystem.extents("/grown") is None


@pytest.mark.parametrize(("cluster_bytes", "sector_bytes"), [(512, 512), (4096, 512), (65536, 512), (4096, 4096)])
def test_every_cluster_size_is_read(tmp_path: Path, cluster_bytes: int, sector_bytes: int) -> None:
    path = make_volume(tmp_path / "volume.img", 32 * MIB, cluster_bytes=cluster_bytes, sector_bytes=sector_bytes)
    source = tmp_path / "source"
    source.write_bytes(content_of(200_000))
    run("ntfscp", "-q", str(path), str(source), "/copied by ntfscp")
    device = MemoryDevice(bytearray(path.read_bytes()), sector_bytes)
    filesystem = NtfsFileSystem(device)
    assert (filesystem.sector_bytes, filesystem.cluster_bytes) == (sector_bytes, cluster_bytes)
    assert filesystem.read_file("/copied by ntfscp") == content_of(200_000)
    filesystem.overwrite_file("/copied by ntfscp", content_of(200_000, 2))
    path.write_bytes(device.content)
    assert cat(path, "/copied by ntfscp") == content_of(200_000, 2)


def test_a_large_folder_costs_little_to_look_up_in(tmp_path: Path) -> None:
    path = make_volume(tmp_path / "volume.img", 16 * MIB)
    with opened(path) as volume:
        volume.make_folders("/big")
        for number in range(3000):
            volume.write(f"/big/a library of some name {number:05}.dll", b"x")
    device = FileDevice(path)
    filesystem = NtfsFileSystem(device)
    assert filesystem.read_file("/BIG/a library of some name 01234.DLL") == b"x"
    assert device.read_bytes < 2 * MIB  # the folder, once
    assert len(filesystem.list_folder("/big") or ()) == 3000


def test_the_dirty_flag_is_read(volume: tuple[MemoryDevice, dict[str, bytes]]) -> None:
    device, _ = volume
    assert not NtfsFileSystem(device).is_dirty
    mft = int.from_bytes(device.read_at(48, 8), "little") * 1024
    record = mft + 3 * 1024
    attribute = record + int.from_bytes(device.read_at(record + 20, 2), "little")
    while device.read_at(attribute, 4) != b"\x70\0\0\0":
        attribute += int.from_bytes(device.read_at(attribute + 4, 4), "little")
    flags = attribute + int.from_bytes(device.read_at(attribute + 20, 2), "little") + 10
    assert device.read_at(flags - 2, 2) == b"\x03\x01"  # version 3.1
    device.content[flags] |= 1
    assert NtfsFileSystem(device).is_dirty


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"hibr", True),
        (b"HIBR", True),
        (b"HORM", True),
        (b"link\\Device\\Volume", True),
        (b"wake", False),
        (b"WAKE", False),
        (b"RSTR", False),
        (bytes(4096), False),
        (b"", False),
        (b"hi", False),
        (None, False),
    ],
)
def test_a_hibernated_windows_is_recognised(tmp_path: Path, header: bytes | None, expected: bool) -> None:
    path = make_volume(tmp_path / "volume.img", 24 * MIB)
    with opened(path) as volume:
        if header is not None:
            volume.write("/hiberfil.sys", header, size=20 * MIB if header else 0)  # larger than read_file takes
    assert is_hibernated(NtfsFileSystem(FileDevice(path))) is expected


def test_the_kind_of_a_volume_is_recognised(filled: tuple[Path, dict[str, bytes]]) -> None:
    assert is_ntfs(FileDevice(filled[0]))
    assert not is_bitlocker(FileDevice(filled[0]))
    locked = MemoryDevice(bytearray(b"\xeb\x58\x90-FVE-FS-".ljust(510, b"\0") + b"\x55\xaa"))
    assert is_bitlocker(locked)
    to_go = MemoryDevice(bytearray(b"\xeb\x58\x90MSWIN4.1".ljust(0x1A8, b"\0").ljust(512, b"\0")))
    assert not is_bitlocker(to_go)
    to_go.content[0x1A8:0x1B8] = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")
    assert is_bitlocker(to_go)
    for device in (locked, to_go, MemoryDevice(bytearray()), MemoryDevice(bytearray(4096))):
        assert not is_ntfs(device)
        with pytest.raises(DamagedError):
            NtfsFileSystem(device)


def test_a_volume_larger_than_its_device_is_damage(volume: tuple[MemoryDevice, dict[str, bytes]]) -> None:
    device, _ = volume
    with pytest.raises(DamagedError, match="on a device of"):
        NtfsFileSystem(Slice(device, 0, device.size // 2))


def test_a_device_that_fails_is_not_taken_for_damage(volume: tuple[MemoryDevice, dict[str, bytes]]) -> None:
    class Failing(MemoryDevice):
        fails = False

        def read_at(self, offset: int, length: int) -> bytes:
            if self.fails:
                raise ConversionError("the store is gone", hint="look for it")
            return super().read_at(offset, length)

    device = Failing(volume[0].content)
    filesystem = NtfsFileSystem(device)
    device.fails = True
    with pytest.raises(ConversionError, match=r"^the store is gone$"):
        filesystem.read_file("/packed/text")
    device.fails = False
    assert filesystem.read_file("/packed/text") == volume[1]["/packed/text"]


def test_flipped_bytes_end_in_an_error_or_an_answer(volume: tuple[MemoryDevice, dict[str, bytes]]) -> None:
    device, files = volume
    dice = random.Random(3)
    records = [at for at in range(0, device.size, 1024) if device.read_at(at, 4) in {b"FILE", b"INDX"}]
    answered = failed = 0
    for _ in range(250):
        before = []
        for _ in range(dice.choice((1, 2, 20))):
            at = dice.randrange(84) if dice.random() < 0.1 else dice.choice(records) + dice.randrange(600)
            before.append((at, device.content[at]))
            device.content[at] = dice.choice((0, 1, 0xFF, dice.randrange(256), device.content[at] ^ 1))
        device.read_bytes = 0
        try:
            filesystem = NtfsFileSystem(device)
            for entry in filesystem.list_folder("/") or ():
                entry.name.encode()
            filesystem.label.encode()
            is_hibernated(filesystem)
            for name in files:
                filesystem.extents(name)
                filesystem.read_file(name)
            filesystem.list_folder("/Windows/System32/config")
            answered += 1
        except ConversionError:
            failed += 1
        assert device.read_bytes < 64 * MIB
        for at, byte in reversed(before):
            device.content[at] = byte
    assert answered
    assert failed
    assert NtfsFileSystem(device).read_file(HIVE) == files[HIVE]


def test_a_copy_of_a_running_volume_is_read_as_it_lies(filled: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """A $LogFile full of anything stands for the operations of a volume that was not put away."""
    path = Path(shutil.copy(filled[0], tmp_path / "dirty.img"))
    said = run("ntfscluster", "-f", "-F", "/$LogFile", str(path)).decode()
    row = said[said.index("0x80 - non-resident") :].splitlines()[2].split()
    device = MemoryDevice(bytearray(path.read_bytes()))
    start, length = int(row[1]) * 1024, int(row[2]) * 1024
    device.content[start : start + length] = content_of(length)
    filesystem = NtfsFileSystem(device)
    assert filesystem.read_file(HIVE) == filled[1][HIVE]
    filesystem.overwrite_file(HIVE, filled[1][HIVE][::-1])
    assert filesystem.read_file(HIVE) == filled[1][HIVE][::-1]
    assert all(not start <= offset < start + length for offset, _ in device.writes)
