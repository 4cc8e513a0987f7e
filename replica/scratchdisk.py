"""A disk that may be written to over one that may not: what is written goes to a scratch file, and ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import numpy as np

from vhdx.disk import Disk, Extents, ReadableBuffer, WritableBuffer
from vhdx.extents import clipped, merged
from vhdx.osfile import OS_FILES, File
from vhdx.raw import check_range
from vhdx.temporary import temporary_path

GRANULE_BYTES: Final = 64 << 10  # what a first write to it copies


class ScratchDisk:
    """A ``vhdx.disk.Disk`` over ``below``, which is never written. For one thread at a time.

    The scratch file is sparse and as long as what was written; memory: some 100 bytes a granule written.
    """

    read_only = False

    def __init__(self, below: Disk, folder: Path) -> None:
        """Make the scratch file in ``folder``. Raises OsError."""
        self._below = below
        self._file: File = OS_FILES.open(temporary_path(folder / "scratch"), create=True)
        self._places: dict[int, int] = {}  # granule → its place in the scratch file, bytes
        self.path = below.path
        self.format = below.format

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._below.size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._below.sector_size

    @property
    def written_bytes(self) -> int:
        """How much the scratch file holds."""
        return len(self._places) * GRANULE_BYTES

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        check_range(self.path, self.size, offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``."""
        view = memoryview(buffer).cast("B")
        check_range(self.path, self.size, offset, len(view))
        for start, end, place in self._runs(offset, offset + len(view)):
            part = view[start - offset : end - offset]
            if place is None:
                self._below.read_into(start, part)
            else:
                self._file.pread_into(place, part)

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``. Raises OsError where the scratch file's disk is full."""
        view = memoryview(data).cast("B")
        check_range(self.path, self.size, offset, len(view))
        for start, end in self._pieces(offset, offset + len(view)):
            granule = start // GRANULE_BYTES
            part = view[start - offset : end - offset]
            place = self._places.get(granule)
            if place is not None:
                self._file.pwrite(place + start % GRANULE_BYTES, part)
                continue
            first = granule * GRANULE_BYTES
            last = min(first + GRANULE_BYTES, self.size)
            content: ReadableBuffer = part
            if end - start < last - first:
                whole = bytearray(self._below.read_at(first, last - first))
                whole[start - first : end - first] = part
                content = whole
            place = len(self._places) * GRANULE_BYTES
            self._file.pwrite(place, content)
            self._places[granule] = place  # only once it is written: a full disk leaves the old content

    def trim(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        check_range(self.path, self.size, offset, length)
        zeros = bytes(GRANULE_BYTES)
        for start, end in self._pieces(offset, offset + length):
            self.write_at(start, memoryview(zeros)[: end - start])

    def flush(self) -> None:
        """Do nothing: a scratch file has nothing to outlive."""

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that may hold data, as ``Disk`` says."""
        end = self.size if end is None else min(end, self.size)
        granules = np.array(sorted(self._places), np.int64)
        written = np.stack((granules, granules + 1), axis=1) * GRANULE_BYTES
        position = start
        for extents in self._below.allocated(start, end):
            stop = int(extents[-1, 1])
            yield merged([extents, clipped(written, position, stop)])
            position = stop
        rest = clipped(written, position, end)
        if len(rest):
            yield rest

    def close(self) -> None:
        """Throw the scratch file away. Safe to repeat."""
        self._file.close()
        OS_FILES.remove(self._file.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        while start < end:
            stop = min(end, (start // GRANULE_BYTES + 1) * GRANULE_BYTES)
            yield start, stop
            start = stop

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield (start, end, place in the scratch file or None), neighbours below as one."""
        below: tuple[int, int] | None = None
        for first, last in self._pieces(start, end):
            place = self._places.get(first // GRANULE_BYTES)
            if place is None:
                below = (below[0] if below else first, last)
                continue
            if below:
                yield *below, None
                below = None
            yield first, last, place + first % GRANULE_BYTES
        if below:
            yield *below, None
