"""A disk's layout under a master boot record: every entry, boot record and place, and writing them in a safe order.

The GUID partition table stays where it is, asleep under the new record. Nothing is in force before the first sector
is: boot records of logical partitions go to sectors that nothing uses, then that one sector is written, alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID

from conversion.device import WritableDevice
from conversion.identity import DiskIdentity, PartitionIdentity
from conversion.mbr import EXTENDED, EXTENDED_LBA, MbrEntry, encode_record

SECTOR_BYTES: Final = 512  # a master boot record knows no other


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """A GPT partition as the MBR has it: the sectors [first_lba, end_lba). ``number`` is Linux's, 5 and up are logical.

    ``ebr_lba`` is where a logical partition's boot record lies, None for a primary one.
    """

    gpt_number: int
    guid: UUID
    number: int
    type: int
    first_lba: int
    end_lba: int
    active: bool
    ebr_lba: int | None

    @property
    def kind(self) -> Literal["primary", "logical"]:
        """Whether it stands in the master boot record itself."""
        return "primary" if self.ebr_lba is None else "logical"

    @property
    def sectors(self) -> int:
        """Length, sectors."""
        return self.end_lba - self.first_lba


@dataclass(frozen=True, slots=True)
class UnmappedPartition:
    """A GPT partition that the MBR does not have; its sectors are kept but where a layout names a place in them."""

    gpt_number: int
    guid: UUID
    first_lba: int
    end_lba: int
    why: str  # a clause


@dataclass(frozen=True, slots=True)
class ExtendedPartition:
    """The container of the logical partitions: the sectors [first_lba, end_lba), the first one the first EBR."""

    number: int
    first_lba: int
    end_lba: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What a conversion makes of a GUID partition table. ``entries`` are in the order of their numbers."""

    disk_guid: UUID
    signature: int
    entries: tuple[LayoutEntry, ...]
    unmapped: tuple[UnmappedPartition, ...]
    extended: ExtendedPartition | None
    boot_partition: int  # the GPT number of the one that the BIOS chain starts from
    core_lba: int
    core_sectors: int

    def entry(self, gpt_number: int) -> LayoutEntry | None:
        """Return the entry of a GPT partition, None where it is not mapped."""
        return next((one for one in self.entries if one.gpt_number == gpt_number), None)

    def identity(self) -> DiskIdentity:
        """Return how guests name the disk and its mapped partitions, before and after."""
        partitions = tuple(
            PartitionIdentity(one.gpt_number, one.guid, one.number, one.first_lba * SECTOR_BYTES, one.sectors)
            for one in self.entries
        )
        return DiskIdentity(self.disk_guid, self.signature, partitions)

    def master_record(self, boot_code: bytes) -> bytes:
        """Return the first sector. Raises ValueError for more than 440 bytes of code."""
        slots = [MbrEntry(0, 0, 0)] * 4
        for one in self.entries:
            if one.ebr_lba is None:
                slots[one.number - 1] = MbrEntry(one.type, one.first_lba, one.sectors, one.active)
        if self.extended is not None:
            length = self.extended.end_lba - self.extended.first_lba
            slots[self.extended.number - 1] = MbrEntry(EXTENDED_LBA, self.extended.first_lba, length)
        return encode_record(slots, boot_code=boot_code, signature=self.signature)

    def extended_records(self) -> tuple[tuple[int, bytes], ...]:
        """Return the boot records of the logical partitions as (offset in bytes, 512 bytes), in the chain's order."""
        if self.extended is None:
            return ()
        logicals = [(one, one.ebr_lba) for one in self.entries if one.ebr_lba is not None]
        records = []
        for index, (one, ebr_lba) in enumerate(logicals):
            table = [MbrEntry(one.type, one.first_lba - ebr_lba, one.sectors)]
            if index + 1 < len(logicals):
                following, following_ebr = logicals[index + 1]
                length = following.end_lba - following_ebr
                table.append(MbrEntry(EXTENDED, following_ebr - self.extended.first_lba, length))
            records.append((ebr_lba * SECTOR_BYTES, encode_record(table, base_lba=ebr_lba)))
        return tuple(records)

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        extended = self.extended
        return {
            "disk_guid": str(self.disk_guid),
            "signature": f"{self.signature:08x}",
            "entries": [
                {
                    "gpt_number": one.gpt_number,
                    "guid": str(one.guid),
                    "number": one.number,
                    "kind": one.kind,
                    "type": f"{one.type:02x}",
                    "first_lba": one.first_lba,
                    "end_lba": one.end_lba,
                    "active": one.active,
                    "ebr_lba": one.ebr_lba,
                }
                for one in self.entries
            ],
            "unmapped": [
                {
                    "gpt_number": one.gpt_number,
                    "guid": str(one.guid),
                    "first_lba": one.first_lba,
                    "end_lba": one.end_lba,
                    "why": one.why,
                }
                for one in self.unmapped
            ],
            "extended": None
            if extended is None
            else {"number": extended.number, "first_lba": extended.first_lba, "end_lba": extended.end_lba},
            "boot_partition": self.boot_partition,
            "core_lba": self.core_lba,
            "core_sectors": self.core_sectors,
        }


def write_places(device: WritableDevice, layout: Layout, *, core: bytes = b"") -> None:
    """Write the boot core and the boot records of logical partitions, and flush. The disk boots as it did before.

    Raises ValueError where the core is larger than its place.
    """
    if len(core) > layout.core_sectors * SECTOR_BYTES:
        raise ValueError(f"a core of {len(core)} bytes is larger than its place of {layout.core_sectors} sectors")
    if core:
        device.write_at(layout.core_lba * SECTOR_BYTES, core)
    for offset, record in layout.extended_records():
        device.write_at(offset, record)
    device.flush()


def write_switch(device: WritableDevice, layout: Layout, *, boot_code: bytes) -> None:
    """Write the first sector, alone, and flush: from here on the disk is one with a master boot record."""
    device.write_at(0, layout.master_record(boot_code))
    device.flush()
