"""A libvirt domain as its XML describes it: the machine, its disks in boot order, and whether it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal
from xml.etree import ElementTree

from replica.errors import SourceError, UsageError
from replica.libvirt.virsh import Virsh
from replica.model import Nic
from replica.protection import MachineWishes

AGENT_CHANNEL: Final = "org.qemu.guest_agent.0"
MOST_DISKS: Final = 1000
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UNITS: Final = {
    "b": 1,
    "bytes": 1,
    "kb": 10**3,
    "k": 1 << 10,
    "kib": 1 << 10,
    "mb": 10**6,
    "m": 1 << 20,
    "mib": 1 << 20,
    "gb": 10**9,
    "g": 1 << 30,
    "gib": 1 << 30,
    "tb": 10**12,
    "t": 1 << 40,
    "tib": 1 << 40,
}


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of a domain. ``place`` is its file or device, empty for one on the network; ``format`` is QEMU's word."""

    target: str
    bus: str
    kind: str  # file, block, network…
    format: str
    place: str
    backing: tuple[str, ...]  # the files beneath it, as far as libvirt tells
    writable: bool  # by this domain, and by no other
    sector_size: int

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether QEMU can keep a record of writes with the disk that outlives its process."""
        return self.format == "qcow2"


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain. ``disks`` are hard disks only, the boot disk first."""

    name: str
    uuid: str
    active: bool  # running or paused
    machine: MachineWishes
    disks: tuple[DomainDisk, ...]
    has_agent: bool  # a channel for the guest agent, whether or not one listens

    def disk(self, target: str) -> DomainDisk:
        """Return the disk of that target. Raises SourceError."""
        for one in self.disks:
            if one.target == target:
                return one
        known = ", ".join(one.target for one in self.disks) or "none"
        raise SourceError(
            f"the domain has no disk {target!r}, but {known}",
            path=self.name,
            hint="'godwit protect --update --libvirt' names the disks that it has now",
        )


def read_domain(virsh: Virsh, name: str) -> Domain:
    """Return the domain of that name or UUID as it is now. Raises VirshError, SourceError."""
    return parse_domain(virsh.ask("dumpxml", "--domain", name), name)


def parse_domain(xml: str, name: str) -> Domain:
    """Read a domain's XML; ``name`` is what errors call it. Raises SourceError."""
    root = parse_xml(xml, "domain", name)
    uuid = (root.findtext("uuid") or "").strip()
    if not _UUID.fullmatch(uuid):
        raise SourceError("libvirt tells no UUID of the domain", path=name)
    return Domain(
        name=(root.findtext("name") or name).strip(),
        uuid=uuid,
        active=root.get("id") is not None,
        machine=_machine(root, name),
        disks=_disks(root, name),
        has_agent=any(one.get("name") == AGENT_CHANNEL for one in root.iterfind("devices/channel/target")),
    )


def parse_xml(xml: str, tag: str, name: str) -> ElementTree.Element:
    """Return the root element, which must be a ``tag``. Raises SourceError."""
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:  # libvirt writes none, and entities can grow without end
        raise SourceError("libvirt's XML has a document type", path=name)
    try:
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise SourceError(f"libvirt's XML cannot be read: {error}", path=name) from error
    if root.tag != tag:
        raise SourceError(f"libvirt describes a {root.tag!r:.60} where a {tag} was asked for", path=name)
    return root


# -- the machine ------------------------------------------------------------------------------------------------------


def _machine(root: ElementTree.Element, name: str) -> MachineWishes:
    vcpu = root.find("vcpu")
    cpus = None if vcpu is None else _count(vcpu.get("current") or vcpu.text, "processors", name, most=4096)
    generation: Literal[1, 2] = 2 if _is_uefi(root) else 1
    return MachineWishes(
        generation=generation,
        cpus=cpus,
        memory_bytes=_memory(root, name),
        nics=tuple(_nics(root)),
        secure_boot=generation == 2 and _is_secure(root),
    )


def _is_uefi(root: ElementTree.Element) -> bool:
    loader = root.find("os/loader")
    declared = root.find("os")
    if declared is not None and declared.get("firmware"):
        return declared.get("firmware") == "efi"
    if loader is None:
        return False
    # A BIOS is a loader of type rom, of which nobody names one; UEFI is flash, or rarely a rom that says so.
    text = (loader.text or "").lower()
    return loader.get("type") == "pflash" or any(word in text for word in ("ovmf", "aavmf", "edk2"))


def _is_secure(root: ElementTree.Element) -> bool:
    """Tell whether the firmware checks signatures: it can, and there are keys to check against."""
    features = {one.get("name"): one.get("enabled") == "yes" for one in root.iterfind("os/firmware/feature")}
    if "secure-boot" in features:
        return features["secure-boot"] and features.get("enrolled-keys", True)
    loader = root.find("os/loader")
    return loader is not None and loader.get("secure") == "yes"


def _memory(root: ElementTree.Element, name: str) -> int | None:
    memory = root.find("memory")
    if memory is None:
        return None
    unit = _UNITS.get((memory.get("unit") or "KiB").lower())
    if unit is None:
        raise SourceError(f"the domain's memory is in an unknown unit {memory.get('unit')!r:.60}", path=name)
    return _count(memory.text, "units of memory", name, most=1 << 40) * unit


def _nics(root: ElementTree.Element) -> Iterator[Nic]:
    for one in root.iterfind("devices/interface"):
        mac, source = one.find("mac"), one.find("source")
        network = None
        if source is not None:
            network = source.get("network") or source.get("bridge") or source.get("dev")
        yield Nic(mac.get("address") if mac is not None else None, network)


# -- disks ------------------------------------------------------------------------------------------------------------


def _disks(root: ElementTree.Element, name: str) -> tuple[DomainDisk, ...]:
    found: list[tuple[int, DomainDisk]] = []
    for element in root.iterfind("devices/disk"):
        if element.get("device", "disk") not in ("disk", "lun"):
            continue
        boot = element.find("boot")
        order = 1 << 30 if boot is None else _count(boot.get("order"), "in the boot order", name, most=1 << 20)
        found.append((order, _disk(element, name)))
        if len(found) > MOST_DISKS:
            raise SourceError(f"the domain has more than {MOST_DISKS} disks", path=name)
    found.sort(key=lambda one: one[0])  # stable: else as libvirt lists them
    return tuple(disk for _, disk in found)


def _disk(element: ElementTree.Element, name: str) -> DomainDisk:
    target, driver, source = element.find("target"), element.find("driver"), element.find("source")
    if target is None or not target.get("dev"):
        raise SourceError("libvirt describes a disk without a target", path=name)
    place = ""
    if source is not None:
        place = source.get("file") or source.get("dev") or ""
    blocks = element.find("blockio")
    sector_size = 512 if blocks is None else int(blocks.get("logical_block_size") == "4096") * 3584 + 512
    shared = [tag for tag in ("readonly", "shareable", "transient") if element.find(tag) is not None]
    return DomainDisk(
        target=target.get("dev", ""),
        bus=target.get("bus") or "virtio",
        kind=element.get("type", ""),
        format=(driver.get("type") if driver is not None else None) or "raw",
        place=place,
        backing=tuple(_backing(element)),
        writable=not shared and source is not None,
        sector_size=sector_size,
    )


def _backing(element: ElementTree.Element) -> Iterator[str]:
    for store in element.iter("backingStore"):
        source = store.find("source")
        if source is not None and source.get("file"):
            yield source.get("file", "")


def _count(text: str | None, what: str, name: str, *, most: int) -> int:
    text = (text or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and 1 <= int(text) <= most):
        raise SourceError(f"libvirt tells of {text!r:.60} {what}", path=name)
    return int(text)


def protectable(domain: Domain, targets: tuple[str, ...]) -> tuple[DomainDisk, ...]:
    """Return the disks of these targets, or all that the domain alone writes to. Raises UsageError, SourceError."""
    if not targets:
        disks = tuple(one for one in domain.disks if one.writable)
        if not disks:
            raise UsageError(f"{domain.name} has no disk of its own that it writes to")
        return disks
    chosen = tuple(domain.disk(target) for target in targets)
    for one in chosen:
        if not one.writable:
            raise UsageError(
                f"{domain.name}: {one.target} is empty, read-only, transient or shared with others, "
                "so libvirt makes no backup of it",
                hint="leave it out",
            )
    return chosen
