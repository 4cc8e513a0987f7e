"""What every platform does with a recovery machine: define, start, stop, look, delete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from replica.model import Machine
from vhdx.progress import Progress

PlatformName: TypeAlias = Literal["qemu", "libvirt", "files", "hyperv", "azure"]


class Power(StrEnum):
    """Whether a machine runs."""

    RUNNING = "running"
    OFF = "off"
    PAUSED = "paused"
    GONE = "gone"  # not defined any more, or never


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk that a machine is to have: ``url`` an NBD address to start from at once, or ``path`` a file of ``format``.

    ``bitmap`` is the name of a dirty bitmap that records from before the guest's first instruction, where the platform
    can keep one.
    """

    number: int
    size: int  # bytes
    bus: str
    url: str | None = None
    path: Path | None = None
    format: str = "raw"
    bitmap: str | None = None
    sector_size: int = 512  # bytes


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine to be defined. ``name`` is unique on the platform; ``isolated``: no network beyond itself.

    ``networks``: what the network of each adapter is called on the platform; None, or none, where its settings say.
    """

    name: str
    vm_name: str
    machine: Machine  # its generation is the one to start as
    disks: tuple[DiskSpec, ...]
    isolated: bool = False
    system: Literal["linux", "windows"] | None = None  # where that is known: it has other drivers
    networks: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskState:
    """A disk of a machine as it is now. ``hydrated``: nothing is left to fetch from where it was started from."""

    number: int
    address: str  # as ``godwit protect --disk`` takes it
    hydrated: bool
    remaining_bytes: int = 0


class GuestChannel(Protocol):
    """A way into the guest that needs no network."""

    def ping(self, *, timeout_seconds: float) -> bool:
        """Whether the guest answers within that time."""

    def execute(self, command: Sequence[str], *, timeout_seconds: float) -> tuple[int, bytes, bytes]:
        """Run a program in the guest; return its status, output and error output. Raises PlatformError."""

    def write_file(self, path: str, content: bytes, *, timeout_seconds: float) -> None:
        """Write a file in the guest. Raises PlatformError."""

    def read_file(self, path: str, *, timeout_seconds: float, largest_bytes: int = 64 << 20) -> bytes:
        """Read a file of the guest. Raises PlatformError."""


@runtime_checkable
class Checked(Protocol):
    """A platform that can be asked beforehand whether a machine could be made there now."""

    def check(self) -> None:
        """Return if one could. Raises PlatformError."""


@runtime_checkable
class Particular(Protocol):
    """A platform that does not take every machine, and tells before anything is written, or shut down for it."""

    def check_machine(self, spec: MachineSpec) -> None:
        """Return if the machine, whose name and disks' addresses are not known yet, can be. Raises PlatformError."""


@runtime_checkable
class Reporting(Protocol):
    """A platform that makes whole disks, and can tell how far it is."""

    def report_to(self, progress: Progress) -> None:
        """Tell it from now on."""


@runtime_checkable
class Guiding(Protocol):
    """A platform that starts nothing, and leaves the guide for it to people in a file."""

    def guide_path(self, name: str) -> Path:
        """Return where it is said how a machine is made of what was prepared for that name."""


class Platform(Protocol):
    """A place for recovery machines. Every call is safe to repeat, and names machines by ``MachineSpec.name``.

    Everything raises PlatformError, whose message names the machine, the program or host, and the way out.
    """

    @property
    def name(self) -> PlatformName:
        """The platform's name, as the command line has it."""

    def define(self, spec: MachineSpec) -> None:
        """Make the machine, off. What an earlier attempt left of one of that name is used or replaced."""

    def start(self, name: str) -> None:
        """Turn the machine on; nothing where it runs already."""

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """Ask the guest to shut down, and wait; ``force`` pulls the plug. Raises PlatformError where it stays on."""

    def power(self, name: str) -> Power:
        """Return whether it runs."""

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """Return its disks as they are now."""

    def hydrate(self, name: str) -> None:
        """Begin to copy what is missing into the machine's own disks; nothing where that is under way or done."""

    def channel(self, name: str) -> GuestChannel | None:
        """Return the way into the guest, None where the platform has none."""

    def screenshot(self, name: str) -> bytes | None:
        """Return a picture of the console as PNG, None where the platform has none."""

    def delete(self, name: str) -> None:
        """Stop it and remove all that it wrote. Returns once it is gone; nothing where it is gone already."""
