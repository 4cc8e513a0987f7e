"""New VHDX files: fixed, dynamic and differencing, laid out as Hyper-V lays them out.

The file is written under a temporary name in the target's folder, flushed, and then given its name: a crash leaves
the target as it was, and at worst a stray ``.NAME.*.tmp``. Layout, all at multiples of 1 MiB: headers and region
tables (1 MiB), log (1 MiB), metadata region (1 MiB), BAT, and in a fixed disk every payload block in order.
"""

from __future__ import annotations

import ntpath
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Final, Literal, TypeAlias, TypedDict, Unpack, get_args, overload
from uuid import UUID, uuid4

import numpy as np

from vhdx.bat import Geometry
from vhdx.bulk import BulkDisk, file_exists, name_file
from vhdx.errors import OutOfRangeError, ParentError, UnsupportedDiskError
from vhdx.headers import GuidFactory
from vhdx.image import VhdxImage
from vhdx.osfile import OS_FILES, File, Files
from vhdx.structures import (
    BAT_ENTRY_SIZE,
    BAT_REGION,
    FILE_IDENTIFIER_OFFSET,
    FILE_PARAMETERS_ITEM,
    HEADER_OFFSETS,
    LOGICAL_SECTOR_SIZE_ITEM,
    LOGICAL_SECTOR_SIZES,
    MAX_BLOCK_SIZE,
    MAX_VIRTUAL_SIZE,
    METADATA_REGION,
    MIB,
    MIN_BLOCK_SIZE,
    PARENT_LOCATOR_ITEM,
    PHYSICAL_SECTOR_SIZE_ITEM,
    REGION_TABLE_OFFSETS,
    TABLE_SIZE,
    UINT32,
    UINT64,
    VHDX_PARENT_LOCATOR,
    VIRTUAL_DISK_ID_ITEM,
    VIRTUAL_DISK_SIZE_ITEM,
    ZERO_GUID,
    FileIdentifier,
    FileParameters,
    Header,
    MetadataEntry,
    MetadataTable,
    ParentLocator,
    PayloadState,
    RegionEntry,
    RegionTable,
    encode_guid,
)
from vhdx.temporary import temporary_path

Kind: TypeAlias = Literal["fixed", "dynamic", "differencing"]

LOG_OFFSET: Final = MIB
LOG_SIZE: Final = MIB
METADATA_OFFSET: Final = 2 * MIB
METADATA_SIZE: Final = MIB
BAT_OFFSET: Final = 3 * MIB
DEFAULT_BLOCK_SIZES: Final = {"fixed": 32 * MIB, "dynamic": 32 * MIB, "differencing": 2 * MIB}  # Hyper-V's own
DEFAULT_PHYSICAL_SECTOR_SIZE: Final = 4096  # Hyper-V's own, whatever the logical size
DEFAULT_CREATOR: Final = "Godwit"
BAT_WINDOW_ENTRIES: Final = 1 << 17  # BAT entries of a fixed disk that are held in memory at once: 1 MiB


class CreateOptions(TypedDict, total=False):
    """What ``create_disk`` can be told, all of it optional but the size of a disk without a parent."""

    size: int  # virtual size, bytes: a multiple of the sector size; a child's defaults to its parent's
    kind: Kind  # defaults to differencing with a parent, to dynamic without
    block_size: int  # payload block, bytes: a power of two from 1 to 256 MiB
    sector_size: int  # logical sector, bytes: 512 or 4096; a child has its parent's
    physical_sector_size: int  # bytes: 512 or 4096; a hint to guests
    parent: Path | str  # the VHDX that a differencing disk builds on
    creator: str  # who the file says created it
    overwrite: bool  # whether a file of that name may be replaced
    new_guid: GuidFactory
    files: Files


def bat_size(geometry: Geometry) -> int:
    """Return the length of the smallest BAT region that holds the entries of a disk, bytes."""
    return max(1, -(-geometry.entry_count * BAT_ENTRY_SIZE // MIB)) * MIB


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Everything that decides what a new file's structures say. Made by ``plan_disk``, which checks it."""

    size: int
    kind: Kind
    block_size: int
    sector_size: int
    physical_sector_size: int
    locator: ParentLocator | None
    creator: str

    @property
    def geometry(self) -> Geometry:
        """The BAT arithmetic of the disk."""
        return Geometry(self.size, self.block_size, self.sector_size, has_parent=self.locator is not None)

    @property
    def bat_size(self) -> int:
        """Length of the BAT region, bytes."""
        return bat_size(self.geometry)

    @property
    def payload_offset(self) -> int:
        """Where in the file the first payload block may lie."""
        return BAT_OFFSET + self.bat_size


@overload
def create_disk(path: Path | str, *, bulk: Literal[False] = False, **options: Unpack[CreateOptions]) -> None: ...
@overload
def create_disk(path: Path | str, *, bulk: Literal[True], **options: Unpack[CreateOptions]) -> BulkDisk: ...
def create_disk(path: Path | str, *, bulk: bool = False, **options: Unpack[CreateOptions]) -> BulkDisk | None:
    """Create a VHDX file at ``path``: empty, or with ``bulk`` open to be filled fast before it gets its name.

    Without ``bulk`` the finished file is in place when this returns. With it a ``BulkDisk`` is returned; the file
    appears at ``path`` by its ``commit()``. The options are those of ``CreateOptions``.
    Raises OsError (a file of that name exists, no space…), OutOfRangeError (a size that the format cannot have),
    UnsupportedDiskError, and whatever opening the parent raises.
    """
    path = Path(path)
    files = options.get("files", OS_FILES)
    overwrite = options.get("overwrite", False)
    plan = plan_disk(path, options)
    if bulk and plan.kind == "differencing":
        raise UnsupportedDiskError("a differencing disk cannot be filled in bulk", path=str(path))
    if not overwrite and path.exists():
        raise file_exists(path)
    temporary = temporary_path(path)
    file = files.open(temporary, create=True)
    try:
        _write_structures(file, plan, options.get("new_guid", uuid4))
        if bulk:
            return BulkDisk(
                file,
                path,
                size=plan.size,
                sector_size=plan.sector_size,
                block_size=plan.block_size,
                chunk_ratio=plan.geometry.chunk_ratio,
                bat_offset=BAT_OFFSET,
                payload_offset=plan.payload_offset,
                fixed=plan.kind == "fixed",
                overwrite=overwrite,
                files=files,
            )
        file.fsync()
        file.close()
        name_file(files, temporary, path, overwrite=overwrite)
    except BaseException:
        file.close()
        files.remove(temporary)
        raise
    return None


def plan_disk(path: Path, options: CreateOptions) -> DiskPlan:
    """Check the options against the format and against each other, fill in the defaults, and look at the parent."""
    parent = options.get("parent")
    kind = options.get("kind", "dynamic" if parent is None else "differencing")
    if kind not in get_args(Kind):
        raise UnsupportedDiskError(f"there is no kind of VHDX named {kind!r}", path=str(path))
    if (parent is None) == (kind == "differencing"):
        raise ParentError("a differencing disk needs a parent, and no other disk has one", path=str(path))
    size, sector_size, locator = options.get("size"), options.get("sector_size"), None
    if parent is not None:
        image = VhdxImage.open(Path(parent), files=options.get("files", OS_FILES))
        image.close()
        size = image.geometry.virtual_size if size is None else size
        sector_size = image.geometry.sector_size if sector_size is None else sector_size
        if sector_size != image.geometry.sector_size:
            raise ParentError(
                f"the parent has sectors of {image.geometry.sector_size} bytes, its child cannot have {sector_size}",
                path=str(path),
            )
        if size < image.geometry.virtual_size:  # growing it later would let the rest of the parent shine through
            raise ParentError(
                f"a child cannot be smaller than its parent of {image.geometry.virtual_size} bytes", path=str(path)
            )
        locator = parent_locator(path, Path(parent), image.data_write_guid)
    plan = DiskPlan(
        size=size or 0,
        kind=kind,
        block_size=options.get("block_size", DEFAULT_BLOCK_SIZES[kind]),
        sector_size=sector_size or 512,
        physical_sector_size=options.get("physical_sector_size", DEFAULT_PHYSICAL_SECTOR_SIZE),
        locator=locator,
        creator=options.get("creator", DEFAULT_CREATOR),
    )
    _check_plan(path, plan)
    return plan


def _check_plan(path: Path, plan: DiskPlan) -> None:
    for sectors, name in ((plan.sector_size, "logical"), (plan.physical_sector_size, "physical")):
        if sectors not in LOGICAL_SECTOR_SIZES:
            raise UnsupportedDiskError(f"{name} sectors have 512 or 4096 bytes, not {sectors}", path=str(path))
    block_size = plan.block_size
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise UnsupportedDiskError(
            f"a payload block is a power of two from 1 to 256 MiB, not {block_size} bytes", path=str(path)
        )
    if not 0 < plan.size <= MAX_VIRTUAL_SIZE or plan.size % plan.sector_size:
        raise OutOfRangeError(
            f"a VHDX cannot have {plan.size} bytes: a multiple of {plan.sector_size} up to 64 TiB is needed",
            path=str(path),
        )


def parent_locator(child: Path, parent: Path, data_write_guid: UUID) -> ParentLocator:
    """Return the locator by which the file ``child`` finds the file ``parent``, at its present content.

    Paths are written as Windows reads them. The absolute one is left out where this system has no drive letters,
    unless parent and child have no relative path between them. Raises UnsupportedDiskError for a path that a locator
    cannot hold.
    """
    child, parent = Path(os.path.abspath(child)), Path(os.path.abspath(parent))  # noqa: PTH100 - keeps symlinks
    values = [("parent_linkage", guid_text(data_write_guid))]
    try:
        relative = os.path.relpath(parent, child.parent)
    except ValueError:  # another drive
        pass
    else:
        values.append(("relative_path", relative_windows_path(relative)))
    if ntpath.splitdrive(str(parent))[0]:
        values.append(("absolute_win32_path", f"\\\\?\\{PureWindowsPath(parent)}"))
    locator = ParentLocator(VHDX_PARENT_LOCATOR, tuple(values))
    try:
        locator.encode()
        held = os.sep == "\\" or "\\" not in os.path.relpath(parent, child.parent)
    except ValueError:  # bytes that are no Unicode, or more of them than fit
        held = False
    if not held:
        raise UnsupportedDiskError(
            "a VHDX cannot name this path as its parent: it must be Unicode, not too long, and without backslashes",
            path=str(parent),
            hint="rename the parent's file or the folders between it and its child",
        )
    return locator


def relative_windows_path(relative: str) -> str:
    """Return a relative path as the locator holds it: backslashes, and ``.\\`` before a bare name as Hyper-V does."""
    text = relative.replace(os.sep, "\\")
    return text if text.startswith("..") else f".\\{text}"


def guid_text(guid: UUID) -> str:
    """Return the GUID as parent locators write it: lower case, in braces."""
    return f"{{{guid}}}"


def _write_structures(file: File, plan: DiskPlan, new_guid: GuidFactory) -> None:
    # The order does not matter: the file has no name yet that anyone would open.
    file.truncate(plan.payload_offset)
    file.pwrite(FILE_IDENTIFIER_OFFSET, FileIdentifier(plan.creator).encode())
    file_write_guid, data_write_guid = new_guid(), new_guid()
    for sequence_number, offset in enumerate(HEADER_OFFSETS, start=1):
        header = Header(
            sequence_number=sequence_number,
            file_write_guid=file_write_guid,
            data_write_guid=data_write_guid,
            log_guid=ZERO_GUID,
            log_length=LOG_SIZE,
            log_offset=LOG_OFFSET,
        )
        file.pwrite(offset, header.encode())
    regions = RegionTable(
        (
            RegionEntry(BAT_REGION, BAT_OFFSET, plan.bat_size, required=True),
            RegionEntry(METADATA_REGION, METADATA_OFFSET, METADATA_SIZE, required=True),
        )
    )
    for offset in REGION_TABLE_OFFSETS:
        file.pwrite(offset, regions.encode())
    file.pwrite(METADATA_OFFSET, _metadata(plan, new_guid()))
    if plan.kind == "fixed":
        for offset, entries in _fixed_bat(plan):
            file.pwrite(offset, entries)
        file.truncate(plan.payload_offset + plan.geometry.block_count * plan.block_size)


def _metadata(plan: DiskPlan, disk_id: UUID) -> bytes:
    """Return the used part of the metadata region: the table, then the items back to back."""
    fixed, child = plan.kind == "fixed", plan.locator is not None
    items = [
        (FILE_PARAMETERS_ITEM, False, FileParameters(plan.block_size, fixed, child).encode()),
        (VIRTUAL_DISK_SIZE_ITEM, True, UINT64.pack(plan.size)),
        (VIRTUAL_DISK_ID_ITEM, True, encode_guid(disk_id)),
        (LOGICAL_SECTOR_SIZE_ITEM, True, UINT32.pack(plan.sector_size)),
        (PHYSICAL_SECTOR_SIZE_ITEM, True, UINT32.pack(plan.physical_sector_size)),
    ]
    if plan.locator is not None:
        items.append((PARENT_LOCATOR_ITEM, False, plan.locator.encode()))
    entries = []
    place = TABLE_SIZE
    for item_id, is_virtual_disk, data in items:
        entries.append(MetadataEntry(item_id, place, len(data), is_virtual_disk=is_virtual_disk, is_required=True))
        place += len(data)
    return MetadataTable(tuple(entries)).encode() + b"".join(data for _, _, data in items)


def _fixed_bat(plan: DiskPlan) -> Iterator[tuple[int, memoryview]]:
    """Yield file offset and bytes of the BAT of a fixed disk, whose blocks lie in the file in order."""
    period, count = plan.geometry.chunk_ratio + 1, plan.geometry.entry_count
    for start in range(0, count, BAT_WINDOW_ENTRIES):
        index = np.arange(start, min(start + BAT_WINDOW_ENTRIES, count), dtype=np.uint64)
        block = index - index // np.uint64(period)
        entries = np.uint64(plan.payload_offset) + block * np.uint64(plan.block_size)
        entries |= np.uint64(PayloadState.FULLY_PRESENT)
        entries[index % np.uint64(period) == np.uint64(period - 1)] = 0  # the sector bitmaps' places
        yield BAT_OFFSET + start * BAT_ENTRY_SIZE, entries.astype("<u8").data.cast("B")
