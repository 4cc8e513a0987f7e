"""GUID partition tables, read (UEFI specification, chapter 5): the primary one, or the backup where that is damaged."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from conversion.device import BlockDevice

SIGNATURE: Final = b"EFI PART"
LARGEST_TABLE_ENTRIES: Final = 4096
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


@dataclass(frozen=True, slots=True)
class Gpt:
    """A table whose checksums hold; ``from_backup`` where only the copy at the disk's end was good."""

    disk_guid: UUID
    partitions: tuple[GptPartition, ...]
    from_backup: bool


def read_gpt(device: BlockDevice) -> Gpt | None:
    """Return the device's table, or None where it has no valid one."""
    sectors = device.size // device.sector_size
    if sectors < 3:
        return None
    primary = _read_at(device, 1)
    if primary is not None:
        return primary
    backup = _read_at(device, sectors - 1)
    return None if backup is None else Gpt(backup.disk_guid, backup.partitions, True)


def is_uefi_boot_disk(device: BlockDevice) -> bool:
    """Whether the disk has an EFI system partition: its machine is of Generation 2."""
    table = read_gpt(device)
    return table is not None and any(partition.type_guid == EFI_SYSTEM for partition in table.partitions)


def _read_at(device: BlockDevice, lba: int) -> Gpt | None:
    sector = device.read_at(lba * device.sector_size, device.sector_size)
    fields = _HEADER.unpack_from(sector)
    signature, _, header_size, checksum, _, own_lba = fields[:6]
    if signature != SIGNATURE or own_lba != lba or not _HEADER.size <= header_size <= device.sector_size:
        return None
    blanked = sector[:16] + bytes(4) + sector[20:header_size]
    if zlib.crc32(blanked) != checksum:
        return None
    disk_guid, entries_lba, count, entry_size, entries_checksum = fields[9:]
    if count > LARGEST_TABLE_ENTRIES or entry_size < _ENTRY.size or entry_size > 4096:
        return None
    start, length = entries_lba * device.sector_size, count * entry_size
    if start + length > device.size:
        return None
    entries = device.read_at(start, length)
    if zlib.crc32(entries) != entries_checksum:
        return None
    partitions = [_decode_entry(entries, number, entry_size) for number in range(count)]
    return Gpt(UUID(bytes_le=disk_guid), tuple(one for one in partitions if one is not None), False)


def _decode_entry(entries: bytes, number: int, entry_size: int) -> GptPartition | None:
    type_guid, guid, first, last, attributes, name = _ENTRY.unpack_from(entries, number * entry_size)
    if not any(type_guid):
        return None
    text = name.decode("utf-16-le", "replace").split("\0", 1)[0]
    return GptPartition(number + 1, UUID(bytes_le=type_guid), UUID(bytes_le=guid), first, last + 1, attributes, text)
