"""What a failover works with, injected: the VM in its store, this host, platforms, and what serves disks to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from replica.catalog import ProtectedVm
from replica.errors import PlatformError
from replica.failover.offer import OFFERS, Offer, offer
from replica.failover.stopping import Stopped, stopped
from replica.failover.transitions import Command
from replica.failover.turn import Turn, turn
from replica.generation.patched import Conversion
from replica.host import Host
from replica.model import Point, RecoveryMachine
from replica.platforms.platform import DiskSpec, Platform, Power
from replica.source import OpenDisk, open_for_reading
from replica.stores.store import Store
from replica.workers import Workers


class Provider(Protocol):
    """Gives machines the disks of points."""

    def provide(
        self, platform: Platform, machine: RecoveryMachine, point: Point, conversion: Conversion
    ) -> tuple[DiskSpec, ...]:
        """Return the point's disks, ``conversion`` laid over them, as the machine is to have them. Safe to repeat."""


@dataclass(frozen=True, slots=True)
class Means:
    """All that the commands need. ``wait_seconds`` is how long a cycle that is at work is waited for."""

    store: Store
    host: Host
    found: ProtectedVm
    open_platform: Callable[[str], Platform]
    provider: Provider
    offers: Mapping[str, Offer] = field(default_factory=lambda: OFFERS)
    workers: Workers = field(default_factory=Workers)
    open_disk: OpenDisk = open_for_reading
    stopped: Callable[..., AbstractContextManager[Stopped]] = stopped
    wait_seconds: float = 0
    sleep: Callable[[float], None] = time.sleep

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.found.vm.name

    def turn(self, command: Command, *, take_over: bool = False) -> AbstractContextManager[Turn]:
        """Take a turn at the VM. Raises as ``replica.failover.turn.turn``."""
        return turn(
            self.store,
            self.host,
            self.found,
            command,
            take_over=take_over,
            wait_seconds=self.wait_seconds,
            sleep=self.sleep,
        )

    def offer(self, platform: str) -> Offer:
        """Return what is known of a platform. Raises UsageError."""
        return offer(platform, self.offers)

    def is_reachable(self, machine: RecoveryMachine) -> bool:
        """Whether the machine can be seen from this host."""
        known = self.offers.get(machine.platform)
        return known is not None and (not known.is_local or machine.host_id == self.host.host_id)

    def platform_of(self, machine: RecoveryMachine) -> Platform:
        """Return the platform of a machine. Raises PlatformError where it is another host's."""
        if not self.is_reachable(machine):
            raise PlatformError(
                f"the machine {machine.name} is on the host {machine.host_name}, and only seen there",
                hint=f"run the command on {machine.host_name}",
            )
        return self.open_platform(machine.platform)

    def remove(self, machine: RecoveryMachine) -> None:
        """Remove a machine and all that it wrote. Raises PlatformError where it is not gone."""
        platform = self.platform_of(machine)
        platform.delete(machine.name)
        if platform.power(machine.name) is not Power.GONE:
            raise PlatformError(f"the machine {machine.name} is still there, though its platform was told to delete it")
