"""Disk images as a conversion meets them: opened for reading whatever their format, and written to as an overlay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from conversion.device import BlockDevice
from replica.errors import UsageError
from replica.nbd.qemu_nbd import served
from vhdx import qcow2
from vhdx.bulk import file_exists, name_file
from vhdx.convert import ConvertFormat, convert
from vhdx.create import create_disk
from vhdx.disk import Disk
from vhdx.errors import UnsupportedDiskError
from vhdx.formats import chain_of, detect_format, open_disk
from vhdx.osfile import OS_FILES, Files
from vhdx.progress import Progress, silent
from vhdx.temporary import temporary_path
from vhdx.writer import open_writable

OverlayFormat: TypeAlias = Literal["vhdx", "qcow2"]
Ranges: TypeAlias = Iterable[tuple[int, bytes]]  # (offset, data), in the order of writing

_QEMU_NAMES: Final = {"raw": "raw", "vhd": "vpc", "vhdx": "vhdx", "qcow2": "qcow2"}


@dataclass(frozen=True, slots=True)
class Image:
    """A disk image. ``folders`` are those in which its parents may lie, besides its own."""

    path: Path
    format: str
    folders: tuple[Path, ...] = ()

    @classmethod
    def find(cls, path: Path | str, *, format: str | None = None, folders: Sequence[Path | str] = ()) -> Image:  # noqa: A002
        """Name the image at ``path``, its format looked up where it is not given. Raises DiskError."""
        return cls(Path(path), format or detect_format(path), tuple(map(Path, folders)))

    def chain(self, disk: Disk) -> list[Path]:
        """Return the files that ``disk``, this image opened, is read from: its own, then its parents'."""
        if self.format == "qcow2":
            return qcow2.backing_chain(self.path, self.folders)
        return list(chain_of(disk))

    @contextmanager
    def opened(self) -> Iterator[Disk]:
        """Open it for reading, parents included. Raises DiskError."""
        if self.format == "qcow2":
            qcow2.backing_chain(self.path, self.folders)  # refuses what QEMU would follow out of these folders
            with served(self.path, format="qcow2") as disk:
                yield disk
        else:
            with open_disk(self.path, format=self.format, allowed_folders=self.folders) as disk:
                yield disk


def write_in_place(image: Image, groups: Iterable[Ranges], *, files: Files = OS_FILES) -> None:
    """Write into the image itself, each group durable before the next begins. Raises DiskError."""
    if image.format == "qcow2":
        for ranges in groups:
            qcow2.write_ranges(image.path, ranges)
        return
    with open_disk(image.path, writable=True, format=image.format, allowed_folders=image.folders, files=files) as disk:
        for ranges in groups:
            for offset, data in ranges:
                disk.write_at(offset, data)
            disk.flush()


def overlay_format(target: Path, source: Image) -> OverlayFormat:
    """Return what kind of overlay the name asks for. Raises UsageError where there is none such over the source."""
    suffix = target.suffix.lower()
    if suffix == ".qcow2":
        return "qcow2"
    if suffix in (".vhdx", ".avhdx"):
        if source.format != "vhdx":
            raise UsageError(
                f"a differencing VHDX needs a VHDX as its parent, and this is {source.format}",
                path=str(source.path),
                hint="name the overlay .qcow2, or make a whole copy with --format",
            )
        return "vhdx"
    raise UsageError(
        "what kind of overlay this is to be cannot be told from its name",
        path=str(target),
        hint="name it .vhdx (a differencing disk) or .qcow2, or make a whole copy with --format",
    )


def write_overlay(source: Image, target: Path, size: int, ranges: Ranges, check: Callable[[Image], None]) -> None:
    """Make an overlay over ``source`` that holds the ranges; it has its name once ``check`` has found it good.

    ``source`` is not written. Overlay and source lie in one folder, so that both can be moved. Raises DiskError,
    UsageError, and what ``check`` raises; there is no file then.
    """
    kind = overlay_format(target, source)
    if kind == "qcow2" and target.absolute().parent != source.path.absolute().parent:
        raise UsageError("an overlay must lie in the folder of its disk", path=str(target))

    def build(path: Path) -> None:
        if kind == "qcow2":
            qcow2.create_overlay(path, source.path, _QEMU_NAMES[source.format], size)
            qcow2.write_ranges(path, ranges)
            return
        create_disk(path, kind="differencing", parent=source.path)
        folders = (source.path.parent, *source.folders)
        with open_writable(path, allowed_folders=folders) as disk:
            for offset, data in ranges:
                disk.write_at(offset, data)
            disk.flush()

    _built(target, build, lambda path: check(Image(path, kind, (source.path.parent, *source.folders))))


def write_copy(
    source: Image,
    target: Path,
    format: ConvertFormat,  # noqa: A002 - what everyone calls it
    ranges: Ranges,
    check: Callable[[Image], None],
    *,
    progress: Progress = silent,
) -> None:
    """Make a whole copy of ``source`` in another format, with the ranges in it. Raises as ``write_overlay``."""

    def build(path: Path) -> None:
        if source.format == "qcow2" and len(qcow2.backing_chain(source.path, source.folders)) > 1:
            raise UnsupportedDiskError(
                "a qcow2 that builds on another is not copied", path=str(source.path), hint="make an overlay of it"
            )
        convert(
            source.path,
            path,
            format=format,
            source_format=source.format,
            allowed_folders=source.folders,
            progress=progress,
        )
        write_in_place(Image(path, format.partition("-")[0]), [ranges])

    _built(target, build, lambda path: check(Image(path, format.partition("-")[0])))


def _built(target: Path, build: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    if target.exists():
        raise file_exists(target)
    finished = temporary_path(target)
    try:
        build(finished)
        check(finished)
        name_file(OS_FILES, finished, target, overwrite=False)
    except BaseException:
        OS_FILES.remove(finished)
        raise


def as_device(disk: Disk) -> BlockDevice:
    """Return the disk as the converter sees it: the protocols agree, and this is where types say so."""
    return disk
