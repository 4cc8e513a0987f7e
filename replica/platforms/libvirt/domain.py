"""The XML by which libvirt makes a recovery machine, and what libvirt's XML of one tells of it."""

from __future__ import annotations

import string
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from replica.errors import PlatformError
from replica.libvirt.domain import AGENT_CHANNEL
from replica.nbd.wire import UnixAddress
from replica.platforms.libvirt.files import LibvirtFiles
from replica.platforms.libvirt.settings import LibvirtSettings
from replica.platforms.networks import networks_of
from replica.platforms.overlay import RECONNECT_SECONDS, nbd_address
from replica.platforms.platform import DiskSpec, MachineSpec
from replica.platforms.qemu.command import IDE_DISKS, MIB, bios_uuid, firmware, mac_of

BRIDGE: Final = "bridge:"  # how a network that is a bridge of the host begins, where adapters' networks are named
Bus = Literal["virtio", "ide", "sata"]
_PREFIXES: Final = {"virtio": "vd", "ide": "hd", "sata": "sd"}


@dataclass(frozen=True, slots=True)
class Target:
    """What a disk is called in its domain."""

    name: str
    bus: Bus


def targets(spec: MachineSpec) -> dict[int, Target]:
    """Return what the machine's disks are called, by their numbers: as they were on virtio, else as any system can."""
    counts = dict.fromkeys(_PREFIXES, 0)
    found = {}
    for disk in spec.disks:
        bus: Bus = "sata"
        if disk.bus == "virtio" or disk.sector_size != 512:  # no IDE disk has other sectors
            bus = "virtio"
        elif spec.machine.generation == 1 and counts["ide"] < IDE_DISKS:
            bus = "ide"
        found[disk.number] = Target(_PREFIXES[bus] + _letters(counts[bus]), bus)
        counts[bus] += 1
    return found


def _letters(count: int) -> str:
    """Return a, b … z, aa, ab … as systems name disks."""
    text = ""
    count += 1
    while count:
        count, at = divmod(count - 1, 26)
        text = string.ascii_lowercase[at] + text
    return text


def domain_xml(
    spec: MachineSpec, files: LibvirtFiles, backed: frozenset[int], settings: LibvirtSettings, accelerator: str
) -> str:
    """Return the XML. ``backed`` are the numbers of the disks that are not hydrated yet. Raises PlatformError."""
    root = Element("domain", type=accelerator)
    _text(root, "name", spec.name)
    _text(root, "uuid", str(bios_uuid(spec.name)))
    _text(root, "title", "".join(one if one.isprintable() else " " for one in spec.vm_name)[:200] or spec.name)
    _text(root, "memory", str(max(1, spec.machine.memory_bytes // MIB)), unit="MiB")
    _text(root, "vcpu", str(max(1, spec.machine.cpus)))
    system = SubElement(root, "os")
    _text(system, "type", "hvm", arch="x86_64", machine="q35" if spec.machine.generation == 2 else "pc")
    if spec.machine.generation == 2:
        _text(system, "loader", str(firmware()[0]), readonly="yes", type="pflash")
        _text(system, "nvram", str(files.variables))
    features = SubElement(root, "features")
    SubElement(features, "acpi")  # by it the power button works
    SubElement(features, "apic")
    SubElement(root, "cpu", mode="maximum")
    SubElement(root, "clock", offset="utc")
    devices = SubElement(root, "devices")
    named = targets(spec)
    first = min(named, default=0)
    for disk in spec.disks:
        _disk(devices, disk, named[disk.number], files, backed=disk.number in backed, is_first=disk.number == first)
    for number in range(len(spec.machine.nics)):
        _adapter(devices, spec, number, settings)
    serial = SubElement(devices, "serial", type="file")
    SubElement(serial, "source", path=str(files.console), append="on")
    channel = SubElement(devices, "channel", type="unix")
    SubElement(channel, "target", type="virtio", name=AGENT_CHANNEL)
    graphics = SubElement(devices, "graphics", type="vnc")
    SubElement(graphics, "listen", type="socket")  # in libvirt's own folder: no port that others could connect to
    SubElement(SubElement(devices, "video"), "model", type="vga")
    _text(SubElement(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    SubElement(devices, "controller", type="usb", model="none")
    SubElement(devices, "memballoon", model="none")
    return _written(root, spec.name)


def _disk(
    devices: Element, disk: DiskSpec, target: Target, files: LibvirtFiles, *, backed: bool, is_first: bool
) -> None:
    element = SubElement(devices, "disk", type="file", device="disk")
    # An error of a disk stops the machine: once it is cured, it goes on.
    driver = SubElement(element, "driver", name="qemu", type="qcow2", discard="unmap")
    driver.attrib |= {"error_policy": "stop", "rerror_policy": "stop"}
    if backed:
        # A BIOS reads sector by sector: what was fetched once, by whole clusters, is kept.
        driver.set("copy_on_read", "on")
    SubElement(element, "source", file=str(files.disk(disk.number)))
    if backed:
        element.append(_below(disk))
    else:
        SubElement(element, "backingStore")
    SubElement(element, "target", dev=target.name, bus=target.bus)
    if disk.sector_size != 512:
        size = disk.sector_size
        SubElement(element, "blockio", logical_block_size=str(size), physical_block_size=str(max(size, 4096)))
    if is_first:
        SubElement(element, "boot", order="1")


def _below(disk: DiskSpec) -> Element:
    """Return what the machine's own disk is made over. libvirt asks nobody for what is told here."""
    if disk.url is None:
        if disk.path is None:
            raise PlatformError(f"disk {disk.number} is given neither as an address nor as a file")
        store = Element("backingStore", type="file")
        SubElement(store, "format", type="vpc" if disk.format == "vhd" else disk.format)
        SubElement(store, "source", file=str(disk.path))
    else:
        address, export = nbd_address(disk.url)
        store = Element("backingStore", type="network")
        SubElement(store, "format", type="raw")
        source = SubElement(store, "source", protocol="nbd", name=export)
        if isinstance(address, UnixAddress):
            SubElement(source, "host", transport="unix", socket=address.path)
        else:
            SubElement(source, "host", name=address.host, port=str(address.port))
        SubElement(source, "reconnect", delay=str(RECONNECT_SECONDS))  # passed over by libvirts that cannot do it
    SubElement(store, "backingStore")
    return store


def _adapter(devices: Element, spec: MachineSpec, number: int, settings: LibvirtSettings) -> None:
    """Add an adapter. That of a test is in the network for tests, or its link is down."""
    network, bridge = place_of(spec, number, settings)
    if network is not None:
        element = SubElement(devices, "interface", type="network")
        SubElement(element, "source", network=network)
    elif bridge is not None:
        element = SubElement(devices, "interface", type="bridge")
        SubElement(element, "source", bridge=bridge)
    else:  # through the host, as a program of it; nothing reaches in
        element = SubElement(devices, "interface", type="user")
        if spec.isolated:
            SubElement(element, "link", state="down")
    SubElement(element, "mac", address=mac_of(spec, number))
    # Kernels made for clouds have no driver for adapters that were ever sold, Windows none for those that were not.
    paravirtual = spec.system == "linux" or any(disk.bus == "virtio" for disk in spec.disks)
    model = "virtio" if paravirtual else "e1000e" if spec.machine.generation == 2 else "e1000"
    SubElement(element, "model", type=model)


def place_of(spec: MachineSpec, number: int, settings: LibvirtSettings) -> tuple[str | None, str | None]:
    """Return the network of libvirt that an adapter is in, or else the bridge of the host, or neither."""
    if spec.isolated:
        return settings.test_network, None
    named = networks_of(spec, settings.networks)[number]
    if named is None:
        return settings.network, settings.bridge
    return (None, named.removeprefix(BRIDGE)) if named.startswith(BRIDGE) else (named, None)


def checkpoint_xml(spec: MachineSpec, created_seconds: int) -> Iterator[str]:
    """Yield the XML of a checkpoint for each bitmap that the machine's own disks were made with.

    libvirt knows a record of writes as a checkpoint, and its bitmaps by the checkpoint's name.
    """
    named = targets(spec)
    for name in sorted({one.bitmap for one in spec.disks if one.bitmap is not None}):
        root = Element("domaincheckpoint")
        _text(root, "name", name)
        _text(root, "creationTime", str(created_seconds))
        disks = SubElement(root, "disks")
        for disk in spec.disks:
            if disk.bitmap == name:
                SubElement(disks, "disk", name=named[disk.number].name, checkpoint="bitmap", bitmap=name)
            else:
                SubElement(disks, "disk", name=named[disk.number].name, checkpoint="no")
        yield _written(root, spec.name)


@dataclass(frozen=True, slots=True)
class Described:
    """What libvirt says that a domain is."""

    uuid: uuid.UUID
    macs: tuple[str, ...]


def described(root: Element, name: str) -> Described:
    """Read libvirt's XML of a domain. Raises PlatformError."""
    try:
        number = uuid.UUID((root.findtext("uuid") or "").strip())
    except ValueError as error:
        raise PlatformError(f"libvirt tells no UUID of the machine {name!r}") from error
    macs = (one.get("address", "") for one in root.iterfind("devices/interface/mac"))
    return Described(number, tuple(one for one in macs if one))


def _text(parent: Element, tag: str, content: str, **attributes: str) -> Element:
    element = SubElement(parent, tag, attributes)
    element.text = content
    return element


def _written(root: Element, name: str) -> str:
    text = ElementTree.tostring(root, encoding="unicode")
    if not all(one >= " " or one in "\n\t" for one in text):
        raise PlatformError(f"{name}: a name or a path holds what no XML can", hint="choose another state folder")
    return text
