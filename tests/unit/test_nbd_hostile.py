"""An NBD server that lies, is cut off, or falls silent: one NbdError, no memory taken on its word, no wrong bytes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from replica.nbd.disk import NbdDisk
from replica.nbd.wire import NbdError, NbdGoneError, TcpAddress

SIZE = 1 << 20
GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
CONTEXT = struct.pack(">I", 77) + b"base:allocation"
EXPORT = struct.pack(">HQH", 0, SIZE, 1)
CHUNK = 0x668E33EF


def _option_reply(option: int, kind: int, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data) if size is None else size) + data


HANDSHAKE = (
    GREETING,
    _option_reply(8, 1),
    _option_reply(10, 4, CONTEXT) + _option_reply(10, 1),
    _option_reply(7, 3, EXPORT) + _option_reply(7, 1),
)


def _chunk(
    kind: int, cookie: int, data: bytes, *, flags: int = 1, size: int | None = None, magic: int = CHUNK
) -> bytes:
    return struct.pack(">IHHQI", magic, flags, kind, cookie, len(data) if size is None else size) + data


def _data(offset: int, data: bytes) -> bytes:
    return struct.pack(">Q", offset) + data


Answer = Callable[[int], bytes]  # from the cookie of the first request


@contextmanager
def _server(handshake: bytes, answer: Answer | None = None) -> Iterator[TcpAddress]:
    """Send ``handshake`` at once, and after the first request what ``answer`` makes of it; then hang up."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)

    def serve() -> None:
        with listener.accept()[0] as peer:
            peer.settimeout(20)
            peer.sendall(handshake)
            got = b""
            try:
                while answer is not None and (data := peer.recv(65536)):
                    got += data
                    at = got.find(struct.pack(">I", 0x25609513))
                    if at >= 0 and len(got) >= at + 28:
                        peer.sendall(answer(int.from_bytes(got[at + 8 : at + 16], "big")))
                        break
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield TcpAddress("127.0.0.1", listener.getsockname()[1])
    finally:
        thread.join()
        listener.close()


def _read(answer: Answer, length: int = 1024) -> bytes:
    with _server(b"".join(HANDSHAKE), answer) as address, NbdDisk(address, timeout_seconds=10) as disk:
        return disk.read_at(512, length)


def test_the_fake_server_can_be_honest() -> None:
    """What the others break works when it is left whole: data, a hole and an end of their own, in any order."""
    pieces = [(1024, b"b" * 512), (512, b"a" * 512)]

    def answer(cookie: int) -> bytes:
        parts = [_chunk(1, cookie, _data(at, data), flags=0) for at, data in pieces]
        return b"".join(parts) + _chunk(2, cookie, struct.pack(">QI", 1536, 512), flags=0) + _chunk(0, cookie, b"")

    assert _read(answer, 1536) == b"a" * 512 + b"b" * 512 + bytes(512)


@pytest.mark.parametrize("length", range(len(b"".join(HANDSHAKE))))
def test_a_server_that_leaves_in_the_handshake(length: int) -> None:
    with _server(b"".join(HANDSHAKE)[:length]) as address, pytest.raises(NbdGoneError):
        NbdDisk(address, timeout_seconds=10)


def test_a_server_that_leaves_within_an_answer() -> None:
    whole = _chunk(1, 1, _data(512, b"x" * 1024))
    for length in (0, 1, 3, 4, 12, 19, 20, 27, 28, 29, len(whole) - 1):
        with pytest.raises(NbdGoneError):
            _read(lambda cookie, length=length: _chunk(1, cookie, _data(512, b"x" * 1024))[:length])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("part", "replaced"),
    [
        (0, b"SSH-2.0-OpenSSH_9.2\r\n"),
        (0, struct.pack(">QQH", 0x4E42444D41474943, 0x00420281861253, 0)),  # the old style
        (0, GREETING[:-2] + b"\0\0"),
        (1, struct.pack(">QIII", 1, 8, 1, 0)),
        (1, _option_reply(10, 1)),
        (1, _option_reply(8, 1, size=0xFFFFFFFF)),
        (1, _option_reply(8, 99) * 1000),
        (2, _option_reply(10, 4, b"ab") + _option_reply(10, 1)),
        (3, _option_reply(7, 1)),
        (3, _option_reply(7, 3, EXPORT[:-1]) + _option_reply(7, 1)),
        (3, _option_reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)) + _option_reply(7, 1)),
        (3, _option_reply(7, 3, struct.pack(">HIII", 3, 1 << 20, 1 << 20, 1 << 25)) + _option_reply(7, 1)),
        (3, _option_reply(7, 1 << 31 | 1)),
        (3, _option_reply(7, 1 << 31 | 5, b"TLS\xff please")),
        (3, _option_reply(7, 1 << 31 | 4321)),
    ],
)
def test_a_handshake_that_is_none(part: int, replaced: bytes) -> None:
    handshake = [*HANDSHAKE]
    handshake[part] = replaced
    with _server(b"".join(handshake)) as address, pytest.raises(NbdError):
        NbdDisk(address, timeout_seconds=10)


@pytest.mark.parametrize(
    "answer",
    [
        lambda cookie: _chunk(1, cookie, _data(512, b"x" * 1024), magic=0x67446698),
        lambda cookie: _chunk(1, cookie + 1, _data(512, b"x" * 1024)),
        lambda cookie: _chunk(1, cookie, b"", size=0xFFFFFFFF),
        lambda cookie: _chunk(1, cookie, _data(512, b"x" * 1025)),
        lambda cookie: _chunk(1, cookie, _data(0, b"x" * 1024)),
        lambda cookie: _chunk(1, cookie, _data(512, b"x" * 512)),
        lambda cookie: _chunk(0, cookie, b""),
        lambda cookie: (
            _chunk(1, cookie, _data(512, b"x" * 512), flags=0) * 2 + _chunk(0, cookie, b"")
        ),  # one half twice
        lambda cookie: _chunk(2, cookie, struct.pack(">QI", 512, 0xFFFFFFFF)),
        lambda cookie: _chunk(2, cookie, struct.pack(">QI", 512, 0)),
        lambda cookie: _chunk(2, cookie, b"short"),
        lambda cookie: _chunk(0, cookie, b"data"),
        lambda cookie: _chunk(5, cookie, struct.pack(">III", 77, 512, 0)),
        lambda cookie: _chunk(9, cookie, b"x" * 10),
        lambda cookie: _chunk(1 << 15 | 1, cookie, b"", size=1 << 30),
        lambda cookie: _chunk(1 << 15 | 1, cookie, b"abc"),
        lambda cookie: _chunk(1 << 15 | 2, cookie, struct.pack(">IH", 5, 3) + b"bad" + bytes(8)),
    ],
)
def test_an_answer_to_a_read_that_is_none(answer: Answer) -> None:
    with pytest.raises(NbdError):
        _read(answer)


def test_a_server_that_reports_an_error_is_quoted() -> None:
    with pytest.raises(NbdError, match="error 5: the medium is gone"):
        _read(lambda cookie: _chunk(1 << 15 | 1, cookie, struct.pack(">IH", 5, 18) + b"the medium is gone"))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">III", 78, SIZE, 0),  # another context
        struct.pack(">III", 77, 0, 0),
        struct.pack(">I", 77),
        struct.pack(">III", 77, SIZE, 0) + b"abc",
        b"",
    ],
)
def test_extents_that_are_none(data: bytes) -> None:
    with (
        _server(b"".join(HANDSHAKE), lambda cookie: _chunk(5, cookie, data)) as address,
        NbdDisk(address, timeout_seconds=10) as disk,
        pytest.raises(NbdError),
    ):
        list(disk.allocated())


def test_extents_that_reach_beyond_the_disk_are_cut() -> None:
    told = struct.pack(">IIIII", 77, 4096, 3, 0xFFFFFFFF, 0)
    with (
        _server(b"".join(HANDSHAKE), lambda cookie: _chunk(5, cookie, told)) as address,
        NbdDisk(address, timeout_seconds=10) as disk,
    ):
        assert [extents.tolist() for extents in disk.allocated()] == [[[4096, SIZE]]]


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(NbdGoneError, match="silent"):
        NbdDisk(TcpAddress("127.0.0.1", listener.getsockname()[1]), timeout_seconds=0.1)


def test_a_server_without_structured_replies_is_read_in_full() -> None:
    plain = (GREETING, _option_reply(8, 1 << 31 | 1), HANDSHAKE[3])
    with (
        _server(b"".join(plain), lambda cookie: struct.pack(">IIQ", 0x67446698, 0, cookie) + b"y" * 512) as address,
        NbdDisk(address, timeout_seconds=10) as disk,
    ):
        assert [extents.tolist() for extents in disk.allocated()] == [[[0, SIZE]]]
        assert disk.read_at(512, 512) == b"y" * 512
