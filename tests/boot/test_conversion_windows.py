"""The chain that `convert` writes for Windows, up to a boot manager of our own: it tells what it was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from replica.generation.convert import convert_generation
from tests.support import boot_disks, windows_disk

pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("machines")]


def test_the_boot_manager_on_the_efi_system_partition_is_reached(tmp_path: Path) -> None:
    missing = boot_disks.missing_tools()
    if missing and os.environ.get("CI"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    why = ", ".join(missing) or windows_disk.missing()
    if why:
        pytest.skip(why)
    manager = boot_disks.assemble(boot_disks.BOOTMGR, tmp_path, "bootmgr").read_bytes()
    disk = tmp_path / "disk.raw"
    windows_disk.build(disk, windows_disk.standard_layout(windows=windows_disk.windows_files(bootmgr=manager)))
    done = convert_generation(disk, 1, in_place=True)
    assert done.plan.overlay is not None, done.plan.refusals
    lines = boot_disks.run_stub(disk)
    told = next(line.removeprefix("STUB-BOOTMGR") for line in lines if line.startswith("STUB-BOOTMGR"))
    assert told == " cs=2000 ip=0000 dl=0080 hidden=00000800 oem=mkfs.fat"
