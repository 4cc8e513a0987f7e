"""The engine at arm's length: a clock that tests move, randomness that repeats, and a VM of raw files to replicate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from replica import catalog, cycle, history, protection
from replica.catalog import ProtectedVm
from replica.host import Host
from replica.keys import PartId
from replica.maptable import ZERO, Entries, SegmentRef, SegmentTable
from replica.model import Point
from replica.restore import PointReader
from replica.source import OpenDisk, open_for_reading
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from replica.vault import Vault
from replica.workers import Workers
from vhdx.disk import Extents, ReadableBuffer

BLOCK = 65536
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WORKERS = Workers(threads=2, uploads=2)


class FakeClock:
    """A clock that stands still until it is moved. ``jump`` moves the wall clock alone, as an administrator may."""

    def __init__(self, start: datetime = START) -> None:
        self._now = start
        self._monotonic = 1000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back; no time passes."""
        self._now += timedelta(seconds=seconds)


class SeededRandomness:
    """Ids and seeds that are the same in every run."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def new_id(self) -> str:
        return self._random.randbytes(16).hex()

    def seed(self) -> int:
        return self._random.getrandbits(64)


def make_host(
    state_folder: Path | None = None, *, name: str = "host-a", clock: FakeClock | None = None, seed: int | None = None
) -> Host:
    """Return a machine. Hosts of different names have different ids and draw different random numbers."""
    drawn = SeededRandomness(sum(name.encode()) if seed is None else seed)
    return Host(clock or FakeClock(), drawn, drawn.new_id(), name, state_folder)


def random_blocks(seed: int, count: int) -> bytes:
    """Return ``count`` blocks: some incompressible, some of text, none of zeros, no two alike."""
    drawn = random.Random(seed)
    blocks = []
    for number in range(count):
        if drawn.random() < 0.3:
            blocks.append(drawn.randbytes(BLOCK))
        else:
            line = f"block {number} of {seed}, {drawn.random()}\n".encode()
            blocks.append((line * (BLOCK // len(line) + 1))[:BLOCK])
    return b"".join(blocks)


class MemoryTarget:
    """A restored disk in memory. Writes are checked to lie in what was prepared."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._prepared: list[tuple[int, int]] = []

    def prepare(self, extents: Extents) -> None:
        self._prepared += [(int(start), int(end)) for start, end in extents]

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        view = memoryview(data).cast("B")
        assert any(start <= offset and offset + len(view) <= end for start, end in self._prepared), offset
        self.data[offset : offset + len(view)] = view


def restore_disk(store: Store, host: Host, found: ProtectedVm, point: Point, number: int = 0) -> bytes:
    """Restore one disk of a point into memory."""
    disk = next(one for one in point.disks if one.number == number)
    target = MemoryTarget(disk.size)
    PointReader(store, host, found, point, WORKERS).restore(disk, target)
    return bytes(target.data)


@dataclass(slots=True)
class Lab:
    """A VM of raw disk files in a folder, protected in a store, and the machine that replicates it."""

    folder: Path
    store: Store
    host: Host
    found: ProtectedVm
    paths: tuple[Path, ...]
    published: dict[int, tuple[bytes, ...]] = field(default_factory=dict)  # what the disks held at each point

    def write(self, data: bytes, number: int = 0) -> None:
        """Make ``data`` the whole content of a disk file."""
        self.paths[number].write_bytes(data)

    def patch(self, offset: int, data: bytes, number: int = 0) -> None:
        """Change a range of a disk file."""
        with self.paths[number].open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def contents(self) -> tuple[bytes, ...]:
        """Return what the disk files hold now."""
        return tuple(path.read_bytes() for path in self.paths)

    def replicate(
        self, store: Store | None = None, host: Host | None = None, *, open_disk: OpenDisk = open_for_reading
    ) -> Point:
        """Run a cycle, and remember what the disks held."""
        point = cycle.replicate(
            store or self.store, host or self.host, self.found, workers=WORKERS, open_disk=open_disk
        )
        self.published[point.point] = self.contents()
        return point

    def restore(self, point: int | Point | None = None, number: int = 0, *, host: Host | None = None) -> bytes:
        """Restore one disk of a point (the newest where none is given) into memory."""
        if point is None:
            chosen = catalog.newest_point(self.store, self.found)
        elif isinstance(point, int):
            chosen = history.point(self.store, self.found.keys, point)
        else:
            chosen = point
        return restore_disk(self.store, host or self.host, self.found, chosen, number)

    def assert_restores(self, *points: int) -> None:
        """Restore the points given, or all that were published, and compare every disk with what it held."""
        for point in points or tuple(self.published):
            for number, held in enumerate(self.published[point]):
                assert self.restore(point, number) == held, f"disk {number} of point {point}"


def make_lab(
    folder: Path,
    disks: Sequence[bytes],
    *,
    store: Store | None = None,
    host: Host | None = None,
    name: str = "web 1",
    tenant: str = catalog.DEFAULT_TENANT,
    vault: Vault | None = None,
) -> Lab:
    """Write the disks as raw files into ``folder``, make the store one, and protect them as a VM.

    With ``vault``, which stands before ``store``, it is encrypted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"disk{number}.img" for number in range(len(disks)))
    for path, data in zip(paths, disks, strict=True):
        path.write_bytes(data)
    made_store: Store = MemoryStore("lab") if store is None else store
    made_host = host or make_host(folder / "state")
    catalog.init_store(made_store, made_host)
    found, _ = protection.protect(made_store, made_host, tenant=tenant, name=name, disks=paths, vault=vault)
    return Lab(folder, made_store, made_host, found, paths)


def random_entries(seed: int, keys: Sequence[int], table: SegmentTable, *, zeros: float = 0.2) -> Entries:
    """Return map entries for ``keys`` (ascending): places, hashes and zeros by the seed, segments in ``table``."""
    drawn = random.Random(seed)
    refs = [SegmentRef(f"{drawn.getrandbits(128):032x}", PartId(1 + n, 1 + n % 3, n), 1 << 24) for n in range(4)]
    rows = []
    for _ in keys:
        if drawn.random() < zeros:
            rows.append((ZERO, 0, 0, 0, 0, 0))
        else:
            number = table.number(drawn.choice(refs))
            codec = int(drawn.random() < 0.9)
            length = drawn.randrange(1, BLOCK) if codec else BLOCK
            rows.append(
                (number, drawn.randrange(64, 1 << 24), length, codec, drawn.getrandbits(64), drawn.getrandbits(64))
            )
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    return Entries(
        np.array(keys, np.uint64),
        np.array(columns[0], np.uint32),
        np.array(columns[1], np.uint32),
        np.array(columns[2], np.uint32),
        np.array(columns[3], np.uint8),
        np.array([columns[4], columns[5]], np.uint64).T.reshape(-1, 2).copy(),
    )
