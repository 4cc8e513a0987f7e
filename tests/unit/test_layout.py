"""Layouts under a master boot record: the four-partition rule, numbers, places, refusals, the order of the writes."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from conversion.errors import RefusedError
from conversion.free_sectors import FreeSectors
from conversion.gpt import EFI_SYSTEM, Gpt
from conversion.layout import write_places
from conversion.layout_planner import LARGEST_FIXED_VHD_SECTORS, PlannedLayout, derive_signature, plan_layout
from conversion.mbr import read_mbr
from conversion.partition_types import (
    BASIC_DATA,
    BIOS_BOOT,
    DYNAMIC_DATA,
    DYNAMIC_METADATA,
    LINUX_DATA,
    LINUX_LVM,
    LINUX_RAID,
    LINUX_ROOT_X64,
    LINUX_SWAP,
    LINUX_XBOOTLDR,
    MICROSOFT_RESERVED,
    WINDOWS_RECOVERY,
    System,
    gpt_type,
    mbr_type,
)
from tests.support.gpt_disks import BOOT_CODE, DISK, SparseDisk, convert, make_disk, make_table

SECTORS = 1 << 21
MIB = 2048
Rows = list[tuple[int, UUID, int, int]]


def abutting(*kinds: UUID, first: int = MIB, length: int = 16 * MIB) -> Rows:
    return [(n, kind, first + (n - 1) * length, first + n * length) for n, kind in enumerate(kinds, 1)]


def plan(rows: Rows | Gpt, *, sectors: int = SECTORS, system: System = "linux", **more: object) -> PlannedLayout:
    table = rows if isinstance(rows, Gpt) else make_table(rows, sectors=sectors)
    options: dict[str, object] = {"sector_size": 512, "boot_partition": 1, "core_sectors": 600, **more}
    return plan_layout(table, sectors=sectors, system=system, **options)  # type: ignore[arg-type]


def rules(planned: PlannedLayout) -> list[str]:
    return [one.rule for one in planned.findings]


def numbers(planned: PlannedLayout) -> dict[int, int]:
    return {one.gpt_number: one.number for one in planned.require().entries}


WINDOWS = [EFI_SYSTEM, MICROSOFT_RESERVED, BASIC_DATA, WINDOWS_RECOVERY]


def test_a_windows_disk_keeps_its_numbers_and_loses_its_reserved_partition() -> None:
    layout = plan(abutting(*WINDOWS), system="windows").require()
    assert [(one.gpt_number, one.number, one.type, one.active, one.kind) for one in layout.entries] == [
        (1, 1, 0x0C, True, "primary"),
        (3, 3, 0x07, False, "primary"),
        (4, 4, 0x27, False, "primary"),
    ]
    assert [one.gpt_number for one in layout.unmapped] == [2]
    assert "Windows" in layout.unmapped[0].why
    assert layout.extended is None
    assert (layout.core_lba, layout.core_sectors) == (34, 600)
    assert rules(plan(abutting(*WINDOWS), system="windows")) == ["partition-unmapped"]


def test_a_cloud_image_keeps_its_root_first() -> None:
    rows = [(14, BIOS_BOOT, 2048, 8192), (15, EFI_SYSTEM, 8192, 262144), (1, LINUX_ROOT_X64, 262144, 1 << 20)]
    planned = plan(rows, boot_partition=15)
    assert numbers(planned) == {1: 1, 15: 2}
    assert [(one.type, one.active) for one in planned.require().entries] == [(0x83, False), (0xEF, True)]


@pytest.mark.parametrize("system", ["windows", "linux"])
def test_types_are_those_of_the_table(system: System) -> None:
    esp = 0x0C if system == "windows" else 0xEF
    kinds = [
        LINUX_DATA,
        LINUX_ROOT_X64,
        LINUX_XBOOTLDR,
        LINUX_LVM,
        LINUX_RAID,
        LINUX_SWAP,
        BASIC_DATA,
        WINDOWS_RECOVERY,
    ]
    found = [mbr_type(kind, system) for kind in [EFI_SYSTEM, *kinds, MICROSOFT_RESERVED, BIOS_BOOT, UUID(int=1)]]
    assert found == [esp, 0x83, 0x83, 0x83, 0x8E, 0xFD, 0x82, 0x07, 0x27, None, None, None]
    for kind in (LINUX_DATA, LINUX_LVM, LINUX_RAID, LINUX_SWAP, BASIC_DATA, WINDOWS_RECOVERY):
        code = mbr_type(kind, system)
        assert code is not None
        assert gpt_type(code, system) == kind
    assert gpt_type(0x99, system) == (BASIC_DATA if system == "windows" else LINUX_DATA)


def test_an_unknown_type_becomes_data_with_a_note() -> None:
    for system, code in (("windows", 0x07), ("linux", 0x83)):
        planned = plan(abutting(EFI_SYSTEM, UUID(int=5)), system=system)  # type: ignore[arg-type]
        assert planned.require().entries[1].type == code
        assert rules(planned) == ["partition-type-unknown"]


def test_five_and_six_leave_out_what_the_guest_runs_without() -> None:
    five = plan(abutting(*WINDOWS, BASIC_DATA, BASIC_DATA), system="windows").require()
    assert [one.gpt_number for one in five.unmapped] == [2, 4]
    assert numbers(plan(abutting(*WINDOWS, BASIC_DATA, BASIC_DATA))) == {1: 1, 3: 3, 5: 2, 6: 4}
    rows = abutting(EFI_SYSTEM, LINUX_SWAP, LINUX_DATA, LINUX_SWAP, LINUX_DATA, LINUX_DATA)
    six = plan(rows).require()
    assert [one.gpt_number for one in six.unmapped] == [2, 4]
    assert six.extended is None
    # No more than needed, the last one first, and swap before what was named.
    five = plan(rows[:5], may_leave={3}).require()
    assert [one.gpt_number for one in five.unmapped] == [4]
    named = plan(abutting(EFI_SYSTEM, *[LINUX_DATA] * 4), may_leave={1, 3, 5}).require()
    assert [one.gpt_number for one in named.unmapped] == [5]


def test_the_boot_partition_is_never_left_out() -> None:
    rows = abutting(EFI_SYSTEM, LINUX_DATA, LINUX_DATA, LINUX_DATA, WINDOWS_RECOVERY)
    layout = plan(rows, boot_partition=5, may_leave={4}).require()
    assert [one.gpt_number for one in layout.unmapped] == [4]
    assert [one.gpt_number for one in layout.entries if one.active] == [5]


def test_more_go_into_an_extended_partition_with_records_in_the_freed_gap() -> None:
    planned = plan(abutting(*WINDOWS[:3], *[BASIC_DATA] * 5), system="windows")
    layout = planned.require()
    gap_end = MIB + 32 * MIB
    assert layout.extended is not None
    assert (layout.extended.number, layout.extended.first_lba) == (4, gap_end - MIB)
    assert [(one.gpt_number, one.number, one.kind, one.ebr_lba) for one in layout.entries] == [
        (1, 1, "primary", None),
        (7, 2, "primary", None),
        (8, 3, "primary", None),
        (3, 5, "logical", gap_end - MIB),
        (4, 6, "logical", gap_end - MIB + 1),
        (5, 7, "logical", gap_end - MIB + 2),
        (6, 8, "logical", gap_end - MIB + 3),
    ]
    assert [one.rule for one in planned.findings if one.severity == "warning"] == ["extended-partition"]


def test_every_logical_partition_with_a_gap_has_its_record_right_there() -> None:
    rows = [(n, LINUX_DATA if n > 1 else EFI_SYSTEM, n * 10 * MIB, n * 10 * MIB + 9 * MIB) for n in range(1, 8)]
    layout = plan(rows).require()
    logicals = [one for one in layout.entries if one.kind == "logical"]
    assert [one.gpt_number for one in logicals] == [4, 5, 6, 7]
    assert all(one.ebr_lba == one.first_lba - MIB for one in logicals)
    assert numbers(plan(rows)) == {1: 1, 2: 2, 3: 3, 4: 5, 5: 6, 6: 7, 7: 8}
    last = plan(rows, boot_partition=7).require()
    assert [one.gpt_number for one in last.entries if one.active] == [7]
    assert [one.gpt_number for one in last.entries if one.kind == "logical"] == [3, 4, 5, 6]


def test_a_boot_partition_that_must_be_logical_is_told() -> None:
    behind_the_only_gap = [
        (n + 1, LINUX_DATA, first, end) for n, _, first, end in abutting(*[LINUX_DATA] * 5, first=90000)
    ]
    rows = [(1, LINUX_DATA, 34, 2048), *behind_the_only_gap]
    planned = plan(rows, boot_partition=3)
    assert "boot-partition-logical" in rules(planned)
    assert not any(one.active for one in planned.require().entries)
    assert "boot-partition-logical" not in rules(plan(rows, boot_partition=6))


def test_the_core_goes_behind_the_table_or_else_to_the_first_gap_with_room() -> None:
    assert plan(abutting(*WINDOWS)).require().core_lba == 34
    close = abutting(EFI_SYSTEM, BIOS_BOOT, LINUX_DATA, first=34)
    layout = plan(close).require()
    assert layout.core_lba == 34 + 16 * MIB  # where the BIOS boot partition was
    reserved_first = abutting(MICROSOFT_RESERVED, EFI_SYSTEM, BASIC_DATA, first=34)
    assert plan(reserved_first, boot_partition=2).require().core_lba == 34
    behind = plan(abutting(EFI_SYSTEM, LINUX_DATA, first=34)).require()
    assert behind.core_lba == 34 + 32 * MIB
    wide = make_table(abutting(EFI_SYSTEM), sectors=SECTORS, entry_count=256)
    assert plan(wide).require().core_lba == 66


def test_the_old_backup_of_a_grown_disk_is_not_written_over() -> None:
    table = make_table(abutting(EFI_SYSTEM, first=34, length=4000), sectors=8192)
    layout = plan(table, sectors=16384, core_sectors=5000).require()
    assert layout.core_lba == 8192
    # Nor is the new end of the disk, where the backup comes to lie on the way back.
    assert plan(table, sectors=16384, core_sectors=8192 - 33).layout is not None
    assert rules(plan(table, sectors=16384, core_sectors=8192 - 32)) == ["no-room-for-core"]


def test_signatures_are_derived_never_zero_and_never_taken() -> None:
    first = derive_signature(DISK)
    assert 0 < first < 1 << 32
    assert derive_signature(DISK) == first != derive_signature(UUID(int=1))
    second = derive_signature(DISK, {first})
    assert second != first
    assert derive_signature(DISK, {first, second}) not in {0, first, second}
    assert plan(abutting(*WINDOWS), taken_signatures={first}).require().signature == second


def test_names_lead_from_one_table_to_the_other() -> None:
    layout = plan(abutting(*WINDOWS), system="windows").require()
    identity = layout.identity()
    third = identity.by_gpt_number(3)
    assert third is not None
    assert (third.offset_bytes, third.sectors) == ((MIB + 32 * MIB) * 512, 16 * MIB)
    assert identity.by_guid(third.guid) is identity.by_offset(third.offset_bytes) is identity.by_mbr_number(3) is third
    assert identity.by_gpt_number(2) is None
    assert identity.mbr_partuuid(third) == f"{layout.signature:08x}-03"
    assert identity.gpt_partuuid(third) == str(third.guid)


@pytest.mark.parametrize(
    "rows, options, rule, evidence",
    [
        (abutting(*WINDOWS), {"sector_size": 4096}, "4k-sectors", "4096"),
        (
            abutting(*WINDOWS),
            {"sectors": LARGEST_FIXED_VHD_SECTORS + 1, "largest_sectors": LARGEST_FIXED_VHD_SECTORS},
            "disk-too-large",
            str(LARGEST_FIXED_VHD_SECTORS),
        ),
        ([(1, EFI_SYSTEM, 2048, 1 << 32)], {"sectors": 1 << 33}, "partition-beyond-2tib", str(1 << 32)),
        (abutting(EFI_SYSTEM, DYNAMIC_METADATA), {}, "dynamic-disk", str(DYNAMIC_METADATA)),
        (abutting(EFI_SYSTEM, DYNAMIC_DATA), {}, "dynamic-disk", str(DYNAMIC_DATA)),
        ([(1, EFI_SYSTEM, 34, SECTORS - 33)], {}, "no-room-for-core", "largest gap has 0"),
        ([(1, EFI_SYSTEM, 633, SECTORS - 33)], {}, "no-room-for-core", "largest gap has 599"),
        (abutting(EFI_SYSTEM, *[LINUX_DATA] * 60, length=64), {}, "too-many-partitions", "61 partitions"),
        (
            [(n, LINUX_DATA, 34 + n * 100, 134 + n * 100) for n in range(1, 5)] + [(5, LINUX_DATA, 534, SECTORS - 33)],
            {"core_sectors": 100},
            "too-many-partitions",
            "5 partitions",
        ),
        ([(1, EFI_SYSTEM, 100, 200), (2, LINUX_DATA, 199, 300)], {}, "gpt-inconsistent", "sector 199"),
        (
            [(1, EFI_SYSTEM, 100, 900), (2, LINUX_DATA, 300, 400), (3, LINUX_DATA, 500, 600)],
            {},
            "gpt-inconsistent",
            "sector 500",
        ),
        ([(1, EFI_SYSTEM, 33, 200)], {}, "gpt-inconsistent", "sector 33"),
        ([(1, EFI_SYSTEM, 100, SECTORS - 1)], {}, "gpt-inconsistent", "partition 1 ends"),
        ([(1, EFI_SYSTEM, 100, SECTORS + 1)], {}, "gpt-inconsistent", str(SECTORS)),
        ([(1, EFI_SYSTEM, 100, 100)], {}, "gpt-inconsistent", "from 100"),
        (abutting(*WINDOWS), {"boot_partition": 9}, "boot-partition-missing", "[1, 2, 3, 4]"),
        (abutting(*WINDOWS), {"boot_partition": 2}, "boot-partition-missing", "[1, 2, 3, 4]"),
        ([], {}, "boot-partition-missing", "[]"),
    ],
)
def test_every_refusal_names_its_rule_the_evidence_and_a_remedy(
    rows: Rows, options: dict[str, object], rule: str, evidence: str
) -> None:
    planned = plan(rows, **options)  # type: ignore[arg-type]
    assert planned.layout is None
    refusals = [one for one in planned.findings if one.rule == rule]
    assert refusals, planned.findings
    assert any(evidence in one.evidence for one in refusals), refusals
    assert all(one.severity == "refusal" and one.remedy and one.message.endswith(".") for one in planned.findings)
    with pytest.raises(RefusedError) as raised:
        planned.require()
    assert refusals[0].message in raised.value.message
    assert raised.value.hint


def test_a_table_that_leaves_a_shrunk_disk_is_refused() -> None:
    table = make_table(abutting(EFI_SYSTEM), sectors=SECTORS)
    assert rules(plan(table, sectors=SECTORS // 2))[0] == "gpt-inconsistent"


def test_a_disk_beyond_2_tib_with_all_partitions_below_is_warned_of() -> None:
    planned = plan(abutting(*WINDOWS), sectors=1 << 33)
    assert "disk-beyond-2tib" in rules(planned)
    assert planned.require().core_lba == 34
    last = plan([(1, EFI_SYSTEM, 2048, (1 << 32) - 1)], sectors=1 << 33).require()
    assert last.entries[0].end_lba == (1 << 32) - 1


def test_until_the_last_write_the_disk_boots_as_before() -> None:
    rows = abutting(*WINDOWS[:3], *[BASIC_DATA] * 5)
    disk = make_disk(make_table(rows, sectors=SECTORS), SECTORS)
    before = disk.copy()
    convert(disk, boot=1, system="windows")
    assert disk.log[-1] is None
    *earlier, flushed, switch, _ = disk.log
    assert flushed is None
    assert switch is not None
    assert (switch[0], len(switch[1])) == (0, 512)
    assert switch[1][: len(BOOT_CODE)] == BOOT_CODE
    replayed = before.copy()
    for entry in earlier:
        if entry is not None:
            replayed.write_at(*entry)
            mbr = read_mbr(replayed)
            assert mbr is not None
            assert mbr.is_protective
            assert replayed.read_at(0, 34 * 512) == before.read_at(0, 34 * 512)


def test_a_core_that_is_too_large_is_not_written() -> None:
    disk = SparseDisk(SECTORS * 512)
    layout = plan(abutting(*WINDOWS)).require()
    with pytest.raises(ValueError, match="larger than its place"):
        write_places(disk, layout, core=bytes(600 * 512 + 1))
    assert disk.log == []
    with pytest.raises(ValueError, match="440 bytes"):
        layout.master_record(bytes(441))


def test_a_layout_is_printable() -> None:
    layout = plan(abutting(*WINDOWS[:3], *[BASIC_DATA] * 5)).require()
    document = layout.document()
    assert document["signature"] == f"{layout.signature:08x}"
    assert document["extended"] == {"number": 4, "first_lba": 33 * MIB - MIB, "end_lba": MIB + 96 * MIB}
    assert replace(layout, extended=None).document()["extended"] is None


def test_free_sectors_are_what_is_not_occupied() -> None:
    free = FreeSectors.between([(20, 30), (0, 5), (22, 25), (29, 40), (90, 200)], 100)
    assert free.ranges == [(5, 20), (40, 90)]
    assert free.places(16) == [40]
    assert free.without(10, 50).ranges == [(5, 10), (50, 90)]
    assert free.without(0, 100).ranges == []
    assert FreeSectors.between([], 7).ranges == [(0, 7)]
