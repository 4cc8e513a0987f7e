"""The NBD protocol's structures and numbers, and the errors of speaking it.

Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, structured replies).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from vhdx.errors import DiskError

SERVER_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

GREETING: Final = struct.Struct(">QQH")  # magic, option magic, handshake flags
OPTION: Final = struct.Struct(">QII")  # magic, option, length of its data
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, type, length of its data
EXPORT_INFO: Final = struct.Struct(">HQH")  # type of information, size in bytes, transmission flags
BLOCK_SIZE_INFO: Final = struct.Struct(">HIII")  # type of information; least, preferred, greatest bytes of a request
REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY: Final = struct.Struct(">IQ")  # error, cookie; after the magic
CHUNK: Final = struct.Struct(">HHQI")  # flags, type, cookie, length; after the magic
OFFSET: Final = struct.Struct(">Q")
HOLE: Final = struct.Struct(">QI")  # offset, length
ERROR: Final = struct.Struct(">IH")  # error, length of the message
NUMBER: Final = struct.Struct(">I")

_SIZES = {GREETING: 18, OPTION: 16, OPTION_REPLY: 20, EXPORT_INFO: 12, BLOCK_SIZE_INFO: 14, REQUEST: 28}
assert all(form.size == size for form, size in _SIZES.items())
assert (SIMPLE_REPLY.size, CHUNK.size, HOLE.size, ERROR.size) == (12, 16, 12, 6)

FIXED_NEWSTYLE: Final = 1  # the flag of both sides
NO_ZEROES: Final = 2
# Transmission flags: what an export is and can.
HAS_FLAGS: Final = 1
READ_ONLY: Final = 2
SEND_FLUSH: Final = 4
SEND_FUA: Final = 8
SEND_TRIM: Final = 32
SEND_WRITE_ZEROES: Final = 64
CAN_MULTI_CONN: Final = 256
SEND_CACHE: Final = 1024

ALLOCATION: Final = "base:allocation"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
STATE_HOLE: Final = 1  # base:allocation: nothing is stored there
STATE_ZERO: Final = 2  # base:allocation: the extent reads as zeros
STATE_DIRTY: Final = 1  # qemu:dirty-bitmap: the extent was written

MOST_OPTION_REPLY_BYTES: Final = 64 << 10
MOST_OPTION_REPLIES: Final = 64  # to one option
MOST_MESSAGE_BYTES: Final = 4096
MOST_EXTENTS: Final = 1 << 18  # in one answer to a question for extents; QEMU sends up to 2^17


class Option(IntEnum):
    """What is asked for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """What the server answers in the handshake; a set highest bit is an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERROR = 1 << 31
    UNSUPPORTED = 1 << 31 | 1
    POLICY = 1 << 31 | 2
    INVALID = 1 << 31 | 3
    TLS_REQUIRED = 1 << 31 | 5
    UNKNOWN = 1 << 31 | 6
    TOO_BIG = 1 << 31 | 9


class Information(IntEnum):
    """What an INFO reply tells."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Command(IntEnum):
    """What is asked for once the handshake is done."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1
    NO_HOLE = 2
    REQ_ONE = 8


class ErrorNumber(IntEnum):
    """What a reply says of a request that failed: numbers of the protocol's own, whatever the system's are."""

    PERM = 1
    IO = 5
    NOMEM = 12
    INVAL = 22
    NOSPC = 28
    OVERFLOW = 75
    SHUTDOWN = 108


class Chunk(IntEnum):
    """What a chunk of a structured reply holds; a set highest bit of 16 is an error."""

    NONE = 0
    DATA = 1
    HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


class ChunkFlag(IntFlag):
    """Flags of a chunk."""

    DONE = 1


class NbdError(DiskError):
    """An NBD server could not be reached, refused something, or does not speak the protocol."""


class NbdGoneError(NbdError):
    """The server closed the connection or was silent for too long."""

    retryable = True


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A server behind a socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"nbd+unix:///?socket={self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A server on the network."""

    host: str
    port: int = 10809

    def __str__(self) -> str:
        return f"nbd://{self.host}:{self.port}"


Address = UnixAddress | TcpAddress
