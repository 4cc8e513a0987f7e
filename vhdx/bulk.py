"""A new VHDX being filled: nothing of it is durable or visible until it is whole, so it needs no log.

The BAT lives in memory and is written by ``commit``, which then flushes the file and gives it its name. A crash
before that leaves a nameless temporary file and nothing else. The BAT costs 8 bytes for each payload block in pages
of 512 entries, and only where blocks are allocated: 16 MiB for 64 TiB in 32 MiB blocks, all of them holding data.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vhdx.disk import Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import DiskError, OsError, OutOfRangeError
from vhdx.osfile import File, Files
from vhdx.structures import BAT_ENTRY_SIZE, PayloadState

PAGE_BLOCKS: Final = 512


class BulkDisk:
    """A fresh fixed or dynamic disk, written in any order, that gets its name by ``commit``.

    ``write_at`` allocates blocks as it meets them, at the end of the file, and then must be called by one thread
    only. Ranges that were given to ``prepare`` have their blocks already: writing to them touches no metadata, and
    any number of threads may do so at once, to ranges that do not overlap, and read at the same time.
    It satisfies ``Disk``; ``close`` without ``commit`` throws the file away, and ``flush`` makes nothing durable,
    since a file without a name cannot survive a crash anyway.
    """

    format: Final = "vhdx"
    read_only: Final = False

    def __init__(
        self,
        file: File,
        path: Path,
        *,
        size: int,
        sector_size: int,
        block_size: int,
        chunk_ratio: int,
        bat_offset: int,
        payload_offset: int,
        fixed: bool,
        overwrite: bool,
        files: Files,
    ) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._sector_size = sector_size
        self._block_size = block_size
        self._chunk_ratio = chunk_ratio
        self._bat_offset = bat_offset
        self._payload_offset = payload_offset
        self._end = file.size()
        self._fixed = fixed
        self._overwrite = overwrite
        self._files = files
        self._pages: dict[int, npt.NDArray[np.int64]] = {}  # page → file offset of each block, 0 where it has none
        self._allocating = threading.Lock()
        self._open = True

    @property
    def path(self) -> Path:
        """Where the file will be."""
        return self._path

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._sector_size

    def prepare(self, extents: Extents) -> None:
        """Allocate the blocks that the extents touch, in ascending order, so that threads may write there at once.

        ``extents`` is shaped (n, 2), half-open byte ranges, sorted. What is prepared and then not written reads as
        zeros. Call it as often as wanted, from any thread; others may go on writing to ranges that were prepared
        before, since a block that has a place keeps it and the file only grows.
        """
        if len(extents) and (int(extents.min()) < 0 or int(extents[:, 1].max()) > self._size):
            raise OutOfRangeError(f"extents reach outside the disk of {self._size} bytes", path=str(self._path))
        if self._fixed:
            return
        with self._allocating:
            before = self._end
            for start, end in extents.tolist():
                if start < end:
                    self._allocate(start // self._block_size, (end - 1) // self._block_size + 1)
            if self._end > before:
                self._file.truncate(self._end)

    def _allocate(self, first: int, last: int) -> None:
        """Give the blocks of [first, last) that have none a place at the file's end."""
        while first < last:
            number, begin = divmod(first, PAGE_BLOCKS)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = np.zeros(PAGE_BLOCKS, dtype=np.int64)
            end = min(PAGE_BLOCKS, begin + last - first)
            places = page[begin:end]
            missing = np.flatnonzero(places == 0)
            places[missing] = self._end + np.arange(len(missing), dtype=np.int64) * self._block_size
            self._end += len(missing) * self._block_size
            first += end - begin

    def _place(self, block: int) -> int:
        """Return where ``block`` lies in the file, 0 where it has no place."""
        if self._fixed:
            return self._payload_offset + block * self._block_size
        page = self._pages.get(block // PAGE_BLOCKS)
        return 0 if page is None else int(page[block % PAGE_BLOCKS])

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (position in the request, length, file offset or 0), neighbours in the file as one run."""
        self._check(offset, length)
        run_at, run_length, run_place = 0, 0, 0
        done = 0
        while done < length:
            block, within = divmod(offset + done, self._block_size)
            count = min(length - done, self._block_size - within)
            place = self._place(block)
            place += within if place else 0
            if run_length and (place == run_place + run_length if place and run_place else place == run_place):
                run_length += count
            else:
                if run_length:
                    yield run_at, run_length, run_place
                run_at, run_length, run_place = done, count, place
            done += count
        if run_length:
            yield run_at, run_length, run_place

    def _check(self, offset: int, length: int) -> None:
        if not self._open:
            raise DiskError("the disk is closed", path=str(self._path))
        if offset < 0 or length < 0 or offset + length > self._size:
            raise OutOfRangeError(
                f"{length} bytes at {offset} reach outside the disk of {self._size} bytes", path=str(self._path)
            )

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``: one file write for each run of neighbouring blocks, without copying."""
        view = memoryview(data).cast("B")
        for position, length, place in self._runs(offset, len(view)):
            if not place:
                with self._allocating:
                    first = (offset + position) // self._block_size
                    self._allocate(first, (offset + position + length - 1) // self._block_size + 1)
                    self._file.truncate(self._end)
                # At a fresh file end the blocks of the run are neighbours, but an earlier one may lie between.
                self.write_at(offset + position, view[position : position + length])
            else:
                self._file.pwrite(place, view[position : position + length])

    def read_at(self, offset: int, length: int) -> bytes:
        """Return what was written so far."""
        self._check(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` with what was written so far."""
        view = memoryview(buffer).cast("B")
        for position, length, place in self._runs(offset, len(view)):
            done = self._file.pread_into(place, view[position : position + length]) if place else 0
            view[position + done : position + length] = bytes(length - done)

    def trim(self, offset: int, length: int) -> None:
        """Make the range read as zeros; blocks keep their places."""
        for _, run_length, place in self._runs(offset, length):
            if place:
                self._file.punch_hole(place, run_length)

    def flush(self) -> None:
        """Do nothing: ``commit`` makes all of it durable at once."""

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents of allocated blocks, as ``Disk`` says."""
        end = self._size if end is None else min(end, self._size)
        size = self._block_size
        if self._fixed:
            if start < end:
                yield np.array([[start, end]], dtype=np.int64)
            return
        for number in sorted(number for number in self._pages if number * PAGE_BLOCKS * size < end):
            held = np.concatenate([[False], self._pages[number] != 0, [False]])
            edges = np.flatnonzero(held[1:] != held[:-1]).reshape(-1, 2) + number * PAGE_BLOCKS
            extents: Extents = np.clip(edges * size, start, end)
            extents = extents[extents[:, 0] < extents[:, 1]]
            if len(extents):
                yield extents

    def commit(self) -> None:
        """Write the BAT, flush, and give the file its name; the disk is then closed.

        Raises OsError; the file is thrown away then, and what stood at its path before is as it was.
        """
        self._check(0, 0)
        try:
            for offset, entries in self._bat():
                self._file.pwrite(offset, entries)
            self._file.fsync()
            self._file.close()
            name_file(self._files, self._file.path, self._path, overwrite=self._overwrite)
        except BaseException:
            self.abort()
            raise
        self._open = False

    def _bat(self) -> Iterator[tuple[int, memoryview]]:
        """Yield file offset and bytes of each page of the BAT that has blocks, sector bitmap entries between."""
        for number, places in sorted(self._pages.items()):
            block = np.arange(number * PAGE_BLOCKS, (number + 1) * PAGE_BLOCKS, dtype=np.int64)
            index = block + block // self._chunk_ratio
            entries = np.zeros(int(index[-1] - index[0]) + 1, dtype="<u8")
            present = places != 0
            entries[(index - index[0])[present]] = places[present].astype(np.uint64) | np.uint64(
                PayloadState.FULLY_PRESENT
            )
            # Past the last block everything is zero, and the region is zero already: it need not be written.
            count = int(index[present][-1] - index[0]) + 1 if present.any() else 0
            yield self._bat_offset + int(index[0]) * BAT_ENTRY_SIZE, entries[:count].data.cast("B")

    def abort(self) -> None:
        """Throw the file away. Safe to repeat, and after ``commit`` it does nothing."""
        if self._open:
            self._open = False
            self._file.close()
            self._files.remove(self._file.path)

    def close(self) -> None:
        """Throw the file away unless it was committed. Safe to repeat."""
        self.abort()

    def __enter__(self) -> BulkDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()


def name_file(files: Files, temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Give the finished ``temporary`` its name. Raises OsError where one exists that may not be replaced."""
    if overwrite:
        files.replace(temporary, path)
    elif not files.link_exclusive(temporary, path):
        raise file_exists(path)


def file_exists(path: Path) -> OsError:
    """Return the error that says a file must not be replaced."""
    return OsError("the file exists already", path=str(path), hint="choose another name, or ask to overwrite it")
