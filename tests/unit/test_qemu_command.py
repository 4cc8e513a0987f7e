"""The command line of a recovery machine, and the picture of its screen: values in, values out."""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from replica.errors import PlatformError
from replica.model import Machine, Nic
from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import nbd_address
from replica.platforms.platform import DiskSpec, MachineSpec
from replica.platforms.qemu import command
from replica.platforms.qemu.files import QemuFiles
from replica.platforms.qemu.screen import PNG, png_of
from replica.platforms.sockets import socket_path

FILES = QemuFiles(MachineFolder(Path("/state/machines/qemu/a,b"), "a,b"))
NICS = (Nic("52:54:00:00:00:01"), Nic())


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """QEMU and OVMF as if they were installed."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    pair = (tmp_path / "code.fd", tmp_path / "vars.fd")
    for path in pair:
        path.touch()
    monkeypatch.setattr(command, "FIRMWARE", (pair,))


def disks(count: int, *, bus: str = "scsi", sector_size: int = 512) -> tuple[DiskSpec, ...]:
    return tuple(
        DiskSpec(n, 1 << 20, bus, url=f"nbd+unix:///{n}?socket=/s", sector_size=sector_size) for n in range(count)
    )


def line(spec: MachineSpec, backed: int = 0) -> list[str]:
    return command.command_line(spec, FILES, frozenset(range(backed)), accelerator="tcg", options=["-extra"])


def devices(spec: MachineSpec, backed: int = 0) -> list[str]:
    said = line(spec, backed)
    return [value for option, value in pairwise(said) if option == "-device" and "drive=" in value]


def test_generation_1_has_ide_and_then_sata() -> None:
    spec = MachineSpec("a,b", "a", Machine(1, 3, 1 << 30), disks(11))
    said = line(spec)
    assert said[said.index("-machine") + 1] == "pc,accel=tcg"
    assert said[said.index("-name") + 1] == "guest=a,,b"
    assert said[said.index("-m") + 1] == "size=1024M" and said[said.index("-smp") + 1] == "3"
    assert not any("pflash" in one for one in said)
    assert said[-3:] == ["-nic", "none", "-extra"]
    places = [one.partition(",bus=")[2] for one in devices(spec)]
    assert places[:4] == ["ide.0,unit=0", "ide.0,unit=1", "ide.1,unit=0", "ide.1,unit=1"]
    assert places[4:] == [*(f"sata0.{port}" for port in range(6)), "sata1.0"]
    assert [one for one in said if one.startswith("ich9")] == ["ich9-ahci,id=sata0", "ich9-ahci,id=sata1"]
    assert ["bootindex" in one for one in devices(spec)] == [True] + [False] * 10
    assert all("rerror=stop,werror=stop" in one for one in devices(spec))


def test_generation_2_has_uefi_and_sata() -> None:
    spec = MachineSpec("m", "m", Machine(2, 1, 1 << 30), disks(7))
    said = line(spec)
    assert said[said.index("-machine") + 1] == "q35,accel=tcg"
    assert sum("if=pflash" in one for one in said) == 2
    places = [one.partition(",bus=")[2] for one in devices(spec)]
    assert places == [*(f"ide.{port}" for port in range(6)), "sata0.0"]


def test_virtio_where_it_was_and_where_sectors_are_large() -> None:
    for given in (disks(1, bus="virtio"), disks(1, sector_size=4096)):
        (said,) = devices(MachineSpec("m", "m", Machine(1), given))
        assert said.startswith("virtio-blk-pci,drive=disk0")
        assert f"logical_block_size={given[0].sector_size}," in said


def test_adapters_keep_their_addresses_and_are_shut_in_where_isolated() -> None:
    spec = MachineSpec("m", "m", Machine(1, nics=NICS), disks(1))
    said = line(spec)
    assert [one for one in said if one.startswith("user,")] == ["user,id=net0", "user,id=net1"]
    first, second = [one for one in said if "netdev=" in one]
    assert first == "e1000,netdev=net0,mac=52:54:00:00:00:01"
    assert re.fullmatch(r"e1000,netdev=net1,mac=52:54:00(:[0-9a-f]{2}){3}", second)  # one of its own, always the same
    assert second in line(replace(spec, vm_name="other")) and second not in line(replace(spec, name="n"))
    said = line(replace(spec, isolated=True, system="linux"))
    assert [one for one in said if one.startswith("user,")] == ["user,id=net0,restrict=on", "user,id=net1,restrict=on"]
    assert second.replace("e1000", "virtio-net-pci") in said
    assert second.replace("e1000", "e1000e") in line(replace(spec, machine=replace(spec.machine, generation=2)))


def test_a_disk_that_is_whole_stands_by_itself() -> None:
    spec = MachineSpec("m", "m", Machine(1), disks(2))
    said = line(spec, backed=1)
    nodes = [json.loads(value) for option, value in pairwise(said) if option == "-blockdev"]
    assert [one["node-name"] for one in nodes] == ["disk0", "keep0", "disk1"]
    assert nodes[0]["backing"]["file"]["server"] == {"type": "unix", "path": "/s"}
    assert nodes[0]["backing"]["read-only"] and nodes[0]["backing"]["file"]["export"] == "0"
    assert nodes[2]["backing"] is None  # what its header may still say is not looked at
    assert [one.partition(",")[2].partition(",")[0] for one in devices(spec, backed=1)] == [
        "drive=keep0",
        "drive=disk1",
    ]


def test_disks_over_files_are_opened_by_their_format() -> None:
    spec = DiskSpec(0, 1 << 20, "ide", path=Path("/d.vhd"), format="vhd")
    node = command.block_node(spec, FILES, backed=True)["backing"]
    assert (node["driver"], node["force-size-calc"], node["file"]["filename"]) == ("vpc", "current_size", "/d.vhd")
    with pytest.raises(PlatformError, match="neither"):
        command.block_node(DiskSpec(0, 1, "ide"), FILES, backed=True)


@pytest.mark.parametrize("url", ["", "file:///x", "nbd:///x", "nbd+unix:///x", "nbd://host:port/x", "nbd://[::1/x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(PlatformError, match="is no NBD address"):
        nbd_address(url)


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "FIRMWARE", ())
    line(MachineSpec("m", "m", Machine(1), disks(1)))
    with pytest.raises(PlatformError, match="OVMF") as caught:
        line(MachineSpec("m", "m", Machine(2), disks(1)))
    assert "ovmf" in str(caught.value.hint)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(PlatformError, match="qemu-system-x86_64 is needed"):
        line(MachineSpec("m", "m", Machine(1), disks(1)))


def test_sockets_are_in_the_folder_or_where_their_names_are_short() -> None:
    short, long = Path("/state/m"), Path("/state") / ("x" * 100)
    assert socket_path(short, "qmp") == short / "qmp"
    found = socket_path(long, "replication")
    assert len(str(found)) <= 107 and found == socket_path(long, "replication")
    assert found != socket_path(long / "y", "replication")


def test_a_picture_of_any_kind_becomes_png() -> None:
    pixels = bytes(range(18))
    made = png_of(b"P6\n3 2\n255\n" + pixels)
    assert made.startswith(PNG)
    chunks: dict[bytes, bytes] = {}
    at = len(PNG)
    while at < len(made):
        (length,) = struct.unpack_from(">I", made, at)
        body = made[at + 4 : at + 8 + length]
        assert struct.unpack_from(">I", made, at + 8 + length)[0] == zlib.crc32(body)
        chunks[body[:4]] = body[4:]
        at += 12 + length
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 2, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == b"\0" + pixels[:9] + b"\0" + pixels[9:]
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert png_of(PNG + b"rest") == PNG + b"rest"


@pytest.mark.parametrize(
    "picture",
    [b"", b"P6", b"P5\n1 1\n255\n\0\0\0", b"P6\n2 2\n255\nshort", b"P6\n999999 999999\n255\n", b"P6 1 1 65535 xx"],
)
def test_a_picture_that_is_none_is_refused(picture: bytes) -> None:
    with pytest.raises(PlatformError, match="picture of the screen"):
        png_of(picture)
