"""From what a Linux system is to what the boot chain must know of it: where its boot configuration lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from conversion.bootguests import LABEL, EntriesGuest, Entry, GrubGuest, Guest, LoaderGuest, Place, Substitution
from conversion.errors import RefusedError
from conversion.linux.system import BootEntry, EntriesFolder, GrubConfig, LinuxSystem, Volume

MOST_SUBSTITUTIONS: Final = 16
MOST_ENTRIES: Final = 32
LONGEST_TEXT: Final = 4096

NumberOf = Callable[[int], int | None]  # a partition's number in the GPT → in the MBR


def boot_guest(
    system: LinuxSystem, number_of: NumberOf, unified: Sequence[Entry] = (), *, signature: int | None = None
) -> Guest:
    """Return what the boot chain starts, and from where. ``unified``: kernels that were taken out of unified images.

    ``signature`` is that of the disk, for a kernel that finds its root without an initial RAM disk.
    Raises RefusedError where nothing of it can be started from a BIOS.
    """
    substitutions = _substitutions(system, number_of, signature)
    config = _chosen_config(system.grub)
    if config is not None:
        known = [entry for entry in system.entries if entry.source == "bls"] if config.uses_bls else []
        entries = _entries(known, number_of, substitutions)
        return GrubGuest(_place(config.volume, number_of), config.folder, substitutions, entries, config.file)
    folder = next((one for one in system.entries_folders if one.entries), None)
    if folder is not None:
        return _loader_guest(system, folder, number_of, substitutions)
    if unified:
        return EntriesGuest(
            tuple(replace(one, command_line=_substituted(one.command_line, substitutions)) for one in unified)
        )
    raise RefusedError(
        "nothing says how this system is started",
        subject="the system",
        hint="run update-grub, grub2-mkconfig or bootctl install in the guest",
    )


def needs_unified(system: LinuxSystem) -> bool:
    """Whether unified kernel images are the only way to start the system."""
    return (
        _chosen_config(system.grub) is None
        and not any(folder.entries for folder in system.entries_folders)
        and bool(system.unified_kernels)
    )


def _chosen_config(configs: Sequence[GrubConfig]) -> GrubConfig | None:
    """The configuration that starts something; of several the one with the most ways to."""
    useful = [one for one in configs if one.entries or one.uses_bls]
    return max(useful, key=lambda one: (one.uses_bls, len(one.entries)), default=None)


def _loader_guest(
    system: LinuxSystem, folder: EntriesFolder, number_of: NumberOf, substitutions: tuple[Substitution, ...]
) -> LoaderGuest:
    loader = system.systemd_boot.volume if system.systemd_boot is not None else folder.volume
    timeout = system.systemd_boot.timeout if system.systemd_boot is not None else None
    return LoaderGuest(
        _place(folder.volume, number_of),
        folder.folder,
        None if loader.uuid == folder.volume.uuid else _place(loader, number_of),
        substitutions,
        _entries(folder.entries, number_of, substitutions),
        min(int(timeout), 3600) if timeout is not None and timeout.isdecimal() else 3,
    )


def _place(volume: Volume, number_of: NumberOf) -> Place:
    if not volume.uuid:
        raise RefusedError(
            "its file system has no UUID, by which it is found", subject=volume.subject, hint="give it one (tune2fs -U)"
        )
    return Place(volume.uuid, number_of(volume.partition.number) if volume.partition is not None else None)


def _entries(
    entries: Sequence[BootEntry], number_of: NumberOf, substitutions: Sequence[Substitution]
) -> tuple[Entry, ...]:
    """Return entries as they are known now, for where none can be read when the machine starts."""
    found = []
    for one in entries[:MOST_ENTRIES]:
        if one.volume is not None and one.volume.uuid and one.kernel.startswith("/"):
            place = _place(one.volume, number_of)
            title, command_line = _plain(one.title), _substituted(_plain(one.command_line), substitutions)
            found.append(Entry(title, place, one.kernel, one.initrds, command_line))
    return tuple(found)


def _plain(text: str) -> str:
    return "".join(" " if ord(character) < 32 else character for character in text)[:LONGEST_TEXT]


def _substituted(command_line: str, substitutions: Sequence[Substitution]) -> str:
    """Return a command line that is known beforehand as the script would hand it over."""
    words = command_line.split(" ")
    for substitution in substitutions:
        words = [substitution.made_in(word) for word in words]
    return " ".join(words)


def _substitutions(system: LinuxSystem, number_of: NumberOf, signature: int | None) -> tuple[Substitution, ...]:
    """Return what to put in the place of what names a partition by its table, on kernel command lines.

    That is the file system's own UUID; where no initial RAM disk is there to look for it, the partition's name under
    the new table, as the kernel itself makes it.
    """
    by_kernel = any(one.root.by in ("partuuid", "partlabel") and not one.initrds for one in _started(system))
    text = " ".join(entry.command_line for entry in system.entries).lower()
    found: list[tuple[bool, Substitution]] = []
    names = [volume.partition.name for volume in system.volumes if volume.partition is not None]
    for volume in system.volumes:
        partition = volume.partition
        if partition is None or partition.guid is None or not volume.uuid:
            continue
        number = number_of(partition.number)
        replacement = f"UUID={volume.uuid}"
        if by_kernel and signature is not None and number is not None:
            replacement = f"PARTUUID={signature:08x}-{number:02x}"
        label = partition.name if names.count(partition.name) == 1 and LABEL.fullmatch(partition.name) else ""
        is_named = str(partition.guid) in text or bool(label and label.lower() in text)
        found.append((is_named, Substitution(str(partition.guid), replacement, label)))
    # What is on a command line today goes first; the root's may come to be on one with the next kernel.
    found.sort(key=lambda one: not one[0])
    return tuple(one for _, one in found[:MOST_SUBSTITUTIONS])


def _started(system: LinuxSystem) -> list[BootEntry]:
    """Return the entries that start a Linux whose initial RAM disk, if it has one, is listed."""
    return [one for one in system.entries if one.source != "uki"]
