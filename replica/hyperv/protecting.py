"""What `protect --hyperv` does: looks at a VM on its host, and describes it as protection wants it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from replica.errors import UsageError
from replica.hyperv import connect as connecting
from replica.hyperv.address import HypervAddress, Take, parse_host, parse_map
from replica.hyperv.machine import Drive, HypervVm, describe, drive_at
from replica.hyperv.session import Session
from replica.libvirt.protecting import overridden
from replica.protection import MachineWishes


@dataclass(frozen=True, slots=True)
class FoundVm:
    """A VM as it is to be protected. ``left_out`` are disks that cannot be, by where they are attached."""

    disks: tuple[str, ...]  # addresses, the boot disk first
    buses: dict[str, str]  # by address
    machine: MachineWishes
    left_out: tuple[str, ...]


def find_vm(
    name: str,
    *,
    host: str | None = None,
    positions: tuple[str, ...] = (),
    take: Take = Take.EITHER,
    maps: tuple[str, ...] = (),
    wishes: MachineWishes,
    connect: Callable[[str | None], Session] | None = None,
) -> FoundVm:
    r"""Look at a VM by its name or identifier. ``positions`` are the disks to protect (scsi-0-1), none for all.

    ``maps`` are texts such as ``C:\VMs=/mnt/vms``; ``wishes`` go before what the host says of the machine.
    Raises SourceError, UsageError.
    """
    url = None if host is None else parse_host(host)
    pairs = tuple(parse_map(one) for one in maps)
    with closing((connect or connecting.connect)(url)) as session:
        vm = describe(session, name)
    chosen = [drive_at(vm.drives, one, vm.name) for one in positions] if positions else _protectable(vm)
    addresses = {one.position: str(HypervAddress(vm.id, one.position, url, vm.name, take, pairs)) for one in chosen}
    return FoundVm(
        disks=tuple(addresses.values()),
        buses={addresses[one.position]: one.bus for one in chosen},
        machine=overridden(vm.machine, wishes),
        left_out=tuple(one.position for one in vm.drives if not positions and one not in chosen),
    )


def _protectable(vm: HypervVm) -> list[Drive]:
    drives = [one for one in vm.drives if not one.left_out]
    if not drives:
        raise UsageError(f"{vm.name} has no disk that can be protected", hint="only VHDX files of its own can be")
    return drives
