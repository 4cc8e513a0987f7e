"""The two copies of a GUID partition table: how each one is, what is odd about them, mending one from the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from conversion.device import BlockDevice, WritableDevice
from conversion.finding import Finding, Severity
from conversion.gpt import PRIMARY_LBA, Gpt, GptHeader, read_copy
from conversion.mbr import overrules_gpt, protective_mbr

_REPAIR: Final = "repair the table in the guest (sgdisk -e, or diskpart's rescan) when convenient"


@dataclass(frozen=True, slots=True)
class GptCopy:
    """One copy as found. ``table`` is None where it is damaged, and ``problem`` then says how."""

    lba: int  # of its header
    table: Gpt | None
    problem: str

    @property
    def good(self) -> bool:
        """Whether its checksums hold."""
        return self.table is not None


@dataclass(frozen=True, slots=True)
class GptCopies:
    """Both copies of a disk's table. At least one of them is good, and ``table`` is the one to go by."""

    primary: GptCopy
    backup: GptCopy
    sectors: int  # of the disk
    asleep: bool  # a plain master boot record is in force above them

    @property
    def table(self) -> Gpt:
        """The primary, or the backup where that is damaged."""
        found = self.primary.table or self.backup.table
        assert found is not None
        return found

    def findings(self) -> tuple[Finding, ...]:
        """Return what an administrator should know of the copies. Nothing of it stands against a conversion."""
        found = [
            Finding(
                f"gpt-{which}-damaged",
                Severity.WARNING,
                "partition table",
                f"The {which} copy of the partition table is damaged; the other one is used.",
                f"sector {copy.lba}: {copy.problem}",
                _REPAIR,
            )
            for which, copy in (("primary", self.primary), ("backup", self.backup))
            if not copy.good
        ]
        return (*found, *self._oddities())

    def _oddities(self) -> list[Finding]:
        found = []
        primary, backup, header = self.primary.table, self.backup.table, self.table.header
        if primary is not None and backup is not None and not _agree(primary, backup):
            evidence = f"sector {self.primary.lba} and sector {self.backup.lba} have different entries or limits"
            message = "The two copies of the partition table differ; the primary one is used."
            found.append(Finding("gpt-copies-differ", Severity.WARNING, "partition table", message, evidence, _REPAIR))
        if self.backup.lba != self.sectors - 1 and self.backup.good:
            evidence = f"the backup is at sector {self.backup.lba}, the disk ends at sector {self.sectors - 1}"
            message = "The disk was grown: the backup of the partition table is not at its end."
            found.append(_note("gpt-backup-not-last", message, evidence))
        if header.first_usable_lba != header.entries_sectors + 2:
            evidence = f"the first usable sector is {header.first_usable_lba}"
            found.append(_note("gpt-first-usable", "Partitions may not begin right behind the table.", evidence))
        if (header.entry_count, header.entry_size) != (128, 128):
            evidence = f"{header.entry_count} entries of {header.entry_size} bytes"
            found.append(_note("gpt-entries", "The partition table has not the usual number of entries.", evidence))
        return found


def read_copies(device: BlockDevice) -> GptCopies | None:
    """Return both copies, looked at under any master boot record, or None where neither is good.

    The backup is looked for where the primary says and then at the end of the disk.
    """
    sectors = device.size // device.sector_size
    if sectors < 3:
        return None
    primary = _copy_at(device, PRIMARY_LBA)
    last = sectors - 1
    backup = _copy_at(device, last if primary.table is None else primary.table.header.other_lba)
    if not backup.good and backup.lba != last:
        at_end = _copy_at(device, last)
        backup = at_end if at_end.good or backup.lba >= sectors else backup
    if primary.table is None and backup.table is None:
        return None
    return GptCopies(primary, backup, sectors, overrules_gpt(device))


def mended(copies: GptCopies) -> tuple[tuple[int, bytes], ...]:
    """Return the (offset, data) that make a damaged copy good again from the other: none where both are good."""
    table = copies.table
    extents: list[tuple[int, bytes]] = []
    if not copies.backup.good:
        header = table.backup_header()
        if header.own_lba >= copies.sectors or header.own_lba <= header.entries_sectors + 1:
            header = table.with_end(copies.sectors).backup_header()
        extents += encode_copy(header, table.entries)
    if not copies.primary.good:
        extents += encode_copy(table.primary_header(), table.entries)
    return tuple(extents)


def encode_copy(header: GptHeader, entries: bytes) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """Return a copy as two (offset, data) of whole sectors: its entries and, to be written after them, its header."""
    size = header.sector_size
    padded = entries.ljust(header.entries_sectors * size, b"\0")
    return (header.entries_lba * size, padded), (header.own_lba * size, header.encode(entries))


def encode_table(table: Gpt) -> tuple[tuple[int, bytes], ...]:
    """Return both copies as (offset, data), the backup first: one of the two is whole after every single write."""
    return (
        *encode_copy(table.backup_header(), table.entries),
        *encode_copy(table.primary_header(), table.entries),
    )


def write_gpt(device: WritableDevice, table: Gpt, *, boot_code: bytes = b"") -> None:
    """Write both copies, then the protective master boot record that puts them in force."""
    for offset, data in encode_table(table):
        device.write_at(offset, data)
    device.flush()
    device.write_at(0, protective_mbr(device.size // device.sector_size, boot_code=boot_code))
    device.flush()


def _copy_at(device: BlockDevice, lba: int) -> GptCopy:
    read = read_copy(device, lba)
    return GptCopy(lba, None, read) if isinstance(read, str) else GptCopy(lba, read, "")


def _agree(one: Gpt, other: Gpt) -> bool:
    first, second = one.header, other.header
    return (
        one.entries == other.entries
        and first.disk_guid == second.disk_guid
        and (first.first_usable_lba, first.last_usable_lba) == (second.first_usable_lba, second.last_usable_lba)
    )


def _note(rule: str, message: str, evidence: str) -> Finding:
    return Finding(rule, Severity.NOTE, "partition table", message, evidence, "")
