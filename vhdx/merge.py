"""Merging a differencing disk into its parent, so that the parent reads as the child did.

The child is not changed but for its locator, and of the parent only sectors change that the child has its own of.
So the child reads the same at every instant, and merging anew from the start completes what was cut off. In order:

1. The child's locator gets a second linkage, the DataWriteGuid that the parent is to have. The parent still has the
   old one, which the child accepts too.
2. The parent's header gets that DataWriteGuid, before anything else of it changes. From here on other children of the
   parent would be refused, rightly: a parent that has others is not merged into. Children are looked for in its
   folder, in the child's, and in those that the caller allows.
3. A parent smaller than the child grows. The child's sectors are written to the parent, what the child says is zeros
   is trimmed, and the parent is flushed and closed. Now the parent reads as the child does.
4. Each child of the child, in the same folders, is linked to the parent, by one log entry; until then it reads
   through the child. Its own DataWriteGuid stays, so its children need nothing.
5. The child is removed. If it is to stay, its locator gets the parent's new GUID alone: it then is a child of the
   parent that says nothing new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from uuid import uuid4

import numpy as np

from vhdx.chain import open_vhdx, parent_linkages
from vhdx.errors import ParentError
from vhdx.headers import GuidFactory
from vhdx.osfile import OS_FILES, Files
from vhdx.progress import Progress, silent
from vhdx.relink import add_linkage, find_children, relink
from vhdx.resize import resize_to
from vhdx.structures import MIB, PayloadState
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable, writer_of

PIECE_SIZE: Final = 4 * MIB
FLUSH_SIZE: Final = 256 * MIB  # what was flushed keeps its place when a merge that was cut off is begun again
WINDOW_BLOCKS: Final = 1 << 16
READS_AS_ZEROS: Final = (PayloadState.UNDEFINED, PayloadState.ZERO, PayloadState.UNMAPPED)


def merge_into_parent(
    path: Path | str,
    *,
    keep_child: bool = False,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
    new_guid: GuidFactory = uuid4,
    progress: Progress = silent,
) -> Path:
    """Make the parent of the differencing disk at ``path`` read as that disk does; return the parent's path.

    The disk is then removed, unless ``keep_child``; its own children, in the folders of both and in
    ``allowed_folders``, become the parent's. Children in other folders must be relinked by the caller before. Cut off,
    it is completed by calling it again.
    Raises ParentError where there is no parent, or it has other children, or is larger; as ``open_writable`` does.
    """
    path = Path(path)
    with open_vhdx(path, allowed_folders=allowed_folders, files=files) as disk:
        if disk.parent is None:
            raise disk.parent_error or ParentError("the disk has no parent to merge it into", path=str(path))
        parent, size, parent_size = disk.parent.path, disk.size, disk.parent.size
        begun = merge_has_begun(disk)
        guid = disk.parent.image.data_write_guid if begun else new_guid()
        refuse_siblings(disk, allowed_folders=allowed_folders, files=files)
    if size < parent_size:
        raise ParentError(
            f"its parent is larger, {parent_size} bytes: nothing says what is past its end", path=str(path)
        )
    with open_writable(parent, allowed_folders=allowed_folders, files=files, new_guid=new_guid):
        # The parent can be written to, and by nobody else: now the child may expect it to change.
        if not begun:
            add_linkage(path, guid, files=files, new_guid=new_guid)
    if size > parent_size:
        resize_to(parent, size, allowed_folders=allowed_folders, files=files, new_guid=new_guid, data_write_guid=guid)
    with (
        open_writable(parent, allowed_folders=allowed_folders, files=files, new_guid=new_guid) as target,
        open_vhdx(path, files=files, with_parents=False) as source,
    ):
        writer_of(target).set_data_write_guid(guid)
        _copy_child(source, target, progress)
    for child in find_children(path, folders=(parent.parent, *allowed_folders), files=files):
        if child.is_current:
            relink(child.path, parent, files=files, new_guid=new_guid)
    if keep_child:
        relink(path, parent, files=files, new_guid=new_guid)
    else:
        files.remove(path)
    return parent


def merge_has_begun(disk: VhdxDisk) -> bool:
    """Whether a merge of ``disk`` into its parent was cut off after the parent began to change."""
    if disk.parent is None:
        return False
    guid, linkages = disk.parent.image.data_write_guid, parent_linkages(disk.image)
    return guid in linkages[1:] and guid != linkages[0]


def refuse_siblings(disk: VhdxDisk, *, allowed_folders: Sequence[Path | str], files: Files) -> None:
    """Raise ParentError where the parent of ``disk`` has other children, which a merge would take their parent from.

    A merge that has begun goes on: disks that name the parent by the GUID that it has since were linked to it when it
    was to read as ``disk`` does, and it will.
    """
    if disk.parent is None or merge_has_begun(disk):
        return
    parent = disk.parent.path
    folders = (disk.path.absolute().parent, *allowed_folders)
    others = [
        child.path.name
        for child in find_children(parent, folders=folders, files=files)
        if child.is_current and not child.path.samefile(disk.path)
    ]
    if others:
        raise ParentError(
            f"its parent {parent.name} has other children, which need it as it is: {', '.join(others)}",
            path=str(disk.path),
            hint="merge or remove those first, or convert this disk, parents included, into a new one",
        )


def _copy_child(source: VhdxDisk, target: VhdxDisk, progress: Progress) -> None:
    """Write to ``target`` what ``source`` says of its own, its parents left out."""
    buffer = bytearray(PIECE_SIZE)
    unflushed = 0
    for window in source.stored():
        for start, end in window.tolist():
            for offset in range(start, end, PIECE_SIZE):
                piece = memoryview(buffer)[: min(PIECE_SIZE, end - offset)]
                source.read_into(offset, piece)
                target.write_at(offset, piece)
                unflushed += len(piece)
                if unflushed >= FLUSH_SIZE:
                    target.flush()
                    unflushed = 0
            progress(end, source.size, "merging")
    for start, end in _zero_ranges(source):
        target.trim(start, end - start)
    progress(source.size, source.size, "merging")


def _zero_ranges(source: VhdxDisk) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the disk's blocks that read as zeros whatever its parent holds."""
    geometry = source.image.geometry
    for first in range(0, geometry.block_count, WINDOW_BLOCKS):
        states = source.image.bat.payload_states(first, min(geometry.block_count, first + WINDOW_BLOCKS))
        zero = np.isin(states, READS_AS_ZEROS)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], zero, [False]]).astype(np.int8)))
        for start, end in (edges.reshape(-1, 2) + first).tolist():
            yield start * geometry.block_size, min(end * geometry.block_size, geometry.virtual_size)
