"""Where a cycle's disks come from: a change source opens all of a VM's disks as of one instant and tells what changed.

Four satisfy it: disk files at rest, here, the disks of a running QEMU, in ``replica.live``, those of a libvirt
domain, in ``replica.libvirt.source``, and those of a VM on a Hyper-V host, in ``replica.hyperv.source``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from replica.block import LARGEST_DISK_BYTES
from replica.errors import SourceError
from replica.failback.departure import Departure
from replica.host import Randomness
from replica.model import Consistency, DiskRecord, SourceDisk
from replica.tracking import Found, above, changes_since, identity
from vhdx.disk import Disk
from vhdx.errors import DiskError
from vhdx.formats import chain_of, open_disk

# How the address of a disk begins that is reached through its hypervisor; paths of files are absolute.
LIVE: Final = "qmp:"
LIBVIRT: Final = "libvirt:"
HYPERV: Final = "hyperv:"


class OpenDisk(Protocol):
    """How a disk file is opened for reading; injected so that tests can watch it."""

    def __call__(self, path: Path) -> Disk:
        """Open the file. Raises DiskError."""


def open_for_reading(path: Path) -> Disk:
    """Open a disk file of any format, with the parents that its own folder holds."""
    return open_disk(path)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a cycle asks of a change source: these disks, and what differs from ``before``, by disk number."""

    vm_id: str
    point: int  # the number that is to be published
    sources: tuple[SourceDisk, ...]  # in order of number
    before: Mapping[int, DiskRecord]
    randomness: Randomness
    based_on: int = 0  # the number of the point that ``before`` is of
    departure: Departure | None = None  # of a recovery machine that is replicated


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A protected disk that has been opened, what of it may have changed, and what a later cycle knows its state by."""

    source: SourceDisk
    disk: Disk
    found: Found
    about: dict[str, str]  # for the manifest


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Instant:
    """All disks of a VM as of one instant. ``acknowledge`` is called once a point of them is published, if ever.

    ``dismiss`` is called instead where none is going to be, once the context has ended.
    """

    disks: tuple[OpenSource, ...]
    consistency: Consistency
    acknowledge: Callable[[], None] = _nothing
    dismiss: Callable[[], None] = _nothing


class ChangeSource(Protocol):
    """Gives a VM's disks, consistently. A cycle that fails after it has opened them costs the next no knowledge."""

    def open(self, wanted: Wanted) -> AbstractContextManager[Instant]:
        """Open the disks; they read as of the instant while the context lasts.

        When the context ends without an error, it was so until then. Raises SourceError, DiskError.
        """


def change_source(sources: Sequence[SourceDisk], open_: OpenDisk = open_for_reading) -> ChangeSource:
    """Return what gives these disks. Raises SourceError where files and disks of a running machine are mixed."""
    live = [one for one in sources if is_live(one.path)]
    if not live:
        return FilesSource(open_)
    if len(live) != len(sources) or len({one.path.partition(":")[0] for one in live}) != 1:
        raise SourceError("disk files and disks of a running machine have no instant in common", path=live[0].path)
    if live[0].path.startswith(LIBVIRT):
        from replica.libvirt.source import LibvirtSource  # noqa: PLC0415 - files need none of it

        return LibvirtSource()
    if live[0].path.startswith(HYPERV):
        from replica.hyperv.source import HypervSource  # noqa: PLC0415 - files need none of it

        return HypervSource()
    from replica.live import LiveSource  # noqa: PLC0415 - files need none of it

    return LiveSource()


def is_live(path: str) -> bool:
    """Tell whether a disk's address is that of a machine's disk which its hypervisor gives, and not a file's."""
    return path.startswith((LIVE, LIBVIRT, HYPERV))


def name_of(path: str) -> str:
    """Return what a disk is called unless it is given a name: its file without suffix, its block node, its target."""
    return path.partition("#")[2] if is_live(path) else Path(path).stem


def looked_at(path: str, open_: OpenDisk) -> AbstractContextManager[Disk]:
    """Open one disk to learn what it is, at no certain instant. Raises DiskError, SourceError."""
    if not is_live(path):
        return open_(Path(path))
    if path.startswith(LIBVIRT):
        from replica.libvirt import source as libvirt_source  # noqa: PLC0415 - files need none of it

        return libvirt_source.look(path)
    if path.startswith(HYPERV):
        from replica.hyperv import source as hyperv_source  # noqa: PLC0415 - files need none of it

        return hyperv_source.look(path)
    from replica.live import look  # noqa: PLC0415 - files need none of it

    return look(path)


class FilesSource:
    """Disk files at rest, opened read-only and watched for changes while they are read."""

    def __init__(self, open_: OpenDisk = open_for_reading) -> None:
        self._open = open_

    @contextmanager
    def open(self, wanted: Wanted) -> Iterator[Instant]:
        """Open all files. When the context ends, every one that was read must be as it was when it was opened.

        Raises SourceError where it is not: the point would mix two instants; and DiskError where one cannot be opened.
        """
        with ExitStack() as stack:
            disks = []
            for source in wanted.sources:
                disk = stack.enter_context(self._open(Path(source.path)))
                if not 0 < disk.size <= LARGEST_DISK_BYTES:
                    raise SourceError(f"a disk of {disk.size} bytes cannot be protected", path=source.path)
                found = changes_since(disk, wanted.before.get(source.number))
                disks.append(OpenSource(source, disk, found, identity(disk) | above(disk)))
            before = [_fingerprints(one.disk) for one in disks]
            yield Instant(tuple(disks), Consistency.OFFLINE)
            for one, was in zip(disks, before, strict=True):
                changed = [path for path, mark in _fingerprints(one.disk).items() if was.get(path) != mark]
                if changed:
                    raise SourceError(
                        "the disk changed while it was being read, so nothing was published",
                        path=str(changed[0]),
                        hint="replicate it while the VM is off, from a checkpoint, or through its QEMU",
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
