"""The on-disk structures of VHDX, each with its encoder beside its decoder [MS-VHDX section 2].

Values in, values out: nothing here reads a file. A decoder takes the bytes and the file offset that they came from,
and raises ``CorruptDiskError`` with that offset; the path is added by whoever opened the file (``errors``' fields).
All integers are little-endian; GUIDs are stored in the mixed-endian order that Windows uses.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

import google_crc32c

from vhdx.errors import CorruptDiskError

KIB: Final = 1024
MIB: Final = 1024 * KIB
TIB: Final = 1024 * 1024 * MIB

FILE_IDENTIFIER_OFFSET: Final = 0
HEADER_OFFSETS: Final = (64 * KIB, 128 * KIB)
REGION_TABLE_OFFSETS: Final = (192 * KIB, 256 * KIB)
HEADER_SIZE: Final = 4 * KIB
TABLE_SIZE: Final = 64 * KIB  # a region table, and a metadata table
HEADER_SECTION_SIZE: Final = MIB  # nothing else may lie in the first MiB

MAX_TABLE_ENTRIES: Final = 2047
MAX_USER_METADATA_ENTRIES: Final = 1024
MAX_METADATA_ITEM_SIZE: Final = MIB
MIN_BLOCK_SIZE: Final = MIB
MAX_BLOCK_SIZE: Final = 256 * MIB
MAX_VIRTUAL_SIZE: Final = 64 * TIB
LOGICAL_SECTOR_SIZES: Final = (512, 4096)
SECTOR_BITMAP_BLOCK_SIZE: Final = MIB
SECTORS_PER_BITMAP: Final = SECTOR_BITMAP_BLOCK_SIZE * 8  # a chunk: the sectors that one sector bitmap block describes

FORMAT_VERSION: Final = 1
LOG_VERSION: Final = 0

ZERO_GUID: Final = UUID(int=0)
BAT_REGION: Final = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION: Final = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS_ITEM: Final = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE_ITEM: Final = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID_ITEM: Final = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE_ITEM: Final = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE_ITEM: Final = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR_ITEM: Final = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
VHDX_PARENT_LOCATOR: Final = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")

_FILE_IDENTIFIER = struct.Struct("<8s512s")
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_TABLE_HEADER = struct.Struct("<4sIII")
_REGION_ENTRY = struct.Struct("<16sQII")
_METADATA_HEADER = struct.Struct("<8sHH20s")
_METADATA_ENTRY = struct.Struct("<16sIIII")
_FILE_PARAMETERS = struct.Struct("<II")
_LOCATOR_HEADER = struct.Struct("<16sHH")
_LOCATOR_ENTRY = struct.Struct("<IIHH")
UINT32: Final = struct.Struct("<I")
UINT64: Final = struct.Struct("<Q")
for _structure, _size in (
    (_FILE_IDENTIFIER, 520),
    (_HEADER, 80),
    (_TABLE_HEADER, 16),
    (_REGION_ENTRY, 32),
    (_METADATA_HEADER, 32),
    (_METADATA_ENTRY, 32),
    (_FILE_PARAMETERS, 8),
    (_LOCATOR_HEADER, 20),
    (_LOCATOR_ENTRY, 12),
):
    assert _structure.size == _size, (_structure.format, _size)

_CHECKSUM_FIELD = slice(4, 8)  # where every checksummed structure keeps its CRC-32C, itself counted as zeros


class PayloadState(IntEnum):
    """State of a payload block, bits 0 to 2 of its BAT entry; 4 and 5 are reserved."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


class BitmapState(IntEnum):
    """State of a sector bitmap block, bits 0 to 2 of its BAT entry; the others are reserved."""

    NOT_PRESENT = 0
    PRESENT = 6


BAT_ENTRY_SIZE: Final = 8
BAT_STATE_MASK: Final = 0x7
BAT_OFFSET_SHIFT: Final = 20  # bits 20 to 63 are the file offset in MiB
BAT_RESERVED_MASK: Final = 0xFFFF8  # bits 3 to 19


def encode_bat_entry(state: int, offset: int = 0) -> int:
    """Return the BAT entry for a block in ``state`` at ``offset`` of the file (a multiple of 1 MiB, 0 for none)."""
    if offset % MIB or not 0 <= offset < 1 << 64:
        raise ValueError(f"a block cannot lie at offset {offset:#x}: not a multiple of 1 MiB")
    return offset | state


def decode_bat_entry(entry: int) -> tuple[int, int]:
    """Return the state and the file offset, bytes, of a BAT entry. Reserved bits are ignored."""
    return entry & BAT_STATE_MASK, entry >> BAT_OFFSET_SHIFT << BAT_OFFSET_SHIFT


def encode_guid(guid: UUID) -> bytes:
    """Return the 16 bytes of ``guid`` as Windows stores them: three little-endian fields, then eight bytes."""
    return guid.bytes_le


def decode_guid(data: bytes) -> UUID:
    """Return the GUID stored in 16 bytes in the Windows order."""
    return UUID(bytes_le=data)


def checksum_of(data: bytes) -> int:
    """Return the CRC-32C of ``data`` with its checksum field (bytes 4 to 8) counted as zeros."""
    crc = google_crc32c.extend(google_crc32c.value(data[:4]), b"\0\0\0\0")
    return int(google_crc32c.extend(crc, data[_CHECKSUM_FIELD.stop :]))


def sealed(data: bytearray) -> bytes:
    """Return ``data`` with its checksum field filled in."""
    data[_CHECKSUM_FIELD] = UINT32.pack(checksum_of(bytes(data)))
    return bytes(data)


def require(condition: bool, message: str, offset: int) -> None:
    """Raise CorruptDiskError naming ``offset`` unless ``condition`` holds."""
    if not condition:
        raise CorruptDiskError(message, offset=offset)


def _require_checked(data: bytes, *, length: int, magic: bytes, name: str, offset: int) -> None:
    require(len(data) == length, f"the {name} is cut short: {len(data)} of {length} bytes", offset)
    require(data[: len(magic)] == magic, f"the {name} does not begin with {magic.decode()!r}", offset)
    stored = UINT32.unpack(data[_CHECKSUM_FIELD])[0]
    computed = checksum_of(data)
    require(stored == computed, f"the {name} has checksum {stored:08x}, its content {computed:08x}", offset)


@dataclass(frozen=True, slots=True)
class FileIdentifier:
    """The first 64 KiB: a signature, and the name of the program that created the file (diagnostic only)."""

    SIGNATURE = b"vhdxfile"
    SIZE = TABLE_SIZE

    creator: str = ""

    def encode(self) -> bytes:
        """Return the 64 KiB; a creator longer than 256 UTF-16 units is cut."""
        creator = self.creator.encode("utf-16-le")[:512]
        return _FILE_IDENTIFIER.pack(self.SIGNATURE, creator).ljust(self.SIZE, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> FileIdentifier:
        """Decode from the first 520 bytes of the file or more. Raises CorruptDiskError."""
        require(data[:8] == cls.SIGNATURE, "the file does not begin with 'vhdxfile'", FILE_IDENTIFIER_OFFSET)
        # The creator is informative: a cut or garbled one is no reason to refuse the disk.
        creator = data[8:520].decode("utf-16-le", errors="replace").split("\0", 1)[0]
        return cls(creator)


@dataclass(frozen=True, slots=True)
class Header:
    """One of the two headers, 4 KiB at 64 and 128 KiB; the valid one with the higher sequence number is in force.

    An update writes the header that is not in force, with the next sequence number, and flushes: a torn write spoils
    its checksum and leaves the other in force.
    """

    SIGNATURE = b"head"
    SIZE = HEADER_SIZE

    sequence_number: int
    file_write_guid: UUID  # new before the first write to the file after an open for writing
    data_write_guid: UUID  # new before the first write a guest can see; a child's parent_linkage names it
    log_guid: UUID  # zero: the log is empty
    log_length: int
    log_offset: int
    log_version: int = LOG_VERSION
    version: int = FORMAT_VERSION

    def encode(self) -> bytes:
        """Return the 4 KiB with the checksum filled in."""
        fields = _HEADER.pack(
            self.SIGNATURE,
            0,
            self.sequence_number,
            encode_guid(self.file_write_guid),
            encode_guid(self.data_write_guid),
            encode_guid(self.log_guid),
            self.log_version,
            self.version,
            self.log_length,
            self.log_offset,
        )
        return sealed(bytearray(fields.ljust(self.SIZE, b"\0")))

    @classmethod
    def decode(cls, data: bytes, *, offset: int) -> Header:
        """Decode a header whose signature and checksum hold.

        Versions and the log's place are not judged here: only the header in force must satisfy them, and a header
        of an unknown version is no reason to fall back to an older one. Raises CorruptDiskError.
        """
        _require_checked(data, length=cls.SIZE, magic=cls.SIGNATURE, name="header", offset=offset)
        _, _, sequence, file_write, data_write, log, log_version, version, log_length, log_offset = _HEADER.unpack(
            data[: _HEADER.size]
        )
        return cls(
            sequence_number=sequence,
            file_write_guid=decode_guid(file_write),
            data_write_guid=decode_guid(data_write),
            log_guid=decode_guid(log),
            log_version=log_version,
            version=version,
            log_length=log_length,
            log_offset=log_offset,
        )


@dataclass(frozen=True, slots=True)
class RegionEntry:
    """Where a region lies in the file: offset and length are multiples of 1 MiB, outside the first."""

    guid: UUID
    offset: int
    length: int
    required: bool


@dataclass(frozen=True, slots=True)
class RegionTable:
    """One of two equal tables, 64 KiB at 192 and 256 KiB, which say where the BAT and the metadata lie."""

    SIGNATURE = b"regi"
    SIZE = TABLE_SIZE

    entries: tuple[RegionEntry, ...]

    def encode(self) -> bytes:
        """Return the 64 KiB with the checksum filled in."""
        parts = [_TABLE_HEADER.pack(self.SIGNATURE, 0, len(self.entries), 0)]
        parts += [
            _REGION_ENTRY.pack(encode_guid(entry.guid), entry.offset, entry.length, entry.required)
            for entry in self.entries
        ]
        return sealed(bytearray(b"".join(parts).ljust(self.SIZE, b"\0")))

    @classmethod
    def decode(cls, data: bytes, *, offset: int) -> RegionTable:
        """Decode a table whose signature, checksum and count hold. Raises CorruptDiskError."""
        _require_checked(data, length=cls.SIZE, magic=cls.SIGNATURE, name="region table", offset=offset)
        count = _TABLE_HEADER.unpack(data[: _TABLE_HEADER.size])[2]
        require(count <= MAX_TABLE_ENTRIES, f"the region table claims {count} entries, at most 2047 fit", offset)
        entries = []
        for position in range(_TABLE_HEADER.size, _TABLE_HEADER.size + count * _REGION_ENTRY.size, _REGION_ENTRY.size):
            guid, region_offset, length, flags = _REGION_ENTRY.unpack_from(data, position)
            entries.append(RegionEntry(decode_guid(guid), region_offset, length, bool(flags & 1)))
        return cls(tuple(entries))


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """Where a metadata item lies, from the start of the metadata region (0 where it is empty), and whose it is."""

    item_id: UUID
    offset: int
    length: int
    is_user: bool = False
    is_virtual_disk: bool = False  # describes the virtual disk, so is copied with it; else the file
    is_required: bool = False  # whoever does not know the item must not open the file


@dataclass(frozen=True, slots=True)
class MetadataTable:
    """The first 64 KiB of the metadata region: which items there are. It has no checksum; the log guards it."""

    SIGNATURE = b"metadata"
    SIZE = TABLE_SIZE

    entries: tuple[MetadataEntry, ...]

    def encode(self) -> bytes:
        """Return the 64 KiB."""
        parts = [_METADATA_HEADER.pack(self.SIGNATURE, 0, len(self.entries), b"")]
        for entry in self.entries:
            flags = entry.is_user | entry.is_virtual_disk << 1 | entry.is_required << 2
            parts.append(_METADATA_ENTRY.pack(encode_guid(entry.item_id), entry.offset, entry.length, flags, 0))
        return b"".join(parts).ljust(self.SIZE, b"\0")

    @classmethod
    def decode(cls, data: bytes, *, offset: int) -> MetadataTable:
        """Decode a table whose signature and count hold. Raises CorruptDiskError."""
        require(len(data) == cls.SIZE, f"the metadata table is cut short: {len(data)} of {cls.SIZE} bytes", offset)
        signature, _, count, _ = _METADATA_HEADER.unpack(data[: _METADATA_HEADER.size])
        require(signature == cls.SIGNATURE, "the metadata table does not begin with 'metadata'", offset)
        require(count <= MAX_TABLE_ENTRIES, f"the metadata table claims {count} entries, at most 2047 fit", offset)
        entries = []
        first = _METADATA_HEADER.size
        for position in range(first, first + count * _METADATA_ENTRY.size, _METADATA_ENTRY.size):
            item, item_offset, length, flags, _ = _METADATA_ENTRY.unpack_from(data, position)
            entries.append(
                MetadataEntry(decode_guid(item), item_offset, length, bool(flags & 1), bool(flags & 2), bool(flags & 4))
            )
        return cls(tuple(entries))


@dataclass(frozen=True, slots=True)
class FileParameters:
    """The metadata item that gives the payload block size and the kind of the disk."""

    SIZE = _FILE_PARAMETERS.size

    block_size: int
    leave_blocks_allocated: bool = False  # a fixed disk: trimmed blocks keep their place
    has_parent: bool = False

    def encode(self) -> bytes:
        """Return the 8 bytes."""
        return _FILE_PARAMETERS.pack(self.block_size, self.leave_blocks_allocated | self.has_parent << 1)

    @classmethod
    def decode(cls, data: bytes, *, offset: int) -> FileParameters:
        """Decode; the block size must be a power of two from 1 to 256 MiB. Raises CorruptDiskError."""
        require(len(data) == cls.SIZE, f"the file parameters take 8 bytes, not {len(data)}", offset)
        block_size, flags = _FILE_PARAMETERS.unpack(data)
        good = MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE and block_size & (block_size - 1) == 0
        require(good, f"the block size of {block_size} bytes is no power of two from 1 to 256 MiB", offset)
        return cls(block_size, bool(flags & 1), bool(flags & 2))


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """The metadata item that names the parent of a differencing disk: a type, and UTF-16 keys with values."""

    locator_type: UUID
    values: tuple[tuple[str, str], ...]

    def get(self, key: str) -> str | None:
        """Return the value of ``key``, None where it is absent."""
        return dict(self.values).get(key)

    def encode(self) -> bytes:
        """Return the item: header, table of entries, then the strings. Raises ValueError if one is too long."""
        table_end = _LOCATOR_HEADER.size + len(self.values) * _LOCATOR_ENTRY.size
        entries: list[bytes] = []
        strings = bytearray()
        for key, value in self.values:
            raw_key, raw_value = key.encode("utf-16-le"), value.encode("utf-16-le")
            if not (0 < len(raw_key) <= 0xFFFF and 0 < len(raw_value) <= 0xFFFF):
                raise ValueError(f"parent locator entry {key!r} is empty or longer than 32767 characters")
            place = table_end + len(strings)
            entries.append(_LOCATOR_ENTRY.pack(place, place + len(raw_key), len(raw_key), len(raw_value)))
            strings += raw_key + raw_value
        header = _LOCATOR_HEADER.pack(encode_guid(self.locator_type), 0, len(self.values))
        return header + b"".join(entries) + bytes(strings)

    @classmethod
    def decode(cls, data: bytes, *, offset: int) -> ParentLocator:
        """Decode; every string must lie in the item, be UTF-16, and every key occur once. Raises CorruptDiskError."""
        require(len(data) >= _LOCATOR_HEADER.size, f"the parent locator is cut short: {len(data)} bytes", offset)
        locator_type, _, count = _LOCATOR_HEADER.unpack(data[: _LOCATOR_HEADER.size])
        table_end = _LOCATOR_HEADER.size + count * _LOCATOR_ENTRY.size
        require(table_end <= len(data), f"the parent locator claims {count} entries in {len(data)} bytes", offset)
        values: dict[str, str] = {}
        # Strings may overlap in a hostile locator, so their sum is bounded too: no item decodes to more than itself.
        budget = len(data)
        for position in range(_LOCATOR_HEADER.size, table_end, _LOCATOR_ENTRY.size):
            key_at, value_at, key_length, value_length = _LOCATOR_ENTRY.unpack_from(data, position)
            budget -= key_length + value_length
            require(budget >= 0, "the entries of the parent locator overlap", offset + position)
            key = _utf16(data, key_at, key_length, offset)
            require(key not in values, f"the parent locator has the key {key!r} twice", offset + position)
            values[key] = _utf16(data, value_at, value_length, offset)
        return cls(decode_guid(locator_type), tuple(values.items()))


def _utf16(data: bytes, start: int, length: int, offset: int) -> str:
    """Return the UTF-16 string of ``length`` bytes at ``start`` of the item at ``offset``."""
    inside = length > 0 and start + length <= len(data)
    require(inside, f"the parent locator points at bytes {start} to {start + length} of {len(data)}", offset)
    try:
        return data[start : start + length].decode("utf-16-le")
    except UnicodeDecodeError:
        raise CorruptDiskError("a string of the parent locator is not UTF-16", offset=offset + start) from None


def decode_uint32(data: bytes, *, name: str, offset: int) -> int:
    """Decode a metadata item that is one 32-bit number. Raises CorruptDiskError."""
    require(len(data) == 4, f"the {name} takes 4 bytes, not {len(data)}", offset)
    return int(UINT32.unpack(data)[0])


def decode_uint64(data: bytes, *, name: str, offset: int) -> int:
    """Decode a metadata item that is one 64-bit number. Raises CorruptDiskError."""
    require(len(data) == 8, f"the {name} takes 8 bytes, not {len(data)}", offset)
    return int(UINT64.unpack(data)[0])
