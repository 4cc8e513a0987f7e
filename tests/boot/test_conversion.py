"""Linux guests of every layout through `godwit convert`: from UEFI to a BIOS and home again, with what they wrote.

Each starts as it was built, is converted, starts on IDE as a Generation 1 machine is offered it, writes, is converted
back, and starts under UEFI with variables that know nothing of it.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import boot_disks, debian_guest, linux_guests, qemu
from tests.support.debian_guest import ROOT_PARTITION_UUID, ROOT_UUID

pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("machines")]

ALWAYS = ("ext4", "lvm")  # the others take GODWIT_BOOT=all
BY_LABEL = "partlabel"
NAMES = ("ext4", *linux_guests.LAYOUTS, BY_LABEL)
LABEL = "the-root-of-a-guest-named-by-label."  # as long as to stand where PARTUUID= and a UUID stood
JOURNAL = "/var/lib/godwit/journal"
SUM = "/var/lib/godwit/fstab.md5"
LARGEST_OVERLAY_BYTES = 4 << 20
LARGEST_UNIFIED_BYTES = 40 << 20  # a kernel and an initial RAM disk out of a unified image


def godwit(*arguments: str | Path) -> Any:
    """Run a command with --json and return what it says."""
    program = Path(sys.executable).with_name("godwit")
    command = [str(program), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_starts_by_uefi_by_a_bios_and_by_uefi_again(tmp_path: Path, name: str) -> None:
    if name not in ALWAYS and os.environ.get("GODWIT_BOOT") != "all":
        pytest.skip("GODWIT_BOOT=all, as in `make test-boot`, starts this layout too")
    missing = linux_guests.missing_tools() + boot_disks.missing_tools()
    if missing:
        reason = f"not installed: {', '.join(missing)}; `make setup` installs what is needed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    disk, out, home = tmp_path / "guest.raw", tmp_path / "guest.gen1.qcow2", tmp_path / "guest.gen2.qcow2"
    source = linux_guests.cached_guest("partuuid" if name == BY_LABEL else name)
    boot_disks.run("cp", "--sparse=always", source, disk)
    if name == BY_LABEL:
        name_root_by_label(disk)
    by_table = name in ("partuuid", BY_LABEL)

    # Guests judge by themselves: what they print, the console may mix with messages of others.
    first = qemu.boot(
        disk, image_format="raw", commands=f"echo as UEFI >> {JOURNAL}; md5sum /etc/fstab > {SUM}; cat {SUM}"
    )
    assert first.ready.startswith("GODWIT-READY firmware=uefi journal=")
    assert first.status == 0, first.output

    done = godwit("convert", disk, "--to", "gen1")
    assert Path(done["target"]) == out
    assert done["written_bytes"] < (LARGEST_UNIFIED_BYTES if name == "unified" else LARGEST_OVERLAY_BYTES)
    files = [change["what"] for change in done["changes"] if "/etc/" in change["what"]]
    assert files == (["/etc/fstab on partition 2"] if by_table else [])

    commands = f"echo as BIOS >> {JOURNAL} && ls /dev/sda /boot/efi/EFI && findmnt -no OPTIONS / | grep ^rw,"
    if by_table:
        commands += f" && grep '^UUID={ROOT_UUID} ' /etc/fstab"
    second = qemu.boot(out, image_format="qcow2", firmware="seabios", bus="ide", commands=commands)
    assert second.ready.startswith("GODWIT-READY firmware=bios journal=")
    assert second.ready.endswith("last=as UEFI")
    assert second.status == 0, second.output

    assert Path(godwit("convert", out, "--to", "gen2")["target"]) == home
    third = qemu.boot(home, image_format="qcow2", commands=f"grep -x 'as UEFI' {JOURNAL} && md5sum -c {SUM}")
    assert third.ready.startswith("GODWIT-READY firmware=uefi journal=")
    assert third.ready.endswith("last=as BIOS")
    assert third.status == 0, third.output  # what both wrote is there, and fstab is what it was
    seconds = ", ".join(f"{boot.ready_seconds:.1f} s" for boot in (first, second, third))
    print(f"{name}: {seconds}; {done['written_bytes'] / 1024:.0f} KiB in the overlay")


def name_root_by_label(disk: Path) -> None:
    """Name the root by the partition's name where it was by its UUID: in grub.cfg and in fstab."""
    old, new = f"PARTUUID={ROOT_PARTITION_UUID}".encode(), f"PARTLABEL={LABEL}".encode()
    assert len(old) == len(new)
    boot_disks.run("sgdisk", f"--change-name=2:{LABEL}", disk)
    with disk.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at, count = content.find(old, debian_guest.ROOT_START_BYTES), 0
        while at >= 0:
            content[at : at + len(old)] = new
            count += 1
            at = content.find(old, at)
    assert count >= 2
