"""Recovery machines under plain QEMU on this host: defined, started, stopped, looked at, hydrated and deleted.

A machine is a folder. Its description is written last, when its disks are there, and removed first: whatever a crash
leaves, ``define`` and ``delete`` clean up. QEMU runs by itself; its process is known by its pid file and by the path of
its monitor. A host that was rebooted finds its machines off.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from replica.errors import PlatformError
from replica.host import Host
from replica.model import Identity
from replica.monitor import Monitor, MonitorError, MonitorGoneError
from replica.platforms import overlay, servant
from replica.platforms.channel import AgentChannel
from replica.platforms.console import last_of, piece_of
from replica.platforms.folder import MachineFolder, MachineFolders
from replica.platforms.platform import DiskState, MachineSpec, PlatformName, Power
from replica.platforms.qemu import hydration
from replica.platforms.qemu.command import bios_uuid, command_line, firmware, mac_of, node_name
from replica.platforms.qemu.files import QemuFiles
from replica.platforms.qemu.screen import LARGEST_PICTURE_BYTES, png_of
from replica.platforms.sockets import make_place
from replica.qemu import LiveAddress

ACCELERATOR_VARIABLE: Final = "GODWIT_QEMU_ACCEL"
OPTIONS_VARIABLE: Final = "GODWIT_QEMU_OPTIONS"  # further options of QEMU, as a shell would split them
START_SECONDS: Final = 120.0
QUIT_SECONDS: Final = 30.0
ASK_AGAIN_SECONDS: Final = 5.0  # a guest that is still starting does not hear the power button
PING_SECONDS: Final = 2.0

_RUNNING: Final = ("running",)
_ENDED: Final = ("shutdown",)


class QemuPlatform:
    """The platform ``qemu``; see ``replica.platforms.platform.Platform`` for the contract."""

    def __init__(
        self,
        host: Host,
        *,
        accelerator: str | None = None,
        options: Sequence[str] | None = None,
        hydrate_bytes_per_second: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run machines below the host's state folder.

        ``accelerator`` is QEMU's: else GODWIT_QEMU_ACCEL's, else tcg, which every host can do. ``options`` go to QEMU
        as they are; else those of GODWIT_QEMU_OPTIONS. Hydration goes at full speed unless it is given another.
        ``environment`` is that of the servers of disks, by which they have the key: ours unless given.
        """
        self._folders = MachineFolders(host, "qemu")
        self._accelerator = accelerator or os.environ.get(ACCELERATOR_VARIABLE, "tcg")
        self._options = shlex.split(os.environ.get(OPTIONS_VARIABLE, "")) if options is None else list(options)
        self._speed = hydrate_bytes_per_second
        self._environment = environment

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return "qemu"

    def folder(self, name: str) -> MachineFolder:
        """Return the machine's folder, defined or not: the server of its disks (``servant``) is at home there too."""
        return self._folders.of(name)

    def overlays(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Return the names, in a machine's folder, of its own disks of these numbers."""
        return tuple(map(overlay.disk_name, numbers))

    def names(self) -> list[str]:
        """Return the names of all machines that are defined."""
        return self._folders.names()

    def define(self, spec: MachineSpec) -> None:
        """Make the machine, off; see ``Platform.define``.

        One that is defined as just this is left as it is. One that ever ran is not replaced: PlatformError.
        """
        with self._folders.held(spec.name) as folder:
            files = QemuFiles(folder)
            if folder.is_defined():
                if folder.read() == spec:
                    return
                if files.started.exists() or files.process.pid() is not None:
                    raise PlatformError(
                        f"the machine {spec.name!r} exists, is another, and ran already",
                        path=str(folder.path),
                        hint="delete it first: what its guest wrote would be lost",
                    )
            folder.make()
            with folder.errors("make the machine"):
                self._clear(folder, files)
                if spec.machine.generation == 2:
                    shutil.copyfile(firmware()[1], files.variables)
            for disk in spec.disks:
                overlay.create(files.disk(disk.number), disk)
            folder.write(spec)

    def _clear(self, folder: MachineFolder, files: QemuFiles) -> None:
        """Remove what an earlier attempt left, but not what belongs to the server of the disks."""
        folder.description.unlink(missing_ok=True)
        for path in (*folder.path.glob("disk-*"), files.variables, files.started, files.hydrating, files.console):
            path.unlink(missing_ok=True)

    def start(self, name: str) -> None:
        """Turn the machine on, or let it go on where it stopped because of its disks; see ``Platform.start``."""
        with self._folders.held(name) as folder:
            spec, files = folder.read(), QemuFiles(folder)
            if files.process.pid() is None:
                own = _own_disks(spec, files)
                overlay.settle_closed(own)
                for number, path in overlay.unsettled(own).items():
                    overlay.lean_back(path, next(disk for disk in spec.disks if disk.number == number))
            backed = frozenset(d.number for d in spec.disks if not overlay.is_hydrated(files.disk(d.number)))
            if backed:
                servant.ensure(folder.path, environment=self._environment)
            if files.process.pid() is None:
                make_place(folder.path)  # anew after a reboot
                with folder.errors("start the machine"):
                    files.started.touch()
                self._launch(command_line(spec, files, backed, accelerator=self._accelerator, options=self._options))
            with self._monitor(name, files) as monitor:
                if monitor.execute("query-status").get("status") not in _RUNNING:
                    monitor.execute("cont")
                if files.hydrating.exists():
                    hydration.begin(monitor, spec.disks, bytes_per_second=self._speed)

    def _launch(self, command: list[str]) -> None:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_SECONDS, check=False, cwd="/"
            )
        except OSError as error:
            raise PlatformError(f"{command[0]} cannot be run: {error.strerror or error}") from error
        except subprocess.TimeoutExpired as error:
            raise PlatformError("QEMU does not come up", hint="does the store answer?") from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            reason = "; ".join(line.partition(": ")[2] or line for line in said[-3:]) or "it gave no reason"
            raise PlatformError(f"QEMU does not start: {reason}", hint=_hint(reason))

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """Ask the guest to shut down, and wait; see ``Platform.stop``."""
        with self._folders.held(name) as folder:
            folder.read()
            self._stop(name, QemuFiles(folder), force=force, timeout_seconds=timeout_seconds)

    def _stop(self, name: str, files: QemuFiles, *, force: bool, timeout_seconds: float) -> None:
        process = files.process
        if process.pid() is None:
            return
        if force:
            # QEMU ends in order where it can, so that the bitmaps are kept; to the guest it is the plug all the same.
            with suppress(PlatformError), self._monitor(name, files) as monitor:
                monitor.execute("quit")
            if not process.wait(QUIT_SECONDS):
                process.end(timeout_seconds=QUIT_SECONDS)
            return
        deadline = time.monotonic() + timeout_seconds
        channel = AgentChannel(str(files.agent))
        while process.pid() is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise PlatformError(
                    f"the guest of {name!r} did not shut down within {timeout_seconds:.0f} s",
                    hint="wait, or pull the plug with --force",
                )
            heard = channel.shut_down(timeout_seconds=min(PING_SECONDS, left))
            if not heard or left < timeout_seconds - ASK_AGAIN_SECONDS:  # the agent tells nobody that it failed
                with suppress(PlatformError), self._monitor(name, files) as monitor:
                    monitor.execute("system_powerdown")
            process.wait(max(0.0, min(ASK_AGAIN_SECONDS, deadline - time.monotonic())))

    def power(self, name: str) -> Power:
        """Return whether it runs. One that stopped because of a disk is paused: ``start`` lets it go on."""
        folder = self.folder(name)
        if not folder.is_defined():
            return Power.GONE
        files = QemuFiles(folder)
        if files.process.pid() is None:
            return Power.OFF
        try:
            with self._monitor(name, files) as monitor:
                status = monitor.execute("query-status").get("status")
        except PlatformError:
            if files.process.pid() is None:  # it ended while it was asked
                return Power.OFF
            raise
        return Power.RUNNING if status in _RUNNING else Power.OFF if status in _ENDED else Power.PAUSED

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """Return its disks as they are now; ``remaining_bytes`` is what is left at most."""
        folder = self.folder(name)
        spec, files = folder.read(), QemuFiles(folder)
        runs = files.process.pid() is not None
        if runs:
            try:
                with self._monitor(name, files) as monitor:
                    for number, path in overlay.unsettled(_own_disks(spec, files)).items():
                        hydration.flush(monitor, number)
                        overlay.settle(path)
                    left = hydration.remaining(monitor, spec.disks)
            except PlatformError:
                if files.process.pid() is not None:
                    raise
                runs = False
        if not runs:
            overlay.settle_closed(_own_disks(spec, files))
            left = {d.number: d.size for d in spec.disks if not overlay.is_hydrated(files.disk(d.number))}
        return tuple(
            DiskState(
                disk.number,
                str(LiveAddress(str(files.replication), node_name(disk.number), str(files.agent)))
                if runs
                else str(files.disk(disk.number)),
                disk.number not in left,
                left.get(disk.number, 0),
            )
            for disk in spec.disks
        )

    def hydrate(self, name: str) -> None:
        """Begin to copy what is missing; of a machine that is off, as soon as it is started."""
        with self._folders.held(name) as folder:
            spec, files = folder.read(), QemuFiles(folder)
            with folder.errors("note that the disks are to be hydrated"):
                files.hydrating.touch()
            if files.process.pid() is None:
                return
            if any(not overlay.is_hydrated(files.disk(disk.number)) for disk in spec.disks):
                servant.ensure(folder.path, environment=self._environment)
            with self._monitor(name, files) as monitor:
                hydration.begin(monitor, spec.disks, bytes_per_second=self._speed)

    def channel(self, name: str) -> AgentChannel:
        """Return the way into the guest, through the QEMU guest agent where one runs in it."""
        folder = self.folder(name)
        folder.read()
        return AgentChannel(str(QemuFiles(folder).agent))

    def screenshot(self, name: str) -> bytes | None:
        """Return a picture of the console as PNG; None of a machine that is off."""
        folder = self.folder(name)
        folder.read()
        files = QemuFiles(folder)
        if files.process.pid() is None:
            return None
        with self._monitor(name, files) as monitor, folder.errors("take a picture of the screen"):
            try:
                try:
                    monitor.execute("screendump", filename=str(files.screen), format="png")
                except MonitorGoneError:
                    raise
                except MonitorError:  # of before 7.1, or built without PNG
                    monitor.execute("screendump", filename=str(files.screen))
                with files.screen.open("rb") as file:
                    return png_of(file.read(LARGEST_PICTURE_BYTES + 4096))
            finally:
                files.screen.unlink(missing_ok=True)

    def console(self, name: str) -> str:
        """Return the last of what the guest said on its serial port; see ``replica.platforms.console``."""
        folder = self.folder(name)
        with folder.errors("read the console"):
            return last_of(QemuFiles(folder).console)

    def said(self, name: str, start_bytes: int) -> bytes:
        """Return what the guest said on its serial port from there on; see ``replica.platforms.console``."""
        folder = self.folder(name)
        with folder.errors("read the console"):
            return piece_of(QemuFiles(folder).console, start_bytes)

    def identity(self, name: str) -> Identity:
        """Return by what the machine is known. Raises PlatformError."""
        spec = self.folder(name).read()
        macs = () if spec.isolated else tuple(mac_of(spec, number) for number in range(len(spec.machine.nics)))
        return Identity("qemu", name, str(bios_uuid(name)), macs)

    def delete(self, name: str) -> None:
        """Stop it and remove all that it wrote; see ``Platform.delete``."""
        with self._folders.held(name) as folder:
            self._stop(name, QemuFiles(folder), force=True, timeout_seconds=QUIT_SECONDS)
            servant.end(folder.path)
            folder.remove()

    @contextmanager
    def _monitor(self, name: str, files: QemuFiles) -> Iterator[Monitor]:
        """Talk to the running QEMU. Raises PlatformError."""
        try:
            with Monitor(str(files.monitor)) as monitor:
                yield monitor
        except MonitorError as error:
            raise PlatformError(f"{name}: {error.message}", path=error.path, hint=error.hint) from error


def _own_disks(spec: MachineSpec, files: QemuFiles) -> dict[int, Path]:
    return {disk.number: files.disk(disk.number) for disk in spec.disks}


def _hint(reason: str) -> str | None:
    if "lock" in reason:
        return "another program has one of the machine's disks open"
    if "NBD" in reason or "nbd" in reason or "socket" in reason:
        return "the server of the machine's disks does not answer: see servant.log in the machine's folder"
    if "kvm" in reason.lower():
        return f"set {ACCELERATOR_VARIABLE}=tcg, or let this user open /dev/kvm"
    return None
