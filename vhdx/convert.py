"""Any format to any other: only what holds data is read, only what is not zero is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypedDict, get_args

import numpy as np

from vhdx import qcow2
from vhdx.bulk import file_exists, name_file
from vhdx.compare import compare
from vhdx.disk import Disk, Extents
from vhdx.errors import CorruptDiskError, OsError
from vhdx.extents import runs_of, total_length
from vhdx.formats import chain_of, detect_format, open_disk
from vhdx.osfile import OS_FILES, Files, translated
from vhdx.pieces import Buffers, worked
from vhdx.progress import Progress, silent
from vhdx.raw import RawDisk
from vhdx.target import Target, TargetFormat, create_target
from vhdx.temporary import temporary_path
from vhdx.told import told_as
from vhdx.windows import length_of

ConvertFormat: TypeAlias = TargetFormat | Literal["qcow2"]
CONVERT_FORMATS: Final[tuple[ConvertFormat, ...]] = (*get_args(TargetFormat), "qcow2")

CHUNK_BYTES: Final = 2 << 20  # read and written at a time: stays in the processor's cache between the two
GRANULE_BYTES: Final = 64 << 10  # what is looked at for being zero, and left out if it is
SAMPLED_WORDS: Final = 512  # of a granule, one in so many 8-byte words is looked at first


class _Options(TypedDict):
    format: ConvertFormat
    block_size: int | None
    overwrite: bool
    verify: bool
    progress: Progress
    files: Files


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did. All sizes are bytes."""

    source: Path
    target: Path
    format: ConvertFormat
    source_size: int
    target_size: int  # larger where the format needs whole MiB
    read_bytes: int
    written_bytes: int
    verified: bool


def convert(
    source: Path | str,
    target: Path | str,
    *,
    format: ConvertFormat,  # noqa: A002 - what everyone calls it
    source_format: str | None = None,
    allowed_folders: Sequence[Path | str] = (),
    block_size: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress = silent,
    files: Files = OS_FILES,
) -> Conversion:
    """Convert the image ``source``, its parents included, to a new one that stands by itself.

    The target appears under its name once it is whole and durable, and with ``verify`` compared with the source.
    Raises OsError where it exists and ``overwrite`` is not given, or would replace the source or a parent of it.
    """
    source, target = Path(source), Path(target)
    options: _Options = {
        "format": format,
        "block_size": block_size,
        "overwrite": overwrite,
        "verify": verify,
        "progress": progress,
        "files": files,
    }
    known = source_format or detect_format(source, files=files)
    if not overwrite and target.exists():
        raise file_exists(target)
    if known == "qcow2":
        return _from_qcow2(source, target, options)
    with open_disk(source, format=known, allowed_folders=allowed_folders, files=files) as disk:
        return convert_disk(disk, target, **options)


def convert_disk(
    source: Disk,
    target: Path | str,
    *,
    format: ConvertFormat,  # noqa: A002
    block_size: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress = silent,
    files: Files = OS_FILES,
) -> Conversion:
    """Convert an open disk, as ``convert`` does. Whatever keeps it from being finished leaves no target behind."""
    target = Path(target)
    if not overwrite and target.exists():
        raise file_exists(target)
    _refuse_own_files(source, target)
    finished = temporary_path(target)
    try:
        with told_as(target):
            if format == "qcow2":
                sizes = _build_qcow2(source, finished, progress, files)
            else:
                sizes = _build(source, finished, format, block_size, progress, files)
            if verify:
                _verify(source, finished, format, progress, files)
            name_file(files, finished, target, overwrite=overwrite)
    except BaseException:
        files.remove(finished)
        raise
    target_size, read_bytes, written_bytes = sizes
    return Conversion(source.path, target, format, source.size, target_size, read_bytes, written_bytes, verify)


def _refuse_own_files(source: Disk, target: Path) -> None:
    with translated(target, "look at the target"):
        if target.is_dir():
            raise OsError("the target is a folder", path=str(target), hint="name a file in it")
        if target.exists() and any(path.exists() and path.samefile(target) for path in chain_of(source)):
            raise OsError(
                "the target is the source itself or one of its parents", path=str(target), hint="choose another name"
            )


def _build(
    source: Disk,
    path: Path,
    format: TargetFormat,  # noqa: A002
    block_size: int | None,
    progress: Progress,
    files: Files,
) -> tuple[int, int, int]:
    """Write a new image at ``path``; return its virtual size, the bytes read and the bytes written."""
    with create_target(
        path, format, source.size, sector_size=source.sector_size, block_size=block_size, files=files
    ) as new:
        read_bytes, written_bytes = copy_content(source, new, progress=progress)
        new.commit()
        return new.size, read_bytes, written_bytes


def _build_qcow2(source: Disk, path: Path, progress: Progress, files: Files) -> tuple[int, int, int]:
    plain = temporary_path(path)
    try:
        sizes = _build(source, plain, "raw", None, progress, files)
        qcow2.from_raw(plain, path, size=source.size, progress=progress)
        _make_durable(path, files)
        return sizes
    finally:
        files.remove(plain)


def _from_qcow2(source: Path, target: Path, options: _Options) -> Conversion:
    plain = temporary_path(target)
    files = options["files"]
    try:
        with told_as(target):
            qcow2.to_raw(source, plain, progress=options["progress"])
        with RawDisk.open(plain, files=files) as disk:
            if target.exists() and source.samefile(target):
                raise OsError("the target is the source itself", path=str(target), hint="choose another name")
            return replace(convert_disk(disk, target, **options), source=source)
    finally:
        files.remove(plain)


def _make_durable(path: Path, files: Files) -> None:
    file = files.open(path, writable=True)
    try:
        file.fsync()
    finally:
        file.close()


def _verify(source: Disk, path: Path, format: ConvertFormat, progress: Progress, files: Files) -> None:  # noqa: A002
    """Read the finished file again and compare it with the source. Raises CorruptDiskError where it differs."""
    plain: Path | None = None
    try:
        if format == "qcow2":
            plain = temporary_path(path)
            qcow2.to_raw(path, plain, progress=progress)
        opened = "raw" if format == "qcow2" else format.partition("-")[0]
        with open_disk(plain or path, format=opened, files=files) as copy:
            result = compare(source, copy, progress=progress)
    finally:
        if plain is not None:
            files.remove(plain)
    if result.first_difference is not None:
        raise CorruptDiskError(
            "the copy differs from its source; it was thrown away",
            path=str(path),
            offset=result.first_difference,
            hint="run it again; if this comes back, look at the memory and the storage of this machine",
        )


def copy_content(source: Disk, target: Target, *, progress: Progress = silent) -> tuple[int, int]:
    """Write into ``target`` what ``source`` holds, zeros left out; return the bytes read and the bytes written.

    Pieces are copied by several threads, each from the one disk straight to the other: a piece handed from a reading
    thread to a writing one would wait for both. Memory: ``WORKERS`` pieces of ``CHUNK_BYTES``.
    """
    total_bytes = length_of(source.allocated())
    buffers = Buffers(CHUNK_BYTES)

    def copy(piece: tuple[int, int]) -> tuple[int, int]:
        start, end = piece
        taken = buffers.take()
        try:
            view = memoryview(taken[0])[: end - start]
            source.read_into(start, view)
            runs = nonzero_runs(view)
            target.prepare(runs + start)
            for first, last in runs.tolist():
                target.write_at(start + first, view[first:last])
        finally:
            buffers.give_back(taken)
        return end - start, total_length(runs)

    read_bytes = written_bytes = 0
    for read, written in worked(_pieces(source), copy):
        read_bytes += read
        written_bytes += written
        progress(min(read_bytes, total_bytes), total_bytes, "copying")
    return read_bytes, written_bytes


def _pieces(disk: Disk) -> Iterator[tuple[int, int]]:
    """Cut the allocated extents into pieces that begin on granules and have at most ``CHUNK_BYTES``."""
    position = 0
    for window in disk.allocated():
        for start, end in window.tolist():
            first = max(position, start // GRANULE_BYTES * GRANULE_BYTES)
            for piece in range(first, end, CHUNK_BYTES):
                yield piece, min(end, piece + CHUNK_BYTES)
            position = max(position, end)


def nonzero_runs(view: memoryview) -> Extents:
    """Return the runs of granules of ``view`` that hold anything but zeros, as byte ranges."""
    whole = len(view) // GRANULE_BYTES
    words = np.frombuffer(view[: whole * GRANULE_BYTES], dtype=np.uint64).reshape(whole, GRANULE_BYTES // 8)
    flags = np.zeros(whole + 1, dtype=np.bool_)
    # Data shows in a few words mostly; only granules whose sample is all zeros are looked through.
    flags[:whole] = words[:, ::SAMPLED_WORDS].any(axis=1)
    for granule in np.flatnonzero(~flags[:whole]).tolist():
        flags[granule] = words[granule].any()
    flags[whole] = np.frombuffer(view[whole * GRANULE_BYTES :], dtype=np.uint8).any()
    runs: Extents = np.minimum(runs_of(flags) * GRANULE_BYTES, len(view))
    return runs
