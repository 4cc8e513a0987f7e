"""From what a Linux system is to what the boot chain must know of it: where its boot configuration lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from conversion.bootscript import EntriesGuest, Entry, GrubGuest, Guest, LoaderGuest, Place, Substitution
from conversion.errors import RefusedError
from conversion.linux.system import BootEntry, EntriesFolder, GrubConfig, LinuxSystem, Volume

MOST_SUBSTITUTIONS: Final = 16
MOST_ENTRIES: Final = 32

NumberOf = Callable[[int], int | None]  # a partition's number in the GPT → in the MBR


def boot_guest(system: LinuxSystem, number_of: NumberOf, unified: Sequence[Entry] = ()) -> Guest:
    """Return what the boot chain starts, and from where. ``unified``: kernels that were taken out of unified images.

    Raises RefusedError where nothing of it can be started from a BIOS.
    """
    substitutions = _substitutions(system)
    config = _chosen_config(system.grub)
    if config is not None:
        known = [entry for entry in system.entries if entry.source == "bls"] if config.uses_bls else []
        return GrubGuest(_place(config.volume, number_of), config.folder, substitutions, _entries(known, number_of))
    folder = next((one for one in system.entries_folders if one.entries), None)
    if folder is not None:
        return _loader_guest(system, folder, number_of, substitutions)
    if unified:
        return EntriesGuest(tuple(unified))
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
        _entries(folder.entries, number_of),
        min(int(timeout), 3600) if timeout is not None and timeout.isdecimal() else 3,
    )


def _place(volume: Volume, number_of: NumberOf) -> Place:
    if not volume.uuid:
        raise RefusedError(
            "its file system has no UUID, by which it is found", subject=volume.subject, hint="give it one (tune2fs -U)"
        )
    return Place(volume.uuid, number_of(volume.partition.number) if volume.partition is not None else None)


def _entries(entries: Sequence[BootEntry], number_of: NumberOf) -> tuple[Entry, ...]:
    """Return entries as they are known now, for where none can be read when the machine starts."""
    found = []
    for one in entries[:MOST_ENTRIES]:
        if one.volume is not None and one.volume.uuid and one.kernel:
            place = _place(one.volume, number_of)
            found.append(Entry(one.title, place, one.kernel, one.initrds, one.command_line))
    return tuple(found)


def _substitutions(system: LinuxSystem) -> tuple[Substitution, ...]:
    """Return what to put in the place of PARTUUIDs on kernel command lines: the file system's own UUID."""
    text = " ".join(entry.command_line for entry in system.entries).lower()
    found = [
        Substitution(str(volume.partition.guid), f"UUID={volume.uuid}")
        for volume in system.volumes
        if volume.partition is not None and volume.partition.guid is not None and volume.uuid
    ]
    # What is on a command line today goes first; the root's may come to be on one with the next kernel.
    found.sort(key=lambda one: one.partuuid not in text)
    return tuple(found[:MOST_SUBSTITUTIONS])
