"""Which disks name a disk as their parent, and changing whom a disk names.

A parent locator is replaced as a whole by one log entry, so a crash leaves the old one or the new one. The virtual
disk does not change by it, nor does its DataWriteGuid: the disk's own children stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from vhdx.chain import candidate_paths, is_special, parent_linkages, parent_paths
from vhdx.create import guid_text, parent_locator
from vhdx.errors import DiskError, ParentError, UnsupportedDiskError
from vhdx.headers import GuidFactory
from vhdx.image import VhdxImage
from vhdx.osfile import OS_FILES, Files, translated
from vhdx.structures import (
    PARENT_LOCATOR_ITEM,
    TABLE_SIZE,
    MetadataTable,
    ParentLocator,
)
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable, writer_of

SUFFIXES: Final = (".vhdx", ".avhdx")


@dataclass(frozen=True, slots=True)
class Child:
    """A differencing disk, and whether the parent still is as it was when the child was made."""

    path: Path
    is_current: bool


def find_children(path: Path | str, *, folders: Sequence[Path | str] = (), files: Files = OS_FILES) -> list[Child]:
    """Return the disks whose locators lead to ``path``, of those in its own folder and in ``folders``.

    Files that cannot be read are none.
    """
    path = Path(path)
    image = VhdxImage.open(path, files=files)
    image.close()
    children: list[Child] = []
    for candidate in disks_in([path.absolute().parent, *map(Path, folders)]):
        if _same_file(candidate, path) or any(_same_file(candidate, child.path) for child in children):
            continue
        try:
            child = VhdxImage.open(candidate, files=files)
            child.close()
            if child.metadata.parent_locator is None or not _may_lead_to(child, path):
                continue
            children.append(Child(candidate, image.data_write_guid in parent_linkages(child)))
        except DiskError:
            continue
    return children


def disks_in(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the files of folders whose names say that they are VHDX, what would block or act left out."""
    for folder in dict.fromkeys(folder.absolute() for folder in folders):
        with translated(folder, "list the folder"):
            names = sorted(folder.iterdir()) if folder.is_dir() else []
        yield from (name for name in names if name.suffix.lower() in SUFFIXES and not is_special(name))


def _may_lead_to(child: VhdxImage, path: Path) -> bool:
    """Whether any place that the child's locator gives is ``path``: which of them is the parent, its GUID decides."""
    folder = child.path.absolute().parent
    candidates = candidate_paths(parent_paths(child), child_folder=folder, allowed=[folder, path.absolute().parent])
    return any(_same_file(candidate, path) for candidate in candidates)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def relink(
    child: Path | str,
    parent: Path | str,
    *,
    files: Files = OS_FILES,
    new_guid: GuidFactory = uuid4,
) -> None:
    """Make ``parent``, as it is now, the parent of the differencing disk ``child``.

    The caller knows that ``parent`` reads as the child's old parent did (it was moved, or took the old one in).
    Raises ParentError where the child has no parent or the two do not fit together; DiskBusyError, OsError.
    """
    parent = Path(parent)
    image = VhdxImage.open(parent, files=files)
    image.close()
    with open_writable(child, files=files, new_guid=new_guid, with_parents=False) as disk:
        if disk.sector_size != image.geometry.sector_size:
            raise ParentError(
                f"its sectors have {disk.sector_size} bytes, those of {parent} {image.geometry.sector_size}",
                path=str(disk.path),
            )
        set_locator(disk, parent_locator(disk.path, parent, image.data_write_guid))


def add_linkage(child: Path, guid: UUID, *, files: Files = OS_FILES, new_guid: GuidFactory = uuid4) -> None:
    """Let ``child`` accept its parent under the DataWriteGuid ``guid`` too, beside the one that it has."""
    with open_writable(child, files=files, new_guid=new_guid, with_parents=False) as disk:
        locator = disk.image.metadata.parent_locator
        assert locator is not None
        values = [(key, value) for key, value in locator.values if key != "parent_linkage2"]
        changed = replace(locator, values=(*values, ("parent_linkage2", guid_text(guid))))
        set_locator(disk, changed)


def set_locator(disk: VhdxDisk, locator: ParentLocator) -> None:
    """Replace the parent locator, in one log entry. The disk must be closed after.

    Raises ParentError where there is none, UnsupportedDiskError where there is no room for the new one.
    """
    image, writer = disk.image, writer_of(disk)
    table = image.metadata.table
    old = image.metadata.find(PARENT_LOCATOR_ITEM)
    if old is None:
        raise ParentError("the disk has no parent", path=str(image.path))
    data = locator.encode()
    others = [(entry.offset, entry.length) for entry in table.entries if entry is not old and entry.length]
    place = free_place(others, len(data), image.metadata_region.length)
    if place is None:
        raise UnsupportedDiskError("the metadata region has no room for the parent's new path", path=str(image.path))
    entries = tuple(
        replace(entry, offset=place, length=len(data)) if entry is old else entry for entry in table.entries
    )
    start = image.metadata_region.offset
    writer.begin_change()
    writer.commit_patches([(start, MetadataTable(entries).encode().rstrip(b"\0")), (start + place, data)])


def free_place(taken: Sequence[tuple[int, int]], length: int, region_length: int) -> int | None:
    """Return the first offset in a metadata region, after its table, with ``length`` bytes that no item takes."""
    place = TABLE_SIZE
    for offset, size in sorted(taken):
        if offset - place >= length:
            break
        place = max(place, offset + size)
    return place if place + length <= region_length else None
