"""VHD files made by hand for tests: differencing children, and a naive reader that shares no code with the product."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

from vhdx.vhd_structures import (
    EPOCH,
    DiskType,
    Footer,
    Header,
    ParentLocator,
    bitmap_size_for,
    geometry_for,
)

SECTOR = 512


def write_child(
    path: Path,
    *,
    size: int,
    parent: UUID,
    sectors: Mapping[int, bytes],
    relative: str | None = None,
    absolute: str | None = None,
    name: str = "",
    block_size: int = 2 << 20,
    identifier: UUID | None = None,
    parent_modified: datetime = EPOCH,
) -> UUID:
    """Write a differencing VHD that holds ``sectors``; return its identifier."""
    identifier = identifier or uuid4()
    places: list[ParentLocator] = []
    stored: list[tuple[int, bytes]] = []
    offset = 1536
    for code, text in ((b"W2ku", absolute), (b"W2ru", relative)):
        if text is not None:
            data = text.encode("utf-16-le")
            places.append(ParentLocator(code, 512, len(data), offset))
            stored.append((offset, data))
            offset += -(-len(data) // SECTOR) * SECTOR
    entries = -(-size // block_size)
    header = Header(
        table_offset=offset,
        entry_count=entries,
        block_size=block_size,
        parent_identifier=parent,
        parent_modified=parent_modified,
        parent_name=name,
        locators=tuple(places),
    )
    footer = Footer(
        kind=DiskType.DIFFERENCING,
        original_size=size,
        current_size=size,
        identifier=identifier,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        data_offset=512,
        geometry=geometry_for(size),
    ).encode()
    table = [0xFFFFFFFF] * entries
    position = offset + -(-entries * 4 // SECTOR) * SECTOR
    bitmap_size = bitmap_size_for(block_size)
    blocks: dict[int, bytearray] = {}
    for sector, data in sectors.items():
        assert len(data) == SECTOR
        block, within = divmod(sector, block_size // SECTOR)
        if block not in blocks:
            blocks[block] = bytearray(bitmap_size + block_size)
            table[block] = position // SECTOR
            position += bitmap_size + block_size
        blocks[block][within // 8] |= 0x80 >> within % 8
        start = bitmap_size + within * SECTOR
        blocks[block][start : start + SECTOR] = data
    with path.open("xb") as file:
        file.write(footer + header.encode())
        for place, data in stored:
            file.seek(place)
            file.write(data)
        file.seek(offset)
        file.write(struct.pack(f">{entries}I", *table))
        for block, content in blocks.items():
            file.seek(table[block] * SECTOR)
            file.write(content)
        file.seek(position)
        file.write(footer)
    return identifier
