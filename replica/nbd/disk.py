"""A disk behind an NBD server, for reading: several connections, extents by the server's metadata contexts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import numpy as np

from replica.nbd.connection import STATUS_BYTES, Connection
from replica.nbd.wire import ALLOCATION, DIRTY_BITMAP, STATE_DIRTY, STATE_ZERO, Address, NbdError
from vhdx.disk import Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import ReadOnlyError
from vhdx.extents import clipped, runs_of
from vhdx.raw import check_range

CONNECTIONS: Final = 8


class NbdDisk:
    """An export as a ``vhdx.disk.Disk``. Threads read at once, each on a connection of its own while it reads."""

    sector_size = 512
    read_only = True

    def __init__(
        self,
        address: Address,
        export: str = "",
        *,
        name: str | None = None,
        format: str = "raw",  # noqa: A002 - what everyone calls it
        timeout_seconds: float = 30,
        connections: int = CONNECTIONS,
    ) -> None:
        """Connect. ``name`` is what errors and ``path`` call the disk, ``format`` what stands behind the server.

        Raises NbdError where the server cannot be reached or does not suit.
        """
        self._address = address
        self._export = export
        self._timeout = timeout_seconds
        self.path = Path(name or str(address))
        self.format = format
        self._slots = threading.Semaphore(connections)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        first = self._connect(ALLOCATION)
        self._idle = [first]
        self.size: int = first.size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Raises OutOfRangeError, NbdError."""
        check_range(self.path, self.size, offset, length)
        data = bytearray(length)
        self.read_into(offset, data)
        return bytes(data)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``. Raises OutOfRangeError, NbdError."""
        view = memoryview(buffer).cast("B")
        check_range(self.path, self.size, offset, len(view))
        with self._connection() as connection:
            connection.read_into(offset, view)

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Refuse. Raises ReadOnlyError."""
        raise ReadOnlyError("the disk was opened for reading", path=str(self.path))

    def trim(self, offset: int, length: int) -> None:
        """Refuse. Raises ReadOnlyError."""
        raise ReadOnlyError("the disk was opened for reading", path=str(self.path))

    def flush(self) -> None:
        """Do nothing: nothing is written."""

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents within [start, end) that the server does not call zeros; all where it cannot tell."""
        end = self.size if end is None else end
        check_range(self.path, self.size, start, end - start)
        at = start
        while at < end:
            with self._connection() as connection:
                if connection.context_id is None:
                    stop = min(end, at + STATUS_BYTES)
                    window = np.array([[at, stop]], np.int64)
                else:
                    window, stop = _extents(connection, at, end, STATE_ZERO, wanted=0)
            if len(window):
                yield window
            at = stop

    def changed(self, bitmap: str) -> Iterator[Extents]:
        """Yield the extents that the dirty bitmap of that name marks. Raises NbdError where it is not exported."""
        context = f"{DIRTY_BITMAP}{bitmap}"
        with self._connect(context) as connection:
            if connection.context_id is None:
                raise NbdError(f"the NBD server does not export the dirty bitmap {bitmap}", path=str(self.path))
            at = 0
            while at < self.size:
                window, at = _extents(connection, at, self.size, STATE_DIRTY, wanted=STATE_DIRTY)
                if len(window):
                    yield window

    def close(self) -> None:
        """Disconnect. Safe to repeat."""
        with self._lock:
            self._closed.set()
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _connect(self, context: str) -> Connection:
        return Connection(self._address, self._export, context, timeout_seconds=self._timeout)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """Lend a connection. One that an error was met on is not used again."""
        with self._slots:
            with self._lock:
                if self._closed.is_set():
                    raise NbdError("the disk was closed", path=str(self.path))
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connect(ALLOCATION)
                if connection.size != self.size:
                    connection.close()
                    raise NbdError("the export's size changed", path=str(self.path))
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            with self._lock:
                if not self._closed.is_set():
                    self._idle.append(connection)
                    return
            connection.close()


def _extents(connection: Connection, start: int, end: int, flag: int, *, wanted: int) -> tuple[Extents, int]:
    """Ask about [start, end); return the extents whose ``flag`` is as ``wanted``, and how far the answer reaches."""
    descriptors = connection.extents(start, end - start)
    edges = np.concatenate(([start], start + np.cumsum(descriptors[:, 0], dtype=np.int64)))
    runs = runs_of((descriptors[:, 1] & flag) == wanted)
    stop = min(int(edges[-1]), end, start + STATUS_BYTES)
    return clipped(edges[runs].reshape(-1, 2), start, stop), stop
