from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.vhd_files import write_child
from vhdx.compare import CHUNK_BYTES, compare, differences
from vhdx.convert import CONVERT_FORMATS, ConvertFormat, convert, nonzero_runs
from vhdx.create import create_disk
from vhdx.disk import Disk
from vhdx.errors import CorruptDiskError, OsError, OutOfRangeError, ToolError, UnsupportedDiskError
from vhdx.formats import detect_format, open_disk
from vhdx.qcow2 import virtual_size
from vhdx.raw import RawDisk
from vhdx.target import create_target
from vhdx.vhd_create import create_dynamic

MIB = 1 << 20
SIZE = 21 * MIB + 512 * 3
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


@pytest.fixture(scope="module")
def content() -> bytes:
    """Data in pieces, zeros written and zeros never written between them."""
    random_bytes = random.Random(7)
    data = bytearray(SIZE)
    for start, length in ((0, 70_000), (3 * MIB - 5, MIB), (9 * MIB, 1), (SIZE - 700, 700)):
        data[start : start + length] = random_bytes.randbytes(length)
    return bytes(data)


@pytest.fixture(scope="module")
def raw(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.raw"
    path.write_bytes(content)
    return path


def read_all(path: Path) -> bytes:
    with open_disk(path) as disk:
        return disk.read_at(0, disk.size)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("first, second", list(itertools.product(CONVERT_FORMATS, repeat=2)))
def test_every_format_to_every_other_and_back(
    raw: Path, content: bytes, tmp_path: Path, first: ConvertFormat, second: ConvertFormat
) -> None:
    if "qcow2" in (first, second) and shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    convert(raw, one, format=first, verify=True)
    result = convert(one, two, format=second, verify=True)
    assert (result.source, result.target, result.verified) == (one, two, True)
    convert(two, three, format="raw")
    assert read_all(three).rstrip(b"\0") == content.rstrip(b"\0")
    grown = "vhd" in (first, second)
    assert three.stat().st_size == (22 * MIB if grown else SIZE)
    assert detect_format(two) == second.partition("-")[0]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("format", ["vhdx", "vhd-dynamic", "raw", "vhd"])
def test_zeros_are_not_written(raw: Path, tmp_path: Path, format: ConvertFormat) -> None:  # noqa: A002
    result = convert(raw, tmp_path / "x", format=format)
    assert result.written_bytes < 2 * MIB
    with open_disk(tmp_path / "x") as disk:
        assert disk.read_at(12 * MIB, MIB) == bytes(MIB)
    assert (tmp_path / "x").stat().st_blocks * 512 < 12 * MIB


def test_only_allocated_extents_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.vhdx"
    create_disk(source, size=512 * MIB, block_size=MIB)
    with open_disk(source, writable=True) as disk:
        disk.write_at(300 * MIB + 5, b"x")
    read: list[tuple[int, int]] = []
    with open_disk(source) as disk:
        plain = disk.read_into

        def watched(offset: int, buffer: bytearray | memoryview) -> None:
            read.append((offset, len(buffer)))
            plain(offset, buffer)

        monkeypatch.setattr(type(disk), "read_into", lambda _, offset, buffer: watched(offset, buffer))
        from vhdx.convert import convert_disk  # noqa: PLC0415

        convert_disk(disk, tmp_path / "x.raw", format="raw")
    assert sum(length for _, length in read) <= MIB


def test_parents_are_followed(tmp_path: Path) -> None:
    create_dynamic(tmp_path / "base.vhd", 4 * MIB, identifier=UUID(int=1))
    with open_disk(tmp_path / "base.vhd", writable=True) as disk:
        disk.write_at(MIB, b"base" * 1000)
    child = tmp_path / "child.vhd"
    write_child(child, size=4 * MIB, parent=UUID(int=1), sectors={2048: b"c" * 512}, relative="base.vhd")
    convert(child, tmp_path / "flat.vhdx", format="vhdx", verify=True)
    data = read_all(tmp_path / "flat.vhdx")
    assert data[MIB : MIB + 4000] == b"c" * 512 + (b"base" * 1000)[512:]


@pytest.mark.parametrize("format", CONVERT_FORMATS)
def test_a_target_that_exists_is_left_alone_unless_told_otherwise(
    raw: Path,
    tmp_path: Path,
    format: ConvertFormat,  # noqa: A002
) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"precious")
    with pytest.raises(OsError, match="exists"):
        convert(raw, target, format=format)
    assert target.read_bytes() == b"precious"
    if format != "qcow2" or shutil.which("qemu-img"):
        convert(raw, target, format=format, overwrite=True)
        assert detect_format(target) == format.partition("-")[0]


def test_the_source_and_its_parents_are_never_overwritten(tmp_path: Path) -> None:
    create_dynamic(tmp_path / "base.vhd", MIB, identifier=UUID(int=1))
    write_child(tmp_path / "child.vhd", size=MIB, parent=UUID(int=1), sectors={}, relative="base.vhd")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.vhd").hardlink_to(tmp_path / "base.vhd")
    for name in ("child.vhd", "base.vhd", "link.vhd"):
        with pytest.raises(OsError, match="source itself"):
            convert(tmp_path / "child.vhd", tmp_path / name, format="vhd", overwrite=True)
    assert {path: path.read_bytes() for path in before} == before
    assert leftovers(tmp_path) == []


def test_a_folder_is_no_target(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(OsError, match="folder"):
        convert(raw, tmp_path, format="raw", overwrite=True)


@pytest.mark.parametrize("format", ["vhdx", "vhd", "vhd-dynamic", "raw"])
def test_what_fails_midway_leaves_nothing_behind(
    raw: Path,
    tmp_path: Path,
    format: ConvertFormat,  # noqa: A002
) -> None:
    def stop(done_bytes: int, total_bytes: int, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(raw, tmp_path / "x", format=format, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_differs_is_noticed_and_thrown_away(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RawDisk.write_at

    def bent(disk: RawDisk, offset: int, data: bytes) -> None:
        plain(disk, offset, bytes(data)[:-1] + b"\x55")

    monkeypatch.setattr(RawDisk, "write_at", bent)
    with pytest.raises(CorruptDiskError, match="differs"):
        convert(raw, tmp_path / "x.raw", format="raw", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_progress_rises_to_the_total(raw: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert(raw, tmp_path / "x", format="vhdx", verify=True, progress=lambda *state: calls.append(state))
    for phase in ("copying", "comparing"):
        states = [(done, total) for done, total, name in calls if name == phase]
        assert states and states[-1][0] == states[-1][1]
        assert [done for done, _ in states] == sorted(done for done, _ in states)


def test_4096_byte_sectors_go_to_vhdx_and_not_to_vhd(tmp_path: Path) -> None:
    create_disk(tmp_path / "4k.vhdx", size=4 * MIB, sector_size=4096)
    convert(tmp_path / "4k.vhdx", tmp_path / "copy.vhdx", format="vhdx")
    with open_disk(tmp_path / "copy.vhdx") as disk:
        assert disk.sector_size == 4096
    for format in ("vhd", "vhd-dynamic"):  # noqa: A001
        with pytest.raises(UnsupportedDiskError, match="512"):
            convert(tmp_path / "4k.vhdx", tmp_path / "copy.vhd", format=format)


def test_a_disk_too_large_for_vhd_is_refused_with_a_hint(tmp_path: Path) -> None:
    create_disk(tmp_path / "large.vhdx", size=3 << 40)
    with pytest.raises(OutOfRangeError, match="2040 GiB") as caught:
        convert(tmp_path / "large.vhdx", tmp_path / "x.vhd", format="vhd")
    assert "VHDX" in (caught.value.hint or "")


def test_a_missing_qemu_img_is_named(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="not installed") as caught:
        convert(raw, tmp_path / "x.qcow2", format="qcow2")
    assert "qemu" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@needs_qemu_img
def test_a_damaged_qcow2_gives_qemu_imgs_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(2000))
    with pytest.raises(ToolError, match="qemu-img failed"):
        convert(path, tmp_path / "x.raw", format="raw")


@pytest.mark.parametrize("field, value", [(8, 1024), (72, 4)])
def test_a_qcow2_that_reaches_for_other_files_is_refused(tmp_path: Path, field: int, value: int) -> None:
    header = bytearray(b"QFI\xfb\0\0\0\3" + bytes(2000))
    header[field : field + 8] = value.to_bytes(8, "big")
    path = tmp_path / "x.qcow2"
    path.write_bytes(header)
    with pytest.raises(UnsupportedDiskError, match="another file"):
        virtual_size(path)
    with pytest.raises(UnsupportedDiskError, match="another file"):
        convert(path, tmp_path / "x.raw", format="raw")


# --- targets


@pytest.mark.parametrize("format", ["vhdx", "vhdx-fixed", "vhd", "vhd-dynamic", "raw"])
def test_a_target_appears_with_its_commit_alone(tmp_path: Path, format: str) -> None:  # noqa: A002
    path = tmp_path / "x"
    with create_target(path, format, 2 * MIB) as target:  # type: ignore[arg-type]
        target.prepare(np.array([[0, MIB]], dtype=np.int64))
        target.write_at(MIB // 2, b"data")
    assert list(tmp_path.iterdir()) == []
    with create_target(path, format, 2 * MIB) as target:  # type: ignore[arg-type]
        target.write_at(MIB // 2, b"data")
        assert not path.exists()
        target.commit()
        target.abort()
    assert read_all(path)[MIB // 2 :][:4] == b"data"
    assert leftovers(tmp_path) == []


# --- compare


@given(
    size=st.integers(1, 40).map(lambda n: n * 512),
    longer=st.integers(0, 10).map(lambda n: n * 512),
    changes=st.lists(st.integers(0, 10**6), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_differences_are_those_that_a_naive_comparison_finds(
    tmp_path_factory: pytest.TempPathFactory, size: int, longer: int, changes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("compare")
    first = bytearray(os.urandom(512) * (size // 512))
    second = bytearray(first + bytes(longer))
    for change in changes:
        second[change % len(second)] ^= 1
    (folder / "a.raw").write_bytes(first)
    (folder / "b.raw").write_bytes(second)
    padded = bytes(first) + bytes(longer)
    expected = [
        sector for sector in range(len(second) // 512) if padded[sector * 512 :][:512] != second[sector * 512 :][:512]
    ]
    with open_disk(folder / "a.raw") as a, open_disk(folder / "b.raw") as b:
        found = [
            sector
            for window in differences(a, b)
            for start, end in window.tolist()
            for sector in range(start // 512, end // 512)
        ]
        assert found == expected
        result = compare(b, a)
        assert result.first_difference == (expected[0] * 512 if expected else None)
        assert result.identical == (not expected and not longer)


def test_comparing_over_a_chunk_border_and_between_formats(raw: Path, tmp_path: Path) -> None:
    convert(raw, tmp_path / "x.vhdx", format="vhdx")
    with open_disk(tmp_path / "x.vhdx", writable=True) as disk:
        disk.write_at(CHUNK_BYTES - 1, b"zz")
        disk.write_at(15 * MIB, b"z")
    with open_disk(raw) as a, open_disk(tmp_path / "x.vhdx") as b:
        extents: list[list[int]] = np.concatenate(list(differences(a, b))).tolist()
    assert extents in (
        [[CHUNK_BYTES - 512, CHUNK_BYTES + 512], [15 * MIB, 15 * MIB + 512]],
        [[CHUNK_BYTES - 512, CHUNK_BYTES], [CHUNK_BYTES, CHUNK_BYTES + 512], [15 * MIB, 15 * MIB + 512]],
    )


def test_empty_disks_are_compared_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks: list[Disk] = []
    for name in ("a", "b"):
        create_disk(tmp_path / name, size=64 << 40, block_size=256 * MIB)
        disks.append(open_disk(tmp_path / name))
    for disk in disks:
        monkeypatch.setattr(type(disk), "read_into", lambda *_: pytest.fail("read"))
    assert compare(*disks).identical
    for disk in disks:
        disk.close()


@given(st.lists(st.tuples(st.integers(0, 5 << 16), st.integers(1, 255)), max_size=5), st.integers(0, 5 << 16))
@settings(max_examples=100, deadline=None)
def test_no_byte_that_is_not_zero_is_left_out(marks: list[tuple[int, int]], length: int) -> None:
    data = bytearray(length)
    for position, value in marks:
        if position < length:
            data[position] = value
    runs = nonzero_runs(memoryview(data)).tolist()
    kept = bytearray(length)
    for first, last in runs:
        assert first < last <= length
        kept[first:last] = data[first:last]
        for granule in range(first, last, 1 << 16):
            assert any(data[granule : min(last, granule + (1 << 16))])
    assert kept == data
