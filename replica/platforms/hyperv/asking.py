"""Questions to the Hyper-V host about recovery machines: what it answers is checked, what it refuses told as theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from replica.errors import PlatformError
from replica.hyperv import connect as connecting
from replica.hyperv.machine import Drive, drives_of
from replica.hyperv.session import Answer, HypervError, Session, SessionError, ask
from replica.platforms.hyperv import description, scripts
from replica.platforms.hyperv.settings import HypervSettings

ASK_SECONDS: Final = 300.0
FILES_INSTEAD: Final = (
    "where the host cannot be reached, 'godwit failover NAME --platform files' makes the disks, and a script that "
    "starts the machine there"
)
_GUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Parameter: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class FoundMachine:
    """A recovery machine as its host has it. ``places`` are those of its disks, by number; None: it is not whole."""

    id: str  # a GUID in lower case
    name: str
    state: str
    places: dict[int, str] | None
    drives: tuple[Drive, ...]


@dataclass(frozen=True, slots=True)
class HypervHost:
    """The host of a platform's settings, asked anew for each command. Everything raises PlatformError."""

    settings: HypervSettings

    @property
    def shown(self) -> str:
        """What people call it."""
        return self.settings.host or "this machine"

    @contextmanager
    def session(self, machine: str) -> Iterator[Session]:
        """Give a session, in which everything that goes wrong is told as trouble of ``machine``."""
        try:
            with closing(connecting.connect(self.settings.host)) as session:
                yield session
        except SessionError as error:
            own = error.hint if self.settings.host else "name it as host in [platforms.hyperv] of godwit.toml"
            hint = f"{own}; {FILES_INSTEAD}" if own else FILES_INSTEAD
            raise PlatformError(f"{machine}: {error.message}", path=self.settings.host, hint=hint) from error
        except HypervError as error:
            raise PlatformError(f"{machine}: {error.message}", path=self.shown, hint=_hint(error)) from error

    def machine_parameters(self, name: str) -> dict[str, str]:
        """Return what scripts find a machine by."""
        checked = description.checked_name(name)
        return {
            "Marker": description.marker(checked),
            "Name": checked,
            "Folder": f"{self.settings.folder.rstrip(chr(92))}\\{checked}",
        }

    def check(self, switches: Sequence[str] = ()) -> None:
        """Return if machines could be made there now, on these switches as well as on those of the settings."""
        settings = self.settings
        with self.session("recovery machines") as session:
            ask(
                session,
                scripts.CHECK,
                Folder=settings.folder,
                Switch=settings.switch,
                TestSwitch=settings.test_switch,
                Others=json.dumps({"switches": sorted(set(switches))}),
                timeout_seconds=ASK_SECONDS,
            )

    def find(self, name: str) -> tuple[FoundMachine | None, bool]:
        """Return the machine, if there is one, and whether there are files of it."""
        with self.session(name) as session:
            answer = ask(session, scripts.FIND, timeout_seconds=ASK_SECONDS, **self.machine_parameters(name))
            found = [_machine(one, name) for one in answer.objects("machines")]
            files = answer.flag("files")
        if len(found) > 1:
            raise PlatformError(
                f"{len(found)} machines have the notes of {name}: {', '.join(one.name for one in found[:5])}",
                path=self.shown,
                hint="was it copied? take the notes from the copy, in which Hyper-V keeps whose it is",
            )
        return (found[0] if found else None), files

    def existing(self, name: str) -> FoundMachine:
        """Return the machine; PlatformError where there is none."""
        found, _ = self.find(name)
        if found is None:
            raise PlatformError(
                f"there is no machine {name!r} on the host",
                path=self.shown,
                hint="it is known by its notes there: were they changed?",
            )
        return found


def _machine(one: Answer, name: str) -> FoundMachine:
    found = one.text("id").lower()
    if not _GUID.fullmatch(found):
        raise HypervError("the host tells no identifier of the machine", kind="Answer")
    places = description.noted(one.text("notes"), name)
    return FoundMachine(found, one.text("name"), one.text("state"), places, drives_of(one))


def _hint(error: HypervError) -> str | None:
    if error.kind == "Taken":
        return "remove it on the host if nobody needs it, or delete the machine and start another"
    if error.kind == "NotFound" and "Hyper-V" in error.message:
        return "see folder, share, switch and test_switch in [platforms.hyperv] of godwit.toml"
    return error.hint
