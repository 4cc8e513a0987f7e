"""What every disk format offers: a size, bytes by offset, and which extents hold data.

An extent is a half-open byte range of the virtual disk. Many extents travel as one array: shape (n, 2), dtype int64,
column 0 the first byte, column 1 the byte after the last; sorted, not empty, not overlapping, not touching.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Extents: TypeAlias = npt.NDArray[np.int64]
WritableBuffer: TypeAlias = bytearray | memoryview
ReadableBuffer: TypeAlias = bytes | bytearray | memoryview


class Disk(Protocol):
    """A virtual disk: what a guest sees, whatever file holds it.

    Reads may come from several threads at once; writes come from one thread at a time and not beside reads.
    Offsets and lengths are bytes; any alignment is accepted. Every call raises a ``vhdx.errors.DiskError`` on trouble.
    """

    @property
    def path(self) -> Path:
        """The file that was opened (the child, in a differencing chain)."""

    @property
    def format(self) -> str:
        """The format's name: ``vhdx``, ``vhd``, ``raw``."""

    @property
    def size(self) -> int:
        """Virtual size, bytes."""

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes: 512 or 4096."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``; what was never written reads as zeros."""

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` with the bytes from ``offset``."""

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``; durable after the next ``flush``."""

    def trim(self, offset: int, length: int) -> None:
        """Make the range read as zeros, giving storage back where the format can."""

    def flush(self) -> None:
        """Return once everything written before is on stable storage."""

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that may hold data within [start, end), through all parents, in ascending windows.

        What lies outside them reads as zeros. Extents are cut at window edges, so that memory stays bounded;
        payload is never read.
        """

    def close(self) -> None:
        """Flush if writable, and let the file go. Safe to repeat."""

    def __enter__(self) -> Disk: ...

    def __exit__(self, *exc: object) -> None: ...
