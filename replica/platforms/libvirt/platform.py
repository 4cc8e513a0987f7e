"""Recovery machines as domains of this host's libvirt: defined, started, stopped, looked at, hydrated and deleted.

A machine is a folder, as on the platform ``qemu``, and a domain, whose UUID follows from the machine's name: no other
domain is ever touched. The folder's description is written last and removed last; the domain's XML is written anew at
each start, of what the disks are by then. What the disks record since before the first instruction libvirt knows as a
checkpoint, whose bitmaps are in them from the beginning.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from replica.errors import PlatformError, SourceError
from replica.host import Host
from replica.libvirt.address import LibvirtAddress
from replica.libvirt.domain import parse_xml
from replica.libvirt.virsh import Virsh, VirshError, VirshRefusedError
from replica.model import Identity
from replica.platforms import overlay, servant
from replica.platforms.channel import AgentChannel
from replica.platforms.console import last_of, piece_of
from replica.platforms.folder import MachineFolder, MachineFolders
from replica.platforms.libvirt import agent, domain, hydration
from replica.platforms.libvirt.access import READ, WRITE, QemuUser
from replica.platforms.libvirt.agent import DomainAgent
from replica.platforms.libvirt.files import LibvirtFiles
from replica.platforms.libvirt.settings import LibvirtSettings
from replica.platforms.networks import networks_of, require_apart
from replica.platforms.platform import DiskSpec, DiskState, MachineSpec, PlatformName, Power
from replica.platforms.qemu.command import bios_uuid, firmware
from replica.platforms.qemu.screen import LARGEST_PICTURE_BYTES, png_of

START_SECONDS: Final = 120.0  # to start a machine; and to look at each QEMU that is installed, as libvirt does first
END_SECONDS: Final = 60.0
ASK_AGAIN_SECONDS: Final = 5.0  # a guest that is still starting does not hear the power button
PRESS_SECONDS: Final = 15.0  # an agent that is silent is waited for by libvirt
POLL_SECONDS: Final = 0.25

_INTERFACES: Final = Path("/sys/class/net")
_OFF: Final = ("shut off", "crashed")
_RUNNING: Final = ("running", "idle", "in shutdown")


class LibvirtPlatform:
    """The platform ``libvirt``; see ``replica.platforms.platform.Platform`` for the contract."""

    def __init__(
        self,
        host: Host,
        *,
        settings: LibvirtSettings | None = None,
        hydrate_mib_per_second: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run machines as domains, their files below the host's state folder. Nothing is asked of libvirt yet.

        Hydration goes at full speed unless it is given another. ``environment`` is that of the servers of disks, by
        which they have the key: ours unless given.
        """
        self._settings = settings or LibvirtSettings()
        self._folders = MachineFolders(host, "libvirt")
        self._clock = host.clock
        self._virsh = Virsh(self._settings.connect)
        self._known_user: QemuUser | None = None
        self._speed = hydrate_mib_per_second
        self._environment = environment

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return "libvirt"

    def folder(self, name: str) -> MachineFolder:
        """Return the machine's folder, defined or not: the server of its disks (``servant``) is at home there too."""
        return self._folders.of(name)

    def overlays(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Return the names, in a machine's folder, of its own disks of these numbers."""
        return tuple(map(overlay.disk_name, numbers))

    def names(self) -> list[str]:
        """Return the names of all machines that are defined."""
        return self._folders.names()

    # -- making

    def check_machine(self, spec: MachineSpec) -> None:
        """Return if libvirt answers, and has what a machine like this needs. Nothing is made. Raises PlatformError."""
        with self._asking(spec.vm_name):
            self._user().require_way(self._state_folder)
            if spec.machine.generation == 2:
                firmware()
            self._accelerator()
            self._require_networks(spec)

    def _require_networks(self, spec: MachineSpec) -> None:
        named = networks_of(spec, self._settings.networks)
        require_apart(named, self._settings.test_network)
        for number, one in enumerate(spec.machine.nics):
            network, bridge = domain.place_of(spec, number, self._settings)
            key = f"platforms.libvirt.{'test_network' if spec.isolated else 'network' if network else 'bridge'}"
            if named[number] is not None:
                key = f"the source's network {one.network!r}" if one.network else "adapters that were in no network"
            if network is not None:
                self._require_network(network, key)
            elif bridge is not None and not (_INTERFACES / bridge).exists():
                raise PlatformError(f"{key}: this host has no bridge {bridge!r}{_listed(_bridges())}")

    def _require_network(self, network: str, key: str) -> None:
        try:
            said = self._virsh.ask("net-info", "--network", network)
        except VirshRefusedError as error:
            there = self._virsh.ask("net-list", "--all", "--name").split("\n")
            raise PlatformError(
                f"{key}: libvirt has no network {network!r}{_listed(one.strip() for one in there)}: {error.message}",
                hint="'virsh net-list --all' lists them",
            ) from error
        if not re.search(r"^Active:\s+yes$", said, re.MULTILINE):
            raise PlatformError(
                f"{key}: libvirt's network {network!r} is not active", hint=f"'virsh net-start {network}' starts it"
            )

    def define(self, spec: MachineSpec) -> None:
        """Make the machine, off; see ``Platform.define``.

        One that is defined as just this is left as it is. One that ever ran is not replaced: PlatformError.
        """
        with self._folders.held(spec.name) as folder, self._asking(spec.name):
            files = LibvirtFiles(folder)
            if folder.is_defined() and folder.read() == spec:
                return
            if self._state(spec.name) not in (None, *_OFF) or (folder.is_defined() and files.started.exists()):
                raise PlatformError(
                    f"the machine {spec.name!r} exists, is another, and ran already",
                    path=str(folder.path),
                    hint="delete it first: what its guest wrote would be lost",
                )
            folder.make()
            user = self._let_in(folder)
            with folder.errors("make the machine"):
                self._clear(folder, files)
                if spec.machine.generation == 2:
                    shutil.copyfile(firmware()[1], files.variables)
                    user.grant(files.variables, READ | WRITE)
                files.console.touch()
            user.grant(files.console, READ | WRITE)
            for disk in spec.disks:
                overlay.create(files.disk(disk.number), disk)
                user.grant(files.disk(disk.number), READ | WRITE)
                if disk.path is not None and disk.url is None:
                    user.grant(disk.path, READ)
            self._undefine(spec.name)  # what an earlier attempt left, with its checkpoints
            self._put(spec, files, frozenset(disk.number for disk in spec.disks))
            for xml in domain.checkpoint_xml(spec, int(self._clock.now().timestamp())):
                self._ask("checkpoint-create", spec.name, "--redefine", files={"--xmlfile": xml})
            folder.write(spec)

    def _clear(self, folder: MachineFolder, files: LibvirtFiles) -> None:
        """Remove what an earlier attempt left, but not what belongs to the server of the disks."""
        folder.description.unlink(missing_ok=True)
        for path in (*folder.path.glob("disk-*"), files.variables, files.started, files.hydrating, files.console):
            path.unlink(missing_ok=True)

    def _put(self, spec: MachineSpec, files: LibvirtFiles, backed: frozenset[int]) -> None:
        """Tell libvirt what the machine is."""
        xml = domain.domain_xml(spec, files, backed, self._settings, self._accelerator())
        self._virsh.ask("define", files={"--file": xml}, timeout_seconds=START_SECONDS)

    def _accelerator(self) -> str:
        """Return how processors are run: by the host's own, where libvirt can have that."""
        if self._settings.type == "qemu":
            return "qemu"
        try:
            self._virsh.ask("domcapabilities", "--virttype", "kvm", "--arch", "x86_64", timeout_seconds=START_SECONDS)
        except VirshRefusedError as error:
            if self._settings.type is not None:
                raise PlatformError(
                    f"platforms.libvirt.type: libvirt cannot have kvm here: {error.message}",
                    hint='say type = "qemu", which emulates',
                ) from error
            return "qemu"
        return "kvm"

    @property
    def _state_folder(self) -> Path:
        return self._folders.root.parent.parent

    def _user(self) -> QemuUser:
        """Return the user that QEMU runs as; asked for once, since libvirt may look at each QEMU there is for it."""
        if self._known_user is None:
            said = self._virsh.ask("capabilities", timeout_seconds=START_SECONDS)
            self._known_user = QemuUser.of(parse_xml(said, "capabilities", "libvirt"), self._settings.socket)
        return self._known_user

    def _let_in(self, folder: MachineFolder) -> QemuUser:
        """Let the user that QEMU runs as pass to the machine's folder. Raises PlatformError."""
        user = self._user()
        user.let_in(folder.path, self._state_folder)
        place = LibvirtFiles(folder).server.parent
        if place != folder.path and not user.reaches_all:
            raise PlatformError(
                "the name of the machine's folder is too long for a socket in it",
                path=str(folder.path),
                hint="choose a shorter state folder with GODWIT_STATE",
            )
        return user

    # -- running

    def start(self, name: str) -> None:
        """Turn the machine on, or let it go on where it stopped because of its disks; see ``Platform.start``."""
        with self._folders.held(name) as folder, self._asking(name):
            spec, files = folder.read(), LibvirtFiles(folder)
            state = self._state(name)
            if state in (None, *_OFF):
                own = _own_disks(spec, files)
                overlay.settle_closed(own)
                for number, path in overlay.unsettled(own).items():
                    overlay.lean_back(path, next(disk for disk in spec.disks if disk.number == number))
            backed = self._backed(spec, files)
            if backed:
                self._serve(folder, files)
            if state in (None, *_OFF):
                with folder.errors("start the machine"):
                    files.started.touch()
                self._put(spec, files, backed)
                self._ask("start", name, timeout_seconds=START_SECONDS)
            elif state == "paused":
                self._ask("resume", name)
            elif state == "pmsuspended":
                self._ask("dompmwakeup", name)
            if files.hydrating.exists():
                self._begin_hydration(spec, files)

    def _serve(self, folder: MachineFolder, files: LibvirtFiles) -> None:
        """See that the server of the machine's disks runs, and that QEMU reaches it."""
        servant.ensure(folder.path, environment=self._environment)
        user = self._let_in(folder)
        if files.server.exists():
            user.grant(files.server, READ | WRITE)

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """Ask the guest to shut down, and wait; see ``Platform.stop``."""
        with self._folders.held(name) as folder, self._asking(name):
            folder.read()
            if force:
                self._pull_the_plug(name)
                return
            begun = time.monotonic()
            deadline = begun + timeout_seconds
            ask_at = begun
            while self._state(name) not in (None, *_OFF):
                now = time.monotonic()
                if now > deadline:
                    raise PlatformError(
                        f"the guest of {name!r} did not shut down within {timeout_seconds:.0f} s",
                        hint="wait, or pull the plug with --force",
                    )
                if now >= ask_at:
                    heard = ask_at == begun and self._press(name, "agent")
                    if not heard:  # an agent that heard may have failed, and tells nobody
                        self._press(name, "acpi")
                    ask_at = time.monotonic() + ASK_AGAIN_SECONDS
                time.sleep(POLL_SECONDS)

    def _press(self, name: str, mode: str) -> bool:
        """Ask the guest to shut down; False where nobody hears."""
        try:
            self._ask("shutdown", name, "--mode", mode, timeout_seconds=PRESS_SECONDS)
        except VirshError:
            return False
        return True

    def _pull_the_plug(self, name: str) -> None:
        """End the machine's QEMU: in order where it can, so that the bitmaps are kept; to the guest it is the plug."""
        for how in (("--graceful",), ()):
            if self._state(name) in (None, *_OFF):
                return
            try:
                self._ask("destroy", name, *how, timeout_seconds=END_SECONDS)
            except VirshRefusedError:
                if how or self._state(name) in (None, *_OFF):
                    continue
                raise
        if self._state(name) not in (None, *_OFF):
            raise PlatformError(f"the machine {name!r} does not end, though libvirt was told to end it")

    def power(self, name: str) -> Power:
        """Return whether it runs. One that stopped because of a disk is paused: ``start`` lets it go on."""
        with self._asking(name):
            state = self._state(name)
        if state is None or state in _OFF:
            return Power.OFF if state is not None or self.folder(name).is_defined() else Power.GONE
        return Power.RUNNING if state in _RUNNING else Power.PAUSED

    # -- disks

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """Return its disks as they are now; ``remaining_bytes`` is what is left at most."""
        folder = self.folder(name)
        spec, files = folder.read(), LibvirtFiles(folder)
        named = domain.targets(spec)
        with self._asking(name):
            runs = self._state(name) not in (None, *_OFF)
            if not runs:
                overlay.settle_closed(_own_disks(spec, files))
            else:
                for path in overlay.unsettled(_own_disks(spec, files)).values():
                    hydration.flush(self._virsh, _id(spec.name), path)
                    overlay.settle(path)
            return tuple(self._disk(spec, files, disk, named[disk.number].name, runs=runs) for disk in spec.disks)

    def _disk(self, spec: MachineSpec, files: LibvirtFiles, disk: DiskSpec, target: str, *, runs: bool) -> DiskState:
        address = str(LibvirtAddress(spec.name, target, self._settings.connect))
        if overlay.is_hydrated(files.disk(disk.number)):
            return DiskState(disk.number, address, hydrated=True)
        left = hydration.remaining_bytes(self._virsh, _id(spec.name), target) if runs else None
        return DiskState(disk.number, address, hydrated=False, remaining_bytes=disk.size if left is None else left)

    def hydrate(self, name: str) -> None:
        """Begin to copy what is missing; of a machine that is off, as soon as it is started."""
        with self._folders.held(name) as folder, self._asking(name):
            spec, files = folder.read(), LibvirtFiles(folder)
            with folder.errors("note that the disks are to be hydrated"):
                files.hydrating.touch()
            if self._state(name) in (None, *_OFF):
                return
            if self._backed(spec, files):
                self._serve(folder, files)
                self._begin_hydration(spec, files)

    def _begin_hydration(self, spec: MachineSpec, files: LibvirtFiles) -> None:
        named = domain.targets(spec)
        disks = [(named[disk.number].name, files.disk(disk.number)) for disk in spec.disks]
        hydration.begin(self._virsh, _id(spec.name), disks, mib_per_second=self._speed)

    @staticmethod
    def _backed(spec: MachineSpec, files: LibvirtFiles) -> frozenset[int]:
        return frozenset(one.number for one in spec.disks if not overlay.is_hydrated(files.disk(one.number)))

    # -- looking

    def channel(self, name: str) -> AgentChannel:
        """Return the way into the guest, through the QEMU guest agent where one runs in it."""
        self.folder(name).read()
        return agent_channel(self._virsh, _id(name))

    def screenshot(self, name: str) -> bytes | None:
        """Return a picture of the console as PNG; None of a machine that is off."""
        folder = self.folder(name)
        folder.read()
        screen = LibvirtFiles(folder).screen
        with self._asking(name), folder.errors("take a picture of the screen"):
            if self._state(name) in (None, *_OFF):
                return None
            try:
                self._ask("screenshot", name, "--file", str(screen))
                with screen.open("rb") as file:
                    return png_of(file.read(LARGEST_PICTURE_BYTES + 4096))
            finally:
                screen.unlink(missing_ok=True)

    def console(self, name: str) -> str:
        """Return the last of what the guest said on its serial port; see ``replica.platforms.console``."""
        folder = self.folder(name)
        with folder.errors("read the console"):
            return last_of(LibvirtFiles(folder).console)

    def said(self, name: str, start_bytes: int) -> bytes:
        """Return what the guest said on its serial port from there on; see ``replica.platforms.console``."""
        folder = self.folder(name)
        with folder.errors("read the console"):
            return piece_of(LibvirtFiles(folder).console, start_bytes)

    def identity(self, name: str) -> Identity:
        """Return by what libvirt, the guest and the network know the machine. Raises PlatformError."""
        self.folder(name).read()
        with self._asking(name):
            root = parse_xml(self._ask("dumpxml", name), "domain", name)
        told = domain.described(root, name)
        return Identity("libvirt", str(told.uuid), str(told.uuid), told.macs)

    # -- removing

    def delete(self, name: str) -> None:
        """Stop it and remove all that it wrote; see ``Platform.delete``."""
        with self._folders.held(name) as folder, self._asking(name):
            self._pull_the_plug(name)
            self._undefine(name)
            servant.end(folder.path)
            folder.remove()
            if self._state(name) is not None:
                raise PlatformError(f"the machine {name!r} is still there, though libvirt was told to remove it")

    def _undefine(self, name: str) -> None:
        """Remove the domain, if it is there, with all that libvirt knows of it. The files are ours to remove."""
        if self._state(name) is None:
            return
        try:
            self._ask(
                "undefine", name, "--keep-nvram", "--managed-save", "--checkpoints-metadata", "--snapshots-metadata"
            )
        except VirshRefusedError:
            if self._state(name) is not None:
                raise

    # -- asking

    def _state(self, name: str) -> str | None:
        """Return libvirt's word for the state of the domain; None where there is none."""
        try:
            return self._ask("domstate", name).strip()
        except VirshRefusedError as error:
            if "failed to get domain" in error.message.lower():
                return None
            raise

    def _ask(self, command: str, name: str, *arguments: str, **options: Any) -> str:
        """Ask libvirt something about the domain: by its UUID, for a name may look like a number."""
        return self._virsh.ask(command, "--domain", _id(name), *arguments, **options)

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Tell what libvirt refuses as this machine's trouble."""
        try:
            yield
        except SourceError as error:
            hint = error.hint or _hint(error.message, self._settings)
            raise PlatformError(f"{name}: {error.message}", path=error.path, hint=hint) from error


def _bridges() -> list[str]:
    return sorted(one.parent.name for one in _INTERFACES.glob("*/bridge"))


def _listed(names: Iterable[str]) -> str:
    """Return a clause that says which there are instead."""
    found = [repr(one) for one in names if one]
    return f"; there {'is' if len(found) == 1 else 'are'} {', '.join(found[:20]) or 'none'}"


def agent_channel(virsh: Virsh, uuid: str) -> AgentChannel:
    """Return the way into the guest of a domain."""
    connect = partial(_connected, virsh)
    return AgentChannel(uuid, connect, piece_bytes=agent.PIECE_BYTES, poll_seconds=agent.POLL_SECONDS)


def _connected(virsh: Virsh, path: str, *, timeout_seconds: float) -> DomainAgent:
    return DomainAgent(virsh, path, timeout_seconds=timeout_seconds)


def _own_disks(spec: MachineSpec, files: LibvirtFiles) -> dict[int, Path]:
    return {disk.number: files.disk(disk.number) for disk in spec.disks}


def _id(name: str) -> str:
    return str(bios_uuid(name))


def _hint(message: str, settings: LibvirtSettings) -> str | None:
    if "Permission denied" in message or "Operation not permitted" in message:
        return (
            "QEMU must be able to reach the machine's folder and the socket in it: see the rules of AppArmor or "
            "SELinux (docs/failover.md, 'Recovery machines')"
        )
    if "failed to connect" in message.lower():
        return (
            f"is libvirt running, and may this user use {settings.connect}? another is named by connect in "
            "[platforms.libvirt]"
        )
    if "network" in message.lower():
        return "choose another network or bridge in [platforms.libvirt], or start that one"
    return None
