"""Both copies of a GUID partition table: told apart, mended one from the other, encoded as sgdisk accepts it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from conversion.gpt import EFI_SYSTEM, GptPartition, read_copy, read_gpt
from conversion.gpt_copies import encode_copy, encode_table, mended, read_copies, write_gpt
from conversion.mbr import MbrEntry, encode_record
from conversion.partition_types import LINUX_DATA
from tests.support.gpt_disks import SparseDisk, make_disk, make_table, run

SECTORS = 32768
TWO = [(1, EFI_SYSTEM, 2048, 6144), (7, LINUX_DATA, 6144, 20000)]


def two() -> SparseDisk:
    return make_disk(make_table(TWO, sectors=SECTORS), SECTORS)


def rules(disk: SparseDisk) -> list[str]:
    copies = read_copies(disk)
    assert copies is not None
    return [one.rule for one in copies.findings()]


def test_a_table_we_wrote_is_clean_for_sgdisk_and_for_us(tmp_path: Path) -> None:
    path = two().to_file(tmp_path / "disk.img")
    assert "No problems found" in run("sgdisk", "-v", str(path))
    assert "Teil 7 ü" in run("sgdisk", "-i", "7", str(path))
    assert rules(two()) == []


def test_a_table_of_sgdisk_is_written_again_by_the_bit(tmp_path: Path) -> None:
    path = SparseDisk(16 << 20).to_file(tmp_path / "disk.img")
    run("sgdisk", "-n1:2048:+2M", "-t1:ef00", "-c1:EFI", "-n5:0:0", "-t5:8300", "-A5:set:2", "-A5:set:60", str(path))
    disk = SparseDisk.from_file(path)
    table = read_gpt(disk)
    assert table is not None
    for offset, data in encode_table(table):
        assert disk.read_at(offset, len(data)) == data
    write_gpt(disk, table)
    assert disk.content() == SparseDisk.from_file(path).content()


@pytest.mark.parametrize("which", ["primary", "backup"])
@pytest.mark.parametrize("at", [0, 16, 30, 80, "entries"])
def test_a_damaged_copy_is_reported_and_mended_from_the_other(which: str, at: int | str) -> None:
    disk = two()
    good = disk.content()
    header = 512 if which == "primary" else disk.size - 512
    place = header + at if isinstance(at, int) else (1024 if which == "primary" else disk.size - 33 * 512) + 60
    disk.write_at(place, bytes([disk.read_at(place, 1)[0] ^ 0x41]))
    copies = read_copies(disk)
    assert copies is not None
    assert copies.primary.good is (which != "primary")
    assert copies.backup.good is (which != "backup")
    assert copies.table.partitions == make_table(TWO, sectors=SECTORS).partitions
    (finding,) = copies.findings()
    assert finding.rule == f"gpt-{which}-damaged"
    assert finding.severity == "warning"
    assert "checksum" in finding.evidence or "no header" in finding.evidence
    assert finding.remedy
    for offset, data in mended(copies):
        disk.write_at(offset, data)
    assert disk.content() == good
    healed = read_copies(disk)
    assert healed is not None
    assert mended(healed) == ()


def test_without_any_good_copy_there_is_none() -> None:
    disk = two()
    disk.write_at(512, b"X")
    disk.write_at(disk.size - 512, b"X")
    assert read_copies(disk) is None
    assert read_copies(SparseDisk(1024)) is None


def test_a_backup_left_behind_by_a_growing_disk_is_found_and_noted() -> None:
    disk = two()
    disk.size += 4 << 20
    assert rules(disk) == ["gpt-backup-not-last"]
    disk.write_at((SECTORS - 1) * 512, b"X")
    copies = read_copies(disk)
    assert copies is not None
    for offset, data in mended(copies):
        disk.write_at(offset, data)
    assert rules(disk) == ["gpt-backup-not-last"]


def test_a_backup_that_the_primary_places_outside_is_mended_at_the_end() -> None:
    disk = two()
    disk.size -= 4 << 20
    copies = read_copies(disk)
    assert copies is not None
    assert not copies.backup.good
    for offset, data in mended(copies):
        disk.write_at(offset, data)
    assert read_copy(disk, disk.size // 512 - 1) != ""
    assert not isinstance(read_copy(disk, disk.size // 512 - 1), str)


def test_copies_that_differ_are_told() -> None:
    disk = two()
    table = read_gpt(disk)
    assert table is not None
    other = table.without_entry(7)
    for offset, data in encode_copy(other.backup_header(), other.entries):
        disk.write_at(offset, data)
    assert rules(disk) == ["gpt-copies-differ"]
    assert read_gpt(disk) == table


def test_odd_tables_are_read_with_a_note() -> None:
    odd = make_table(TWO, sectors=SECTORS, entry_count=16, entry_size=256, first_usable_lba=2048)
    assert rules(make_disk(odd, SECTORS)) == ["gpt-first-usable", "gpt-entries"]
    assert read_gpt(make_disk(odd, SECTORS)) == odd


def test_a_table_under_a_plain_record_is_asleep() -> None:
    disk = two()
    disk.write_at(0, encode_record([MbrEntry(0x83, 2048, 100)]))
    copies = read_copies(disk)
    assert copies is not None
    assert copies.asleep
    assert copies.primary.good
    assert read_gpt(disk) is None


def test_an_entry_is_changed_with_all_else_kept_by_the_bit() -> None:
    table = make_table(TWO, sectors=SECTORS, entry_count=16, entry_size=256)
    at = 6 * 256
    weird = table.entries[: at + 56] + b"\x00\xd8\xff\xff" + bytes(68) + b"\x77" * 128 + table.entries[at + 256 :]
    table = replace(table, entries=weird)
    before = table.partition(7)
    assert before is not None
    changed = table.with_entry(replace(before, end_lba=21000, name="not taken over"))
    expected = bytearray(weird)
    struct.pack_into("<Q", expected, at + 40, 20999)
    assert changed.entries == bytes(expected)
    assert changed.header.encode(changed.entries)[88:92] == struct.pack("<I", zlib.crc32(expected))
    added = changed.with_entry(GptPartition(3, LINUX_DATA, UUID(int=3), 21000, 22000, 5, "new"))
    assert [(one.number, one.name) for one in added.partitions if one.number != 7] == [(1, "Teil 1 ü"), (3, "new")]
    assert added.without_entry(3) == changed
    for number in (0, 17):
        with pytest.raises(ValueError, match="no entry"):
            added.without_entry(number)
        with pytest.raises(ValueError, match="no entry"):
            added.with_entry(replace(before, number=number))


def test_the_end_moves_with_the_disk(tmp_path: Path) -> None:
    table = make_table(TWO, sectors=SECTORS)
    disk = two()
    disk.size += 1 << 20
    write_gpt(disk, table.with_end(disk.size // 512))
    assert rules(disk) == []
    assert "No problems found" in run("sgdisk", "-v", str(disk.to_file(tmp_path / "disk.img")))
