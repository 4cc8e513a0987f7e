"""The VHDX disk: what a guest sees of one image and its parents. Reading is here; writing is a writer's that is given.

A read goes block by block through the BAT, joins what lies together in the file, and reads it straight into the
caller's buffer. Several threads may read at once: nothing but the BAT's page cache is shared, and that has its lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from vhdx.disk import Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import CorruptDiskError, OutOfRangeError, ParentError, ReadOnlyError
from vhdx.image import VhdxImage
from vhdx.maps import allocated_extents, changed_extents
from vhdx.structures import BAT_STATE_MASK, MIB, PayloadState

BATCH_BLOCKS = 4096  # BAT entries that one read looks up at a time
MAX_RUNS = 32  # a piece of a partially present block in more runs than this is read whole and picked apart
PIECE_SIZE = 4 * MIB  # of a partially present block, taken at a time: bounds what is read and not used

_CLEAR, _ZERO, _DATA = range(3)  # where a run of bytes comes from: the parent, nowhere, this file


class Writer(Protocol):
    """What changes an image; ``VhdxDisk`` checks ranges and hands over. Writes come from one thread at a time."""

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes within the disk."""

    def trim(self, offset: int, length: int) -> None:
        """Make a range within the disk read as zeros."""

    def flush(self) -> None:
        """Return once everything written is durable."""

    def close(self) -> None:
        """Leave the file clean. The image is closed afterwards. Safe to repeat."""


class VhdxDisk:
    """An image and its parents as one ``vhdx.disk.Disk``.

    ``parent`` is None for a disk without one, and where the parent was not found: then ``parent_error`` says why, and
    reading raises it where the parent is needed. ``writer``, given at the start or set later, makes it writable.
    Closing the disk closes its image and its parents.
    """

    def __init__(
        self,
        image: VhdxImage,
        parent: VhdxDisk | None = None,
        *,
        parent_error: ParentError | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.image = image
        self.parent = parent
        self.parent_error = parent_error
        self.writer = writer

    @property
    def path(self) -> Path:
        """The image's file."""
        return self.image.path

    @property
    def format(self) -> str:
        """Always ``vhdx``."""
        return "vhdx"

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self.image.geometry.virtual_size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self.image.geometry.sector_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.writer is None

    @property
    def chain(self) -> tuple[VhdxDisk, ...]:
        """This disk, its parent, and so on down to the last that was found."""
        links: list[VhdxDisk] = []
        link: VhdxDisk | None = self
        while link is not None:
            links.append(link)
            link = link.parent
        return tuple(links)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        self._check_range(offset, length)
        buffer = bytearray(length)
        self._read(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``; payload goes from the file straight into it.

        Raises OutOfRangeError, CorruptDiskError, OsError, and ParentError where a parent is needed and missing.
        """
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        self._read(offset, view)

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``. Raises ReadOnlyError without a writer."""
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        self._writer().write_at(offset, view)

    def trim(self, offset: int, length: int) -> None:
        """Make the range read as zeros. Raises ReadOnlyError without a writer."""
        self._check_range(offset, length)
        self._writer().trim(offset, length)

    def flush(self) -> None:
        """Return once everything written is durable."""
        if self.writer is not None:
            self.writer.flush()

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that may hold data within [start, end), through all parents, in ascending windows.

        Raises ParentError where the chain is not whole.
        """
        links = self.chain
        if links[-1].image.geometry.has_parent:
            raise links[-1]._missing_parent()
        return allocated_extents([link.image for link in links], *self._bounds(start, end))

    def stored(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents within [start, end) whose data stand in this very file, parents left out."""
        return allocated_extents([self.image], *self._bounds(start, end))

    def changed(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents within [start, end) that this file says anything of: where it may differ from its parent.

        That is data and what reads as zeros whatever the parent holds. Of a disk without a parent: its data.
        """
        return changed_extents([self.image], *self._bounds(start, end))

    def changed_since(
        self, ancestor: VhdxDisk | Path | str, start: int = 0, end: int | None = None
    ) -> Iterator[Extents]:
        """Yield the extents in which this disk may differ from ``ancestor``, a disk of its chain or that one's path.

        Raises ParentError where the chain does not lead there.
        """
        links: list[VhdxImage] = []
        for link in self.chain:
            if link is ancestor or (not isinstance(ancestor, VhdxDisk) and _same_path(link.path, Path(ancestor))):
                return changed_extents(links, *self._bounds(start, end), ancestor_size=link.size)
            links.append(link.image)
        name = ancestor.path if isinstance(ancestor, VhdxDisk) else ancestor
        raise ParentError(f"{name} is no parent of this disk", path=str(self.path))

    def close(self) -> None:
        """Flush if writable, and let the files of the whole chain go. Safe to repeat."""
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            self.image.close()
            if self.parent is not None:
                self.parent.close()

    def __enter__(self) -> VhdxDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _writer(self) -> Writer:
        if self.writer is None:
            raise ReadOnlyError("the disk was opened for reading", path=str(self.path))
        return self.writer

    def _missing_parent(self) -> ParentError:
        return self.parent_error or ParentError("the disk was opened without its parent", path=str(self.path))

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(
                f"the range of {length} bytes at {offset} is outside the disk of {self.size}", path=str(self.path)
            )

    def _bounds(self, start: int, end: int | None) -> tuple[int, int]:
        end = self.size if end is None else end
        self._check_range(start, max(0, end - start))
        return start, end

    def _read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``, within the disk, joining blocks whose bytes come from one place."""
        image, block_size = self.image, self.image.geometry.block_size
        end = offset + len(view)
        position = offset
        run_kind, run_start, run_place = -1, offset, 0  # the run of bytes that is being joined, up to position
        while position < end:
            first = position // block_size
            last = min(-(-end // block_size), first + BATCH_BLOCKS)
            if last - first == 1:
                entries = [image.bat.payload_entry(first)]
            else:
                entries = image.bat.payload_entries(first, last).tolist()
            for block, entry in enumerate(entries, first):
                block_start = block * block_size
                stop = min(end, block_start + block_size)
                state = entry & BAT_STATE_MASK
                kind, place = _ZERO, 0
                if state == PayloadState.FULLY_PRESENT:
                    kind, place = _DATA, image.block_offset(block, entry) + position - block_start
                elif state == PayloadState.NOT_PRESENT and image.geometry.has_parent:
                    kind = _CLEAR
                elif state > PayloadState.UNMAPPED:
                    self._fill(run_kind, run_start, run_place, view[run_start - offset : position - offset])
                    self._read_partial(block, entry, position, view[position - offset : stop - offset])
                    run_kind, run_start, position = -1, stop, stop
                    continue
                if kind != run_kind or (kind == _DATA and place != run_place + position - run_start):
                    self._fill(run_kind, run_start, run_place, view[run_start - offset : position - offset])
                    run_kind, run_start, run_place = kind, position, place
                position = stop
        self._fill(run_kind, run_start, run_place, view[run_start - offset :])

    def _fill(self, kind: int, offset: int, place: int, view: memoryview) -> None:
        """Fill ``view``, which stands at ``offset`` of the disk, from the parent, with zeros, or from the file."""
        if not view:
            return
        if kind == _DATA:
            filled = self.image.view.pread_into(place, view)
            if filled != len(view):
                raise CorruptDiskError(
                    f"the file ends inside the payload of byte {offset + filled} of the disk",
                    path=str(self.path),
                    offset=place + filled,
                )
        elif kind == _ZERO:
            np.frombuffer(view, dtype=np.uint8).fill(0)
        else:
            self._read_parent(offset, view)

    def _read_parent(self, offset: int, view: memoryview) -> None:
        parent = self.parent
        if parent is None:
            raise self._missing_parent()
        inside = min(len(view), max(0, parent.size - offset))  # past a smaller parent's end there is nothing
        if inside:
            parent._read(offset, view[:inside])
        if inside < len(view):
            np.frombuffer(view[inside:], dtype=np.uint8).fill(0)

    def _read_partial(self, block: int, entry: int, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``, within a partially present block, as its sector bitmap says."""
        image, geometry = self.image, self.image.geometry
        if entry & BAT_STATE_MASK != PayloadState.PARTIALLY_PRESENT or not geometry.has_parent:
            index = geometry.payload_index(block)
            raise CorruptDiskError(
                f"payload block {block} has state {entry & BAT_STATE_MASK}, which this disk cannot have",
                path=str(self.path),
                offset=image.bat_region.offset + index * 8,
            )
        place = image.block_offset(block, entry) - block * geometry.block_size  # of byte 0 of the disk, were it here
        chunk, bitmap_start = geometry.bitmap_place(block)
        for start in range(offset, offset + len(view), PIECE_SIZE):
            piece = view[start - offset : start - offset + PIECE_SIZE]
            first = (start - block * geometry.block_size) // geometry.sector_size
            last = -(-(start + len(piece) - block * geometry.block_size) // geometry.sector_size)
            packed = image.read_bitmap(chunk, bitmap_start + first // 8, bitmap_start + -(-last // 8))
            bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
            bits = bits[first % 8 : first % 8 + last - first]
            edges = np.flatnonzero(bits[1:] != bits[:-1]) + 1
            if len(edges) >= MAX_RUNS:
                self._pick(bits, start, place + start, piece)
                continue
            base = block * geometry.block_size + first * geometry.sector_size
            bounds = [start, *(base + edges * geometry.sector_size).tolist(), start + len(piece)]
            for index, (low, high) in enumerate(pairwise(bounds)):
                kind = _DATA if bool(bits[0]) == (index % 2 == 0) else _CLEAR
                self._fill(kind, low, place + low, piece[low - start : high - start])

    def _pick(
        self, bits: np.ndarray[tuple[int], np.dtype[np.uint8]], start: int, place: int, piece: memoryview
    ) -> None:
        """Fill ``piece`` from the parent, then put this file's sectors over it: two reads in place of one per run."""
        sector = self.sector_size
        self._fill(_CLEAR, start, 0, piece)
        own = np.empty(len(piece), dtype=np.uint8)
        self._fill(_DATA, start, place, own.data)
        target = np.frombuffer(piece, dtype=np.uint8)
        mask = np.repeat(bits.astype(bool), sector)[start % sector : start % sector + len(piece)]
        np.copyto(target, own, where=mask)


def _same_path(one: Path, other: Path) -> bool:
    return one == other or one.absolute() == other.absolute()
