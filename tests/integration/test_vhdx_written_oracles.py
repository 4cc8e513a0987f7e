"""What is written here opens elsewhere and reads the same: qemu-img, libvhdi and dissect.hypervisor say so.

qemu-img knows neither parents nor 4096-byte sectors; libvhdi and dissect.hypervisor do not replay logs.
"""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.crash_files import RecordingFiles, crash_points, scratch_folder
from vhdx.chain import open_vhdx
from vhdx.check import check_disk
from vhdx.compact import compact_disk
from vhdx.create import create_disk
from vhdx.merge import merge_into_parent
from vhdx.resize import resize_disk
from vhdx.structures import PayloadState
from vhdx.writer import open_writable

MIB = 1 << 20
PIECE = 4 * MIB
SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples" / "vhdx"

pyvhdi = pytest.importorskip("pyvhdi", reason="libvhdi-python is not installed")
dissect_vhdx = pytest.importorskip("dissect.hypervisor.disk.vhdx", reason="dissect.hypervisor is not installed")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


def ours(path: Path) -> bytes:
    with open_vhdx(path) as disk:
        return disk.read_at(0, disk.size)


def ours_start(path: Path, length: int) -> bytes:
    with open_vhdx(path) as disk:
        return disk.read_at(0, length)


def libvhdi(paths: list[Path]) -> bytes:
    """Read the chain ``paths``, parent first."""
    files: list[Any] = []
    for path in paths:
        file = pyvhdi.file()
        file.open(str(path))
        if files:
            file.set_parent(files[-1])
        files.append(file)
    size = files[-1].get_media_size()
    parts = []
    for offset in range(0, size, PIECE):
        files[-1].seek(offset)
        parts.append(files[-1].read(min(PIECE, size - offset)))
    for file in reversed(files):
        file.close()
    return b"".join(parts)


def dissect(path: Path, *, piece: int = PIECE) -> bytes:
    disk = dissect_vhdx.VHDX(path)
    return b"".join(disk.read(min(piece, disk.size - offset)) for offset in range(0, disk.size, piece))


def qemu(path: Path, folder: Path) -> bytes:
    check = subprocess.run(["qemu-img", "check", "-f", "vhdx", path], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    raw = folder / "qemu.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def scribble(path: Path, seed: int, *, count: int = 25, trims: bool = True, model: bytearray | None = None) -> None:
    """Write and trim at random; ``model`` is changed likewise."""
    chance = random.Random(seed)
    model = bytearray() if model is None else model
    with open_writable(path) as disk:
        for _ in range(count):
            offset = chance.randrange(disk.size)
            length = min(disk.size - offset, chance.choice([1, 700, 4096, 90_000, MIB, 3 * MIB]))
            if chance.random() < 0.25 and trims:
                disk.trim(offset, length)
                model[offset : offset + length] = bytes(length)
            else:
                data = chance.randbytes(length)
                disk.write_at(offset, data)
                model[offset : offset + length] = data
            if chance.random() < 0.2:
                disk.flush()


def assert_clean(path: Path) -> None:
    assert [finding for finding in check_disk(path).findings if finding.severity != "info"] == []


def assert_all_agree(path: Path, folder: Path, *, sector_size: int = 512) -> None:
    expected = ours(path)
    assert_clean(path)
    assert libvhdi([path]) == expected
    assert dissect(path) == expected
    if sector_size == 512:
        assert qemu(path, folder) == expected


@needs_qemu
@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("block_size", [MIB, 32 * MIB])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_disks_of_their_own(tmp_path: Path, kind: Any, block_size: int, sector_size: int) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=40 * MIB + sector_size, kind=kind, block_size=block_size, sector_size=sector_size)
    assert_all_agree(path, tmp_path, sector_size=sector_size)
    scribble(path, seed=1)
    assert_all_agree(path, tmp_path, sector_size=sector_size)


@needs_qemu
def test_a_bulk_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    with create_disk(path, bulk=True, size=5000 * MIB, block_size=MIB) as disk:
        disk.write_at(0, b"first")
        disk.write_at(4999 * MIB, b"last")
        disk.write_at(4095 * MIB, b"x" * 2 * MIB)
        disk.commit()
    assert_clean(path)
    check = subprocess.run(["qemu-img", "check", "-f", "vhdx", path], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    disk_of_dissect = dissect_vhdx.VHDX(path)
    disk_of_libvhdi = pyvhdi.file()
    disk_of_libvhdi.open(str(path))
    for offset, data in ((0, b"first"), (4999 * MIB, b"last\0"), (4097 * MIB - 5, b"xxxxx"), (4097 * MIB, bytes(5))):
        for disk_of in (disk_of_dissect, disk_of_libvhdi):
            disk_of.seek(offset)
            assert disk_of.read(5) == data
    disk_of_libvhdi.close()


@needs_qemu
def test_resized_compacted_and_merged_disks(tmp_path: Path) -> None:
    path, child = tmp_path / "disk.vhdx", tmp_path / "child.avhdx"
    create_disk(path, size=12 * MIB, block_size=MIB)
    scribble(path, seed=2)
    resize_disk(path, 17 * MIB + 512)
    assert_all_agree(path, tmp_path)
    scribble(path, seed=3)
    compact_disk(path)
    assert_all_agree(path, tmp_path)
    create_disk(child, parent=path)
    scribble(child, seed=4)
    expected = ours(child)
    merge_into_parent(child)
    assert ours(path) == expected
    assert_all_agree(path, tmp_path)
    with open_writable(path) as disk:
        disk.trim(6 * MIB, 12 * MIB + 512 - MIB)
    resize_disk(path, 6 * MIB)
    assert_all_agree(path, tmp_path)


@needs_qemu
def test_a_disk_whose_table_moved(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create_disk(path, size=4 * MIB, block_size=MIB)
    scribble(path, seed=5)
    expected = ours(path)
    resize_disk(path, 200 << 30)
    assert_clean(path)
    check = subprocess.run(["qemu-img", "check", "-f", "vhdx", path], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    assert dissect_vhdx.VHDX(path).read(4 * MIB) == expected
    file = pyvhdi.file()
    file.open(str(path))
    assert file.get_media_size() == 200 << 30
    assert file.read(4 * MIB) == expected
    file.close()


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_chain_of_six(tmp_path: Path, sector_size: int) -> None:
    paths: list[Path] = []
    model = bytearray(11 * MIB)
    for number in range(6):
        path = tmp_path / f"disk{number}.{'a' if number else ''}vhdx"
        if paths:
            create_disk(path, parent=paths[-1], block_size=[MIB, 2 * MIB, 32 * MIB][number % 3])
        else:
            create_disk(path, size=11 * MIB, block_size=MIB, sector_size=sector_size)
        scribble(path, seed=number, count=10, trims=False, model=model)
        paths.append(path)
        assert_clean(path)
        assert ours(path) == model
        # Without trims: libvhdi reads the parent where a child's block is zero, against [MS-VHDX] 2.5.1.1.
        assert libvhdi(paths) == model


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_child_with_trims(tmp_path: Path, sector_size: int) -> None:
    parent, child = tmp_path / "parent.vhdx", tmp_path / "child.avhdx"
    create_disk(parent, size=11 * MIB, block_size=MIB, sector_size=sector_size)
    scribble(parent, seed=1)
    create_disk(child, parent=parent, block_size=2 * MIB)
    scribble(child, seed=8, count=4)
    with open_writable(child) as disk:
        disk.trim(4 * MIB, 2 * MIB)
        disk.write_at(8 * MIB, b"x" * 2 * MIB)
        disk.write_at(10 * MIB + 5 * 4096, b"y" * 3 * 4096)
    with open_vhdx(child) as disk:
        states = set(disk.image.bat.payload_states(0, 6).tolist())
    assert states >= {PayloadState.ZERO, PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT}
    # One byte of the bitmap at a time: dissect goes astray where a read of a partial block begins within one, or
    # passes a block's end. For the same reason it is no judge of longer chains.
    assert dissect(child, piece=8 * sector_size) == ours(child)


@needs_qemu
def test_qemu_replays_a_log_that_was_full_and_begins_anew(tmp_path: Path) -> None:
    path, victim = tmp_path / "disk.vhdx", tmp_path / "crashed.vhdx"
    create_disk(path, size=140 * MIB, block_size=MIB)
    with open_writable(path) as disk:
        for block in range(140):  # two sectors of the log each, which has 256
            disk.write_at(block * MIB, b"%d" % (block + 1))
            disk.flush()
            if block not in (126, 127, 128, 129):
                continue
            shutil.copyfile(path, victim)
            repair: list[str | Path] = ["qemu-img", "check", "-q", "-f", "vhdx", "-r", "all", victim]
            done = subprocess.run(repair, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (block, done.stderr)
            with open_vhdx(victim) as after:
                assert after.image.replay is None
                assert after.read_at(0, block * MIB + 9) == disk.read_at(0, block * MIB + 9), block


@needs_qemu
def test_qemu_replays_the_logs_that_crashes_leave_as_we_do(tmp_path: Path) -> None:
    source, crashed = tmp_path / "source", tmp_path / "crashed"
    source.mkdir()
    crashed.mkdir()
    path = source / "disk.vhdx"
    create_disk(path, size=4 * MIB, block_size=MIB)
    files = RecordingFiles(source)
    chance = random.Random(9)
    with open_writable(path, files=files) as disk:
        for turn in range(4):
            disk.write_at(turn * MIB + 5, chance.randbytes(3000))
            disk.write_at(chance.randrange(3 * MIB), chance.randbytes(5000))
            disk.flush()
    replayed = 0
    for point in crash_points(files, seeds=0):
        point.write_to(crashed)
        victim = crashed / "disk.vhdx"
        with open_vhdx(victim) as disk:
            if not disk.image.replay or point.mode != "none":
                continue
        expected = ours(victim)
        repaired = subprocess.run(
            ["qemu-img", "check", "-f", "vhdx", "-r", "all", victim], capture_output=True, text=True, check=False
        )
        assert repaired.returncode == 0, f"{point}: {repaired.stdout}{repaired.stderr}"
        assert qemu(victim, tmp_path) == expected, point
        assert ours(victim) == expected, point
        replayed += 1
    assert replayed > 5


@needs_qemu
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not beside the checkout (../shared/samples)")
@pytest.mark.parametrize("name", ["fixed", "dynamic", "vhdx-log-replay", "swap"])
def test_disks_of_windows_can_be_written_resized_and_compacted(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.vhdx"
    with gzip.open(SAMPLES / f"{name}.vhdx.gz") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    with open_vhdx(path) as disk:
        model = bytearray(disk.read_at(0, 10 * MIB - MIB))
    with open_writable(path) as disk:  # one of them replays a log of Windows to disk
        assert disk.read_at(0, len(model)) == model
        assert disk.image.replay is None
        for offset in (1000, 5 * MIB + 17):
            disk.write_at(offset, b"hello" * 1000)
            model[offset : offset + 5000] = b"hello" * 1000
        size = disk.size
    compact_disk(path)
    resize_disk(path, size + 33 * MIB)
    assert_clean(path)
    assert ours_start(path, len(model)) == model
    check = subprocess.run(["qemu-img", "check", "-f", "vhdx", path], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    assert dissect_vhdx.VHDX(path).read(len(model)) == model
