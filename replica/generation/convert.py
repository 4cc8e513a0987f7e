"""Converting a disk image from one generation to the other: inspect, plan, write an overlay, verify, name it.

The image itself is written only where that is asked for (``in_place``): what stood there is saved beside it first,
durably, and the write that puts the other generation in force is one sector, the last of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from conversion.errors import DamagedError, RefusedError
from conversion.inspection import inspect
from conversion.manifest import Manifest
from conversion.overlay import Overlay
from conversion.plan import SWITCH, TO_UEFI_ORDER, Plan, components
from conversion.tobios import plan_bios
from conversion.touefi import plan_uefi
from conversion.verify import verify
from conversion.windows.hiveorder import in_phases
from replica.errors import UsageError
from replica.generation.image import Image, write_copy, write_in_place, write_overlay
from vhdx.bulk import file_exists
from vhdx.convert import ConvertFormat
from vhdx.disk import Disk
from vhdx.errors import OsError
from vhdx.osfile import OS_FILES, Files, translated
from vhdx.progress import Progress, silent
from vhdx.temporary import temporary_path

MANIFEST_SUFFIX: Final = ".conversion"
JOURNAL_SUFFIX: Final = ".conversion-back"
LARGEST_MANIFEST_BYTES: Final = 300 << 20
Generation = Literal[1, 2]


@dataclass(frozen=True, slots=True)
class GenerationChange:
    """What was done, or with ``dry_run`` would be. ``target`` is the disk of the new generation, None for a dry run."""

    source: Path
    target: Path | None
    manifest: Path | None
    plan: Plan

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "source": str(self.source),
            "target": None if self.target is None else str(self.target),
            "manifest": None if self.manifest is None else str(self.manifest),
            **self.plan.document(),
        }


def default_target(path: Path, generation: Generation, format_: str) -> Path:
    """Return where an overlay of the disk goes where nobody says: beside it, named after the generation."""
    stem = path.stem.removesuffix(f".gen{3 - generation}")
    return path.with_name(f"{stem}.gen{generation}{'.vhdx' if format_ == 'vhdx' else '.qcow2'}")


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a converted disk lies: beside it."""
    return path.with_name(path.name + MANIFEST_SUFFIX)


def journal_path(path: Path) -> Path:
    """Return where the writes of a way back in place are kept while they are made."""
    return path.with_name(path.name + JOURNAL_SUFFIX)


def convert_generation(
    path: Path,
    to: Generation,
    *,
    output: Path | None = None,
    format: ConvertFormat | None = None,  # noqa: A002 - what everyone calls it
    in_place: bool = False,
    dry_run: bool = False,
    manifest: Path | None = None,
    folders: Sequence[Path] = (),
    discard_hibernation: bool = False,
    largest_sectors: int | None = None,
    progress: Progress = silent,
    files: Files = OS_FILES,
) -> GenerationChange:
    """Convert the OS disk at ``path``: as an overlay on it, as a whole copy of ``format``, or ``in_place``.

    ``manifest`` is the one that a disk of Generation 1 was converted by, to go back to 2; else it is looked for beside
    the image and its parents. A disk that cannot be converted gives a plan without an overlay, and nothing is written.
    Raises DiskError, ConversionError, UsageError.
    """
    image = Image.find(path, folders=folders)
    if in_place and not dry_run:
        finished = finish_interrupted(image, files)
        if finished is not None and to == 2:
            return GenerationChange(path, path, None, finished)
        if to == 1:
            take_back_interrupted(image, files)
    with image.opened() as disk:
        saved = _manifest_for(image, disk, to, manifest)
        if saved is None:
            plan = plan_bios(disk, discard_hibernation=discard_hibernation, largest_sectors=largest_sectors)
        else:
            plan = plan_uefi(disk, saved)
        if dry_run or plan.overlay is None:
            return GenerationChange(path, None, None, plan)
        change = _Change(image, disk.size, plan, saved or plan.require_manifest(), list(plan.groups()), files)
    if in_place:
        change.in_place()
        target = path
    else:
        target = output or default_target(path, to, image.format if format is None else "qcow2")
        change.beside(target, format, progress)
    return GenerationChange(path, target, manifest_path(target) if plan.manifest is not None else None, plan)


@dataclass(frozen=True, slots=True)
class _Change:
    """A planned conversion, about to be written."""

    image: Image
    size: int
    plan: Plan
    manifest: Manifest  # of the way there, in either direction
    groups: list[list[tuple[int, bytes]]]
    files: Files

    def in_place(self) -> None:
        """Write into the image, group by group; the manifest goes before, on the way back one of that."""
        path = self.image.path
        if self.plan.manifest is not None:
            write_manifest(manifest_path(path), self.plan.manifest, overwrite=False, files=self.files)
        else:
            write_manifest(journal_path(path), self._journal(), overwrite=True, files=self.files)
        write_in_place(self.image, self.groups, files=self.files)
        self._check(self.image, "the disk was written; take it back, or restore it from a recovery point")
        if self.plan.manifest is None:
            _forget(path, self.files)

    def _journal(self) -> Manifest:
        overlay = self.plan.require()
        ranges = components(overlay, TO_UEFI_ORDER, {})
        return Manifest(self.manifest.system, overlay.size, overlay.sector_size, ranges)

    def beside(self, target: Path, format: ConvertFormat | None, progress: Progress) -> None:  # noqa: A002
        """Make an overlay on the image, or a copy of it; nothing is left of it where that fails."""
        if target.exists():
            raise file_exists(target)
        kept = manifest_path(target)
        if self.plan.manifest is not None:
            write_manifest(kept, self.plan.manifest, overwrite=True)
        ranges = [one for group in self.groups for one in group]
        try:
            if format is None:
                write_overlay(self.image, target, self.size, ranges, self._check)
            else:
                write_copy(self.image, target, format, ranges, self._check, progress=progress)
        except BaseException:
            if self.plan.manifest is not None:
                OS_FILES.remove(kept)
            raise

    def _check(self, made: Image, hint: str = "nothing was put in force; convert anew") -> None:
        with made.opened() as disk:
            wrong = verify(disk, self.plan, self.manifest)
        if wrong:
            raise DamagedError(
                " ".join(f"{one.subject}: {one.message} ({one.evidence})" for one in wrong),
                subject=str(made.path),
                hint=f"{hint}, and report it if it comes back",
            )


def _manifest_for(image: Image, disk: Disk, to: Generation, given: Path | None) -> Manifest | None:
    """Return the manifest for the way back; None for the way there."""
    if to == 1:
        if given is not None:
            raise UsageError("a manifest is for the way back to Generation 2", path=str(given))
        return None
    beside = [manifest_path(link) for link in image.chain(disk)]
    path = given or next((one for one in beside if one.exists()), beside[0])
    if not path.exists():
        raise UsageError(
            "there is no manifest of the conversion to Generation 1, and without it there is no way back",
            path=str(path),
            hint="name it with --manifest; it was written beside the converted disk",
        )
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """Read it. Raises OsError, DamagedError."""
    with translated(path, "read the manifest"), path.open("rb") as file:
        data = file.read(LARGEST_MANIFEST_BYTES + 1)
    return Manifest.decode(data, name=str(path))


def write_manifest(path: Path, manifest: Manifest, *, overwrite: bool, files: Files = OS_FILES) -> None:
    """Write it durably, before anything that needs it."""
    finished = temporary_path(path)
    try:
        file = files.open(finished, create=True)
        try:
            file.pwrite(0, manifest.encode())
            file.fsync()
        finally:
            file.close()
        if overwrite:
            files.replace(finished, path)
        elif not files.link_exclusive(finished, path):
            raise OsError(
                "there is a conversion manifest already: the disk was converted before",
                path=str(path),
                hint="take the disk back with --to gen2 first, or move the manifest away",
            )
    except BaseException:
        files.remove(finished)
        raise


def finish_interrupted(image: Image, files: Files = OS_FILES) -> Plan | None:
    """Finish a way back in place that was cut off after its switch; None where none was.

    One that was cut off before it is forgotten: the disk starts as Generation 1 still, and can be planned anew.
    Raises RefusedError where the guest ran on the disk since.
    """
    path = journal_path(image.path)
    if not path.exists():
        return None
    journal = read_manifest(path)
    with image.opened() as disk:
        switch = journal.component(SWITCH)
        if switch is None or disk.size != journal.size or not switch.stands(disk):
            files.remove(path)
            return None
        _refuse_used(image, disk, journal, path)
        plan = Plan(2, inspect(disk), Overlay(disk), TO_UEFI_ORDER, (), ("A way back that was cut off is finished.",))
    groups = [
        group for part in journal.components for group in in_phases((one.offset, one.after) for one in part.ranges)
    ]
    write_in_place(image, groups, files=files)
    _forget(image.path, files)
    return plan


def take_back_interrupted(image: Image, files: Files = OS_FILES) -> None:
    """Take back a conversion in place that was cut off before its switch, so that it can begin anew.

    Until the switch the disk starts as it did: what was written before it goes back to what stood there, where it
    still is as it was written, in part or in whole. Raises RefusedError where the guest ran on it meanwhile.
    """
    path = manifest_path(image.path)
    if not path.exists():
        return
    manifest = read_manifest(path)
    with image.opened() as disk:
        switch = manifest.component(SWITCH)
        if disk.size != manifest.size or switch is None or switch.stands(disk) or inspect(disk).generation != 2:
            return  # it is in force
        _refuse_used(image, disk, manifest, path)
    undone = [(one.offset, one.before) for part in reversed(manifest.components) for one in part.ranges]
    write_in_place(image, in_phases(undone), files=files)
    files.remove(path)


def _refuse_used(image: Image, disk: Disk, manifest: Manifest, path: Path) -> None:
    """Raise RefusedError unless each sector that was to be written holds what stood there or what was written."""
    for component in manifest.components:
        for one in component.ranges:
            live = disk.read_at(one.offset, len(one.after))
            for at in range(0, len(live), manifest.sector_size):
                end = at + manifest.sector_size
                if live[at:end] not in (one.before[at:end], one.after[at:end]):
                    raise RefusedError(
                        "a conversion in place was cut off, and the disk was used since",
                        subject=str(image.path),
                        hint=f"it starts as Generation 2; move {path} away to convert it anew",
                    )


def _forget(path: Path, files: Files) -> None:
    """Remove what was kept for a conversion that is taken back: its manifest first, then the journal of the way."""
    for kept in (manifest_path(path), journal_path(path)):
        if kept.exists():
            files.remove(kept)
