"""Making an empty image of any format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhdx.convert import ConvertFormat
from vhdx.create import CreateOptions, create_disk
from vhdx.errors import UnsupportedDiskError
from vhdx.formats import open_disk
from vhdx.osfile import OS_FILES, Files
from vhdx.target import create_target
from vhdx.told import told_as

_FORMATS: Final[dict[str, ConvertFormat]] = {
    ".vhdx": "vhdx",
    ".avhdx": "vhdx",
    ".vhd": "vhd",
    ".raw": "raw",
    ".img": "raw",
    ".qcow2": "qcow2",
}


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image that was made."""

    path: Path
    format: ConvertFormat
    virtual_size: int  # bytes; a fixed VHD's is rounded up to whole MiB


def format_for(path: Path | str) -> ConvertFormat:
    """Return the format that a file's name ends in. Raises UnsupportedDiskError where it says nothing."""
    known = _FORMATS.get(Path(path).suffix.lower())
    if known is None:
        raise UnsupportedDiskError(
            "the name does not say which format is wanted", path=str(path), hint="name the format, vhdx for one"
        )
    return known


def create_image(
    path: Path | str,
    size: int | None,
    *,
    format: ConvertFormat,  # noqa: A002 - what everyone calls it
    parent: Path | str | None = None,
    block_size: int | None = None,
    sector_size: int | None = None,
    overwrite: bool = False,
    files: Files = OS_FILES,
) -> NewImage:
    """Make an empty image of ``size`` bytes, or a differencing VHDX on ``parent`` (``size`` None: the parent's).

    Raises OsError where the file exists, OutOfRangeError for sizes that the format cannot have, UnsupportedDiskError.
    """
    path = Path(path)
    with told_as(path):
        _create(path, size, format, parent, block_size, sector_size, overwrite, files)
    with open_disk(path, format=format.partition("-")[0], files=files) as disk:
        return NewImage(path, format, disk.size)


def _create(
    path: Path,
    size: int | None,
    format: ConvertFormat,  # noqa: A002
    parent: Path | str | None,
    block_size: int | None,
    sector_size: int | None,
    overwrite: bool,
    files: Files,
) -> None:
    if parent is not None:
        if format != "vhdx":
            raise UnsupportedDiskError("differencing disks are made as vhdx only", path=str(path))
        options: CreateOptions = {"parent": parent, "overwrite": overwrite, "files": files}
        if size is not None:
            options["size"] = size
        if block_size is not None:
            options["block_size"] = block_size
        if sector_size is not None:
            options["sector_size"] = sector_size
        create_disk(path, **options)
    elif size is None:
        raise UnsupportedDiskError("a disk without a parent needs a size", path=str(path))
    elif format == "qcow2":
        raise UnsupportedDiskError(
            "an empty qcow2 is not made here", path=str(path), hint="run qemu-img create -f qcow2"
        )
    else:
        with create_target(
            path,
            format,
            size,
            sector_size=sector_size or 512,
            block_size=block_size,
            overwrite=overwrite,
            files=files,
        ) as target:
            target.commit()
