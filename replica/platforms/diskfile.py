"""The file of a machine's disk, made of what the machine is to be started from: whole before it has its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replica.errors import PlatformError
from replica.generation.image import Image
from replica.nbd.disk import NbdDisk
from replica.nbd.wire import NbdError
from replica.platforms.overlay import nbd_address
from replica.platforms.platform import DiskSpec
from vhdx.convert import ConvertFormat, convert_disk
from vhdx.disk import Disk
from vhdx.progress import Progress, silent


def make(disk: DiskSpec, path: Path, format: ConvertFormat, progress: Progress = silent) -> None:  # noqa: A002
    """Make the file at ``path``, which is not there. Raises PlatformError, DiskError."""
    with opened(disk) as source:
        convert_disk(source, path, format=format, progress=progress)


@contextmanager
def opened(disk: DiskSpec) -> Iterator[Disk]:
    """Open what the disk is to be made from. Raises PlatformError, DiskError."""
    if disk.url is None:
        if disk.path is None:
            raise PlatformError(f"disk {disk.number} is given neither as an address nor as a file")
        with Image(disk.path, disk.format).opened() as image:
            yield image
        return
    address, export = nbd_address(disk.url)
    try:
        with NbdDisk(address, export) as served:
            served.sector_size = disk.sector_size
            yield served
    except NbdError as error:
        raise PlatformError(f"disk {disk.number} cannot be read: {error}", path=disk.url, hint=error.hint) from error
