"""A new image of any format being filled: written under a temporary name, and there only once it is whole."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final, Literal, Protocol, Self, TypeAlias, get_args

from vhdx.bulk import file_exists, name_file
from vhdx.create import CreateOptions, create_disk
from vhdx.disk import Extents, ReadableBuffer
from vhdx.errors import UnsupportedDiskError
from vhdx.osfile import OS_FILES, Files
from vhdx.raw import RawDisk
from vhdx.temporary import temporary_path
from vhdx.vhd import VhdDisk, open_vhd
from vhdx.vhd_create import create_dynamic, create_fixed

TargetFormat: TypeAlias = Literal["vhdx", "vhdx-fixed", "vhd", "vhd-dynamic", "raw"]
TARGET_FORMATS: Final[tuple[TargetFormat, ...]] = get_args(TargetFormat)

VHD_SECTOR_SIZE: Final = 512


class Target(Protocol):
    """An image that is being made. ``write_at`` may come in any order; what is not written reads as zeros.

    ``commit`` makes it durable and gives it its name; leaving without throws it away. Writes come from one thread,
    but for ranges given to ``prepare``, to which any number of threads may write at once without overlap.
    """

    @property
    def path(self) -> Path:
        """Where the file will be."""

    @property
    def size(self) -> int:
        """Virtual size, bytes; a fixed VHD's is rounded up to whole MiB."""

    def prepare(self, extents: Extents) -> None:
        """Make ready for writes to these extents from several threads. Any of them may call it, too."""

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``. Raises OutOfRangeError, OsError."""

    def commit(self) -> None:
        """Flush the file and give it its name. Raises OsError; the file is thrown away then."""

    def abort(self) -> None:
        """Throw the file away. Safe to repeat, and after ``commit`` it does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def create_target(
    path: Path | str,
    format: TargetFormat,  # noqa: A002 - what everyone calls it
    size: int,
    *,
    sector_size: int = 512,
    block_size: int | None = None,
    overwrite: bool = False,
    files: Files = OS_FILES,
) -> Target:
    """Begin a new image of ``size`` bytes at ``path``.

    ``vhd`` is fixed, as Azure takes it; ``raw`` is sparse. ``block_size`` is for vhdx and vhd-dynamic.
    Raises OsError where a file of that name exists and ``overwrite`` is not given, OutOfRangeError for sizes that the
    format cannot have, UnsupportedDiskError for sector sizes that it cannot.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise file_exists(path)
    if format in ("vhdx", "vhdx-fixed"):
        options: CreateOptions = {
            "size": size,
            "kind": "fixed" if format == "vhdx-fixed" else "dynamic",
            "sector_size": sector_size,
            "overwrite": overwrite,
            "files": files,
        }
        if block_size is not None:
            options["block_size"] = block_size
        return create_disk(path, bulk=True, **options)
    if format not in TARGET_FORMATS:
        raise UnsupportedDiskError(f"there is no format {format!r}: choose from {', '.join(TARGET_FORMATS)}")
    temporary = temporary_path(path)
    if format == "raw":
        return PlainTarget(_new_raw(temporary, size, files), path, overwrite=overwrite, files=files)
    if sector_size != VHD_SECTOR_SIZE:
        raise UnsupportedDiskError(
            f"VHD has sectors of 512 bytes, and this disk has {sector_size}",
            path=str(path),
            hint="use VHDX, or raw: partition tables count in sectors and would be read wrong",
        )
    if format == "vhd":
        create_fixed(temporary, size, files=files)
    elif block_size is None:
        create_dynamic(temporary, size, files=files)
    else:
        create_dynamic(temporary, size, block_size=block_size, files=files)
    return PlainTarget(open_vhd(temporary, writable=True, files=files), path, overwrite=overwrite, files=files)


def _new_raw(temporary: Path, size: int, files: Files) -> RawDisk:
    file = files.open(temporary, create=True)
    try:
        file.truncate(size)
    except BaseException:
        file.close()
        files.remove(temporary)
        raise
    return RawDisk(file, size=size)


class PlainTarget:
    """A target that is an ordinary disk under a temporary name: raw and VHD."""

    def __init__(self, disk: RawDisk | VhdDisk, path: Path, *, overwrite: bool, files: Files) -> None:
        self._disk = disk
        self._path = path
        self._overwrite = overwrite
        self._files = files
        # Raw bytes and fixed VHDs may be written from several threads; a dynamic VHD's tables may not.
        self._serial = None if isinstance(disk, RawDisk) else threading.Lock()
        self._open = True

    @property
    def path(self) -> Path:
        """Where the file will be."""
        return self._path

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._disk.size

    def prepare(self, extents: Extents) -> None:
        """Do nothing: writes to these formats need no preparation."""

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``."""
        if self._serial is None:
            self._disk.write_at(offset, data)
            return
        with self._serial:
            self._disk.write_at(offset, data)

    def commit(self) -> None:
        """Flush the file and give it its name."""
        try:
            self._disk.close()
            name_file(self._files, self._disk.path, self._path, overwrite=self._overwrite)
        except BaseException:
            self.abort()
            raise
        self._open = False

    def abort(self) -> None:
        """Throw the file away."""
        if self._open:
            self._open = False
            try:
                self._disk.close()
            finally:
                self._files.remove(self._disk.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()
