"""Changing an image in place, whatever its format: what would be done, and doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhdx.compact import compact_disk
from vhdx.convert import CHUNK_BYTES, GRANULE_BYTES, nonzero_runs
from vhdx.describe import file_sizes
from vhdx.errors import OutOfRangeError, ParentError, UnsupportedDiskError
from vhdx.formats import detect_format, open_disk
from vhdx.merge import merge_into_parent, refuse_siblings
from vhdx.osfile import OS_FILES, Files
from vhdx.progress import Progress, silent
from vhdx.raw import RawDisk
from vhdx.relink import find_children
from vhdx.resize import check_size, refuse_children, resize_disk
from vhdx.vhd import FixedVhdDisk, SparseVhdDisk
from vhdx.vhd_create import AZURE_ALIGNMENT
from vhdx.vhd_structures import FOOTER_SIZE, MAX_VIRTUAL_SIZE, resized
from vhdx.vhdx import VhdxDisk
from vhdx.windows import length_of

CONVERT_HINT: Final = "convert it to VHDX first"


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """A change of the virtual size, bytes. It shrinks where ``new_size`` is less than ``old_size``."""

    path: Path
    format: str
    old_size: int
    new_size: int

    @property
    def shrinks(self) -> bool:
        """Whether the disk becomes smaller."""
        return self.new_size < self.old_size


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge of ``child`` into ``parent``: at most ``data_bytes`` are written to the parent.

    ``grandchildren`` are the child's children in the folders of both and in those allowed: they are linked to the
    parent.
    """

    child: Path
    parent: Path
    data_bytes: int
    grandchildren: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Compacted:
    """What compacting did. ``storage`` is what the file takes on its file system, None where that is not told."""

    path: Path
    format: str
    file_size_before: int
    file_size_after: int
    storage_before: int | None
    storage_after: int | None
    pieces_released: int  # blocks of a VHDX, 64 KiB pieces of the others
    pieces_moved: int


# --- resize


def plan_resize(
    path: Path | str, size: int, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES
) -> ResizePlan:
    """Say what resizing would do.

    Raises UnsupportedDiskError for formats that cannot be resized here, OutOfRangeError for sizes they cannot have or
    that would cut data off, ParentError for a parent of others and for a child smaller than its parent.
    """
    path = Path(path)
    with open_disk(path, allowed_folders=allowed_folders, files=files) as disk:
        if isinstance(disk, SparseVhdDisk):
            raise UnsupportedDiskError(
                "a dynamic or differencing VHD is not resized", path=str(path), hint=CONVERT_HINT
            )
        step = AZURE_ALIGNMENT if isinstance(disk, FixedVhdDisk) else disk.sector_size
        if size <= 0 or size % step:
            raise OutOfRangeError(f"a size of {size} bytes is not a multiple of {step}", path=str(path))
        if isinstance(disk, FixedVhdDisk) and size > MAX_VIRTUAL_SIZE:
            raise OutOfRangeError("a VHD has at most 2040 GiB", path=str(path), hint=CONVERT_HINT)
        if isinstance(disk, VhdxDisk):
            refuse_children(path, allowed_folders=allowed_folders, files=files)
            check_size(disk, size)
        elif isinstance(disk, RawDisk) and size < disk.size:
            _refuse_data_past(disk, size)
        return ResizePlan(path, disk.format, disk.size, size)


def resize_image(
    path: Path | str, size: int, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES
) -> ResizePlan:
    """Make the virtual size of a VHDX, a fixed VHD or a raw image ``size`` bytes; what is added reads as zeros.

    Raises as ``plan_resize``, OutOfRangeError where data would be cut off, and as opening for writing does.
    """
    plan = plan_resize(path, size, allowed_folders=allowed_folders, files=files)
    if plan.format == "vhdx":
        resize_disk(path, size, allowed_folders=allowed_folders, files=files)
        return plan
    with open_disk(path, writable=True, format=plan.format, files=files) as disk:
        assert isinstance(disk, RawDisk)
        if plan.shrinks:
            _refuse_data_past(disk, size)
        if isinstance(disk, FixedVhdDisk):
            _resize_fixed_vhd(disk, size)
        else:
            disk.file.truncate(size)
        disk.file.fsync()
    return plan


def _refuse_data_past(disk: RawDisk, size: int) -> None:
    for window in disk.allocated(size):
        for start, end in window.tolist():
            for position in range(start, end, CHUNK_BYTES):
                data = disk.read_at(position, min(CHUNK_BYTES, end - position))
                if data.count(0) != len(data):
                    raise OutOfRangeError(
                        f"the disk cannot be cut to {size} bytes: data stands at {position} or behind",
                        path=str(disk.path),
                        hint="shrink or move the last partition first, in the guest",
                    )


def _resize_fixed_vhd(disk: FixedVhdDisk, size: int) -> None:
    """Move the footer: a new one is durable before the old one goes, so that the file is a VHD at every instant.

    Cut off in between, a grown disk has 512 bytes of old footer where it should read as zeros.
    """
    footer = resized(disk.footer, size).encode()
    if size > disk.size:
        disk.file.truncate(size)
        disk.file.pwrite(size, footer)
        disk.file.fsync()
        disk.file.punch_hole(disk.layout.content_end, FOOTER_SIZE)
    elif size < disk.size:
        # The last 512 bytes must be a footer at every instant: the old one is, until the file ends behind the new.
        disk.file.pwrite(size, footer)
        disk.file.fsync()
        disk.file.truncate(size + FOOTER_SIZE)


# --- merge


def plan_merge(path: Path | str, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES) -> MergePlan:
    """Say what merging the differencing VHDX at ``path`` into its parent would do.

    Raises ParentError where it has none, or its parent has other children; UnsupportedDiskError for other formats.
    """
    path = Path(path)
    known = detect_format(path, files=files)
    if known == "vhd":
        raise UnsupportedDiskError(
            "a differencing VHD is not merged", path=str(path), hint="convert it, which takes its parents in"
        )
    with open_disk(path, format=known, allowed_folders=allowed_folders, files=files) as disk:
        if not isinstance(disk, VhdxDisk) or not disk.image.geometry.has_parent:
            raise ParentError("this is no differencing disk: it has no parent to be merged into", path=str(path))
        if disk.parent is None:
            raise disk.parent_error or ParentError("its parent is missing", path=str(path))
        refuse_siblings(disk, allowed_folders=allowed_folders, files=files)
        parent = disk.parent.path
        data_bytes = length_of(disk.stored())
    children = find_children(path, folders=(parent.parent, *allowed_folders), files=files)
    return MergePlan(path, parent, data_bytes, tuple(child.path for child in children if child.is_current))


def merge_image(
    path: Path | str,
    *,
    keep_child: bool = False,
    allowed_folders: Sequence[Path | str] = (),
    progress: Progress = silent,
    files: Files = OS_FILES,
) -> MergePlan:
    """Merge as ``plan_merge`` says; the child is removed unless ``keep_child``."""
    plan = plan_merge(path, allowed_folders=allowed_folders, files=files)
    merge_into_parent(path, keep_child=keep_child, allowed_folders=allowed_folders, files=files, progress=progress)
    return plan


# --- compact


def compact_image(path: Path | str, *, progress: Progress = silent, files: Files = OS_FILES) -> Compacted:
    """Give back the storage of what holds nothing: in a VHDX by moving blocks, in raw and fixed VHD by holes.

    Raises UnsupportedDiskError for a dynamic or differencing VHD.
    """
    path = Path(path)
    known = detect_format(path, files=files)
    size_before, storage_before = file_sizes(path)
    moved = 0
    if known == "vhdx":
        result = compact_disk(path, files=files, progress=progress)
        released, moved = result.blocks_released, result.blocks_moved
    else:
        with open_disk(path, writable=True, format=known, files=files) as disk:
            if not isinstance(disk, RawDisk):
                raise UnsupportedDiskError(
                    "a dynamic or differencing VHD is not compacted in place",
                    path=str(path),
                    hint="convert it to a new one, which leaves out what is zero",
                )
            released = _punch_zeros(disk, progress)
    size_after, storage_after = file_sizes(path)
    return Compacted(path, known, size_before, size_after, storage_before, storage_after, released, moved)


def _punch_zeros(disk: RawDisk, progress: Progress) -> int:
    """Make holes of the pieces of 64 KiB that are zeros; return how many there were."""
    released = 0
    for window in list(disk.allocated()):
        for start, end in window.tolist():
            for position in range(start // GRANULE_BYTES * GRANULE_BYTES, end, CHUNK_BYTES):
                length = min(CHUNK_BYTES, disk.size - position)
                last = 0
                runs = nonzero_runs(memoryview(disk.read_at(position, length)))
                for first, next_last in [*runs.tolist(), (length, length)]:
                    if first > last:
                        disk.trim(position + last, first - last)
                        released += -(-(first - last) // GRANULE_BYTES)
                    last = next_last
                progress(min(position + length, disk.size), disk.size, "compacting")
    return released
