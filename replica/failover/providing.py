"""Gives machines the disks of their points through a server at home in the machine's folder (replica.platforms)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from replica.errors import PlatformError
from replica.generation.patched import Conversion
from replica.model import Point, RecoveryMachine
from replica.platforms import servant
from replica.platforms.folder import MachineFolder
from replica.platforms.platform import DiskSpec, Platform
from replica.platforms.servant import ServantSpec


@runtime_checkable
class KeepsFolders(Protocol):
    """A platform on this host, with a folder for each machine."""

    def folder(self, name: str) -> MachineFolder:
        """Return the machine's folder."""


@runtime_checkable
class KeepsOverlays(Protocol):
    """A platform whose machines have disks of their own over those of their points, in their folders."""

    def overlays(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the machine's own disks of these numbers: once they are whole, nothing is served."""


@dataclass(frozen=True, slots=True)
class ServantProvider:
    """Has the disks of a machine served by a process beside it: from the store, before anything is restored.

    ``store`` is the address as it was given, ``configuration`` the file that was read, if any.
    """

    store: str
    tenant: str
    vm_name: str
    state_folder: Path | None = None
    configuration: Path | None = None

    def provide(
        self, platform: Platform, machine: RecoveryMachine, point: Point, conversion: Conversion
    ) -> tuple[DiskSpec, ...]:
        """Write what the server is to know, and return the disks by its addresses; the platform starts it."""
        if not isinstance(platform, KeepsFolders):
            raise PlatformError(f"machines of {machine.platform} cannot be started from a store yet")
        folder = platform.folder(machine.name)
        numbers = [one.number for one in point.disks]
        overlays = platform.overlays(numbers) if isinstance(platform, KeepsOverlays) else ()
        spec = ServantSpec(
            store=self.store,
            tenant=self.tenant,
            vm=self.vm_name,
            point=point.point,
            generation=machine.generation,
            overlays=overlays,
            state_folder=None if self.state_folder is None else str(self.state_folder.absolute()),
            configuration=None if self.configuration is None else str(self.configuration.absolute()),
        )
        servant.prepare(folder, spec, conversion)
        return tuple(
            DiskSpec(
                one.number,
                one.size,
                one.bus,
                url=servant.url(folder.path, one.number),
                bitmap=machine.bitmap,
                sector_size=one.sector_size,
            )
            for one in point.disks
        )
