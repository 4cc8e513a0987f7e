"""One NBD connection after its handshake: requests are worked on at once, and answered as they finish."""

from __future__ import annotations

import errno
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from replica.errors import GodwitError
from replica.nbd import wire
from replica.nbd.negotiation import CONTEXT_ID, LARGEST_REQUEST_BYTES, Agreement, receive
from replica.nbd.wire import Chunk, ChunkFlag, Command, CommandFlag, ErrorNumber, NbdError, NbdGoneError
from vhdx.disk import Disk
from vhdx.errors import DiskError, OutOfRangeError, ReadOnlyError

REQUESTS_IN_FLIGHT: Final = 32  # of one connection
BYTES_IN_FLIGHT: Final = 64 << 20  # of one connection; a single request may be as large
MOST_STATUS_EXTENTS: Final = 1 << 16
ZEROS: Final = bytes(1 << 20)

PARTS_A_CALL: Final = 512  # systems take 1,024 at most

_READING: Final = (Command.READ, Command.CACHE, Command.BLOCK_STATUS, Command.FLUSH)


@runtime_checkable
class InParts(Protocol):
    """A disk that hands out its bytes where they lie."""

    def read_parts(self, offset: int, length: int) -> Sequence[memoryview]:
        """Return the bytes of a range, in their order."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytearray


class Service:
    """Serves one disk over one connection until the client leaves."""

    def __init__(
        self,
        connection: socket.socket,
        agreement: Agreement,
        pool: ThreadPoolExecutor,
        report: Callable[[Exception], None],
        guard: AbstractContextManager[object],
    ) -> None:
        """Work in ``pool``; ``report`` takes what goes wrong with the disk; ``guard`` is held over each use of it."""
        self._connection = connection
        self._disk = agreement.disk
        self._structured = agreement.structured
        self._status = agreement.status
        self._pool = pool
        self._report = report
        self._guard = guard
        self._sending = threading.Lock()
        self._room = threading.Condition()
        self._requests = self._bytes = 0

    def run(self) -> None:
        """Return when the client has taken its leave and all its requests are answered. Raises NbdError."""
        try:
            while (request := self._next()) is not None:
                self._enter(request)
                self._pool.submit(self._work, request)
        finally:
            with self._room:
                self._room.wait_for(lambda: not self._requests)

    def _next(self) -> Request | None:
        try:
            header = receive(self._connection, wire.REQUEST.size)
        except NbdGoneError:
            return None
        magic, flags, command, cookie, offset, length = wire.REQUEST.unpack(header)
        if magic != wire.REQUEST_MAGIC:
            raise NbdError("the client does not speak the protocol")
        if command == Command.DISCONNECT:
            return None
        data = bytearray()
        if command == Command.WRITE:
            if length > LARGEST_REQUEST_BYTES:
                raise NbdError(f"the client writes {length} bytes at once")
            data = receive(self._connection, length)
        return Request(command, flags, cookie, offset, length, data)

    def _enter(self, request: Request) -> None:
        """Wait until there is room for another request, so that a client cannot take all memory."""
        size = self._weight(request)
        with self._room:
            self._room.wait_for(
                lambda: (
                    not self._requests
                    or (self._requests < REQUESTS_IN_FLIGHT and self._bytes + size <= BYTES_IN_FLIGHT)
                )
            )
            self._requests += 1
            self._bytes += size

    def _weight(self, request: Request) -> int:
        return request.length if request.command in (Command.READ, Command.WRITE) else 0

    def _work(self, request: Request) -> None:
        try:
            try:
                self._do(request)
            except (DiskError, GodwitError, MemoryError) as error:
                number = _error_number(error)
                if number not in (ErrorNumber.INVAL, ErrorNumber.PERM):
                    self._report(error)
                self._fail(request, number, str(error))
        except OSError:  # the client is gone: its own connection's thread sees that too
            pass
        finally:
            with self._room:
                self._requests -= 1
                self._bytes -= self._weight(request)
                self._room.notify_all()

    def _do(self, request: Request) -> None:
        disk, offset, length = self._disk, request.offset, request.length
        if request.command == Command.FLUSH:
            with self._guard:
                disk.flush()
            self._done(request)
            return
        if request.command not in tuple(Command):
            self._fail(request, ErrorNumber.INVAL, f"there is no command {request.command}")
            return
        if request.command not in _READING and disk.read_only:
            self._fail(request, ErrorNumber.PERM, "the export is read-only")
            return
        too_much = request.command == Command.READ and length > LARGEST_REQUEST_BYTES
        if offset + length > disk.size or too_much or not length:
            writes = request.command in (Command.WRITE, Command.WRITE_ZEROES)
            number = ErrorNumber.NOSPC if writes and length else ErrorNumber.INVAL
            self._fail(request, number, f"{length} bytes at {offset} of a disk of {disk.size}")
            return
        if request.command == Command.READ:
            self._read(request)
        elif request.command == Command.BLOCK_STATUS:
            self._block_status(request)
        elif request.command == Command.CACHE:
            with self._guard:
                for start in range(offset, offset + length, len(ZEROS)):
                    disk.read_at(start, min(len(ZEROS), offset + length - start))
            self._done(request)
        else:
            self._change(request)
            self._done(request)

    def _change(self, request: Request) -> None:
        disk, offset, end = self._disk, request.offset, request.offset + request.length
        with self._guard:
            if request.command == Command.WRITE:
                disk.write_at(offset, request.data)
            elif request.command == Command.WRITE_ZEROES and request.flags & CommandFlag.NO_HOLE:
                for start in range(offset, end, len(ZEROS)):
                    disk.write_at(start, ZEROS[: min(len(ZEROS), end - start)])
            else:
                disk.trim(offset, request.length)
            if request.flags & CommandFlag.FUA:
                disk.flush()

    def _read(self, request: Request) -> None:
        with self._guard:
            content = read_parts(self._disk, request.offset, request.length)
        if self._structured:
            head = self._chunk(request, Chunk.DATA, wire.OFFSET.size + request.length)
            self._send(head + wire.OFFSET.pack(request.offset), content)
        else:
            self._send(wire.NUMBER.pack(wire.SIMPLE_REPLY_MAGIC) + wire.SIMPLE_REPLY.pack(0, request.cookie), content)

    def _block_status(self, request: Request) -> None:
        if not self._status:
            self._fail(request, ErrorNumber.INVAL, "no metadata context was agreed on")
            return
        most = 1 if request.flags & CommandFlag.REQ_ONE else MOST_STATUS_EXTENTS
        parts: list[bytes] = []
        nothing = wire.STATE_HOLE | wire.STATE_ZERO
        with self._guard:
            extents = self._extents(request.offset, request.offset + request.length)
        for start, end, held in extents:
            parts.append(wire.NUMBER.pack(end - start) + wire.NUMBER.pack(0 if held else nothing))
            if len(parts) == most:
                break
        data = wire.NUMBER.pack(CONTEXT_ID) + b"".join(parts)
        self._send(self._chunk(request, Chunk.BLOCK_STATUS, len(data)) + data)

    def _extents(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Return (start, end, whether it may hold data), without gaps, neighbours of one kind as one."""
        found: list[tuple[int, int, bool]] = []

        def add(first: int, last: int, held: bool) -> None:
            if first >= last:
                return
            if found and found[-1][2] == held:
                found[-1] = (found[-1][0], last, held)
            else:
                found.append((first, last, held))

        position = start
        for extents in self._disk.allocated(start, end):
            for first, last in extents.tolist():
                add(position, first, False)
                add(first, last, True)
                position = last
            if len(found) > MOST_STATUS_EXTENTS:
                return found[:MOST_STATUS_EXTENTS]
        add(position, end, False)
        return found

    def _chunk(self, request: Request, kind: Chunk, length: int) -> bytes:
        head = wire.NUMBER.pack(wire.STRUCTURED_REPLY_MAGIC)
        return head + wire.CHUNK.pack(ChunkFlag.DONE, kind, request.cookie, length)

    def _done(self, request: Request) -> None:
        if self._structured:
            self._send(self._chunk(request, Chunk.NONE, 0))
        else:
            self._send(wire.NUMBER.pack(wire.SIMPLE_REPLY_MAGIC) + wire.SIMPLE_REPLY.pack(0, request.cookie))

    def _fail(self, request: Request, number: ErrorNumber, message: str) -> None:
        if self._structured:
            text = message.encode()[: wire.MOST_MESSAGE_BYTES]
            data = wire.ERROR.pack(number, len(text)) + text
            self._send(self._chunk(request, Chunk.ERROR, len(data)) + data)
        else:
            self._send(wire.NUMBER.pack(wire.SIMPLE_REPLY_MAGIC) + wire.SIMPLE_REPLY.pack(number, request.cookie))

    def _send(self, head: bytes, content: Sequence[memoryview] = ()) -> None:
        with self._sending:
            if not content:
                self._connection.sendall(head)
                return
            parts: list[memoryview | bytes] = [head, *content]
            for start in range(0, len(parts), PARTS_A_CALL):
                _send_parts(self._connection, parts[start : start + PARTS_A_CALL])


def read_parts(disk: Disk, offset: int, length: int) -> Sequence[memoryview]:
    """Return a range of the disk as buffers, uncopied where the disk can hand them out."""
    if isinstance(disk, InParts):
        return disk.read_parts(offset, length)
    content = bytearray(length)
    disk.read_into(offset, content)
    return (memoryview(content),)


def _send_parts(connection: socket.socket, parts: Sequence[memoryview | bytes]) -> None:
    sent = 0
    if sys.platform != "win32":
        sent = connection.sendmsg(parts)
    for part in parts:
        if sent >= len(part):
            sent -= len(part)
            continue
        connection.sendall(memoryview(part)[sent:])
        sent = 0


def _error_number(error: Exception) -> ErrorNumber:
    if isinstance(error, ReadOnlyError):
        return ErrorNumber.PERM
    if isinstance(error, OutOfRangeError):
        return ErrorNumber.INVAL
    if isinstance(error, MemoryError):
        return ErrorNumber.NOMEM
    cause = error.__cause__
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return ErrorNumber.NOSPC if full else ErrorNumber.IO
