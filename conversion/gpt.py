"""GUID partition tables (UEFI specification, chapter 5): one copy's header and entries, decoded, changed and encoded.

``read_gpt`` takes the primary copy, or the backup where that is damaged. What is odd about either copy, and how to mend
one from the other, is told by conversion.gpt_copies.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from conversion.device import BlockDevice
from conversion.mbr import overrules_gpt

SIGNATURE: Final = b"EFI PART"
LARGEST_TABLE_ENTRIES: Final = 4096
PRIMARY_LBA: Final = 1
EFI_SYSTEM: Final = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

# signature, revision, header size, its CRC, reserved, own LBA, other LBA, first and last usable LBA, disk GUID,
# LBA of the entries, their count, the size of one, the CRC of all
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
# type, unique GUID, first LBA, last LBA (inclusive), attributes, name in UTF-16
_ENTRY = struct.Struct("<16s16sQQQ72s")
assert _HEADER.size == 92
assert _ENTRY.size == 128


@dataclass(frozen=True, slots=True)
class GptPartition:
    """A partition: the sectors [first_lba, end_lba)."""

    number: int
    type_guid: UUID
    guid: UUID
    first_lba: int
    end_lba: int
    attributes: int
    name: str

    @property
    def sectors(self) -> int:
        """Length, sectors."""
        return self.end_lba - self.first_lba


@dataclass(frozen=True, slots=True)
class GptHeader:
    """The fields of one copy's header but its checksums; ``rest`` is what its sector holds after them."""

    revision: int
    header_size: int
    reserved: int
    own_lba: int
    other_lba: int
    first_usable_lba: int
    last_usable_lba: int  # inclusive
    disk_guid: UUID
    entries_lba: int
    entry_count: int
    entry_size: int
    rest: bytes

    @property
    def sector_size(self) -> int:
        """Bytes of the sector that it was read from."""
        return _HEADER.size + len(self.rest)

    @property
    def entries_sectors(self) -> int:
        """How many sectors the entries take."""
        return -(-self.entry_count * self.entry_size // self.sector_size)

    @property
    def entries_end_lba(self) -> int:
        """The first sector behind the entries."""
        return self.entries_lba + self.entries_sectors

    def encode(self, entries: bytes) -> bytes:
        """Return the header's sector, both checksums made anew."""
        raw = _HEADER.pack(
            *(SIGNATURE, self.revision, self.header_size, 0, self.reserved, self.own_lba, self.other_lba),
            *(self.first_usable_lba, self.last_usable_lba, self.disk_guid.bytes_le),
            *(self.entries_lba, self.entry_count, self.entry_size, zlib.crc32(entries)),
        )
        sector = raw + self.rest
        checksum = zlib.crc32(sector[: self.header_size])
        return sector[:16] + struct.pack("<I", checksum) + sector[20:]


@dataclass(frozen=True, slots=True)
class Gpt:
    """A table whose checksums hold; ``from_backup`` where only the copy at the disk's end was good.

    ``header`` is that of the copy that was read, ``entries`` the bytes of all its entries: whatever a name, an
    attribute or a reserved field holds is kept by the bit when an entry is changed.
    """

    disk_guid: UUID
    partitions: tuple[GptPartition, ...]
    from_backup: bool
    header: GptHeader
    entries: bytes

    def partition(self, number: int) -> GptPartition | None:
        """Return a partition by its number."""
        return next((one for one in self.partitions if one.number == number), None)

    def primary_header(self) -> GptHeader:
        """Return the header as the primary copy has it. Behind a lost primary the entries are taken to be at LBA 2."""
        if not self.from_backup:
            return self.header
        return replace(self.header, own_lba=PRIMARY_LBA, other_lba=self.header.own_lba, entries_lba=2)

    def backup_header(self) -> GptHeader:
        """Return the header as the backup has it. Its entries are taken to be right before it, as everyone does it."""
        if self.from_backup:
            return self.header
        own = self.header.other_lba
        return replace(self.header, own_lba=own, other_lba=PRIMARY_LBA, entries_lba=own - self.header.entries_sectors)

    def with_entry(self, partition: GptPartition) -> Gpt:
        """Return the table with an entry added or changed.

        An entry whose type was not empty keeps its name and whatever follows it as they are; a new one is named.
        Raises ValueError for a number that the table has no entry for.
        """
        if not 1 <= partition.number <= self.header.entry_count:
            raise ValueError(f"the table has no entry {partition.number}")
        at = (partition.number - 1) * self.header.entry_size
        before = self.entries[at : at + self.header.entry_size]
        known = any(before[:16])
        name = before[56:128] if known else partition.name.encode("utf-16-le")[:72]
        rest = before[128:] if known else bytes(len(before) - 128)
        entry = _ENTRY.pack(
            *(partition.type_guid.bytes_le, partition.guid.bytes_le, partition.first_lba, partition.end_lba - 1),
            *(partition.attributes, name),
        )
        return self._with_bytes(at, entry + rest)

    def without_entry(self, number: int) -> Gpt:
        """Return the table with an entry emptied. Raises ValueError for a number that the table has no entry for."""
        if not 1 <= number <= self.header.entry_count:
            raise ValueError(f"the table has no entry {number}")
        return self._with_bytes((number - 1) * self.header.entry_size, bytes(self.header.entry_size))

    def with_end(self, sectors: int) -> Gpt:
        """Return the table for a disk of ``sectors`` sectors: the backup at its end, all below it usable."""
        last_usable = sectors - 1 - self.header.entries_sectors - 1
        header = replace(self.primary_header(), other_lba=sectors - 1, last_usable_lba=last_usable)
        return replace(self, from_backup=False, header=header)

    def _with_bytes(self, at: int, entry: bytes) -> Gpt:
        entries = self.entries[:at] + entry + self.entries[at + len(entry) :]
        return replace(self, entries=entries, partitions=decode_entries(entries, self.header.entry_size))


def read_gpt(device: BlockDevice) -> Gpt | None:
    """Return the device's table, or None where it has no valid one, or a plain master boot record is in force."""
    sectors = device.size // device.sector_size
    if sectors < 3 or overrules_gpt(device):
        return None
    primary = read_copy(device, PRIMARY_LBA)
    if isinstance(primary, Gpt):
        return primary
    backup = read_copy(device, sectors - 1)
    return backup if isinstance(backup, Gpt) else None


def is_uefi_boot_disk(device: BlockDevice) -> bool:
    """Whether the disk has an EFI system partition: its machine is of Generation 2."""
    table = read_gpt(device)
    return table is not None and any(partition.type_guid == EFI_SYSTEM for partition in table.partitions)


def read_copy(device: BlockDevice, lba: int) -> Gpt | str:
    """Return the copy whose header lies at ``lba``, or a clause that says why there is no good one."""
    sector_size = device.sector_size
    if not 0 < lba < device.size // sector_size:
        return f"sector {lba} is outside of the disk"
    header = decode_header(device.read_at(lba * sector_size, sector_size), lba)
    if isinstance(header, str):
        return header
    length = header.entry_count * header.entry_size
    if header.entries_lba * sector_size + length > device.size:
        return f"its entries lie at sector {header.entries_lba}, outside of the disk"
    entries = device.read_at(header.entries_lba * sector_size, length)
    return decode_gpt(device.read_at(lba * sector_size, sector_size), entries, lba)


def decode_gpt(sector: bytes, entries: bytes, lba: int) -> Gpt | str:
    """Return the table of a header's sector, read from ``lba``, and its entries, or a clause that says what is wrong.

    Length, signature, place, checksums and bounds are checked; whether partitions overlap is not.
    """
    header = decode_header(sector, lba)
    if isinstance(header, str):
        return header
    if len(entries) != header.entry_count * header.entry_size:
        return "its entries are cut off"
    if zlib.crc32(entries) != _HEADER.unpack_from(sector)[-1]:
        return "the checksum of its entries is wrong"
    partitions = decode_entries(entries, header.entry_size)
    return Gpt(header.disk_guid, partitions, lba != PRIMARY_LBA, header, entries)


def decode_header(sector: bytes, lba: int) -> GptHeader | str:
    """Return the header in a sector, as read from ``lba``, or a clause that says what is wrong with it."""
    if len(sector) < _HEADER.size or sector[:8] != SIGNATURE:
        return "there is no header"
    fields = _HEADER.unpack_from(sector)
    _, revision, header_size, checksum, reserved, own_lba, other_lba, first, last, disk_guid = fields[:10]
    entries_lba, count, entry_size, _ = fields[10:]
    if not _HEADER.size <= header_size <= len(sector):
        return f"its header claims {header_size} bytes"
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:header_size]) != checksum:
        return "the checksum of its header is wrong"
    if own_lba != lba:
        return f"its header belongs to sector {own_lba}"
    if count > LARGEST_TABLE_ENTRIES or not _ENTRY.size <= entry_size <= 4096:
        return f"it claims {count} entries of {entry_size} bytes"
    return GptHeader(
        *(revision, header_size, reserved, own_lba, other_lba, first, last, UUID(bytes_le=disk_guid)),
        *(entries_lba, count, entry_size, sector[_HEADER.size :]),
    )


def decode_entries(entries: bytes, entry_size: int) -> tuple[GptPartition, ...]:
    """Return the partitions of the entries that are in use, by number."""
    found = (_decode_entry(entries, number, entry_size) for number in range(len(entries) // entry_size))
    return tuple(one for one in found if one is not None)


def _decode_entry(entries: bytes, number: int, entry_size: int) -> GptPartition | None:
    type_guid, guid, first, last, attributes, name = _ENTRY.unpack_from(entries, number * entry_size)
    if not any(type_guid):
        return None
    text = name.decode("utf-16-le", "replace").split("\0", 1)[0]
    return GptPartition(number + 1, UUID(bytes_le=type_guid), UUID(bytes_le=guid), first, last + 1, attributes, text)
