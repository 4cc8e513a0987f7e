"""The change source of a running QEMU: its dirty bitmaps tell what changed, and all disks are read as of one instant.

For the time of a cycle QEMU copies what the guest is about to overwrite into a scratch overlay (a backup job that
copies nothing else), and the overlay is read over NBD. One transaction over all disks begins that, puts a new bitmap
in place and stops the one in use. The newest point's manifest names the bitmap that records since that point. A bitmap
is never dropped before another point is published; those of cycles that failed are merged into it by the next. So
after a failure at any place at most too much is compared, never too little.

All that QEMU is given carries a prefix, by which the next cycle removes what one that was killed left behind.
Open files are passed through the monitor's socket: QEMU needs no right to any path of ours.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, Self
from urllib.parse import quote, unquote

from replica.agent import Quiesced, quiesced
from replica.block import BLOCK_BYTES, LARGEST_DISK_BYTES
from replica.errors import SourceError, UsageError
from replica.model import Consistency, DiskRecord, SourceDisk
from replica.monitor import Monitor, MonitorError, MonitorGoneError
from replica.nbd.disk import NbdDisk
from replica.nbd.wire import UnixAddress
from replica.source import LIVE, Instant, OpenSource, Wanted
from replica.tracking import SCAN, Found
from vhdx.disk import Disk

BITMAP: Final = "bitmap"  # a found_by, and the name in a manifest's source
KIND: Final = "qemu"
LOOKING: Final = "looking"  # in place of a VM's id, where a disk is looked at
LEAST_SCRATCH_BYTES: Final = 64 << 20
_FORMATS: Final = {"vpc": "vhd"}


@dataclass(frozen=True, slots=True)
class LiveAddress:
    """Where a disk of a running QEMU is: monitor socket, block node, and the guest agent's socket where one is used."""

    monitor: str
    node: str
    agent: str | None = None

    def __str__(self) -> str:
        agent = f"?agent={quote(self.agent)}" if self.agent else ""
        return f"{LIVE}{quote(self.monitor)}{agent}#{quote(self.node)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` writes. Raises UsageError."""
        before, _, node = text.removeprefix(LIVE).partition("#")
        monitor, _, query = before.partition("?")
        if not (text.startswith(LIVE) and monitor and node) or (query and not query.startswith("agent=")):
            raise UsageError(f"{text!r} is no disk of a running QEMU", hint="write qmp:SOCKET#NODE")
        return cls(unquote(monitor), unquote(node), unquote(query.removeprefix("agent=")) or None)


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
            vm = stack.enter_context(_attached(first.monitor, wanted.vm_id, self._timeout))
            bitmaps = _Bitmaps(wanted)
            disks = [_plan(vm, bitmaps, wanted, one, at) for one, at in zip(wanted.sources, addresses, strict=True)]
            overlays = [_Overlay.make(vm, one, self._scratch) for one in disks]
            actions = [action for one in disks for action in one.actions(bitmaps.new)]
            actions += [overlay.action(vm) for overlay in overlays]
            with quiesced(first.agent) if first.agent else nullcontext(Quiesced()) as state:
                vm.monitor.execute("transaction", actions=actions)
            for one in disks:
                vm.drop_bitmaps(one.address.node, one.done)
            vm.serve()
            opened = []
            for one, overlay in zip(disks, overlays, strict=True):
                disk = stack.enter_context(vm.export(overlay.node, one, self._timeout))
                opened.append(one.opened(disk, bitmaps.new, state))
            consistency = Consistency.APPLICATION if state.held else Consistency.CRASH
            yield Instant(tuple(opened), consistency, partial(self._acknowledge, wanted, disks))

    def _acknowledge(self, wanted: Wanted, disks: Sequence[_Planned]) -> None:
        """Drop the bitmaps that recorded until this point. What cannot be dropped now, the next cycle drops."""
        with suppress(SourceError), Monitor(disks[0].address.monitor, timeout_seconds=self._timeout) as monitor:
            vm = _Machine(monitor, wanted.vm_id, self._timeout)
            for one in disks:
                vm.drop_bitmaps(one.address.node, [one.named] if one.named else [])


@contextmanager
def look(path: str, *, timeout_seconds: float = 30) -> Iterator[Disk]:
    """Open a disk of a running QEMU as it is at each moment: to learn what it is, not to replicate it."""
    address = LiveAddress.parse(path)
    with ExitStack() as stack:
        vm = stack.enter_context(_attached(address.monitor, LOOKING, timeout_seconds))
        about = vm.node(address)
        source = SourceDisk(0, address.node, path)
        one = _Planned(source, address, about.size, Found(SCAN, "looked at"), about.file, about.format)
        vm.serve()
        yield stack.enter_context(vm.export(address.node, one, timeout_seconds))


def default_scratch_folder() -> Path:
    """Return TMPDIR, or /var/tmp where there is one: overlays can grow, and /tmp is often memory."""
    large = Path("/var/tmp")
    return Path(tempfile.gettempdir()) if "TMPDIR" in os.environ or not large.is_dir() else large


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

    def opened(self, disk: NbdDisk, new: str, state: Quiesced) -> OpenSource:
        """Return the disk for the cycle."""
        about = {"kind": KIND, "node": self.address.node, "file": self.file, BITMAP: new}
        if state.why_not:
            about["not_quiesced"] = state.why_not
        found = self.found
        if self.named is not None:
            found = Found(BITMAP, found.why, partial(disk.changed, self.named))
        return OpenSource(self.source, disk, found, about)


def _plan(vm: _Machine, bitmaps: _Bitmaps, wanted: Wanted, source: SourceDisk, address: LiveAddress) -> _Planned:
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
    stale = [name for name in ours if name != named and name not in merged]
    return _Planned(source, address, about.size, Found(SCAN, why), about.file, about.format, named, merged, stale)


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


# -- what QEMU is told ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """What QEMU tells of a block node."""

    size: int
    read_only: bool
    format: str
    file: str
    bitmaps: dict[str, dict[str, Any]]


class _Machine:
    """A running QEMU, with the names of what we put into it."""

    def __init__(self, monitor: Monitor, vm_id: str, timeout_seconds: float) -> None:
        self.monitor = monitor
        self.prefix = f"godwit-{vm_id[:8]}-"  # names of nodes have 31 characters at most
        self._prefixes = (self.prefix, f"godwit-{LOOKING[:8]}-")
        self.stack = ExitStack()
        self.scratch: list[IO[bytes]] = []
        self._vm_id = vm_id
        self._timeout = timeout_seconds
        self._socket = ""

    def node(self, address: LiveAddress) -> _Node:
        """Return what there is about a node. Raises SourceError."""
        for one in self.monitor.rows("query-named-block-nodes", flat=True):
            if one.get("node-name") == address.node:
                try:
                    return _Node(
                        int(one["image"]["virtual-size"]),
                        bool(one["ro"]),
                        _FORMATS.get(one["drv"], str(one["drv"])),
                        str(one["file"]),
                        {str(bitmap["name"]): bitmap for bitmap in one.get("dirty-bitmaps", ())},
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise SourceError("QEMU describes the node in an unknown way", path=str(address)) from error
        raise SourceError(
            f"the running machine has no block node {address.node!r}",
            path=str(address),
            hint="query-named-block-nodes lists them; -blockdev node-name=NAME names one",
        )

    def drop_bitmaps(self, node: str, names: Sequence[str]) -> None:
        """Remove bitmaps. Raises MonitorError."""
        for name in names:
            self.monitor.execute("block-dirty-bitmap-remove", node=node, name=name)

    def serve(self) -> None:
        """Start QEMU's NBD server on a socket that only this process can reach. Raises SourceError."""
        prefix = f"godwit-{self._vm_id}-"
        if self._vm_id != LOOKING:  # of a VM, one cycle at a time is at work: others' folders are of killed ones
            for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
                shutil.rmtree(old, ignore_errors=True)
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
        self._socket = str(Path(folder) / "nbd")
        name = f"{self.prefix}nbd"
        with _listening(self._socket) as listener:
            self.monitor.execute("getfd", descriptor=listener.fileno(), fdname=name)
            try:
                self.monitor.execute("nbd-server-start", addr={"type": "fd", "data": {"str": name}})
            except MonitorGoneError:
                raise
            except MonitorError as error:
                self._try("closefd", fdname=name)
                raise SourceError(
                    f"QEMU's NBD server is in use: {error.message}",
                    path=self.monitor.path,
                    hint="QEMU has one server only; the monitor's nbd-server-stop ends it",
                ) from error

    def export(self, node: str, one: _Planned, timeout_seconds: float) -> NbdDisk:
        """Export a node, with the disk's frozen bitmap if it has one, and return it opened."""
        name = f"{self.prefix}{one.source.number}"
        bitmaps = [{"node": one.address.node, "name": one.named}] if one.named else []
        self.monitor.execute(
            "block-export-add", type="nbd", id=name, node_name=node, name=name, writable=False, bitmaps=bitmaps
        )
        address = UnixAddress(self._socket)
        return NbdDisk(address, name, name=one.source.path, format=one.format, timeout_seconds=timeout_seconds)

    def remove_ours(self) -> None:
        """Remove exports, server, jobs and nodes of ours, whoever made them. Raises MonitorError.

        The backup job goes last of what touches the guest: until then what is read stays as it was.
        """
        exports = self.monitor.rows("query-block-exports")
        ours = self._ours(exports, "id")
        jobs, nodes = self._jobs(), self._nodes()
        for name in ours:
            self._try("block-export-del", id=name, mode="hard")
        if ours:
            self.monitor.wait_until(
                lambda: not self._ours(self.monitor.rows("query-block-exports"), "id"), "close the exports"
            )
        foreign = [one for one in exports if one.get("type") == "nbd" and one.get("id") not in ours]
        if (ours or jobs or nodes or self._socket) and not foreign:
            self._try("nbd-server-stop")
        self.monitor.wait_until(self._end_jobs, "end the backup")
        self.monitor.wait_until(self._delete_nodes, "close the overlays")
        for fdset in self.monitor.rows("query-fdsets"):
            if any(str(fd.get("opaque", "")).startswith(self._prefixes) for fd in fdset.get("fds", ())):
                self._try("remove-fd", fdset_id=fdset.get("fdset-id"))
        for file in self.scratch:  # QEMU may keep it open a while
            with suppress(OSError):
                file.truncate(0)

    def _jobs(self) -> list[dict[str, Any]]:
        return [one for one in self.monitor.rows("query-jobs") if str(one.get("id", "")).startswith(self._prefixes)]

    def _nodes(self) -> list[str]:
        return self._ours(self.monitor.rows("query-named-block-nodes", flat=True), "node-name")

    def _ours(self, rows: list[dict[str, Any]], name: str) -> list[str]:
        return [one[name] for one in rows if str(one.get(name, "")).startswith(self._prefixes)]

    def _end_jobs(self) -> bool:
        jobs = self._jobs()
        for job in jobs:
            if job.get("status") == "concluded":
                self._try("job-dismiss", id=job["id"])
            elif job.get("type") == "backup":
                self._try("block-job-cancel", device=job["id"], force=True)
        return not jobs

    def _delete_nodes(self) -> bool:
        nodes = self._nodes()
        for name in nodes:
            self._try("blockdev-del", node_name=name)  # refused as long as another stands on it
        return not nodes

    def _try(self, command: str, **arguments: Any) -> None:
        try:
            self.monitor.execute(command, **arguments)
        except MonitorGoneError:
            raise
        except MonitorError:
            pass


@contextmanager
def _attached(path: str, vm_id: str, timeout_seconds: float) -> Iterator[_Machine]:
    """Connect to a QEMU, remove what an earlier cycle left in it, and on leaving all that this one puts there."""
    with Monitor(path, timeout_seconds=timeout_seconds) as monitor:
        vm = _Machine(monitor, vm_id, timeout_seconds)
        vm.remove_ours()
        with vm.stack:
            try:
                yield vm
            except BaseException:
                with suppress(SourceError):  # what went wrong first is told
                    _detach(vm, path, timeout_seconds)
                raise
            vm.remove_ours()


def _detach(vm: _Machine, path: str, timeout_seconds: float) -> None:
    try:
        vm.remove_ours()
    except MonitorGoneError:  # the connection may be what broke
        vm.monitor.close()
        with Monitor(path, timeout_seconds=timeout_seconds) as again:
            vm.monitor = again
            vm.remove_ours()


@dataclass(frozen=True, slots=True)
class _Overlay:
    """A scratch overlay over a disk: what the guest overwrites goes there first, and the rest shows through."""

    node: str
    source: _Planned

    @classmethod
    def make(cls, vm: _Machine, one: _Planned, folder: Path) -> Self:
        """Make the overlay in a file without a name, which ends with the last process that has it open."""
        name = f"{vm.prefix}{one.source.number}"
        file = vm.stack.enter_context(_scratch_file(folder))
        vm.scratch.append(file)
        given = vm.monitor.execute("add-fd", descriptor=file.fileno(), opaque=name)
        path = f"/dev/fdset/{given['fdset-id']}"
        vm.monitor.execute("blockdev-add", driver="file", node_name=f"{name}-file", filename=path)
        options = {"driver": "qcow2", "file": f"{name}-file", "size": one.size}
        vm.monitor.execute("blockdev-create", job_id=f"{name}-create", options=options)
        vm.monitor.wait_until(lambda: _is_created(vm.monitor, f"{name}-create"), "make an overlay")
        vm.monitor.execute(
            "blockdev-add",
            driver="qcow2",
            node_name=f"{name}-over",
            file=f"{name}-file",
            backing=one.address.node,
        )
        return cls(f"{name}-over", one)

    def action(self, vm: _Machine) -> dict[str, Any]:
        """Return what begins, within the transaction, to keep the instant."""
        data = {
            "job-id": f"{vm.prefix}{self.source.source.number}-backup",
            "device": self.source.address.node,
            "target": self.node,
            "sync": "none",
        }
        return {"type": "blockdev-backup", "data": data}


def _is_created(monitor: Monitor, job_id: str) -> bool:
    for job in monitor.rows("query-jobs"):
        if job.get("id") == job_id:
            if job.get("status") != "concluded":
                return False
            if "error" in job:
                raise SourceError(f"QEMU cannot make a scratch overlay: {job['error']}", path=monitor.path)
            monitor.execute("job-dismiss", id=job_id)
    return True


@contextmanager
def _scratch_file(folder: Path) -> Iterator[IO[bytes]]:
    """A file without a name."""
    try:
        free = shutil.disk_usage(folder).free
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    except OSError as error:
        raise SourceError(f"no scratch file can be made: {error.strerror}", path=str(folder)) from error
    with file:
        if free < LEAST_SCRATCH_BYTES:
            raise SourceError(
                "there is no room for what the guest overwrites while it is read",
                path=str(folder),
                hint="TMPDIR names another folder for scratch files",
            )
        yield file


@contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    if sys.platform == "win32":
        raise SourceError("running machines are replicated on Linux only")
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(path)
                listener.listen(64)
            except OSError as error:
                raise SourceError(f"no socket can be made: {error.strerror or error}", path=path) from error
            yield listener
