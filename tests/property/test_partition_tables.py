"""Any GPT → master boot record → back is the identity on every byte, and other tools agree with both tables."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conversion.errors import DamagedError
from conversion.gpt import EFI_SYSTEM, read_gpt
from conversion.gpt_copies import mended, read_copies
from conversion.layout_planner import plan_layout
from conversion.mbr import read_mbr
from conversion.partition_types import (
    BASIC_DATA,
    BIOS_BOOT,
    LINUX_DATA,
    LINUX_LVM,
    LINUX_SWAP,
    MICROSOFT_RESERVED,
    WINDOWS_RECOVERY,
)
from conversion.reconcile import reconcile, restore
from conversion.saved_table import decode_saved_table, save_table
from tests.support import kernel_tables
from tests.support.gpt_disks import BOOT_CODE, SparseDisk, convert, make_disk, make_table, run

KINDS = [BASIC_DATA, LINUX_DATA, LINUX_LVM, LINUX_SWAP, WINDOWS_RECOVERY, MICROSOFT_RESERVED, BIOS_BOOT, UUID(int=77)]
CORE = b"boot core" * 700


def no_guid() -> UUID:
    raise AssertionError("an unchanged table needs no GUID")


@st.composite
def gpt_disks(draw: st.DrawFn) -> tuple[SparseDisk, int]:
    """A disk with up to 12 partitions, abutting or with gaps, in any order of numbers; and the number of its ESP."""
    entry_count, entry_size = draw(st.sampled_from([(128, 128), (128, 128), (16, 128), (60, 256), (130, 128)]))
    position = max(draw(st.sampled_from([34, 34, 40, 2048, 2048])), 2 + -(-entry_count * entry_size // 512))
    count = draw(st.integers(1, 12))
    numbers = draw(st.lists(st.integers(1, 15), min_size=count, max_size=count, unique=True))
    esp = draw(st.integers(0, count - 1))
    partitions = []
    for index, number in enumerate(numbers):
        position += draw(st.sampled_from([0, 0, 0, 1, 7, 63, 2048]))
        length = draw(st.sampled_from([1, 8, 200, 2048, 40000]))
        kind = EFI_SYSTEM if index == esp else draw(st.sampled_from(KINDS))
        partitions.append((number, kind, position, position + length))
        position += length
    sectors = position + draw(st.sampled_from([66, 67, 5000]))
    usable = draw(st.sampled_from([None, None, partitions[0][2]]))
    table = make_table(
        partitions, sectors=sectors, entry_count=entry_count, entry_size=entry_size, first_usable_lba=usable
    )
    disk = make_disk(table, sectors)
    damage = draw(st.sampled_from(["", "", "", "primary", "backup", "grown"]))
    if damage == "primary":
        disk.write_at(512 + 20, b"\xff")
    elif damage == "backup":
        disk.write_at(disk.size - 512 + 20, b"\xff")
    elif damage == "grown":
        disk.size += 512 * draw(st.sampled_from([1, 20, 4000]))
    disk.log.clear()
    return disk, numbers[esp]


def windows_like(count: int) -> tuple[SparseDisk, int]:
    kinds = [EFI_SYSTEM, MICROSOFT_RESERVED, BASIC_DATA, WINDOWS_RECOVERY, *[BASIC_DATA] * 8][:count]
    partitions = [(n, kind, 2048 * n, 2048 * (n + 1)) for n, kind in enumerate(kinds, 1)]
    sectors = 2048 * (count + 2)
    return make_disk(make_table(partitions, sectors=sectors), sectors), 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(gpt_disks())
@example(windows_like(12))
@example(windows_like(5))
def test_there_and_back_is_the_identity_on_every_byte(drawn: tuple[SparseDisk, int]) -> None:
    disk, boot = drawn
    before = disk.content()
    copies = read_copies(disk)
    assert copies is not None
    planned = [
        plan_layout(
            copies.table,
            sectors=copies.sectors,
            sector_size=512,
            system="windows",
            boot_partition=boot,
            core_sectors=13,
        )
        for _ in range(2)
    ]
    assert planned[0] == planned[1]
    layout = planned[0].layout
    if layout is None:
        assert {one.rule for one in planned[0].findings} <= {"no-room-for-core", "too-many-partitions"}
        return
    layout, saved = convert(disk, boot=boot, system="windows", core=CORE)

    # No byte of a partition changed but in those that are given up, and the table is still there, asleep.
    given_up = [one for one in copies.table.partitions if one.type_guid in (MICROSOFT_RESERVED, BIOS_BOOT)]
    for offset, data in [entry for entry in disk.log if entry is not None]:
        first, end = offset // 512, -(-(offset + len(data)) // 512)
        hit = [one for one in copies.table.partitions if one.first_lba < end and first < one.end_lba]
        assert all(one in given_up for one in hit)
        assert first == 0 or first >= copies.table.primary_header().entries_end_lba
    assert disk.log[-3:] == [None, (0, layout.master_record(BOOT_CODE)), None]
    assert read_gpt(disk) is None
    again = read_copies(disk)
    assert again is not None
    assert again.asleep
    assert (again.table, again.primary, again.backup) == (copies.table, copies.primary, copies.backup)

    # Our own reader finds what was planned.
    mbr = read_mbr(disk)
    assert mbr is not None
    assert mbr.signature == layout.signature != 0
    assert [(one.number, one.type, one.first_lba, one.end_lba, one.active, one.kind) for one in mbr.holding_data] == [
        (one.number, one.type, one.first_lba, one.end_lba, one.active, one.kind) for one in layout.entries
    ]
    expected = {one.number for one in copies.table.partitions} - {one.gpt_number for one in layout.unmapped}
    assert {one.gpt_number for one in layout.entries} == expected
    for one in layout.entries:
        found = copies.table.partition(one.gpt_number)
        assert found is not None
        assert (one.first_lba, one.end_lba, one.guid) == (found.first_lba, found.end_lba, found.guid)

    # Back, from the document.
    kept = decode_saved_table(json.loads(json.dumps(saved.document())))
    assert kept == saved
    back = reconcile(disk, kept, new_guid=no_guid)
    assert back.verbatim
    assert not back.findings
    restore(disk, back)
    assert disk.content() == before
    # Once more is harmless.
    restore(disk, reconcile(disk, kept, new_guid=no_guid))
    assert disk.content() == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(gpt_disks())
@example(windows_like(12))
@example(windows_like(5))
def test_sfdisk_and_sgdisk_agree(drawn: tuple[SparseDisk, int]) -> None:
    disk, boot = drawn
    copies = read_copies(disk)
    assert copies is not None
    for offset, data in mended(copies):
        disk.write_at(offset, data)
    planned = plan_layout(
        copies.table, sectors=copies.sectors, sector_size=512, system="linux", boot_partition=boot, core_sectors=13
    )
    if planned.layout is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.img"
        before = run("sgdisk", "-v", str(disk.to_file(path)))
        layout, saved = convert(disk, boot=boot, core=CORE)
        disk.to_file(path)
        told = json.loads(run("sfdisk", "--json", str(path)))["partitiontable"]
        assert (told["label"], told["id"]) == ("dos", f"0x{layout.signature:08x}")
        found = {
            int(one["node"].removeprefix(str(path))): (one["start"], one["size"], int(one["type"], 16))
            for one in told["partitions"]
        }
        expected = {one.number: (one.first_lba, one.sectors, one.type) for one in layout.entries}
        if layout.extended is not None:
            extended = layout.extended
            expected[extended.number] = (extended.first_lba, extended.end_lba - extended.first_lba, 0x0F)
        assert found == expected
        verdict = run("sfdisk", "--verify", str(path))
        assert "No errors detected" in verdict, verdict
        restore(disk, reconcile(disk, saved, new_guid=no_guid))
        assert run("sgdisk", "-v", str(disk.to_file(path))) == before


@pytest.mark.skipif(bool(kernel_tables.missing()), reason=kernel_tables.missing() or "there is a kernel to ask")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(gpt_disks())
@example(windows_like(12))
@example(windows_like(5))
@example(windows_like(4))
def test_the_kernel_finds_the_same_partitions(drawn: tuple[SparseDisk, int]) -> None:
    disk, boot = drawn
    copies = read_copies(disk)
    assert copies is not None
    if copies.table.header.entry_size != 128:  # Linux knows no other
        return
    for offset, data in mended(copies):
        disk.write_at(offset, data)
    planned = plan_layout(
        copies.table, sectors=copies.sectors, sector_size=512, system="windows", boot_partition=boot, core_sectors=13
    )
    if planned.layout is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.img"
        before = kernel_tables.partitions(disk.to_file(path))
        assert before == {one.number: (one.first_lba, one.sectors) for one in copies.table.partitions}
        layout, saved = convert(disk, boot=boot, system="windows", core=CORE)
        found = kernel_tables.partitions(disk.to_file(path))
        if layout.extended is not None:
            start, length = found.pop(layout.extended.number)  # of its length the kernel shows a loader's room
            assert (start, length) in ((layout.extended.first_lba, 1), (layout.extended.first_lba, 2))
        assert found == {one.number: (one.first_lba, one.sectors) for one in layout.entries}
        restore(disk, reconcile(disk, saved, new_guid=no_guid))
        assert kernel_tables.partitions(disk.to_file(path)) == before


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_table_is_read_or_refused(data: st.DataObject) -> None:
    disk, _ = windows_like(12)
    layout, _ = convert(disk, boot=1)
    places = [0, *(one.ebr_lba for one in layout.entries if one.ebr_lba is not None)]
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.sampled_from(places)) * 512 + data.draw(st.integers(440, 511))
        disk.write_at(at, bytes([data.draw(st.integers(0, 255))]))
    try:
        mbr = read_mbr(disk)
    except DamagedError:
        return
    if mbr is not None:
        assert len(mbr.partitions) <= 4 + 200


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_the_live_table_became_the_way_back_is_planned_or_stopped(data: st.DataObject) -> None:
    disk, _ = windows_like(9)
    layout, saved = convert(disk, boot=1)
    places = [0, *(one.ebr_lba for one in layout.entries if one.ebr_lba is not None)]
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.sampled_from(places)) * 512 + data.draw(st.integers(440, 511))
        disk.write_at(at, bytes([data.draw(st.integers(0, 255))]))
    disk.size += 512 * data.draw(st.sampled_from([0, 0, 5000, -2048, -4000, -disk.size // 512 + 1]))
    numbers = iter(range(1, 99))
    back = reconcile(disk, saved, new_guid=lambda: UUID(int=next(numbers)))
    if back.table is None:
        assert any(one.severity == "refusal" for one in back.findings)
        return
    restore(disk, back)
    again = read_copies(disk)
    assert again is not None
    assert again.primary.good
    assert again.backup.good
    assert again.backup.lba == disk.size // 512 - 1
    assert again.table.partitions == back.table.partitions


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_saved_table_that_was_changed_is_refused(data: st.DataObject) -> None:
    disk, _ = windows_like(9)
    _, saved = convert(disk, boot=1)
    text = bytearray(json.dumps(saved.document()).encode())
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.integers(32, 126))
    if data.draw(st.booleans()):
        text = text[:at]
    else:
        text[at] = new
    try:
        document = json.loads(text)
    except ValueError:
        return
    if document == saved.document():
        return
    with pytest.raises(DamagedError):
        decode_saved_table(document)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(gpt_disks(), st.binary(max_size=600))
def test_the_saved_bytes_bring_back_whatever_the_first_sectors_held(drawn: tuple[SparseDisk, int], junk: bytes) -> None:
    disk, boot = drawn
    copies = read_copies(disk)
    assert copies is not None
    planned = plan_layout(
        copies.table, sectors=copies.sectors, sector_size=512, system="linux", boot_partition=boot, core_sectors=5
    )
    if planned.layout is None:
        return
    disk.write_at(0, junk[:440])  # another boot code
    disk.write_at(planned.layout.core_lba * 512, junk)  # and whatever lies where the core goes
    before = disk.content()
    layout, saved = convert(disk, boot=boot, core=b"c" * 5 * 512)
    assert layout == planned.layout
    disk.write_at(layout.core_lba * 512, b"another loader")
    back = reconcile(disk, saved, new_guid=no_guid)
    assert [one.rule for one in back.findings] == ["boot-loader-changed"]
    restore(disk, back)
    assert disk.content() == before


def test_a_layout_of_another_disk_is_not_saved() -> None:
    disk, _ = windows_like(4)
    copies = read_copies(disk)
    assert copies is not None
    layout = plan_layout(
        copies.table, sectors=copies.sectors, sector_size=512, system="linux", boot_partition=1, core_sectors=5
    ).require()
    for wrong, core in ((replace(layout, disk_guid=UUID(int=1)), b""), (layout, bytes(6 * 512))):
        with pytest.raises(ValueError, match="another disk"):
            save_table(disk, copies, wrong, system="linux", boot_code=b"", core=core)
