"""The GRUB core: how it is fitted to a disk, and what is said where GRUB is missing or another one."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from conversion import grub
from conversion.errors import ToolError


def fake_core(sectors: int = 100, *, cut: int = 0, listed: int | None = None, segment: int = 0x820) -> bytes:
    first = b"\x11" * 500 + struct.pack("<QHH", 2, (sectors if listed is None else listed) - 1, segment)
    return (first + b"\x22" * 512 * (sectors - 1))[: 512 * sectors - cut]


def fake_boot_image(directory: Path, **changes: bytes) -> Path:
    image = bytearray(b"\xcc" * 510 + b"\x55\xaa")
    image[0x5C:0x64] = struct.pack("<Q", 1)
    image[0x64:0x68] = changes.get("drive", b"\xff\xfa\xeb\x05")
    directory.mkdir()
    (directory / "boot.img").write_bytes(bytes(image) + changes.get("more", b""))
    return directory


class TestPlacing:
    def test_knows_where_its_rest_is_and_fills_its_last_sector(self) -> None:
        core = fake_core(cut=100)
        placed = grub.place_core(core, 34)
        assert len(placed) == 100 * 512
        assert struct.unpack_from("<QHH", placed, 500) == (35, 99, 0x820)
        assert placed[:500] == core[:500]
        assert placed[512:] == core[512:] + b"\0" * 100
        assert grub.core_sectors(core) == 100

    @pytest.mark.parametrize(
        "core",
        [b"", b"\0" * 512, fake_core(listed=101), fake_core(segment=0x800), fake_core(2000)],
        ids=["empty", "one sector", "another length listed", "another segment", "too large"],
    )
    def test_refuses_what_is_no_core(self, core: bytes) -> None:
        with pytest.raises(ToolError, match="is not a core image"):
            grub.place_core(core, 34)

    @pytest.mark.parametrize("lba", [0, -1, 1 << 32])
    def test_refuses_a_place_that_is_none(self, lba: int) -> None:
        with pytest.raises(ValueError, match="cannot begin"):
            grub.place_core(fake_core(), lba)


class TestBootCode:
    def test_patches_the_place_and_the_check_of_the_drive(self, tmp_path: Path) -> None:
        code = grub.boot_code(0x1_2345_6789, directory=fake_boot_image(tmp_path / "grub"))
        expected = bytearray(b"\xcc" * 440)
        expected[0x5C:0x64] = bytes.fromhex("89 67 45 23 01 00 00 00")
        expected[0x64:0x68] = bytes.fromhex("ff fa 90 90")
        assert code == expected

    @pytest.mark.parametrize("changes", [{"drive": b"\xff\xfa\x90\x90"}, {"more": b"\0"}], ids=["drive", "length"])
    def test_refuses_another_boot_code(self, tmp_path: Path, changes: dict[str, bytes]) -> None:
        with pytest.raises(ToolError, match="known here") as raised:
            grub.boot_code(34, directory=fake_boot_image(tmp_path / "grub", **changes))
        assert raised.value.subject == str(tmp_path / "grub" / "boot.img")

    def test_names_the_packages_where_it_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ToolError, match="cannot be read") as raised:
            grub.boot_code(34, directory=tmp_path)
        assert raised.value.hint is not None
        assert "grub-pc-bin" in raised.value.hint


class TestProgram:
    def program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        path = tmp_path / "grub-mkimage"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def test_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grub, "PROGRAMS", ("no-such-grub-mkimage",))
        with pytest.raises(ToolError, match="is not installed") as raised:
            grub.build_core("true\n", ("biosdisk",))
        assert raised.value.hint is not None
        assert "grub-common" in raised.value.hint

    def test_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program(tmp_path, monkeypatch, "echo no module today >&2; exit 3")
        with pytest.raises(ToolError, match="status 3 and said: no module today"):
            grub.build_core("true\n", ("biosdisk",))

    def test_makes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program(tmp_path, monkeypatch, "exit 0")
        with pytest.raises(ToolError, match="cannot be called"):
            grub.build_core("true\n", ("biosdisk",))

    def test_makes_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; head -c 2000 /dev/zero > "$2"')
        with pytest.raises(ToolError, match="made no core"):
            grub.build_core("true\n", ("biosdisk",))

    def test_makes_too_much(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; head -c 500000 /dev/zero > "$2"')
        with pytest.raises(ToolError, match="a core of 500000 bytes"):
            grub.build_core("true\n", ("biosdisk",))


@pytest.mark.skipif(not (grub.DIRECTORY / "boot.img").exists(), reason="grub-pc-bin is not installed")
class TestInstalledGrub:
    def test_equal_arguments_give_equal_cores(self) -> None:
        first = grub.build_core("echo one\n", ("biosdisk", "echo"), late_modules=("linux",))
        assert grub.build_core("echo one\n", ("biosdisk", "echo"), late_modules=("linux",)) == first
        assert grub.build_core("echo two\n", ("biosdisk", "echo"), late_modules=("linux",)) != first

    def test_unknown_module(self) -> None:
        with pytest.raises(ToolError, match="nosuchmodule"):
            grub.build_core("true\n", ("nosuchmodule",))
        with pytest.raises(ToolError) as raised:
            grub.build_core("true\n", (), late_modules=("nosuchmodule",))
        assert raised.value.subject == str(grub.DIRECTORY / "nosuchmodule.mod")

    def test_boot_code_differs_from_grub_s_own_by_the_patches_alone(self) -> None:
        own = (grub.DIRECTORY / "boot.img").read_bytes()
        code = grub.boot_code(34)
        assert [at for at in range(440) if code[at] != own[at]] == [0x5C, 0x66, 0x67]
