"""Merging the checkpoints of a VM that is off: all of its disks to one depth, or none.

What is merged is what Hyper-V has no record of, as far as its records are at hand; that nobody has the files open, and
that there is room, is seen before anything is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from replica import catalog
from replica.catalog import ProtectedVm
from replica.checkpoints.chains import POWERSHELL
from replica.checkpoints.records import Records, read_records
from replica.errors import SourceError, StandingError, UsageError
from replica.model import Standing
from replica.stores.store import Store
from vhdx.inuse import user_of
from vhdx.merge_chain import ChainMerge, held, merge_chain, plan_chain_merge
from vhdx.osfile import OS_FILES, Files
from vhdx.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Rule:
    """What stays: the newest ``keep`` checkpoint files, and of the older those written to since ``before``."""

    keep: int = 1
    before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Merging:
    """What is to be done to the disks, and what a person should know before: ``warnings``."""

    disks: tuple[ChainMerge, ...]
    records: Records
    warnings: tuple[str, ...]
    rule: Rule
    allowed_folders: tuple[Path, ...]

    @property
    def is_needed(self) -> bool:
        """Whether anything is merged at all."""
        return any(disk.steps for disk in self.disks)


def require_protected(store: Store, found: ProtectedVm) -> None:
    """Raise StandingError where the VM is failed over: its disks are then what it is to come home to."""
    standing = catalog.settings_in_force(store, found).state.standing
    if standing is not Standing.PROTECTED:
        raise StandingError(
            f"{found.vm.name} is {standing.value}: its disks at home are left as they are until it is back",
            hint=f"'godwit status {found.vm.name}' says what can be done next",
        )


def plan(
    paths: Sequence[Path],
    rule: Rule,
    *,
    allowed_folders: Sequence[Path] = (),
    record_folders: Sequence[Path] = (),
    files: Files = OS_FILES,
) -> Merging:
    """Say what merging the chains of these disks would do: to the same number of files above the first, or less.

    Raises UsageError, SourceError where a file is in use, is named by a record of Hyper-V's, or room is lacking, and
    DiskError as ``plan_chain_merge`` does: then nothing is merged of any disk.
    """
    if rule.keep < 1:
        raise UsageError("the newest file stays: machines know the disk by its name", hint="--keep 1 is the least")
    merges = _planned(paths, rule, allowed_folders, files)
    touched = tuple(file for one in merges if one.steps for file in one.files)
    for file in touched:
        user = user_of(file)
        if user is not None:
            raise SourceError(
                f"{user} has it open: chains are merged while nobody uses any file of them",
                path=str(file),
                hint="shut the VM down first",
            )
    changed = tuple(file for one in merges if one.steps for file in (*one.steps, one.target))
    records = read_records(changed, record_folders)
    _refuse_recorded(records)
    _refuse_lack_of_room(merges)
    return Merging(merges, records, tuple(_warnings(merges, records)), rule, tuple(allowed_folders))


def run(
    merging: Merging,
    *,
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
    files: Files = OS_FILES,
) -> None:
    """Merge as it was planned, while every file of all chains is locked. ``progress`` is asked for each disk.

    Cut off, it is finished by planning and merging again. Raises DiskBusyError where a file is in use by now,
    SourceError where a chain is another than it was, and as ``merge_into_parent`` does.
    """
    every = [file for disk in merging.disks if disk.steps for file in disk.files]
    with held(every, files=files) as locked:
        for disk in merging.disks:
            _refuse_other(disk, merging, locked)
        for disk in merging.disks:
            if not disk.steps:
                continue
            if progress is None:
                merge_chain(disk, allowed_folders=merging.allowed_folders, files=locked, progress=silent)
                continue
            with progress(disk.target.name) as told:
                merge_chain(disk, allowed_folders=merging.allowed_folders, files=locked, progress=told)


def _planned(
    paths: Sequence[Path], rule: Rule, allowed_folders: Sequence[Path], files: Files
) -> tuple[ChainMerge, ...]:
    before = None if rule.before is None else rule.before.timestamp()

    def each(keep: int, modified_before: float | None) -> tuple[ChainMerge, ...]:
        return tuple(
            plan_chain_merge(
                path, keep=keep, modified_before=modified_before, allowed_folders=allowed_folders, files=files
            )
            for path in paths
        )

    merges = each(rule.keep, before)
    if before is None or len(merges) < 2:
        return merges
    # Where one disk was written to for longer than another, what is kept of that one is kept of all.
    return each(max(rule.keep, *(len(one.kept) for one in merges)), None)


def _refuse_other(disk: ChainMerge, merging: Merging, files: Files) -> None:
    """Raise unless the chain is as it was when it was planned: locked, it stays so."""
    now = plan_chain_merge(disk.path, keep=max(1, len(disk.kept)), allowed_folders=merging.allowed_folders, files=files)
    if (now.kept, now.steps, now.target) != (disk.kept, disk.steps, disk.target):
        raise SourceError(
            "the chain became another while it was looked at, so nothing was merged",
            path=str(disk.path),
            hint="look at it again: godwit checkpoints",
        )


def _refuse_recorded(records: Records) -> None:
    for file, by in records.naming.items():
        names = ", ".join(str(one) for one in by[:3])
        raise SourceError(
            f"Hyper-V's configuration names it ({names}): a checkpoint would lead to nothing, or to other content",
            path=str(file),
            hint=f"delete the checkpoint on the host, and Hyper-V merges its files itself: {POWERSHELL}",
        )


def _refuse_lack_of_room(merges: Sequence[ChainMerge]) -> None:
    needed: dict[int, int] = {}
    for one in merges:
        if not one.steps:
            continue
        folder = one.target.absolute().parent
        try:
            device, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        except OSError as error:
            raise SourceError(f"cannot ask for free space: {error.strerror}", path=str(folder)) from error
        needed[device] = needed.get(device, 0) + one.growth_bytes
        if needed[device] > free:
            raise SourceError(
                f"merging may take {needed[device]} bytes for a while, and {free} are free",
                path=str(folder),
                hint="make room, or merge fewer at a time: a greater --keep, a longer --older-than",
            )


def _warnings(merges: Sequence[ChainMerge], records: Records) -> list[str]:
    warnings = [
        f"{path} could not be read: whether it names a file of these is not known" for path in records.unreadable
    ]
    if any(disk.steps for disk in merges) and not records.configurations:
        warnings.append(
            "AVHDX files are of Hyper-V's checkpoints, and no configuration of it was found from here. If Hyper-V "
            "lists checkpoints of the VM, merging their files leaves those without their disks: on the host, with the "
            f"VM off, '{POWERSHELL}' deletes them and merges their files; what is left over then is merged by hand"
        )
    return warnings
