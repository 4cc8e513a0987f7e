"""Small OS disks of Generation 2 for tests of the whole conversion: a Linux that is there but for what would run."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from uuid import UUID

from conversion import grub
from conversion.device import WritableDevice
from conversion.gpt import Gpt
from conversion.gpt_copies import write_gpt
from conversion.plan import Plan
from tests.support import boot_disks
from tests.support.gpt_disks import SparseDisk, make_table

MIB = 1 << 20
SECTOR = 512
ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
SWAP = UUID("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f")
BASIC_DATA = UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
LVM = UUID("e6d6d379-f507-44c2-a23c-238f2a3df928")
BIOS_BOOT = UUID("21686148-6449-6e6f-744e-656564454649")
LDM_DATA = UUID("af9b60a0-1431-4f62-bc68-3311714a69ad")

ROOT_UUID = "6f0d3c52-8e43-4d5e-9a53-60d17000000c"
ESP_VOLUME = "60D1-700C"
ESP_SECTORS = 8 * MIB // SECTOR
ROOT_SECTORS = 8 * MIB // SECTOR
X86_64, ARM64 = 62, 183  # ELF machine numbers
TOOLS = ("mkfs.vfat", "mmd", "mcopy", "mke2fs", "grub-mkimage", "sfdisk", "sgdisk")

Files = Mapping[str, bytes | str]


def missing() -> str:
    """Why such disks cannot be made and converted here; empty where they can."""
    tools = [tool for tool in TOOLS if not boot_disks.installed(tool)]
    if not (grub.DIRECTORY / "boot.img").exists():
        tools.append(str(grub.DIRECTORY))
    return f"not installed: {', '.join(tools)}" if tools else ""


def program(machine: int = X86_64) -> bytes:
    """Return the head of a program, which says what machine it is for."""
    return b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(100)


def root_files(*, root: str = f"UUID={ROOT_UUID}", fstab: str | None = None, machine: int = X86_64) -> dict[str, bytes]:
    """Return what a Debian's root holds, as far as a conversion looks at it."""
    kernel = (b"MZ" + bytes(0x200) + b"HdrS").ljust(4096, b"k")
    if machine == ARM64:
        kernel = (b"MZ" + bytes(54) + b"ARMd").ljust(4096, b"k")
    config = f"""\
set default=0
menuentry 'Debian GNU/Linux' --class debian {{
    search --no-floppy --fs-uuid --set=root {ROOT_UUID}
    linux /boot/vmlinuz-6.1.0-9-amd64 root={root} ro quiet
    initrd /boot/initrd.img-6.1.0-9-amd64
}}
"""
    text = {
        "etc/os-release": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "etc/fstab": fstab if fstab is not None else f"UUID={ROOT_UUID} / ext4 defaults 0 1\n",
        "boot/grub/grub.cfg": config,
    }
    files = {name: content.encode() for name, content in text.items()}
    files |= {"bin/sh": program(machine), "boot/vmlinuz-6.1.0-9-amd64": kernel}
    return files | {"boot/initrd.img-6.1.0-9-amd64": b"initrd"}


def esp_files() -> dict[str, bytes]:
    """Return what Debian leaves on the EFI system partition."""
    stub = f"search.fs_uuid {ROOT_UUID} root\nset prefix=($root)'/boot/grub'\nconfigfile $prefix/grub.cfg\n"
    return {
        "EFI/debian/grub.cfg": stub.encode(),
        "EFI/debian/grubx64.efi": b"MZ grub".ljust(5000, b"g"),
        "EFI/BOOT/BOOTX64.EFI": b"MZ grub".ljust(5000, b"g"),
    }


def make_root(folder: Path, files: Files) -> bytes:
    """Return an ext4 with ``files``."""
    tree, image = folder / "tree", folder / "root.img"
    for name, content in files.items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    image.unlink(missing_ok=True)
    options = ("-q", "-F", "-t", "ext4", "-U", ROOT_UUID, "-L", "system")
    boot_disks.run("mke2fs", *options, "-d", tree, image, f"{ROOT_SECTORS * SECTOR // 1024}k")
    content = image.read_bytes()
    boot_disks.run("rm", "-r", tree, image)
    return content


def make_esp(folder: Path, files: Files) -> bytes:
    """Return a FAT volume with ``files``."""
    image = folder / "esp.img"
    boot_disks.sparse_file(image, ESP_SECTORS * SECTOR)
    boot_disks.run("mkfs.vfat", "-i", ESP_VOLUME.replace("-", ""), "-n", "ESP", image)
    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    for name in folders:
        boot_disks.run("mmd", "-i", image, f"::/{name}")
    for name, content in files.items():
        source = folder / "content"
        source.write_bytes(content.encode() if isinstance(content, str) else content)
        boot_disks.run("mcopy", "-i", image, source, f"::/{name}")
    made = image.read_bytes()
    boot_disks.run("rm", image)
    return made


@dataclass(frozen=True, slots=True)
class Place:
    """A partition: its entry in the table, and its first bytes."""

    number: int
    kind: UUID
    start_sector: int
    sectors: int
    content: bytes = b""


def make_disk(places: Sequence[Place], sectors: int, *, name: str = "") -> SparseDisk:
    """Return a disk with the partitions, and something at the end of each."""
    table: Gpt = make_table(
        [(one.number, one.kind, one.start_sector, one.start_sector + one.sectors) for one in places], sectors=sectors
    )
    disk = SparseDisk(sectors * SECTOR)
    write_gpt(disk, table, boot_code=b"\x90old code")
    for one in places:
        end = (one.start_sector + one.sectors) * SECTOR
        disk.write_at(end - 8, b"the end.")
        disk.write_at(one.start_sector * SECTOR, one.content or f"partition {one.number}".encode())
    disk.log.clear()
    return disk


def plain_places(esp: bytes, root: bytes) -> list[Place]:
    """Return the layout of a usual installation: the ESP, then the root."""
    return [
        Place(1, ESP, 2048, ESP_SECTORS, esp),
        Place(2, LINUX, 2048 + ESP_SECTORS, ROOT_SECTORS, root),
    ]


PLAIN_SECTORS = 2048 + ESP_SECTORS + ROOT_SECTORS + 2048


def partition_guid(number: int) -> str:
    """Return the GUID of a partition on a disk of ``make_disk``."""
    return str(UUID(int=(0xABCDEF << 96) + number))


def partition_name(number: int) -> str:
    """Return the name of a partition on a disk of ``make_disk``."""
    return f"Teil {number} ü"


def write_plan(device: WritableDevice, plan: Plan) -> None:
    """Write a plan as whoever puts it in force does."""
    for group in plan.groups():
        for offset, data in group:
            device.write_at(offset, data)
        device.flush()


def sgdisk_says(path: Path) -> str:
    """Return what sgdisk finds wrong or right about a table."""
    return subprocess.run(["sgdisk", "-v", path], check=False, capture_output=True, text=True).stdout


def sfdisk_partitions(path: Path) -> list[tuple[int, int]]:
    """Return (start, sectors) of the partitions that sfdisk sees, without extended ones."""
    said = boot_disks.run("sfdisk", "--dump", path)
    found = []
    for line in said.splitlines():
        if "start=" not in line:
            continue
        fields = dict(part.split("=") for part in line.partition(":")[2].replace(" ", "").split(",") if "=" in part)
        if fields["type"].lower() not in ("5", "f"):
            found.append((int(fields["start"]), int(fields["size"])))
    return sorted(found)


@lru_cache(maxsize=64)
def _built(configuration: str, modules: tuple[str, ...], late: tuple[str, ...], directory: Path) -> bytes:
    return _build_core(configuration, modules, late_modules=late, directory=directory)


_build_core = grub.build_core


def cached_core(
    configuration: str, modules: Sequence[str], *, late_modules: Sequence[str] = (), directory: Path = grub.DIRECTORY
) -> bytes:
    """Return what ``grub.build_core`` would, built once: what it takes is all that it depends on."""
    return _built(configuration, tuple(modules), tuple(late_modules), directory)
