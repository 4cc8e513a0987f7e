"""The change source of libvirt domains: backup jobs give all disks at one instant, checkpoints tell what changed.

A running domain: one call begins a backup job in pull mode over all disks and makes a checkpoint, whose bitmaps QEMU
keeps in the qcow2 images; the disks are read over NBD while the guest writes on. The newest point's manifest names the
checkpoint that was made with it. Its name is random in part, and its bitmaps came into being at that very instant:
where libvirt still finds them whole, they hold every write since. Those of cycles that failed are deleted by the next,
and older ones once a point is published. Disks of other formats are compared by hash, at the same instant. Of a
recovery machine the first cycle has the checkpoint that was there before its guest (docs/failover.md, rule 8).

A domain that is off: its disks are files at rest, read as such and compared by hash, all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from replica.agent import Quiesced
from replica.block import LARGEST_DISK_BYTES
from replica.errors import SourceError
from replica.failback.departure import recorded_and
from replica.libvirt import checkpoints
from replica.libvirt.address import LibvirtAddress
from replica.libvirt.backup import BITMAP_EXPORT, LOOKING, BackupJob, Begun, JobDisk, ended
from replica.libvirt.checkpoints import CheckpointNames
from replica.libvirt.domain import Domain, DomainDisk, read_domain
from replica.libvirt.freeze import domain_quiesced
from replica.libvirt.virsh import Virsh
from replica.model import Consistency, DiskRecord, SourceDisk
from replica.nbd.disk import NbdDisk
from replica.nbd.qemu_nbd import served
from replica.nbd.wire import NbdGoneError
from replica.scratch import default_scratch_folder, require_room, room_watched
from replica.source import Instant, OpenSource, Wanted
from replica.tracking import SCAN, Found
from vhdx.disk import Disk, Extents
from vhdx.errors import DiskError
from vhdx.extents import EMPTY
from vhdx.raw import RawDisk

KIND: Final = "libvirt"
BITMAP: Final = "bitmap"  # a found_by
CHECKPOINT: Final = "checkpoint"  # the checkpoint's name in a manifest's source
_FORMATS: Final = {"vpc": "vhd"}


class LibvirtSource:
    """The disks of one libvirt domain, as a ``ChangeSource``."""

    def __init__(self, *, scratch_folder: Path | None = None, timeout_seconds: float = 60) -> None:
        """Scratch files and a socket lie in ``scratch_folder``, or where the system keeps large temporary files."""
        self._scratch = scratch_folder or default_scratch_folder()
        self._timeout = timeout_seconds

    @contextmanager
    def open(self, wanted: Wanted) -> Iterator[Instant]:
        """Take the instant of all disks, readable while the context lasts. Raises SourceError, DiskError."""
        addresses = [LibvirtAddress.parse(one.path) for one in wanted.sources]
        virsh, domain = _only_domain(addresses, self._timeout)
        disks = [domain.disk(one.disk) for one in addresses]
        freeze = domain.has_agent and all(one.freeze for one in addresses)
        opened = self._running if domain.active else _off
        with opened(virsh, domain, disks, wanted, freeze) as instant:
            yield instant

    @contextmanager
    def _running(
        self, virsh: Virsh, domain: Domain, disks: Sequence[DomainDisk], wanted: Wanted, freeze: bool
    ) -> Iterator[Instant]:
        require_room(self._scratch)
        names = CheckpointNames.of(wanted)
        job = BackupJob(virsh, domain.uuid, wanted.vm_id, self._scratch, timeout_seconds=self._timeout)
        with ExitStack() as stack:
            stack.enter_context(ended(job))
            there = checkpoints.existing(virsh, domain.uuid, names)
            plans = [
                _plan(domain, disk, source.number, wanted, there)
                for source, disk in zip(wanted.sources, disks, strict=True)
            ]
            needed = {one.since for one in plans}
            checkpoints.delete(virsh, domain.uuid, [name for name in there if name not in needed])
            asked = [
                JobDisk(disk, source.number, plan.since)
                for source, disk, plan in zip(wanted.sources, disks, plans, strict=True)
            ]
            others = [one.target for one in domain.disks if one not in disks]
            with domain_quiesced(virsh, domain.uuid) if freeze else nullcontext(Quiesced()) as state:
                begun = job.begin(asked, others, names.new)
            opened = []
            for source, one, plan in zip(wanted.sources, begun.disks, plans, strict=True):
                disk = stack.enter_context(_connected(job, source, one, self._timeout))
                before = wanted.before.get(source.number)
                found = _found(disk, one, plan, before, begun)
                opened.append(OpenSource(source, disk, found, _about(domain, one.disk, begun, state)))
            stack.enter_context(room_watched(job, self._scratch))
            yield Instant(
                tuple(opened),
                Consistency.APPLICATION if state.held else Consistency.CRASH,
                partial(_acknowledge, virsh, domain.uuid, names, begun.checkpoint),
            )


@contextmanager
def look(path: str, *, scratch_folder: Path | None = None, timeout_seconds: float = 60) -> Iterator[Disk]:
    """Open a disk of a domain to learn what it is, not to replicate it. Raises SourceError, DiskError.

    Of a running domain this begins a backup job, as a cycle will: what forbids it is known now.
    """
    address = LibvirtAddress.parse(path)
    virsh, domain = _only_domain([address], timeout_seconds)
    disk = domain.disk(address.disk)
    with ExitStack() as stack:
        if not domain.active:
            yield stack.enter_context(_file_opened(disk, domain))
            return
        folder = scratch_folder or default_scratch_folder()
        job = BackupJob(virsh, domain.uuid, LOOKING, folder, timeout_seconds=timeout_seconds)
        stack.enter_context(ended(job))
        one = JobDisk(disk, 0)
        job.begin([one], [other.target for other in domain.disks if other != disk], None)
        yield stack.enter_context(_connected(job, SourceDisk(0, address.disk, path), one, timeout_seconds))


def _only_domain(addresses: Sequence[LibvirtAddress], timeout_seconds: float) -> tuple[Virsh, Domain]:
    if len({(one.connect, one.domain) for one in addresses}) != 1:
        raise SourceError("the disks belong to several domains, so they have no instant in common")
    first = addresses[0]
    if first.connect and urlsplit(first.connect).hostname:
        raise SourceError(
            "the domain runs on another host: its disks are read through a socket of this one",
            path=first.connect,
            hint="run godwit where the domain runs",
        )
    virsh = Virsh(first.connect, timeout_seconds=timeout_seconds)
    return virsh, read_domain(virsh, first.domain)


# -- a domain that runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """The checkpoint that recorded since the newest point, None where there is none to be trusted, and why."""

    since: str | None
    why: str
    converted: Extents = field(default_factory=EMPTY.copy)  # what differs from the point beside what was recorded


def _plan(domain: Domain, disk: DomainDisk, number: int, wanted: Wanted, there: Sequence[str]) -> _Plan:
    before = wanted.before.get(number)
    if not disk.writable:
        raise SourceError(
            f"{disk.target} is read-only, transient or shared with others now, so libvirt makes no backup of it",
            path=domain.name,
        )
    if before is None:
        return _Plan(None, "the disk is new")
    if not disk.keeps_bitmaps:
        return _Plan(None, f"QEMU keeps no record of writes with {disk.format} disks")
    told = {name: before.source.get(name) for name in ("kind", "domain", "disk", "file")}
    if told != {"kind": KIND, "domain": domain.uuid, "disk": disk.target, "file": disk.place}:
        return _since_departure(number, wanted, there)
    name = before.source.get(CHECKPOINT)
    if name is None:
        return _Plan(None, "no checkpoint was made with the newest point")
    if name not in there:
        return _Plan(None, "the checkpoint of the newest point is gone")
    return _Plan(name, "QEMU recorded the writes since the newest point")


def _since_departure(number: int, wanted: Wanted, there: Sequence[str]) -> _Plan:
    """Plan the first delta of a recovery machine's disk, by the checkpoint that was there before its guest.

    Whether its bitmaps are whole libvirt knows: they are in the disk, and marked while they are in use. They record on
    when others are begun and deleted.
    """
    start = wanted.departure
    if start is None or start.bitmap is None:
        return _Plan(None, "the newest point was read from elsewhere")
    if wanted.based_on != start.point:
        return _Plan(None, f"the machine was started from point {start.point}, which is not the newest")
    if start.bitmap not in there:
        return _Plan(None, "the checkpoint that was made with the machine is gone")
    why = f"the disk recorded the writes since the machine was started from point {start.point}"
    return _Plan(start.bitmap, why, start.ranges(number))


def _found(disk: NbdDisk, one: JobDisk, plan: _Plan, before: DiskRecord | None, begun: Begun) -> Found:
    """Tell how the changes are found, now that the job has begun and the disk's size is known."""
    if plan.since is None:
        return Found(SCAN, plan.why)
    if one.since is None:
        return Found(SCAN, f"the record of writes is not whole: {begun.refusals[0]}")
    if before is None or before.size != disk.size:
        return Found(SCAN, "the disk's size is another")
    return Found(BITMAP, plan.why, partial(_changed, disk, plan.converted))


def _changed(disk: NbdDisk, also: Extents) -> Iterator[Extents]:
    return recorded_and(also, disk.changed(BITMAP_EXPORT), disk.size)


def _about(domain: Domain, disk: DomainDisk, begun: Begun, state: Quiesced) -> dict[str, str]:
    """Return what a later cycle knows the disk's state by."""
    about = {"kind": KIND, "domain": domain.uuid, "disk": disk.target, "file": disk.place}
    if begun.checkpoint is not None and disk.keeps_bitmaps:
        about[CHECKPOINT] = begun.checkpoint
    elif disk.keeps_bitmaps:
        about["not_tracked"] = begun.refusals[-1]
    if state.why_not:
        about["not_quiesced"] = state.why_not
    return about


def _connected(job: BackupJob, source: SourceDisk, one: JobDisk, timeout_seconds: float) -> NbdDisk:
    image_format = _FORMATS.get(one.disk.format, one.disk.format)
    try:
        disk = NbdDisk(job.address, one.export, name=source.path, format=image_format, timeout_seconds=timeout_seconds)
    except NbdGoneError as error:
        raise SourceError(
            f"the disk that libvirt serves cannot be read: {error.message}",
            path=source.path,
            hint="run godwit as root, or as the user that QEMU runs as: the socket is that user's",
        ) from error
    disk.sector_size = one.disk.sector_size
    if not 0 < disk.size <= LARGEST_DISK_BYTES:
        disk.close()
        raise SourceError(f"a disk of {disk.size} bytes cannot be protected", path=source.path)
    return disk


def _acknowledge(virsh: Virsh, uuid: str, names: CheckpointNames, newest: str | None) -> None:
    """Delete the checkpoints that no cycle needs any more. What cannot be deleted now, the next cycle deletes."""
    with suppress(SourceError):
        there = checkpoints.existing(virsh, uuid, names)
        checkpoints.delete(virsh, uuid, [name for name in there if name != newest])


# -- a domain that is off ---------------------------------------------------------------------------------------------


@contextmanager
def _off(virsh: Virsh, domain: Domain, disks: Sequence[DomainDisk], wanted: Wanted, freeze: bool) -> Iterator[Instant]:
    """Give the disks as files at rest. Raises SourceError where the domain was started, or a file changed."""
    marks = [_marks(one) for one in disks]
    with ExitStack() as stack:
        opened = []
        for source, disk in zip(wanted.sources, disks, strict=True):
            file = stack.enter_context(_file_opened(disk, domain))
            if not 0 < file.size <= LARGEST_DISK_BYTES:
                raise SourceError(f"a disk of {file.size} bytes cannot be protected", path=source.path)
            about = {"kind": KIND, "domain": domain.uuid, "disk": disk.target, "file": disk.place}
            opened.append(OpenSource(source, file, Found(SCAN, "the domain is off: its files are compared"), about))
        began = SourceError(
            "the domain was started, or its disks changed, while they were being read, so nothing was published",
            path=domain.name,
            hint="replicate it again: a running domain is read through libvirt",
        )

        def is_as_it_was() -> bool:
            return [_marks(one) for one in disks] == marks and not read_domain(virsh, domain.uuid).active

        try:
            yield Instant(tuple(opened), Consistency.OFFLINE)
        except DiskError as error:  # an image that is written to may look damaged
            if not is_as_it_was():
                raise began from error
            raise
        if not is_as_it_was():
            raise began


def _file_opened(disk: DomainDisk, domain: Domain) -> AbstractContextManager[Disk]:
    if not disk.place:
        raise SourceError(
            f"{disk.target} is on the network: it can be read only while the domain runs", path=domain.name
        )
    path = Path(disk.place)
    if disk.format == "raw" and disk.kind == "file":
        return _raw_opened(path, disk.sector_size)
    return _image_opened(path, disk)


@contextmanager
def _raw_opened(path: Path, sector_size: int) -> Iterator[Disk]:
    disk = RawDisk.open(path)
    try:
        disk.sector_size = sector_size
        yield disk
    finally:
        disk.close()


@contextmanager
def _image_opened(path: Path, disk: DomainDisk) -> Iterator[Disk]:
    # Nobody must be kept from starting the domain: what was read is thrown away then. A device has no lock of QEMU's.
    with served(path, format=disk.format, locked=disk.kind != "file") as image:
        image.sector_size = disk.sector_size
        image.format = _FORMATS.get(disk.format, disk.format)
        yield image


def _marks(disk: DomainDisk) -> list[tuple[int, int, int]]:
    """Return size, time and identity of each file that the disk is known to be made of."""
    marks = []
    for place in (disk.place, *disk.backing):
        if place:
            try:
                status = Path(place).stat()
            except OSError as error:
                raise SourceError(f"the disk's file cannot be looked at: {error.strerror}", path=place) from error
            marks.append((status.st_size, status.st_mtime_ns, status.st_ino))
    return marks
