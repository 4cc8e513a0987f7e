"""Gives machines the disks of points: by a server process at home in the machine's folder, at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from replica.catalog import ProtectedVm
from replica.errors import PlatformError
from replica.generation.patched import Conversion
from replica.host import Host
from replica.model import Point, RecoveryMachine
from replica.platforms import servant
from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import disk_name
from replica.platforms.platform import DiskSpec, Platform


@runtime_checkable
class Housed(Protocol):
    """A platform whose machines have folders on this host."""

    def folder(self, name: str) -> MachineFolder:
        """Return the machine's folder, defined or not. Raises PlatformError."""


@dataclass(frozen=True, slots=True)
class ServantProvider:
    """Provides disks by ``servant``. ``environment`` is what the server gets, ours unless given: secrets are in it."""

    host: Host
    found: ProtectedVm
    store_url: str
    configuration: Path | None = None  # the configuration file in force
    environment: Mapping[str, str] | None = None

    def provide(
        self, platform: Platform, machine: RecoveryMachine, point: Point, conversion: Conversion
    ) -> tuple[DiskSpec, ...]:
        """Return the point's disks, ``conversion`` laid over them, as the machine is to have them. Safe to repeat.

        They are served when this returns. Raises PlatformError.
        """
        if not isinstance(platform, Housed):
            raise PlatformError(
                f"machines of platform {platform.name!r} have no place for a server of their disks here"
            )
        folder = platform.folder(machine.name)
        spec = servant.ServantSpec(
            store=self.store_url,
            tenant=self.found.keys.tenant,
            vm=self.found.vm.name,
            point=point.point,
            generation=point.machine.generation if conversion.manifest is None else 1,
            overlays=tuple(disk_name(disk.number) for disk in point.disks),
            state_folder=None if self.host.state_folder is None else str(self.host.state_folder.absolute()),
            configuration=None if self.configuration is None else str(self.configuration.absolute()),
        )
        servant.prepare(folder, spec, conversion)
        servant.ensure(folder.path, environment=self.environment)
        return tuple(
            DiskSpec(
                number=disk.number,
                size=disk.size,
                bus=disk.bus,
                url=servant.url(folder.path, disk.number),
                bitmap=machine.bitmap,
                sector_size=disk.sector_size,
            )
            for disk in point.disks
        )
