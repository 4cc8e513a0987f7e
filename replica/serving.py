"""Serves the disks of a recovery point by NBD, so that a machine can start from them before anything is restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conversion.errors import RefusedError
from replica import catalog, history
from replica.catalog import ProtectedVm
from replica.errors import UsageError
from replica.generation.patched import Conversion, plan_conversion
from replica.host import Host
from replica.hydrate import choose_disks
from replica.model import DiskRecord, Point
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
    generation: Literal[1, 2]  # the one that the disks start as

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "vm": self.vm,
            "point": self.point,
            "writable": self.writable,
            "generation": self.generation,
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
    generation: Literal[1, 2] | None = None,
    conversion: Conversion | None = None,
) -> Iterator[Serving]:
    """Serve disks of a point (the newest unless given) at ``address`` while the context lasts.

    Each is an export under its number, the first one also under the empty name. With ``scratch``, a folder, they take
    writes, which go there and end with the context. ``report`` takes what goes wrong meanwhile. ``generation`` is the
    one that the disks are to start as (the machine's unless given); ``conversion`` how, where that was planned before.
    Raises UsageError, NbdError, StoreError, IntegrityError, ConversionError.
    """
    chosen_point = catalog.newest_point(store, found) if point is None else history.point(store, found.keys, point)
    chosen = choose_disks(chosen_point, disks)
    if scratch is not None and not scratch.is_dir():
        raise UsageError("the folder for scratch files does not exist", path=str(scratch), hint="make it first")
    with ExitStack() as stack:
        exports: dict[str, Disk] = {}
        wanted = generation or chosen_point.machine.generation
        is_converted = conversion is None and wanted != chosen_point.machine.generation
        views = {
            record.number: stack.enter_context(PointView(store, host, found, chosen_point, record, workers=workers))
            for record in (chosen_point.disks if is_converted else chosen)
        }
        if conversion is None:
            conversion = conversion_of(chosen_point, views, wanted)
        for record in chosen:
            disk = conversion.applied(record.number, views[record.number])
            if scratch is not None:
                disk = stack.enter_context(ScratchDisk(disk, scratch))
            exports.setdefault("", disk)
            exports[str(record.number)] = disk
        server = stack.enter_context(Server(exports, address, report=report))
        described = tuple(Export(one, str(one.number), _url(server.address, str(one.number))) for one in chosen)
        yield Serving(found.vm.name, chosen_point.point, scratch is not None, server, described, wanted)


def conversion_of(point: Point, views: Mapping[int, Disk], generation: Literal[1, 2]) -> Conversion:
    """Plan how the point's disks, ``views`` by their numbers, start as ``generation``. Raises ConversionError."""
    if generation == point.machine.generation:
        return Conversion()
    if generation == 2:
        raise RefusedError(
            f"point {point.point} is of a machine of Generation 1, which cannot become one of Generation 2",
            hint="serve it as it is",
        )
    return plan_conversion([(record.number, views[record.number]) for record in point.disks], point.machine)


def _url(address: Address, export: str) -> str:
    if isinstance(address, TcpAddress):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"nbd://{host}:{address.port}/{export}"
    return f"nbd+unix:///{export}?socket={address.path}"
