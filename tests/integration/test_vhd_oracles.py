"""Other readers as judges of VHD: qemu-img and libvhdi."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.vhd_files import write_child
from vhdx.convert import convert
from vhdx.formats import open_disk
from vhdx.target import create_target
from vhdx.vhd import open_vhd
from vhdx.vhd_create import create_dynamic, create_fixed

pyvhdi = pytest.importorskip("pyvhdi", reason="libvhdi is not installed")

SAMPLES = Path(__file__).parents[3] / "shared" / "samples" / "vhdx"
MIB = 1 << 20
SIZE = 37 * MIB
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def sample(name: str, folder: Path) -> Path:
    packed = SAMPLES / f"{name}.gz"
    if not packed.exists():
        pytest.skip(f"the sample {name} is not at hand (looked in {SAMPLES})")
    path = folder / name
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def read_ours(path: Path) -> bytes:
    with open_disk(path) as disk:
        return disk.read_at(0, disk.size)


def read_by_libvhdi(path: Path, parent: Path | None = None) -> bytes:
    image = pyvhdi.file()
    image.open(str(path))
    above = None
    if parent is not None:
        above = pyvhdi.file()
        above.open(str(parent))
        image.set_parent(above)
    try:
        return bytes(image.read_buffer_at_offset(image.get_media_size(), 0))
    finally:
        image.close()
        if above is not None:
            above.close()


def read_by_qemu(path: Path) -> bytes:
    plain = path.with_suffix(".by-qemu")
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", path, plain], check=True)
    return plain.read_bytes()


def image_info(path: Path) -> dict[str, object]:
    done = subprocess.run(
        ["qemu-img", "info", "-f", "vpc", "--output=json", path], check=True, capture_output=True, text=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def content() -> bytes:
    source = random.Random(11)
    data = bytearray(SIZE)
    for _ in range(25):
        start, length = source.randrange(SIZE), source.randrange(1, 300_000)
        length = min(length, SIZE - start)
        data[start : start + length] = source.randbytes(length)
    return bytes(data)


@pytest.mark.parametrize("name", ["fixed.vhd", "dynamic.vhd"])
def test_disks_made_by_windows_read_as_others_read_them(tmp_path: Path, name: str) -> None:
    path = sample(name, tmp_path)
    data = read_ours(path)
    assert data == read_by_libvhdi(path)
    assert any(data)
    if name == "dynamic.vhd" and shutil.which("qemu-img"):
        assert data == read_by_qemu(path)  # qemu-img takes the size of the fixed one for raw


@needs_qemu_img
@pytest.mark.parametrize("format", ["vhd", "vhd-dynamic"])
def test_disks_that_we_write_read_the_same_by_others(tmp_path: Path, content: bytes, format: str) -> None:  # noqa: A002
    path = tmp_path / "ours.vhd"
    with create_target(path, format, SIZE) as target:  # type: ignore[arg-type]
        for start in range(0, SIZE, 777_777):
            piece = content[start : start + 777_777]
            if any(piece):
                target.write_at(start, piece)
        target.commit()
    assert read_ours(path) == content
    assert read_by_libvhdi(path) == content
    assert read_by_qemu(path) == content
    assert image_info(path)["virtual-size"] == SIZE


@needs_qemu_img
@pytest.mark.parametrize("size", [MIB, 127 * MIB, 3 << 30, 130 << 30, 2040 << 30])
@pytest.mark.parametrize("create", [create_fixed, create_dynamic])
def test_others_agree_on_the_size_to_the_byte(tmp_path: Path, size: int, create: object) -> None:
    path = tmp_path / "x.vhd"
    assert callable(create)
    create(path, size)
    assert image_info(path)["virtual-size"] == size
    image = pyvhdi.file()
    image.open(str(path))
    assert image.get_media_size() == size
    image.close()


@needs_qemu_img
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_disks_that_qemu_writes_read_right_and_can_be_written_to(
    tmp_path: Path, content: bytes, subformat: str
) -> None:
    (tmp_path / "plain").write_bytes(content)
    path = tmp_path / "theirs.vhd"
    options = f"subformat={subformat},force_size=on"
    arguments = ["convert", "-f", "raw", "-O", "vpc", "-o", options, str(tmp_path / "plain"), str(path)]
    subprocess.run(["qemu-img", *arguments], check=True)
    assert read_ours(path) == content
    changed = bytearray(content)
    with open_vhd(path, writable=True) as disk:
        for offset in (5, 20 * MIB - 3, SIZE - 100):
            disk.write_at(offset, b"changed" * 10)
            changed[offset : offset + 70] = b"changed" * 10
    assert read_by_qemu(path) == changed
    assert read_by_libvhdi(path) == changed


def test_a_differencing_disk_reads_as_libvhdi_reads_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plain").write_bytes(content)
    base = tmp_path / "base.vhd"
    convert(tmp_path / "plain", base, format="vhd-dynamic")
    with open_vhd(base) as disk:
        identifier: UUID = disk.footer.identifier
    child = tmp_path / "child.vhd"
    sectors = {number: bytes([number % 251 + 1]) * 512 for number in (0, 1, 9, 4095, 4096, 60_000, SIZE // 512 - 1)}
    write_child(
        child,
        size=SIZE,
        parent=identifier,
        sectors=sectors,
        relative=".\\base.vhd",
        absolute="C:\\base.vhd",
        name="base.vhd",
    )
    expected = bytearray(content)
    for number, data in sectors.items():
        expected[number * 512 : (number + 1) * 512] = data
    assert read_ours(child) == expected
    assert read_by_libvhdi(child, base) == expected
    with open_vhd(child, writable=True) as disk:
        disk.write_at(13 * MIB + 1, b"more" * 1000)
        expected[13 * MIB + 1 : 13 * MIB + 4001] = b"more" * 1000
    assert read_by_libvhdi(child, base) == expected


@needs_qemu_img
def test_a_vhd_for_azure_is_whole_mebibytes_and_512_bytes(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x" * (5 * MIB + 512))
    convert(tmp_path / "plain", tmp_path / "azure.vhd", format="vhd", verify=True)
    assert (tmp_path / "azure.vhd").stat().st_size == 6 * MIB + 512
    assert image_info(tmp_path / "azure.vhd")["virtual-size"] == 6 * MIB
