"""One connection to an NBD server: the handshake, then reads and questions for extents, many requests in flight.

Nothing that the server says is trusted: every length is bounded before memory is taken for it, every cookie and
range must belong to a request that is open, and a read is complete only when each of its bytes came exactly once.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from replica.nbd import wire
from replica.nbd.wire import (
    Address,
    Chunk,
    Command,
    Information,
    NbdError,
    NbdGoneError,
    Option,
    OptionReply,
    UnixAddress,
)

PIECE_BYTES: Final = 512 << 10  # a read is cut into requests of this size
REQUESTS_IN_FLIGHT: Final = 16
STATUS_BYTES: Final = 1 << 31  # how much of the disk one question for extents covers
ZEROS: Final = bytes(64 << 10)

Descriptors = npt.NDArray[np.uint32]  # shape (n, 2): length in bytes, flags


class Connection:
    """A connection that has agreed on an export and one metadata context. For one thread at a time."""

    def __init__(self, address: Address, export: str, context: str, *, timeout_seconds: float = 30) -> None:
        """Connect and agree. ``timeout_seconds`` bounds each wait for the server.

        Without structured replies or the context on the server's side, ``context_id`` is None.
        Raises NbdError, NbdGoneError.
        """
        self._where = f"{address}" + (f", export {export!r}" if export else "")
        self._cookie = 0
        self._socket = self._connect(address, timeout_seconds)
        self.size = 0
        self.context_id: int | None = None
        self._structured = False
        self._largest = PIECE_BYTES
        with self._closed_on_error():
            self._agree(export.encode(), context.encode())

    def close(self) -> None:
        """Say good-bye where that is possible, and disconnect. Safe to repeat."""
        with contextlib.suppress(OSError):
            self._socket.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0))
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (of bytes) from ``offset``; the range lies on the disk.

        After an error the connection is closed: answers may be under way. Raises NbdError, NbdGoneError.
        """
        with self._closed_on_error():
            waiting: dict[int, _Read] = {}
            sent = 0
            while sent < len(buffer) or waiting:
                requests = []
                while sent < len(buffer) and len(waiting) < REQUESTS_IN_FLIGHT:
                    part = buffer[sent : sent + self._largest]
                    cookie = self._next_cookie()
                    waiting[cookie] = _Read(offset + sent, part)
                    requests.append(self._request(Command.READ, cookie, offset + sent, len(part)))
                    sent += len(part)
                if requests:
                    self._send(b"".join(requests))
                self._read_reply(waiting)

    def extents(self, offset: int, length: int) -> Descriptors:
        """Ask the context about a range: the lengths and flags of extents from ``offset``, which may end early or late.

        At least one row, no length of zero. Raises NbdError, NbdGoneError; the connection is closed then.
        """
        with self._closed_on_error():
            cookie = self._next_cookie()
            self._send(self._request(Command.BLOCK_STATUS, cookie, offset, min(length, STATUS_BYTES)))
            found: Descriptors | None = None
            done = False
            while not done:
                kind, done, size = self._chunk_header({cookie})[1:]
                if kind == Chunk.BLOCK_STATUS and found is None:
                    found = self._descriptors(size)
                elif kind != Chunk.NONE or size:
                    self._refuse_chunk(kind, size)
            if found is None:
                raise self._nonsense("it told no extents")
            return found

    def _descriptors(self, size: int) -> Descriptors:
        if size < 12 or (size - 4) % 8 or size > 4 + 8 * wire.MOST_EXTENTS:
            raise self._nonsense(f"{size} bytes of extents")
        data = self._receive(size)
        if wire.NUMBER.unpack_from(data)[0] != self.context_id:
            raise self._nonsense("extents of a context that was not asked for")
        found = np.frombuffer(data, ">u4", offset=4).reshape(-1, 2).astype(np.uint32)
        if not found[:, 0].all():
            raise self._nonsense("an extent of no bytes")
        return found

    # -- replies ------------------------------------------------------------------------------------------------------

    def _read_reply(self, waiting: dict[int, _Read]) -> None:
        """Take one reply, or one chunk of one, to a read."""
        if not self._structured:
            self._simple_reply(waiting)
            return
        cookie, kind, done, size = self._chunk_header(waiting.keys())
        read = waiting[cookie]
        if kind == Chunk.DATA:
            if size <= wire.OFFSET.size:
                raise self._nonsense("a piece of data without data")
            (at,) = wire.OFFSET.unpack(self._receive(wire.OFFSET.size))
            self._fill(self._part(read, at, size - wire.OFFSET.size))
        elif kind == Chunk.HOLE:
            if size != wire.HOLE.size:
                raise self._nonsense("a hole of the wrong form")
            part = self._part(read, *wire.HOLE.unpack(self._receive(size)))
            for start in range(0, len(part), len(ZEROS)):
                piece = part[start : start + len(ZEROS)]
                piece[:] = ZEROS[: len(piece)]
        elif kind != Chunk.NONE or size:
            self._refuse_chunk(kind, size)
        if done:
            if not read.is_complete():
                raise self._nonsense(f"an answer with gaps to a read at {read.offset:#x}")
            del waiting[cookie]

    def _simple_reply(self, waiting: dict[int, _Read]) -> None:
        if wire.NUMBER.unpack(self._receive(4))[0] != wire.SIMPLE_REPLY_MAGIC:
            raise self._nonsense("a reply with the wrong magic")
        error, cookie = wire.SIMPLE_REPLY.unpack(self._receive(wire.SIMPLE_REPLY.size))
        read = waiting.pop(cookie, None)
        if read is None:
            raise self._nonsense("a reply to a request that was not made")
        if error:
            raise NbdError(f"the server could not read: error {error}", path=self._where, offset=read.offset)
        self._fill(read.buffer)

    def _chunk_header(self, cookies: object) -> tuple[int, int, bool, int]:
        """Return cookie, type, whether it is the last, and length of the next chunk, which belongs to ``cookies``."""
        if wire.NUMBER.unpack(self._receive(4))[0] != wire.STRUCTURED_REPLY_MAGIC:
            raise self._nonsense("a reply with the wrong magic")
        flags, kind, cookie, size = wire.CHUNK.unpack(self._receive(wire.CHUNK.size))
        if cookie not in cookies:  # type: ignore[operator]
            raise self._nonsense("a reply to a request that was not made")
        return cookie, kind, bool(flags & wire.ChunkFlag.DONE), size

    def _refuse_chunk(self, kind: int, size: int) -> None:
        if not kind & Chunk.ERROR & 1 << 15:
            raise self._nonsense(f"a chunk of type {kind} and {size} bytes")
        if not wire.ERROR.size <= size <= wire.MOST_MESSAGE_BYTES:
            raise self._nonsense(f"an error of {size} bytes")
        data = self._receive(size)
        error, length = wire.ERROR.unpack_from(data)
        text = data[wire.ERROR.size : wire.ERROR.size + length].decode("utf-8", "replace")
        raise NbdError(f"the server reports error {error}" + (f": {text}" if text else ""), path=self._where)

    def _part(self, read: _Read, offset: int, length: int) -> memoryview:
        """Return the place of a range in its buffer, and note that it comes now."""
        start = offset - read.offset
        if start < 0 or length <= 0 or start + length > len(read.buffer):
            raise self._nonsense(f"[{offset}, {offset + length}) in answer to another range")
        read.covered.append((start, start + length))
        if len(read.covered) > PIECE_BYTES // 512:
            raise self._nonsense("an answer in more pieces than sectors")
        return read.buffer[start : start + length]

    # -- handshake ----------------------------------------------------------------------------------------------------

    def _connect(self, address: Address, timeout_seconds: float) -> socket.socket:
        try:
            if isinstance(address, UnixAddress):
                made = connect_unix(address.path, timeout_seconds)
            else:
                made = socket.create_connection((address.host, address.port), timeout_seconds)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise NbdGoneError(
                f"the NBD server cannot be reached: {error.strerror or error}", path=self._where
            ) from error
        return made

    def _agree(self, export: bytes, context: bytes) -> None:
        magic, option_magic, flags = wire.GREETING.unpack(self._receive(wire.GREETING.size))
        if (magic, option_magic) != (wire.SERVER_MAGIC, wire.OPTION_MAGIC):
            raise NbdError("this is no NBD server, or one of the old style", path=self._where)
        if not flags & wire.FIXED_NEWSTYLE:
            raise NbdError("the NBD server does not speak fixed newstyle", path=self._where)
        answer = wire.FIXED_NEWSTYLE | flags & wire.NO_ZEROES
        self._send(wire.NUMBER.pack(answer))
        self._structured = self._option(Option.STRUCTURED_REPLY, b"") is not None
        name = wire.NUMBER.pack(len(export)) + export
        if self._structured:
            question = name + wire.NUMBER.pack(1) + wire.NUMBER.pack(len(context)) + context
            for kind, data in self._option(Option.SET_META_CONTEXT, question) or ():
                if kind == OptionReply.META_CONTEXT and data[4:] == context:
                    (self.context_id,) = wire.NUMBER.unpack_from(data)
        replies = self._option(Option.GO, name + b"\0\1\0\3")  # one wish: Information.BLOCK_SIZE
        if replies is None:
            raise NbdError("the NBD server is too old: it lacks NBD_OPT_GO", path=self._where)
        for kind, data in replies:
            if kind == OptionReply.INFO:
                self._take_information(data)
        if not self.size:
            raise self._nonsense("no size of the export")

    def _take_information(self, data: bytes) -> None:
        kind = int.from_bytes(data[:2], "big") if len(data) >= 2 else -1
        if kind == Information.EXPORT:
            if len(data) != wire.EXPORT_INFO.size:
                raise self._nonsense("a description of the export of the wrong form")
            _, self.size, flags = wire.EXPORT_INFO.unpack(data)
            if not flags & wire.HAS_FLAGS or self.size >= 1 << 63:
                raise self._nonsense(f"an export of {self.size} bytes and flags {flags:#x}")
        elif kind == Information.BLOCK_SIZE:
            if len(data) != wire.BLOCK_SIZE_INFO.size:
                raise self._nonsense("block sizes of the wrong form")
            _, least, _, most = wire.BLOCK_SIZE_INFO.unpack(data)
            if least > 4096 or most < 4096:
                raise NbdError(f"requests of {least} to {most} bytes do not suit", path=self._where)
            self._largest = min(PIECE_BYTES, most // 4096 * 4096)

    def _option(self, option: Option, data: bytes) -> list[tuple[int, bytes]] | None:
        """Ask for an option; return what was replied before the acknowledgement, None where it is not supported."""
        self._send(wire.OPTION.pack(wire.OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while len(replies) <= wire.MOST_OPTION_REPLIES:
            magic, about, kind, size = wire.OPTION_REPLY.unpack(self._receive(wire.OPTION_REPLY.size))
            if magic != wire.OPTION_REPLY_MAGIC or about != option or size > wire.MOST_OPTION_REPLY_BYTES:
                raise self._nonsense(f"a reply of {size} bytes to option {about}")
            found = self._receive(size)
            if kind == OptionReply.ACK:
                return replies
            if kind == OptionReply.UNSUPPORTED:
                return None
            if kind & OptionReply.ERROR:
                raise self._refused(kind, found)
            if kind == OptionReply.META_CONTEXT and size < wire.NUMBER.size:
                raise self._nonsense("a metadata context without a number")
            replies.append((kind, found))
        raise self._nonsense("endless replies")

    def _refused(self, kind: int, data: bytes) -> NbdError:
        why = {
            OptionReply.UNKNOWN: "the NBD server has no such export",
            OptionReply.TLS_REQUIRED: "the NBD server wants TLS",
            OptionReply.POLICY: "the NBD server does not allow it",
        }.get(OptionReply(kind) if kind in tuple(OptionReply) else OptionReply.ERROR, f"refused, error {kind:#x}")
        text = data[: wire.MOST_MESSAGE_BYTES].decode("utf-8", "replace")
        return NbdError(why + (f": {text}" if text else ""), path=self._where)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _next_cookie(self) -> int:
        self._cookie += 1
        return self._cookie

    def _request(self, command: Command, cookie: int, offset: int, length: int) -> bytes:
        return wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, command, cookie, offset, length)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while len(view):
            try:
                got = self._socket.recv_into(view)
            except OSError as error:
                raise self._gone(error) from error
            if not got:
                raise NbdGoneError("the NBD server closed the connection", path=self._where)
            view = view[got:]

    def _gone(self, error: OSError) -> NbdGoneError:
        if isinstance(error, TimeoutError):
            return NbdGoneError("the NBD server was silent for too long", path=self._where)
        return NbdGoneError(f"the connection to the NBD server broke: {error.strerror or error}", path=self._where)

    def _nonsense(self, what: str) -> NbdError:
        return NbdError(f"the NBD server broke the protocol: {what}", path=self._where)

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._socket.close()
            raise


class _Read:
    """A read that was asked for, and which parts of it have come."""

    __slots__ = ("buffer", "covered", "offset")

    def __init__(self, offset: int, buffer: memoryview) -> None:
        self.offset = offset
        self.buffer = buffer
        self.covered: list[tuple[int, int]] = []

    def is_complete(self) -> bool:
        """Tell whether the parts are the whole, none of it twice."""
        end = 0
        for start, stop in sorted(self.covered):
            if start != end:
                return False
            end = stop
        return end == len(self.buffer)


def connect_unix(path: str, timeout_seconds: float) -> socket.socket:
    """Return a socket that is connected to one in the file system. Raises OSError."""
    if sys.platform == "win32":
        raise OSError("this system has no such sockets")
    else:  # noqa: RET506 - mypy looks at one branch only, by platform
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout_seconds)
            made.connect(path)
        except BaseException:
            made.close()
            raise
        return made
