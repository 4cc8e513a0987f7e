"""The file of a machine's disk, made of what the machine is to be started from: whole before it has its name.

A disk that a server at home in the machine's folder would give is read from the store in this process instead: whoever
writes all of it needs no server, and Windows has no sockets for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from replica import catalog, history
from replica.errors import PlatformError
from replica.generation.image import Image
from replica.host import this_host
from replica.nbd.disk import NbdDisk
from replica.nbd.wire import NbdError
from replica.platforms import servant
from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import nbd_address
from replica.platforms.platform import DiskSpec
from replica.serving import conversion_of
from replica.view import PointView
from vhdx.convert import ConvertFormat, convert_disk
from vhdx.disk import Disk
from vhdx.progress import Progress, silent


def make(
    folder: MachineFolder,
    disk: DiskSpec,
    path: Path,
    format: ConvertFormat,  # noqa: A002 - what everyone calls it
    *,
    environment: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> None:
    """Make the file at ``path``, which is not there, for the machine of ``folder``.

    ``environment`` holds the key and the store's credentials: ours unless given. Raises GodwitError, DiskError.
    """
    with opened(folder, disk, os.environ if environment is None else environment) as source:
        convert_disk(source, path, format=format, progress=progress)


def told_of(disk: int, progress: Progress) -> Progress:
    """Return what tells how far one of several disks is: each is a phase of its own."""
    return lambda done_bytes, total_bytes, phase: progress(done_bytes, total_bytes, f"{phase} disk {disk}")


@contextmanager
def opened(folder: MachineFolder, disk: DiskSpec, environment: Mapping[str, str]) -> Iterator[Disk]:
    """Open what the disk is to be made from. Raises GodwitError, DiskError."""
    if (folder.path / servant.CONFIGURATION).exists() and disk.url == servant.url(folder.path, disk.number):
        with _of_point(folder.path, disk.number, environment) as of_point:
            yield of_point
        return
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


@contextmanager
def _of_point(folder: Path, number: int, environment: Mapping[str, str]) -> Iterator[Disk]:
    """Open a disk of the point that the server of this folder would serve, its conversion laid over it."""
    spec = servant.read_spec(folder)
    store, loaded = servant.opened_store(spec, environment)
    host = this_host(None if spec.state_folder is None else Path(spec.state_folder))
    found = catalog.find(store, spec.tenant, spec.vm)
    point = history.point(store, found.keys, spec.point)
    conversion = servant.conversion_of(folder, spec)
    with ExitStack() as stack:
        views = {
            one.number: stack.enter_context(PointView(store, host, found, point, one, workers=loaded.workers))
            for one in point.disks
            if one.number == number or conversion is None
        }
        if number not in views:
            raise PlatformError(f"point {point.point} has no disk {number}")
        if conversion is None:
            conversion = conversion_of(point, views, spec.generation)
        yield conversion.applied(number, views[number])
