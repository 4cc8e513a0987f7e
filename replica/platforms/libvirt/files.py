"""The names of what a machine under libvirt keeps in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from replica.platforms import servant
from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import disk_name
from replica.platforms.sockets import socket_path


@dataclass(frozen=True, slots=True)
class LibvirtFiles:
    """Paths in the folder of one machine."""

    folder: MachineFolder

    @property
    def server(self) -> Path:
        """The socket of the server of the machine's disks."""
        return socket_path(self.folder.path, servant.SOCKET)

    @property
    def console(self) -> Path:
        """What the guest said on its serial port."""
        return self.folder.path / "console.log"

    @property
    def variables(self) -> Path:
        """The variables of a UEFI machine."""
        return self.folder.path / "variables.fd"

    @property
    def hydrating(self) -> Path:
        """There while the disks are to be hydrated: a machine that is started anew goes on."""
        return self.folder.path / "hydrating"

    @property
    def started(self) -> Path:
        """There once the machine was started: its disks are not thrown away for a new description."""
        return self.folder.path / "started"

    @property
    def screen(self) -> Path:
        """The picture of the console while it is being taken."""
        return self.folder.path / "screen"

    def disk(self, number: int) -> Path:
        """The machine's own disk of that number."""
        return self.folder.path / disk_name(number)
