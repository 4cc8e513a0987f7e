"""Writing to a VHDX: allocation, sector bitmaps, trim and flush, over the log.

What a crash leaves, at any instant:

- After ``flush`` has returned, everything written or trimmed before it.
- Of what was written or trimmed since, each 512-byte sector reads as before or as after, independently of others.
- Metadata is whole: the disk opens, and no block is used twice. At worst blocks at the file's end belong to nobody.

How: payload goes straight to the file, to blocks that the disk has or to fresh ones that nothing refers to yet.
Changes of the BAT and of sector bitmaps stay in memory. ``flush`` first flushes the payload, then commits the changes
through the log, sector bitmaps before the BAT and the BAT from its end to its start, so that wherever a crash cuts
between two log entries, bits are there before the block state that makes them count, and a sector bitmap block
(whose entry stands behind those of its payload blocks) before the payload state that needs it. A block that was freed
is used again only after the commit that freed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from uuid import UUID, uuid4

import numpy as np

from vhdx.chain import open_vhdx
from vhdx.disk import ReadableBuffer
from vhdx.errors import CorruptDiskError, DiskError, OutOfRangeError, UnsupportedDiskError
from vhdx.headers import GuidFactory, HeaderPair
from vhdx.image import HeaderChoice, VhdxImage
from vhdx.journal import MAX_ENTRY_SECTORS, Journal, replay_to_disk, sector_write
from vhdx.log import ReplayPlan
from vhdx.osfile import OS_FILES, File, Files
from vhdx.pending import PendingSectors
from vhdx.structures import (
    BAT_ENTRY_SIZE,
    MIB,
    SECTOR_BITMAP_BLOCK_SIZE,
    BitmapState,
    PayloadState,
    decode_bat_entry,
    encode_bat_entry,
)
from vhdx.vhdx import VhdxDisk

MAX_PENDING_SECTORS: Final = 96  # a commit of so many fits one log entry
TRIM_WINDOW_BLOCKS: Final = 1 << 16
SCAN_ENTRIES: Final = 1 << 20
ZEROS: Final = memoryview(bytes(MIB))
SECTOR_ENTRIES: Final = 4096 // BAT_ENTRY_SIZE

PRESENT: Final = (PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT)

ReadInto: TypeAlias = Callable[[int, memoryview], None]


def open_writable(
    path: Path | str,
    *,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
    new_guid: GuidFactory = uuid4,
    with_parents: bool = True,
) -> VhdxDisk:
    """Open a VHDX for reading and writing, its log replayed to disk first; parents are opened for reading only.

    Nothing is written before the first change, other than the replay. Writing changes the disk's DataWriteGuid, so
    children that were made of it are refused from then on. Raises as ``open_vhdx`` does, and DiskBusyError.
    """

    def recover(file: File, choice: HeaderChoice, plan: ReplayPlan) -> HeaderChoice:
        headers = HeaderPair(file, choice, new_guid)
        replay_to_disk(file, headers, plan)
        return headers.choice

    disk = open_vhdx(
        path,
        writable=True,
        allowed_folders=allowed_folders,
        files=files,
        recover=recover,
        with_parents=with_parents,
    )
    try:
        disk.writer = Writer(disk.image, read_into=disk.read_into, new_guid=new_guid)
    except BaseException:
        disk.close()
        raise
    return disk


def writer_of(disk: VhdxDisk) -> Writer:
    """Return the writer of a disk that ``open_writable`` opened."""
    assert isinstance(disk.writer, Writer)
    return disk.writer


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a request that lies in one payload block: [start, end) of the disk, ``place`` in the file."""

    block: int
    start: int
    end: int
    place: int
    fresh: PayloadState | None  # the state that a newly allocated block is to have, None where it has one


class Writer:
    """The writing half of an open VHDX; one thread at a time.

    It puts a view into ``image`` that shows what is not committed yet. ``read_into`` reads the virtual disk through
    all parents. In a disk that keeps its blocks (a fixed one) trim zeroes them in place.
    """

    def __init__(self, image: VhdxImage, *, read_into: ReadInto, new_guid: GuidFactory = uuid4) -> None:
        self._image = image
        self.file = image.file
        self.bat = image.bat
        self.geometry = image.geometry
        choice = HeaderChoice(image.header, image.slot, image.header_faults)
        self.headers = HeaderPair(image.file, choice, new_guid, self._note_header)
        self.journal = Journal(self.file, self.headers, new_guid)
        self._pending = PendingSectors(image.file)
        image.view = self._pending
        self._read_into = read_into
        self._keeps_blocks = image.metadata.file_parameters.leave_blocks_allocated
        self._changed_bat: set[int] = set()  # sectors of the BAT, by number
        self._end = 0  # where the next block may go; 0 until one is needed
        self._freed: list[int] = []  # blocks freed since the last commit
        self._free: list[int] = []  # blocks free for use, their places zeroed
        self._failure: DiskError | None = None
        self._closed = False

    def _note_header(self, choice: HeaderChoice) -> None:
        self._image.header, self._image.slot = choice.header, choice.slot

    # -- requests -------------------------------------------------------------------------------------------------

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset`` of the disk. Raises OutOfRangeError, OsError."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        if not view:
            return
        self.begin_data_change()
        if self.geometry.has_parent:
            self._write_child(offset, view)
        else:
            self._write_pieces(offset, view)
        self._commit_if_many()

    def trim(self, offset: int, length: int) -> None:
        """Make the range read as zeros; whole blocks are given back unless the disk keeps its blocks."""
        self._check(offset, length)
        if not length:
            return
        self.begin_data_change()
        block_size = self.geometry.block_size
        end = offset + length
        # The last block is whole when the trim reaches the disk's end.
        first = -(-offset // block_size)
        last = self.geometry.block_count if end == self.geometry.virtual_size else end // block_size
        if first >= last or self._keeps_blocks:
            self._zero(offset, end)
            return
        self._zero(offset, min(end, first * block_size))
        for window in range(first, last, TRIM_WINDOW_BLOCKS):
            self._free_blocks(window, min(last, window + TRIM_WINDOW_BLOCKS))
        if last * block_size < end:
            self._zero(last * block_size, end)

    def flush(self) -> None:
        """Return once everything written and trimmed is on stable storage and would survive a crash."""
        self._check(0, 0)
        with self._failing():
            self.file.fsync()
            self._commit()

    def close(self) -> None:
        """Flush and empty the log. After a failure nothing is written: the next open replays what was committed."""
        if self._failure is None and not self._closed:
            self._closed = True
            self.flush()
            with self._failing():
                self.journal.close()

    def begin_change(self) -> None:
        """Announce a change in the headers that neither a guest nor a child disk can see."""
        self._check(0, 0)
        with self._failing():
            self.headers.begin_change()

    def set_data_write_guid(self, guid: UUID) -> None:
        """Announce changes that a guest can see, under this DataWriteGuid in place of a random one."""
        self._check(0, 0)
        with self._failing():
            self.headers.set_data_write_guid(guid)

    def begin_data_change(self) -> None:
        """Announce changes that a guest can see."""
        with self._failing():
            self.headers.begin_data_change()

    def _check(self, offset: int, length: int) -> None:
        if self._failure is not None:
            raise DiskError(
                f"the disk takes no more writes since one failed: {self._failure.message}",
                path=str(self.file.path),
                hint="close it and open it again: what was flushed is safe",
            )
        if offset < 0 or length < 0 or offset + length > self.geometry.virtual_size:
            raise OutOfRangeError(
                f"{length} bytes at {offset} reach outside the disk of {self.geometry.virtual_size} bytes",
                path=str(self.file.path),
            )

    # -- writing --------------------------------------------------------------------------------------------------

    def _write_child(self, offset: int, view: memoryview) -> None:
        """Write to a differencing disk, whose bitmap knows whole sectors only: complete the first and the last."""
        sector = self.geometry.sector_size
        end = offset + len(view)
        first, last = -(-offset // sector) * sector, end // sector * sector
        if first > last:  # inside one sector
            self._write_completed(last, offset, view)
            return
        if offset < first:
            self._write_completed(first - sector, offset, view[: first - offset])
        if first < last:
            self._write_pieces(first, view[first - offset : last - offset])
        if last < end:
            self._write_completed(last, last, view[last - offset :])

    def _write_completed(self, sector_start: int, offset: int, part: memoryview) -> None:
        whole = bytearray(self.geometry.sector_size)
        self._read_into(sector_start, memoryview(whole))
        whole[offset - sector_start : offset - sector_start + len(part)] = part
        self._write_pieces(sector_start, memoryview(whole))

    def _write_pieces(self, offset: int, view: memoryview) -> None:
        """Write to the file, then note it in the BAT and bitmaps: a failed write leaves both as they were."""
        pieces = list(self._pieces(offset, offset + len(view)))
        with self._failing():
            for start, end, place in _file_runs(pieces):
                self.file.pwrite(place, view[start - offset : end - offset])
        for piece in pieces:
            self._note_written(piece)

    def _pieces(self, start: int, end: int) -> Iterator[_Piece]:
        block_size = self.geometry.block_size
        while start < end:
            block, within = divmod(start, block_size)
            stop = min(end, (block + 1) * block_size)
            state, place = self.block(block)
            fresh = None
            if state not in PRESENT:
                whole = within == 0 and stop == min((block + 1) * block_size, self.geometry.virtual_size)
                parent_shines = self.geometry.has_parent and state == PayloadState.NOT_PRESENT
                fresh = PayloadState.PARTIALLY_PRESENT if parent_shines and not whole else PayloadState.FULLY_PRESENT
                place = self.allocate_block()
            yield _Piece(block, start, stop, place + within, fresh)
            start = stop

    def _note_written(self, piece: _Piece) -> None:
        state = piece.fresh
        if state is None:
            state = PayloadState(self.bat.payload_entry(piece.block) & 7)
        if state == PayloadState.PARTIALLY_PRESENT:
            self._note_sectors(piece)
        if piece.fresh is not None:
            within = piece.start % self.geometry.block_size
            self.set_payload_entry(piece.block, piece.fresh, piece.place - within)

    def _note_sectors(self, piece: _Piece) -> None:
        """Set the bits of the piece's sectors, those of the whole block first cleared where it is fresh."""
        geometry = self.geometry
        chunk, byte = geometry.bitmap_place(piece.block)
        state, bitmap = decode_bat_entry(self.bat.bitmap_entry(chunk))
        if state == BitmapState.PRESENT:
            self._check_place(f"the sector bitmap of chunk {chunk}", bitmap, SECTOR_BITMAP_BLOCK_SIZE)
        else:
            bitmap = self.extend(SECTOR_BITMAP_BLOCK_SIZE)
            self.set_bitmap_entry(chunk, bitmap)
        first_bit = byte * 8
        if piece.fresh is not None:
            self._pending.set_bits(bitmap, first_bit, first_bit + geometry.sectors_per_block, value=False)
        block_start = piece.block * geometry.block_size
        self._pending.set_bits(
            bitmap,
            first_bit + (piece.start - block_start) // geometry.sector_size,
            first_bit + (piece.end - block_start) // geometry.sector_size,
        )

    # -- trimming -------------------------------------------------------------------------------------------------

    def _zero(self, start: int, end: int) -> None:
        """Make [start, end) read as zeros, block by block, without changing which blocks the disk has."""
        block_size = self.geometry.block_size
        while start < end:
            block, within = divmod(start, block_size)
            stop = min(end, (block + 1) * block_size)
            state, place = self.block(block)
            if state == PayloadState.FULLY_PRESENT:
                with self._failing():
                    self.file.punch_hole(place + within, stop - start)
            elif self.geometry.has_parent and state in (PayloadState.NOT_PRESENT, PayloadState.PARTIALLY_PRESENT):
                for piece in range(start, stop, MIB):
                    self._write_child(piece, ZEROS[: min(MIB, stop - piece)])
            start = stop
        self._commit_if_many()

    def _free_blocks(self, first: int, last: int) -> None:
        """Give the blocks of [first, last) the state that reads as zeros, and their places back."""
        states = self.bat.payload_states(first, last)
        present = (states == PayloadState.FULLY_PRESENT) | (states == PayloadState.PARTIALLY_PRESENT)
        # Where no parent can shine through, a block without a place reads as zeros already.
        stay = (states == PayloadState.ZERO) if self.geometry.has_parent else ~present
        for block in (np.flatnonzero(~stay) + first).tolist():
            state, place = self.block(block)
            self.set_payload_entry(block, PayloadState.ZERO)
            if state in PRESENT:
                self._freed.append(place)
            self._commit_if_many()

    # -- metadata -------------------------------------------------------------------------------------------------

    def allocate_block(self) -> int:
        """Return a place in the file for a payload block, all zeros, that nothing refers to."""
        return self._free.pop() if self._free else self.extend(self.geometry.block_size)

    def extend(self, length: int) -> int:
        """Return the place of ``length`` fresh bytes at the file's end, a multiple of 1 MiB, all zeros."""
        if not self._end:
            self._end = self._find_end()
        place = self._end
        with self._failing():
            self.file.truncate(place + length)
        self._end += length
        return place

    def _find_end(self) -> int:
        """Return the first MiB past the file and past every block, some of which a cut file may lack."""
        end = self.file.size()
        for start in range(0, self.geometry.entry_count, SCAN_ENTRIES):
            entries = self.bat.get_range(start, min(self.geometry.entry_count, start + SCAN_ENTRIES))
            states = entries & np.uint64(7)
            places = entries[states >= PayloadState.FULLY_PRESENT] & np.uint64(~0xFFFFF & (1 << 63) - 1)
            if len(places):
                end = max(end, int(places.max()) + self.geometry.block_size)
        return -(-end // MIB) * MIB

    def block(self, block: int) -> tuple[int, int]:
        """Return state and place of a payload block. Raises CorruptDiskError where writing there would do harm."""
        entry = self.bat.payload_entry(block)
        state, place = decode_bat_entry(entry)
        bad = (4, 5) if self.geometry.has_parent else (4, 5, PayloadState.PARTIALLY_PRESENT)
        if state in bad:
            raise CorruptDiskError(f"payload block {block} has state {state}", path=str(self.file.path))
        if state in PRESENT:
            place = self._image.block_offset(block, entry)
            self._check_place(f"payload block {block}", place, self.geometry.block_size)
        if state == PayloadState.PARTIALLY_PRESENT:
            self._image.bitmap_offset(block // self.geometry.chunk_ratio)  # raises where its bits are nowhere
        return state, place

    def _check_place(self, name: str, place: int, length: int) -> None:
        """Raise CorruptDiskError where a block lies on the log or on a region: writing to it would destroy them."""
        log = (self.headers.current.log_offset, self.headers.current.log_length)
        for start, size in (log, *((region.offset, region.length) for region in self._image.regions.entries)):
            if place < start + size and start < place + length:
                raise CorruptDiskError(
                    f"{name} lies on the disk's own structures", path=str(self.file.path), offset=place
                )

    def set_payload_entry(self, block: int, state: PayloadState, place: int = 0) -> None:
        """Change a payload block's BAT entry, in memory until the next commit."""
        self.set_entry(self.geometry.payload_index(block), encode_bat_entry(state, place))

    def set_entry(self, index: int, entry: int) -> None:
        """Change a BAT entry, in memory until the next commit."""
        self.bat.set_entry(index, entry)
        self._changed_bat.add(index // SECTOR_ENTRIES)

    def set_bitmap_entry(self, chunk: int, place: int) -> None:
        """Change the place of a chunk's sector bitmap block, 0 for none, in memory until the next commit."""
        state = BitmapState.PRESENT if place else BitmapState.NOT_PRESENT
        self.set_entry(self.geometry.bitmap_index(chunk), encode_bat_entry(state, place))

    def commit_patches(self, patches: Sequence[tuple[int, bytes]]) -> None:
        """Flush, then make changes of structures (offset in the file, bytes) true together, in one log entry.

        The caller has begun a change in the headers. The image in memory does not see them: close it after.
        """
        self.flush()
        patched = PendingSectors(self.file)
        for offset, data in patches:
            patched.change(offset, data)
        if len(patched) > MAX_ENTRY_SECTORS:
            raise UnsupportedDiskError("a change of metadata is too large for one log entry", path=str(self.file.path))
        with self._failing():
            self.journal.commit([sector_write(*sector) for sector in patched.contents()])

    def _commit_if_many(self) -> None:
        if len(self._changed_bat) + len(self._pending) >= MAX_PENDING_SECTORS:
            self.flush()

    def _commit(self) -> None:
        """Commit what is pending, in the order that the module's first lines explain. The payload is flushed."""
        writes = [sector_write(offset, content) for offset, content in self._pending.contents()]
        descending = sorted(self._changed_bat, reverse=True)
        writes += [sector_write(*self.bat.sector(number * SECTOR_ENTRIES)) for number in descending]
        if not writes:
            return
        self.journal.commit_all(writes, data_is_flushed=True)
        self._pending.clear()
        self._changed_bat.clear()
        self.bat.release()
        for place in self._freed:
            self.file.punch_hole(place, self.geometry.block_size)
        self._free += self._freed
        self._freed.clear()

    def _failing(self) -> _Failing:
        return _Failing(self)

    def fail(self, error: DiskError) -> None:
        """Take no more writes: the file may not hold what memory says."""
        self._failure = error


class _Failing:
    """Around calls that write to the file: the first that fails is the last that is tried."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DiskError):
            self._writer.fail(error)


def _file_runs(pieces: list[_Piece]) -> Iterator[tuple[int, int, int]]:
    """Yield start and end on the disk and place in the file, pieces that are neighbours in the file as one."""
    start = end = place = 0
    for piece in pieces:
        if start < end and piece.place == place + end - start:
            end = piece.end
            continue
        if start < end:
            yield start, end, place
        start, end, place = piece.start, piece.end, piece.place
    if start < end:
        yield start, end, place
