"""Hydration: turns a recovery point into disk files of any format, each whole before it has its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replica.block import BLOCK_BYTES
from replica.catalog import ProtectedVm
from replica.errors import UsageError
from replica.host import Host
from replica.model import DiskRecord, Point
from replica.restore import PointReader
from replica.stores.store import Store
from replica.workers import Workers
from vhdx import qcow2
from vhdx.bulk import file_exists, name_file
from vhdx.convert import CONVERT_FORMATS, ConvertFormat
from vhdx.osfile import OS_FILES, Files, open_file, translated
from vhdx.progress import Progress, silent
from vhdx.target import create_target
from vhdx.temporary import temporary_path

FORMATS: Final = CONVERT_FORMATS
LONGEST_NAME_BYTES: Final = 200
SUFFIXES: Final[dict[str, str]] = {
    "vhdx": ".vhdx",
    "vhdx-fixed": ".vhdx",
    "vhd": ".vhd",
    "vhd-dynamic": ".vhd",
    "raw": ".img",
    "qcow2": ".qcow2",
}


@dataclass(frozen=True, slots=True)
class HydratedDisk:
    """A disk that was restored into a file; every block of it was checked."""

    disk: int
    name: str
    path: Path
    format: str
    size_bytes: int
    data_bytes: int


def choose_disks(point: Point, wanted: Sequence[str]) -> list[DiskRecord]:
    """Return the point's disks that ``wanted`` names by number or name, or all of them. Raises UsageError."""
    if not wanted:
        return list(point.disks)
    chosen = []
    for one in wanted:
        found = [disk for disk in point.disks if one in (str(disk.number), disk.name)]
        if not found:
            known = ", ".join(f"{disk.number} ({disk.name})" for disk in point.disks)
            raise UsageError(f"point {point.point} has no disk {one!r}", hint=f"it has {known}")
        chosen.append(found[0])
    return chosen


def target_paths(disks: Sequence[DiskRecord], to: Path, format_: str, *, is_folder: bool) -> list[Path]:
    """Return where each disk goes: ``to`` itself for one disk, or files named after the disks in the folder ``to``.

    ``is_folder``: the user wrote it as one. Raises UsageError.
    """
    if is_folder or to.is_dir() or len(disks) > 1:
        return [to / f"{file_name(disk)}{SUFFIXES[format_]}" for disk in disks]
    return [to]


def file_name(disk: DiskRecord) -> str:
    """Return a file name for the disk. The name in the store is not trusted to be one."""
    kept = "".join(c if c.isalnum() or c in "-_ ." else "_" for c in disk.name).strip(" .")
    # Counted in bytes, as file systems do, with room for the suffix and for the temporary name around it.
    return kept.encode()[:LONGEST_NAME_BYTES].decode(errors="ignore").strip(" .") or f"disk{disk.number}"


def restore_files(
    store: Store,
    host: Host,
    found: ProtectedVm,
    point: Point,
    *,
    disks: Sequence[DiskRecord],
    paths: Sequence[Path],
    format_: ConvertFormat,
    overwrite: bool = False,
    workers: Workers | None = None,
    progress: Progress = silent,
    files: Files = OS_FILES,
) -> list[HydratedDisk]:
    """Restore ``disks`` of a point into new files at ``paths``, folders made where needed.

    Every block is checked against the hash taken when it was read; a file has its name only once it is whole and
    durable. Raises IntegrityError where the store is damaged, OsError where a file exists or the disk is full.
    """
    for path in paths:
        with translated(path, "look for the file"):
            exists = path.exists()
        if exists and not overwrite:
            raise file_exists(path)
    if len({os.path.normcase(os.path.abspath(path)) for path in paths}) != len(paths):  # noqa: PTH100 - no links followed
        raise UsageError("two disks would be restored into one file", hint="restore them one by one with --disk")
    reader = PointReader(store, host, found, point, workers or Workers())
    done = []
    for disk, path in zip(disks, paths, strict=True):
        with translated(path.parent, "make the folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(disk, path)
        if format_ == "qcow2":
            _restore_qcow2(reader, disk, path, overwrite, progress, files)
        else:
            with create_target(
                path, format_, disk.size, sector_size=disk.sector_size, overwrite=overwrite, files=files
            ) as target:
                reader.restore(disk, target, progress)
                target.commit()
        done.append(HydratedDisk(disk.number, disk.name, path, format_, disk.size, disk.data_blocks * BLOCK_BYTES))
    return done


def _restore_qcow2(
    reader: PointReader, disk: DiskRecord, path: Path, overwrite: bool, progress: Progress, files: Files
) -> None:
    plain, finished = temporary_path(path), temporary_path(path)
    try:
        with create_target(plain, "raw", disk.size, sector_size=disk.sector_size, files=files) as target:
            reader.restore(disk, target, progress)
            target.commit()
        qcow2.from_raw(plain, finished, size=disk.size, progress=progress)
        file = open_file(finished, writable=True)
        try:
            file.fsync()
        finally:
            file.close()
        name_file(files, finished, path, overwrite=overwrite)
    except BaseException:
        files.remove(finished)
        raise
    finally:
        files.remove(plain)


def _check_room(disk: DiskRecord, path: Path) -> None:
    """Raise UsageError where the blocks cannot fit: better said now than after an hour."""
    with translated(path.parent, "ask for the free space of the folder"):
        free = shutil.disk_usage(path.parent).free
    needed = disk.data_blocks * BLOCK_BYTES
    if needed > free:
        raise UsageError(
            f"{path.parent}: disk {disk.number} holds {needed} bytes of data and only {free} bytes are free",
            hint="free some space, or restore into another folder",
        )
