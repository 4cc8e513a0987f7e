from __future__ import annotations

import os
from pathlib import Path

import pytest

from vhdx.create import create_disk
from vhdx.errors import CorruptDiskError, DiskError, FormatUnknownError, OsError, UnsupportedDiskError
from vhdx.formats import chain_of, detect_format, open_disk
from vhdx.vhd_create import create_dynamic, create_fixed

MIB = 1 << 20


def make(kind: str, path: Path) -> Path:
    match kind:
        case "vhdx":
            create_disk(path, size=4 * MIB, block_size=MIB)
        case "vhd-fixed":
            create_fixed(path, 4 * MIB)
        case "vhd-dynamic":
            create_dynamic(path, 4 * MIB)
        case "qcow2":
            path.write_bytes(b"QFI\xfb" + bytes(2000))
        case "raw":
            path.write_bytes(bytes(4 * MIB))
    return path


@pytest.mark.parametrize(
    "kind, format", [("vhdx", "vhdx"), ("vhd-fixed", "vhd"), ("vhd-dynamic", "vhd"), ("qcow2", "qcow2"), ("raw", "raw")]
)
def test_the_content_decides_whatever_the_name(tmp_path: Path, kind: str, format: str) -> None:  # noqa: A002
    path = make(kind, tmp_path / "disk.img")
    assert detect_format(path) == format
    if format == "qcow2":
        with pytest.raises(UnsupportedDiskError, match="qcow2") as caught:
            open_disk(path)
        assert "convert" in (caught.value.hint or "")
        return
    for writable in (False, True):
        with open_disk(path, writable=writable) as disk:
            assert (disk.format, disk.size, disk.read_only) == (format, 4 * MIB, not writable)
            assert disk.read_at(0, 512) == bytes(512)
            assert chain_of(disk) == (path,)


@pytest.mark.parametrize("kind, damaged", [("vhdx", [0]), ("vhd-dynamic", [0, -512])])
def test_a_file_whose_identifier_is_damaged_is_never_taken_for_raw(
    tmp_path: Path, kind: str, damaged: list[int]
) -> None:
    path = make(kind, tmp_path / "disk.img")
    data = bytearray(path.read_bytes())
    for position in damaged:
        data[position] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorruptDiskError, match="damaged"):
        open_disk(path)


def test_a_damaged_vhdx_is_corrupt_and_not_unknown(tmp_path: Path) -> None:
    path = make("vhdx", tmp_path / "disk.img")
    data = bytearray(path.read_bytes())
    data[64 * 1024 : 192 * 1024] = bytes(128 * 1024)
    path.write_bytes(data)
    with pytest.raises(CorruptDiskError):
        open_disk(path)


@pytest.mark.parametrize("name", ["a.vhd", "a.VHDX", "a.avhdx", "a.qcow2"])
def test_a_name_that_promises_more_than_the_content_keeps_is_refused_but_for_who_insists(
    tmp_path: Path, name: str
) -> None:
    path = make("raw", tmp_path / name)
    with pytest.raises(FormatUnknownError, match="name says") as caught:
        open_disk(path)
    assert "raw" in (caught.value.hint or "")
    with open_disk(path, format="raw") as disk:
        assert disk.format == "raw"


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"x" * 511, b"KDMV" + bytes(508), b"x" * 64 + b"\x7f\x10\xda\xbe"]
)
def test_what_is_no_disk_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises((FormatUnknownError, UnsupportedDiskError)) as caught:
        open_disk(path)
    assert caught.value.path == str(path)


def test_a_format_that_contradicts_the_content_gives_our_error(tmp_path: Path) -> None:
    path = make("raw", tmp_path / "x.raw")
    for name in ("vhdx", "vhd", "qcow2", "frob"):
        with pytest.raises(DiskError):
            open_disk(path, format=name)


def test_missing_files_and_folders_say_so(tmp_path: Path) -> None:
    with pytest.raises(OsError, match="No such file"):
        open_disk(tmp_path / "none")
    with pytest.raises(FormatUnknownError, match="folder"):
        open_disk(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(FormatUnknownError, match="pipe"):
        open_disk(path)
    with pytest.raises(FormatUnknownError, match="pipe"):
        open_disk(path, format="raw")
