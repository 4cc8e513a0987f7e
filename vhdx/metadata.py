"""The metadata region: the table of items, checked against its region, and the items that the format defines.

Cites [MS-VHDX] section 2.6. Items that this package does not know are kept where they stand when they are optional,
and refuse the disk, by name, when they are required.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias
from uuid import UUID

from vhdx.bat import Geometry
from vhdx.errors import CorruptDiskError, UnsupportedDiskError
from vhdx.replay import ReadableFile
from vhdx.structures import (
    FILE_PARAMETERS_ITEM,
    LOGICAL_SECTOR_SIZE_ITEM,
    LOGICAL_SECTOR_SIZES,
    MAX_METADATA_ITEM_SIZE,
    MAX_USER_METADATA_ENTRIES,
    MAX_VIRTUAL_SIZE,
    PARENT_LOCATOR_ITEM,
    PHYSICAL_SECTOR_SIZE_ITEM,
    TABLE_SIZE,
    VIRTUAL_DISK_ID_ITEM,
    VIRTUAL_DISK_SIZE_ITEM,
    FileParameters,
    MetadataEntry,
    MetadataTable,
    ParentLocator,
    decode_guid,
    decode_uint32,
    decode_uint64,
    require,
)

ITEM_NAMES = {
    FILE_PARAMETERS_ITEM: "file parameters",
    VIRTUAL_DISK_SIZE_ITEM: "virtual disk size",
    VIRTUAL_DISK_ID_ITEM: "virtual disk id",
    LOGICAL_SECTOR_SIZE_ITEM: "logical sector size",
    PHYSICAL_SECTOR_SIZE_ITEM: "physical sector size",
    PARENT_LOCATOR_ITEM: "parent locator",
}

_ItemReader: TypeAlias = Callable[[UUID], tuple[bytes, int]]  # an item's bytes, and their offset in the file


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the metadata region says of a disk."""

    file_parameters: FileParameters
    virtual_size: int
    disk_id: UUID
    logical_sector_size: int
    physical_sector_size: int
    parent_locator: ParentLocator | None
    table: MetadataTable

    @property
    def geometry(self) -> Geometry:
        """The sizes that the BAT's arithmetic needs."""
        return Geometry(
            virtual_size=self.virtual_size,
            block_size=self.file_parameters.block_size,
            sector_size=self.logical_sector_size,
            has_parent=self.file_parameters.has_parent,
        )

    @property
    def unknown(self) -> tuple[MetadataEntry, ...]:
        """The optional items that this package does not know."""
        return tuple(entry for entry in self.table.entries if entry.is_user or entry.item_id not in ITEM_NAMES)

    def find(self, item_id: UUID) -> MetadataEntry | None:
        """Return the table's entry of a system item, None where it is absent."""
        return next((entry for entry in self.table.entries if entry.item_id == item_id and not entry.is_user), None)


def read_metadata(file: ReadableFile, *, offset: int, length: int) -> Metadata:
    """Read the metadata region of ``length`` bytes at ``offset``.

    Raises CorruptDiskError where it contradicts itself, UnsupportedDiskError where it has an unknown required item.
    """
    table = MetadataTable.decode(file.pread(offset, TABLE_SIZE), offset=offset)
    check_entries(table, region_offset=offset, region_length=length)
    for entry in table.entries:
        if entry.is_required and (entry.is_user or entry.item_id not in ITEM_NAMES):
            raise UnsupportedDiskError(
                f"the metadata item {{{entry.item_id}}} is required to open this disk, and not known", offset=offset
            )
    entries = {entry.item_id: entry for entry in table.entries if not entry.is_user}

    def item(item_id: UUID) -> tuple[bytes, int]:
        entry = entries.get(item_id)
        if entry is None:
            raise CorruptDiskError(f"the metadata has no {ITEM_NAMES[item_id]}", offset=offset)
        place = offset + entry.offset
        data = file.pread(place, entry.length) if entry.length else b""
        require(len(data) == entry.length, f"the file ends inside the {ITEM_NAMES[item_id]}", place)
        return data, place

    data, place = item(FILE_PARAMETERS_ITEM)
    parameters = FileParameters.decode(data, offset=place)
    sector_size = _number(item, LOGICAL_SECTOR_SIZE_ITEM)
    require(sector_size in LOGICAL_SECTOR_SIZES, f"the logical sector size is {sector_size}, not 512 or 4096", offset)
    physical = _number(item, PHYSICAL_SECTOR_SIZE_ITEM)
    require(physical in LOGICAL_SECTOR_SIZES, f"the physical sector size is {physical}, not 512 or 4096", offset)
    data, place = item(VIRTUAL_DISK_SIZE_ITEM)
    size = decode_uint64(data, name="virtual disk size", offset=place)
    require(size <= MAX_VIRTUAL_SIZE, f"the virtual disk size of {size} bytes is above 64 TiB", place)
    require(size % sector_size == 0, f"the virtual disk size of {size} bytes is no multiple of its sectors", place)
    data, place = item(VIRTUAL_DISK_ID_ITEM)
    require(len(data) == 16, f"the virtual disk id takes 16 bytes, not {len(data)}", place)
    disk_id = decode_guid(data)
    locator = None
    if parameters.has_parent:
        data, place = item(PARENT_LOCATOR_ITEM)
        locator = ParentLocator.decode(data, offset=place)
    return Metadata(parameters, size, disk_id, sector_size, physical, locator, table)


def _number(item: _ItemReader, item_id: UUID) -> int:
    data, place = item(item_id)
    return decode_uint32(data, name=ITEM_NAMES[item_id], offset=place)


def check_entries(table: MetadataTable, *, region_offset: int, region_length: int) -> None:
    """Raise CorruptDiskError unless every item lies in the region, apart from the others, and occurs once."""
    seen: set[tuple[UUID, bool]] = set()
    user_count = 0
    ranges: list[tuple[int, int]] = []
    for entry in table.entries:
        name = f"the metadata item {{{entry.item_id}}}"
        require((entry.item_id, entry.is_user) not in seen, f"{name} occurs twice", region_offset)
        seen.add((entry.item_id, entry.is_user))
        user_count += entry.is_user
        if not entry.length:
            require(entry.offset == 0, f"{name} is empty, yet has an offset", region_offset)
            continue
        require(
            entry.length <= MAX_METADATA_ITEM_SIZE, f"{name} takes {entry.length} bytes, above 1 MiB", region_offset
        )
        inside = entry.offset >= TABLE_SIZE and entry.offset + entry.length <= region_length
        require(inside, f"{name} at {entry.offset:#x} of its region does not lie in it", region_offset)
        ranges.append((entry.offset, entry.offset + entry.length))
    require(user_count <= MAX_USER_METADATA_ENTRIES, f"the metadata has {user_count} user items", region_offset)
    ranges.sort()
    for (_, end), (start, _) in pairwise(ranges):
        require(end <= start, f"two metadata items overlap at {start:#x} of their region", region_offset + start)
