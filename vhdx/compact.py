"""Making a VHDX file as small as its data: blocks that hold nothing are given back, the others moved down.

Three steps, each safe to be cut off anywhere and to be begun again:

1. Blocks of zeros, partially present ones without a sector of their own, and unmapped ones that kept their places
   (for whoever writes to them next) lose them, by the log.
2. From the file's end downwards, a block is copied into the lowest gap that takes it. The copy is flushed before the
   log entry that lets the BAT point to it; until then the old place is in force, and is not written to.
3. Once the log is empty (its entries say how long the file was), the file is cut behind its last structure.

What a guest reads never changes, so the DataWriteGuid stays, and children of the disk stay valid. A gap smaller than
a payload block is left to sector bitmaps. Takes 17 bytes of memory for each block that has a place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from vhdx.errors import CorruptDiskError
from vhdx.headers import GuidFactory
from vhdx.image import VhdxImage
from vhdx.osfile import OS_FILES, File, Files
from vhdx.progress import Progress, silent
from vhdx.structures import (
    BAT_OFFSET_SHIFT,
    BAT_STATE_MASK,
    HEADER_SECTION_SIZE,
    MIB,
    SECTOR_BITMAP_BLOCK_SIZE,
    BitmapState,
    PayloadState,
    decode_bat_entry,
)
from vhdx.vhdx import VhdxDisk
from vhdx.writer import PRESENT, Writer, open_writable, writer_of

PIECE_SIZE: Final = 4 * MIB
WINDOW_ENTRIES: Final = 1 << 16
MOVES_PER_COMMIT: Final = 64
MAY_KEEP_PLACE: Final = (PayloadState.UNDEFINED, PayloadState.UNMAPPED)  # read as zeros, and may be written in place


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What compacting did: file sizes in bytes before and after, blocks that lost their place, blocks moved."""

    size_before: int
    size_after: int
    blocks_released: int
    blocks_moved: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where blocks stand in the file, ascending: for each its place, its length, and its BAT entry's index."""

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]

    @property
    def end(self) -> int:
        """The first byte behind the last block."""
        return int((self.offsets + self.lengths).max()) if len(self.offsets) else 0


def compact_disk(
    path: Path | str, *, files: Files = OS_FILES, new_guid: GuidFactory = uuid4, progress: Progress = silent
) -> CompactResult:
    """Make the file as small as its data allows; what the disk reads as does not change.

    A fixed disk keeps its blocks, and only what stands behind its last one goes. Raises as ``open_writable`` does,
    and CorruptDiskError for a BAT that contradicts itself.
    """
    with open_writable(path, files=files, new_guid=new_guid, with_parents=False) as disk:
        writer, before = writer_of(disk), disk.image.file.size()
        released = moved = 0
        if not disk.image.metadata.file_parameters.leave_blocks_allocated:
            released = _release(disk, writer, progress)
            moved = _move_down(disk, writer, progress)
        cut_file(disk)
        return CompactResult(before, disk.image.file.size(), released, moved)


def cut_file(disk: VhdxDisk) -> None:
    """Empty the log, then cut the file behind its last structure. The disk must not be written to after."""
    writer = writer_of(disk)
    end = max(block_places(disk.image).end, *(stop for _, stop in reserved(disk.image)))
    if end < writer.file.size():
        writer.begin_change()
        writer.close()
        writer.file.truncate(end)
        writer.file.fsync()


def reserved(image: VhdxImage) -> list[tuple[int, int]]:
    """Return the ranges of the file that are not blocks: the headers, the log and the regions."""
    log = (image.header.log_offset, image.header.log_offset + image.header.log_length)
    regions = [(region.offset, region.offset + region.length) for region in image.regions.entries]
    return [(0, HEADER_SECTION_SIZE), log, *regions]


def block_places(image: VhdxImage) -> Places:
    """Return where every payload block and sector bitmap block stands; unmapped ones may have kept their places."""
    geometry = image.geometry
    offsets, lengths, indices = [], [], []
    for start in range(0, geometry.entry_count, WINDOW_ENTRIES):
        entries = image.bat.get_range(start, min(geometry.entry_count, start + WINDOW_ENTRIES))
        index = np.arange(start, start + len(entries), dtype=np.int64)
        is_bitmap = index % (geometry.chunk_ratio + 1) == geometry.chunk_ratio
        states = entries & np.uint64(7)
        kept = np.isin(states, MAY_KEEP_PLACE) & (entries >> np.uint64(BAT_OFFSET_SHIFT) != 0)
        present = np.where(is_bitmap, states == BitmapState.PRESENT, kept | (states >= PayloadState.FULLY_PRESENT))
        offsets.append((entries[present] >> np.uint64(20) << np.uint64(20)).astype(np.int64))
        lengths.append(np.where(is_bitmap[present], SECTOR_BITMAP_BLOCK_SIZE, geometry.block_size).astype(np.int64))
        indices.append(index[present])
    offset = np.concatenate(offsets)
    order = np.argsort(offset, kind="stable")
    return Places(offset[order], np.concatenate(lengths)[order], np.concatenate(indices)[order])


def _release(disk: VhdxDisk, writer: Writer, progress: Progress) -> int:
    """Take their places from blocks that need none; return how many."""
    geometry = disk.image.geometry
    released = 0
    for first in range(0, geometry.block_count, WINDOW_ENTRIES):
        entries = writer.bat.payload_entries(first, min(geometry.block_count, first + WINDOW_ENTRIES))
        states = entries & np.uint64(BAT_STATE_MASK)
        kept = np.isin(states, MAY_KEEP_PLACE) & (entries >> np.uint64(BAT_OFFSET_SHIFT) != 0)
        for block in (np.flatnonzero(kept) + first).tolist():
            writer.begin_change()
            writer.set_payload_entry(block, PayloadState(int(states[block - first])))
            released += 1
        for block in (np.flatnonzero(np.isin(states, PRESENT)) + first).tolist():
            state, place = writer.block(block)
            empty = None
            if state == PayloadState.FULLY_PRESENT and _is_zero(writer.file, place, geometry.block_size):
                empty = PayloadState.ZERO
            elif state == PayloadState.PARTIALLY_PRESENT and not any(_bitmap(disk.image, block)):
                empty = PayloadState.NOT_PRESENT
            if empty is not None:
                writer.begin_change()
                writer.set_payload_entry(block, empty)
                released += 1
            progress(block * geometry.block_size, disk.size, "looking for zeros")
        writer.flush()
    return released


def _bitmap(image: VhdxImage, block: int) -> bytes:
    chunk, start = image.geometry.bitmap_place(block)
    return image.read_bitmap(chunk, start, start + image.geometry.sectors_per_block // 8)


def _is_zero(file: File, offset: int, length: int) -> bool:
    """Whether the range of the file reads as zeros; holes are not read."""
    for low, high in file.data_extents(offset, offset + length):
        for start in range(low, high, PIECE_SIZE):
            data = file.pread(start, min(PIECE_SIZE, high - start))
            if data.count(0) != len(data):
                return False
    return True


def _move_down(disk: VhdxDisk, writer: Writer, progress: Progress) -> int:
    """Move blocks from the file's end into gaps; return how many."""
    geometry = disk.image.geometry
    places = block_places(disk.image)
    _check_places(disk.image, places)
    gaps = Gaps(places, reserved(disk.image))
    moved = 0
    for number in range(len(places.offsets) - 1, -1, -1):
        old, length = int(places.offsets[number]), int(places.lengths[number])
        target = gaps.take(length, below=old)
        if target is None:
            if length == min(SECTOR_BITMAP_BLOCK_SIZE, geometry.block_size):
                break  # nothing that stands lower finds a gap either
            continue
        writer.begin_change()
        _copy(writer.file, old, target, length)
        index = int(places.indices[number])
        state, _ = decode_bat_entry(writer.bat.entry(index))
        writer.set_entry(index, target | state)
        moved += 1
        if moved % MOVES_PER_COMMIT == 0:
            writer.flush()
        progress(moved * length, 0, "moving blocks")
    writer.flush()
    return moved


def _check_places(image: VhdxImage, places: Places) -> None:
    """Raise CorruptDiskError unless blocks lie apart from each other and the structures, and in the file."""
    taken = reserved(image)
    starts = np.concatenate([places.offsets, np.array([start for start, _ in taken], dtype=np.int64)])
    ends = np.concatenate([places.offsets + places.lengths, np.array([end for _, end in taken], dtype=np.int64)])
    order = np.argsort(starts, kind="stable")
    overlaps = np.flatnonzero(starts[order][1:] < ends[order][:-1])
    if len(overlaps) or places.end > image.file.size():
        place = int(starts[order][overlaps[0] + 1]) if len(overlaps) else image.file.size()
        raise CorruptDiskError(
            "blocks overlap, or lie outside the file: nothing can be moved safely",
            path=str(image.path),
            offset=place,
            hint="check the disk, and copy what can be read to a new one",
        )


def _copy(file: File, source: int, target: int, length: int) -> None:
    # The gap may hold what a block left there: zero it, then copy what is not a hole.
    file.punch_hole(target, length)
    for low, high in file.data_extents(source, source + length):
        for start in range(low, high, PIECE_SIZE):
            file.pwrite(target + start - source, file.pread(start, min(PIECE_SIZE, high - start)))


class Gaps:
    """The ranges of a file that nothing uses, taken from the lowest upwards."""

    def __init__(self, places: Places, taken: list[tuple[int, int]]) -> None:
        self._gaps = list(_between(places, taken))
        self._next: dict[int, int] = {}  # by length: the first gap that may still take one of that length

    def take(self, length: int, *, below: int) -> int | None:
        """Return the lowest place for ``length`` bytes that ends at ``below`` or before, and take it."""
        number = self._next.get(length, 0)
        while number < len(self._gaps):
            start, end = self._gaps[number]
            if start + length > below:
                break
            if end - start >= length:
                self._gaps[number] = (start + length, end)
                self._next[length] = number
                return start
            number += 1
        self._next[length] = number
        return None


def _between(places: Places, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the gaps between blocks and other structures, ascending, each a multiple of 1 MiB."""
    starts = np.concatenate([places.offsets, np.array([start for start, _ in taken], dtype=np.int64)])
    ends = np.concatenate([places.offsets + places.lengths, np.array([end for _, end in taken], dtype=np.int64)])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    for number in np.flatnonzero(starts[1:] > ends[:-1]).tolist():
        start, end = -(-int(ends[number]) // MIB) * MIB, int(starts[number + 1]) // MIB * MIB
        if start < end:
            yield start, end
