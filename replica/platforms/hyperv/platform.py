"""Recovery machines on a Hyper-V host, made of whole VHDX files, by PowerShell.

Hyper-V reads disks from files alone: so ``define`` writes all of them into a folder that the host sees, each whole
before it has its name, and the machine is made once they are there. What is known of a machine is with the machine, in
its notes on the host: any agent that reaches the host sees it, and ``delete`` removes it. Here is only
written down, in the machine's folder, from which point its disks are to be made.

This was built to Microsoft's documentation and tested against a stand-in. It was never run against a Hyper-V host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from replica.errors import PlatformError
from replica.host import Host
from replica.hyperv.address import HypervAddress
from replica.hyperv.scripts import STOP
from replica.hyperv.session import ask
from replica.model import Identity
from replica.platforms import diskfile
from replica.platforms.folder import MachineFolder, MachineFolders
from replica.platforms.hyperv import description, screen, scripts
from replica.platforms.hyperv.asking import ASK_SECONDS, FoundMachine, HypervHost
from replica.platforms.hyperv.channel import DirectChannel
from replica.platforms.hyperv.settings import HypervSettings
from replica.platforms.networks import networks_of, require_apart
from replica.platforms.platform import DiskState, MachineSpec, PlatformName, Power
from vhdx.progress import Progress, silent

POLL_SECONDS: Final = 2.0
SHUTDOWN_SECONDS: Final = 60.0  # for which one question waits that asks a guest to shut down
REMOVE_SECONDS: Final = 600.0
_OFF: Final = frozenset({"Off", "OffCritical"})
_HELD: Final = frozenset({"Paused", "Pausing", "Saved", "Saving", "FastSaved", "FastSaving", "Resuming"})


class HypervPlatform:
    """The platform ``hyperv``; see ``replica.platforms.platform.Platform`` for the contract."""

    def __init__(
        self,
        host: Host,
        settings: HypervSettings,
        *,
        environment: Mapping[str, str] | None = None,
        progress: Progress = silent,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Make machines on the host of ``settings``. Nothing is asked yet.

        ``environment`` is where the key and the store's credentials come from: ours unless given.
        """
        self._folders = MachineFolders(host, "hyperv")
        self._settings = settings
        self._there = HypervHost(settings)
        self._environment = environment
        self._progress = progress
        self._sleep = sleep

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return "hyperv"

    def folder(self, name: str) -> MachineFolder:
        """Return the folder here in which is written down what the machine's disks are to be made of."""
        return self._folders.of(name)

    def check(self) -> None:
        """Return if machines could be made now. Raises PlatformError."""
        self._check(())

    def check_machine(self, spec: MachineSpec) -> None:
        """Return if the host has the switches of the machine's adapters. Nothing is made. Raises PlatformError."""
        if switches := self._switches(spec):
            self._there.check(switches)

    def _switches(self, spec: MachineSpec) -> list[str]:
        named = networks_of(spec, self._settings.networks)
        require_apart(named, self._settings.test_switch)
        return [one for one in named if one is not None]

    def _check(self, switches: Sequence[str]) -> None:
        self._there.check(switches)
        files = self._settings.files
        if not files.is_dir():
            raise PlatformError(
                "the folder for the machines' disks cannot be seen from here",
                path=str(files),
                hint=f"mount it: it is {self._settings.folder} of {self._there.shown}",
            )

    def define(self, spec: MachineSpec) -> None:
        """Write the disks' files and make the machine of them, off; see ``Platform.define``.

        One that is there as just this is left as it is; one that is there as another is not replaced: PlatformError.
        """
        asked = self._there.machine_parameters(spec.name)
        wanted = description.document(
            spec,
            asked["Folder"],
            switch=self._settings.switch,
            test_switch=self._settings.test_switch,
            networks=self._settings.networks,
            template=self._settings.template,
        )
        with self._folders.held(spec.name) as folder:
            self._check(self._switches(spec))
            found, _ = self._there.find(spec.name)
            if found is None or found.places is None:
                self._write_disks(spec, folder)
            isolated = self._settings.test_switch if spec.isolated else ""
            with self._there.session(spec.name) as session:
                ask(
                    session,
                    scripts.DEFINE,
                    **asked,
                    Machine=json.dumps(wanted),
                    TestSwitch=isolated,
                    SwitchNotes=description.SWITCH_NOTES,
                    timeout_seconds=ASK_SECONDS,
                )

    def _write_disks(self, spec: MachineSpec, folder: MachineFolder) -> None:
        """Write the files that are not there yet: one that has its name is whole, and of this machine."""
        place = self._place(spec.name)
        folder.make()
        missing = [one for one in spec.disks if not (place / description.file_name(one.number)).exists()]
        for disk in missing:
            with folder.errors(f"write disk {disk.number}"):
                place.mkdir(exist_ok=True)
                path = place / description.file_name(disk.number)
                diskfile.make(folder, disk, path, "vhdx", environment=self._environment, progress=self._progress)

    def _place(self, name: str) -> Path:
        """Return the folder of the machine's files, as it is seen from here."""
        return self._settings.files / description.checked_name(name)

    def start(self, name: str) -> None:
        """Turn the machine on; see ``Platform.start``."""
        found = self._whole(name)
        with self._there.session(name) as session:
            ask(session, scripts.START, VmId=found.id, timeout_seconds=ASK_SECONDS)

    def _whole(self, name: str) -> FoundMachine:
        found = self._there.existing(name)
        if found.places is None:
            raise PlatformError(
                f"the machine {name!r} was made halfway only",
                path=self._there.shown,
                hint="run the failover again: it makes it anew",
            )
        return found

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """Ask the guest to shut down through its integration service, and wait; ``force`` turns the machine off."""
        found = self._there.existing(name)
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = max(1.0, deadline - time.monotonic())
            with self._there.session(name) as session:
                answer = ask(
                    session,
                    STOP,
                    VmId=found.id,
                    How="force" if force else "ask",
                    timeout_seconds=ASK_SECONDS if force else min(SHUTDOWN_SECONDS, left),
                )
            if answer.text("state") in _OFF:
                return
            if time.monotonic() >= deadline:
                why = f": {answer.text('why')}" if answer.text("why") else ""
                raise PlatformError(
                    f"the guest of {name!r} did not shut down within {timeout_seconds:.0f} s{why}",
                    path=self._there.shown,
                    hint="shut it down from inside, or pull the plug with --force",
                )
            self._sleep(POLL_SECONDS)

    def power(self, name: str) -> Power:
        """Return whether it runs. A saved machine is paused; one whose files are there still is off, not gone."""
        found, files = self._there.find(name)
        if found is None:
            return Power.OFF if files else Power.GONE
        if found.state in _OFF:
            return Power.OFF
        return Power.PAUSED if found.state.removesuffix("Critical") in _HELD else Power.RUNNING

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """Return its disks as ``godwit protect --hyperv`` would have them: nothing is left to fetch."""
        found = self._whole(name)
        settings, places = self._settings, found.places or {}
        known = {one.position for one in found.drives}
        lost = [place for place in places.values() if place not in known]
        if lost:
            raise PlatformError(f"the machine {name!r} has no disk at {lost[0]} any more", path=self._there.shown)
        return tuple(
            DiskState(
                number,
                str(HypervAddress(found.id, place, settings.host, found.name, maps=settings.maps)),
                hydrated=True,
            )
            for number, place in sorted(places.items())
        )

    def hydrate(self, name: str) -> None:
        """Do nothing: the disks are whole before there is a machine."""

    def channel(self, name: str) -> DirectChannel:
        """Return the way into the guest: PowerShell Direct, and the host's own copying of files."""
        found = self._there.existing(name)
        return DirectChannel(self._there, name, found.id)

    def screenshot(self, name: str) -> bytes | None:
        """Return a picture of the console as PNG, None of a machine that is off."""
        found = self._there.existing(name)
        if found.state in _OFF:
            return None
        with self._there.session(name) as session:
            answer = ask(session, scripts.PICTURE, VmId=found.id, Width=screen.WIDTH, Height=screen.HEIGHT)
            return screen.png_of(answer.text("picture"))

    def identity(self, name: str) -> Identity:
        """Return by what the machine is known. Raises PlatformError."""
        found = self._there.existing(name)
        with self._there.session(name) as session:
            answer = ask(session, scripts.IDENTIFY, VmId=found.id)
            macs = tuple(_mac(one) for one in answer.texts("macs") if one.strip("0"))
            return Identity("hyperv", found.id, answer.text("bios").strip("{}").lower(), macs)

    def delete(self, name: str) -> None:
        """Turn it off, and remove it with its files, and with the switch that was made for tests; see the contract."""
        with self._folders.held(name) as folder:
            with self._there.session(name) as session:
                ask(
                    session,
                    scripts.REMOVE,
                    **self._there.machine_parameters(name),
                    TestSwitch=self._settings.test_switch,
                    SwitchNotes=description.SWITCH_NOTES,
                    timeout_seconds=REMOVE_SECONDS,
                )
            if self.power(name) is not Power.GONE:
                raise PlatformError(
                    f"the machine {name!r} or its files are still there", path=self._there.shown, hint="try it again"
                )
            folder.remove()


def _mac(text: str) -> str:
    plain = text.lower().replace("-", "").replace(":", "")[:12]
    return ":".join(plain[at : at + 2] for at in range(0, len(plain), 2))
