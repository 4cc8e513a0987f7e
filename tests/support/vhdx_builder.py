"""A naive VHDX builder for tests: any states, bitmaps, logs and faults, whatever the product's own writer would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from vhdx.bat import Geometry
from vhdx.log import LogEntry
from vhdx.structures import (
    BAT_REGION,
    FILE_PARAMETERS_ITEM,
    HEADER_OFFSETS,
    LOGICAL_SECTOR_SIZE_ITEM,
    METADATA_REGION,
    MIB,
    PARENT_LOCATOR_ITEM,
    PHYSICAL_SECTOR_SIZE_ITEM,
    REGION_TABLE_OFFSETS,
    TABLE_SIZE,
    UINT32,
    UINT64,
    VHDX_PARENT_LOCATOR,
    VIRTUAL_DISK_ID_ITEM,
    VIRTUAL_DISK_SIZE_ITEM,
    ZERO_GUID,
    BitmapState,
    FileIdentifier,
    FileParameters,
    Header,
    MetadataEntry,
    MetadataTable,
    ParentLocator,
    PayloadState,
    RegionEntry,
    RegionTable,
    encode_bat_entry,
    encode_guid,
)

LOG_OFFSET = MIB
METADATA_OFFSET = 2 * MIB
BAT_OFFSET = 3 * MIB
PRESENT_STATES = (PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT)


@dataclass
class Block:
    """A payload block: its state, its bytes where it is present, and the sectors that are its own where partially."""

    state: PayloadState
    data: bytes = field(default=b"", repr=False)
    own_sectors: Sequence[bool] = field(default=(), repr=False)


@dataclass
class ImageBuilder:
    """Describes an image; ``write`` makes the file. Every attribute may be changed before."""

    size: int
    block_size: int = MIB
    sector_size: int = 512
    blocks: dict[int, Block] = field(default_factory=dict)
    parent_values: tuple[tuple[str, str], ...] | None = None
    data_write_guid: UUID = field(default_factory=lambda: UUID(int=0xDA7A))
    log_guid: UUID = ZERO_GUID
    log: bytes = field(default=b"", repr=False)
    extra_items: tuple[tuple[MetadataEntry, bytes], ...] = ()
    extra_regions: tuple[RegionEntry, ...] = ()

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, self.block_size, self.sector_size, self.parent_values is not None)

    @property
    def bat_length(self) -> int:
        return max(MIB, -(-self.geometry.entry_count * 8 // MIB) * MIB)

    def header(self, sequence_number: int) -> Header:
        return Header(
            sequence_number=sequence_number,
            file_write_guid=UUID(int=0xF11E),
            data_write_guid=self.data_write_guid,
            log_guid=self.log_guid,
            log_length=max(MIB, len(self.log)),
            log_offset=LOG_OFFSET,
        )

    def region_table(self) -> RegionTable:
        return RegionTable(
            (
                RegionEntry(BAT_REGION, BAT_OFFSET, self.bat_length, required=True),
                RegionEntry(METADATA_REGION, METADATA_OFFSET, MIB, required=True),
                *self.extra_regions,
            )
        )

    def items(self) -> list[tuple[UUID, bytes]]:
        parameters = FileParameters(self.block_size, has_parent=self.parent_values is not None)
        items = [
            (FILE_PARAMETERS_ITEM, parameters.encode()),
            (VIRTUAL_DISK_SIZE_ITEM, UINT64.pack(self.size)),
            (VIRTUAL_DISK_ID_ITEM, encode_guid(UUID(int=0x1D))),
            (LOGICAL_SECTOR_SIZE_ITEM, UINT32.pack(self.sector_size)),
            (PHYSICAL_SECTOR_SIZE_ITEM, UINT32.pack(4096)),
        ]
        if self.parent_values is not None:
            items.append((PARENT_LOCATOR_ITEM, ParentLocator(VHDX_PARENT_LOCATOR, self.parent_values).encode()))
        return items

    def metadata(self) -> bytes:
        """Return the metadata region's used part: table and items."""
        entries, data, place = [], bytearray(), TABLE_SIZE
        for item_id, content in self.items():
            entries.append(MetadataEntry(item_id, place + len(data), len(content), is_required=True))
            data += content
        for entry, content in self.extra_items:
            offset = place + len(data) if content else 0
            flags = (entry.is_user, entry.is_virtual_disk, entry.is_required)
            entries.append(MetadataEntry(entry.item_id, offset, len(content), *flags))
            data += content
        return MetadataTable(tuple(entries)).encode() + bytes(data)

    def write(self, path: Path) -> Path:
        """Write the file: structures, then bitmaps and blocks in order, all where the BAT says."""
        geometry = self.geometry
        place = BAT_OFFSET + self.bat_length
        entries: dict[int, int] = {}
        chunks = {
            geometry.bitmap_place(number)[0]
            for number, block in self.blocks.items()
            if block.state == PayloadState.PARTIALLY_PRESENT and self.parent_values is not None
        }
        with path.open("wb") as file:
            self._write_front(file)
            bitmaps = {}
            for chunk in sorted(chunks):
                entries[geometry.bitmap_index(chunk)] = encode_bat_entry(BitmapState.PRESENT, place)
                bitmaps[chunk] = place
                place += MIB
            for number, block in sorted(self.blocks.items()):
                offset = 0
                if block.state in PRESENT_STATES:
                    offset, place = place, place + self.block_size
                    file.seek(offset)
                    file.write(block.data)
                if block.own_sectors:
                    chunk, start = geometry.bitmap_place(number)
                    file.seek(bitmaps[chunk] + start)
                    file.write(packed_bits(block.own_sectors))
                entries[geometry.payload_index(number)] = encode_bat_entry(block.state, offset)
            for index, entry in entries.items():
                file.seek(BAT_OFFSET + index * 8)
                file.write(UINT64.pack(entry))
            file.truncate(place)
        return path

    def _write_front(self, file: BinaryIO) -> None:
        for offset, data in (
            (0, FileIdentifier("builder").encode()),
            (HEADER_OFFSETS[0], self.header(1).encode()),
            (HEADER_OFFSETS[1], self.header(2).encode()),
            (REGION_TABLE_OFFSETS[0], self.region_table().encode()),
            (REGION_TABLE_OFFSETS[1], self.region_table().encode()),
            (LOG_OFFSET, self.log),
            (METADATA_OFFSET, self.metadata()),
        ):
            file.seek(offset)
            file.write(data)


def packed_bits(flags: Sequence[bool]) -> bytes:
    """Return flags as a sector bitmap has them, the first in the lowest bit of the first byte."""
    packed = bytearray(-(-len(flags) // 8))
    for index, flag in enumerate(flags):
        if flag:
            packed[index // 8] |= 1 << index % 8
    return bytes(packed)


def ring(*entries: LogEntry, length: int = MIB) -> bytes:
    """Return a log of ``length`` bytes that holds the entries one after the other from its start."""
    return b"".join(entry.encode() for entry in entries).ljust(length, b"\0")


def parent_of(guid: UUID, relative_path: str) -> tuple[tuple[str, str], ...]:
    """Return the locator's values for a parent beside the child."""
    return (("parent_linkage", f"{{{guid}}}"), ("relative_path", relative_path))
