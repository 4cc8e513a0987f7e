"""Where a VHD file keeps what: its footers, header and BAT, found, checked against each other, and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vhdx.errors import CorruptDiskError, DiskError, FormatUnknownError, UnsupportedDiskError
from vhdx.image import naming
from vhdx.osfile import File
from vhdx.vhd_structures import (
    FOOTER_COOKIE,
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_BAT_ENTRIES,
    NO_OFFSET,
    OLD_FOOTER_SIZE,
    SECTOR_SIZE,
    UNUSED_ENTRY,
    DiskType,
    Footer,
    Header,
    decode_footer,
    decode_header,
)

Table = npt.NDArray[np.uint32]

MOST_PROBLEMS: Final = 100  # a report names so many wrong BAT entries, and then counts


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the file at ``offset``, which did not keep it from being opened."""

    message: str
    offset: int | None
    severity: str = "error"  # or "warning"


@dataclass(frozen=True, slots=True)
class Layout:
    """What was found. ``table`` holds an entry for each block of the disk; header and table are None when fixed."""

    footer: Footer
    file_size: int
    content_end: int  # where the footer at the end begins, or should begin
    header: Header | None = None
    table: Table | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def metadata_end(self) -> int:
        """The first byte behind header and BAT that a block may use."""
        if self.header is None:
            return 0
        table_end = self.header.table_offset + -(-self.header.entry_count * 4 // SECTOR_SIZE) * SECTOR_SIZE
        return max(FOOTER_SIZE, self.footer.data_offset + HEADER_SIZE, table_end)


def read_layout(file: File) -> Layout:
    """Read and check footers, header and BAT.

    The footer at the end counts; where it is damaged or missing, the copy that dynamic disks keep at the start.
    Raises FormatUnknownError where there is neither, CorruptDiskError, UnsupportedDiskError, OsError.
    """
    with naming(file.path):
        footer, content_end, problems = _read_footers(file)
        if footer.kind is DiskType.FIXED:
            if footer.current_size > content_end:
                raise CorruptDiskError(
                    f"the disk has {footer.current_size} bytes and the file only {content_end} of them",
                    offset=content_end,
                    hint="the file is incomplete: copy it again",
                )
            return Layout(footer, file.size(), content_end, problems=tuple(problems))
        header = _read_header(file, footer)
        table = _read_table(file, footer, header)
        return Layout(footer, file.size(), content_end, header, table, tuple(problems))


def _read_footers(file: File) -> tuple[Footer, int, list[Problem]]:
    size = file.size()
    attempts: list[DiskError] = []
    at_end: Footer | None = None
    content_end = -(-size // SECTOR_SIZE) * SECTOR_SIZE
    for length in (FOOTER_SIZE, OLD_FOOTER_SIZE):
        data = file.pread(max(0, size - length), length)
        if len(data) == length and data.startswith(FOOTER_COOKIE):
            try:
                at_end = decode_footer(data, size - length)
                content_end = size - length
                break
            except DiskError as error:
                attempts.append(error)
    at_start, failure = _footer_at_start(file)
    if failure is not None:
        attempts.append(failure)
    if at_end is not None and at_start is not None and not _belongs(at_end, at_start, content_end):
        attempts.append(CorruptDiskError("the file ends with the footer of another disk", offset=content_end))
        at_end, content_end = None, -(-size // SECTOR_SIZE) * SECTOR_SIZE
    if at_end is not None:
        return at_end, content_end, _compare_footers(at_end, at_start, failure)
    if at_start is not None and at_start.kind is not DiskType.FIXED:
        message = attempts[0].message if attempts else "there is no footer at the end of the file"
        return at_start, content_end, [Problem(f"{message}; its copy at the start is used", max(0, size - FOOTER_SIZE))]
    if attempts:
        raise attempts[0]
    raise FormatUnknownError("there is no VHD footer in the file", path=str(file.path))


def _belongs(at_end: Footer, at_start: Footer, content_end: int) -> bool:
    """Tell whether the file's last sector is its footer, and not a guest's data that look like one.

    A growing file that was cut off ends with a block, whose last sector may hold the end of a VHD that the guest
    keeps. The other way round, the first sector of a fixed disk may be the start of one.
    """
    if at_start.kind is DiskType.FIXED:
        return True
    if at_end.kind is DiskType.FIXED:
        return at_end.current_size == content_end
    return at_end.identifier == at_start.identifier


def _footer_at_start(file: File) -> tuple[Footer | None, DiskError | None]:
    data = file.pread(0, FOOTER_SIZE)
    if not data.startswith(FOOTER_COOKIE):
        return None, None
    try:
        return decode_footer(data, 0), None
    except DiskError as error:
        return None, error


def _compare_footers(at_end: Footer, at_start: Footer | None, failure: DiskError | None) -> list[Problem]:
    if at_end.kind is DiskType.FIXED or at_end == at_start:
        return []
    if failure is not None:
        return [Problem(f"the copy of the footer at the start is damaged: {failure.message}", 0)]
    if at_start is None:
        return [Problem("there is no copy of the footer at the start", 0)]
    return [Problem("the footer and its copy at the start differ; the footer is used", 0, "warning")]


def _read_header(file: File, footer: Footer) -> Header:
    offset = footer.data_offset
    if offset == NO_OFFSET or offset < FOOTER_SIZE or offset + HEADER_SIZE > file.size():
        raise CorruptDiskError(f"the footer places the dynamic header at {offset:#x}, outside the file")
    return decode_header(file.pread(offset, HEADER_SIZE), offset)


def _read_table(file: File, footer: Footer, header: Header) -> Table:
    count = -(-footer.current_size // header.block_size)
    where = footer.data_offset
    if header.entry_count < count:
        raise CorruptDiskError(f"a BAT of {header.entry_count} entries is too short for {count} blocks", offset=where)
    if count > MAX_BAT_ENTRIES:
        raise UnsupportedDiskError(f"{count} blocks are more than the {MAX_BAT_ENTRIES} that are supported")
    start, end = header.table_offset, header.table_offset + count * 4
    if start < FOOTER_SIZE or end > file.size():
        raise CorruptDiskError(f"the BAT at {start:#x} of {count} entries does not fit the file", offset=where)
    if start < footer.data_offset + HEADER_SIZE and end > footer.data_offset:
        raise CorruptDiskError(f"the BAT at {start:#x} overlaps the dynamic header", offset=where)
    data = file.pread(start, count * 4)
    if len(data) != count * 4:
        raise CorruptDiskError("the BAT is cut short", offset=start)
    return np.frombuffer(data, dtype=">u4").astype(np.uint32)


def table_problems(layout: Layout) -> list[Problem]:
    """Return what is wrong with the BAT: blocks past the end of the file, over the metadata, or over each other."""
    header, table = layout.header, layout.table
    if header is None or table is None:
        return []
    blocks = np.flatnonzero(table != UNUSED_ENTRY)
    starts = table[blocks].astype(np.int64) * SECTOR_SIZE
    ends = starts + header.bitmap_size + header.block_size
    problems = _entries(header, blocks[ends > layout.content_end], "reaches past the end of the file")
    problems += _entries(header, blocks[starts < layout.metadata_end], "lies over the header or the BAT")
    order = np.argsort(starts, kind="stable")
    overlapping = order[1:][starts[order][1:] < ends[order][:-1]]
    problems += _entries(header, np.sort(blocks[overlapping]), "overlaps another block")
    return problems


def _entries(header: Header, blocks: npt.NDArray[np.int64], what: str) -> list[Problem]:
    problems = [
        Problem(f"block {block} {what}", header.table_offset + block * 4) for block in blocks[:MOST_PROBLEMS].tolist()
    ]
    if len(blocks) > MOST_PROBLEMS:
        problems.append(Problem(f"{len(blocks) - MOST_PROBLEMS} more blocks: each {what}", header.table_offset))
    return problems
