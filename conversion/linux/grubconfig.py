"""grub.cfg, grubenv and the stub on the ESP, as far as they tell what is started and from where."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from conversion.filesystems.filesystem import FileSystem
from conversion.linux.commandline import root_of, subvolume_of
from conversion.linux.files import names_in, text_of
from conversion.linux.system import BootEntry, GrubConfig, GrubStub, Volume

FOLDERS: Final = ("/boot/grub", "/boot/grub2", "/grub", "/grub2")
MOST_ENTRIES: Final = 256
_SEARCH: Final = re.compile(r"^\s*search(?:\.fs_uuid)?\b[^\n]*?([0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}|[0-9A-Fa-f-]{16,36})\b")
_MENU: Final = re.compile(r"^\s*menuentry\s+(?:'([^']*)'|\"([^\"]*)\"|(\S+))")
_LINUX: Final = re.compile(r"^\s*(?:linux|linuxefi|linux16)\s+(?:\(\$?\w+\))?(\S+)\s*(.*)$")
_INITRD: Final = re.compile(r"^\s*(?:initrd|initrdefi|initrd16)\s+(.*)$")
_SET: Final = re.compile(r"^\s*set\s+(\w+)=(?:\"([^\"]*)\"|'([^']*)'|(\S*))")
_VARIABLE: Final = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def environment_of(file_system: FileSystem, folder: str) -> tuple[tuple[str, str], ...]:
    """Return grubenv's variables; none where there is no such file."""
    text = text_of(file_system, f"{folder}/grubenv") or ""
    pairs = (line.partition("=") for line in text.splitlines()[:1000] if not line.startswith("#"))
    return tuple((key, value) for key, separator, value in pairs if separator)


def read_config(
    volume: Volume, file_system: FileSystem, folder: str, volume_by_uuid: Callable[[str], Volume | None]
) -> GrubConfig | None:
    """Return a full grub.cfg in ``folder``; None where there is none, or only one that leads elsewhere."""
    path = f"{folder}/grub.cfg"
    text = text_of(file_system, path)
    if text is None or not re.search(r"^\s*(menuentry|blscfg|linux(efi|16)?|submenu)\b", text, re.MULTILINE):
        return None
    environment = environment_of(file_system, folder)
    return GrubConfig(
        volume=volume,
        folder=folder,
        file="grub.cfg",
        uses_bls=re.search(r"^\s*blscfg\b", text, re.MULTILINE) is not None,
        environment=environment,
        entries=_entries(text, path, volume, dict(environment), volume_by_uuid),
    )


def _entries(
    text: str, path: str, volume: Volume, variables: dict[str, str], volume_by_uuid: Callable[[str], Volume | None]
) -> tuple[BootEntry, ...]:
    found: list[BootEntry] = []
    title, place, pending = "", volume, None
    for line in text.splitlines():
        if menu := _MENU.match(line):
            title, pending = next((part for part in menu.groups() if part is not None), ""), None
        elif assigned := _SET.match(line):
            variables[assigned[1]] = next((part for part in assigned.groups()[1:] if part is not None), "")
        elif searched := _SEARCH.match(line):
            place = volume_by_uuid(searched[1]) or place
        elif started := _LINUX.match(line):
            command_line = expanded(started[2].strip(), variables)
            pending = expanded(started[1], variables)
            found.append(_entry(title, path, pending, command_line, place))
        elif (initrd := _INITRD.match(line)) and pending is not None:
            paths = tuple(re.sub(r"^\(\$?\w+\)", "", expanded(part, variables)) for part in initrd[1].split())
            last = found.pop()
            found.append(_entry(last.title, path, last.kernel, last.command_line, last.volume, paths))
        if len(found) >= MOST_ENTRIES:
            break
    return tuple(found)


def _entry(
    title: str, path: str, kernel: str, command_line: str, volume: Volume | None, initrds: tuple[str, ...] = ()
) -> BootEntry:
    return BootEntry(
        source="grub",
        config=path,
        title=title,
        kernel=kernel,
        initrds=initrds,
        command_line=command_line,
        root=root_of(command_line),
        root_subvolume=subvolume_of(command_line),
        volume=volume,
        version=re.sub(r"^[^-]*-?", "", kernel.rpartition("/")[2], count=1),
    )


def expanded(text: str, variables: dict[str, str]) -> str:
    """Return ``text`` with the variables that are known replaced and the others left out, as GRUB does."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), text)


def read_stubs(volume: Volume, file_system: FileSystem) -> tuple[GrubStub, ...]:
    """Return the grub.cfg files below /EFI that only lead to another one."""
    found = []
    for folder in names_in(file_system, "/EFI")[:64]:
        path = f"/EFI/{folder.name}/grub.cfg"
        text = text_of(file_system, path) if folder.kind == "folder" else None
        if text is None or "configfile" not in text:
            continue
        searched = next((match for line in text.splitlines() if (match := _SEARCH.match(line))), None)
        prefix = re.search(r"^\s*set prefix=\(\$\w+\)['\"]?([^'\"\n]+)", text, re.MULTILINE)
        found.append(GrubStub(volume, path, searched[1] if searched else None, prefix[1].strip() if prefix else None))
    return tuple(found)
