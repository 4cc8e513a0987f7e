"""What is brought home where: the home disks as the standing names them, given to ``replica.failback``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from replica import history
from replica.errors import IntegrityError, ObjectMissingError, UsageError
from replica.failback.examination import Touched
from replica.failback.home import Homecoming, HomeDisk, bring_home, never
from replica.failover import conversions
from replica.failover.means import Means
from replica.model import Point, SourceDisk, State
from replica.source import is_live
from vhdx.convert import ConvertFormat
from vhdx.progress import Progress, silent

_FORMATS: Final[dict[str, ConvertFormat]] = {".vhd": "vhd", ".img": "raw", ".raw": "raw", ".qcow2": "qcow2"}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a VM comes home to. ``to``: new files, in the order of the disks; none for the files that they had."""

    to: tuple[Path, ...] = ()
    may_overwrite: Callable[[Touched], bool] = never
    keep_old: bool = False


def look_ahead(means: Means, state: State, destination: Destination) -> None:
    """See that there is somewhere to come home to, as long as the recovery machine runs. Raises UsageError."""
    assert state.home is not None, "checked when it was decoded"
    for one in _disks(state.home.sources, _base(means, state.home.point), destination.to):
        if destination.to and not one.path.parent.is_dir():
            raise UsageError(f"{one.path}: the folder for the new disk is not there", hint="make it, or name another")
        if not destination.to and not one.path.exists():
            raise UsageError(
                f"{one.path}: the home disk is not there",
                hint="is its file system mounted? where the disk is gone, name new files for all disks with --to",
            )


def bring(
    means: Means, state: State, newest: Point, destination: Destination, progress: Progress = silent
) -> tuple[tuple[SourceDisk, ...], Homecoming]:
    """Make the home disks what ``newest`` holds; return them as they are replicated from now on, and what was done.

    Safe to repeat. Raises as ``replica.failback.home.bring_home``; UsageError where a disk's file is not known.
    """
    home, machine = state.home, state.machine
    assert home is not None and machine is not None, "checked when they were decoded"
    base = _base(means, home.point)
    disks = _disks(home.sources, base, destination.to)
    manifests = {ref.disk: conversions.read(means.store, means.found, ref) for ref in machine.conversions}
    done = bring_home(
        means.store,
        means.host,
        means.found,
        base=base,
        newest=newest,
        homes=disks,
        conversions=manifests,
        may_overwrite=destination.may_overwrite,
        keep_old=destination.keep_old,
        workers=means.workers,
        progress=progress,
    )
    if not destination.to:
        return home.sources, done
    return tuple(replace(one, path=str(at.path)) for one, at in zip(home.sources, disks, strict=True)), done


def _base(means: Means, number: int) -> Point | None:
    try:
        found = history.read(means.store, means.found.keys, number)
    except (ObjectMissingError, IntegrityError):
        return None
    return found if isinstance(found, Point) else None


def _disks(sources: Sequence[SourceDisk], base: Point | None, to: Sequence[Path]) -> list[HomeDisk]:
    if to and len(to) != len(sources):
        raise UsageError(f"the VM has {len(sources)} disks, and {len(to)} files were named", hint="name one for each")
    if to:
        return [
            HomeDisk(one.number, path.absolute(), _FORMATS.get(path.suffix.lower(), "vhdx"))
            for one, path in zip(sources, to, strict=True)
        ]
    return [HomeDisk(one.number, _file_of(one, base)) for one in sources]


def _file_of(source: SourceDisk, base: Point | None) -> Path:
    """Return the file of a home disk; of a machine's disk the one that it had when its last point was made."""
    if not is_live(source.path):
        return Path(source.path)
    records = () if base is None else base.disks
    file = next((one.source.get("file", "") for one in records if one.number == source.number), "")
    if not file or not Path(file).is_absolute():
        raise UsageError(
            f"{source.path}: the file of this disk is not known", hint="name new files for all disks with --to"
        )
    return Path(file)
