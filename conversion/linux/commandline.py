"""How devices are named: on kernel command lines and in /etc/fstab."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from conversion.linux.system import DeviceName, FstabEntry, NamedBy, Volume

_TAGS: Final[dict[str, NamedBy]] = {
    "UUID": "uuid",
    "LABEL": "label",
    "PARTUUID": "partuuid",
    "PARTLABEL": "partlabel",
}
_BY_PATHS: Final[dict[str, NamedBy]] = {
    "/dev/disk/by-uuid/": "uuid",
    "/dev/disk/by-label/": "label",
    "/dev/disk/by-partuuid/": "partuuid",
    "/dev/disk/by-partlabel/": "partlabel",
    "/dev/mapper/": "mapper",
}
_DEVICE: Final = re.compile(r"/dev/(?:sd|vd|xvd|hd|nvme|mmcblk|md|disk/)")
MOST_LINES: Final = 10_000


def arguments(command_line: str) -> list[str]:
    """Return the arguments of a kernel command line: split at blanks outside of double quotes."""
    return [part.replace('"', "") for part in re.findall(r'(?:[^\s"]|"[^"]*"?)+', command_line)]


def value_of(command_line: str, key: str) -> str | None:
    """Return the value of the last argument ``key=``, as the kernel takes it."""
    found = [part[len(key) + 1 :] for part in arguments(command_line) if part.startswith(f"{key}=")]
    return found[-1] if found else None


def root_of(command_line: str) -> DeviceName:
    """Return how the root is named; by "auto" where nothing names it."""
    text = value_of(command_line, "root")
    return DeviceName("auto", "", "") if text is None or text == "gpt-auto" else device_name(text)


def subvolume_of(command_line: str) -> str | None:
    """Return the btrfs subvolume that rootflags name: a path without a slash in front, or ``id:N``."""
    return subvolume_in((value_of(command_line, "rootflags") or "").split(","))


def subvolume_in(options: Sequence[str]) -> str | None:
    """Return the btrfs subvolume that mount options name: a path without a slash in front, or ``id:N``."""
    found = None
    for option in options:
        key, _, value = option.partition("=")
        if key == "subvol":
            found = value.strip("/")
        elif key == "subvolid" and value.isdecimal() and found is None:
            found = f"id:{value}"
    return found


def device_name(text: str) -> DeviceName:
    """Return what a name such as ``UUID=…`` or ``/dev/sda1`` goes by."""
    tag, _, value = text.partition("=")
    if tag in _TAGS:
        return DeviceName(_TAGS[tag], value.strip("\"'"), text)
    for prefix, by in _BY_PATHS.items():
        if text.startswith(prefix):
            return DeviceName(by, text.removeprefix(prefix), text)
    if _DEVICE.match(text):
        return DeviceName("device", text, text)
    # /dev/GROUP/VOLUME is a logical volume's other name.
    if re.fullmatch(r"/dev/[^/]+/[^/]+", text):
        group, volume = text.removeprefix("/dev/").replace("-", "--").split("/")
        return DeviceName("mapper", f"{group}-{volume}", text)
    return DeviceName("other", text, text)


def resolve(name: DeviceName, volumes: Sequence[Volume]) -> Volume | None:
    """Return the volume that a name leads to; None where it cannot be told (``/dev/sda1`` never can)."""
    wanted = name.value.lower()
    for volume in volumes:
        partition = volume.partition
        known = {
            "uuid": volume.uuid.lower(),
            "label": (volume.file_system.label if volume.file_system else volume.probed.label).lower(),
            "partuuid": str(partition.guid) if partition and partition.guid else "",
            "partlabel": partition.name.lower() if partition else "",
            "mapper": volume.mapper_name.lower(),
        }.get(name.by, "")
        if wanted and known == wanted:
            return volume
    return None


def parse_fstab(content: bytes) -> tuple[FstabEntry, ...]:
    """Return the entries of an fstab; lines that are none are passed over."""
    found = []
    for number, line in enumerate(content.decode("utf-8", "surrogateescape").split("\n")[:MOST_LINES], start=1):
        written = line.split()
        fields = [_unescaped(part) for part in written]
        if len(fields) < 3 or fields[0].startswith("#"):
            continue
        source = replace(device_name(fields[0]), text=written[0])
        options = tuple(fields[3].split(",")) if len(fields) > 3 else ("defaults",)
        found.append(FstabEntry(number, source, fields[1], fields[2], options))
    return tuple(found)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found[1], 8)), text)
