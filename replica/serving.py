"""Serves the disks of a recovery point by NBD, so that a machine can start from them before anything is restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replica import catalog, history
from replica.catalog import ProtectedVm
from replica.errors import UsageError
from replica.host import Host
from replica.hydrate import choose_disks
from replica.model import DiskRecord
from replica.nbd.server import Server
from replica.nbd.wire import Address, TcpAddress
from replica.scratchdisk import ScratchDisk
from replica.stores.store import Store
from replica.view import PointView
from replica.workers import Workers
from vhdx.disk import Disk


@dataclass(frozen=True, slots=True)
class Export:
    """A disk that is being served: its record, and how clients name it."""

    disk: DiskRecord
    name: str
    url: str


@dataclass(frozen=True, slots=True)
class Serving:
    """What is being served, until the context that made it ends."""

    vm: str
    point: int
    writable: bool
    server: Server
    exports: tuple[Export, ...]

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "vm": self.vm,
            "point": self.point,
            "writable": self.writable,
            "exports": [
                {"disk": one.disk.number, "name": one.name, "size_bytes": one.disk.size, "url": one.url}
                for one in self.exports
            ],
        }


@contextmanager
def serve_point(
    store: Store,
    host: Host,
    found: ProtectedVm,
    address: Address,
    *,
    point: int | None = None,
    disks: Sequence[str] = (),
    scratch: Path | None = None,
    workers: Workers | None = None,
    report: Callable[[Exception], None] = lambda error: None,
) -> Iterator[Serving]:
    """Serve disks of a point (the newest unless given) at ``address`` while the context lasts.

    Each is an export under its number, the first one also under the empty name. With ``scratch``, a folder, they take
    writes, which go there and end with the context. ``report`` takes what goes wrong meanwhile.
    Raises UsageError, NbdError, StoreError, IntegrityError.
    """
    chosen_point = catalog.newest_point(store, found) if point is None else history.point(store, found.keys, point)
    chosen = choose_disks(chosen_point, disks)
    if scratch is not None and not scratch.is_dir():
        raise UsageError("the folder for scratch files does not exist", path=str(scratch), hint="make it first")
    with ExitStack() as stack:
        exports: dict[str, Disk] = {}
        for record in chosen:
            disk: Disk = stack.enter_context(PointView(store, host, found, chosen_point, record, workers=workers))
            if scratch is not None:
                disk = stack.enter_context(ScratchDisk(disk, scratch))
            exports.setdefault("", disk)
            exports[str(record.number)] = disk
        server = stack.enter_context(Server(exports, address, report=report))
        described = tuple(Export(one, str(one.number), _url(server.address, str(one.number))) for one in chosen)
        yield Serving(found.vm.name, chosen_point.point, scratch is not None, server, described)


def _url(address: Address, export: str) -> str:
    if isinstance(address, TcpAddress):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"nbd://{host}:{address.port}/{export}"
    return f"nbd+unix:///{export}?socket={address.path}"
