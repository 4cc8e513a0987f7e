"""The disks of a protected VM, opened for a cycle: read-only, and watched for changes while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from replica.block import LARGEST_DISK_BYTES
from replica.errors import SourceError
from replica.model import Settings, SourceDisk
from vhdx.disk import Disk
from vhdx.errors import DiskError
from vhdx.formats import chain_of, open_disk


class OpenDisk(Protocol):
    """How a disk file is opened for reading; injected so that tests can watch it."""

    def __call__(self, path: Path) -> Disk:
        """Open the file. Raises DiskError."""


def open_for_reading(path: Path) -> Disk:
    """Open a disk file of any format, with the parents that its own folder holds."""
    return open_disk(path)


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A protected disk that has been opened."""

    source: SourceDisk
    disk: Disk


@contextmanager
def opened(settings: Settings, open_: OpenDisk = open_for_reading) -> Iterator[list[OpenSource]]:
    """Open all disks of a VM together, in order of number.

    When the context ends without an error, every file that was read must be as it was when it was opened.
    Raises SourceError where it is not: the point would mix two instants; and DiskError where a disk cannot be opened.
    """
    with ExitStack() as stack:
        disks = []
        for source in sorted(settings.sources, key=lambda one: one.number):
            disk = stack.enter_context(open_(Path(source.path)))
            if not 0 < disk.size <= LARGEST_DISK_BYTES:
                raise SourceError(f"a disk of {disk.size} bytes cannot be protected", path=source.path)
            disks.append(OpenSource(source, disk))
        before = [_fingerprints(one.disk) for one in disks]
        yield disks
        for one, was in zip(disks, before, strict=True):
            changed = [path for path, mark in _fingerprints(one.disk).items() if was.get(path) != mark]
            if changed:
                raise SourceError(
                    "the disk changed while it was being read, so nothing was published",
                    path=str(changed[0]),
                    hint="replicate it while the VM is off, or from a checkpoint",
                )


def _fingerprints(disk: Disk) -> dict[Path, tuple[int, int, int]]:
    """Return size and times of each file that the disk is made of."""
    marks = {}
    for path in chain_of(disk):
        try:
            status = path.stat()
        except OSError as error:
            raise DiskError("the file went away while it was being read", path=str(path)) from error
        marks[path] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return marks
