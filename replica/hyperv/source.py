"""The change source of Hyper-V VMs: a recovery checkpoint gives all disks at one instant, Hyper-V tells what changed.

A cycle makes a recovery checkpoint, so that the files beneath it are not written to; asks Hyper-V's resilient change
tracking what was written to them since the newest point's reference point; and reads that. Once the point is published
the checkpoint becomes the next reference point. What Hyper-V's tracking cannot tell is compared by hash: where the
reference point is gone, does not know a disk, or the disk is another, in another file, or of another size.

This was built to Microsoft's documentation and tested against a stand-in. It was never run against a Hyper-V host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from replica.block import LARGEST_DISK_BYTES
from replica.errors import SourceError
from replica.hyperv import connect as connecting
from replica.hyperv.address import HypervAddress, Take
from replica.hyperv.changes import changed_since
from replica.hyperv.files import HostFiles, open_chain
from replica.hyperv.frozen import newest_checkpoint
from replica.hyperv.instants import Reference, Taken, VmInstants
from replica.hyperv.machine import Drive, drive_at
from replica.hyperv.session import HypervError, Session, SessionError
from replica.model import DiskRecord, SourceDisk
from replica.source import Instant, OpenSource, Wanted
from replica.tracking import SCAN, Found, changes_since, identity
from vhdx.disk import Disk, Extents
from vhdx.vhdx import VhdxDisk

KIND: Final = "hyperv"
TRACKED: Final = "rct"  # a found_by
LABEL: Final = "instant"  # the label in a manifest's source


class HypervSource:
    """The disks of one VM on a Hyper-V host, as a ``ChangeSource``."""

    def __init__(self, *, connect: Callable[[str | None], Session] | None = None) -> None:
        """``connect`` opens a session with a host."""
        self._connect = connect or connecting.connect

    @contextmanager
    def open(self, wanted: Wanted) -> Iterator[Instant]:
        """Take the instant of all disks, readable while the context lasts. Raises SourceError, DiskError."""
        addresses = [HypervAddress.parse(one.path) for one in wanted.sources]
        first = _only_vm(addresses)
        with closing(self._connect(first.host)) as session:
            opened = _at_checkpoint if first.take is Take.CHECKPOINT else self._tracked
            with opened(session, first, addresses, wanted) as instant:
                yield instant

    @contextmanager
    def _tracked(
        self, session: Session, first: HypervAddress, addresses: Sequence[HypervAddress], wanted: Wanted
    ) -> Iterator[Instant]:
        vm = VmInstants(session, first.vm, wanted.vm_id)
        survey = vm.survey()
        reference = vm.settled(survey, _newest_label(wanted, first.vm))
        label = f"{wanted.point:020}-{wanted.randomness.new_id()}"
        taken = vm.take(label, first.take, survey.version)
        try:
            with ExitStack() as stack:  # files are let go before anything is asked of the checkpoint beneath them
                files = HostFiles(session, first.maps, here=first.host is None)
                disks = []
                for source, address in zip(wanted.sources, addresses, strict=True):
                    drive = drive_at(taken.drives, address.disk, first.name or first.vm)
                    disk = stack.enter_context(_opened(files, drive, source))
                    tracked = _Tracked(session, first.vm, drive, disk, reference)
                    about = tracked.about() | {LABEL: label}
                    if taken.why_not:
                        about["not_quiesced"] = taken.why_not[:300]
                    disks.append(OpenSource(source, disk, tracked.found(wanted.before.get(source.number)), about))
                yield Instant(
                    tuple(disks),
                    taken.consistency,
                    partial(self._acknowledge, first, wanted.vm_id, taken),
                    partial(self._dismiss, first, wanted.vm_id, taken),
                )
            if not vm.stands(taken):
                raise SourceError(
                    "the VM's checkpoint was removed while it was being read, so nothing was published",
                    path=first.name or first.vm,
                    hint="leave checkpoints of the type Recovery alone",
                )
        except BaseException:
            with suppress(SourceError):  # the next cycle removes it where this one cannot
                vm.discard(taken.snapshot)
            raise

    def _acknowledge(self, first: HypervAddress, vm_id: str, taken: Taken) -> None:
        """Turn the checkpoint into a reference point. Where that cannot be done now, the next cycle does it."""
        with suppress(SourceError), closing(self._connect(first.host)) as session:
            VmInstants(session, first.vm, vm_id).published(taken)

    def _dismiss(self, first: HypervAddress, vm_id: str, taken: Taken) -> None:
        """Remove the checkpoint. Where that cannot be done now, the next cycle does it."""
        with suppress(SourceError), closing(self._connect(first.host)) as session:
            VmInstants(session, first.vm, vm_id).discard(taken.snapshot)


@contextmanager
def look(path: str, *, connect: Callable[[str | None], Session] | None = None) -> Iterator[Disk]:
    """Open a disk of a VM to learn what it is, not to replicate it. Raises SourceError, DiskError.

    This makes a recovery checkpoint, as a cycle will, and removes it: what forbids it is known now.
    """
    address = HypervAddress.parse(path)
    with closing((connect or connecting.connect)(address.host)) as session, ExitStack() as stack:
        if address.take is Take.CHECKPOINT:
            drives = newest_checkpoint(session, address.vm).drives
        else:
            vm = VmInstants(session, address.vm, address.vm.replace("-", ""))  # no protected VM's ledger, but its own
            survey = vm.survey()
            vm.settled(survey, None)
            taken = vm.take("look", Take.CRASH, survey.version)
            stack.callback(vm.discard, taken.snapshot)
            drives = taken.drives
        files = HostFiles(session, address.maps, here=address.host is None)
        drive = drive_at(drives, address.disk, address.name or address.vm)
        yield stack.enter_context(_opened(files, drive, SourceDisk(0, address.disk, path)))


def _only_vm(addresses: Sequence[HypervAddress]) -> HypervAddress:
    if len({(one.host, one.vm) for one in addresses}) != 1:
        raise SourceError("the disks belong to several VMs, so they have no instant in common")
    return addresses[0]


def _newest_label(wanted: Wanted, vm: str) -> str | None:
    """Return the label of the newest point's instant, where that was one of this VM."""
    labels = {
        before.source[LABEL]
        for before in wanted.before.values()
        if before.source.get("kind") == KIND and before.source.get("vm") == vm and LABEL in before.source
    }
    return labels.pop() if len(labels) == 1 else None


@contextmanager
def _opened(files: HostFiles, drive: Drive, source: SourceDisk) -> Iterator[VhdxDisk]:
    with open_chain(files, drive.path) as disk:
        if not 0 < disk.size <= LARGEST_DISK_BYTES:
            raise SourceError(f"a disk of {disk.size} bytes cannot be protected", path=source.path)
        yield disk


@dataclass(frozen=True, slots=True)
class _Tracked:
    """A disk that stands still beneath a recovery checkpoint."""

    session: Session
    vm: str
    drive: Drive
    disk: VhdxDisk
    reference: Reference | None

    def about(self) -> dict[str, str]:
        """Return what a later cycle knows the disk by, beside the label."""
        return {
            "kind": KIND,
            "vm": self.vm,
            "disk": self.drive.position,
            "file": self.drive.path,
            "virtual_disk_id": str(self.disk.image.metadata.disk_id),
        }

    def found(self, before: DiskRecord | None) -> Found:
        """Ask Hyper-V what changed, where everything says that it can know."""
        other = self._other_than(before)
        if other:
            return Found(SCAN, other)
        limit = self.reference.limit(self.drive) if self.reference is not None else None
        if limit is None:
            why = "is gone" if self.reference is None else "does not tell which tracking is the disk's"
            return Found(SCAN, f"the reference point of the newest point {why}")
        try:
            changed = changed_since(self.session, self.drive.path, limit, self.disk.size)
        except SessionError:
            raise
        except HypervError as error:
            return Found(SCAN, f"Hyper-V cannot tell what was written: {error.message}"[:300])
        return Found(TRACKED, "Hyper-V recorded the writes since the newest point", partial(_one, changed))

    def _other_than(self, before: DiskRecord | None) -> str:
        """Return why the disk is not the one that ``before`` was read from, or nothing."""
        if before is None:
            return "the disk is new"
        other = {name for name, value in self.about().items() if before.source.get(name) != value}
        if "file" in other and other <= {"file", "virtual_disk_id"}:
            return "the disk is in another file: it was moved, or a checkpoint was made, removed or applied"
        if other:
            return "the newest point was read from another disk"
        return "" if before.size == self.disk.size else "the disk's size is another"


def _one(changed: Extents) -> Iterator[Extents]:
    if len(changed):
        yield changed


# -- checkpoints that others make -------------------------------------------------------------------------------------


@contextmanager
def _at_checkpoint(
    session: Session, first: HypervAddress, addresses: Sequence[HypervAddress], wanted: Wanted
) -> Iterator[Instant]:
    """Give the disks as of the VM's newest checkpoint, or its files where it is off: chains tell what changed."""
    if _newest_label(wanted, first.vm) is not None:  # it was tracked until now
        vm = VmInstants(session, first.vm, wanted.vm_id)
        vm.settled(vm.survey(), None)
    newest = newest_checkpoint(session, first.vm)
    with ExitStack() as stack:
        files = HostFiles(session, first.maps, here=first.host is None)
        disks = []
        for source, address in zip(wanted.sources, addresses, strict=True):
            drive = drive_at(newest.drives, address.disk, first.name or first.vm)
            disk = stack.enter_context(_opened(files, drive, source))
            at_hand = first.host is None or files.mapped(drive.path) is not None
            found = (
                changes_since(disk, wanted.before.get(source.number))
                if at_hand
                else Found(SCAN, "files read through the session tell nothing of their state")
            )
            about = {**(identity(disk) if at_hand else {}), "kind": KIND, "vm": first.vm, "disk": address.disk}
            disks.append(OpenSource(source, disk, found, about))
        yield Instant(tuple(disks), newest.consistency)
        if newest_checkpoint(session, first.vm) != newest:
            raise SourceError(
                "the VM's newest checkpoint became another while it was being read, so nothing was published",
                path=first.name or first.vm,
                hint="replicate it again",
            )
