"""What names a partition by the partition table, and would not find it under another one; and how to name it anew."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import ConversionError
from conversion.filesystems.filesystem import FileSystem
from conversion.finding import Finding, Severity
from conversion.linux.commandline import parse_fstab, resolve
from conversion.linux.files import bytes_of, places_of
from conversion.linux.system import BootEntry, Edit, FstabEntry, Volume
from conversion.volumes import MappedDevice

_BY_TABLE: Final = frozenset({"partuuid", "partlabel"})
_TRAITS: Final = {
    "partuuid": "the UUID of a partition, which changes with the partition table (PARTUUID)",
    "partlabel": "the name of a partition, which an MBR has no room for (PARTLABEL)",
}


def fstab_edits(
    root: Volume, root_file_system: FileSystem, path_on_volume: str, volumes: Sequence[Volume]
) -> tuple[list[Edit], list[Finding]]:
    """Return the edits that make /etc/fstab independent of the partition table, and what to say of it.

    ``path_on_volume`` is that of the root on its volume. Never raises for what the file holds.
    """
    content = bytes_of(root_file_system, "/etc/fstab") or b""
    edits, findings = list[Edit](), list[Finding]()
    lines = content.split(b"\n")
    for entry in parse_fstab(content):
        if entry.source.by not in _BY_TABLE:
            continue
        edit = _edit(root, root_file_system, path_on_volume, lines, entry, volumes)
        if isinstance(edit, Edit):
            edits.append(edit)
        findings.append(_finding(entry, edit))
    return edits, findings


def _edit(
    root: Volume,
    file_system: FileSystem,
    prefix: str,
    lines: Sequence[bytes],
    entry: FstabEntry,
    volumes: Sequence[Volume],
) -> Edit | str:
    """Return the edit, or why there is none."""
    line = lines[entry.line - 1]
    old = entry.source.text.encode("utf-8", "surrogateescape")
    within = line.find(old)
    volume = resolve(entry.source, volumes)
    if volume is None or within < 0:
        return "no partition of this disk has it"
    room = len(line) - within - len(line[within + len(old) :].lstrip()) - 1  # one blank must stay behind it
    new = next((name for name in _other_names(volume, volumes) if len(name) <= room), None)
    if new is None:
        return "no other name of its file system fits in the place of the old one"
    width = max(len(old), len(new))
    offset = sum(len(before) + 1 for before in lines[: entry.line - 1]) + within
    places = disk_places(root, file_system, "/etc/fstab", offset, width)
    if places is None:
        return "the bytes of /etc/fstab cannot be overwritten in place on this file system"
    return Edit(
        volume=root,
        path=f"{prefix}/etc/fstab",
        line=entry.line,
        offset=offset,
        old=line[within : within + width],
        new=new.ljust(width),
        places=places,
        why=f"{entry.target} is mounted by {_TRAITS[entry.source.by]}",
    )


def _other_names(volume: Volume, volumes: Sequence[Volume]) -> list[bytes]:
    """Return names that do not depend on the partition table, the best first."""
    label = volume.file_system.label if volume.file_system is not None else volume.probed.label
    same = [
        other for other in volumes if (other.file_system.label if other.file_system else other.probed.label) == label
    ]
    names = [f"UUID={volume.uuid}"] if volume.uuid else []
    if label and len(same) == 1 and re.fullmatch(r"[A-Za-z0-9_.+-]+", label):
        names.append(f"LABEL={label}")
    return [name.encode() for name in names]


def disk_places(
    volume: Volume, file_system: FileSystem, path: str, offset: int, length: int
) -> tuple[tuple[BlockDevice, int, int], ...] | None:
    """Return where bytes of a file lie on partitions; None where they cannot be overwritten there."""
    try:
        extents = file_system.extents(path)
    except ConversionError:
        return None
    if extents is None or (volume.partition is not None and not _is_only_copy(volume)):
        return None
    found: list[tuple[BlockDevice, int, int]] = []
    for at, count in places_of(extents, offset, length):
        if isinstance(volume.device, MappedDevice):
            found += volume.device.places(at, count)
        else:
            found.append((volume.device, at, count))
    return tuple(found)


def _is_only_copy(volume: Volume) -> bool:
    """Return whether the volume is the partition itself; a mirror's other half would not be written."""
    return volume.partition is not None and volume.device is volume.partition.device


def _finding(entry: FstabEntry, edit: Edit | str) -> Finding:
    subject = f"/etc/fstab, line {entry.line}"
    message = f"{entry.target} is mounted by {_TRAITS[entry.source.by]}."
    if isinstance(edit, Edit):
        new = edit.new.decode("utf-8", "replace").strip()
        remedy = f"Nothing: the conversion writes {new} in its place, and the way back undoes it."
        return Finding(f"fstab-{entry.source.by}", Severity.NOTE, subject, message, _clean(entry.source.text), remedy)
    dispensable = bool({"nofail", "noauto"} & set(entry.options)) or entry.kind == "swap"
    severity = Severity.WARNING if dispensable else Severity.REFUSAL
    remedy = f"Name it by UUID= in the guest's /etc/fstab: {edit}."
    return Finding(f"fstab-{entry.source.by}", severity, subject, message, _clean(entry.source.text), remedy)


def root_findings(entries: Sequence[BootEntry], root: Volume | None) -> list[Finding]:
    """Return what to say of how the kernel command lines name the root, one finding for each way."""
    found: dict[str, Finding] = {}
    for entry in entries:
        by, subject = entry.root.by, _clean(f"{entry.config}: {entry.title}")
        evidence = _clean(entry.root.text or entry.command_line)
        if by in _BY_TABLE and by not in found:
            known = root is not None and bool(root.uuid)
            message = f"The kernel is told its root by {_TRAITS[by]}."
            remedy = "Nothing: another name is put in its place when the machine starts." if known else _NAME_BY_UUID
            found[by] = Finding(
                f"root-{by}", Severity.NOTE if known else Severity.REFUSAL, subject, message, evidence, remedy
            )
        elif by == "auto" and by not in found and _is_kernel(entry):
            message = "The kernel is not told its root: it is found by the types of the GPT, which an MBR has not."
            found[by] = Finding("root-auto", Severity.REFUSAL, subject, message, evidence or "no root=", _NAME_BY_UUID)
        elif by == "device" and by not in found:
            message = "The kernel is told its root by the name of a device, which other hardware may name differently."
            found[by] = Finding("root-device", Severity.WARNING, subject, message, evidence, _NAME_BY_UUID)
    return list(found.values())


def _is_kernel(entry: BootEntry) -> bool:
    """Return whether an entry starts a Linux: GRUB's command for that starts memory tests too."""
    name = entry.kernel.rpartition("/")[2].lower()
    return entry.source != "grub" or bool(entry.initrds) or name.startswith(("vmlinu", "linux", "kernel", "bzimage"))


_NAME_BY_UUID: Final = "Put root=UUID=… on the guest's kernel command line."


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:500]
