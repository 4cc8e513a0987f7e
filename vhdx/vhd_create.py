"""Making new VHD files: fixed ones that Azure takes, and dynamic ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vhdx.bulk import name_file
from vhdx.errors import OutOfRangeError
from vhdx.osfile import OS_FILES, File, Files
from vhdx.temporary import temporary_path
from vhdx.vhd_structures import (
    DEFAULT_BLOCK_SIZE,
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_BAT_ENTRIES,
    MAX_BLOCK_SIZE,
    MAX_VIRTUAL_SIZE,
    MIB,
    MIN_BLOCK_SIZE,
    NO_OFFSET,
    SECTOR_SIZE,
    UNUSED_ENTRY,
    DiskType,
    Footer,
    Header,
    geometry_for,
)

AZURE_ALIGNMENT: Final = MIB  # Azure refuses a disk of any other size


def aligned_size(size: int) -> int:
    """Return ``size`` rounded up to what Azure takes."""
    return -(-size // AZURE_ALIGNMENT) * AZURE_ALIGNMENT


def create_fixed(
    path: Path | str,
    size: int,
    *,
    identifier: uuid.UUID | None = None,
    created: datetime | None = None,
    overwrite: bool = False,
    files: Files = OS_FILES,
) -> None:
    """Create a fixed VHD of ``size`` bytes, rounded up to whole MiB; it is a hole with a footer behind.

    Raises OutOfRangeError for a size the format cannot have, OsError where the file exists or cannot be made.
    """
    size = aligned_size(size)
    _check_size(path, size)
    footer = _new_footer(DiskType.FIXED, size, identifier, created)

    def fill(file: File) -> None:
        file.truncate(size)
        file.pwrite(size, footer.encode())

    _create(Path(path), fill, files, overwrite)


def create_dynamic(
    path: Path | str,
    size: int,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    identifier: uuid.UUID | None = None,
    created: datetime | None = None,
    overwrite: bool = False,
    files: Files = OS_FILES,
) -> None:
    """Create an empty dynamic VHD of ``size`` bytes (whole sectors) in blocks of ``block_size``.

    Raises OutOfRangeError for sizes the format cannot have, OsError where the file exists or cannot be made.
    """
    _check_size(path, size)
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise OutOfRangeError(f"a block size of {block_size} bytes is not a power of two that VHD can have")
    entries = -(-size // block_size)
    if entries > MAX_BAT_ENTRIES:
        raise OutOfRangeError(f"{entries} blocks are too many: take a larger block size", path=str(path))
    footer = _new_footer(DiskType.DYNAMIC, size, identifier, created, data_offset=FOOTER_SIZE)
    header = Header(table_offset=FOOTER_SIZE + HEADER_SIZE, entry_count=entries, block_size=block_size)
    table_size = -(-entries * 4 // SECTOR_SIZE) * SECTOR_SIZE

    def fill(file: File) -> None:
        file.pwrite(0, footer.encode() + header.encode())
        file.pwrite(header.table_offset, UNUSED_ENTRY.to_bytes(4, "big") * (table_size // 4))
        file.pwrite(header.table_offset + table_size, footer.encode())

    _create(Path(path), fill, files, overwrite)


def _check_size(path: Path | str, size: int) -> None:
    if not 0 < size <= MAX_VIRTUAL_SIZE or size % SECTOR_SIZE:
        raise OutOfRangeError(
            f"a VHD cannot have {size} bytes: it takes whole sectors of 512 bytes and at most 2040 GiB",
            path=str(path),
            hint="use VHDX for larger disks" if size > MAX_VIRTUAL_SIZE else None,
        )


def _new_footer(
    kind: DiskType, size: int, identifier: uuid.UUID | None, created: datetime | None, data_offset: int = NO_OFFSET
) -> Footer:
    return Footer(
        kind=kind,
        original_size=size,
        current_size=size,
        identifier=identifier or uuid.uuid4(),
        created=created or datetime.now(UTC),
        geometry=geometry_for(size),
        data_offset=data_offset,
    )


def _create(path: Path, fill: Callable[[File], None], files: Files, overwrite: bool) -> None:
    """Fill a file under a temporary name, flush it, and give it its name."""
    temporary = temporary_path(path)
    file = files.open(temporary, create=True)
    try:
        try:
            fill(file)
            file.fsync()
        finally:
            file.close()
        name_file(files, temporary, path, overwrite=overwrite)
    except BaseException:
        files.remove(temporary)
        raise
