"""GUID partition tables: made by hand and by sgdisk and sfdisk, read from the backup, hostile ones refused."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest

from conversion.gpt import EFI_SYSTEM, Gpt, is_uefi_boot_disk, read_gpt
from vhdx.errors import OutOfRangeError

LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
DISK = UUID("11111111-2222-3333-4444-555555555555")
PART = UUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")


class MemoryDisk:
    """Bytes as a block device that refuses what lies outside of it."""

    def __init__(self, data: bytes, sector_size: int = 512) -> None:
        self.data = bytearray(data)
        self.sector_size = sector_size

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(f"{offset}+{length}")
        return bytes(self.data[offset : offset + length])

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass


def header(
    own: int, other: int, entries_lba: int, entries: bytes, *, count: int, size: int = 128, header_size: int = 92
) -> bytes:
    raw = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        *(b"EFI PART", 0x10000, header_size, 0, 0, own, other, 34, other, DISK.bytes_le),
        *(entries_lba, count, size, zlib.crc32(entries)),
    )
    raw = raw.ljust(header_size, b"\0")
    return raw[:16] + struct.pack("<I", zlib.crc32(raw)) + raw[20:]


def make_gpt_disk(
    partitions: Sequence[tuple[UUID, int, int]], *, sectors: int = 256, sector: int = 512, size: int = 128
) -> bytes:
    """Return a disk with a primary and a backup table of 16 entries: (type, first LBA, end LBA)."""
    entries = b"".join(
        struct.pack(
            "<16s16sQQQ72s", kind.bytes_le, PART.bytes_le, first, end - 1, n, f"part {n} é".encode("utf-16-le")
        ).ljust(size, b"\0")
        for n, (kind, first, end) in enumerate(partitions, 1)
    ).ljust(16 * size, b"\0")
    length = -(-len(entries) // sector)
    data = bytearray(sectors * sector)
    data[sector : sector + 92] = header(1, sectors - 1, 2, entries, count=16, size=size)
    data[2 * sector : 2 * sector + len(entries)] = entries
    backup = sectors - 1 - length
    data[backup * sector : backup * sector + len(entries)] = entries
    data[(sectors - 1) * sector : (sectors - 1) * sector + 92] = header(
        sectors - 1, 1, backup, entries, count=16, size=size
    )
    return bytes(data)


def check(table: Gpt | None, *, from_backup: bool) -> None:
    assert table is not None
    assert (table.disk_guid, table.from_backup) == (DISK, from_backup)
    found = [
        (one.number, one.type_guid, one.first_lba, one.end_lba, one.attributes, one.name) for one in table.partitions
    ]
    assert found == [(1, EFI_SYSTEM, 40, 60, 1, "part 1 é"), (2, LINUX, 60, 200, 2, "part 2 é")]
    assert table.partitions[0].guid == PART


TWO = [(EFI_SYSTEM, 40, 60), (LINUX, 60, 200)]


@pytest.mark.parametrize("sector, size", [(512, 128), (4096, 128), (512, 256)])
def test_a_table_is_read(sector: int, size: int) -> None:
    device = MemoryDisk(make_gpt_disk(TWO, sector=sector, size=size), sector)
    check(read_gpt(device), from_backup=False)
    assert is_uefi_boot_disk(device)


def test_a_disk_without_an_efi_system_partition_is_no_uefi_disk() -> None:
    assert not is_uefi_boot_disk(MemoryDisk(make_gpt_disk([(LINUX, 40, 60)])))
    assert not is_uefi_boot_disk(MemoryDisk(bytes(1 << 20)))


@pytest.mark.parametrize("size", [512, 1024, 1536, 2048])
def test_a_tiny_disk_has_no_table(size: int) -> None:
    assert read_gpt(MemoryDisk(b"EFI PART" * (size // 8))) is None


@pytest.mark.parametrize("at", [512, 512 + 16, 512 + 24, 512 + 91, 1024, 1024 + 16 * 128 - 1])
def test_the_backup_serves_where_the_primary_is_damaged(at: int) -> None:
    device = MemoryDisk(make_gpt_disk(TWO))
    device.data[at] ^= 0x55
    check(read_gpt(device), from_backup=True)
    device.data[-512] ^= 0x55
    assert read_gpt(device) is None


def test_a_primary_copied_to_another_sector_is_none() -> None:
    device = MemoryDisk(make_gpt_disk(TWO))
    device.data[-512:] = device.data[512:1024]
    device.data[512:1024] = bytes(512)
    assert read_gpt(device) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 4097},
        {"count": 2**32 - 1},
        {"size": 127},
        {"size": 0},
        {"size": 4097},
        {"size": 2**32 - 1},
        {"entries_lba": 2**63},
        {"entries_lba": 2**64 - 1},
        {"entries_lba": 255},
        {"header_size": 91},
        {"header_size": 0},
        {"header_size": 513},
        {"header_size": 2**32 - 1},
    ],
)
def test_hostile_headers_under_right_checksums_are_refused(changes: dict[str, int]) -> None:
    device = MemoryDisk(make_gpt_disk(TWO))
    fields = {"own": 1, "other": 255, "entries_lba": 2, "count": 16, "size": 128, **changes}
    header_size = fields.pop("header_size", 92)
    entries = device.read_at(1024, 16 * 128)
    length = min(max(header_size, 92), 512)
    raw = bytearray(
        struct.pack(
            "<8sIIIIQQQQ16sQIII",
            *(b"EFI PART", 0x10000, header_size, 0, 0, fields["own"], fields["other"], 34, 200, DISK.bytes_le),
            *(fields["entries_lba"], fields["count"], fields["size"], zlib.crc32(entries)),
        ).ljust(length, b"\0")
    )
    covered = raw[:header_size] if header_size <= 512 else raw
    struct.pack_into("<I", raw, 16, zlib.crc32(bytes(covered)))
    device.data[512 : 512 + len(raw)] = raw
    check(read_gpt(device), from_backup=True)


def test_random_damage_never_raises() -> None:
    drawn = random.Random(2)
    good = make_gpt_disk(TWO)
    for _ in range(300):
        device = MemoryDisk(good)
        for _ in range(drawn.randrange(1, 10)):
            at = drawn.choice((512, 512 * 255)) + drawn.randrange(92)
            device.data[at] = drawn.randrange(256)
        for lba in (1, 255):  # checksums made right again, as an adversary would
            raw = bytes(device.data[lba * 512 : lba * 512 + 92])
            device.data[lba * 512 + 16 : lba * 512 + 20] = struct.pack("<I", zlib.crc32(raw[:16] + bytes(4) + raw[20:]))
        read_gpt(device)


def test_names_of_broken_unicode_are_shown_as_such() -> None:
    data = bytearray(make_gpt_disk([(LINUX, 40, 60)]))
    data[1024 + 56 : 1024 + 58] = b"\x00\xd8"  # half a surrogate pair
    entries = bytes(data[1024 : 1024 + 16 * 128])
    data[512 : 512 + 92] = header(1, 255, 2, entries, count=16)
    table = read_gpt(MemoryDisk(bytes(data)))
    assert table is not None
    table.partitions[0].name.encode()


@pytest.mark.skipif(shutil.which("sgdisk") is None, reason="sgdisk is not installed")
def test_what_sgdisk_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8 << 20))
    subprocess.run(
        ["sgdisk", "-n1:2048:+2M", "-t1:ef00", "-c1:EFI", "-n5:0:0", "-t5:8300", "-c5:root fs", "-A5:set:2", str(path)],
        check=True,
        capture_output=True,
    )
    for damaged in (False, True):
        device = MemoryDisk(path.read_bytes())
        if damaged:
            device.data[512:1024] = bytes(512)
        table = read_gpt(device)
        assert table is not None
        assert table.from_backup is damaged
        assert [(one.number, one.first_lba, one.name) for one in table.partitions] == [
            (1, 2048, "EFI"),
            (5, 6144, "root fs"),
        ]
        assert table.partitions[0].end_lba == 6144
        assert table.partitions[1].attributes == 4
        assert is_uefi_boot_disk(device)


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="sfdisk is not installed")
def test_what_sfdisk_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8 << 20))
    script = f"label: gpt\nlabel-id: {DISK}\nstart=2048, size=1000, type=U, name=esp\nstart=4096, size=8, type=L\n"
    subprocess.run(["sfdisk", "-q", str(path)], input=script.encode(), check=True, capture_output=True)
    table = read_gpt(MemoryDisk(path.read_bytes()))
    assert table is not None
    assert table.disk_guid == DISK
    assert [(one.type_guid, one.first_lba, one.end_lba) for one in table.partitions] == [
        (EFI_SYSTEM, 2048, 3048),
        (LINUX, 4096, 4104),
    ]
