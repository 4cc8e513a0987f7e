"""Real guests of every layout: started by UEFI, put under a plain MBR with our chain, started by a BIOS from IDE."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from conversion.bootscript import (
    EntriesGuest,
    Entry,
    GrubGuest,
    Guest,
    LoaderGuest,
    Place,
    Substitution,
    boot_script,
)
from conversion.uki import split_unified_image
from tests.support import boot_disks, debian_guest, linux_guests, qemu
from tests.support.boot_disks import SECTOR, Partition
from tests.support.debian_guest import ESP_START_BYTES, ROOT_PARTITION_UUID, ROOT_UUID
from tests.support.linux_guests import BOOT_UUID, ESP_FILE_SYSTEM

pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("machines")]

ALWAYS = ("ext4", "lvm")  # the others take GODWIT_BOOT=all
KINDS = {
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": 0xEF,
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4": 0x83,
    "E6D6D379-F507-44C2-A23C-238F2A3DF928": 0x8E,
}
SUBSTITUTION = Substitution(ROOT_PARTITION_UUID, f"UUID={ROOT_UUID}")


@dataclass(frozen=True, slots=True)
class Case:
    """A layout, and what its script is made from; a unified image is split first."""

    layout: str
    guest: Guest | None


CASES = [
    Case("ext4", GrubGuest(Place(ROOT_UUID, 2), "/boot/grub")),
    Case("lvm", GrubGuest(Place(ROOT_UUID), "/boot/grub")),
    Case("boot", GrubGuest(Place(BOOT_UUID, 2), "/grub")),
    Case("xfs", GrubGuest(Place(ROOT_UUID, 2), "/boot/grub")),
    Case("btrfs", GrubGuest(Place(ROOT_UUID, 2), "/@/boot/grub")),
    Case("partuuid", GrubGuest(Place(ROOT_UUID, 2), "/boot/grub", (SUBSTITUTION,))),
    Case("systemd-boot", LoaderGuest(Place(ESP_FILE_SYSTEM, 1))),
    Case("unified", None),
    Case("red-hat", GrubGuest(Place(BOOT_UUID, 2), "/grub2")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_starts_by_uefi_then_by_a_bios_from_ide(tmp_path: Path, case: Case) -> None:
    if case.layout not in ALWAYS and os.environ.get("GODWIT_BOOT") != "all":
        pytest.skip("GODWIT_BOOT=all, as in `make test-boot`, starts this layout too")
    missing = linux_guests.missing_tools() + boot_disks.missing_tools()
    if missing:
        reason = f"not installed: {', '.join(missing)}; `make setup` installs what is needed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    disk = tmp_path / "disk.raw"
    boot_disks.run("cp", "--sparse=always", linux_guests.cached_guest(case.layout), disk)

    before = qemu.boot(disk, image_format="raw", commands="echo as UEFI >> /var/lib/godwit/journal; ls /dev/vda")
    assert before.ready.startswith("GODWIT-READY firmware=uefi journal=")
    assert before.status == 0

    as_generation1(disk)
    if case.layout == "partuuid":
        rewrite_fstab(disk)
    script = boot_script(case.guest or unified(disk, tmp_path))
    core = boot_disks.install_chain(disk, script)
    assert len(core) <= (2048 - boot_disks.CORE_LBA) * SECTOR
    commands = "echo as BIOS >> /var/lib/godwit/journal && ls /dev/sda /boot/efi/EFI && findmnt -no SOURCE,FSTYPE /"
    after = qemu.boot(disk, image_format="raw", firmware="seabios", bus="ide", commands=commands)
    assert after.ready.startswith("GODWIT-READY firmware=bios journal=")
    assert after.ready.endswith("last=as UEFI")
    assert after.status == 0, after.output
    print(f"{case.layout}: UEFI {before.ready_seconds:.1f} s, BIOS {after.ready_seconds:.1f} s, {after.output[-1]}")


def as_generation1(disk: Path) -> None:
    """Describe the GPT's partitions in an MBR."""
    table = json.loads(boot_disks.run("sfdisk", "--json", disk))["partitiontable"]
    partitions = [Partition(entry["start"], entry["size"], KINDS[entry["type"]]) for entry in table["partitions"]]
    boot_disks.write_mbr(disk, partitions)


def rewrite_fstab(disk: Path) -> None:
    """Name the root by UUID in /etc/fstab, where the script cannot: else it stays mounted read-only."""
    old = f"PARTUUID={ROOT_PARTITION_UUID} / ".encode()
    new = f"UUID={ROOT_UUID} / ".encode().rjust(len(old))
    with disk.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at = content.find(old, linux_guests.BOOT_START_BYTES)
        assert at > 0
        content[at : at + len(old)] = new


def unified(disk: Path, tmp_path: Path) -> EntriesGuest:
    """Put the parts of the image that the firmware started beside it."""
    drive = f"{disk}@@{ESP_START_BYTES}"
    path = tmp_path / "unified.efi"
    boot_disks.run("mcopy", "-i", drive, "::/EFI/BOOT/BOOTX64.EFI", path)
    image = split_unified_image(path.read_bytes(), subject="/EFI/BOOT/BOOTX64.EFI")
    debian_guest.update_esp(disk, tmp_path, {"EFI/Linux/kernel": image.kernel, "EFI/Linux/initrd": image.initrds[0]})
    place = Place(ESP_FILE_SYSTEM, 1)
    entry = Entry(image.title, place, "/EFI/Linux/kernel", ("/EFI/Linux/initrd",), image.command_line)
    return EntriesGuest((entry,))
