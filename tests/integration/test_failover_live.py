"""A planned failover of a machine that runs under QEMU: shut down by its power button, its last delta by bitmaps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from replica import catalog, cycle, protection
from replica.errors import SourceError
from replica.failover.failover import failover
from replica.failover.means import Means
from replica.failover.stopping import stopped
from replica.model import Standing
from replica.monitor import Monitor, MonitorGoneError
from replica.qemu import LiveAddress
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, WORKERS, make_host, random_blocks, restore_disk
from tests.support.failover import PLANNED, SHARED
from tests.support.fake_platform import FakePlatform, FakeProvider, Hypervisor
from tests.support.running_qemu import QEMU, RunningQemu, missing

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
    pytest.mark.xdist_group("live"),
]

# A boot sector that enables the power button, waits for it, writes a sector, and turns the machine off.
_GUEST = bytes.fromhex(
    "ba0206 b80001 ef"  # mov dx,0x602; mov ax,0x100; out dx,ax
    "ba0006 ed f6c401 74f7"  # wait: mov dx,0x600; in ax,dx; test ah,1; jz wait
    "31c0 8ec0 bb007c b80103 b90200 ba8000 cd13"  # es = 0; write the sector at 0x7c00 as sector 2 of the disk
    "ba0406 b80020 ef f4 ebfd"  # mov dx,0x604; mov ax,0x2000; out dx,ax; hlt
)
_SIZE = 32 * BLOCK


def boot_disk() -> bytes:
    """Return a disk that boots the guest."""
    disk = bytearray(random_blocks(5, 32))
    disk[: len(_GUEST)] = _GUEST
    disk[510:512] = b"\x55\xaa"
    disk[512:1024] = bytes(512)
    return bytes(disk)


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """The monitor of a machine that runs the guest."""
    image = tmp_path / "disk.img"
    image.write_bytes(boot_disk())
    path = tmp_path / "qmp"
    command = [QEMU, "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none"]
    command += ["-qmp", f"unix:{path},server=on,wait=off"]
    command += ["-blockdev", f"driver=raw,node-name=d0,file.driver=file,file.filename={image}"]
    command += ["-device", "ide-hd,drive=d0,bootindex=1"]
    process = subprocess.Popen(command, stderr=sys.stderr)
    deadline = time.monotonic() + 60
    while True:
        try:
            Monitor(str(path)).close()
            break
        except MonitorGoneError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield path
    process.kill()
    process.wait()


def test_the_guest_is_shut_down_and_its_last_writes_are_in_the_last_point(socket: Path, tmp_path: Path) -> None:
    store, host = MemoryStore("live"), make_host(tmp_path / "state", seed=os.getpid())
    catalog.init_store(store, host)
    address = str(LiveAddress(str(socket), "d0"))
    found, _ = protection.protect(store, host, tenant="default", name="vm", disks=[address])
    first = cycle.replicate(store, host, found, workers=WORKERS)
    platform = FakePlatform(Hypervisor())
    means = Means(store, host, found, lambda name: platform, FakeProvider(), SHARED, WORKERS)
    done = failover(means, PLANNED)

    assert done.standing is Standing.FAILED_OVER
    final = done.final
    assert final is not None and final.point == first.point + 1
    assert final.disks[0].source["found_by"] == "bitmap"
    assert final.cycle.read_bytes <= 2 * BLOCK  # what the guest wrote last, not the disk
    on_disk = (tmp_path / "disk.img").read_bytes()
    assert on_disk[512:1024] == on_disk[:512] != boot_disk()[512:1024]  # it wrote on its way down
    assert restore_disk(store, host, found, final) == on_disk
    with pytest.raises(MonitorGoneError):
        for _ in range(600):  # QEMU is on its way out
            Monitor(str(socket)).close()
            time.sleep(0.1)


def test_a_guest_that_does_not_hear_is_left_running(tmp_path: Path) -> None:
    with RunningQemu(tmp_path, ("raw",), _SIZE) as qemu:
        store, host = MemoryStore("live"), make_host(tmp_path / "state", seed=os.getpid())
        catalog.init_store(store, host)
        found, _ = protection.protect(store, host, tenant="default", name="vm", disks=qemu.addresses())
        cycle.replicate(store, host, found, workers=WORKERS)
        platform = FakePlatform(Hypervisor())
        short = partial(stopped, timeout_seconds=0.5)
        means = Means(store, host, found, lambda name: platform, FakeProvider(), SHARED, WORKERS, stopped=short)
        with pytest.raises(SourceError, match="did not shut down within"):
            failover(means, PLANNED)
        assert qemu.control("query-status")["status"] == "prelaunch"
        assert catalog.settings_in_force(store, found).version == 1
        cycle.replicate(store, host, found, workers=WORKERS)
