"""Inspecting a disk: its partition table, the system on it, and whether it can start as the other generation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal
from uuid import UUID

from conversion.device import BlockDevice, Slice
from conversion.errors import DamagedError
from conversion.filesystems.filesystem import FileSystem
from conversion.filesystems.probe import open_filesystem
from conversion.finding import Finding, Severity
from conversion.gpt_copies import GptCopies, read_copies
from conversion.layout_planner import plan_layout
from conversion.linux.inspection import inspect_linux
from conversion.linux.system import LinuxSystem, Partition
from conversion.mbr import Mbr, read_mbr
from conversion.partition_types import System
from conversion.windows.inspect import WindowsSystem, inspect_windows, is_windows
from conversion.windows.volume import ESP
from conversion.windows.volume import Volume as WindowsVolume

NO_GUID = UUID(int=0)
LIKELY_CORE_SECTORS: Final = 640  # a core with every module for Linux; planning builds it and knows


@dataclass(frozen=True, slots=True)
class TablePartition:
    """A partition by whichever table is in force. GUIDs are None under an MBR."""

    number: int
    device: Slice
    type_guid: UUID | None
    guid: UUID | None
    name: str
    type_name: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is on a disk. ``generation`` is the one that it starts as; None where it has no partition table."""

    size: int
    sector_size: int
    generation: Literal[1, 2] | None
    copies: GptCopies | None
    mbr: Mbr | None
    partitions: tuple[TablePartition, ...]
    system: System | None
    linux: LinuxSystem | None
    windows: WindowsSystem | None
    findings: tuple[Finding, ...]

    @property
    def is_convertible(self) -> bool:
        """Whether no rule refuses a conversion to Generation 1."""
        return self.system is not None and not any(one.severity is Severity.REFUSAL for one in self.findings)

    @property
    def esp(self) -> TablePartition | None:
        """The EFI system partition of a disk of Generation 2; of several, the one with Windows' boot store."""
        if self.windows is not None and self.windows.esp is not None:
            number = self.windows.esp.number
            return next((one for one in self.partitions if one.number == number and one.type_guid == ESP), None)
        return next((one for one in self.partitions if one.type_guid == ESP), None)

    @property
    def system_name(self) -> str:
        """The system as a person knows it."""
        if self.windows is not None:
            return str(self.windows.version)
        if self.linux is not None and self.linux.distribution is not None:
            return self.linux.distribution.pretty_name or self.linux.distribution.id
        return self.system or "no system that is known"

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "size_bytes": self.size,
            "sector_bytes": self.sector_size,
            "generation": self.generation,
            "system": self.system,
            "system_name": self.system_name,
            "convertible": self.is_convertible,
            "partitions": [
                {
                    "number": one.number,
                    "offset_bytes": one.device.start,
                    "size_bytes": one.device.size,
                    "type": one.type_name,
                    "name": one.name,
                }
                for one in self.partitions
            ],
            "findings": [one.document() for one in self.findings],
        }


def inspect(device: BlockDevice, *, discard_hibernation: bool = False) -> Inspection:
    """Look at the disk, reading some MiB at most. What is strange is a finding, never an error.

    Errors of the device itself pass through.
    """
    copies = read_copies(device)
    findings: list[Finding] = []
    mbr: Mbr | None = None
    try:
        mbr = read_mbr(device)
    except DamagedError as error:
        findings.append(
            Finding("mbr-damaged", Severity.WARNING, "master boot record", f"{error.message}.", "sector 0", "")
        )
    sleeping = mbr is not None and not mbr.is_protective and bool(mbr.holding_data)
    generation: Literal[1, 2] | None = 1 if sleeping else 2 if copies is not None else None
    if generation is None:
        message = "The disk has no partition table that can be read."
        remedy = "convert the disk that the system starts from"
        findings.append(Finding("no-table", Severity.REFUSAL, "disk", message, "sectors 0 and 1", remedy))
        return Inspection(device.size, device.sector_size, None, None, mbr, (), None, None, None, tuple(findings))
    partitions = _by_mbr(device, mbr) if sleeping and mbr is not None else _by_gpt(device, copies)
    if copies is not None and not sleeping:
        findings += copies.findings()
    disk_guid = copies.table.disk_guid if copies is not None else NO_GUID
    linux = inspect_linux([Partition(one.number, one.device, one.type_guid, one.guid, one.name) for one in partitions])
    volumes = windows_volumes(partitions)
    windows: WindowsSystem | None = None
    if is_windows(volumes) and (linux is None or linux.root is None):
        windows = inspect_windows(volumes, disk_guid=disk_guid, discard_hibernation=discard_hibernation)
        linux = None
    system: System | None = "windows" if windows is not None else "linux" if linux is not None else None
    found = windows.findings if windows is not None else linux.findings if linux is not None else ()
    if system is None:
        message = "No Windows and no Linux was found on the disk."
        remedy = "convert the disk that the system starts from; disks of data need no conversion"
        findings.append(Finding("no-system", Severity.REFUSAL, "disk", message, "its file systems", remedy))
    result = Inspection(
        device.size,
        device.sector_size,
        generation,
        copies,
        mbr,
        partitions,
        system,
        linux,
        windows,
        (*findings, *found),
    )
    return replace(result, findings=(*result.findings, *_of_table(result)))


def _of_table(found: Inspection) -> list[Finding]:
    """Return what the partition table has against a conversion, as far as the file systems have not said it."""
    if found.generation == 1:
        message = "The disk starts from a BIOS already."
        remedy = "to go back to Generation 2: godwit convert --to gen2, with the manifest of its conversion"
        evidence = "a master boot record is in force"
        return [Finding("is-generation-1", Severity.REFUSAL, "disk", message, evidence, remedy)]
    known = {one.rule for one in found.findings}
    if found.esp is None:
        if "no-esp" in known:
            return []
        message = "The disk has no EFI system partition: no machine starts from it."
        remedy = "convert the disk that the system starts from"
        return [Finding("no-esp", Severity.REFUSAL, "disk", message, "the partition table", remedy)]
    assert found.copies is not None
    planned = plan_layout(
        found.copies.table,
        sectors=found.copies.sectors,
        sector_size=found.sector_size,
        system=found.system or "linux",
        boot_partition=found.esp.number,
        core_sectors=LIKELY_CORE_SECTORS,
    )
    return [one for one in planned.findings if one.severity is Severity.REFUSAL and one.rule not in known]


def windows_volumes(partitions: tuple[TablePartition, ...]) -> list[WindowsVolume]:
    """Return the partitions as the Windows part of a conversion sees them, their file systems opened."""
    return [
        WindowsVolume(
            one.number,
            one.device,
            one.type_guid or NO_GUID,
            one.guid or NO_GUID,
            opened(one.device),
        )
        for one in partitions
    ]


def opened(device: Slice) -> FileSystem | None:
    """Return the file system on a partition, None where there is none or it is damaged."""
    try:
        return open_filesystem(device)
    except DamagedError:
        return None


def _by_gpt(device: BlockDevice, copies: GptCopies | None) -> tuple[TablePartition, ...]:
    assert copies is not None
    size = device.sector_size
    return tuple(
        TablePartition(
            one.number,
            Slice(device, one.first_lba * size, one.sectors * size),
            one.type_guid,
            one.guid,
            one.name,
            str(one.type_guid),
        )
        for one in copies.table.partitions
        if one.first_lba < one.end_lba <= copies.sectors
    )


def _by_mbr(device: BlockDevice, mbr: Mbr) -> tuple[TablePartition, ...]:
    size = device.sector_size
    return tuple(
        TablePartition(
            one.number, Slice(device, one.first_lba * size, one.sectors * size), None, None, "", f"{one.type:02x}"
        )
        for one in mbr.holding_data
        if one.first_lba < one.end_lba <= device.size // size
    )
