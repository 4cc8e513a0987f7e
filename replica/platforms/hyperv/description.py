"""A machine as the PowerShell that makes it is told: a JSON document, and the notes by which it is found again.

The notes are one line: ``Godwit recovery machine NAME; disks 0=scsi-0-0 1=scsi-0-1; made DIGEST; of VM``. They are
written last, so a machine that has them is whole; the digest tells whether it is the machine that is asked for.
"""

from __future__ import annotations

import hashlib
import json
import ntpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from replica.errors import PlatformError
from replica.platforms.networks import networks_of
from replica.platforms.platform import MachineSpec

SWITCH_NOTES: Final = "Made by Godwit for test failovers"
LOCATIONS: Final = 64  # on a SCSI controller
CONTROLLERS: Final = 4
# New-VM puts a DVD drive at 1:0; the BIOS starts from 0:0.
IDE_PLACES: Final = ((0, 0), (0, 1), (1, 1))
MOST_ADAPTERS: Final = 8
LONGEST_NAME: Final = 80

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]{0,79}")
_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_NOTES: Final = re.compile(r"Godwit recovery machine ([^;]{1,80}); disks([^;]{0,10000}); made ([0-9a-f]{16}); of ")
_PLACE: Final = re.compile(r"([0-9]{1,5})=((?:ide|scsi)-[0-9]{1,3}-[0-9]{1,3})")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a disk is attached."""

    controller: str  # IDE or SCSI
    number: int
    location: int

    def __str__(self) -> str:
        return f"{self.controller.lower()}-{self.number}-{self.location}"


def places(count: int, generation: int) -> tuple[Place, ...]:
    """Return where so many disks are attached, the one to start from first. Raises PlatformError for too many."""
    ide = [Place("IDE", *one) for one in IDE_PLACES] if generation == 1 else []
    scsi = [Place("SCSI", number, at) for number in range(CONTROLLERS) for at in range(LOCATIONS)]
    found = (*ide, *scsi)
    if count > len(found):
        raise PlatformError(f"a machine of Generation {generation} on Hyper-V has {len(found)} disks at most")
    return found[:count]


def checked_name(name: str) -> str:
    """Return a machine's name, which becomes a folder's on the host too. Raises PlatformError."""
    if not _NAME.fullmatch(name) or name.endswith((".", " ")) or _DEVICES.fullmatch(name):
        raise PlatformError(
            f"{name!r:.200} cannot be a machine's name on Hyper-V",
            hint=f"letters, digits, '-', '_', '.' and spaces, at most {LONGEST_NAME}",
        )
    return name


def marker(name: str) -> str:
    """Return how the notes of the machine of that name begin."""
    return f"Godwit recovery machine {name};"


def noted(notes: str, name: str) -> dict[int, str] | None:
    """Return by number where the notes of a machine say that its disks are; None of one that is not whole."""
    found = _NOTES.match(notes)
    if found is None or found[1] != name:
        return None
    return {int(number): place for number, place in _PLACE.findall(found[2])}


def document(
    spec: MachineSpec,
    folder: str,
    *,
    name: str | None = None,
    switch: str = "",
    test_switch: str = "",
    networks: Mapping[str, str] | None = None,
    template: str = "",
    suffix: str = ".vhdx",
) -> dict[str, Any]:
    """Return the machine as ``New-GodwitMachine`` is told of it, its disks in ``folder`` of the host.

    ``name`` is what the host calls it, the machine's own unless given. A machine that is isolated is on
    ``test_switch``, or on none, with addresses of its own; any other has the addresses that it had, and its adapters
    are on the switches that the machine, or else ``networks``, tells for theirs, and those of which nothing is told on
    ``switch``. ``template`` is Secure Boot's where the system is not known. Raises PlatformError.
    """
    machine = spec.machine
    switches = networks_of(spec, networks or {})
    disks = [
        {
            "controller": at.controller,
            "number": at.number,
            "location": at.location,
            "path": ntpath.join(folder, file_name(disk.number, suffix)),
        }
        for disk, at in zip(spec.disks, places(len(spec.disks), machine.generation), strict=True)
    ]
    made: dict[str, Any] = {
        "name": name or checked_name(spec.name),
        "folder": folder,
        "generation": machine.generation,
        "cpus": machine.cpus,
        "memory": -(-machine.memory_bytes // (2 << 20)) * (2 << 20),  # Hyper-V takes whole pairs of MiB
        "secureBoot": machine.secure_boot and machine.generation == 2,
        "template": _template(spec, template),
        "isolated": spec.isolated,
        "switch": test_switch if spec.isolated else switch,
        "adapters": [
            {
                "name": f"Network Adapter {number}",
                "mac": "" if spec.isolated or not nic.mac else nic.mac.replace(":", "").upper(),
                **({} if switches[number - 1] is None else {"switch": switches[number - 1]}),
            }
            for number, nic in enumerate(machine.nics[:MOST_ADAPTERS], 1)
        ],
        "disks": disks,
    }
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
    listed = "".join(
        f" {disk.number}={at}" for disk, at in zip(spec.disks, places(len(spec.disks), machine.generation), strict=True)
    )
    shown = " ".join("".join(c if c.isprintable() else " " for c in spec.vm_name).split())[:100]
    made["notes"] = f"{marker(spec.name)} disks{listed}; made {digest}; of {shown}"
    return made


def file_name(number: int, suffix: str = ".vhdx") -> str:
    """Return the name of the file of a machine's disk."""
    return f"disk-{number}{suffix}"


def _template(spec: MachineSpec, given: str) -> str:
    """Return whose signatures Secure Boot trusts: Linux is started by what Microsoft signs for others."""
    if spec.system is not None:
        return "MicrosoftUEFICertificateAuthority" if spec.system == "linux" else "MicrosoftWindows"
    return given or "MicrosoftWindows"
