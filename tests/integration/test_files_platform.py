"""Recovery as files: whole disks of each format from a store, and what to do with them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from replica.errors import PlatformError
from replica.model import Nic
from replica.platforms import servant
from replica.platforms.files import FilesPlatform
from replica.platforms.hyperv import starting
from replica.platforms.platform import DiskSpec, MachineSpec, Power
from tests.support import running_qemu
from tests.support.recovery import Recovery
from vhdx.convert import CONVERT_FORMATS, ConvertFormat

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="a server of the disks runs beside"),
    pytest.mark.skipif(bool(running_qemu.missing()), reason=f"not installed: {running_qemu.missing()}"),
]

NAME = "web 1"
QEMU_NAMES = {"vhd": "vpc", "vhd-dynamic": "vpc", "vhdx-fixed": "vhdx"}


@pytest.mark.parametrize("format_", CONVERT_FORMATS)
def test_every_disk_becomes_a_file_of_the_format(tmp_path: Path, format_: ConvertFormat) -> None:
    recovery = Recovery(tmp_path, disks=2)
    platform = FilesPlatform(recovery.host, format=format_)
    folder = platform.folder(NAME)
    platform.define(recovery.spec(folder, NAME))
    try:
        assert platform.power(NAME) is Power.OFF
        assert [(d.hydrated, d.remaining_bytes) for d in platform.disks(NAME)] == [(False, 16 << 20)] * 2
        platform.hydrate(NAME)
        for disk, source in zip(platform.disks(NAME), recovery.sources, strict=True):
            assert disk.hydrated and disk.remaining_bytes == 0
            name = QEMU_NAMES.get(format_, format_)
            subprocess.run(["qemu-img", "compare", "-q", "-f", name, "-F", "raw", disk.address, source], check=True)
        assert not servant.is_running(folder.path)
        platform.hydrate(NAME)  # again: nothing
        assert not servant.is_running(folder.path)
    finally:
        platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE
    assert not folder.path.exists()
    platform.delete(NAME)  # again: nothing


def test_from_files_too_and_with_the_lines_that_make_the_machine(tmp_path: Path) -> None:
    recovery = Recovery(tmp_path)
    platform = FilesPlatform(recovery.host)
    disk = DiskSpec(0, 16 << 20, "scsi", path=recovery.sources[0])
    machine = replace(recovery.machine, generation=2, nics=(Nic("52:54:00:12:34:56"),))
    spec = MachineSpec(NAME, "it's web", machine, (disk, replace(disk, number=1)))
    platform.define(spec)
    platform.hydrate(NAME)
    with pytest.raises(PlatformError, match="a hypervisor is needed") as caught:
        platform.start(NAME)
    path = platform.folder(NAME).path
    assert "start-on-hyperv.ps1 -Switch NAME" in str(caught.value.hint) and str(path) in str(caught.value.hint)
    script = (path / "start-on-hyperv.ps1").read_text("ascii")
    assert script == starting.script(spec)  # what it does: tests/unit/test_hyperv_platform.py
    assert (path / "START.txt").read_text().strip() == caught.value.hint
    with pytest.raises(PlatformError, match="not known here"):
        platform.stop(NAME)
    assert platform.channel(NAME) is None and platform.screenshot(NAME) is None
    assert platform.names() == [NAME]
    platform.define(replace(spec, isolated=True))  # another: its disks go
    assert not any(disk.hydrated for disk in platform.disks(NAME))


def test_a_disk_that_cannot_be_read_leaves_no_file(tmp_path: Path) -> None:
    recovery = Recovery(tmp_path)
    platform = FilesPlatform(recovery.host)
    gone = DiskSpec(0, 16 << 20, "ide", url=f"nbd+unix:///0?socket={tmp_path / 'nobody'}")
    platform.define(MachineSpec(NAME, NAME, recovery.machine, (gone,)))
    with pytest.raises(PlatformError, match="disk 0 cannot be read"):
        platform.hydrate(NAME)
    for url in ("http://x", "nbd+unix:///0"):
        platform.define(MachineSpec(NAME, NAME, recovery.machine, (replace(gone, url=url),)))
        with pytest.raises(PlatformError, match="no NBD address"):
            platform.hydrate(NAME)
    assert [path.name for path in platform.folder(NAME).path.glob("*disk*")] == []
