"""By what machines are known: asked of their platforms, and found again when a VM comes back with a new id."""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

from replica.model import Identity, Machine, Point, RecoveryMachine
from replica.platforms.platform import Platform

# By the kind of source that a point's disks were read from: what of it names the machine, and is its BIOS UUID there.
_NAMED_BY: Final = {"libvirt": ("domain", True), "hyperv": ("vm", False)}


@runtime_checkable
class Identifies(Protocol):
    """A platform that knows its machines by more than their names."""

    def identity(self, name: str) -> Identity:
        """Return by what the machine is known. Raises PlatformError."""


def identity_of(platform: Platform, machine: RecoveryMachine, described: Machine) -> Identity:
    """Return the identity that a machine has on its platform. Raises PlatformError."""
    if isinstance(platform, Identifies):
        return platform.identity(machine.name)
    macs = () if machine.isolated else tuple(nic.mac for nic in described.nics if nic.mac)
    return Identity(machine.platform, machine.name, "", macs)


def identities_at_home(described: Machine, point: Point) -> tuple[Identity, ...]:
    """Return by what the machine was known whose disks a point was read from; nothing of disk files."""
    for disk in point.disks:
        field, is_bios_uuid = _NAMED_BY.get(disk.source.get("kind", ""), ("", False))
        known = disk.source.get(field, "")
        if known:
            macs = tuple(nic.mac for nic in described.nics if nic.mac)
            return (Identity(disk.source["kind"], known, known if is_bios_uuid else "", macs),)
    return ()
