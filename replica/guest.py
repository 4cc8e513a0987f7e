"""The guest of a recovery machine, reached without a network: which machine it is, programs run and files copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replica import catalog
from replica.catalog import ProtectedVm
from replica.errors import PlatformError, UsageError
from replica.host import Host
from replica.model import RecoveryMachine, State
from replica.platforms.platform import GuestChannel, Platform
from replica.stores.store import Store

GUEST: Final = "guest:"  # before a path, says that it is one of the guest's
LARGEST_FILE_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Execution:
    """What became of a program that was run in a guest."""

    machine: str
    status: int
    output: bytes
    error_output: bytes


@dataclass(frozen=True, slots=True)
class Guest:
    """The guest of a machine."""

    machine: str
    channel: GuestChannel

    @classmethod
    def find(
        cls,
        store: Store,
        host: Host,
        found: ProtectedVm,
        open_platform: Callable[[str], Platform],
        *,
        machine: str | None = None,
    ) -> Guest:
        """Find the VM's recovery machine, the one named ``machine`` where there are several.

        Raises UsageError where there is no such one, PlatformError where it is another host's or has no such way in.
        """
        chosen = choose_machine(found.vm.name, catalog.settings_in_force(store, found).state, machine)
        if chosen.platform in ("qemu", "libvirt") and chosen.host_id != host.host_id:
            raise PlatformError(
                f"the machine {chosen.name} is on the host {chosen.host_name}, and only reached there",
                hint=f"run the command on {chosen.host_name}",
            )
        channel = open_platform(chosen.platform).channel(chosen.name)
        if channel is None:
            raise PlatformError(f"platform {chosen.platform!r} has no way into a guest without a network")
        return cls(chosen.name, channel)

    def execute(self, command: Sequence[str], *, timeout_seconds: float) -> Execution:
        """Run a program in the guest. Raises PlatformError."""
        return Execution(self.machine, *self.channel.execute(command, timeout_seconds=timeout_seconds))

    def copy(self, source: str, target: str, *, timeout_seconds: float) -> int:
        """Copy a file into the guest or out of it, as ``guest:`` before one of the paths says; return its length.

        Raises UsageError, PlatformError.
        """
        if source.startswith(GUEST) == target.startswith(GUEST):
            raise UsageError(
                "one of the two is to be a file of the guest", hint="write guest:/path for the one that is"
            )
        if target.startswith(GUEST):
            content = _read(Path(source))
            path = target.removeprefix(GUEST)
            # As cp does it: a folder is copied into. The guest's folders are told by the way they are written.
            path = path + Path(source).name if path.endswith(("/", "\\")) else path
            self.channel.write_file(path, content, timeout_seconds=timeout_seconds)
        else:
            path = source.removeprefix(GUEST)
            content = self.channel.read_file(path, timeout_seconds=timeout_seconds, largest_bytes=LARGEST_FILE_BYTES)
            place = Path(target)
            place = place / path.replace("\\", "/").rpartition("/")[2] if place.is_dir() else place
            _write(place, content)
        return len(content)


def choose_machine(vm: str, state: State, name: str | None) -> RecoveryMachine:
    """Return the recovery machine of that name, or the one that there is. Raises UsageError."""
    machines: tuple[RecoveryMachine, ...] = (*(() if state.machine is None else (state.machine,)), *state.beside)
    if not machines:
        raise UsageError(f"{vm} has no recovery machine", hint="start one with 'godwit failover'")
    known = ", ".join(one.name for one in machines)
    if name is not None:
        for one in machines:
            if one.name == name:
                return one
        raise UsageError(f"{vm} has no recovery machine {name!r}", hint=f"there are {known}")
    if state.machine is None and len(machines) > 1:
        raise UsageError(f"{vm} has several recovery machines", hint=f"choose one with --machine: {known}")
    return machines[0]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    if len(content) > LARGEST_FILE_BYTES:
        raise UsageError(f"the file holds more than {LARGEST_FILE_BYTES} bytes", path=str(path))
    return content


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write the file: {error.strerror}", path=str(path)) from error
