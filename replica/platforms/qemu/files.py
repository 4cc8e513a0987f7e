"""The names of what a machine under QEMU keeps in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import disk_name
from replica.platforms.process import Owned
from replica.platforms.sockets import socket_path


@dataclass(frozen=True, slots=True)
class QemuFiles:
    """Paths in the folder of one machine."""

    folder: MachineFolder

    @property
    def monitor(self) -> Path:
        """The socket of the monitor that this platform talks to."""
        return socket_path(self.folder.path, "monitor")

    @property
    def replication(self) -> Path:
        """The socket of the monitor for replication: a monitor serves one client at a time."""
        return socket_path(self.folder.path, "qmp")

    @property
    def agent(self) -> Path:
        """The socket of the guest agent's channel."""
        return socket_path(self.folder.path, "agent")

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

    @property
    def process(self) -> Owned:
        """The running QEMU."""
        pid_file = self.folder.path / "qemu.pid"
        return Owned(pid_file, ("-pidfile", str(pid_file)))

    def disk(self, number: int) -> Path:
        """The machine's own disk of that number."""
        return self.folder.path / disk_name(number)
