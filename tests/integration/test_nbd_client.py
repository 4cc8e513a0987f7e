"""Our NBD client against qemu-nbd: what it reads and which extents it tells are what is in the image."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from replica.nbd.disk import NbdDisk
from replica.nbd.wire import NbdError, UnixAddress
from vhdx.errors import OutOfRangeError, ReadOnlyError
from vhdx.windows import joined

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed")
MIB = 1 << 20
SIZE = 64 * MIB

Serve = Callable[..., UnixAddress]


def _listens(path: Path) -> bool:
    """Whether somebody accepts connections there: the socket's file comes a moment before."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start qemu-nbd on an image."""
    started: list[subprocess.Popen[bytes]] = []

    def start(image: Path, image_format: str, *options: str) -> UnixAddress:
        path = tmp_path / f"nbd{len(started)}.sock"
        command = ["qemu-nbd", "-k", str(path), "-f", image_format, "-r", "-e", "16", "-t", *options, str(image)]
        started.append(subprocess.Popen(command))
        while not _listens(path):
            assert started[-1].poll() is None, "qemu-nbd ended"
            time.sleep(0.01)
        return UnixAddress(str(path))

    yield start
    for process in started:
        process.terminate()
        process.wait()


def _image(folder: Path, image_format: str) -> tuple[Path, bytes]:
    drawn = random.Random(image_format)
    content = bytearray(SIZE)
    for _ in range(20):
        at = drawn.randrange(0, SIZE // 512 - 1000) * 512
        content[at : at + 100 * 512] = drawn.randbytes(100 * 512)
    raw, image = folder / "content.img", folder / f"image.{image_format}"
    raw.write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, raw, image], check=True)
    return image, bytes(content)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vhdx"])
def test_threads_read_what_is_in_the_image_and_holes_are_zeros(serve: Serve, tmp_path: Path, image_format: str) -> None:
    image, content = _image(tmp_path, image_format)
    with NbdDisk(serve(image, image_format)) as disk, ThreadPoolExecutor(6) as pool:
        assert disk.size == SIZE
        places = [random.Random(7).randrange(0, SIZE - 9 * MIB) for _ in range(24)]
        for at, data in zip(places, pool.map(lambda at: disk.read_at(at, 9 * MIB), places), strict=True):
            assert data == content[at : at + 9 * MIB]
        assert disk.read_at(0, SIZE) == content
        for extents in disk.allocated():
            assert np.all(extents[:, 0] < extents[:, 1])
        held = np.zeros(SIZE // 512, np.bool_)
        for start, end in (pair for extents in disk.allocated() for pair in extents.tolist()):
            held[start // 512 : end // 512] = True
        wanted = np.frombuffer(content, np.uint8).reshape(-1, 512).any(axis=1)
        assert np.all(held[wanted])
        if image_format != "vhdx":  # QEMU's driver does not tell
            assert held.sum() < len(held) // 4


def test_a_range_is_asked_about_by_itself(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "d.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(8 * MIB)
        file.write(b"x" * (4 * MIB))
    with NbdDisk(serve(image, "raw")) as disk:
        assert [e.tolist() for e in disk.allocated(9 * MIB, 10 * MIB)] == [[[9 * MIB, 10 * MIB]]]
        assert list(disk.allocated(32 * MIB)) == []
        assert [e.tolist() for e in joined(disk.allocated())] == [[[8 * MIB, 12 * MIB]]]


def test_a_large_sparse_disk_is_asked_in_few_questions(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "d.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1T"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 900G 64k", str(image)], check=True)
    with NbdDisk(serve(image, "qcow2")) as disk:
        assert [e.tolist() for e in disk.allocated()] == [[[900 << 30, (900 << 30) + 65536]]]


def test_a_dirty_bitmap_tells_what_was_written(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "d.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8G"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b1"], check=True)
    for at in ("1M", "1100K", "7G"):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q {at} 4k", str(image)], check=True)
    with NbdDisk(serve(image, "qcow2", "-B", "b1")) as disk:
        found = [e.tolist() for e in joined(disk.changed("b1"))]
        assert [pair for part in found for pair in part] == [[MIB, MIB + 128 * 1024], [7 << 30, (7 << 30) + 65536]]
        with pytest.raises(NbdError, match="does not export the dirty bitmap b2"):
            list(disk.changed("b2"))


def test_an_unknown_export_and_an_absent_server_are_named(serve: Serve, tmp_path: Path) -> None:
    image, _ = _image(tmp_path, "raw")
    address = serve(image, "raw", "-x", "right")
    with pytest.raises(NbdError, match="no such export"):
        NbdDisk(address, "wrong")
    with NbdDisk(address, "right") as disk:
        assert disk.size == SIZE
    with pytest.raises(NbdError, match="cannot be reached"):
        NbdDisk(UnixAddress(str(tmp_path / "nothing")))


def test_nothing_is_read_beyond_the_end_or_written(serve: Serve, tmp_path: Path) -> None:
    image, _ = _image(tmp_path, "raw")
    with NbdDisk(serve(image, "raw")) as disk:
        with pytest.raises(OutOfRangeError):
            disk.read_at(SIZE - 512, 1024)
        with pytest.raises(ReadOnlyError):
            disk.write_at(0, b"x")
    with pytest.raises(NbdError, match="closed"):
        disk.read_at(0, 512)
