"""By what machines are known: asked of their platforms, and found again when a VM comes back with a new id."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from replica.model import Identity, Machine, RecoveryMachine
from replica.platforms.platform import Platform


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
