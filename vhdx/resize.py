"""Changing the virtual size of a VHDX.

A growing disk may need a longer BAT than its region holds. Then a new region is written at the file's end, where
nothing refers to it, and flushed; one log entry makes both region tables point there and changes the size, so that a
crash leaves the old disk or the new one. A shrinking disk first forgets the blocks past its new end, which read as
zeros, then changes its size, again by one log entry, and last gives back the file's end once the log is empty.
A crash in between leaves a disk of the old size or of the new that reads right; resizing again completes it.

A disk whose size changed is no longer the parent that its children were made of: one that has children in its folder,
or in those that the caller allows, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import numpy as np

from vhdx.compact import cut_file
from vhdx.create import bat_size
from vhdx.errors import CorruptDiskError, OutOfRangeError, ParentError
from vhdx.headers import GuidFactory
from vhdx.osfile import OS_FILES, Files
from vhdx.relink import find_children
from vhdx.structures import (
    BAT_ENTRY_SIZE,
    BAT_REGION,
    MAX_VIRTUAL_SIZE,
    MIB,
    REGION_TABLE_OFFSETS,
    UINT64,
    VIRTUAL_DISK_SIZE_ITEM,
    PayloadState,
    RegionTable,
)
from vhdx.vhdx import VhdxDisk
from vhdx.writer import PRESENT, Writer, open_writable, writer_of

READ_SIZE: Final = 4 * MIB
COPY_SIZE: Final = MIB
WINDOW_ENTRIES: Final = 1 << 16


def resize_disk(
    path: Path | str,
    size: int,
    *,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
    new_guid: GuidFactory = uuid4,
) -> None:
    """Make the virtual size of the VHDX at ``path`` ``size`` bytes; what is added reads as zeros.

    Raises OutOfRangeError where the format cannot have that size, or data stands past it; ParentError for a disk that
    is the parent of others in its folder, and for a child that would be smaller than its parent; as
    ``open_writable`` does.
    """
    path = Path(path)
    refuse_children(path, allowed_folders=allowed_folders, files=files)
    resize_to(path, size, allowed_folders=allowed_folders, files=files, new_guid=new_guid, data_write_guid=None)


def refuse_children(path: Path, *, allowed_folders: Sequence[Path | str], files: Files) -> None:
    """Raise ParentError where the disk is the parent of others in its folder or in ``allowed_folders``."""
    children = [child for child in find_children(path, folders=allowed_folders, files=files) if child.is_current]
    if children:
        raise ParentError(
            f"the disk is the parent of {', '.join(child.path.name for child in children)}, which need it as it is",
            path=str(path),
            hint="resize the child instead, or merge it first",
        )


def resize_to(
    path: Path,
    size: int,
    *,
    allowed_folders: Sequence[Path | str],
    files: Files,
    new_guid: GuidFactory,
    data_write_guid: UUID | None,
) -> None:
    """Resize as ``resize_disk`` does, children or not; the disk's new DataWriteGuid may be given."""
    guid = data_write_guid or new_guid()
    with open_writable(path, allowed_folders=allowed_folders, files=files, new_guid=new_guid) as disk:
        check_size(disk, size)
        old_size = disk.size
        if size != old_size:
            writer = writer_of(disk)
            writer.set_data_write_guid(guid)
            if size > old_size:
                _grow(disk, writer, size)
            else:
                _shrink(disk, writer, size)
    with open_writable(path, allowed_folders=allowed_folders, files=files, new_guid=new_guid) as disk:
        if disk.image.metadata.file_parameters.leave_blocks_allocated:
            _allocate_all(disk)
        if size < old_size:
            cut_file(disk)


def check_size(disk: VhdxDisk, size: int) -> None:
    """Raise OutOfRangeError or ParentError where the disk cannot have that size, or data stands past it."""
    if not 0 < size <= MAX_VIRTUAL_SIZE or size % disk.sector_size:
        raise OutOfRangeError(
            f"a VHDX cannot have {size} bytes: a multiple of {disk.sector_size} up to 64 TiB is needed",
            path=str(disk.path),
        )
    if disk.parent is not None and size < disk.parent.size:
        raise ParentError(f"a child cannot be smaller than its parent of {disk.parent.size} bytes", path=str(disk.path))
    if size < disk.size:
        data = _first_data(disk, size)
        if data is not None:
            raise OutOfRangeError(
                f"the disk cannot be cut to {size} bytes: data stands at {data}",
                path=str(disk.path),
                hint="shrink or move the last partition first, in the guest",
            )


def _first_data(disk: VhdxDisk, start: int) -> int | None:
    """Return where the first piece that is not all zeros begins, from ``start`` on; None where there is none."""
    for window in disk.allocated(start):
        for low, high in window.tolist():
            for offset in range(low, high, READ_SIZE):
                data = disk.read_at(offset, min(READ_SIZE, high - offset))
                if data.count(0) != len(data):
                    return int(offset)
    return None


def _grow(disk: VhdxDisk, writer: Writer, size: int) -> None:
    image = disk.image
    # Past the end of the disk its last block may hold anything: what is now added must read as zeros.
    tail = disk.size % image.geometry.block_size
    if tail:
        state, place = writer.block(image.geometry.block_count - 1)
        if state in PRESENT:
            end = place + image.geometry.block_size
            writer.file.punch_hole(place + tail, end - place - tail)
            if writer.file.size() < end:  # QEMU ends the file of a fixed disk with the disk, inside the block
                writer.file.truncate(end)
    grown = replace(image.geometry, virtual_size=size)
    patches = [_size_patch(disk, size)]
    if bat_size(grown) > image.bat_region.length:
        offset = _copy_bat(disk, writer, bat_size(grown))
        moved = replace(image.bat_region, offset=offset, length=bat_size(grown))
        entries = tuple(moved if entry.guid == BAT_REGION else entry for entry in image.regions.entries)
        patches += [(place, RegionTable(entries).encode()) for place in REGION_TABLE_OFFSETS]
    else:
        _clear_entries(writer, image.geometry.entry_count, grown.entry_count)
    writer.commit_patches(patches)


def _copy_bat(disk: VhdxDisk, writer: Writer, length: int) -> int:
    """Write the BAT to a fresh region of ``length`` bytes, zeros behind its entries; return where."""
    writer.flush()
    target = writer.extend(length)
    end = disk.image.geometry.entry_count * BAT_ENTRY_SIZE
    for start in range(0, end, COPY_SIZE):
        data = writer.file.pread(disk.image.bat_region.offset + start, min(COPY_SIZE, end - start))
        if len(data) != min(COPY_SIZE, end - start):
            raise CorruptDiskError("the file ends inside the block allocation table", path=str(disk.path))
        writer.file.pwrite(target + start, data)
    return target


def _clear_entries(writer: Writer, start: int, end: int) -> None:
    """Make the BAT entries with indices in [start, end) say that nothing is there."""
    for window in range(start, end, WINDOW_ENTRIES):
        entries = writer.bat.get_range(window, min(end, window + WINDOW_ENTRIES))
        for index in (np.flatnonzero(entries) + window).tolist():
            writer.set_entry(index, 0)
        writer.flush()


def _size_patch(disk: VhdxDisk, size: int) -> tuple[int, bytes]:
    entry = disk.image.metadata.find(VIRTUAL_DISK_SIZE_ITEM)
    assert entry is not None
    return disk.image.metadata_region.offset + entry.offset, UINT64.pack(size)


def _shrink(disk: VhdxDisk, writer: Writer, size: int) -> None:
    geometry = disk.image.geometry
    cut = replace(geometry, virtual_size=size)
    block_end = min(disk.size, cut.block_count * geometry.block_size)
    disk.trim(block_end, disk.size - block_end)
    # A child keeps the entry of its last chunk's sector bitmap, which stands behind the payload entries that go.
    kept = cut.entry_count - 1 if geometry.has_parent else -1
    first = cut.payload_index(cut.block_count) if cut.block_count % cut.chunk_ratio else cut.entry_count
    for window in range(first, geometry.entry_count, WINDOW_ENTRIES):
        entries = writer.bat.get_range(window, min(geometry.entry_count, window + WINDOW_ENTRIES))
        for index in (np.flatnonzero(entries) + window).tolist():
            if index != kept:
                writer.set_entry(index, 0)
        writer.flush()
    writer.commit_patches([_size_patch(disk, size)])


def _allocate_all(disk: VhdxDisk) -> None:
    """Give every block of a fixed disk a place, as fixed disks have."""
    writer = writer_of(disk)
    for first in range(0, disk.image.geometry.block_count, WINDOW_ENTRIES):
        last = min(disk.image.geometry.block_count, first + WINDOW_ENTRIES)
        missing = np.flatnonzero(writer.bat.payload_states(first, last) != PayloadState.FULLY_PRESENT)
        if len(missing):
            writer.begin_change()
        for block in (missing + first).tolist():
            writer.set_payload_entry(block, PayloadState.FULLY_PRESENT, writer.allocate_block())
        writer.flush()
