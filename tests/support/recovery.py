"""A machine that is recovered in a moment: a protected disk whose boot sector writes, says so, and goes to sleep."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from replica import catalog, cycle, protection
from replica.catalog import ProtectedVm
from replica.host import Host, this_host
from replica.model import Machine, Nic
from replica.platforms import servant
from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import disk_name
from replica.platforms.platform import DiskSpec, MachineSpec
from replica.stores.address import open_store
from replica.stores.store import Store

SECTOR: Final = 512
WRITTEN_SECTOR: Final = 2  # where the boot sector copies itself to
SAID: Final = "GODWIT-STUB"
WAIT_SECONDS: Final = 120.0


def boot_sector(text: str = SAID) -> bytes:
    """Return a sector from which a BIOS starts: it writes itself to sector 2, and says ``text`` on the serial port."""
    code = bytes.fromhex(
        "31c0 8ed8 8ec0"  # segments are zero
        "b80103 bb007c b90300 ba8000 cd13"  # write one sector, from 7C00h, to sector 3 as a BIOS counts, first disk
        "be257c ac 84c0 7406 baf803 ee ebf5"  # out with each byte of the text
        "f4 ebfd"  # sleep
    )
    assert len(code) == 0x25
    content = code + text.encode() + b"\r\n\0"
    return content.ljust(446, b"\0") + bytes(64) + struct.pack("<H", 0xAA55)


class Recovery:
    """A protected VM in a store in a folder, and the host that it is recovered on."""

    def __init__(self, folder: Path, *, disks: int = 1, size: int = 16 << 20) -> None:
        self.folder = folder
        self.url = f"file://{folder / 'store'}"
        self.host: Host = this_host(folder / "state")
        self.store: Store = open_store(self.url, create=True)
        catalog.init_store(self.store, self.host)
        paths = []
        for number in range(disks):
            path = folder / f"source-{number}.raw"
            with path.open("wb") as file:
                file.write(boot_sector() if number == 0 else b"second disk".ljust(SECTOR))
                file.seek(size // 2)
                file.write(bytes([65 + number]) * (1 << 20))
                file.truncate(size)
            paths.append(path)
        self.machine = Machine(1, 1, 64 << 20, (Nic("52:54:00:12:34:56"),))
        tenant = catalog.DEFAULT_TENANT
        found, _ = protection.protect(self.store, self.host, tenant=tenant, name="web 1", disks=paths)
        self.found: ProtectedVm = found
        self.point = cycle.replicate(self.store, self.host, self.found)
        self.sources = paths

    def spec(self, folder: MachineFolder, name: str, *, bitmap: str | None = "since-start") -> MachineSpec:
        """Return the machine over the server at home in ``folder``, which is made ready."""
        servant.prepare(
            folder,
            servant.ServantSpec(
                self.url,
                self.found.keys.tenant,
                self.found.vm.name,
                self.point.point,
                self.machine.generation,
                tuple(disk_name(disk.number) for disk in self.point.disks),
                str(self.host.state_folder),
            ),
        )
        disks = tuple(
            DiskSpec(one.number, one.size, "ide", url=servant.url(folder.path, one.number), bitmap=bitmap)
            for one in self.point.disks
        )
        return MachineSpec(name, self.found.vm.name, self.machine, disks)


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Return once ``done`` says so; the time is only there to end a test that hangs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)
