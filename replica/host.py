"""What this machine brings to the engine: clock, randomness, an identity, and state that may be deleted."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from replica.errors import LeaseHeldError
from vhdx.errors import DiskBusyError, DiskError
from vhdx.osfile import File, open_file

_HOST_ID = re.compile(rb"[0-9a-f]{32}\s*")


class Clock(Protocol):
    """Time, injected so that tests can move it."""

    def now(self) -> datetime:
        """Return the present moment, in UTC."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""


class SystemClock:
    """The machine's own time."""

    def now(self) -> datetime:
        """Return the present moment, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return seconds that never jump."""
        return time.monotonic()


class Randomness(Protocol):
    """Unpredictable numbers, injected so that tests can repeat them."""

    def new_id(self) -> str:
        """Return a random UUID, 32 hex digits."""

    def seed(self) -> int:
        """Return 64 random bits."""


class SystemRandomness:
    """The machine's own randomness."""

    def new_id(self) -> str:
        """Return a random UUID (version 4), 32 hex digits."""
        raw = bytearray(secrets.token_bytes(16))
        raw[6] = raw[6] & 0x0F | 0x40
        raw[8] = raw[8] & 0x3F | 0x80
        return raw.hex()

    def seed(self) -> int:
        """Return 64 random bits."""
        return secrets.randbits(64)


def default_state_folder() -> Path:
    """Return where state is kept unless said otherwise: GODWIT_STATE, or the place that the system has for it."""
    named = os.environ.get("GODWIT_STATE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "godwit"


@dataclass(frozen=True, slots=True)
class Host:
    """This machine. Without a ``state_folder`` nothing is kept: no cache, no quick take-over after a crash.

    ``inspects``: its cycles keep fresh whether each VM can be started as Generation 1 (docs/conversion.md).
    """

    clock: Clock
    randomness: Randomness
    host_id: str
    host_name: str
    state_folder: Path | None
    inspects: bool = True

    @contextlib.contextmanager
    def exclusive(self, vm_id: str) -> Iterator[bool]:
        """Hold this machine's only right to work on a VM while the context lasts.

        Gives True where the right is certain: whoever held it on this machine is gone; False where nothing could
        be locked.
        Raises LeaseHeldError where another process of this machine has it.
        """
        file = self._lock_file(vm_id)
        try:
            yield file is not None
        finally:
            if file is not None:
                file.close()

    def _lock_file(self, vm_id: str) -> File | None:
        if self.state_folder is None:
            return None
        folder = self.state_folder / "locks"
        path = folder / f"{vm_id}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
            return open_file(path, writable=True)
        except DiskBusyError as error:
            raise LeaseHeldError(
                "another godwit process on this machine is working on the VM", hint="wait until it is done"
            ) from error
        except (DiskError, OSError):
            return None  # the state folder is a convenience: without it the lease alone protects


def this_host(state_folder: Path | None = None, *, inspects: bool = True) -> Host:
    """Return this machine, with its identity from the state folder (made if there is none)."""
    folder = state_folder or default_state_folder()
    randomness = SystemRandomness()
    host_id = randomness.new_id()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "host-id"
        if not path.exists() or not _HOST_ID.fullmatch(path.read_bytes()):
            temporary = folder / f".host-id.{host_id}"
            temporary.write_bytes(host_id.encode())
            temporary.replace(path)
        host_id = path.read_bytes().strip().decode("ascii", "replace")
    except OSError:
        return Host(SystemClock(), randomness, host_id, _host_name(), None, inspects)
    return Host(SystemClock(), randomness, host_id, _host_name(), folder, inspects)


def _host_name() -> str:
    if sys.platform == "win32":
        import socket  # noqa: PLC0415 - takes longer to import than to ask the system itself, where that can be asked

        name = socket.gethostname()
    else:
        name = os.uname().nodename
    return name
