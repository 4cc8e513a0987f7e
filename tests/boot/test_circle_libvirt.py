"""The whole circle of a disaster on libvirt: a domain fails over to a domain of Generation 1, and comes home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replica import catalog
from replica.errors import PlatformError
from replica.failover.ledger import versions
from replica.host import this_host
from replica.libvirt.virsh import Virsh
from replica.model import Identity, Settings
from replica.platforms.channel import AgentChannel
from replica.platforms.libvirt import LibvirtPlatform
from replica.platforms.libvirt.platform import agent_channel
from replica.platforms.libvirt.settings import LibvirtSettings
from replica.platforms.qemu.command import bios_uuid, firmware
from replica.stores.address import open_store
from tests.boot.test_circle import BOOT_SECONDS, JOURNAL, MIB, Site, write
from tests.support.libvirt_host import NOBODY, LibvirtHost, missing

pytestmark = [
    pytest.mark.boot,
    pytest.mark.xdist_group("libvirt"),
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]

UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000010"
HOME = "web-home"


class LibvirtSite(Site):
    """A host with a libvirt, on which the VM runs as a domain of Generation 2 and is recovered too."""

    host: LibvirtHost

    @classmethod
    def on(cls, host: LibvirtHost) -> LibvirtSite:
        """Make a site in the host's folder, where QEMU can reach what it is given."""
        folder = host.folder / "site"
        folder.mkdir()
        configuration = folder / "godwit.toml"
        configuration.write_text(f'[platforms.libvirt]\nconnect = "{host.connect}"\ntype = "qemu"\n')
        site = cls(folder, more={"GODWIT_CONFIG": str(configuration), "TMPDIR": str(host.scratch)})
        site.host = host
        return site

    @property
    def platform(self) -> LibvirtPlatform:
        """The platform that the commands use."""
        return LibvirtPlatform(this_host(self.state), settings=LibvirtSettings(self.host.connect, type="qemu"))

    def console(self) -> str:
        consoles = [self.platform.console(name)[-3000:] for name in self.platform.names()]
        return "".join([*consoles, (self.host.images / "console").read_text(errors="replace")[-3000:]])

    def remove_machines(self) -> None:
        for name in self.platform.names():
            self.platform.delete(name)

    def define_home(self, disk: Path) -> None:
        """Define the VM at home: Generation 2, with variables of its own."""
        code, variables = firmware()
        own = self.host.images / "variables.fd"
        shutil.copyfile(variables, own)
        (self.host.images / "console").touch()
        for path in (own, disk, self.host.images / "console"):
            if os.geteuid() == 0:
                os.chown(path, NOBODY, NOBODY)
        xml = self.folder / "home.xml"
        xml.write_text(
            f"<domain type='qemu'><name>{HOME}</name><uuid>{UUID}</uuid><memory unit='MiB'>512</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64' machine='q35'>hvm</type>"
            f"<loader readonly='yes' type='pflash'>{code}</loader><nvram>{own}</nvram></os>"
            "<features><acpi/></features><cpu mode='maximum'/><devices>"
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='{disk}'/>"
            "<target dev='vda' bus='virtio'/></disk>"
            "<interface type='user'><mac address='52:54:00:60:d1:72'/><model type='virtio'/></interface>"
            f"<serial type='file'><source path='{self.host.images}/console' append='on'/></serial>"
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
        )
        self.host.virsh("define", str(xml))

    def at_home(self, commands: str) -> list[str]:
        """Run commands in the guest at home, once it is up; return the lines that they print."""
        begun = time.monotonic()
        home: AgentChannel = agent_channel(Virsh(self.host.connect), UUID)
        assert home.ping(timeout_seconds=BOOT_SECONDS), self.console()
        self.said.append(f"{time.monotonic() - begun:6.1f} s  until the guest at home answers")
        status, output, errors = home.execute(["/bin/sh", "-c", commands], timeout_seconds=60)
        assert status == 0, errors
        return output.decode().splitlines()


@pytest.fixture
def site() -> Iterator[LibvirtSite]:
    with LibvirtHost() as host:
        made = LibvirtSite.on(host)
        try:
            yield made
        finally:
            with suppress(PlatformError):
                made.remove_machines()
            print("\n".join(made.said))


def test_a_domain_goes_out_as_generation_1_and_comes_home_as_generation_2(site: LibvirtSite, guest_raw: Path) -> None:
    disk = site.host.images / "guest.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(guest_raw), str(disk)], check=True)
    site.define_home(disk)
    site.host.virsh("start", HOME)
    site.good("init", (site.folder / "store").as_uri())
    site.good("protect", "web", "--libvirt", HOME, "--connect", site.host.connect)
    first = site.good("replicate", "web")
    at_home = site.at_home(write("written at home", "home", 6 * MIB))

    out = site.good("failover", "web", "--planned", "--generation", "1", "--platform", "libvirt", "--yes")
    assert out["point"] == out["final_point"] == 2 and site.standing() == "failed-over"
    assert site.host.virsh("domstate", HOME).strip() == "shut off"
    machine = out["machine"]["name"]
    elsewhere = site.in_guest(f"[ -d /sys/firmware/efi ] || echo bios; cat {JOURNAL}; sha256sum < /var/lib/godwit/home")
    assert elsewhere == ["bios", "built", "written at home", *at_home]
    site.good("commit", "web")
    there = site.in_guest(write("written there", "there", 3 * MIB))
    note = site.folder / "note"
    note.write_bytes(b"by libvirt" * 20_000)  # in several pieces
    site.good("guest", "copy", "web", note, "guest:/root/note")
    site.good("guest", "copy", "web", "guest:/root/note", site.folder / "back")
    assert (site.folder / "back").read_bytes() == note.read_bytes()
    site.good("reprotect", "web")
    reverse = site.good("replicate", "web")
    assert reverse["disks"][0]["found_by"] == "bitmap", reverse["disks"][0]["because"]
    assert reverse["consistency"] == "application", reverse
    assert site.standing() == "reprotected"
    deadline = time.monotonic() + BOOT_SECONDS
    while not all(one.hydrated for one in site.platform.disks(machine)):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    back = site.good("failback", "web", "--yes")
    assert site.standing() == "protected" and not site.platform.names()
    assert site.host.virsh("list", "--all", "--name").split() == [HOME]
    site.host.virsh("start", HOME)
    reads = f"[ -d /sys/firmware/efi ] && echo uefi; cat {JOURNAL}; sha256sum < /var/lib/godwit/home"
    again = site.at_home(f"{reads}; sha256sum < /var/lib/godwit/there")
    assert again == ["uefi", "built", "written at home", "written there", *at_home, *there]
    site.host.virsh("destroy", HOME)

    listed = {point["point"]: point for point in site.good("points", "web")["points"]}
    delta, final = listed[2], listed[max(listed)]
    for what, point in (("first", first), ("written at home", delta), ("written there", reverse), ("last", final)):
        site.said.append(
            f"to the store, {what}: {point['read_bytes'] / MIB:.1f} MiB read, {point['stored_bytes'] / MIB:.1f} stored"
        )
    homecoming = back["homecoming"]
    site.said.append(
        f"home: {homecoming['fetched_bytes'] / MIB:.1f} MiB fetched, {homecoming['written_bytes'] / MIB:.1f} written"
    )
    # What the guest wrote, and what a start and an end of its system write beside that: not what the disk holds.
    assert 6 * MIB <= delta["stored_bytes"] <= delta["read_bytes"] < 64 * MIB
    assert 3 * MIB <= reverse["stored_bytes"] <= reverse["read_bytes"] < 32 * MIB
    assert final["read_bytes"] < 32 * MIB < first["read_bytes"]
    store = open_store((site.folder / "store").as_uri())
    known = [one for version in versions(store, catalog.find(store, "default", "web")) for one in _identities(version)]
    ids = (str(bios_uuid(machine)), UUID)
    assert known == [Identity("libvirt", one, one, ("52:54:00:60:d1:72",)) for one in ids]


def _identities(version: Settings) -> tuple[Identity, ...]:
    return () if version.change is None else version.change.identities
