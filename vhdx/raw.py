"""Raw images: the disk's bytes and nothing else, holes where the file system has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from vhdx.disk import Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import CorruptDiskError, OutOfRangeError, ReadOnlyError, UnsupportedDiskError
from vhdx.osfile import OS_FILES, File, Files

WINDOW_EXTENTS = 16384  # extents in one array of ``allocated``


class RawDisk:
    """The bytes [0, size) of a file as a ``Disk``. Fixed VHD is the same with a footer behind."""

    format = "raw"
    sector_size = 512

    def __init__(self, file: File, *, size: int | None = None) -> None:
        self.file = file
        self._size = file.size() if size is None else size
        self._closed = False

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = False, files: Files = OS_FILES) -> Self:
        """Open a raw image. Raises OsError, DiskBusyError, and UnsupportedDiskError where it is no whole sectors."""
        file = files.open(Path(path), writable=writable)
        if file.size() % cls.sector_size or not file.size():
            size = file.size()
            file.close()
            raise UnsupportedDiskError(f"{size} bytes are no disk: not a multiple of 512", path=str(path))
        return cls(file)

    @property
    def path(self) -> Path:
        """The image file."""
        return self.file.path

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return not self.file.writable

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Raises OutOfRangeError, OsError, CorruptDiskError."""
        check_range(self.path, self._size, offset, length)
        data = self.file.pread(offset, length)
        if len(data) != length:
            raise self._shrunk(offset + len(data))
        return data

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``. Raises as ``read_at``."""
        view = memoryview(buffer).cast("B")
        check_range(self.path, self._size, offset, len(view))
        done = self.file.pread_into(offset, view)
        if done != len(view):
            raise self._shrunk(offset + done)

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``. Raises OutOfRangeError, ReadOnlyError, OsError."""
        view = memoryview(data).cast("B")
        check_range(self.path, self._size, offset, len(view))
        check_writable(self.path, self.read_only)
        self.file.pwrite(offset, view)

    def trim(self, offset: int, length: int) -> None:
        """Make the range a hole, or zeros where the file system has no holes."""
        check_range(self.path, self._size, offset, length)
        check_writable(self.path, self.read_only)
        self.file.punch_hole(offset, length)

    def flush(self) -> None:
        """Return once everything written is on stable storage."""
        if not self.read_only:
            self.file.fsync()

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that are not holes within [start, end), many in each array."""
        end = self._size if end is None else end
        check_range(self.path, self._size, start, end - start)
        window: list[tuple[int, int]] = []
        for extent in self.file.data_extents(start, end):
            if window and window[-1][1] == extent[0]:
                window[-1] = (window[-1][0], extent[1])
                continue
            if len(window) == WINDOW_EXTENTS:
                yield np.array(window, dtype=np.int64)
                window = []
            window.append(extent)
        if window:
            yield np.array(window, dtype=np.int64)

    def close(self) -> None:
        """Flush if writable, and close the file. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _shrunk(self, end: int) -> CorruptDiskError:
        return CorruptDiskError(
            f"the file ends within the disk, which has {self._size} bytes",
            path=str(self.path),
            offset=end,
            hint="the file became shorter while it was in use, or its copy is incomplete",
        )


def check_range(path: Path, size: int, offset: int, length: int) -> None:
    """Raise OutOfRangeError unless [offset, offset+length) lies on a disk of ``size`` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise OutOfRangeError(f"[{offset}, {offset + length}) is not on the disk of {size} bytes", path=str(path))


def check_writable(path: Path, read_only: bool) -> None:
    """Raise ReadOnlyError where ``read_only``."""
    if read_only:
        raise ReadOnlyError("the disk was opened for reading", path=str(path))
