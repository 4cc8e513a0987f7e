"""The libvirt checkpoints of a VM, each with persistent dirty bitmaps that record since a point: names and removal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from replica.libvirt.domain import MOST_DISKS, parse_xml
from replica.libvirt.virsh import Virsh, VirshRefusedError
from replica.source import Wanted

PREFIX: Final = "godwit-"
_MISSING: Final = re.compile(r"bitmap '[^']*' not found in backing chain of '([^']+)'")


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """What a VM's checkpoints are called: prefix, the number of the point that each begins at, a random end.

    ``departure`` is the one that was there before the guest of a recovery machine, empty where none was.
    """

    prefix: str
    new: str
    departure: str = ""

    @classmethod
    def of(cls, wanted: Wanted) -> Self:
        """Return the names for the point that is wanted."""
        prefix = f"{PREFIX}{wanted.vm_id}-"
        departure = "" if wanted.departure is None else wanted.departure.bitmap or ""
        return cls(prefix, f"{prefix}{wanted.point:020}-{wanted.randomness.new_id()[:8]}", departure)


def existing(virsh: Virsh, uuid: str, ours: CheckpointNames) -> list[str]:
    """Return the names of those of a domain's checkpoints that are the VM's. Raises VirshError."""
    names = map(str.strip, virsh.ask("checkpoint-list", "--domain", uuid, "--name").split("\n"))
    return [name for name in names if name and (name.startswith(ours.prefix) or name == ours.departure)]


def delete(virsh: Virsh, uuid: str, names: Iterable[str]) -> None:
    """Delete checkpoints and their bitmaps. What libvirt refuses to delete stays. Raises VirshError."""
    for name in names:
        with suppress(VirshRefusedError):
            _delete(virsh, uuid, name)


def _delete(virsh: Virsh, uuid: str, name: str) -> None:
    """Delete a checkpoint, also where not all of its bitmaps are in the images any more.

    libvirt refuses that, naming one disk. So it is told that the checkpoint never had this one, and asked again.
    """
    for _ in range(MOST_DISKS):
        try:
            virsh.ask("checkpoint-delete", "--domain", uuid, name)
            return
        except VirshRefusedError as error:
            missing = _MISSING.search(error.message)
            if missing is None:
                raise
            xml = virsh.ask("checkpoint-dumpxml", "--domain", uuid, name, "--no-domain")
            root = parse_xml(xml, "domaincheckpoint", name)
            left = 0
            for disk in root.iterfind("disks/disk"):
                if disk.get("name") == missing[1]:
                    disk.attrib = {"name": missing[1], "checkpoint": "no"}
                left += disk.get("checkpoint") == "bitmap"
            if not left:
                virsh.ask("checkpoint-delete", "--domain", uuid, name, "--metadata")
                return
            text = ElementTree.tostring(root, encoding="unicode")
            virsh.ask("checkpoint-create", "--domain", uuid, "--redefine", files={"--xmlfile": text})


def xml_of(name: str, disks: Iterable[tuple[str, bool]]) -> str:
    """Return the XML of a new checkpoint; ``disks`` are targets, and whether a bitmap is to record their writes."""
    lines = "".join(
        f"<disk name={quoteattr(target)} checkpoint='{'bitmap' if recorded else 'no'}'/>" for target, recorded in disks
    )
    return f"<domaincheckpoint><name>{name}</name><disks>{lines}</disks></domaincheckpoint>"
