"""A running QEMU as a cycle uses it: block nodes and bitmaps, its NBD server, and the removal of all that is ours."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self
from urllib.parse import quote, unquote

from replica.errors import SourceError, UsageError
from replica.monitor import Monitor, MonitorError, MonitorGoneError
from replica.nbd.disk import NbdDisk
from replica.nbd.wire import UnixAddress
from replica.source import LIVE

LOOKING: Final = "looking"  # in place of a VM's id, where a disk is looked at
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


@dataclass(frozen=True, slots=True)
class Node:
    """What QEMU tells of a block node."""

    size: int
    read_only: bool
    format: str
    file: str
    bitmaps: dict[str, dict[str, Any]]


class Machine:
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

    def node(self, address: LiveAddress) -> Node:
        """Return what there is about a node. Raises SourceError."""
        for one in self.monitor.rows("query-named-block-nodes", flat=True):
            if one.get("node-name") == address.node:
                try:
                    return Node(
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
        # A node tells whoever comes after us, should we be killed before anything is exported, that the server is ours.
        self._try("blockdev-add", driver="null-co", node_name=f"{self.prefix}server", read_zeroes=True)
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

    def export(self, node: str, number: int, *, name: str, image_format: str, bitmap: Sequence[str] = ()) -> NbdDisk:
        """Export a node as the disk of that number, and return it opened. ``bitmap``: a node, and its bitmap's name."""
        export = f"{self.prefix}{number}"
        bitmaps = [dict(zip(("node", "name"), bitmap, strict=True))] if bitmap else []
        self.monitor.execute(
            "block-export-add", type="nbd", id=export, node_name=node, name=export, writable=False, bitmaps=bitmaps
        )
        address = UnixAddress(self._socket)
        return NbdDisk(address, export, name=name, format=image_format, timeout_seconds=self._timeout)

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
        self.end_backups()
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

    def end_backups(self) -> None:
        """Let the guest write on without keeping what it overwrites: overlays read as of no instant any more."""
        self.monitor.wait_until(self._end_jobs, "end the backup")

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
def attached(path: str, vm_id: str, timeout_seconds: float) -> Iterator[Machine]:
    """Connect to a QEMU, remove what an earlier cycle left in it, and on leaving all that this one puts there."""
    with Monitor(path, timeout_seconds=timeout_seconds) as monitor:
        vm = Machine(monitor, vm_id, timeout_seconds)
        vm.remove_ours()
        with vm.stack:
            try:
                yield vm
            except BaseException:
                with suppress(SourceError):  # what went wrong first is told
                    _detach(vm, path, timeout_seconds)
                raise
            vm.remove_ours()


def _detach(vm: Machine, path: str, timeout_seconds: float) -> None:
    try:
        vm.remove_ours()
    except MonitorGoneError:  # the connection may be what broke
        vm.monitor.close()
        with Monitor(path, timeout_seconds=timeout_seconds) as again:
            vm.monitor = again
            vm.remove_ours()


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
