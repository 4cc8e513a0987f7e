"""One VHDX file opened: its headers, log, regions, metadata and BAT, whatever its kind and without its parent.

Opening goes from the fixed places outwards: file identifier, the header in force, the log (replayed in memory for a
reader, by the writer's hook for a writer), then, through what the log changed, region table, metadata and BAT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

from vhdx.bat import Bat, Geometry
from vhdx.errors import CorruptDiskError, DiskError, FormatUnknownError, ReadOnlyError, UnsupportedDiskError
from vhdx.log import ReplayPlan, check_log_bounds, plan_replay
from vhdx.metadata import Metadata, read_metadata
from vhdx.osfile import OS_FILES, File, Files
from vhdx.replay import ReadableFile, ReplayedFile
from vhdx.structures import (
    BAT_ENTRY_SIZE,
    BAT_REGION,
    FORMAT_VERSION,
    HEADER_OFFSETS,
    HEADER_SECTION_SIZE,
    HEADER_SIZE,
    LOG_VERSION,
    METADATA_REGION,
    MIB,
    REGION_TABLE_OFFSETS,
    TABLE_SIZE,
    ZERO_GUID,
    BitmapState,
    FileIdentifier,
    Header,
    RegionEntry,
    RegionTable,
    decode_bat_entry,
    require,
)

MAX_BLOCK_OFFSET = 1 << 62  # far past any file; beyond it offsets would not fit the system's own type


@dataclass(frozen=True, slots=True)
class HeaderChoice:
    """The header in force, the place it stands in (0 or 1), and what is wrong with either place, if anything."""

    header: Header
    slot: int
    faults: tuple[DiskError | None, DiskError | None]


Recover: TypeAlias = Callable[[File, HeaderChoice, ReplayPlan], HeaderChoice]
"""A writer's hook: make the plan's changes in the file, durably, empty the log, and return the header then in force."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to a DiskError raised inside that names none."""
    try:
        yield
    except DiskError as error:
        if error.path is None:
            error.path = str(path)
        raise


def read_headers(file: ReadableFile) -> HeaderChoice:
    """Return the header in force: of those whose signature and checksum hold, the one with the higher number.

    Raises CorruptDiskError where neither holds, or both hold with one number and different content;
    UnsupportedDiskError where the one in force is of another version.
    """
    headers: list[Header | None] = []
    faults: list[DiskError | None] = []
    for offset in HEADER_OFFSETS:
        try:
            headers.append(Header.decode(file.pread(offset, HEADER_SIZE), offset=offset))
            faults.append(None)
        except CorruptDiskError as error:
            headers.append(None)
            faults.append(error)
    first, second = headers
    if first is None and second is None:
        raise CorruptDiskError(f"neither header is valid: {faults[0]}; {faults[1]}", offset=HEADER_OFFSETS[0])
    if first is not None and second is not None and first.sequence_number == second.sequence_number:
        require(first == second, "both headers are valid and claim the same sequence number", HEADER_OFFSETS[0])
    slot = 0 if second is None or (first is not None and first.sequence_number >= second.sequence_number) else 1
    header = headers[slot]
    assert header is not None
    offset = HEADER_OFFSETS[slot]
    if header.version != FORMAT_VERSION:
        raise UnsupportedDiskError(f"the format's version is {header.version}, not 1", offset=offset)
    return HeaderChoice(header, slot, (faults[0], faults[1]))


def read_log(file: ReadableFile, choice: HeaderChoice) -> ReplayPlan | None:
    """Return what the log wants replayed, None where the header says that it is empty.

    Raises CorruptDiskError and UnsupportedDiskError as ``plan_replay`` does, and for a log out of place.
    """
    header, offset = choice.header, HEADER_OFFSETS[choice.slot]
    placed = header.log_offset >= HEADER_SECTION_SIZE and header.log_offset % MIB == 0
    require(placed and header.log_length % MIB == 0, "the log is not aligned to 1 MiB after the first", offset)
    end = header.log_offset + header.log_length
    size = file.size()
    require(end <= size, f"the log ends at {end:#x}, past the end of the file ({size:#x})", offset)
    if header.log_guid == ZERO_GUID:
        return None
    if header.log_version != LOG_VERSION:
        raise UnsupportedDiskError(f"the log needs replay and is of version {header.log_version}, not 0", offset=offset)
    require(header.log_length > 0, "the log needs replay and has no length", offset)
    check_log_bounds(length=header.log_length, offset=offset)
    log = file.pread(header.log_offset, header.log_length)
    require(len(log) == header.log_length, "the file ends inside the log", header.log_offset)
    return plan_replay(log, log_guid=header.log_guid, file_size=size, log_offset=header.log_offset)


def read_regions(file: ReadableFile, header: Header) -> tuple[RegionTable, tuple[DiskError | None, DiskError | None]]:
    """Return the first region table that holds, and what is wrong with either, if anything.

    Raises UnsupportedDiskError for an unknown required region, CorruptDiskError where neither table holds.
    """
    chosen: RegionTable | None = None
    faults: list[DiskError | None] = []
    for offset in REGION_TABLE_OFFSETS:
        try:
            table = RegionTable.decode(file.pread(offset, TABLE_SIZE), offset=offset)
            check_regions(table, header=header, file_size=file.size(), offset=offset)
            chosen = chosen or table
            faults.append(None)
        except CorruptDiskError as error:
            faults.append(error)
    if chosen is None:
        raise CorruptDiskError(f"neither region table holds: {faults[0]}; {faults[1]}", offset=REGION_TABLE_OFFSETS[0])
    return chosen, (faults[0], faults[1])


def check_regions(table: RegionTable, *, header: Header, file_size: int, offset: int) -> None:
    """Raise unless BAT and metadata exist and all regions lie in the file, apart from each other and the log."""
    for entry in table.entries:
        if entry.required and entry.guid not in (BAT_REGION, METADATA_REGION):
            raise UnsupportedDiskError(
                f"the region {{{entry.guid}}} is required to open this disk, and not known", offset=offset
            )
    guids = [entry.guid for entry in table.entries]
    require(len(set(guids)) == len(guids), "the region table has a region twice", offset)
    for guid, name in ((BAT_REGION, "block allocation table"), (METADATA_REGION, "metadata")):
        require(guid in guids, f"the region table has no {name}", offset)
    used = [(header.log_offset, header.log_offset + header.log_length, "the log")] if header.log_length else []
    for entry in table.entries:
        name, end = f"the region {{{entry.guid}}}", entry.offset + entry.length
        aligned = entry.offset % MIB == 0 and entry.length % MIB == 0 and entry.length > 0
        require(aligned and entry.offset >= HEADER_SECTION_SIZE, f"{name} is not aligned to 1 MiB", offset)
        require(end <= file_size, f"{name} ends at {end:#x}, past the end of the file ({file_size:#x})", offset)
        used.append((entry.offset, end, name))
    used.sort()
    for (_, end, lower), (start, _, upper) in pairwise(used):
        require(end <= start, f"{lower} and {upper} overlap at {start:#x}", offset)


class VhdxImage:
    """An open VHDX file and the state that reading and writing share.

    ``file`` is the file itself; ``view`` is what to read: the same, or the file through the changes of its log where
    it was opened for reading and the log was not empty. A writer that updates a header sets ``header`` and ``slot``.
    """

    def __init__(
        self, file: File, view: ReadableFile, *, choice: HeaderChoice, replay: ReplayPlan | None, creator: str
    ) -> None:
        self.file = file
        self.view = view
        self.header = choice.header
        self.slot = choice.slot
        self.header_faults = choice.faults
        self.replay = replay  # what was replayed in memory; None where the log was empty, or was replayed to disk
        self.creator = creator
        self.regions, self.region_faults = read_regions(view, choice.header)
        self.bat_region = self._region(BAT_REGION)
        self.metadata_region = self._region(METADATA_REGION)
        self.metadata: Metadata = read_metadata(
            view, offset=self.metadata_region.offset, length=self.metadata_region.length
        )
        self.geometry: Geometry = self.metadata.geometry
        needed = self.geometry.entry_count * BAT_ENTRY_SIZE
        require(
            needed <= self.bat_region.length,
            f"the block allocation table takes {self.bat_region.length} bytes, the disk needs {needed}",
            self.bat_region.offset,
        )
        self.bat = Bat(view, self.geometry, self.bat_region.offset)

    @classmethod
    def open(
        cls, path: Path | str, *, writable: bool = False, files: Files = OS_FILES, recover: Recover | None = None
    ) -> VhdxImage:
        """Open a file. A writable one whose log is not empty goes through ``recover`` first.

        Raises FormatUnknownError for a file that is no VHDX, CorruptDiskError, UnsupportedDiskError, OsError, and
        ReadOnlyError where a log wants replay for writing and there is no ``recover``.
        """
        file = files.open(Path(path), writable=writable)
        try:
            with naming(file.path):
                return cls.load(file, writable=writable, recover=recover)
        except BaseException:
            file.close()
            raise

    @classmethod
    def load(cls, file: File, *, writable: bool = False, recover: Recover | None = None) -> VhdxImage:
        """Open what ``file`` holds, as ``open`` does. The image closes the file, but not if this raises."""
        start = file.pread(0, 520)
        if not start.startswith(FileIdentifier.SIGNATURE):
            raise FormatUnknownError("the file is no VHDX: it does not begin with 'vhdxfile'", offset=0)
        creator = FileIdentifier.decode(start).creator
        choice = read_headers(file)
        plan = read_log(file, choice)
        view: ReadableFile = file
        if plan is not None and writable:
            if recover is None:
                raise ReadOnlyError("the log needs replay before the disk can be written")
            choice, plan = recover(file, choice, plan), None
        elif plan is not None and plan.entries:
            view = ReplayedFile(file, plan.overlay, plan.size_after)
        return cls(file, view, choice=choice, replay=plan, creator=creator)

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    @property
    def data_write_guid(self) -> UUID:
        """What a child of this disk names in its parent linkage."""
        return self.header.data_write_guid

    def _region(self, guid: UUID) -> RegionEntry:
        return next(entry for entry in self.regions.entries if entry.guid == guid)

    def block_offset(self, block: int, entry: int) -> int:
        """Return where a present block stands, from its BAT entry. Raises CorruptDiskError for no possible place."""
        offset = decode_bat_entry(entry)[1]
        if not HEADER_SECTION_SIZE <= offset < MAX_BLOCK_OFFSET:
            index = self.geometry.payload_index(block)
            raise CorruptDiskError(
                f"payload block {block} is present at impossible offset {offset:#x}",
                path=str(self.path),
                offset=self.bat_region.offset + index * BAT_ENTRY_SIZE,
            )
        return offset

    def bitmap_offset(self, chunk: int) -> int:
        """Return where the chunk's sector bitmap stands. Raises CorruptDiskError where it is not present."""
        index = self.geometry.bitmap_index(chunk)
        state, offset = decode_bat_entry(self.bat.entry(index))
        if state != BitmapState.PRESENT or not HEADER_SECTION_SIZE <= offset < MAX_BLOCK_OFFSET:
            raise CorruptDiskError(
                f"chunk {chunk} has partially present blocks but no sector bitmap",
                path=str(self.path),
                offset=self.bat_region.offset + index * BAT_ENTRY_SIZE,
            )
        return offset

    def read_bitmap(self, chunk: int, start: int, end: int) -> bytes:
        """Return bytes [start, end) of the chunk's sector bitmap; the first sector is the lowest bit of the first."""
        offset = self.bitmap_offset(chunk) + start
        bits = self.view.pread(offset, end - start)
        if len(bits) != end - start:
            raise CorruptDiskError(
                f"the file ends inside the sector bitmap of chunk {chunk}", path=str(self.path), offset=offset
            )
        return bits

    def close(self) -> None:
        """Let the file go. Safe to repeat."""
        self.file.close()
