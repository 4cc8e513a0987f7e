"""What `protect` takes from a libvirt domain: the addresses and buses of its disks, and the machine."""

from __future__ import annotations

from dataclasses import dataclass, fields

from replica.libvirt.address import LibvirtAddress
from replica.libvirt.domain import protectable, read_domain
from replica.libvirt.virsh import Virsh
from replica.protection import MachineWishes


@dataclass(frozen=True, slots=True)
class FoundDomain:
    """A domain as it is to be protected. ``left_out`` are the targets of disks that libvirt makes no backup of."""

    disks: tuple[str, ...]  # addresses, the boot disk first
    buses: dict[str, str]  # by address
    machine: MachineWishes
    left_out: tuple[str, ...]


def find_domain(
    name: str,
    *,
    connect: str | None = None,
    targets: tuple[str, ...] = (),
    freeze: bool = True,
    wishes: MachineWishes,
) -> FoundDomain:
    """Look at a domain. ``targets`` are the disks to protect, none for all; ``wishes`` go before what its XML says.

    Raises SourceError, UsageError.
    """
    domain = read_domain(Virsh(connect), name)
    chosen = protectable(domain, targets)
    addresses = {one.target: str(LibvirtAddress(name, one.target, connect, freeze)) for one in chosen}
    return FoundDomain(
        disks=tuple(addresses.values()),
        buses={addresses[one.target]: one.bus for one in chosen},
        machine=overridden(domain.machine, wishes),
        left_out=tuple(one.target for one in domain.disks if not targets and one not in chosen),
    )


def overridden(described: MachineWishes, wishes: MachineWishes) -> MachineWishes:
    """Return what is described, with what is wished in its place where anything is.

    Who asks for Generation 1 asks for no Secure Boot.
    """
    merged = {
        one.name: getattr(described, one.name) if getattr(wishes, one.name) is None else getattr(wishes, one.name)
        for one in fields(MachineWishes)
    }
    if wishes.generation == 1 and wishes.secure_boot is None:
        merged["secure_boot"] = False
    return MachineWishes(**merged)
