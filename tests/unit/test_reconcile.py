"""The way back: what the guest did to its master boot record, done here by sfdisk on real bytes, and what follows."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from conversion.errors import RefusedError
from conversion.gpt import EFI_SYSTEM, Gpt, GptPartition, read_gpt
from conversion.gpt_copies import read_copies
from conversion.layout import Layout
from conversion.mbr import MbrEntry, encode_record
from conversion.partition_types import BASIC_DATA, LINUX_DATA, LINUX_LVM, MICROSOFT_RESERVED, WINDOWS_RECOVERY, System
from conversion.reconcile import Reconciliation, reconcile, restore
from conversion.saved_table import SavedTable
from tests.support.gpt_disks import SparseDisk, convert, make_disk, make_table, run

MIB = 2048
SECTORS = 256 * MIB
FRESH = UUID("99999999-8888-7777-6666-555555555555")
ROWS = [
    (1, EFI_SYSTEM, MIB, 33 * MIB),
    (2, MICROSOFT_RESERVED, 33 * MIB, 49 * MIB),
    (3, LINUX_DATA, 49 * MIB, 100 * MIB),
    (4, LINUX_DATA, 120 * MIB, 150 * MIB),
]


class Trip:
    """A disk that was converted, with sfdisk at hand to change it as a guest would, and the way back."""

    def __init__(
        self,
        folder: Path,
        rows: list[tuple[int, UUID, int, int]] = ROWS,
        *,
        system: System = "linux",
        change: Callable[[SparseDisk], None] = lambda disk: None,
    ) -> None:
        self.table = make_table(rows, sectors=SECTORS)
        self.disk = make_disk(self.table, SECTORS)
        change(self.disk)
        self.before = self.disk.content()
        self.layout: Layout
        self.saved: SavedTable
        self.layout, self.saved = convert(self.disk, boot=1, system=system)
        self.path = folder / "disk.img"

    def sfdisk(self, *options: str, script: str = "") -> None:
        self.disk.to_file(self.path)
        run("sfdisk", "-q", "--no-reread", *options[:1], str(self.path), *options[1:], script=script)
        self.disk = SparseDisk.from_file(self.path)

    def plan(self) -> Reconciliation:
        return reconcile(self.disk, self.saved, new_guid=lambda: FRESH)

    def back(self) -> Gpt:
        """Restore, have sgdisk check the result, and return the table."""
        planned = self.plan()
        restore(self.disk, planned)
        assert "No problems found" in run("sgdisk", "-v", str(self.disk.to_file(self.path)))
        copies = read_copies(self.disk)
        assert copies is not None
        assert not copies.asleep
        assert [one.rule for one in copies.findings()] == []
        assert planned.table is not None
        assert copies.table.partitions == planned.table.partitions
        return copies.table

    def stops(self, rule: str, evidence: str = "") -> None:
        before = self.disk.content()
        planned = self.plan()
        assert planned.table is None
        refusals = [one for one in planned.findings if one.rule == rule]
        assert refusals, planned.findings
        assert any(evidence in one.evidence for one in refusals), refusals
        assert all(one.remedy for one in refusals)
        with pytest.raises(RefusedError) as raised:
            restore(self.disk, planned)
        assert refusals[0].evidence in str(raised.value)
        assert raised.value.hint
        assert self.disk.content() == before

    def entry(self, number: int) -> GptPartition:
        found = self.table.partition(number)
        assert found is not None
        return found


def test_an_unchanged_disk_is_the_old_one_by_the_byte(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.write_at(60 * MIB * 512, b"written as Generation 1")
    planned = trip.plan()
    assert planned.verbatim
    assert planned.findings == ()
    assert planned.sentences == ("The partition table is as it was written: the old one comes back by the byte.",)
    assert planned.identity == trip.layout.identity()
    trip.back()
    assert trip.disk.read_at(60 * MIB * 512, 23) == b"written as Generation 1"
    trip.disk.write_at(60 * MIB * 512, bytes(23))
    assert trip.disk.content() == trip.before


def test_sfdisk_writing_the_same_table_again_changes_nothing(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.to_file(trip.path)
    dump = run("sfdisk", "--dump", str(trip.path))
    trip.sfdisk(script=dump)
    planned = trip.plan()
    assert planned.verbatim
    trip.back()
    assert trip.disk.content() == trip.before


def test_the_switch_is_alone_and_comes_after_both_copies(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    planned = trip.plan()
    trip.disk.log.clear()
    restore(trip.disk, planned)
    log = trip.disk.log
    at = log.index((0, planned.record))
    assert log[at - 1] is log[at + 1] is log[-1] is None
    earlier = {entry[0] for entry in log[:at] if entry is not None}
    assert {512, (SECTORS - 33) * 512} <= earlier
    assert {entry[0] for entry in log[at + 1 :] if entry is not None} == {34 * 512}


def test_an_interrupted_way_back_goes_on_where_it_was(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    planned = trip.plan()
    trip.disk.log.clear()
    converted = trip.disk.copy()
    restore(trip.disk, planned)
    writes = [entry for entry in trip.disk.log if entry is not None]
    for done in range(len(writes) + 1):
        disk = converted.copy()
        for entry in writes[:done]:
            disk.write_at(*entry)
        restore(disk, reconcile(disk, trip.saved, new_guid=lambda: FRESH))
        assert disk.content() == trip.before


def test_a_grown_partition_keeps_its_guid_name_and_attributes(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("-N4", script=f",{100 * MIB}\n")
    planned = trip.plan()
    assert not planned.verbatim
    assert any("Partition 4 grew" in one and "GUID" in one for one in planned.sentences)
    table = trip.back()
    after, before = table.partition(4), trip.entry(4)
    assert after is not None
    assert (after.guid, after.name, after.attributes, after.type_guid, after.first_lba) == (
        *(before.guid, before.name, before.attributes, before.type_guid, before.first_lba),
    )
    assert after.end_lba == 220 * MIB
    assert [table.partition(number) for number in (1, 2, 3)] == [trip.entry(number) for number in (1, 2, 3)]
    assert trip.disk.read_at(0, 512) == trip.saved.original_record
    found = planned.identity.by_gpt_number(4)
    assert found is not None
    assert found.sectors == 100 * MIB


def test_a_shrunk_partition_too(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("-N4", script=f",{10 * MIB}\n")
    assert any("Partition 4 shrank" in one for one in trip.plan().sentences)
    after = trip.back().partition(4)
    assert after is not None
    assert after.end_lba == 130 * MIB


def test_an_added_partition_gets_a_fresh_guid_and_a_fresh_entry(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--append", script=f"{160 * MIB},{20 * MIB},8e\n")
    planned = trip.plan()
    added = trip.back().partition(5)
    assert added == GptPartition(5, LINUX_LVM, FRESH, 160 * MIB, 180 * MIB, 0, "")
    assert any("was added" in one and str(FRESH) in one for one in planned.sentences)
    found = planned.identity.by_guid(FRESH)
    assert found is not None
    assert (found.gpt_number, found.mbr_number, found.offset_bytes) == (5, 2, 160 * MIB * 512)


def test_a_removed_partition_is_dropped(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--delete", "4")
    planned = trip.plan()
    assert any("Partition 4 was removed" in one for one in planned.sentences)
    assert planned.identity.by_gpt_number(4) is None
    assert [one.number for one in trip.back().partitions] == [1, 2, 3]


def test_several_changes_at_once(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--delete", "4")
    trip.sfdisk("-N3", script=f",{60 * MIB}\n")
    trip.sfdisk("--append", script=f"{200 * MIB},{20 * MIB},7\n")
    table = trip.back()
    assert [(one.number, one.first_lba, one.end_lba) for one in table.partitions] == [
        (1, MIB, 33 * MIB),
        (2, 33 * MIB, 49 * MIB),
        (3, 49 * MIB, 109 * MIB),
        (5, 200 * MIB, 220 * MIB),
    ]


def test_a_new_type_is_taken_over_but_never_for_the_efi_system_partition(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--part-type", "4", "8e")
    trip.sfdisk("--part-type", "1", "b")
    table = trip.back()
    assert [one.type_guid for one in table.partitions] == [EFI_SYSTEM, MICROSOFT_RESERVED, LINUX_DATA, LINUX_LVM]


def test_a_disk_that_grew_has_its_backup_at_the_new_end(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.size += 64 << 20
    planned = trip.plan()
    assert any(f"grew from {SECTORS} to {SECTORS + 64 * MIB}" in one for one in planned.sentences)
    assert planned.findings == ()
    trip.back()
    grown = SECTORS + 64 * MIB
    assert trip.disk.read_at(446 + 12, 4) == struct.pack("<I", grown - 1)
    header = read_gpt(trip.disk)
    assert header is not None
    assert (header.header.other_lba, header.header.last_usable_lba) == (grown - 1, grown - 34)
    assert trip.disk.read_at(34 * 512, 4000) == bytes(4000)


def test_a_partition_grown_over_the_old_backup_is_no_harm(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.size += 64 << 20
    trip.sfdisk("-N4", script=f",{180 * MIB}\n")
    data = b"data where the backup of the table was"
    trip.disk.write_at((SECTORS - 33) * 512, data)
    after = trip.back().partition(4)
    assert after is not None
    assert after.end_lba == 300 * MIB
    assert trip.disk.read_at((SECTORS - 33) * 512, len(data)) == data


def test_a_disk_that_was_grown_to_align_it_may_go_back_to_its_old_size(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.size += 512 * 1000
    assert not trip.plan().verbatim
    trip.disk.size -= 512 * 1000
    assert trip.plan().verbatim
    trip.back()
    assert trip.disk.content() == trip.before


def test_a_disk_that_shrank_behind_its_partitions_has_its_backup_at_the_new_end(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    small = trip.disk.copy()
    small.size = 200 * MIB * 512
    small.chunks = {at: data for at, data in small.chunks.items() if at * 4096 < small.size}
    trip.disk = small
    assert any("shrank" in one for one in trip.plan().sentences)
    trip.back()
    trip.disk.size = 150 * MIB * 512 + 20 * 512
    trip.disk.write_at(0, trip.saved.written_record)
    trip.stops("disk-too-small", f"before sector {150 * MIB}")


def test_a_backup_that_a_growing_disk_had_left_behind_moves_with_the_first_change(tmp_path: Path) -> None:
    def grow(disk: SparseDisk) -> None:
        disk.size += 64 << 20

    trip = Trip(tmp_path, change=grow)
    planned = trip.plan()
    assert planned.verbatim
    trip.sfdisk("-N4", script=f",{180 * MIB}\n")  # over the backup
    after = trip.back().partition(4)
    assert after is not None
    assert after.end_lba == 300 * MIB


def test_logical_partitions_grow_and_go_too(tmp_path: Path) -> None:
    rows = [(n, EFI_SYSTEM if n == 1 else BASIC_DATA, n * 20 * MIB, n * 20 * MIB + 15 * MIB) for n in range(1, 8)]
    trip = Trip(tmp_path, rows)
    assert [one.number for one in trip.layout.entries] == [1, 2, 3, 5, 6, 7, 8]
    trip.sfdisk("-N5", script=f",{17 * MIB}\n")
    trip.sfdisk("--delete", "7")
    table = trip.back()
    assert [one.number for one in table.partitions] == [1, 2, 3, 4, 5, 7]
    grown = table.partition(4)
    assert grown is not None
    assert grown.sectors == 17 * MIB


def test_a_damaged_primary_is_whole_after_a_change(tmp_path: Path) -> None:
    trip = Trip(tmp_path, change=lambda disk: disk.write_at(512 + 60, b"\xff\xfe"))
    assert trip.saved.gpt.from_backup
    trip.sfdisk("-N4", script=f",{100 * MIB}\n")
    after = trip.back().partition(4)
    assert after is not None
    assert after.end_lba == 220 * MIB


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_first_sector_of_windows_and_of_a_hybrid(tmp_path: Path, hybrid: bool) -> None:
    entries = [MbrEntry(0xEE, 1, 2**32 - 1), *([MbrEntry(0x83, 49 * MIB, 51 * MIB)] if hybrid else [])]
    record = encode_record(entries, boot_code=b"windows")

    def change(disk: SparseDisk) -> None:
        disk.write_at(0, record)

    trip = Trip(tmp_path, change=change)
    trip.sfdisk("-N4", script=f",{100 * MIB}\n")
    planned = trip.plan()
    assert any("hybrid" in one for one in planned.sentences) is hybrid
    trip.back()
    first = trip.disk.read_at(0, 512)
    assert first[:7] == b"windows"
    assert (first == record) is not hybrid
    assert first[446 + 16 : 510] == bytes(48)


def test_a_new_signature_is_told_and_named(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--disk-id", "0x11223344")
    planned = trip.plan()
    assert [one.rule for one in planned.findings] == ["signature-changed"]
    assert planned.identity.signature == 0x11223344
    trip.back()
    assert trip.disk.content() == trip.before


def test_a_moved_partition_stops_it(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--delete", "4")
    trip.sfdisk("--append", script=f"{122 * MIB},{20 * MIB},83\n")
    trip.stops("partition-moved", str(120 * MIB))
    trip = Trip(tmp_path)
    trip.sfdisk("--delete", "4")
    trip.sfdisk("--append", script=f"{180 * MIB},{30 * MIB},83\n")  # elsewhere, as long as it was
    trip.stops("partition-moved", str(180 * MIB))


def test_a_partition_over_an_unmapped_one_stops_it(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("-N1", script=f",{40 * MIB}\n")
    trip.stops("overlaps-unmapped", f"sectors {33 * MIB}")
    rows = [*ROWS, (5, WINDOWS_RECOVERY, 150 * MIB, 170 * MIB), (6, BASIC_DATA, 190 * MIB, 200 * MIB)]
    trip = Trip(tmp_path, rows, system="windows")
    assert [one.gpt_number for one in trip.layout.unmapped] == [2, 5]
    trip.sfdisk("--delete", "4")
    trip.sfdisk("--append", script=f"{160 * MIB},{20 * MIB},7\n")
    trip.stops("overlaps-unmapped", f"sectors {150 * MIB}")


@pytest.mark.parametrize("kind", ["42", "ee"])
def test_a_dynamic_disk_or_another_gpt_stops_it(tmp_path: Path, kind: str) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--part-type", "4", kind)
    trip.stops(f"type-{kind}", f"0x{kind}")


def test_a_removed_boot_partition_stops_it(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("--delete", "1")
    trip.stops("boot-partition-removed", str(MIB))


def test_a_partition_over_the_core_or_the_table_stops_it(tmp_path: Path) -> None:
    for first, rule in ((40, "core-removed"), (20, "overlaps-gpt")):
        trip = Trip(tmp_path)
        live = [MbrEntry(one.type, one.first_lba, one.sectors) for one in trip.layout.entries]
        trip.disk.write_at(0, encode_record([*live, MbrEntry(0x83, first, 100)]))
        trip.stops(rule, str(first))


def test_a_partition_that_leaves_no_room_for_the_table_stops_it_until_the_disk_grows(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.sfdisk("-N4", script=f",{136 * MIB}\n")
    trip.stops("no-room-for-gpt", f"of {SECTORS}")
    trip.disk.size += 1 << 20
    after = trip.back().partition(4)
    assert after is not None
    assert after.end_lba == SECTORS


def test_partitions_that_overlap_or_leave_the_disk_stop_it(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    live = [MbrEntry(one.type, one.first_lba, one.sectors) for one in trip.layout.entries]
    trip.disk.write_at(0, encode_record([*live, MbrEntry(0x83, 60 * MIB, 100)]))
    trip.stops("partitions-overlap", str(60 * MIB))
    trip.disk.write_at(0, encode_record([*live, MbrEntry(0x83, 200 * MIB, 100 * MIB)]))
    trip.stops("partition-leaves-disk", str(300 * MIB))


def test_a_lost_or_damaged_record_stops_it(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.write_at(0, bytes(512))
    trip.stops("mbr-missing")
    trip.disk.write_at(0, encode_record([MbrEntry(0x0F, 2048, 10)]))
    trip.disk.write_at(MIB * 512, encode_record([MbrEntry(5, 0, 10)], base_lba=MIB))
    trip.stops("mbr-damaged")


def test_a_disk_that_lived_on_as_generation_2_is_left_alone(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    restore(trip.disk, trip.plan())
    run("sgdisk", "-d4", str(trip.disk.to_file(trip.path)))
    trip.disk = SparseDisk.from_file(trip.path)
    trip.stops("already-gpt")


def test_other_sectors_or_a_full_table_stop_it(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    trip.disk.sector_size = 4096
    trip.stops("sector-size-changed", "4096")
    trip = Trip(tmp_path)
    assert trip.saved.gpt.header.entry_count == 128
    table = make_table(ROWS, sectors=SECTORS, entry_count=4)
    trip.disk = make_disk(table, SECTORS)
    trip.layout, trip.saved = convert(trip.disk, boot=1)
    trip.sfdisk("--append", script=f"{160 * MIB},{20 * MIB},8e\n")
    trip.stops("no-entry-left", "4 entries")


def test_data_of_a_new_partition_before_the_first_one_are_not_written_over(tmp_path: Path) -> None:
    trip = Trip(tmp_path)
    live = [MbrEntry(one.type, one.first_lba, one.sectors) for one in trip.layout.entries]
    trip.disk.write_at(0, encode_record([*live, MbrEntry(0x83, 1000, 500)]))
    trip.disk.write_at(1000 * 512, b"data")
    trip.back()
    assert trip.disk.read_at(1000 * 512, 4) == b"data"
