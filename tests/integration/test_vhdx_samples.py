"""VHDX files that other programs made read as those programs' peers read them: qemu-img, libvhdi, dissect."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vhdx.chain import open_vhdx
from vhdx.check import check_disk
from vhdx.errors import ParentError
from vhdx.extents import merged
from vhdx.osfile import open_file
from vhdx.structures import MIB
from vhdx.vhdx import VhdxDisk

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples" / "vhdx"
NAMES = ("fixed.vhdx", "dynamic.vhdx", "swap.vhdx", "btrfs.vhdx", "xfs5.vhdx")
LOG_SAMPLE_SHA256 = "3ba3b309425b7ff5"

pytestmark = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="the samples are not beside the checkout (../shared/samples)"
)
needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


def sample(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        with gzip.open(SAMPLES / f"{name}.gz") as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return path


def convert(path: Path, folder: Path) -> Path:
    raw = folder / "oracle.raw"
    raw.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw], check=True)
    return raw


def assert_reads_as(disk: VhdxDisk, raw: Path) -> None:
    """Compare the disk with a raw file: all that either says is data, and a spot of every MiB that neither does."""
    with contextlib.closing(open_file(raw)) as oracle:
        assert oracle.size() == disk.size
        data = np.array(list(oracle.data_extents(0, disk.size)), dtype=np.int64).reshape(-1, 2)
        compared = merged([data, *disk.allocated()])
        reached = 0
        for start, end in [*compared.tolist(), [disk.size, disk.size]]:
            for offset in range(reached, start, MIB):
                length = min(512, start - offset)
                assert disk.read_at(offset, length) == bytes(length)
            for offset in range(start, end, 5 * MIB + 512 * 3):  # pieces that no block size divides
                length = min(5 * MIB + 512 * 3, end - offset)
                assert disk.read_at(offset, length) == oracle.pread(offset, length)
            reached = end


@needs_qemu
@pytest.mark.parametrize("name", NAMES)
def test_samples_read_as_qemu_reads_them(folder: Path, name: str) -> None:
    path = sample(folder, name)
    with open_vhdx(path) as disk:
        assert_reads_as(disk, convert(path, folder))


@pytest.mark.parametrize("name", NAMES)
def test_samples_read_as_libvhdi_and_dissect_read_them(folder: Path, name: str) -> None:
    pyvhdi = pytest.importorskip("pyvhdi")
    dissect = pytest.importorskip("dissect.hypervisor.disk.vhdx")
    path = sample(folder, name)
    file = pyvhdi.file()
    file.open(str(path))
    with open_vhdx(path) as disk, path.open("rb") as handle:
        other = dissect.VHDX(handle)
        assert file.get_media_size() == disk.size == other.size
        for offset in range(0, disk.size, 8 * MIB):
            length = min(8 * MIB, disk.size - offset)
            ours = disk.read_at(offset, length)
            assert ours == file.read_buffer_at_offset(length, offset)
            other.seek(offset)
            assert ours == other.read(length)
    file.close()


@needs_qemu
def test_the_log_sample_reads_as_after_qemu_s_repair_and_is_not_written(folder: Path) -> None:
    path = sample(folder, "vhdx-log-replay.vhdx")
    before = hashlib.sha256(path.read_bytes()).digest()
    repaired = folder / "repaired.vhdx"
    shutil.copy(path, repaired)
    subprocess.run(["qemu-img", "check", "-r", "all", repaired], check=True, capture_output=True)
    total = hashlib.sha256()
    with open_vhdx(path) as disk:
        assert disk.image.replay is not None
        assert_reads_as(disk, convert(repaired, folder))
        for offset in range(0, disk.size, 8 * MIB):
            total.update(disk.read_at(offset, 8 * MIB))
    assert total.hexdigest().startswith(LOG_SAMPLE_SHA256)
    assert hashlib.sha256(path.read_bytes()).digest() == before


@pytest.mark.parametrize("name", [*NAMES, "vhdx-log-replay.vhdx", "differencing.avhdx"])
def test_samples_are_sound(folder: Path, name: str) -> None:
    assert check_disk(sample(folder, name)).errors == ()


def test_a_real_child_whose_parent_is_lost_serves_its_own_part(folder: Path) -> None:
    path = sample(folder, "differencing.avhdx")
    with open_vhdx(path) as disk:
        assert disk.size == 8 << 30
        assert disk.image.metadata.parent_locator is not None
        own = [tuple(extent) for extents in disk.stored() for extent in extents.tolist()]
        assert len(own) > 10
        assert sum(end - start for start, end in own) == 3174400
        for start, end in own:
            assert len(disk.read_at(start, end - start)) == end - start
        first_gap = own[0][1]
        with pytest.raises(ParentError, match=r"Generation 1_49C4BAF3-4B25-4406-8C4B-D39E65C32385\.avhdx"):
            disk.read_at(first_gap, 512)
    assert [finding.rule for finding in check_disk(path).findings] == ["parent-missing"]


@needs_qemu
@pytest.mark.parametrize("block_size", [1, 8, 256])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_what_qemu_writes_reads_back(tmp_path: Path, block_size: int, subformat: str) -> None:
    raw = tmp_path / "source.raw"
    with raw.open("wb") as file:
        for offset in (0, 5 * MIB + 512, 20 * MIB - 4096):
            file.seek(offset)
            file.write(hashlib.sha256(str(offset).encode()).digest() * 128)
    path = tmp_path / "disk.vhdx"
    options = f"subformat={subformat},block_size={block_size * MIB}"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path], check=True)
    with open_vhdx(path) as disk:
        assert disk.read_at(0, disk.size) == raw.read_bytes()
        assert disk.image.geometry.block_size == block_size * MIB
    assert check_disk(path).sound
