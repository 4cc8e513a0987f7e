"""The change source of a running QEMU: its dirty bitmaps tell what changed, and all disks are read as of one instant.

For the time of a cycle QEMU copies what the guest is about to overwrite into a scratch overlay (a backup job that
copies nothing else), and the overlay is read over NBD. One transaction over all disks begins that, puts a new bitmap
in place and stops the one in use. The newest point's manifest names the bitmap that records since that point. A bitmap
is never dropped before another point is published; those of cycles that failed are merged into it by the next. So
after a failure at any place at most too much is compared, never too little. Of a recovery machine the first cycle has
the bitmap that was begun before its guest (docs/failover.md, rule 8), which is kept in the disk and is taken over.

All that QEMU is given carries a prefix, by which the next cycle removes what one that was killed left behind.
Open files are passed through the monitor's socket: QEMU needs no right to any path of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from replica.agent import Quiesced, quiesced
from replica.block import BLOCK_BYTES, LARGEST_DISK_BYTES
from replica.errors import SourceError
from replica.failback.departure import Departure, recorded_and
from replica.model import Consistency, DiskRecord, SourceDisk
from replica.monitor import Monitor
from replica.nbd.disk import NbdDisk
from replica.qemu import LOOKING, LiveAddress, Machine, Node, attached
from replica.scratch import Overlay, default_scratch_folder, require_room, room_watched
from replica.source import Instant, OpenSource, Wanted
from replica.tracking import SCAN, Found
from vhdx.disk import Disk, Extents
from vhdx.extents import EMPTY

BITMAP: Final = "bitmap"  # a found_by, and the name in a manifest's source
KIND: Final = "qemu"


class LiveSource:
    """The disks of one running QEMU, as a ``ChangeSource``."""

    def __init__(self, *, scratch_folder: Path | None = None, timeout_seconds: float = 30) -> None:
        """Scratch overlays lie in ``scratch_folder``, or where the system keeps large temporary files."""
        self._scratch = scratch_folder or default_scratch_folder()
        self._timeout = timeout_seconds

    @contextmanager
    def open(self, wanted: Wanted) -> Iterator[Instant]:
        """Take the instant of all disks, and keep it readable while the context lasts. Raises SourceError, NbdError."""
        addresses = [LiveAddress.parse(one.path) for one in wanted.sources]
        first = _only_machine(addresses)
        with ExitStack() as stack:
            vm = stack.enter_context(attached(first.monitor, wanted.vm_id, self._timeout))
            bitmaps = _Bitmaps(wanted)
            disks = [_plan(vm, bitmaps, wanted, one, at) for one, at in zip(wanted.sources, addresses, strict=True)]
            require_room(self._scratch)
            overlays = [Overlay.make(vm, one.source.number, one.address.node, one.size, self._scratch) for one in disks]
            actions = [action for one in disks for action in one.actions(bitmaps.new)]
            actions += [overlay.action(vm) for overlay in overlays]
            with _quiesced(vm, first.agent) as state:
                vm.monitor.execute("transaction", actions=actions)
            for one in disks:
                vm.drop_bitmaps(one.address.node, one.done)
            vm.serve()
            opened = []
            for one, overlay in zip(disks, overlays, strict=True):
                disk = stack.enter_context(one.exported(vm, overlay.node))
                opened.append(one.opened(disk, bitmaps.new, state))
            consistency = Consistency.APPLICATION if state.held else Consistency.CRASH
            stack.enter_context(room_watched(vm, self._scratch))
            yield Instant(tuple(opened), consistency, partial(self._acknowledge, wanted, disks))

    def _acknowledge(self, wanted: Wanted, disks: Sequence[_Planned]) -> None:
        """Drop the bitmaps that recorded until this point. What cannot be dropped now, the next cycle drops."""
        with suppress(SourceError), Monitor(disks[0].address.monitor, timeout_seconds=self._timeout) as monitor:
            vm = Machine(monitor, wanted.vm_id, self._timeout)
            for one in disks:
                vm.drop_bitmaps(one.address.node, [one.named] if one.named else [])


@contextmanager
def look(path: str, *, timeout_seconds: float = 30) -> Iterator[Disk]:
    """Open a disk of a running QEMU as it is at each moment: to learn what it is, not to replicate it."""
    address = LiveAddress.parse(path)
    with ExitStack() as stack:
        vm = stack.enter_context(attached(address.monitor, LOOKING, timeout_seconds))
        about = vm.node(address)
        source = SourceDisk(0, address.node, path)
        one = _Planned(source, address, about.size, Found(SCAN, "looked at"), about.file, about.format)
        vm.serve()
        yield stack.enter_context(one.exported(vm, address.node))


def _quiesced(vm: Machine, agent: str | None) -> AbstractContextManager[Quiesced]:
    """Freeze the guest, unless QEMU knows that nobody in it has the agent's channel open: that is not waited for."""
    if agent is None:
        return nullcontext(Quiesced())
    for one in vm.monitor.rows("query-chardev"):
        if f"unix:{agent}," in f"{one.get('filename')}," and one.get("frontend-open") is False:
            return nullcontext(Quiesced(why_not="no guest agent runs in the guest"))
    return quiesced(agent)


def _only_machine(addresses: Sequence[LiveAddress]) -> LiveAddress:
    if len({(one.monitor, one.agent) for one in addresses}) != 1:
        raise SourceError("the disks belong to several running machines, so they have no instant in common")
    return addresses[0]


# -- what is planned for a disk ---------------------------------------------------------------------------------------


class _Bitmaps:
    """The names of a VM's bitmaps: prefix, the number of the point that each begins at, a random end."""

    def __init__(self, wanted: Wanted) -> None:
        self.prefix = f"godwit-{wanted.vm_id}-"
        self.new = f"{self.prefix}{wanted.point:020}-{wanted.randomness.new_id()[:8]}"

    def is_later(self, name: str, than: str) -> bool:
        """Tell whether a bitmap was made by an attempt after the point of ``than``; names order as numbers do."""
        end = len(self.prefix) + 20
        return name[:end] > than[:end]

    def is_after(self, name: str, point: int) -> bool:
        """Tell whether a bitmap was made by an attempt after the point of that number."""
        return self.is_later(name, f"{self.prefix}{point:020}")


@dataclass(frozen=True, slots=True)
class _Planned:
    """A disk, how its changes are found, and what is to happen to its bitmaps."""

    source: SourceDisk
    address: LiveAddress
    size: int
    found: Found
    file: str = ""
    format: str = "raw"
    named: str | None = None  # the bitmap that the newest point's manifest names, and that is to be trusted
    merged: list[str] = field(default_factory=list)  # of attempts since
    stale: list[str] = field(default_factory=list)
    converted: Extents = field(default_factory=EMPTY.copy)  # what differs from the point beside what was recorded

    @property
    def done(self) -> list[str]:
        """Bitmaps that nothing needs any more once the transaction is through."""
        return self.merged + self.stale

    def actions(self, new: str) -> list[dict[str, Any]]:
        """Return what the transaction does to the bitmaps, the new one first: nothing is ever unrecorded."""
        node = self.address.node

        def action(kind: str, name: str, **data: Any) -> dict[str, Any]:
            return {"type": f"block-dirty-bitmap-{kind}", "data": {"node": node, "name": name, **data}}

        made = [action("add", new, granularity=BLOCK_BYTES)]
        if self.named is not None:
            made += [action("disable", name) for name in (*self.merged, self.named)]
            if self.merged:
                merge = {"node": node, "target": self.named, "bitmaps": self.merged}
                made.append({"type": "block-dirty-bitmap-merge", "data": merge})
        return made

    def exported(self, vm: Machine, node: str) -> NbdDisk:
        """Export ``node`` as this disk, with the bitmap that tells what changed."""
        bitmap = (self.address.node, self.named) if self.named is not None else ()
        return vm.export(node, self.source.number, name=self.source.path, image_format=self.format, bitmap=bitmap)

    def opened(self, disk: NbdDisk, new: str, state: Quiesced) -> OpenSource:
        """Return the disk for the cycle."""
        about = {"kind": KIND, "node": self.address.node, "file": self.file, BITMAP: new}
        if state.why_not:
            about["not_quiesced"] = state.why_not
        found = self.found
        if self.named is not None:
            found = Found(BITMAP, found.why, partial(_changed, disk, self.named, self.converted))
        return OpenSource(self.source, disk, found, about)


def _plan(vm: Machine, bitmaps: _Bitmaps, wanted: Wanted, source: SourceDisk, address: LiveAddress) -> _Planned:
    about = vm.node(address)
    if about.read_only:
        raise SourceError(
            "the node is read-only: another was put above it, as by a snapshot, or it never changes",
            path=source.path,
            hint="name the node that the VM writes to, with 'godwit protect --update'",
        )
    if not 0 < about.size <= LARGEST_DISK_BYTES:
        raise SourceError(f"a disk of {about.size} bytes cannot be protected", path=source.path)
    ours = {name: state for name, state in about.bitmaps.items() if name.startswith(bitmaps.prefix)}
    before = wanted.before.get(source.number)
    named, why = _trusted(ours, before, address, about.size)
    merged = [name for name in ours if named is not None and name != named and bitmaps.is_later(name, named)]
    if named is not None and not all(_is_usable(ours[name]) for name in merged):
        named, merged, why = None, [], "a bitmap of an attempt since cannot be read"
    converted = EMPTY
    if named is None and _begun_with(wanted, about):
        named, merged, why, converted = _since_departure(vm, bitmaps, wanted, source, address, about)
    left = _begun_with(wanted, about) if named is not None else []
    stale = [name for name in (*ours, *left) if name != named and name not in merged]
    return _Planned(
        source, address, about.size, Found(SCAN, why), about.file, about.format, named, merged, stale, converted
    )


def _begun_with(wanted: Wanted, about: Node) -> list[str]:
    """Return the bitmap that was begun with the machine, if the node has it."""
    start = wanted.departure
    return [start.bitmap] if start is not None and start.bitmap in about.bitmaps and start.bitmap is not None else []


def _since_departure(
    vm: Machine, bitmaps: _Bitmaps, wanted: Wanted, source: SourceDisk, address: LiveAddress, about: Node
) -> tuple[str | None, list[str], str, Extents]:
    """Return the bitmap that was begun with the machine, what is merged into it, why, and what was converted.

    One that cannot be trusted is dropped at once, while nothing else is new: a later attempt must not meet it, stopped,
    beside a bitmap that this one begins. Raises SourceError.
    """
    start = wanted.departure
    assert start is not None
    assert start.bitmap is not None
    since = [name for name in about.bitmaps if name.startswith(bitmaps.prefix) and bitmaps.is_after(name, start.point)]
    before = wanted.before.get(source.number)
    doubt = _doubt(about, start, [about.bitmaps[name] for name in since], before, wanted.based_on)
    if doubt:
        vm.drop_bitmaps(address.node, [start.bitmap])
        return None, [], doubt, EMPTY
    why = f"the disk recorded the writes since the machine was started from point {start.point}"
    return start.bitmap, since, why, start.ranges(source.number)


def _doubt(
    about: Node, start: Departure, since: Sequence[dict[str, Any]], before: DiskRecord | None, based_on: int
) -> str:
    """Return why the bitmap that was begun with the machine cannot be trusted, or nothing.

    It was stopped by us alone, in one step with the beginning of a bitmap of ours, ``since``.
    """
    assert start.bitmap is not None
    state = about.bitmaps[start.bitmap]
    doubts = (
        (before is None, "the disk is new"),
        (
            based_on != start.point,
            f"the machine was started from point {start.point}, which is not the newest",
        ),
        (
            bool(state.get("inconsistent") or state.get("busy")),
            "the bitmap that was begun with the machine cannot be read: QEMU did not end in order",
        ),
        (not state.get("recording") and not since, "the bitmap that was begun with the machine was stopped"),
        (not all(_is_usable(one) for one in since), "a bitmap of an attempt since cannot be read"),
        (before is not None and before.size != about.size, "the disk's size is another"),
    )
    return next((why for is_so, why in doubts if is_so), "")


def _changed(disk: NbdDisk, bitmap: str, also: Extents) -> Iterator[Extents]:
    return recorded_and(also, disk.changed(bitmap), disk.size)


def _trusted(
    ours: dict[str, dict[str, Any]], before: DiskRecord | None, address: LiveAddress, size: int
) -> tuple[str | None, str]:
    """Return the bitmap that recorded since the newest point, or None, and why that is.

    Its name is random in part and it is not kept in any file: where it exists, this very process recorded from
    that point on.
    """
    if before is None:
        return None, "the disk is new"
    if before.source.get("kind") != KIND or before.source.get("node") != address.node:
        return None, "the newest point was read from elsewhere"
    name = before.source.get(BITMAP, "")
    if name not in ours:
        return None, "the bitmap is gone: QEMU was started anew, or the disk exchanged"
    if not _is_usable(ours[name]):
        return None, "the bitmap cannot be read"
    if before.size != size:
        return None, "the disk's size is another"
    return name, "QEMU recorded the writes since the newest point"


def _is_usable(bitmap: dict[str, Any]) -> bool:
    return not (bitmap.get("inconsistent") or bitmap.get("busy") or bitmap.get("persistent"))
