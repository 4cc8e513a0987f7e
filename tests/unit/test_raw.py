from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vhdx.disk import Disk
from vhdx.errors import CorruptDiskError, OsError, OutOfRangeError, ReadOnlyError, UnsupportedDiskError
from vhdx.raw import RawDisk

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        for start in (0, 10 * MIB, 63 * MIB):
            file.seek(start)
            file.write(os.urandom(MIB))
    return path


def test_reads_and_writes_anywhere(image: Path) -> None:
    content = bytearray(image.read_bytes())
    with RawDisk.open(image, writable=True) as disk:
        _: Disk = disk
        for offset, data in ((0, b"a"), (511, b"bcd"), (64 * MIB - 3, b"end"), (20 * MIB, bytes(5))):
            disk.write_at(offset, data)
            content[offset : offset + len(data)] = data
        assert disk.read_at(0, disk.size) == content
        buffer = bytearray(1000)
        disk.read_into(500, buffer)
        assert buffer == content[500:1500]
    assert image.read_bytes() == content


def test_allocated_names_what_is_no_hole(image: Path) -> None:
    with RawDisk.open(image) as disk:
        extents = np.concatenate(list(disk.allocated()))
        assert extents.dtype == np.int64
        expected = [[0, MIB], [10 * MIB, 11 * MIB], [63 * MIB, 64 * MIB]]
        assert extents.tolist() in (expected, [[0, 64 * MIB]])
        inside = np.concatenate(list(disk.allocated(MIB // 2, 10 * MIB + 512)))
        assert inside[0][0] == MIB // 2
        assert inside[-1][1] == 10 * MIB + 512


def test_extents_come_in_bounded_arrays(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhdx.raw.WINDOW_EXTENTS", 2)
    with RawDisk.open(image) as disk:
        monkeypatch.setattr(
            disk.file.__class__, "data_extents", lambda *_: iter([(0, 1), (1, 2), (4, 6), (8, 9), (9, 11)])
        )
        assert [window.tolist() for window in disk.allocated()] == [[[0, 2], [4, 6]], [[8, 11]]]


def test_trim_reads_as_zeros_and_gives_storage_back(image: Path) -> None:
    before = image.stat().st_blocks
    with RawDisk.open(image, writable=True) as disk:
        disk.trim(10 * MIB, MIB)
        assert disk.read_at(10 * MIB, MIB) == bytes(MIB)
    assert image.stat().st_size == 64 * MIB
    assert image.stat().st_blocks < before


def test_what_lies_off_the_disk_is_refused(image: Path) -> None:
    with RawDisk.open(image, writable=True) as disk:
        for offset, length in ((-1, 1), (64 * MIB, 1), (64 * MIB - 1, 2), (0, -1)):
            with pytest.raises(OutOfRangeError):
                disk.read_at(offset, length)
            with pytest.raises(OutOfRangeError):
                disk.trim(offset, length)
        with pytest.raises(OutOfRangeError):
            disk.write_at(64 * MIB - 1, b"ab")
        with pytest.raises(OutOfRangeError):
            list(disk.allocated(0, 65 * MIB))


def test_a_disk_opened_for_reading_is_not_written(image: Path) -> None:
    with RawDisk.open(image) as disk:
        assert disk.read_only
        with pytest.raises(ReadOnlyError):
            disk.write_at(0, b"x")
        with pytest.raises(ReadOnlyError):
            disk.trim(0, 512)
        disk.flush()


def test_a_file_that_shrinks_under_the_reader_is_named(image: Path) -> None:
    with RawDisk.open(image) as disk:
        os.truncate(image, MIB)
        with pytest.raises(CorruptDiskError, match="ends within"):
            disk.read_at(0, 2 * MIB)


@pytest.mark.parametrize("size", [0, 1, 511, 513])
def test_what_is_no_whole_sectors_is_no_disk(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with pytest.raises(UnsupportedDiskError):
        RawDisk.open(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(OsError, match="No such file"):
        RawDisk.open(tmp_path / "none.raw")
