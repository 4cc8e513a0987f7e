"""VHD disks: fixed, dynamic and differencing, opened, read and written.

A fixed disk is its payload with a footer behind. A dynamic disk keeps blocks wherever the BAT says, each behind a
bitmap of the sectors that were written; the others read as zeros, or in a differencing disk from the parent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from vhdx.disk import Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import CorruptDiskError, DiskError
from vhdx.extents import clipped, merged, runs_of
from vhdx.osfile import OS_FILES, ZEROS, File, Files
from vhdx.raw import RawDisk, check_range, check_writable
from vhdx.vhd_layout import Layout, read_layout, table_problems
from vhdx.vhd_parent import open_parent, resolved
from vhdx.vhd_structures import SECTOR_SIZE, UNUSED_ENTRY, DiskType, Footer, Header
from vhdx.vhd_writer import VhdWriter

WINDOW_BLOCKS: Final = 1 << 16  # BAT entries looked at in one step of ``allocated``
BITMAP_CACHE_BYTES: Final = 8 << 20
BITMAP_WINDOW_BYTES: Final = 1 << 17  # bitmaps turned into sector runs in one step of ``changed``: 1 Mi sectors

Bitmap = npt.NDArray[np.uint8]


class FixedVhdDisk(RawDisk):
    """A fixed VHD: raw bytes, and a footer that is never touched."""

    format = "vhd"

    def __init__(self, file: File, layout: Layout) -> None:
        super().__init__(file, size=layout.footer.current_size)
        self.layout = layout

    @property
    def footer(self) -> Footer:
        """The footer."""
        return self.layout.footer


class SparseVhdDisk:
    """A dynamic or differencing VHD.

    ``parent`` is None for a disk without one, and where it could not be opened: then ``parent_error`` says why. Such a
    disk still tells of itself and reads what it holds; reading what only the parent has raises that error.
    """

    format = "vhd"
    sector_size = SECTOR_SIZE

    def __init__(
        self, file: File, layout: Layout, *, parent: VhdDisk | None = None, parent_error: DiskError | None = None
    ) -> None:
        assert layout.header is not None and layout.table is not None
        self.file = file
        self.layout = layout
        self.footer: Footer = layout.footer
        self.header: Header = layout.header
        self.parent = parent
        self.parent_error = parent_error
        self._table = layout.table
        self._size = layout.footer.current_size
        self._bitmaps: dict[int, Bitmap] = {}
        self._bitmaps_lock = threading.Lock()
        self._bitmaps_most = max(16, BITMAP_CACHE_BYTES // self.header.bitmap_size)
        self._writer = VhdWriter(file, layout) if file.writable else None
        self._closed = False

    @property
    def path(self) -> Path:
        """The image file."""
        return self.file.path

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._size

    @property
    def block_size(self) -> int:
        """Bytes of payload in a block."""
        return self.header.block_size

    @property
    def chain(self) -> tuple[VhdDisk, ...]:
        """This disk, its parent, and so on down to the last that could be opened."""
        links: list[VhdDisk] = [self]
        while isinstance(links[-1], SparseVhdDisk) and links[-1].parent is not None:
            links.append(links[-1].parent)
        return tuple(links)

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._writer is None

    # --- reading

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Raises OutOfRangeError, CorruptDiskError, ParentError, OsError."""
        check_range(self.path, self._size, offset, length)
        buffer = bytearray(length)
        self._fill(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``. Raises as ``read_at``."""
        view = memoryview(buffer).cast("B")
        check_range(self.path, self._size, offset, len(view))
        self._fill(offset, view)

    def _fill(self, offset: int, view: memoryview) -> None:
        block_size = self.block_size
        done = 0
        while done < len(view):
            block, within = divmod(offset + done, block_size)
            length = min(block_size - within, len(view) - done)
            piece = view[done : done + length]
            if self._entry(block) == UNUSED_ENTRY:
                self._fill_absent(offset + done, piece)
            else:
                self._fill_from_block(block, within, piece)
            done += length

    def _fill_from_block(self, block: int, within: int, view: memoryview) -> None:
        payload = self._payload_offset(block)
        for start, end, present in self._runs(block, within, within + len(view)):
            piece = view[start - within : end - within]
            if not present:
                self._fill_absent(block * self.block_size + start, piece)
            elif self.file.pread_into(payload + start, piece) != len(piece):
                raise self._cut_short(block)

    def _fill_absent(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what the disk holds where it holds nothing itself."""
        within_parent = 0
        if self.footer.kind is DiskType.DIFFERENCING:
            parent = self._opened_parent()
            within_parent = max(0, min(len(view), parent.size - offset))
            if within_parent:
                parent.read_into(offset, view[:within_parent])
        for start in range(within_parent, len(view), len(ZEROS)):
            piece = view[start : start + len(ZEROS)]
            piece[:] = ZEROS[: len(piece)]

    def _opened_parent(self) -> VhdDisk:
        if self.parent is None:
            known = self.parent_error
            assert known is not None
            # A new object each time: an exception keeps the traceback of where it was raised last.
            raise type(known)(known.message, path=known.path, offset=known.offset, hint=known.hint) from known
        return self.parent

    def _entry(self, block: int) -> int:
        return int(self._table[block])

    def _payload_offset(self, block: int) -> int:
        return self._entry(block) * SECTOR_SIZE + self.header.bitmap_size

    def _cut_short(self, block: int) -> CorruptDiskError:
        return CorruptDiskError(
            f"block {block} reaches past the end of the file",
            path=str(self.path),
            offset=self._entry(block) * SECTOR_SIZE,
            hint="the file is incomplete: copy it again, or restore it",
        )

    # --- bitmaps

    def _bitmap(self, block: int) -> Bitmap:
        """Return the block's bitmap, a bit a sector; the array is the disk's own: do not change it."""
        with self._bitmaps_lock:
            if (cached := self._bitmaps.get(block)) is not None:
                return cached
        stored = bytearray(self.header.bitmap_size)
        if self.file.pread_into(self._entry(block) * SECTOR_SIZE, memoryview(stored)) != len(stored):
            raise self._cut_short(block)
        bitmap = np.frombuffer(stored, dtype=np.uint8)
        with self._bitmaps_lock:
            while len(self._bitmaps) >= self._bitmaps_most:
                del self._bitmaps[next(iter(self._bitmaps))]
            return self._bitmaps.setdefault(block, bitmap)

    def _runs(self, block: int, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Cut the bytes [start, end) of a block into runs that are present in it or not."""
        first, last = start // SECTOR_SIZE, -(-end // SECTOR_SIZE)
        bits = np.unpackbits(self._bitmap(block)[first // 8 : -(-last // 8)])[first % 8 :][: last - first]
        cuts = (np.flatnonzero(bits[1:] != bits[:-1]) + 1 + first) * SECTOR_SIZE
        edges = [start, *cuts.tolist(), end]
        present = bool(bits[0]) if len(bits) else False
        return [
            (edges[position], edges[position + 1], present ^ bool(position % 2)) for position in range(len(edges) - 1)
        ]

    # --- maps

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents of allocated blocks, the parent's united with them, from the BAT alone.

        Raises ParentError where a differencing disk's parent cannot be opened.
        """
        end = self._size if end is None else end
        check_range(self.path, self._size, start, end - start)
        parent = self._opened_parent() if self.footer.kind is DiskType.DIFFERENCING else None
        for window_start, window_end in self._windows(start, end, WINDOW_BLOCKS):
            own = self._own_blocks(window_start, window_end)
            if parent is not None and window_start < parent.size:
                theirs = parent.allocated(window_start, min(window_end, parent.size))
                own = merged([own, *theirs])
            if len(own):
                yield own

    def stored(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents of the blocks that this very file has within [start, end), from the BAT alone."""
        end = self._size if end is None else end
        check_range(self.path, self._size, start, end - start)
        for window_start, window_end in self._windows(start, end, WINDOW_BLOCKS):
            own = self._own_blocks(window_start, window_end)
            if len(own):
                yield own

    def changed(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that this file itself holds, to the sector, from BAT and bitmaps alone.

        In a differencing disk these are what may differ from the parent.
        """
        end = self._size if end is None else end
        check_range(self.path, self._size, start, end - start)
        blocks_a_window = max(1, BITMAP_WINDOW_BYTES // self.header.bitmap_size)
        for window_start, window_end in self._windows(start, end, blocks_a_window):
            first, last = window_start // self.block_size, -(-window_end // self.block_size)
            extents = [
                self._present_sectors(block)
                for block in (np.flatnonzero(self._table[first:last] != UNUSED_ENTRY) + first).tolist()
            ]
            held = clipped(merged(extents), window_start, window_end)
            if len(held):
                yield held

    def _windows(self, start: int, end: int, blocks: int) -> Iterator[tuple[int, int]]:
        step = blocks * self.block_size
        for edge in range(start // step * step, end, step):
            yield max(start, edge), min(end, edge + step)

    def _own_blocks(self, start: int, end: int) -> Extents:
        first, last = start // self.block_size, -(-end // self.block_size)
        blocks = runs_of(self._table[first:last] != UNUSED_ENTRY) + first
        return clipped(blocks * self.block_size, start, end)

    def _present_sectors(self, block: int) -> Extents:
        bits = np.unpackbits(self._bitmap(block))[: self.block_size // SECTOR_SIZE]
        return runs_of(bits.astype(np.bool_)) * SECTOR_SIZE + block * self.block_size

    # --- writing

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``. Raises OutOfRangeError, ReadOnlyError, OsError, UnsupportedDiskError (full)."""
        view = memoryview(data).cast("B")
        check_range(self.path, self._size, offset, len(view))
        check_writable(self.path, self.read_only)
        done = 0
        while done < len(view):
            block, within = divmod(offset + done, self.block_size)
            length = min(self.block_size - within, len(view) - done)
            self._write_to_block(block, within, view[done : done + length])
            done += length

    def _write_to_block(self, block: int, within: int, view: memoryview) -> None:
        assert self._writer is not None
        if self._entry(block) == UNUSED_ENTRY:
            differencing = self.footer.kind is DiskType.DIFFERENCING
            # Sectors of a new block read as zeros, which is what an absent sector of a dynamic disk is: all present.
            bitmap = np.full(self.header.bitmap_size, 0 if differencing else 0xFF, dtype=np.uint8)
            if differencing:
                within, view = self._widened(block, within, view, bitmap)
            self._writer.allocate(block, bitmap)
            self._remember(block, bitmap)
        else:
            bitmap = self._bitmap(block)
            within, view = self._widened(block, within, view, bitmap)
        self.file.pwrite(self._payload_offset(block) + within, view)
        first, last = within // SECTOR_SIZE, -(-(within + len(view)) // SECTOR_SIZE)
        bits = np.unpackbits(bitmap)
        if not bits[first:last].all():
            bits[first:last] = 1
            bitmap = np.packbits(bits)
            self._remember(block, bitmap)
            self._writer.set_bitmap(block, bitmap)

    def _widened(self, block: int, within: int, view: memoryview, bitmap: Bitmap) -> tuple[int, memoryview]:
        """Extend a write to whole sectors where it begins or ends within one that the block does not hold yet."""
        bits = np.unpackbits(bitmap)
        end = within + len(view)
        head = within % SECTOR_SIZE if not bits[within // SECTOR_SIZE] else 0
        tail = -end % SECTOR_SIZE if not bits[(end - 1) // SECTOR_SIZE] else 0
        if not head and not tail:
            return within, view
        start = block * self.block_size
        before = self.read_at(start + within - head, head)
        after = self.read_at(start + end, tail)
        return within - head, memoryview(b"".join((before, view, after)))

    def _remember(self, block: int, bitmap: Bitmap) -> None:
        with self._bitmaps_lock:
            self._bitmaps[block] = bitmap

    def trim(self, offset: int, length: int) -> None:
        """Make the range read as zeros; holes are made in allocated blocks, which stay allocated."""
        check_range(self.path, self._size, offset, length)
        check_writable(self.path, self.read_only)
        end = offset + length
        while offset < end:
            block, within = divmod(offset, self.block_size)
            part = min(self.block_size - within, end - offset)
            if self.footer.kind is DiskType.DIFFERENCING:
                self._zero_over_parent(offset, part)
            elif self._entry(block) != UNUSED_ENTRY:
                self.file.punch_hole(self._payload_offset(block) + within, part)
            offset += part

    def _zero_over_parent(self, offset: int, length: int) -> None:
        """Write zeros where this disk or its parent may hold something else."""
        for extents in self.allocated(offset, offset + length):
            for start, end in extents.tolist():
                for position in range(start, end, len(ZEROS)):
                    self.write_at(position, ZEROS[: min(len(ZEROS), end - position)])

    def flush(self) -> None:
        """Return once everything written is on stable storage, the tables that lead to it last."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush if writable, and close the file and the parents. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self.file.close()
            if self.parent is not None:
                self.parent.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


VhdDisk: TypeAlias = FixedVhdDisk | SparseVhdDisk


@dataclass(frozen=True, slots=True)
class OpenChain:
    """What opening a chain carries from child to parent: where parents may lie, and who is open already."""

    roots: tuple[Path, ...]
    children: tuple[Path, ...]
    files: Files

    def open(self, path: Path, *, writable: bool = False) -> VhdDisk:
        """Open the image at ``path``, whose child, grandchild… are ``children``, and its parents."""
        file = self.files.open(path, writable=writable)
        try:
            layout = read_layout(file)
            if layout.header is None:
                return FixedVhdDisk(file, layout)
            if writable:
                _refuse_unsound(file, layout)
            parent, parent_error = None, None
            if layout.footer.kind is DiskType.DIFFERENCING:
                below = OpenChain(self.roots, (*self.children, resolved(path)), self.files)
                try:
                    parent = open_parent(file, layout, below)
                except DiskError as error:
                    parent_error = error
            return SparseVhdDisk(file, layout, parent=parent, parent_error=parent_error)
        except BaseException:
            file.close()
            raise


def _refuse_unsound(file: File, layout: Layout) -> None:
    if problems := table_problems(layout):
        raise CorruptDiskError(
            f"{problems[0].message}; nothing can be written to it",
            path=str(file.path),
            offset=problems[0].offset,
            hint="convert it to a new image: what can be read is kept",
        )


def open_vhd(
    path: Path | str,
    *,
    writable: bool = False,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
) -> VhdDisk:
    """Open a VHD of any kind, with its parents if it has any.

    Parents are opened for reading, from the image's own folder or ``allowed_folders``. A disk opened for writing must
    have a sound BAT: nothing is written into a file whose blocks overlap.
    Raises CorruptDiskError, UnsupportedDiskError, FormatUnknownError, OsError, DiskBusyError.
    """
    path = Path(path)
    roots = tuple(resolved(folder) for folder in (path.absolute().parent, *allowed_folders))
    return OpenChain(roots, (), files).open(path, writable=writable)
