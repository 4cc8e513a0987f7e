"""Checking a VHDX file: every structure is looked at, every finding reported, and nothing is ever changed.

A finding that leaves later structures without meaning (no header, say) ends the check there; any other does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from uuid import UUID

from vhdx.bat import Bat
from vhdx.chain import open_vhdx
from vhdx.check_bat import Claims, check_bat
from vhdx.errors import DiskError, OsError, UnsupportedDiskError
from vhdx.image import HeaderChoice, check_regions, read_headers, read_log
from vhdx.metadata import Metadata, read_metadata
from vhdx.osfile import OS_FILES, File, Files
from vhdx.replay import ReadableFile, ReplayedFile
from vhdx.structures import (
    BAT_ENTRY_SIZE,
    BAT_REGION,
    HEADER_OFFSETS,
    HEADER_SECTION_SIZE,
    HEADER_SIZE,
    METADATA_REGION,
    MIB,
    REGION_TABLE_OFFSETS,
    TABLE_SIZE,
    FileIdentifier,
    Header,
    RegionEntry,
    RegionTable,
)

MAX_FINDINGS_PER_RULE = 64
MAX_CLAIMED_MIB = 66 << 20  # 66 TiB of file, a little more than the largest disk: a byte of memory for each MiB


class Severity(StrEnum):
    """What a finding means for whoever owns the disk."""

    ERROR = "error"  # data is lost, or the disk does not open
    WARNING = "warning"  # the disk reads, but a safety net is gone or a rule is broken
    INFO = "info"  # good to know


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found: ``rule`` names the kind for programs, ``offset`` the place in the file."""

    rule: str
    severity: Severity
    message: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found, in the order of the structures in which it looked."""

    path: Path
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.severity == Severity.ERROR)

    @property
    def sound(self) -> bool:
        """Whether nothing is an error."""
        return not self.errors


class Findings:
    """Collects findings; of one rule no more than ``MAX_FINDINGS_PER_RULE``, the rest are counted."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._counts: dict[tuple[str, Severity], int] = {}

    def add(self, rule: str, severity: Severity, message: str, offset: int | None = None) -> None:
        """Report one finding."""
        key = (rule, severity)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] <= MAX_FINDINGS_PER_RULE:
            self._found.append(Finding(rule, severity, message, offset))

    def add_many(
        self, rule: str, messages: Iterable[tuple[str, int]], count: int, severity: Severity = Severity.ERROR
    ) -> None:
        """Report ``count`` findings of a rule, of which ``messages`` gives at least the first few with offsets."""
        key = (rule, severity)
        room = max(0, MAX_FINDINGS_PER_RULE - self._counts.get(key, 0))
        for (message, offset), _ in zip(messages, range(room), strict=False):
            self._found.append(Finding(rule, severity, message, offset))
        self._counts[key] = self._counts.get(key, 0) + count

    def add_error(self, rule: str, error: DiskError, severity: Severity = Severity.ERROR) -> None:
        """Report what a decoder raised."""
        self.add(rule, severity, error.message, error.offset)

    def finish(self) -> tuple[Finding, ...]:
        """Return everything found, with a line for what was counted only."""
        more = [
            Finding(rule, severity, f"{count - MAX_FINDINGS_PER_RULE} more findings of this rule")
            for (rule, severity), count in self._counts.items()
            if count > MAX_FINDINGS_PER_RULE
        ]
        return (*self._found, *more)


def check_disk(path: Path | str, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES) -> CheckReport:
    """Check a VHDX file and the link to its parent; parents themselves are not checked.

    Raises OsError only, where the file cannot be opened or read: all else is a finding.
    """
    path = Path(path)
    findings = Findings()
    file = files.open(path)
    try:
        geometry_known = _check_file(file, findings)
    finally:
        file.close()
    if geometry_known is not None and geometry_known.file_parameters.has_parent:
        _check_parent(path, allowed_folders, files, findings)
    return CheckReport(path, findings.finish())


def _check_file(file: File, findings: Findings) -> Metadata | None:
    """Check everything in the file; return its metadata where they hold."""
    size = file.size()
    if size % MIB:
        findings.add("file-size", Severity.WARNING, f"the file's size of {size} bytes is no multiple of 1 MiB", size)
    if not file.pread(0, 8).startswith(FileIdentifier.SIGNATURE):
        findings.add("file-identifier", Severity.ERROR, "the file does not begin with 'vhdxfile'", 0)
    choice = _check_headers(file, findings)
    if choice is None:
        return None
    view = _check_log(file, choice, findings)
    table = _check_region_tables(view, choice.header, findings)
    if table is None:
        return None
    regions = {entry.guid: entry for entry in table.entries}
    region = regions[METADATA_REGION]
    metadata: Metadata | None = None
    try:
        metadata = read_metadata(view, offset=region.offset, length=region.length)
    except OsError:
        raise
    except DiskError as error:
        findings.add_error("metadata", error)
        return None
    for entry in metadata.unknown:
        owner = "user" if entry.is_user else "system"
        message = f"the optional {owner} metadata item {{{entry.item_id}}} is not known, and kept"
        findings.add("metadata-unknown", Severity.INFO, message, region.offset + entry.offset)
    _check_table(view, metadata, regions, choice.header, findings)
    return metadata


def _check_headers(file: File, findings: Findings) -> HeaderChoice | None:
    for number, offset in enumerate(HEADER_OFFSETS, 1):
        try:
            Header.decode(file.pread(offset, HEADER_SIZE), offset=offset)
        except OsError:
            raise
        except DiskError as error:
            findings.add(
                f"header-{number}", Severity.WARNING, f"{error.message}; the other header is used", error.offset
            )
    try:
        return read_headers(file)
    except OsError:
        raise
    except DiskError as error:
        findings.add_error("headers", error)
        return None


def _check_log(file: File, choice: HeaderChoice, findings: Findings) -> ReadableFile:
    """Check the log, and return the file as it reads after replay, or as it is where it cannot be replayed."""
    offset = choice.header.log_offset
    try:
        plan = read_log(file, choice)
    except OsError:
        raise
    except DiskError as error:
        findings.add_error("log", error)
        return file
    if plan is None:
        return file
    if plan.torn:
        message = f"{plan.torn} entries of the log were cut off by a crash; they changed nothing"
        findings.add("log-torn", Severity.INFO, message, offset)
    if not plan.entries:
        findings.add("log-empty", Severity.INFO, "the log is in use and has nothing to replay", offset)
        return file
    message = f"the log has {len(plan.entries)} entries to replay; checked as it reads after that"
    findings.add("log-dirty", Severity.WARNING, message, offset)
    return ReplayedFile(file, plan.overlay, plan.size_after)


def _check_region_tables(view: ReadableFile, header: Header, findings: Findings) -> RegionTable | None:
    tables: list[RegionTable] = []
    faults: list[tuple[str, DiskError]] = []
    for number, offset in enumerate(REGION_TABLE_OFFSETS, 1):
        try:
            table = RegionTable.decode(view.pread(offset, TABLE_SIZE), offset=offset)
            check_regions(table, header=header, file_size=view.size(), offset=offset)
            tables.append(table)
        except OsError:
            raise
        except DiskError as error:
            faults.append((f"region-table-{number}", error))
    for rule, fault in faults:
        fatal = not tables or isinstance(fault, UnsupportedDiskError)
        findings.add_error(rule, fault, Severity.ERROR if fatal else Severity.WARNING)
    if not tables:
        return None
    if len(tables) == 2 and tables[0] != tables[1]:
        message = "the region tables differ; the first is used"
        findings.add("region-tables", Severity.WARNING, message, REGION_TABLE_OFFSETS[1])
    for entry in tables[0].entries:
        if entry.guid not in (BAT_REGION, METADATA_REGION):
            message = f"the optional region {{{entry.guid}}} is not known, and kept"
            findings.add("region-unknown", Severity.INFO, message, entry.offset)
    return tables[0]


def _check_table(
    view: ReadableFile, metadata: Metadata, regions: dict[UUID, RegionEntry], header: Header, findings: Findings
) -> None:
    """Check the BAT, and that nothing in the file takes the place of something else."""
    region, geometry = regions[BAT_REGION], metadata.geometry
    needed = geometry.entry_count * BAT_ENTRY_SIZE
    if needed > region.length:
        message = f"the block allocation table takes {region.length} bytes, the disk needs {needed}"
        findings.add("bat-size", Severity.ERROR, message, region.offset)
        return
    claims = Claims(min(-(-view.size() // MIB), MAX_CLAIMED_MIB))
    claims.claim("the headers", 0, HEADER_SECTION_SIZE)
    claims.claim("the log", header.log_offset, header.log_offset + header.log_length)
    for entry in regions.values():
        name = {BAT_REGION: "the block allocation table", METADATA_REGION: "the metadata"}.get(
            entry.guid, f"the region {{{entry.guid}}}"
        )
        claims.claim(name, entry.offset, entry.offset + entry.length)
    try:
        warn = partial(findings.add_many, severity=Severity.WARNING)
        check_bat(Bat(view, geometry, region.offset), view, claims, findings.add_many, warn)
        _check_tail(view, region.offset + needed, region.offset + region.length, findings)
    except OsError:
        raise
    except DiskError as error:
        findings.add_error("bat", error)
        return
    unused = claims.unclaimed() * MIB
    if unused:
        findings.add(
            "unused-space", Severity.INFO, f"{unused} bytes of the file belong to nothing; compacting frees them"
        )


def _check_tail(view: ReadableFile, start: int, end: int, findings: Findings) -> None:
    """Report entries of the BAT region past the disk's last."""
    for low, high in view.data_extents(start, end):
        for offset in range(max(low, start), high, MIB):
            data = view.pread(offset, min(MIB, high - offset))
            if data.strip(b"\0"):
                place = offset + len(data) - len(data.lstrip(b"\0"))
                message = "the block allocation table has entries past the end of the disk"
                findings.add("bat-tail", Severity.WARNING, message, place)
                return


def _check_parent(path: Path, allowed_folders: Sequence[Path | str], files: Files, findings: Findings) -> None:
    try:
        with open_vhdx(path, allowed_folders=allowed_folders, files=files) as disk:
            for link in disk.chain:
                missing = link.parent_error
                if missing is not None:
                    findings.add("parent-missing", Severity.WARNING, f"{link.path.name}: {missing.message}")
    except OsError:
        raise
    except DiskError as error:
        findings.add_error("parent", error)
