"""Opening one VHDX file: which header and region table are in force, what is refused, and the log laid over it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.vhdx_builder import BAT_OFFSET, LOG_OFFSET, METADATA_OFFSET, Block, ImageBuilder, ring
from vhdx.chain import open_vhdx
from vhdx.errors import (
    CorruptDiskError,
    FormatUnknownError,
    OsError,
    OutOfRangeError,
    ReadOnlyError,
    UnsupportedDiskError,
)
from vhdx.image import VhdxImage
from vhdx.log import LogEntry
from vhdx.replay import Change
from vhdx.structures import (
    BAT_REGION,
    HEADER_OFFSETS,
    MIB,
    REGION_TABLE_OFFSETS,
    TIB,
    UINT64,
    MetadataEntry,
    PayloadState,
    RegionEntry,
    RegionTable,
    encode_bat_entry,
)

PATTERN = bytes(range(256)) * (MIB // 256)
LOG = UUID(int=0x106)


def builder() -> ImageBuilder:
    return ImageBuilder(3 * MIB, blocks={1: Block(PayloadState.FULLY_PRESENT, PATTERN)})


def patched(path: Path, *patches: tuple[int, bytes]) -> Path:
    with path.open("rb+") as file:
        for offset, data in patches:
            file.seek(offset)
            file.write(data)
    return path


def opened(path: Path, **options: bool) -> VhdxImage:
    image = VhdxImage.open(path, **options)
    image.close()
    return image


def test_the_valid_header_with_the_higher_number_is_in_force(tmp_path: Path) -> None:
    image = builder()
    path = image.write(tmp_path / "disk.vhdx")
    assert opened(path).slot == 1
    patched(path, (HEADER_OFFSETS[0], image.header(3).encode()))
    assert (opened(path).slot, opened(path).header.sequence_number) == (0, 3)
    patched(path, (HEADER_OFFSETS[0] + 100, b"x"))
    assert (opened(path).slot, opened(path).header.sequence_number) == (1, 2)
    assert opened(path).header_faults[0] is not None
    patched(path, (HEADER_OFFSETS[1], b"dead"))
    with pytest.raises(CorruptDiskError, match="neither header is valid") as raised:
        opened(path)
    assert raised.value.path == str(path)


def test_headers_of_one_number_must_be_equal(tmp_path: Path) -> None:
    image = builder()
    path = image.write(tmp_path / "disk.vhdx")
    patched(path, (HEADER_OFFSETS[0], image.header(2).encode()))
    assert opened(path).slot == 0
    patched(path, (HEADER_OFFSETS[0], replace(image.header(2), data_write_guid=UUID(int=9)).encode()))
    with pytest.raises(CorruptDiskError, match="same sequence number"):
        opened(path)


def test_a_later_version_of_the_format_is_refused_not_passed_over(tmp_path: Path) -> None:
    image = builder()
    path = image.write(tmp_path / "disk.vhdx")
    patched(path, (HEADER_OFFSETS[1], replace(image.header(2), version=2).encode()))
    with pytest.raises(UnsupportedDiskError, match="version is 2"):
        opened(path)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("damage", ["checksum", "signature", "entries"])
def test_a_disk_with_one_good_region_table_reads(tmp_path: Path, bad: int, damage: str) -> None:
    image = builder()
    path = image.write(tmp_path / "disk.vhdx")
    table = RegionTable((RegionEntry(BAT_REGION, 1 << 50, MIB, True),)).encode()
    data = {"checksum": image.region_table().encode()[:-1] + b"!", "signature": b"nope", "entries": table}[damage]
    patched(path, (REGION_TABLE_OFFSETS[bad], data))
    with open_vhdx(path) as disk:
        assert disk.read_at(MIB, MIB) == PATTERN
        assert [fault is not None for fault in disk.image.region_faults] == [bad == 0, bad == 1]


def test_with_both_region_tables_bad_both_faults_are_told(tmp_path: Path) -> None:
    path = builder().write(tmp_path / "disk.vhdx")
    patched(path, (REGION_TABLE_OFFSETS[0], b"x"), (REGION_TABLE_OFFSETS[1] + 50, b"x"))
    with pytest.raises(CorruptDiskError, match=r"begin with 'regi'.*has checksum"):
        opened(path)


def test_an_unknown_region_is_refused_by_name_only_where_it_is_required(tmp_path: Path) -> None:
    image, guid = builder(), UUID(int=0xABCDEF)
    image.extra_regions = (RegionEntry(guid, 4 * MIB, MIB, required=False),)
    image.blocks = {}
    path = image.write(tmp_path / "disk.vhdx")
    with path.open("rb+") as file:
        file.truncate(8 * MIB)
    opened(path)
    tables = RegionTable((*builder().region_table().entries, RegionEntry(guid, 4 * MIB, MIB, required=True))).encode()
    patched(path, (REGION_TABLE_OFFSETS[0], tables), (REGION_TABLE_OFFSETS[1], tables))
    with pytest.raises(UnsupportedDiskError, match=str(guid)):
        opened(path)


def test_unknown_metadata_is_kept_where_optional_and_refused_by_name_where_required(tmp_path: Path) -> None:
    image, guid = builder(), UUID(int=0xFEDCBA)
    image.extra_items = ((MetadataEntry(guid, 0, 0, is_user=True), b"payload"), (MetadataEntry(UUID(int=3), 0, 0), b""))
    assert [entry.item_id for entry in opened(image.write(tmp_path / "kept.vhdx")).metadata.unknown] == [
        guid,
        UUID(int=3),
    ]
    image.extra_items = ((MetadataEntry(guid, 0, 0, is_required=True), b"payload"),)
    with pytest.raises(UnsupportedDiskError, match=str(guid)):
        opened(image.write(tmp_path / "refused.vhdx"))


def test_a_table_too_small_for_the_disk_is_refused(tmp_path: Path) -> None:
    image = builder()
    path = image.write(tmp_path / "disk.vhdx")
    place = METADATA_OFFSET + 65536 + 8  # the virtual disk size
    patched(path, (place, UINT64.pack(64 * TIB)))
    with pytest.raises(CorruptDiskError, match="the disk needs"):
        opened(path)
    patched(path, (place, UINT64.pack(64 * TIB + 512)))
    with pytest.raises(CorruptDiskError, match="above 64 TiB"):
        opened(path)


@pytest.mark.parametrize("content", [b"", b"vhdxfil", b"conectix" * 100, bytes(MIB)])
def test_what_is_no_vhdx_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FormatUnknownError):
        opened(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OsError):
        opened(tmp_path / "absent.vhdx")


def dirty() -> ImageBuilder:
    """Return an image whose log maps block 0 to what stands as block 1, and changes the first sector of that."""
    image = builder()
    image.log_guid = LOG
    place = BAT_OFFSET + MIB
    bat = UINT64.pack(encode_bat_entry(PayloadState.FULLY_PRESENT, place)) * 2
    entry = LogEntry(
        4,
        LOG,
        0,
        0,
        place + 2 * MIB,
        (
            Change(BAT_OFFSET, BAT_OFFSET + 4096, bat.ljust(4096, b"\0")),
            Change(place, place + 4096, b"\xaa" * 4096),
            Change(place + 4096, place + 8192, None),
        ),
    )
    image.log = ring(entry)
    return image


def test_a_log_is_replayed_in_memory_and_the_file_left_alone(tmp_path: Path) -> None:
    path = dirty().write(tmp_path / "disk.vhdx")
    before = path.read_bytes()
    wanted = b"\xaa" * 4096 + bytes(4096) + PATTERN[8192:]
    with open_vhdx(path) as disk:
        assert disk.read_at(0, 3 * MIB) == wanted + wanted + bytes(MIB)
        assert disk.image.replay is not None and len(disk.image.replay.entries) == 1
        assert [extents.tolist() for extents in disk.allocated()] == [[[0, 2 * MIB]]]
    assert path.read_bytes() == before


def test_a_dirty_disk_is_not_opened_for_writing_without_recovery(tmp_path: Path) -> None:
    path = dirty().write(tmp_path / "disk.vhdx")
    with pytest.raises(ReadOnlyError, match="log"):
        opened(path, writable=True)


def test_recovery_gets_the_plan_and_its_header_is_used(tmp_path: Path) -> None:
    path = dirty().write(tmp_path / "disk.vhdx")
    seen = []

    def recover(file, choice, plan):  # type: ignore[no-untyped-def]
        seen.append((choice.slot, plan.size_after, [change.start for change in plan.overlay.changes]))
        return replace(choice, header=replace(choice.header, sequence_number=99))

    image = VhdxImage.open(path, writable=True, recover=recover)
    image.close()
    place = BAT_OFFSET + MIB
    assert seen == [(1, place + 2 * MIB, [BAT_OFFSET, place, place + 4096])]
    assert (image.header.sequence_number, image.replay) == (99, None)


def test_a_log_of_another_version_is_refused_only_where_it_must_be_replayed(tmp_path: Path) -> None:
    for image, refused in ((builder(), False), (dirty(), True)):
        path = image.write(tmp_path / "disk.vhdx")
        patched(path, (HEADER_OFFSETS[1], replace(image.header(2), log_version=1).encode()))
        if refused:
            with pytest.raises(UnsupportedDiskError, match="version 1"):
                opened(path)
        else:
            opened(path)


def test_an_absurd_log_is_refused_without_reading_it(tmp_path: Path) -> None:
    image = dirty()
    path = image.write(tmp_path / "disk.vhdx")
    with path.open("rb+") as file:
        file.truncate(5 << 30)
    patched(path, (HEADER_OFFSETS[1], replace(image.header(2), log_length=4095 * MIB, log_offset=8 * MIB).encode()))
    with pytest.raises(UnsupportedDiskError, match="log takes"):
        opened(path)
    assert LOG_OFFSET == MIB


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 3 * MIB + 1), (3 * MIB, 1), (0, -1), (1 << 70, 0)])
def test_reads_outside_the_disk_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    with open_vhdx(builder().write(tmp_path / "disk.vhdx")) as disk, pytest.raises(OutOfRangeError):
        disk.read_at(offset, length)


def test_a_disk_opened_for_reading_refuses_writes(tmp_path: Path) -> None:
    with open_vhdx(builder().write(tmp_path / "disk.vhdx")) as disk:
        assert disk.read_only
        with pytest.raises(ReadOnlyError):
            disk.write_at(0, b"x")
        with pytest.raises(ReadOnlyError):
            disk.trim(0, 512)
        disk.flush()


@pytest.mark.parametrize("state", [4, 5, 7])
def test_states_that_a_dynamic_disk_cannot_have_are_corruption(tmp_path: Path, state: int) -> None:
    path = builder().write(tmp_path / "disk.vhdx")
    patched(path, (BAT_OFFSET + 16, UINT64.pack(4 * MIB | state)))
    with open_vhdx(path) as disk:
        assert disk.read_at(0, 2 * MIB)[MIB:] == PATTERN
        with pytest.raises(CorruptDiskError, match="block 2") as raised:
            disk.read_at(0, 3 * MIB)
        assert raised.value.offset == BAT_OFFSET + 16
        with pytest.raises(CorruptDiskError, match="block 2"):
            list(disk.allocated())


@pytest.mark.parametrize("place_mib", [0, 5, (1 << 44) - 1, 1 << 41])
def test_a_block_outside_the_file_is_corruption(tmp_path: Path, place_mib: int) -> None:
    path = builder().write(tmp_path / "disk.vhdx")
    patched(path, (BAT_OFFSET + 8, UINT64.pack(place_mib << 20 | PayloadState.FULLY_PRESENT)))
    with open_vhdx(path) as disk, pytest.raises(CorruptDiskError):
        disk.read_at(MIB, 512)


def test_threads_read_one_disk_at_once(tmp_path: Path) -> None:
    image = ImageBuilder(64 * MIB)
    for block in range(0, 64, 2):
        image.blocks[block] = Block(PayloadState.FULLY_PRESENT, bytes([block + 1]) * MIB)
    wrong: list[int] = []
    with open_vhdx(image.write(tmp_path / "disk.vhdx")) as disk:

        def read(seed: int) -> None:
            for step in range(200):
                block = (seed * 31 + step * 7) % 63
                data = disk.read_at(block * MIB + MIB - 512, 1024)
                first, second = (block + 1) * (1 - block % 2), (block + 2) * (block % 2)
                if data != bytes([first]) * 512 + bytes([second]) * 512:
                    wrong.append(block)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
