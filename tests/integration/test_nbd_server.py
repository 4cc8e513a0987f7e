"""The NBD server as foreign clients see it: nbdinfo, nbdcopy, qemu-img, qemu-io, and clients that talk nonsense."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from replica.errors import UsageError
from replica.nbd.disk import NbdDisk
from replica.nbd.server import Server
from replica.nbd.wire import NbdError, TcpAddress, UnixAddress
from replica.scratchdisk import ScratchDisk
from vhdx.disk import Disk, WritableBuffer
from vhdx.errors import OsError
from vhdx.raw import RawDisk

SIZE = 8 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = bytearray(SIZE)
    data[: 1 << 20] = random.Random(1).randbytes(1 << 20)
    data[5 << 20 : (5 << 20) + 70000] = random.Random(2).randbytes(70000)
    with (tmp_path / "disk.raw").open("wb") as file:
        for start in range(0, SIZE, 65536):
            if any(data[start : start + 65536]):
                file.seek(start)
                file.write(data[start : start + 65536])
        file.truncate(SIZE)
    return bytes(data)


@pytest.fixture
def serving(tmp_path: Path, content: bytes) -> Iterator[tuple[str, Path]]:
    """Yield the URL of a read-only export, and of a writable one under the name ``w``."""
    address = UnixAddress(str(tmp_path / "s"))
    with (
        RawDisk.open(tmp_path / "disk.raw") as disk,
        ScratchDisk(disk, tmp_path) as writable,
        Server({"": disk, "w": writable}, address),
    ):
        yield f"nbd+unix:///%s?socket={address.path}", tmp_path


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nbdinfo_sees_what_is_there(serving: tuple[str, Path]) -> None:
    url, _ = serving
    told = json.loads(_run("nbdinfo", "--json", url % ""))
    assert told["structured"]
    (export,) = told["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"] and export["can_multi_conn"] and export["contexts"] == ["base:allocation"]
    (writable,) = json.loads(_run("nbdinfo", "--json", url % "w"))["exports"]
    assert not writable["is_read_only"] and writable["can_trim"] and writable["can_zero"] and writable["can_fua"]
    listed = json.loads(_run("nbdinfo", "--list", "--json", url % ""))
    assert {one["export-name"] for one in listed["exports"]} == {"", "w"}


def test_nbdinfo_maps_the_holes(serving: tuple[str, Path], content: bytes) -> None:
    url, _ = serving
    rows = json.loads(_run("nbdinfo", "--map", "--json", url % ""))
    assert sum(row["length"] for row in rows) == SIZE
    assert {row["type"] for row in rows} == {0, 3}
    for row in rows:
        if row["type"] == 3:
            assert not any(content[row["offset"] : row["offset"] + row["length"]])


def test_nbdcopy_and_qemu_img_copy_every_byte(serving: tuple[str, Path], content: bytes) -> None:
    url, folder = serving
    _run("nbdcopy", url % "", str(folder / "copy.raw"))
    assert (folder / "copy.raw").read_bytes() == content
    _run("qemu-img", "convert", "-O", "raw", url % "", str(folder / "other.raw"))
    assert (folder / "other.raw").read_bytes() == content


def test_qemu_io_writes_zeroes_trims_and_flushes(serving: tuple[str, Path], content: bytes) -> None:
    url, folder = serving
    commands = ("write -P 7 1000 5000", "write -f -P 8 3M 64k", "write -z 4096 4096", "discard 512k 64k", "flush")
    arguments = [part for command in commands for part in ("-c", command)]
    out = _run("qemu-io", "-f", "raw", *arguments, url % "w")
    assert "failed" not in out
    expected = bytearray(content)
    expected[1000:6000] = b"\7" * 5000
    expected[3 << 20 : (3 << 20) + 65536] = b"\x08" * 65536
    expected[4096:8192] = bytes(4096)
    expected[512 << 10 : (512 + 64) << 10] = bytes(64 << 10)
    _run("nbdcopy", url % "w", str(folder / "copy.raw"))
    assert (folder / "copy.raw").read_bytes() == bytes(expected)
    assert (folder / "disk.raw").read_bytes() == content


def test_a_read_only_export_takes_no_writes(serving: tuple[str, Path]) -> None:
    url, _ = serving
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", url % ""], capture_output=True, text=True, check=False
    )
    assert "read-only" in (done.stdout + done.stderr).lower() or done.returncode


def test_our_own_client_reads_it_from_many_threads(tmp_path: Path, serving: tuple[str, Path], content: bytes) -> None:
    wrong: list[int] = []
    with NbdDisk(UnixAddress(str(tmp_path / "s"))) as disk:

        def read(seed: int) -> None:
            drawn = random.Random(seed)
            for _ in range(20):
                start = drawn.randrange(SIZE - 200_000)
                if disk.read_at(start, 200_000) != content[start : start + 200_000]:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = np.concatenate(list(disk.allocated()))
    assert not wrong
    assert held[:, 1].max() < SIZE


class _Broken:
    """A disk whose middle cannot be read."""

    def __init__(self, disk: RawDisk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> object:
        return getattr(self._disk, name)

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        if offset <= 4096 < offset + len(buffer):
            raise OsError("the sector is bad", path="disk.raw")
        self._disk.read_into(offset, buffer)


def test_a_read_that_fails_fails_alone(tmp_path: Path, content: bytes) -> None:
    told: list[Exception] = []
    address = UnixAddress(str(tmp_path / "s"))
    with RawDisk.open(tmp_path / "disk.raw") as disk:
        broken: Disk = _Broken(disk)  # type: ignore[assignment]
        with Server({"": broken}, address, report=told.append), NbdDisk(address) as client:
            assert client.read_at(8192, 512) == content[8192:8704]
            with pytest.raises(NbdError, match="the sector is bad"):
                client.read_at(4096, 512)
            assert client.read_at(0, 512) == content[:512]
    assert [str(error) for error in told] == ["disk.raw: the sector is bad"]


GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)


def _option(option: int, data: bytes, *, length: int | None = None, magic: int = 0x49484156454F5054) -> bytes:
    return struct.pack(">QII", magic, option, len(data) if length is None else length) + data


NAME = struct.pack(">I", 0)
GO = _option(7, NAME + b"\0\0")
NONSENSE = {
    "flags": b"\xff\xff\xff\xff",
    "no magic": struct.pack(">I", 3) + _option(7, b"", magic=1),
    "endless option": struct.pack(">I", 3) + _option(7, b"", length=0xFFFFFFFF),
    "large option": struct.pack(">I", 3) + _option(99, bytes(100_000)),
    "name longer than the data": struct.pack(">I", 3) + _option(7, struct.pack(">I", 1 << 31) + b"\0\0"),
    "contexts without end": struct.pack(">I", 3) + _option(8, b"") + _option(10, NAME + struct.pack(">I", 1 << 31)),
    "no such export": struct.pack(">I", 3) + _option(7, struct.pack(">I", 3) + b"abc\0\0"),
    "request magic": struct.pack(">I", 3) + GO + bytes(28),
    "huge write": struct.pack(">I", 3) + GO + struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 0xFFFFFFFF),
    "huge read": struct.pack(">I", 3) + GO + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 0xFFFFFFFF),
    "read outside": struct.pack(">I", 3) + GO + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 1 << 62, 512),
    "no such command": struct.pack(">I", 3) + GO + struct.pack(">IHHQQI", 0x25609513, 0, 77, 1, 0, 512),
    "status without context": struct.pack(">I", 3) + GO + struct.pack(">IHHQQI", 0x25609513, 0, 7, 1, 0, 512),
    "hangs up": struct.pack(">I", 3) + GO[:9],
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_client_that_talks_nonsense_harms_nobody(tmp_path: Path, content: bytes, what: str) -> None:
    address = UnixAddress(str(tmp_path / "s"))
    with RawDisk.open(tmp_path / "disk.raw") as disk, Server({"": disk}, address) as server:
        with NbdDisk(address) as client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(20)
            peer.connect(address.path)
            peer.sendall(NONSENSE[what])
            peer.shutdown(socket.SHUT_WR)
            answer = b""
            while part := peer.recv(65536):
                answer += part
            assert answer.startswith(GREETING) and len(answer) < 4096
            assert client.read_at(0, 512) == content[:512]
        assert server.connections <= 8


def test_nothing_beyond_this_machine_is_served(tmp_path: Path, content: bytes) -> None:
    with RawDisk.open(tmp_path / "disk.raw") as disk:
        for host in ("0.0.0.0", "192.0.2.1", "::"):
            with pytest.raises(UsageError, match="other machines"):
                Server({"": disk}, TcpAddress(host, 0))
        with pytest.raises(UsageError, match="no address"):
            Server({"": disk}, TcpAddress("example.org", 0))
        with Server({"": disk}, TcpAddress("127.0.0.1", 0)) as server, NbdDisk(server.address) as client:
            assert client.read_at(0, 512) == content[:512]
        with pytest.raises(UsageError, match="at most"):
            Server({"": disk}, UnixAddress("/tmp/" + "x" * 120))


def test_the_socket_is_its_owners_alone_and_goes_with_the_server(tmp_path: Path, content: bytes) -> None:
    address = UnixAddress(str(tmp_path / "s"))
    with RawDisk.open(tmp_path / "disk.raw") as disk:
        with Server({"": disk}, address):
            assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
            with pytest.raises(NbdError, match="in use"):
                Server({"": disk}, address)
        assert not (tmp_path / "s").exists()


def _godwit(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from cli.main import main; main()", *arguments]


def test_the_command_serves_a_point_until_it_is_interrupted(tmp_path: Path, content: bytes) -> None:
    store = f"file://{tmp_path / 'store'}"
    for arguments in (
        ("init", store),
        ("protect", "vm", "--disk", str(tmp_path / "disk.raw"), "--store", store),
        ("replicate", "vm", "--store", store),
    ):
        subprocess.run(_godwit(*arguments), check=True, cwd=ROOT, capture_output=True, timeout=60)
    with subprocess.Popen(
        _godwit("serve", "vm", "--socket", str(tmp_path / "s"), "--writable", "--store", store, "--json"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            told = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            url = told["exports"][0]["url"]
            assert told["writable"] and told["point"] == 1
            _run("qemu-io", "-f", "raw", "-c", "write -P 9 0 4096", url)
            _run("nbdcopy", url, str(tmp_path / "copy.raw"))
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert (tmp_path / "copy.raw").read_bytes() == b"\x09" * 4096 + content[4096:]
    assert not (tmp_path / "s").exists()
