"""Boot Loader Specification entries (type 1) and systemd-boot's loader.conf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from conversion.filesystems.filesystem import FileSystem
from conversion.linux.commandline import root_of, subvolume_of
from conversion.linux.files import names_in, text_of
from conversion.linux.grubconfig import expanded
from conversion.linux.system import BootEntry, EntriesFolder, SystemdBoot, Volume

MOST_ENTRIES: Final = 256
_BOOT_FILES: Final = ("/EFI/systemd/systemd-bootx64.efi", "/EFI/systemd/systemd-bootaa64.efi")


def read_entries(
    volume: Volume, file_system: FileSystem, folder: str, variables: Mapping[str, str]
) -> EntriesFolder | None:
    """Return the entries of a folder; None where it has none. ``variables`` are grubenv's, for Red Hat's entries."""
    found = list[BootEntry]()
    for item in names_in(file_system, folder):
        if not item.name.endswith(".conf") or item.kind != "file" or len(found) >= MOST_ENTRIES:
            continue
        text = text_of(file_system, f"{folder}/{item.name}")
        entry = _entry(text, f"{folder}/{item.name}", volume, variables) if text is not None else None
        if entry is not None:
            found.append(entry)
    return EntriesFolder(volume, folder, tuple(found)) if found else None


def _entry(text: str, path: str, volume: Volume, variables: Mapping[str, str]) -> BootEntry | None:
    fields: dict[str, list[str]] = {}
    for line in text.splitlines()[:1000]:
        key, *value = line.strip().split(None, 1)[:2] or [""]
        if key and not key.startswith("#"):
            fields.setdefault(key, []).append(value[0].strip() if value else "")
    kernels = fields.get("linux") or fields.get("uki")
    if not kernels or not kernels[0]:
        return None  # a program for UEFI, a shell say
    command_line = expanded(" ".join(fields.get("options", [])), dict(variables)).strip()
    initrds = [part for value in fields.get("initrd", []) for part in expanded(value, dict(variables)).split()]
    return BootEntry(
        source="bls",
        config=path,
        title=fields.get("title", [path.rpartition("/")[2]])[0],
        kernel=kernels[0],
        initrds=tuple(initrds),
        command_line=re.sub(r"\s+", " ", command_line),
        root=root_of(command_line),
        root_subvolume=subvolume_of(command_line),
        volume=volume,
        version=fields.get("version", [""])[0],
    )


def read_systemd_boot(volume: Volume, file_system: FileSystem) -> SystemdBoot | None:
    """Return systemd-boot's settings; None where its program is not on this ESP."""
    installed = {f"/EFI/systemd/{item.name.lower()}" for item in names_in(file_system, "/EFI/systemd")}
    if not installed & set(_BOOT_FILES):
        return None
    settings = {}
    for line in (text_of(file_system, "/loader/loader.conf") or "").splitlines()[:1000]:
        key, *value = line.strip().split(None, 1)[:2] or [""]
        if value:
            settings[key] = value[0].strip()
    return SystemdBoot(volume, settings.get("timeout"), settings.get("default"))
