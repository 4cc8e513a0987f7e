"""A Hyper-V VM as its host describes it: the machine, and its disks in boot order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from replica.errors import SourceError, UsageError
from replica.hyperv import scripts
from replica.hyperv.session import Answer, HypervError, Session, ask
from replica.model import Nic
from replica.protection import MachineWishes

MOST_DRIVES: Final = 1000
OLDEST_VERSION: Final = (6, 2)  # of a VM's configuration, from which on Hyper-V tracks changes
_GUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC: Final = re.compile(r"[0-9a-f]{12}")
_FORMATS: Final = (".vhdx", ".avhdx")


@dataclass(frozen=True, slots=True)
class Drive:
    """A hard disk as it is attached. ``path`` is its file, as the host writes it; empty for one that has none."""

    position: str  # controller, its number, location: scsi-0-1
    id: str  # the host's name for the place
    path: str
    left_out: str = ""  # why it cannot be protected

    @property
    def bus(self) -> str:
        """What it is attached to: ``ide`` or ``scsi``."""
        return self.position.partition("-")[0]

    @property
    def key(self) -> str:
        r"""What identifiers of this place have in common, whichever object of Hyper-V's they belong to.

        They read ``Microsoft:OWNER\CONTROLLER\0\LOCATION\KIND``: the owner is the VM or a checkpoint of it.
        """
        return place_of(self.id)


@dataclass(frozen=True, slots=True)
class HypervVm:
    """A VM. ``drives`` are all its hard disks, the boot disk first."""

    id: str  # a GUID in lower case
    name: str
    version: str
    machine: MachineWishes
    drives: tuple[Drive, ...]


def place_of(identifier: str) -> str:
    """Return controller and location of a disk's identifier, which are the same in a VM and in its checkpoints."""
    parts = identifier.lower().split("\\")
    return "\\".join(parts[1:4]) if len(parts) >= 4 else ""


def describe(session: Session, name: str) -> HypervVm:
    """Return the VM of that name or identifier. Raises HypervError, SourceError, UsageError."""
    found = ask(session, scripts.DESCRIBE, Name=name).objects("machines")
    if not found:
        raise SourceError("the host has no VM of that name", path=name, hint="Get-VM lists them there")
    if len(found) > 1:
        known = ", ".join(one.text("id") for one in found[:10])
        raise UsageError(f"the host has several VMs called {name!r:.200}", hint=f"name one by its identifier: {known}")
    one = found[0]
    vm = one.text("id").lower()
    if not _GUID.fullmatch(vm):
        raise SourceError("the host tells no identifier of the VM", path=name)
    return HypervVm(vm, one.text("name") or name, one.text("version"), _machine(one), _boot_order(one))


def is_tracked(version: str) -> bool:
    """Tell whether Hyper-V tracks changes of VMs of this configuration version."""
    parts = version.split(".")
    if not (2 <= len(parts) <= 4 and all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts)):
        return False
    return (int(parts[0]), int(parts[1])) >= OLDEST_VERSION


def drives_of(answer: Answer) -> tuple[Drive, ...]:
    """Return the hard disks that an answer lists, in its order. Raises HypervError."""
    listed = answer.objects("drives")
    if len(listed) > MOST_DRIVES:
        raise HypervError(f"the host tells of more than {MOST_DRIVES} disks", kind="Answer")
    drives = tuple(_drive(one) for one in listed)
    if len({one.position for one in drives}) != len(drives):
        raise HypervError("the host tells of two disks at one place", kind="Answer")
    return drives


def drive_at(drives: Sequence[Drive], position: str, vm: str) -> Drive:
    """Return the disk at that place, if it can be protected. Raises SourceError."""
    for one in drives:
        if one.position == position:
            if one.left_out:
                raise SourceError(f"{position} cannot be protected: it {one.left_out}", path=vm, hint="leave it out")
            return one
    known = ", ".join(one.position for one in drives) or "none"
    raise SourceError(
        f"the VM has no disk at {position}, but {known}",
        path=vm,
        hint="'godwit protect --update --hyperv' names the disks that it has now",
    )


def _drive(one: Answer) -> Drive:
    controller, number, location = one.text("controller").lower(), one.integer("number"), one.integer("location")
    if controller not in ("ide", "scsi") or not (0 <= number < 256 and 0 <= location < 256):
        raise HypervError(f"the host tells of a disk at {controller!r:.40} {number} {location}", kind="Answer")
    path = one.text("path")
    return Drive(f"{controller}-{number}-{location}", one.text("id"), path, _left_out(one, path))


def _left_out(one: Answer, path: str) -> str:
    if one.flag("physical"):
        return "is a physical disk, of which Hyper-V makes no checkpoint"
    if one.flag("shared"):
        return "is shared with other VMs"
    if not path:
        return "has no file"
    if "\0" in path or not path.lower().endswith(_FORMATS):
        return "is no VHDX, and Hyper-V tracks changes of no other"
    return ""


# -- the machine ------------------------------------------------------------------------------------------------------


def _machine(one: Answer) -> MachineWishes:
    generation: Literal[1, 2] = 2 if one.integer("generation") == 2 else 1
    startup, assigned = one.integer("startup"), one.integer("assigned")
    # Recovery machines have a fixed memory: with dynamic memory, what was started with may be far too little.
    memory = max(startup, assigned) if one.flag("dynamic") else startup
    cpus = one.integer("cpus")
    if not (1 <= cpus <= 4096 and 1 << 20 <= memory <= 1 << 50):
        raise HypervError(f"the host tells of {cpus} processors and {memory} bytes of memory", kind="Answer")
    nics = tuple(Nic(_mac(each.text("mac")), each.text("network") or None) for each in one.objects("adapters"))
    return MachineWishes(generation, cpus, memory, nics, generation == 2 and one.flag("secure"))


def _mac(text: str) -> str | None:
    """Return an address in its usual form. A dynamic one that was not drawn yet is all zeros: None."""
    plain = text.lower().replace("-", "").replace(":", "")
    if not _MAC.fullmatch(plain) or plain == "0" * 12:
        return None
    return ":".join(plain[at : at + 2] for at in range(0, 12, 2))


def _boot_order(one: Answer) -> tuple[Drive, ...]:
    """Return the disks as the firmware tries them, the others behind, by controller and location."""
    boot = [place_of(text) for text in one.texts("boot")]

    def rank(drive: Drive) -> tuple[int, str, int, int]:
        bus, number, location = drive.position.split("-")
        return (boot.index(drive.key) if drive.key in boot else len(boot), bus, int(number), int(location))

    return tuple(sorted(drives_of(one), key=rank))
