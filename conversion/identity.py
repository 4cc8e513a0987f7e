"""How guests name a disk and its partitions: by GUID under a GPT, by signature and offset under an MBR.

Boot configuration, drive letters (MountedDevices) and PARTUUID= all use these names, so they are rewritten both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class PartitionIdentity:
    """One partition under both tables. ``mbr_number`` is Linux's; the start is bytes from the disk's."""

    gpt_number: int
    guid: UUID
    mbr_number: int
    offset_bytes: int
    sectors: int


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """A disk under both tables, with the partitions that both have."""

    disk_guid: UUID
    signature: int
    partitions: tuple[PartitionIdentity, ...]

    def by_guid(self, guid: UUID) -> PartitionIdentity | None:
        """Return the partition with that GUID."""
        return next((one for one in self.partitions if one.guid == guid), None)

    def by_offset(self, offset_bytes: int) -> PartitionIdentity | None:
        """Return the partition that begins there."""
        return next((one for one in self.partitions if one.offset_bytes == offset_bytes), None)

    def by_gpt_number(self, number: int) -> PartitionIdentity | None:
        """Return the partition that has that entry in the GPT."""
        return next((one for one in self.partitions if one.gpt_number == number), None)

    def by_mbr_number(self, number: int) -> PartitionIdentity | None:
        """Return the partition that Linux counts so under the MBR."""
        return next((one for one in self.partitions if one.mbr_number == number), None)

    def gpt_partuuid(self, partition: PartitionIdentity) -> str:
        """Return the PARTUUID that Linux gives it under the GPT."""
        return str(partition.guid)

    def mbr_partuuid(self, partition: PartitionIdentity) -> str:
        """Return the PARTUUID that Linux gives it under the MBR."""
        return f"{self.signature:08x}-{partition.mbr_number:02x}"
