"""Recovery as files: each disk of a machine in the format that a hypervisor takes, and a description beside them.

Nothing is run here: a person, or a program that knows the hypervisor, makes a machine of what is in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from replica.errors import PlatformError
from replica.host import Host
from replica.hydrate import SUFFIXES
from replica.platforms import diskfile, servant
from replica.platforms.folder import MachineFolder, MachineFolders
from replica.platforms.hyperv import starting
from replica.platforms.platform import DiskSpec, DiskState, GuestChannel, MachineSpec, PlatformName, Power
from vhdx.convert import ConvertFormat
from vhdx.progress import Progress, silent

GUIDE: Final = "START.txt"


class FilesPlatform:
    """The platform ``files``; see ``replica.platforms.platform.Platform`` for the contract.

    A machine's disks are made by ``hydrate``, which returns once they are whole.
    """

    def __init__(
        self,
        host: Host,
        *,
        format: ConvertFormat = "vhdx",  # noqa: A002 - what everyone calls it
        progress: Progress = silent,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Keep machines below the host's state folder, their disks as ``format``.

        ``environment`` is where the key and the store's credentials come from: ours unless given.
        """
        self._folders = MachineFolders(host, "files")
        self._format: ConvertFormat = format
        self._progress = progress
        self._environment = environment

    def report_to(self, progress: Progress) -> None:
        """Tell from now on how far the disks are."""
        self._progress = progress

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return "files"

    def folder(self, name: str) -> MachineFolder:
        """Return the machine's folder, defined or not."""
        return self._folders.of(name)

    def names(self) -> list[str]:
        """Return the names of all machines that are defined."""
        return self._folders.names()

    def define(self, spec: MachineSpec) -> None:
        """Make the machine's folder and its description. One that is defined otherwise is replaced, disks too."""
        with self._folders.held(spec.name) as folder:
            if folder.is_defined() and folder.read() == spec:
                return
            folder.make()
            with folder.errors("make the machine"):
                folder.description.unlink(missing_ok=True)
                for path in folder.path.glob("disk-*"):
                    path.unlink()
            folder.write_file(GUIDE, f"{self.guide(spec)}\n".encode())
            if self._is_for_hyperv(spec):
                folder.write_file(starting.NAME, starting.script(spec, SUFFIXES[self._format]).encode("ascii"))
            folder.write(spec)

    def start(self, name: str) -> None:
        """Refuse, and say how a machine is made of the files. Raises PlatformError."""
        spec = self.folder(name).read()
        raise PlatformError(
            "these are files, and a hypervisor is needed to start them",
            path=str(self.folder(name).path),
            hint=self.guide(spec),
        )

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """Refuse: whatever was made of the files is not known here. Raises PlatformError."""
        del force, timeout_seconds
        raise PlatformError(
            "these are files: what was started from them is not known here",
            path=str(self.folder(name).path),
            hint="stop the machine where you started it",
        )

    def power(self, name: str) -> Power:
        """Return OFF for files that are there."""
        return Power.OFF if self.folder(name).is_defined() else Power.GONE

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """Return the files of the disks, those that are whole and those to come."""
        folder = self.folder(name)
        found = []
        for disk in folder.read().disks:
            path = self._path(folder, disk)
            whole = path.exists()  # a file has its name once it is whole
            found.append(DiskState(disk.number, str(path), whole, 0 if whole else disk.size))
        return tuple(found)

    def hydrate(self, name: str) -> None:
        """Make the disks that are not there yet, and return once they are whole. Raises PlatformError."""
        with self._folders.held(name) as folder:
            missing = [disk for disk in folder.read().disks if not self._path(folder, disk).exists()]
            for disk in missing:
                with folder.errors(f"make disk {disk.number}"):
                    path = self._path(folder, disk)
                    diskfile.make(
                        folder,
                        disk,
                        path,
                        self._format,
                        environment=self._environment,
                        progress=diskfile.told_of(disk.number, self._progress),
                    )

    def channel(self, name: str) -> GuestChannel | None:
        """Return None: nothing runs here."""
        return None

    def screenshot(self, name: str) -> bytes | None:
        """Return None: nothing runs here."""
        return None

    def delete(self, name: str) -> None:
        """Remove the folder with all files."""
        with self._folders.held(name) as folder:
            servant.end(folder.path)
            folder.remove()

    def guide_path(self, name: str) -> Path:
        """Return where it is said how a machine is made of the files."""
        return self.folder(name).path / GUIDE

    def guide(self, spec: MachineSpec) -> str:
        """Return how a machine is made of the files."""
        folder = self.folder(spec.name)
        paths = [self._path(folder, disk) for disk in spec.disks]
        firmware = "UEFI" if spec.machine.generation == 2 else "BIOS"
        if self._is_for_hyperv(spec):
            switch = "" if spec.isolated else " -Switch NAME"
            return (
                f"copy the folder {folder.path} to a Hyper-V host, and run in it, as an administrator: "
                f"powershell.exe -ExecutionPolicy Bypass -File {starting.NAME}{switch}"
            )
        return (
            f"make a machine with {firmware} firmware, {spec.machine.cpus} processors and "
            f"{spec.machine.memory_bytes >> 20} MiB of memory, and give it {', '.join(map(str, paths))}"
        )

    def _is_for_hyperv(self, spec: MachineSpec) -> bool:
        return self._format.startswith("vhd" if spec.machine.generation == 1 else "vhdx")

    def _path(self, folder: MachineFolder, disk: DiskSpec) -> Path:
        return folder.path / f"disk-{disk.number}{SUFFIXES[self._format]}"
