"""The on-disk structures of VHD, encoders beside decoders [Virtual Hard Disk Image Format Specification, version 1.0].

    fixed          payload | footer
    dynamic        footer copy | header | BAT | block, block, … | footer
    differencing   the same, and the parent's locators between header and BAT

Values in, values out: nothing here reads a file. Every integer is big-endian. A decoder raises ``CorruptDiskError``
with the file offset; the path is added by whoever opened the file. A block of a dynamic or differencing disk is a
bitmap, one bit a sector, most significant bit first, padded to whole sectors, and then its payload.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Final
from uuid import UUID

import numpy as np

from vhdx.errors import CorruptDiskError, UnsupportedDiskError

SECTOR_SIZE: Final = 512
FOOTER_SIZE: Final = 512
OLD_FOOTER_SIZE: Final = 511  # what products before Virtual PC 2004 wrote
HEADER_SIZE: Final = 1024
LOCATOR_COUNT: Final = 8
MIB: Final = 1 << 20

FOOTER_COOKIE: Final = b"conectix"
HEADER_COOKIE: Final = b"cxsparse"
FORMAT_VERSION: Final = 0x00010000
FEATURES_RESERVED: Final = 0x00000002  # "must always be set"
NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF
UNUSED_ENTRY: Final = 0xFFFFFFFF

MAX_VIRTUAL_SIZE: Final = 2040 << 30  # BAT entries are 32-bit sector numbers; Windows stops here
MIN_BLOCK_SIZE: Final = 4096
MAX_BLOCK_SIZE: Final = 256 * MIB
DEFAULT_BLOCK_SIZE: Final = 2 * MIB
MAX_BAT_ENTRIES: Final = 1 << 23  # 32 MiB of table: 2040 GiB in blocks of 256 KiB

NO_PARENT: Final = UUID(int=0)
EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)

# QEMU takes the size of an image from its geometry, which rounds down, unless it knows the creator to do otherwise;
# Windows is the one creator that every reader knows.
CREATOR_APPLICATION: Final = b"win "
CREATOR_VERSION: Final = 0x000A0000
CREATOR_SYSTEM: Final = b"Wi2k"

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_HEADER = struct.Struct(">8sQQIIII16sI4s512s192s256s")
_LOCATOR = struct.Struct(">4sIIIQ")
_CHECKSUM = struct.Struct(">I")
for _structure, _size in ((_FOOTER, FOOTER_SIZE), (_HEADER, HEADER_SIZE), (_LOCATOR, 24)):
    assert _structure.size == _size, (_structure.format, _size)

_FOOTER_CHECKSUM = slice(64, 68)
_HEADER_CHECKSUM = slice(36, 40)


class DiskType(IntEnum):
    """The kinds of VHD; the other values are reserved."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cylinders, heads and sectors per track, as an old BIOS is told."""

    cylinders: int
    heads: int
    sectors_per_track: int

    @property
    def size(self) -> int:
        """What the geometry reaches, bytes: up to a cylinder less than the disk."""
        return self.cylinders * self.heads * self.sectors_per_track * SECTOR_SIZE


@dataclass(frozen=True, slots=True)
class Footer:
    """The footer: what kind of disk this is, how large, and who it is. Sizes and offsets are bytes."""

    kind: DiskType
    original_size: int
    current_size: int
    identifier: UUID
    created: datetime
    data_offset: int = NO_OFFSET  # where the dynamic header lies
    geometry: Geometry = Geometry(0, 0, 0)
    creator_application: bytes = CREATOR_APPLICATION
    creator_version: int = CREATOR_VERSION
    creator_system: bytes = CREATOR_SYSTEM
    features: int = FEATURES_RESERVED
    saved_state: int = 0

    def encode(self) -> bytes:
        """Return the 512 bytes, checksum included."""
        data = bytearray(
            _FOOTER.pack(
                FOOTER_COOKIE,
                self.features,
                FORMAT_VERSION,
                self.data_offset,
                encode_time(self.created),
                self.creator_application,
                self.creator_version,
                self.creator_system,
                self.original_size,
                self.current_size,
                self.geometry.cylinders,
                self.geometry.heads,
                self.geometry.sectors_per_track,
                self.kind,
                0,
                self.identifier.bytes,
                self.saved_state,
                bytes(427),
            )
        )
        return _sealed(data, _FOOTER_CHECKSUM)


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """Where one form of the parent's path is stored. ``space`` is bytes or sectors: writers disagree."""

    code: bytes
    space: int
    length: int  # bytes
    offset: int  # bytes, in the file


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a dynamic or differencing disk: the BAT's place and the parent's identity."""

    table_offset: int
    entry_count: int
    block_size: int
    parent_identifier: UUID = NO_PARENT
    parent_modified: datetime = EPOCH
    parent_name: str = ""
    locators: tuple[ParentLocator, ...] = ()

    @property
    def bitmap_size(self) -> int:
        """Bytes of the bitmap before each block's payload, padded to whole sectors."""
        return bitmap_size_for(self.block_size)

    def encode(self) -> bytes:
        """Return the 1024 bytes, checksum included."""
        locators = b"".join(
            _LOCATOR.pack(locator.code, locator.space, locator.length, 0, locator.offset) for locator in self.locators
        )
        data = bytearray(
            _HEADER.pack(
                HEADER_COOKIE,
                NO_OFFSET,
                self.table_offset,
                FORMAT_VERSION,
                self.entry_count,
                self.block_size,
                0,
                self.parent_identifier.bytes,
                encode_time(self.parent_modified),
                bytes(4),
                self.parent_name.encode("utf-16-be")[:512],
                locators,
                bytes(256),
            )
        )
        return _sealed(data, _HEADER_CHECKSUM)


def checksum_of(data: bytes | bytearray, field: slice) -> int:
    """Return the one's complement of the sum of all bytes of ``data``, those of ``field`` counted as zeros."""
    total = int(np.frombuffer(data, dtype=np.uint8).sum(dtype=np.uint64)) - sum(data[field])
    return ~total & 0xFFFFFFFF


def _sealed(data: bytearray, field: slice) -> bytes:
    data[field] = _CHECKSUM.pack(checksum_of(data, field))
    return bytes(data)


def _require(condition: bool, message: str, offset: int) -> None:
    if not condition:
        raise CorruptDiskError(message, offset=offset)


def _require_checksum(data: bytes, field: slice, name: str, offset: int) -> None:
    stored = _CHECKSUM.unpack(data[field])[0]
    computed = checksum_of(data, field)
    _require(stored == computed, f"the {name}'s checksum is {stored:#010x}, its content's {computed:#010x}", offset)


def decode_footer(data: bytes, offset: int) -> Footer:
    """Decode a footer read at ``offset``: 512 bytes, or the 511 of old products.

    Raises CorruptDiskError, and UnsupportedDiskError for a version or kind that nobody has specified.
    """
    if len(data) == OLD_FOOTER_SIZE:
        data += b"\0"
    _require(len(data) == FOOTER_SIZE, f"the footer is cut short: {len(data)} of {FOOTER_SIZE} bytes", offset)
    _require(data[:8] == FOOTER_COOKIE, "the footer does not begin with 'conectix'", offset)
    _require_checksum(data, _FOOTER_CHECKSUM, "footer", offset)
    fields = _FOOTER.unpack(data)
    (_, features, version, data_offset, created, application, application_version, system) = fields[:8]
    (original_size, current_size, cylinders, heads, sectors, kind, _, identifier, saved_state, _) = fields[8:]
    if version >> 16 != FORMAT_VERSION >> 16:
        raise UnsupportedDiskError(f"VHD version {version >> 16}.{version & 0xFFFF} is not known", offset=offset)
    if kind not in tuple(DiskType):
        raise UnsupportedDiskError(f"VHD disk type {kind} is reserved", offset=offset)
    _require(0 < current_size <= MAX_VIRTUAL_SIZE, f"a disk of {current_size} bytes is not a VHD", offset)
    _require(current_size % SECTOR_SIZE == 0, f"the size, {current_size}, is no multiple of a sector", offset)
    return Footer(
        kind=DiskType(kind),
        original_size=original_size,
        current_size=current_size,
        identifier=UUID(bytes=identifier),
        created=decode_time(created),
        data_offset=data_offset,
        geometry=Geometry(cylinders, heads, sectors),
        creator_application=application,
        creator_version=application_version,
        creator_system=system,
        features=features,
        saved_state=saved_state,
    )


def decode_header(data: bytes, offset: int) -> Header:
    """Decode a dynamic header read at ``offset``. Raises CorruptDiskError and UnsupportedDiskError."""
    _require(len(data) == HEADER_SIZE, f"the dynamic header is cut short: {len(data)} of {HEADER_SIZE} bytes", offset)
    _require(data[:8] == HEADER_COOKIE, "the dynamic header does not begin with 'cxsparse'", offset)
    _require_checksum(data, _HEADER_CHECKSUM, "dynamic header", offset)
    fields = _HEADER.unpack(data)
    (_, _, table_offset, version, entry_count, block_size, _, identifier, modified, _, name, locators, _) = fields
    if version >> 16 != FORMAT_VERSION >> 16:
        raise UnsupportedDiskError(f"dynamic header version {version >> 16}.{version & 0xFFFF} is not known")
    _require(
        MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE and block_size & (block_size - 1) == 0,
        f"a block size of {block_size} bytes is not a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}",
        offset,
    )
    return Header(
        table_offset=table_offset,
        entry_count=entry_count,
        block_size=block_size,
        parent_identifier=UUID(bytes=identifier),
        parent_modified=decode_time(modified),
        parent_name=name.decode("utf-16-be", "replace").partition("\0")[0],
        locators=tuple(_decode_locators(locators)),
    )


def _decode_locators(data: bytes) -> list[ParentLocator]:
    unpacked = (_LOCATOR.unpack_from(data, position * _LOCATOR.size) for position in range(LOCATOR_COUNT))
    return [
        ParentLocator(code, space, length, offset) for code, space, length, _, offset in unpacked if code != bytes(4)
    ]


def encode_time(moment: datetime) -> int:
    """Return the seconds since 2000 that the format stores, within its 32 bits."""
    return min(max(int((moment - EPOCH).total_seconds()), 0), 0xFFFFFFFF)


def decode_time(seconds: int) -> datetime:
    """Return the moment of a stored time."""
    return EPOCH + timedelta(seconds=seconds)


def bitmap_size_for(block_size: int) -> int:
    """Return the bytes of a block's bitmap, padded to whole sectors."""
    bits = block_size // SECTOR_SIZE
    return -(-bits // (8 * SECTOR_SIZE)) * SECTOR_SIZE


def geometry_for(size: int) -> Geometry:
    """Return the geometry of a disk of ``size`` bytes, as the specification's appendix computes it."""
    sectors = min(size // SECTOR_SIZE, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return Geometry(sectors // 255 // 16, 16, 255)
    sectors_per_track = 17
    tracks = sectors // sectors_per_track
    heads = max(-(-tracks // 1024), 4)
    if tracks >= heads * 1024 or heads > 16:
        sectors_per_track, heads = 31, 16
        tracks = sectors // sectors_per_track
    if tracks >= heads * 1024:
        sectors_per_track, heads = 63, 16
        tracks = sectors // sectors_per_track
    return Geometry(tracks // heads, heads, sectors_per_track)


def resized(footer: Footer, size: int) -> Footer:
    """Return the footer of the same disk at another size."""
    return replace(footer, current_size=size, geometry=geometry_for(size))
