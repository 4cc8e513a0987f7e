"""What there is to start: a guest as a boot script is written for, its kernels, and where their file systems are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_UUID: Final = re.compile(r"[0-9A-Fa-f]+(?:-[0-9A-Fa-f]+)*")
_HEX_LETTER: Final = re.compile(r"[a-f]")
LABEL: Final = re.compile(r"[A-Za-z0-9_.+-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file system is: its UUID as GRUB and blkid write it, and its number in the MBR, asked first if given.

    The number counts as the partition table does: 1 to 4, and 5 on for logical partitions. One file system on two
    disks (a disk and its copy) is found on the disk that was booted from.
    """

    file_system_uuid: str
    partition: int | None = None

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.file_system_uuid):
            raise ValueError(f"no UUID of a file system: {self.file_system_uuid!r}")
        if self.partition is not None and not 1 <= self.partition <= 255:
            raise ValueError(f"no number of a partition: {self.partition}")


@dataclass(frozen=True, slots=True)
class Substitution:
    """An argument ``KEY=PARTUUID=partuuid`` of the kernel becomes ``KEY=replacement``, ``UUID=…`` say.

    ``partlabel`` is a name of the same partition, where it may go by that too. Paths in /dev/disk are other ways to
    write either.
    """

    partuuid: str
    replacement: str
    partlabel: str = ""

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.partuuid):
            raise ValueError(f"no UUID of a partition: {self.partuuid!r}")
        if self.partlabel and not LABEL.fullmatch(self.partlabel):
            raise ValueError(f"no name of a partition that a kernel command line can hold: {self.partlabel!r}")
        if not self.replacement or re.search(r"\s", self.replacement):
            raise ValueError(f"nothing to put in the place of a PARTUUID: {self.replacement!r}")

    def made_in(self, argument: str) -> str:
        """Return an argument of the kernel with this substitution made."""
        key, separator, value = argument.partition("=")
        for name, prefixes, fold in (
            (self.partuuid.lower(), ("PARTUUID=", "/dev/disk/by-partuuid/"), True),
            (self.partlabel, ("PARTLABEL=", "/dev/disk/by-partlabel/"), False),
        ):
            for prefix in prefixes:
                rest = value.removeprefix(prefix)
                if name and value.startswith(prefix) and (rest.lower() if fold else rest) == name:
                    return f"{key}{separator}{self.replacement}"
        return argument

    def patterns(self) -> list[str]:
        """Return the same as regular expressions; the first group is what stays."""
        uuid = _HEX_LETTER.sub(lambda found: f"[{found[0]}{found[0].upper()}]", self.partuuid.lower())
        found = [f"^([^=]*=)(PARTUUID=|/dev/disk/by-partuuid/){uuid}$"]
        if self.partlabel:
            label = self.partlabel.replace(".", "[.]").replace("+", "[+]")
            found.append(f"^([^=]*=)(PARTLABEL=|/dev/disk/by-partlabel/){label}$")
        return found


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel to start. Paths begin at the root of the file system (on btrfs: of its top-level subvolume)."""

    title: str
    place: Place
    kernel: str
    initrds: tuple[str, ...]
    command_line: str  # without the kernel's name; split at blanks outside of double quotes


@dataclass(frozen=True, slots=True)
class GrubGuest:
    """A guest with a grub.cfg: in ``folder`` (``/boot/grub``, ``/grub2``, ``/@/boot/grub``) of the file system.

    ``folder`` is what the guest's ``$prefix`` is to be: its environment and its fonts are looked for there.
    """

    place: Place
    folder: str
    substitutions: tuple[Substitution, ...] = ()
    known_entries: tuple[Entry, ...] = ()  # for a ``blscfg`` that finds none
    file: str = "grub.cfg"


@dataclass(frozen=True, slots=True)
class LoaderGuest:
    """A guest with systemd-boot: entries in ``entries_folder`` of the ESP or XBOOTLDR, kernels beside them.

    ``loader`` is the place of ``/loader/loader.conf``, the ESP, where that is another file system than the entries'.
    """

    place: Place
    entries_folder: str = "/loader/entries"
    loader: Place | None = None
    substitutions: tuple[Substitution, ...] = ()
    known_entries: tuple[Entry, ...] = ()  # where no entry is found
    timeout_seconds: int = 3  # where loader.conf names none


@dataclass(frozen=True, slots=True)
class EntriesGuest:
    """A guest of which only single kernels are known, the first being the default."""

    entries: tuple[Entry, ...]
    timeout_seconds: int = 3


@dataclass(frozen=True, slots=True)
class WindowsGuest:
    """A Windows: the partition with its boot manager for a BIOS, by number, by file system or, best, by both."""

    partition: int | None
    file_system_uuid: str | None
    boot_manager: str = "/bootmgr"

    def __post_init__(self) -> None:
        if self.partition is None and self.file_system_uuid is None:
            raise ValueError("a Windows is found by its partition's number or its file system's UUID")
        Place(self.file_system_uuid or "0", self.partition)


Guest = GrubGuest | LoaderGuest | EntriesGuest | WindowsGuest
