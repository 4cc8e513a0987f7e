"""A real guest of Generation 2, started at once from its point as Generation 1, hydrated while it runs, and removed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replica import catalog, cycle, protection
from replica.failover.providing import ServantProvider
from replica.generation.patched import plan_conversion
from replica.host import this_host
from replica.model import FailoverKind, RecoveryMachine
from replica.monitor import Monitor
from replica.platforms import servant
from replica.platforms.platform import MachineSpec, Power
from replica.platforms.qemu import QemuPlatform
from replica.platforms.qemu.files import QemuFiles
from replica.stores.address import open_store
from replica.view import PointView
from tests.support import qemu
from tests.support.recovery import wait_until

pytestmark = [
    pytest.mark.boot,
    pytest.mark.xdist_group("machines"),
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
]

NAME = "vm1-test"
BITMAP = "since-start"
WRITTEN = "written on the recovery machine"
GUEST_WRITES = f"echo {WRITTEN} >> /var/lib/godwit/journal; sync; tail -n 1 /var/lib/godwit/journal > /dev/ttyS0"


def test_runs_as_generation_1_before_anything_is_restored(tmp_path: Path, guest_raw: Path) -> None:
    host, url = this_host(tmp_path / "state"), f"file://{tmp_path / 'store'}"
    store = open_store(url, create=True)
    catalog.init_store(store, host)
    found, _ = protection.protect(store, host, tenant="default", name="vm1", disks=[guest_raw])
    point = cycle.replicate(store, host, found)
    assert point.machine.generation == 2

    begun = time.monotonic()
    with PointView(store, host, found, point, point.disks[0]) as view:
        conversion = plan_conversion([(0, view)], point.machine)
    assert conversion.disk == 0
    planned = time.monotonic()
    platform = QemuPlatform(
        host, accelerator="tcg", options=["-smbios", f"type=1,serial=godwit:{GUEST_WRITES.replace(',', ',,')}"]
    )
    machine = RecoveryMachine(
        NAME, "qemu", FailoverKind.TEST, point.point, 1, True, host.host_id, "here", datetime.now(UTC), BITMAP
    )
    disks = ServantProvider(url, "default", "vm1", host.state_folder).provide(platform, machine, point, conversion)
    described = replace(point.machine, generation=1, cpus=1, memory_bytes=512 << 20)
    platform.define(MachineSpec(NAME, "vm1", described, disks, isolated=True))
    try:
        defined = time.monotonic()
        platform.start(NAME)
        files = QemuFiles(platform.folder(NAME))
        wait_until(lambda: _read_operations(files) > 0, "the BIOS has read from the disk")
        read = time.monotonic()
        print(
            f"planned {planned - begun:.2f} s, defined {defined - planned:.2f} s, "
            f"first sector read {read - defined:.2f} s after that"
        )
        _wait_for_guest(platform, WRITTEN)
        lines = platform.console(NAME).replace("\r", "").split("\n")
        assert any(line.startswith(f"{qemu.READY} firmware=bios") for line in lines)
        assert not platform.disks(NAME)[0].hydrated

        platform.hydrate(NAME)
        _wait_for_guest(platform, "", hydrated=True)
        wait_until(lambda: not servant.is_running(files.folder.path), "the server has ended by itself")
        assert 0 < _dirty_bytes(files) < 64 << 20  # what the guest wrote, and nothing of what hydration did
        platform.stop(NAME, timeout_seconds=120)
        assert platform.power(NAME) is Power.OFF
        assert platform.disks(NAME)[0].hydrated
        _check_disk(files.disk(0))
    finally:
        platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE and not files.folder.path.exists()


def _read_operations(files: QemuFiles) -> int:
    with Monitor(str(files.monitor)) as monitor:
        return int(monitor.rows("query-blockstats")[0]["stats"]["rd_operations"])


def _dirty_bytes(files: QemuFiles) -> int:
    with Monitor(str(files.monitor)) as monitor:
        rows = monitor.rows("query-named-block-nodes", flat=True)
        return sum(int(bitmap["count"]) for row in rows for bitmap in row.get("dirty-bitmaps", ()))


def _wait_for_guest(platform: QemuPlatform, text: str, *, hydrated: bool = False) -> None:
    """Wait as long as a guest may take under emulation; its console is the message where it takes longer."""
    deadline = time.monotonic() + 300
    while text not in platform.console(NAME) or (hydrated and not platform.disks(NAME)[0].hydrated):
        assert time.monotonic() < deadline, platform.console(NAME)[-3000:]
        assert platform.power(NAME) is Power.RUNNING, platform.console(NAME)[-3000:]
        time.sleep(0.2)


def _check_disk(path: Path) -> None:
    """The bitmap is there, and whole; the image is sound, and stands by itself."""
    said = subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True)
    about = json.loads(said.stdout)
    assert "backing-filename" not in about
    (bitmap,) = about["format-specific"]["data"]["bitmaps"]
    assert bitmap["name"] == BITMAP and "in-use" not in bitmap["flags"]
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
