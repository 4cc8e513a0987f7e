"""Checking VHDX files: each kind of damage is found, told with its place, and does not end the check."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.vhdx_builder import BAT_OFFSET, LOG_OFFSET, METADATA_OFFSET, Block, ImageBuilder, parent_of, ring
from vhdx import check_bat
from vhdx.check import MAX_FINDINGS_PER_RULE, CheckReport, Severity, check_disk
from vhdx.create import create_disk
from vhdx.errors import OsError
from vhdx.log import LogEntry
from vhdx.replay import Change
from vhdx.structures import (
    HEADER_OFFSETS,
    MIB,
    REGION_TABLE_OFFSETS,
    UINT64,
    MetadataEntry,
    PayloadState,
    RegionEntry,
    RegionTable,
)

FULL = PayloadState.FULLY_PRESENT
FIRST_BLOCK = BAT_OFFSET + MIB


def builder() -> ImageBuilder:
    data = b"x" * MIB
    return ImageBuilder(4 * MIB, blocks={0: Block(FULL, data), 1: Block(FULL, data), 3: Block(FULL, data)})


def child_builder() -> ImageBuilder:
    image = ImageBuilder(4 * MIB, parent_values=parent_of(UUID(int=9), "parent.vhdx"))
    image.blocks = {1: Block(PayloadState.PARTIALLY_PRESENT, b"x" * MIB, [True] * 2048)}
    return image


def found(report: CheckReport) -> set[tuple[str, str]]:
    return {(finding.rule, finding.severity.value) for finding in report.findings}


def damaged(folder: Path, image: ImageBuilder, *patches: tuple[int, bytes]) -> CheckReport:
    path = image.write(folder / "disk.vhdx")
    with path.open("rb+") as file:
        for offset, data in patches:
            file.seek(offset)
            file.write(data)
    before = path.read_bytes()
    report = check_disk(path)
    assert path.read_bytes() == before
    return report


def bat(index: int, entry: int) -> tuple[int, bytes]:
    return BAT_OFFSET + index * 8, UINT64.pack(entry)


def test_a_sound_disk_has_no_findings(tmp_path: Path) -> None:
    report = damaged(tmp_path, builder())
    assert report.findings == ()
    assert report.sound


@pytest.mark.parametrize(
    ("make", "patch", "finding"),
    [
        (builder, (0, b"conectix"), ("file-identifier", "error")),
        (builder, (HEADER_OFFSETS[0] + 9, b"x"), ("header-1", "warning")),
        (builder, (HEADER_OFFSETS[1] + 9, b"x"), ("header-2", "warning")),
        (builder, (REGION_TABLE_OFFSETS[0] + 99, b"x"), ("region-table-1", "warning")),
        (builder, (REGION_TABLE_OFFSETS[1] + 99, b"x"), ("region-table-2", "warning")),
        (builder, (METADATA_OFFSET, b"x"), ("metadata", "error")),
        (builder, bat(2, 4), ("block-state", "error")),
        (builder, bat(2, FIRST_BLOCK | 7), ("block-state", "error")),
        (builder, bat(1, FIRST_BLOCK | 6), ("overlap", "error")),
        (builder, bat(1, LOG_OFFSET | 6), ("overlap", "error")),
        (builder, bat(1, BAT_OFFSET | 6), ("overlap", "error")),
        (builder, bat(1, 6), ("block-offset", "error")),
        (builder, bat(1, 1 << 40 | 6), ("block-past-end", "error")),
        (builder, bat(1, (1 << 64) - MIB | 6), ("block-past-end", "error")),
        (builder, bat(2, 8), ("bat-reserved", "error")),
        (builder, bat(2, FIRST_BLOCK | 2), ("zero-placed", "warning")),
        (builder, bat(77, FIRST_BLOCK | 6), ("bat-tail", "warning")),
        (builder, bat(3, 0), ("unused-space", "info")),
        (child_builder, bat(4096, 0), ("bitmap-missing", "error")),
        (child_builder, bat(4096, FIRST_BLOCK | 2), ("bitmap-state", "error")),
        (child_builder, bat(4096, METADATA_OFFSET | 6), ("overlap", "error")),
        (child_builder, (0, b"vhdxfile"), ("parent-missing", "warning")),
    ],
)
def test_each_kind_of_damage_is_found(
    tmp_path: Path, make: Callable[[], ImageBuilder], patch: tuple[int, bytes], finding: tuple[str, str]
) -> None:
    report = damaged(tmp_path, make(), patch)
    assert finding in found(report)
    assert report.sound == all(severity != "error" for _, severity in found(report))


@pytest.mark.parametrize("missing", [MIB, MIB + 512])
def test_a_file_that_ends_with_the_disk_inside_its_last_block_is_no_damage(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=5 * MIB - MIB // 2, block_size=2 * MIB, kind="fixed")
    os.truncate(path, path.stat().st_size - missing)  # QEMU's fixed disks end so
    found_here = [finding for finding in check_disk(path).findings if finding.rule != "file-size"]
    assert [(finding.rule, finding.severity) for finding in found_here] == [("block-cut", Severity.WARNING)]
    assert found_here[0].offset == BAT_OFFSET + 2 * 8
    os.truncate(path, path.stat().st_size - MIB)  # now bytes of the disk are gone
    assert ("block-past-end", "error") in found(check_disk(path))


def test_a_last_block_that_is_cut_may_still_not_lie_on_another(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=5 * MIB, block_size=2 * MIB, kind="fixed")
    os.truncate(path, path.stat().st_size - MIB)
    with path.open("rb+") as file:
        file.seek(BAT_OFFSET + 8)
        file.write(UINT64.pack(8 * MIB - MIB | FULL))
    assert {("block-cut", "warning"), ("overlap", "error")} <= found(check_disk(path))


def test_findings_name_the_block_and_the_place_of_its_entry(tmp_path: Path) -> None:
    report = damaged(tmp_path, builder(), bat(3, FIRST_BLOCK | 6))
    overlap = next(finding for finding in report.findings if finding.rule == "overlap")
    assert overlap.offset == BAT_OFFSET + 3 * 8
    assert overlap.message == "payload block 3 overlaps a payload block"


def test_the_check_goes_on_past_the_first_finding(tmp_path: Path) -> None:
    report = damaged(
        tmp_path,
        builder(),
        (0, b"x"),
        (HEADER_OFFSETS[0], b"x"),
        (REGION_TABLE_OFFSETS[0], b"x"),
        bat(0, 5),
        bat(1, FIRST_BLOCK + 512 * MIB | 6),
    )
    rules = {rule for rule, _ in found(report)}
    assert {"file-identifier", "header-1", "region-table-1", "block-state", "block-past-end"} <= rules


def test_overlaps_are_found_across_windows_and_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_bat, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(check_bat, "CLAIM_SLOTS", 1)
    image = ImageBuilder(64 * MIB, blocks={number: Block(FULL, b"x") for number in range(64)})
    for first, second in ((0, 63), (5, 6), (6, 5), (10, 11)):
        report = damaged(tmp_path, image, bat(second, (FIRST_BLOCK + first * MIB) | 6))
        overlaps = [finding for finding in report.findings if finding.rule == "overlap"]
        assert len(overlaps) == 1
        assert str(max(first, second)) in overlaps[0].message


def test_larger_blocks_that_overlap_in_part_are_found(tmp_path: Path) -> None:
    image = ImageBuilder(16 * MIB, 4 * MIB, blocks={0: Block(FULL, b"x"), 2: Block(FULL, b"x")})
    report = damaged(tmp_path, image, bat(2, (FIRST_BLOCK + 3 * MIB) | 6))
    assert ("overlap", "error") in found(report)


def test_many_findings_of_one_rule_are_counted_not_listed(tmp_path: Path) -> None:
    image = ImageBuilder(1000 * MIB)
    patches = [bat(index, 5) for index in range(1000)]
    report = damaged(tmp_path, image, *patches)
    states = [finding for finding in report.findings if finding.rule == "block-state"]
    assert len(states) == MAX_FINDINGS_PER_RULE + 1
    assert states[-1].message == f"{1000 - MAX_FINDINGS_PER_RULE} more findings of this rule"


def test_a_log_is_told_of_and_the_disk_checked_as_it_reads_after_it(tmp_path: Path) -> None:
    image, log = builder(), UUID(int=5)
    image.log_guid = log
    entry = UINT64.pack(5).ljust(4096, b"\0")
    image.log = ring(LogEntry(1, log, 0, 0, 0, (Change(BAT_OFFSET, BAT_OFFSET + 4096, entry),)))
    report = damaged(tmp_path, image)
    assert {("log-dirty", "warning"), ("block-state", "error")} <= found(report)
    torn = bytearray(image.log)
    torn[8000] ^= 1
    image.log = bytes(torn)
    report = damaged(tmp_path, image)
    assert {("log-torn", "info"), ("log-empty", "info")} <= found(report)
    assert report.sound


def test_unknown_optional_things_are_told_of(tmp_path: Path) -> None:
    image = builder()
    image.extra_items = ((MetadataEntry(UUID(int=77), 0, 0, is_user=True), b"mine"),)
    image.extra_regions = (RegionEntry(UUID(int=78), 16 * MIB, MIB, required=False),)
    path = image.write(tmp_path / "disk.vhdx")
    with path.open("rb+") as file:
        file.truncate(17 * MIB + 100)
    assert {("metadata-unknown", "info"), ("region-unknown", "info"), ("file-size", "warning")} <= found(
        check_disk(path)
    )


def test_region_tables_that_differ_are_told_of(tmp_path: Path) -> None:
    image = builder()
    other = RegionTable(tuple(reversed(image.region_table().entries))).encode()
    report = damaged(tmp_path, image, (REGION_TABLE_OFFSETS[1], other))
    assert found(report) == {("region-tables", "warning")}


def test_a_changed_parent_is_an_error(tmp_path: Path) -> None:
    ImageBuilder(4 * MIB, data_write_guid=UUID(int=8)).write(tmp_path / "parent.vhdx")
    assert ("parent", "error") in found(damaged(tmp_path, child_builder()))
    ImageBuilder(4 * MIB, data_write_guid=UUID(int=9)).write(tmp_path / "parent.vhdx")
    assert found(damaged(tmp_path, child_builder())) == set()


def test_two_headers_with_one_number_are_an_error(tmp_path: Path) -> None:
    image = builder()
    twin = replace(image.header(2), file_write_guid=UUID(int=1)).encode()
    assert ("headers", Severity.ERROR.value) in found(damaged(tmp_path, image, (HEADER_OFFSETS[0], twin)))


def test_a_file_that_cannot_be_opened_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OsError):
        check_disk(tmp_path / "absent.vhdx")
