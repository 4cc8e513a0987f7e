"""A crash at any write, flush or change of size leaves a VHD that opens and reads as promised; so does a conversion."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.crash_files import RecordingFiles, crash_points, scratch_folder
from tests.support.crash_model import Begun, Flushed, assert_possible
from tests.support.vhd_files import write_child
from vhdx.convert import ConvertFormat, convert
from vhdx.errors import DiskError
from vhdx.formats import open_disk
from vhdx.vhd import open_vhd
from vhdx.vhd_create import create_dynamic

KIB = 1 << 10
MIB = 1 << 20
SIZE = 512 * KIB
BLOCK = 64 * KIB


@pytest.fixture
def source() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def crashed() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


def make_disk(folder: Path, kind: str) -> Path:
    path = folder / "disk.vhd"
    if kind == "dynamic":
        create_dynamic(path, SIZE, block_size=BLOCK)
    else:
        create_dynamic(folder / "base.vhd", SIZE, block_size=BLOCK, identifier=UUID(int=1))
        with open_vhd(folder / "base.vhd", writable=True) as disk:
            disk.write_at(0, b"base" * (SIZE // 8))
        sectors = {number: bytes([number]) * 512 for number in (1, 2, 200)}
        write_child(path, size=SIZE, parent=UUID(int=1), sectors=sectors, relative="base.vhd", block_size=BLOCK)
    return path


def record_workload(path: Path) -> tuple[RecordingFiles, bytes]:
    files = RecordingFiles(path.parent)
    chance = random.Random(5)
    with open_vhd(path) as disk:
        initial = disk.read_at(0, SIZE)
    model = bytearray(initial)
    disk = open_vhd(path, writable=True, files=files)

    def write(offset: int, data: bytes) -> None:
        model[offset : offset + len(data)] = data
        files.mark(Begun(bytes(model)))
        disk.write_at(offset, data)

    def trim(offset: int, length: int) -> None:
        model[offset : offset + length] = bytes(length)
        files.mark(Begun(bytes(model)))
        disk.trim(offset, length)

    def flush() -> None:
        disk.flush()
        files.mark(Flushed(bytes(model)))

    write(10, b"first" * 100)
    flush()
    write(BLOCK - 700, chance.randbytes(2000))
    write(3 * BLOCK + 5, chance.randbytes(512))
    flush()
    trim(BLOCK - 100, 3000)
    write(7 * BLOCK, chance.randbytes(BLOCK))
    write(600, b"again")
    flush()
    flush()
    write(5 * BLOCK + 1000, chance.randbytes(5000))
    disk.close()
    files.mark(Flushed(bytes(model)))
    return files, initial


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_every_crash_point_of_writing_reads_as_promised_and_can_be_written_on(
    source: Path, crashed: Path, kind: str
) -> None:
    path = make_disk(source, kind)
    files, initial = record_workload(path)
    count = 0
    for point in crash_points(files, seeds=3):
        point.write_to(crashed)
        with open_vhd(crashed / path.name) as disk:
            before = bytearray(disk.read_at(0, SIZE))
            assert_possible(bytes(before), initial, point.marks, point)
        with open_vhd(crashed / path.name, writable=True) as disk:
            disk.write_at(6 * BLOCK - 5, b"0123456789")
            before[6 * BLOCK - 5 : 6 * BLOCK + 5] = b"0123456789"
        with open_vhd(crashed / path.name) as disk:
            assert disk.read_at(0, SIZE) == before, point
        count += 1
    assert count > 60


@pytest.mark.parametrize("format", ["vhdx", "vhd", "vhd-dynamic", "raw"])
def test_a_conversion_cut_off_anywhere_leaves_the_old_target_or_the_whole_new_one(
    source: Path,
    crashed: Path,
    format: ConvertFormat,  # noqa: A002
) -> None:
    content = random.Random(1).randbytes(MIB) + bytes(MIB) + b"end" * 10
    content += bytes(-len(content) % MIB)
    (source / "source.raw").write_bytes(content)
    (source / "target").write_bytes(b"precious")
    files = RecordingFiles(source)
    convert(source / "source.raw", source / "target", format=format, overwrite=True, files=files)
    seen = set()
    for point in crash_points(files, seeds=1):
        point.write_to(crashed)
        target = crashed / "target"
        if target.stat().st_size == len(b"precious"):
            assert target.read_bytes() == b"precious"
            seen.add("old")
            continue
        with open_disk(target) as disk:
            assert disk.read_at(0, disk.size) == content, point
        seen.add("new")
    assert seen == {"old", "new"}


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("format", ["vhdx", "vhd", "vhd-dynamic", "raw"])
def test_a_conversion_whose_storage_fails_anywhere_says_so_and_cleans_up(
    source: Path,
    format: ConvertFormat,  # noqa: A002
    applied: bool,
) -> None:
    (source / "source.raw").write_bytes(b"data" * (MIB // 2))
    clean = RecordingFiles(source)
    convert(source / "source.raw", source / "target", format=format, files=clean)
    (source / "target").unlink()
    # An error after the fact is tried for what changes content; the recorder does not know it for names.
    ordinals = [
        ordinal
        for ordinal, effect in enumerate(clean.effects)
        if not applied or effect.kind in ("write", "truncate", "fsync")
    ]
    assert len(ordinals) > 2
    for ordinal in ordinals:
        files = RecordingFiles(source, fail_at=ordinal, applied=applied)
        with pytest.raises(DiskError, match="injected"):
            convert(source / "source.raw", source / "target", format=format, files=files)
        assert [path.name for path in source.iterdir()] == ["source.raw"], ordinal
