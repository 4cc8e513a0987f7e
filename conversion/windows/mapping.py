"""Where partitions stand under the GPT and under the MBR: what Windows' own records are rewritten by."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final

GPT_RECORD: Final = b"DMIO:ID:"  # and the partition's GUID
MBR_RECORD: Final = struct.Struct("<IQ")
assert MBR_RECORD.size == 12


@dataclass(frozen=True, slots=True)
class PartitionPlace:
    """A partition that both tables name. ``has_no_letter``: Windows gives it none under GPT (ESP, recovery)."""

    partition_guid: uuid.UUID
    offset_bytes: int  # of its first byte on the disk
    has_no_letter: bool = False


@dataclass(frozen=True, slots=True)
class DiskMapping:
    """One disk under both tables."""

    disk_guid: uuid.UUID
    signature: int  # of the MBR, 32 bits, not zero
    partitions: tuple[PartitionPlace, ...]

    def place(self, disk_guid: uuid.UUID, partition_guid: uuid.UUID) -> PartitionPlace | None:
        """Return a partition's place, None where it is on another disk or has none under the MBR."""
        return self.by_guid(partition_guid) if disk_guid == self.disk_guid else None

    def by_guid(self, partition_guid: uuid.UUID) -> PartitionPlace | None:
        """Return a partition's place by its GUID."""
        return next((each for each in self.partitions if each.partition_guid == partition_guid), None)

    def by_offset(self, offset_bytes: int) -> PartitionPlace | None:
        """Return the partition that begins at ``offset_bytes``."""
        return next((each for each in self.partitions if each.offset_bytes == offset_bytes), None)

    def to_mbr(self, record: bytes) -> bytes | None:
        """Return the mount manager's record for MBR of the partition of a GPT record, None where it is no such."""
        if len(record) != len(GPT_RECORD) + 16 or not record.startswith(GPT_RECORD):
            return None
        place = self.by_guid(uuid.UUID(bytes_le=record[len(GPT_RECORD) :]))
        return self.mbr_record(place) if place else None

    def to_gpt(self, record: bytes) -> bytes | None:
        """Return the mount manager's record for GPT of the partition of an MBR record, None where it is no such."""
        if len(record) != MBR_RECORD.size:
            return None
        signature, offset_bytes = MBR_RECORD.unpack(record)
        place = self.by_offset(offset_bytes) if signature == self.signature else None
        return GPT_RECORD + place.partition_guid.bytes_le if place else None

    def mbr_record(self, place: PartitionPlace) -> bytes:
        """Return the mount manager's record of a partition under the MBR."""
        return MBR_RECORD.pack(self.signature, place.offset_bytes)
