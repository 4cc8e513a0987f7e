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
from conversion.plan import SWITCH, TO_BIOS_ORDER, Plan
from conversion.tobios import plan_bios
from conversion.touefi import plan_uefi
from conversion.verify import verify
from replica.errors import UsageError
from replica.generation.image import Image, write_copy, write_in_place, write_overlay
from vhdx.bulk import file_exists
from vhdx.convert import ConvertFormat
from vhdx.errors import OsError
from vhdx.osfile import OS_FILES, translated
from vhdx.progress import Progress, silent
from vhdx.temporary import temporary_path

MANIFEST_SUFFIX: Final = ".conversion"
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
) -> GenerationChange:
    """Convert the OS disk at ``path``: as an overlay on it, as a whole copy of ``format``, or ``in_place``.

    ``manifest`` is the one that a disk of Generation 1 was converted by, to go back to 2; else it is looked for beside
    the image and its parents. Raises RefusedError with every reason, DiskError, ConversionError, UsageError.
    """
    image = Image.find(path, folders=folders)
    if in_place and to == 1 and not dry_run:
        _take_back_interrupted(image)
    saved, found_at = _manifest_for(image, to, manifest)
    with image.opened() as disk:
        if saved is None:
            plan = plan_bios(disk, discard_hibernation=discard_hibernation, largest_sectors=largest_sectors)
        else:
            plan = plan_uefi(disk, saved)
        if dry_run:
            return GenerationChange(path, None, None, plan)
        plan.require()  # raises where it is refused
        change = _Change(image, disk.size, plan, saved or plan.require_manifest(), list(plan.groups()))
    if in_place:
        change.in_place()
        if found_at == manifest_path(path):
            OS_FILES.remove(found_at)
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

    def in_place(self) -> None:
        """Write into the image, group by group; the manifest goes before."""
        if self.plan.manifest is not None:
            _write_manifest(manifest_path(self.image.path), self.plan.manifest, overwrite=False)
        write_in_place(self.image, self.groups)
        self._check(self.image)

    def beside(self, target: Path, format: ConvertFormat | None, progress: Progress) -> None:  # noqa: A002
        """Make an overlay on the image, or a copy of it; nothing is left of it where that fails."""
        if target.exists():
            raise file_exists(target)
        kept = manifest_path(target)
        if self.plan.manifest is not None:
            _write_manifest(kept, self.plan.manifest, overwrite=True)
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

    def _check(self, made: Image) -> None:
        with made.opened() as disk:
            wrong = verify(disk, self.plan, self.manifest)
        if wrong:
            raise DamagedError(
                " ".join(f"{one.subject}: {one.message} ({one.evidence})" for one in wrong),
                subject=str(made.path),
                hint="nothing was put in force; convert anew, and report it if it comes back",
            )


def _manifest_for(image: Image, to: Generation, given: Path | None) -> tuple[Manifest | None, Path | None]:
    """Return the manifest for the way back, and where it lies; None for the way there."""
    if to == 1:
        if given is not None:
            raise UsageError("a manifest is for the way back to Generation 2", path=str(given))
        return None, None
    path = given or manifest_path(image.path)
    if not path.exists():
        raise UsageError(
            "there is no manifest of the conversion to Generation 1, and without it there is no way back",
            path=str(path),
            hint="name it with --manifest; it was written beside the converted disk",
        )
    with translated(path, "read the manifest"):
        data = path.read_bytes()
    return Manifest.decode(data, name=str(path)), path


def _write_manifest(path: Path, manifest: Manifest, *, overwrite: bool) -> None:
    """Write it durably, before anything that needs it."""
    finished = temporary_path(path)
    try:
        file = OS_FILES.open(finished, create=True)
        try:
            file.pwrite(0, manifest.encode())
            file.fsync()
        finally:
            file.close()
        if overwrite:
            OS_FILES.replace(finished, path)
        elif not OS_FILES.link_exclusive(finished, path):
            raise OsError(
                "there is a conversion manifest already: the disk was converted before",
                path=str(path),
                hint="take the disk back with --to gen2 first, or move the manifest away",
            )
    except BaseException:
        OS_FILES.remove(finished)
        raise


def _take_back_interrupted(image: Image) -> None:
    """Take back a conversion in place that was cut off before its switch, so that it can begin anew.

    Until the switch the disk starts as it did: what was written before it goes back to what stood there, where it
    still is as it was written, in part or in whole. Raises RefusedError where the guest ran on it meanwhile.
    """
    path = manifest_path(image.path)
    if not path.exists():
        return
    with translated(path, "read the manifest"):
        manifest = Manifest.decode(path.read_bytes(), name=str(path))
    with image.opened() as disk:
        switch = manifest.component(SWITCH)
        if disk.size != manifest.size or switch is None or switch.stands(disk) or inspect(disk).generation != 2:
            return  # it is in force
        undone: list[tuple[int, bytes]] = []
        for name in reversed(TO_BIOS_ORDER):
            component = manifest.component(name)
            for one in component.ranges if component is not None else ():
                live = disk.read_at(one.offset, len(one.after))
                sectors = range(0, len(live), manifest.sector_size)
                for at in sectors:
                    end = at + manifest.sector_size
                    if live[at:end] not in (one.before[at:end], one.after[at:end]):
                        raise RefusedError(
                            "a conversion in place was cut off, and the disk was used since",
                            subject=str(image.path),
                            hint=f"it starts as Generation 2 as before; move {path} away to convert it anew",
                        )
                if live != one.before:
                    undone.append((one.offset, one.before))
    write_in_place(image, [undone])
    OS_FILES.remove(path)
