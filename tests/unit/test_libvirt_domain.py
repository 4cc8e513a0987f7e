"""Libvirt's descriptions: what a domain's XML says of machine and disks, what is hostile in it, and addresses."""

from __future__ import annotations

import pytest

from replica.errors import SourceError, UsageError
from replica.libvirt.address import LibvirtAddress
from replica.libvirt.domain import Domain, parse_domain, protectable
from replica.libvirt.protecting import overridden
from replica.model import Nic
from replica.protection import MachineWishes

WITHOUT_KEYS = "<feature enabled='yes' name='secure-boot'/><feature enabled='no' name='enrolled-keys'/>"
MANY = "<disk><target dev='a'/></disk>" * 1001
UUID = "6f8a3c1e-0f0e-4a7b-9a63-0123456789ab"


def _domain(inside: str = "", *, os: str = "<os><type>hvm</type></os>", active: bool = False) -> Domain:
    running = " id='7'" if active else ""
    return parse_domain(
        f"<domain type='kvm'{running}><name>db</name><uuid>{UUID}</uuid><memory unit='KiB'>4194304</memory>"
        f"<vcpu placement='static' current='3'>8</vcpu>{os}<devices>{inside}</devices></domain>",
        "db",
    )


def _disk(target: str, *, inside: str = "", kind: str = "qcow2", device: str = "disk", bus: str = "virtio") -> str:
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{kind}'/><source file='/vm/{target}.img'/>"
        f"<target dev='{target}' bus='{bus}'/>{inside}</disk>"
    )


def test_the_machine_is_described() -> None:
    nics = (
        "<interface type='network'><mac address='52:54:00:01:02:03'/><source network='lan'/></interface>"
        "<interface type='bridge'><mac address='52:54:00:01:02:04'/><source bridge='br0'/></interface>"
        "<interface type='user'/>"
    )
    machine = _domain(nics).machine
    assert (machine.generation, machine.cpus, machine.memory_bytes, machine.secure_boot) == (1, 3, 4 << 30, False)
    assert machine.nics == (Nic("52:54:00:01:02:03", "lan"), Nic("52:54:00:01:02:04", "br0"), Nic(None, None))


@pytest.mark.parametrize(
    ("os", "generation", "secure"),
    [
        ("<os firmware='efi'/>", 2, False),
        ("<os firmware='bios'/>", 1, False),
        ("<os><loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader></os>", 2, False),
        ("<os><loader secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader></os>", 2, True),
        ("<os><loader type='rom'>/usr/share/seabios/bios.bin</loader></os>", 1, False),
        ("<os><loader>/usr/share/ovmf/OVMF.fd</loader></os>", 2, False),
        ("<os firmware='efi'><firmware><feature enabled='yes' name='secure-boot'/></firmware></os>", 2, True),
        (f"<os firmware='efi'><firmware>{WITHOUT_KEYS}</firmware><loader secure='yes'/></os>", 2, False),
        ("<os firmware='bios'><firmware><feature enabled='yes' name='secure-boot'/></firmware></os>", 1, False),
    ],
)
def test_firmware_and_secure_boot_are_told(os: str, generation: int, secure: bool) -> None:
    machine = _domain(os=os).machine
    assert (machine.generation, machine.secure_boot) == (generation, secure)


def test_disks_come_in_boot_order_and_nothing_else_is_taken_for_one() -> None:
    domain = _domain(
        _disk("vda")
        + _disk("sda", bus="sata", kind="raw", inside="<boot order='2'/><blockio logical_block_size='4096'/>")
        + _disk("vdb", inside="<boot order='1'/>")
        + _disk("sdb", device="cdrom", inside="<readonly/>")
        + _disk("vdc", inside="<readonly/>")
        + "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdc' bus='scsi'/></disk>",
        active=True,
    )
    assert [one.target for one in domain.disks] == ["vdb", "sda", "vda", "vdc", "sdc"]
    assert [(one.bus, one.format, one.place, one.sector_size) for one in domain.disks[1:3]] == [
        ("sata", "raw", "/vm/sda.img", 4096),
        ("virtio", "qcow2", "/vm/vda.img", 512),
    ]
    assert (domain.disks[4].kind, domain.disks[4].place, domain.disks[4].format) == ("block", "/dev/sdx", "raw")
    assert [one.target for one in protectable(domain, ())] == ["vdb", "sda", "vda", "sdc"]
    assert [one.target for one in protectable(domain, ("vda", "vdb"))] == ["vda", "vdb"]
    with pytest.raises(UsageError, match="read-only"):
        protectable(domain, ("vdc",))
    with pytest.raises(SourceError, match="no disk 'vdz', but vdb, sda"):
        protectable(domain, ("vdz",))
    with pytest.raises(UsageError, match="no disk of its own"):
        protectable(_domain(), ())


def test_what_lies_beneath_a_disk_and_the_agents_channel_are_seen() -> None:
    chain = (
        "<backingStore type='file'><format type='qcow2'/><source file='/vm/base'/>"
        "<backingStore type='file'><source file='/vm/root'/><backingStore/></backingStore></backingStore>"
    )
    channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    domain = _domain(_disk("vda", inside=chain) + channel, active=True)
    assert domain.disks[0].backing == ("/vm/base", "/vm/root")
    assert (domain.has_agent, domain.active) == (True, True)
    assert (_domain().has_agent, _domain().active) == (False, False)


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        ("", "cannot be read"),
        ("<domain", "cannot be read"),
        ("<network/>", "where a domain"),
        ("<domain/>", "no UUID"),
        (f"<domain><uuid>{UUID}; rm -rf</uuid></domain>", "no UUID"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>", "document type"),
        (f"<domain><uuid>{UUID}</uuid><vcpu>0</vcpu></domain>", "processors"),
        (f"<domain><uuid>{UUID}</uuid><vcpu>{'9' * 5000}</vcpu></domain>", "processors"),
        (f"<domain><uuid>{UUID}</uuid><memory unit='pages'>1</memory></domain>", "unknown unit"),
        (f"<domain><uuid>{UUID}</uuid><memory>-5</memory></domain>", "units of memory"),
        (f"<domain><uuid>{UUID}</uuid><devices><disk/></devices></domain>", "without a target"),
        (f"<domain><uuid>{UUID}</uuid><devices><disk><boot order='x'/></disk></devices></domain>", "boot order"),
        (f"<domain><uuid>{UUID}</uuid><devices>{MANY}</devices></domain>", "1000"),
        ("<domain>" * 20000, "cannot be read"),
    ],
)
def test_what_is_no_description_is_refused(xml: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        parse_domain(xml, "db")


@pytest.mark.parametrize(
    "address",
    [
        LibvirtAddress("db", "vda"),
        LibvirtAddress("a/b?c#d &=é", "sd a", "qemu+unix:///session?socket=/run/x y&z"),
        LibvirtAddress("db", "vda", None, freeze=False),
        LibvirtAddress("db", "vda", "qemu:///system", freeze=False),
    ],
)
def test_an_address_is_read_as_it_was_written(address: LibvirtAddress) -> None:
    assert LibvirtAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["libvirt:", "libvirt:db", "libvirt:#vda", "qmp:db#vda", "libvirt:db?x=1#vda", "libvirt:db?freeze=maybe#vda"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        LibvirtAddress.parse(text)


def test_what_is_said_goes_before_what_is_described() -> None:
    described = MachineWishes(2, 4, 1 << 30, (Nic("52:54:00:01:02:03"),), secure_boot=True)
    assert overridden(described, MachineWishes()) == described
    assert overridden(described, MachineWishes(cpus=8)).cpus == 8
    assert overridden(described, MachineWishes(generation=1)).secure_boot is False
    assert overridden(described, MachineWishes(secure_boot=False)) == MachineWishes(
        2, 4, 1 << 30, described.nics, secure_boot=False
    )
