"""FAT volumes against mkfs.vfat, mtools and fsck.vfat: what those made is read, what is written they accept."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from conversion.device import Slice
from conversion.errors import ConversionError, DamagedError, NoSpaceError, UnsupportedError
from conversion.filesystems.fat import FatFileSystem
from conversion.filesystems.fat_boot import is_fat
from conversion.filesystems.filesystem import Entry, FileSystem
from conversion.overlay import Overlay
from tests.support.block_devices import FileDevice, MemoryDevice
from tests.support.fat_images import fill, fsck, make_volume, make_volume_file, mtools

MIB = 1 << 20
LAYOUTS = {
    "fat12": (2 * MIB, "-F12"),
    "fat12-large-clusters": (16 * MIB, "-F12", "-s16"),
    "fat12-1k-sectors": (4 * MIB, "-F12", "-S1024"),
    "fat12-one-table": (2 * MIB, "-F12", "-f1"),
    "fat16": (10 * MIB, "-F16", "-s1"),
    "fat16-2k-sectors": (16 * MIB, "-F16", "-S2048", "-s1"),
    "fat32": (34 * MIB, "-F32", "-s1"),
    "fat32-4k-sectors": (8 * MIB, "-F32", "-S4096", "-s1"),
    "fat32-large-clusters": (16 * MIB, "-F32", "-s64"),
}


UNDERSIZED = {"fat32-4k-sectors", "fat32-large-clusters"}  # fewer clusters than mtools wants of FAT32


@pytest.fixture(params=LAYOUTS)
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> bytearray:
    size, *options = LAYOUTS[request.param]
    return make_volume(tmp_path, size, *options)


@pytest.fixture
def small(tmp_path: Path) -> bytearray:
    return make_volume(tmp_path, MIB, "-F12", "-s1")


def content_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - UNDERSIZED))
def test_what_mtools_wrote_is_read(layout: str, tmp_path: Path) -> None:
    size, *options = LAYOUTS[layout]
    volume = make_volume(tmp_path, size, *options)
    files = {
        "/BOOTMGR": content_of(300_000),
        "/EFI/Microsoft Boot/bootmgfw.efi": content_of(70_000, 2),
        "/EFI/Microsoft Boot/Ünïcode näme that takes more than two slots.txt": b"",
        "/EFI/Microsoft Boot/lower.txt": b"x",
    }
    fill(volume, tmp_path, files, ["/EFI", "/EFI/Microsoft Boot"])
    device = MemoryDevice(volume)
    filesystem: FileSystem = FatFileSystem(device)
    assert (filesystem.kind, filesystem.uuid, filesystem.label) == ("vfat", "1234-ABCD", "GODWIT")
    for name, data in files.items():
        assert filesystem.read_file(name) == data
        assert filesystem.read_file(name.upper()) == data
        extents = filesystem.extents(name.lower())
        assert extents is not None
        assert b"".join(device.read_at(*extent) for extent in extents) == data
    assert filesystem.list_folder("/") == (Entry("BOOTMGR", "file", 300_000), Entry("EFI", "folder", 0))
    inner = filesystem.list_folder("/efi/MICROSOFT BOOT/")
    assert inner is not None
    assert {entry.name: entry.size for entry in inner} == {
        name.rpartition("/")[2]: len(data) for name, data in files.items() if name.count("/") == 3
    }
    for missing in ("/nothing", "/EFI/nothing", "/BOOTMGR/below", "/EFI"):
        assert filesystem.read_file(missing) is None
        assert filesystem.extents(missing) is None
    assert filesystem.list_folder("/BOOTMGR") is None
    assert filesystem.list_folder("/nothing") is None
    assert device.writes == []


def test_what_is_written_others_read(volume: bytearray, tmp_path: Path) -> None:
    device = MemoryDevice(volume)
    filesystem = FatFileSystem(device)
    files: dict[str, bytes] = {}

    def check() -> None:
        code, said = fsck(volume, tmp_path)
        assert code == 0, said

    filesystem.make_folder("/EFI/A long folder name/Boot")
    check()
    for number in range(40):  # more slots than any folder's first cluster but the largest has
        name = f"/EFI/A long folder name/Boot/file number {number}, ünïcode.Dat"
        files[name] = content_of(number * 61, number)
        filesystem.create_file(name, files[name])
    check()
    for number in range(0, 40, 3):
        name = f"/EFI/A long folder name/Boot/file number {number}, ünïcode.Dat"
        filesystem.remove_file(name.upper())
        del files[name]
    check()
    for number in range(1, 40, 3):
        name = f"/EFI/A long folder name/Boot/file number {number}, ünïcode.Dat"
        files[name] = content_of(9000, number)
        filesystem.create_file(name, files[name], overwrite=True)
    check()
    files["/bootmgr"] = content_of(400_000)
    files["/BOOT.INI"] = b"plain"
    for name in ("/bootmgr", "/BOOT.INI"):
        filesystem.create_file(name, files[name])
    filesystem.make_folder("/empty")
    filesystem.remove_folder("/EMPTY")
    check()
    fresh = FatFileSystem(MemoryDevice(volume))
    assert not fresh.is_dirty
    for name, data in files.items():
        assert fresh.read_file(name) == data
    if fresh.geometry.bits == 32 and fresh.geometry.cluster_count < 65525:
        return  # mtools reads no FAT32 this small
    for name in ("/bootmgr", "/BOOT.INI", "/EFI/A long folder name/Boot/file number 1, ünïcode.Dat"):
        assert mtools(volume, tmp_path, "mtype", f"::{name}") == files[name]
    listed = mtools(volume, tmp_path, "mdir", "-b", "-/", "::/").decode().splitlines()
    assert {line.removeprefix("::") for line in listed if not line.endswith("/")} == set(files)


def test_aliases_are_numbered_and_only_made_where_needed(small: bytearray, tmp_path: Path) -> None:
    filesystem = FatFileSystem(MemoryDevice(small))
    for name in ("PLAIN.TXT", "longer name.text", "longer name.texture", ".hidden", "a+b.c", "bootmgr", "x.y.z", "ß"):
        filesystem.create_file(f"/{name}", name.encode())
    for alias, name in {
        "LONGER~1.TEX": "longer name.text",
        "LONGER~2.TEX": "longer name.texture",
        "HIDDEN~1": ".hidden",
        "A_B~1.C": "a+b.c",
        "XY~1.Z": "x.y.z",
        "_~1": "ß",
    }.items():
        assert filesystem.read_file(f"/{alias}") == name.encode()
    code, said = fsck(small, tmp_path)
    assert code == 0, said
    shown = mtools(small, tmp_path, "mdir", "::/").decode()
    assert "BOOTMGR " in shown
    assert "  bootmgr" in shown  # a long name keeps the case
    assert "  PLAIN.TXT" not in shown
    with pytest.raises(ConversionError, match="exists already"):
        filesystem.create_file("/longer~1.tex", b"the alias of another")


def test_a_file_is_replaced_in_one_slot_and_keeps_its_name(small: bytearray, tmp_path: Path) -> None:
    filesystem = FatFileSystem(MemoryDevice(small), stamp=datetime(2024, 5, 6, 7, 8, 10, tzinfo=UTC))
    filesystem.create_file("/Boot Configuration", b"old")
    with pytest.raises(ConversionError, match="exists already"):
        filesystem.create_file("/BOOT CONFIGURATION", b"new")
    filesystem.create_file("/BOOT CONFIGURATION", b"new and longer" * 100, overwrite=True)
    assert filesystem.list_folder("/") == (Entry("Boot Configuration", "file", 1400),)
    filesystem.create_file("/Boot Configuration", b"", overwrite=True)
    assert filesystem.extents("/Boot Configuration") == ()
    assert "2024-05-06   7:08" in mtools(small, tmp_path, "mdir", "::/").decode()
    assert fsck(small, tmp_path)[0] == 0


def test_writing_is_deterministic(volume: bytearray) -> None:
    devices = [MemoryDevice(bytearray(volume)) for _ in range(2)]
    for device in devices:
        filesystem = FatFileSystem(device)
        filesystem.make_folder("/Boot")
        filesystem.create_file("/Boot/BCD", content_of(30_000))
        filesystem.remove_file("/Boot/BCD")
        filesystem.create_file("/Boot/other name", content_of(3_000))
    assert devices[0].content == devices[1].content
    assert devices[0].content != volume


def test_a_full_volume_refuses_before_it_writes(small: bytearray, tmp_path: Path) -> None:
    device = MemoryDevice(small)
    filesystem = FatFileSystem(device)
    filesystem.create_file("/kept", content_of(500_000))
    before, count = bytes(small), len(device.writes)
    with pytest.raises(NoSpaceError):
        filesystem.create_file("/too large", content_of(600_000))
    with pytest.raises(NoSpaceError):
        filesystem.create_file("/kept", content_of(600_000), overwrite=True)
    assert len(device.writes) == count
    assert bytes(small) == before
    free = int(mtools(small, tmp_path, "mdir", "::/").decode().replace(" ", "").split("bytesfree")[0].split("\n")[-1])
    filesystem.create_file("/just fits", content_of(free))
    assert fsck(small, tmp_path)[0] == 0
    with pytest.raises(NoSpaceError):
        filesystem.make_folder("/folder")
    filesystem.create_file("/empty", b"")
    filesystem.remove_file("/just fits")
    filesystem.make_folder("/folder")
    assert fsck(small, tmp_path)[0] == 0


def test_a_root_folder_with_a_fixed_place_can_be_full(tmp_path: Path) -> None:
    small = make_volume(tmp_path, MIB, "-F12", "-r16")  # 16 slots, one holds the label
    device = MemoryDevice(small)
    filesystem = FatFileSystem(device)
    for number in range(14):
        filesystem.create_file(f"/FILE{number}", b"x")
    count = len(device.writes)
    with pytest.raises(NoSpaceError):
        filesystem.create_file("/a long name", b"x")
    assert len(device.writes) == count
    filesystem.create_file("/LAST", b"x")
    assert fsck(small, tmp_path)[0] == 0
    filesystem.remove_file("/FILE3")
    filesystem.remove_file("/FILE4")
    filesystem.create_file("/a long name", b"x")  # into the hole
    assert fsck(small, tmp_path)[0] == 0
    assert FatFileSystem(device).read_file("/a long name") == b"x"


def test_garbage_behind_the_end_mark_stays_invisible(small: bytearray, tmp_path: Path) -> None:
    filesystem = FatFileSystem(MemoryDevice(small))
    root = filesystem.geometry.root_offset
    small[root + 64 : root + 32 * 60] = content_of(32 * 58)  # the label, an end mark, then anything
    small[root + 32] = 0
    filesystem.create_file("/a name that takes three slots", b"content")
    listed = FatFileSystem(MemoryDevice(small)).list_folder("/")
    assert listed == (Entry("a name that takes three slots", "file", 7),)
    assert mtools(small, tmp_path, "mdir", "-b", "::/") == b"::/a name that takes three slots\n"


@pytest.mark.parametrize("name", ["", "a/../b|c", "trailing.", "trailing ", "q?", "x" * 256, "half \ud800", "nul\0"])
def test_names_that_fat_cannot_hold_are_refused(small: bytearray, name: str) -> None:
    device = MemoryDevice(small)
    with pytest.raises(ConversionError):
        FatFileSystem(device).create_file(f"/{name}", b"")
    assert device.writes == []


def test_what_is_in_the_way_is_named(small: bytearray) -> None:
    filesystem = FatFileSystem(MemoryDevice(small))
    filesystem.make_folder("/folder/inner")
    filesystem.make_folder("/folder/inner")
    filesystem.create_file("/file", b"x")
    for call, match in (
        (lambda: filesystem.make_folder("/file/below"), "a file is in the way"),
        (lambda: filesystem.create_file("/folder", b"", overwrite=True), "a folder is in the way"),
        (lambda: filesystem.create_file("/missing/file", b""), "no such folder"),
        (lambda: filesystem.remove_file("/folder"), "no such file"),
        (lambda: filesystem.remove_file("/missing"), "no such file"),
        (lambda: filesystem.remove_folder("/file"), "no such folder"),
        (lambda: filesystem.remove_folder("/folder"), "not empty"),
        (lambda: filesystem.remove_folder("/"), "root"),
    ):
        with pytest.raises(ConversionError, match=match):
            call()  # type: ignore[no-untyped-call]
    with pytest.raises(DamagedError, match="at most 0"):
        filesystem.read_file("/file", largest_bytes=0)


def test_a_dirty_volume_stays_dirty_and_a_clean_one_clean(tmp_path: Path) -> None:
    for options, at in ((("-F16", "-s1"), 2), (("-F32", "-s1"), 4)):
        volume = make_volume(tmp_path, 34 * MIB if "-F32" in options else 10 * MIB, *options)
        device = MemoryDevice(volume)
        filesystem = FatFileSystem(device)
        table = filesystem.geometry.tables[0]
        filesystem.create_file("/a", b"x")
        assert not filesystem.is_dirty
        during = [data for offset, data in device.writes if offset == table]
        assert during[0][at + at - 1] & (0x80 if at == 2 else 0x08) == 0  # the first write to it marks it dirty
        for copy in filesystem.geometry.tables:
            volume[copy + at + at - 1] &= 0x7F if at == 2 else 0xF7
        dirty = FatFileSystem(device)
        assert dirty.is_dirty
        dirty.create_file("/b", b"x")
        assert FatFileSystem(device).is_dirty


def test_both_copies_of_the_table_and_the_advice_on_free_space_are_kept(tmp_path: Path) -> None:
    volume = make_volume(tmp_path, 34 * MIB, "-F32", "-s1")
    filesystem = FatFileSystem(MemoryDevice(volume))
    geometry, free = filesystem.geometry, filesystem.free_bytes
    assert free is not None
    filesystem.create_file("/file", content_of(5000))
    filesystem.make_folder("/folder")
    first, second = (volume[at : at + geometry.table_bytes] for at in geometry.tables)
    assert first == second
    assert filesystem.free_bytes == FatFileSystem(MemoryDevice(volume)).free_bytes == free - 11 * 512
    filesystem.remove_file("/file")
    assert filesystem.free_bytes == free - 512
    assert fsck(volume, tmp_path)[0] == 0


def test_one_copy_in_use_alone_is_read_and_written(tmp_path: Path) -> None:
    volume = make_volume(tmp_path, 34 * MIB, "-F32", "-s1")
    both = FatFileSystem(MemoryDevice(volume)).geometry
    volume[0x28] = 0x81  # no mirroring, the second copy is the one
    volume[both.tables[0] : both.tables[0] + both.table_bytes] = b"\xaa" * both.table_bytes
    filesystem = FatFileSystem(MemoryDevice(volume))
    assert filesystem.geometry.tables == both.tables[1:]
    filesystem.create_file("/file", content_of(5000))
    assert volume[both.tables[0] : both.tables[0] + both.table_bytes] == b"\xaa" * both.table_bytes
    assert FatFileSystem(MemoryDevice(volume)).read_file("/file") == content_of(5000)


def test_a_large_volume_costs_what_a_small_one_does(tmp_path: Path) -> None:
    costs = []
    for size in (40 * MIB, 2048 * MIB):
        device = FileDevice(make_volume_file(tmp_path, size, "-F32", "-s1"))
        overlay = Overlay(device)
        filesystem = FatFileSystem(Slice(overlay, 0, overlay.size))
        filesystem.make_folder("/Boot")
        filesystem.create_file("/Boot/BCD", content_of(30_000))
        filesystem.create_file("/bootmgr", content_of(400_000))
        costs.append((device.read_bytes, sum(len(data) for _, data in overlay.written())))
    assert costs[0] == costs[1]
    assert costs[0][1] < 450_000


def test_clusters_freed_before_the_hint_are_found_again(tmp_path: Path) -> None:
    volume = make_volume(tmp_path, MIB, "-F32", "-s1")
    filesystem = FatFileSystem(MemoryDevice(volume))
    filesystem.create_file("/first", content_of(200_000))
    filesystem.create_file("/second", content_of(700_000, 2))
    filesystem.remove_file("/first")
    filesystem.create_file("/third", content_of(250_000, 3))
    assert len(filesystem.extents("/third") or ()) > 1
    assert fsck(volume, tmp_path)[0] == 0
    assert FatFileSystem(MemoryDevice(volume)).read_file("/third") == content_of(250_000, 3)


def test_what_is_no_fat_is_refused() -> None:
    for sector in (bytes(512), b"\xeb\x52\x90NTFS    ".ljust(510, b"\0") + b"\x55\xaa", b"", content_of(512)):
        device = MemoryDevice(bytearray(sector))
        assert not is_fat(device)
        with pytest.raises(DamagedError):
            FatFileSystem(device)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (11, b"\0\0"),
        (11, b"\x01\x02"),
        (13, b"\0"),
        (13, b"\x03"),
        (14, b"\0\0"),
        (16, b"\0"),
        (16, b"\xff"),
        (17, b"\0\0"),
        (19, b"\x01\0"),
        (19, b"\xff\xff"),
        (22, b"\xff\xff"),
        (510, b"\0\0"),
        (0, b"\0"),
    ],
)
def test_a_boot_sector_that_contradicts_itself_is_damage(small: bytearray, at: int, value: bytes) -> None:
    assert is_fat(MemoryDevice(small))
    small[at : at + len(value)] = value
    with pytest.raises(DamagedError):
        FatFileSystem(MemoryDevice(small))


def test_an_unknown_version_is_not_supported(tmp_path: Path) -> None:
    volume = make_volume(tmp_path, MIB, "-F32")
    volume[0x2A] = 1
    with pytest.raises(UnsupportedError):
        FatFileSystem(MemoryDevice(volume))


def test_chains_that_lead_astray_are_damage(tmp_path: Path) -> None:
    volume = make_volume(tmp_path, MIB, "-F32", "-s1")
    filesystem = FatFileSystem(MemoryDevice(volume))
    filesystem.make_folder("/folder")
    filesystem.create_file("/first", content_of(3000))
    filesystem.create_file("/other", content_of(3000, 2))
    extents, other = filesystem.extents("/first"), filesystem.extents("/other")
    assert extents is not None
    assert other is not None
    geometry = filesystem.geometry
    first = (extents[0][0] - geometry.data_offset) // geometry.cluster_bytes + 2
    second = (other[0][0] - geometry.data_offset) // geometry.cluster_bytes + 2

    def damaged(cluster: int, entry: int) -> FatFileSystem:
        copy = bytearray(volume)
        for table in geometry.tables:
            copy[table + cluster * 4 : table + cluster * 4 + 4] = entry.to_bytes(4, "little")
        return FatFileSystem(MemoryDevice(copy))

    for entry in (0, 1, first, first + 1, 0x0FFFFFFF, 0x0FFFFFF7, geometry.end_cluster):
        broken = damaged(first + 2, entry)
        for ask in (
            lambda fs: fs.read_file("/first"),
            lambda fs: fs.extents("/first"),
            lambda fs: fs.remove_file("/first"),
        ):
            with pytest.raises(DamagedError):
                ask(broken)  # type: ignore[no-untyped-call]
        assert broken.read_file("/other") == content_of(3000, 2)
    joined = damaged(first + 5, second)  # grows into the other file
    for path in ("/first", "/FIRST"):
        with pytest.raises(DamagedError, match="something else"):
            joined.remove_file(path)
    with pytest.raises(DamagedError, match="something else"):
        damaged(first + 5, geometry.root_cluster).create_file("/first", b"x", overwrite=True)
    with pytest.raises(DamagedError):
        damaged(geometry.root_cluster, geometry.root_cluster).list_folder("/")


def test_flipped_bytes_end_in_an_error_or_an_answer(tmp_path: Path) -> None:
    dice = random.Random(7)
    for options in (("-F12", "-s1"), ("-F32", "-s1")):
        volume = make_volume(tmp_path, MIB, *options)
        filesystem = FatFileSystem(MemoryDevice(volume))
        filesystem.make_folder("/folder/of a long name")
        for number in range(20):
            filesystem.create_file(f"/folder/of a long name/file {number}", content_of(number * 100))
        pristine, end = bytes(volume), filesystem.geometry.data_offset + 8192
        answered = failed = 0
        for _ in range(120):
            device = MemoryDevice(bytearray(pristine))
            for _ in range(dice.choice((1, 2, 20))):
                where = dice.randrange(90) if dice.random() < 0.2 else dice.randrange(end)
                device.content[where] = dice.choice((0, 1, 0xE5, 0xFF, dice.randrange(256)))
            try:
                read = FatFileSystem(device)
                read.label.encode()
                for entry in read.list_folder("/folder/of a long name") or ():
                    entry.name.encode()
                    read.read_file(f"/folder/of a long name/{entry.name}")
                read.create_file("/folder/of a long name/file 3", b"new" * 500, overwrite=True)
                read.create_file("/another", b"new" * 500)
                read.remove_file("/folder/of a long name/file 4")
                answered += 1
            except ConversionError:
                failed += 1
            assert device.read_bytes < 64 * MIB
        assert answered
        assert failed


def test_bits_of_the_table_that_are_not_ours_are_kept(tmp_path: Path) -> None:
    volume = make_volume(tmp_path, MIB, "-F32", "-s1")
    table = FatFileSystem(MemoryDevice(volume)).geometry.tables[0]
    for cluster in range(3, 100):
        volume[table + cluster * 4 + 3] |= 0xA0
    filesystem = FatFileSystem(MemoryDevice(volume))
    filesystem.create_file("/file", content_of(5000))
    filesystem.remove_file("/file")
    filesystem.create_file("/again", content_of(3000))
    assert {volume[table + cluster * 4 + 3] & 0xF0 for cluster in range(3, 100)} == {0xA0}
    assert FatFileSystem(MemoryDevice(volume)).read_file("/again") == content_of(3000)


def test_a_long_name_that_belongs_to_another_alias_is_passed_over(small: bytearray) -> None:
    filesystem = FatFileSystem(MemoryDevice(small))
    filesystem.create_file("/a long name", b"x")
    slot = filesystem.geometry.root_offset + 2 * 32  # behind the label and the long name
    assert small[slot : slot + 8] == b"ALONGN~1"
    small[slot : slot + 8] = b"RENAMED "
    assert FatFileSystem(MemoryDevice(small)).list_folder("/") == (Entry("RENAMED", "file", 1),)


def test_no_more_clusters_are_used_than_the_table_has_entries_for(small: bytearray) -> None:
    small[22:24] = (1).to_bytes(2, "little")  # sectors of a table: 341 entries of 12 bits
    assert FatFileSystem(MemoryDevice(small)).geometry.cluster_count == 512 * 8 // 12 - 2
