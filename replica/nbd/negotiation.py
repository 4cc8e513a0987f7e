"""The server's side of an NBD handshake: what a client may ask before it reads (fixed newstyle).

Nothing that the client says is trusted: each length is bounded before memory is taken for it, and so is the number of
questions.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from replica.nbd import wire
from replica.nbd.wire import Information, NbdError, NbdGoneError, Option, OptionReply
from vhdx.disk import Disk

MOST_OPTION_BYTES: Final = 8192
MOST_OPTIONS: Final = 256
LEAST_BLOCK_BYTES: Final = 1
PREFERRED_BLOCK_BYTES: Final = 64 << 10
LARGEST_REQUEST_BYTES: Final = 32 << 20
CONTEXT_ID: Final = 1  # of base:allocation, the one context there is


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a connection is for."""

    disk: Disk
    structured: bool
    status: bool  # whether base:allocation was asked for


def receive(connection: socket.socket, count: int) -> bytearray:
    """Return exactly ``count`` bytes. Raises NbdGoneError where the client leaves before."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            got = connection.recv_into(view)
        except OSError as error:
            raise NbdGoneError(f"the client is gone: {error.strerror or error}") from error
        if not got:
            raise NbdGoneError("the client is gone")
        view = view[got:]
    return data


class Negotiation:
    """A handshake with one client over the exports of a server."""

    def __init__(self, connection: socket.socket, exports: Mapping[str, Disk]) -> None:
        self._connection = connection
        self._exports = exports
        self._structured = False
        self._context_of: str | None = None  # the export for which base:allocation was set
        self._no_zeroes = False

    def run(self) -> Agreement | None:
        """Return what was agreed on, None where the client took its leave. Raises NbdError for nonsense."""
        self._send(wire.GREETING.pack(wire.SERVER_MAGIC, wire.OPTION_MAGIC, wire.FIXED_NEWSTYLE | wire.NO_ZEROES))
        (flags,) = wire.NUMBER.unpack(receive(self._connection, wire.NUMBER.size))
        if not flags & wire.FIXED_NEWSTYLE or flags & ~(wire.FIXED_NEWSTYLE | wire.NO_ZEROES):
            raise NbdError(f"the client has flags {flags:#x}")
        self._no_zeroes = bool(flags & wire.NO_ZEROES)
        for _ in range(MOST_OPTIONS):
            magic, option, length = wire.OPTION.unpack(receive(self._connection, wire.OPTION.size))
            if magic != wire.OPTION_MAGIC or length > 1 << 20:
                raise NbdError(f"the client asks nonsense: option {option} with {length} bytes")
            data = bytes(receive(self._connection, length))
            if option == Option.EXPORT_NAME:
                return self._export_name(data)
            if option == Option.ABORT:
                self._reply(option, OptionReply.ACK)
                return None
            if length > MOST_OPTION_BYTES:
                self._reply(option, OptionReply.TOO_BIG)
            elif option == Option.GO:
                agreed = self._describe(option, data)
                if agreed is not None:
                    return agreed
            else:
                self._answer(option, data)
        raise NbdError("the client asks without end")

    def _answer(self, option: int, data: bytes) -> None:
        if option == Option.LIST:
            if data:
                self._reply(option, OptionReply.INVALID)
                return
            for name in self._exports:
                text = name.encode()
                self._reply(option, OptionReply.SERVER, wire.NUMBER.pack(len(text)) + text)
            self._reply(option, OptionReply.ACK)
        elif option == Option.INFO:
            self._describe(option, data)
        elif option == Option.STRUCTURED_REPLY:
            self._structured = not data or self._structured
            self._reply(option, OptionReply.INVALID if data else OptionReply.ACK)
        elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            self._contexts(option, data)
        else:
            self._reply(option, OptionReply.UNSUPPORTED)

    def _export_name(self, data: bytes) -> Agreement | None:
        """Answer the oldest way to choose an export, which has no way of saying no but leaving."""
        disk = self._exports.get(data.decode("utf-8", "replace"))
        if disk is None:
            return None
        padding = b"" if self._no_zeroes else bytes(124)
        self._send(wire.EXPORT_INFO.pack(0, disk.size, export_flags(disk))[2:] + padding)
        return Agreement(disk, self._structured, False)

    def _describe(self, option: int, data: bytes) -> Agreement | None:
        name, rest = _text(data)
        if name is None or len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
            self._reply(option, OptionReply.INVALID)
            return None
        disk = self._exports.get(name)
        if disk is None:
            self._reply(option, OptionReply.UNKNOWN, b"there is no such export")
            return None
        information = wire.EXPORT_INFO.pack(Information.EXPORT, disk.size, export_flags(disk))
        self._reply(option, OptionReply.INFO, information)
        sizes = (LEAST_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, LARGEST_REQUEST_BYTES)
        self._reply(option, OptionReply.INFO, wire.BLOCK_SIZE_INFO.pack(Information.BLOCK_SIZE, *sizes))
        self._reply(option, OptionReply.ACK)
        return Agreement(disk, self._structured, self._structured and self._context_of == name)

    def _contexts(self, option: int, data: bytes) -> None:
        name, rest = _text(data)
        if name is None or len(rest) < wire.NUMBER.size or (not self._structured and option == Option.SET_META_CONTEXT):
            self._reply(option, OptionReply.INVALID)
            return
        if name not in self._exports:
            self._reply(option, OptionReply.UNKNOWN)
            return
        (count,) = wire.NUMBER.unpack_from(rest)
        rest = rest[wire.NUMBER.size :]
        wanted: list[str] = []
        for _ in range(min(count, MOST_OPTION_BYTES)):
            query, rest = _text(rest)
            if query is None:
                self._reply(option, OptionReply.INVALID)
                return
            wanted.append(query)
        listing = option == Option.LIST_META_CONTEXT
        found = wire.ALLOCATION in wanted or (listing and (not wanted or "base:" in wanted))
        if found:
            number = wire.NUMBER.pack(0 if listing else CONTEXT_ID)
            self._reply(option, OptionReply.META_CONTEXT, number + wire.ALLOCATION.encode())
        if not listing:
            self._context_of = name if found else None
        self._reply(option, OptionReply.ACK)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise NbdGoneError(f"the client is gone: {error.strerror or error}") from error


def export_flags(disk: Disk) -> int:
    """Return the transmission flags of an export: what may be asked of it."""
    flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_CACHE | wire.CAN_MULTI_CONN
    if disk.read_only:
        return flags | wire.READ_ONLY
    return flags | wire.SEND_FUA | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES


def _text(data: bytes) -> tuple[str | None, bytes]:
    """Return a text that its length goes before, and what follows it; None where it is cut short or no text."""
    if len(data) < wire.NUMBER.size:
        return None, b""
    (length,) = wire.NUMBER.unpack_from(data)
    text = data[wire.NUMBER.size : wire.NUMBER.size + length]
    try:
        return (text.decode() if len(text) == length else None), data[wire.NUMBER.size + length :]
    except UnicodeDecodeError:
        return None, b""
