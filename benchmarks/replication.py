"""Initial replication, delta by hash and restore of a seeded image, as shares of what the machine can do at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.image import MIB, change_blocks, make_raw
from benchmarks.run import Measure, ratios, run_in_turn
from replica import catalog, cycle, hydrate, protection
from replica.catalog import ProtectedVm
from replica.host import Host, this_host
from replica.stores.address import open_store
from replica.stores.store import Store
from replica.workers import Workers

WORKERS = Workers(threads=limits.THREADS, uploads=2)


class Bench:
    """An image, a store in the same folder, and a VM that is protected into it."""

    def __init__(self, folder: Path, size_mib: int, seed: int) -> None:
        self.folder = folder
        self.image = folder / "image.raw"
        make_raw(self.image, size_mib, seed)
        self.size = self.image.stat().st_size
        self.host: Host = this_host(folder / "state")
        self.store: Store
        self.vm: ProtectedVm
        self._names = iter(range(1_000_000))
        self._store_folder = folder / "store"

    def fresh_store(self) -> None:
        """Throw the store away and begin another."""
        shutil.rmtree(self._store_folder, ignore_errors=True)
        self.store = open_store(str(self._store_folder), create=True)
        catalog.init_store(self.store, self.host)
        name = f"vm{next(self._names)}"
        self.vm, _ = protection.protect(self.store, self.host, tenant="default", name=name, disks=[self.image])

    def replicate(self) -> None:
        """Make a point."""
        cycle.replicate(self.store, self.host, self.vm, workers=WORKERS)

    def restore(self, path: Path) -> None:
        """Restore the newest point into a new file."""
        point = catalog.newest_point(self.store, self.vm)
        format_ = hydrate.FORMATS[hydrate.FORMATS.index("raw" if path.suffix == ".raw" else "vhdx")]
        hydrate.restore_files(
            self.store, self.host, self.vm, point, disks=point.disks, paths=[path], format_=format_, workers=WORKERS
        )


def run(folder: Path, *, size_mib: int, runs: int, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Measure; yield a row for each figure."""
    bench = Bench(folder, size_mib, seed)
    data = memoryview(limits.nonzero_part(bench.image))
    batches = limits.batches(data)
    read = Measure("limit: read the cached file, two threads", bench.size, lambda: limits.read(bench.image))
    hashed = Measure("limit: read and xxh3 it, two threads", bench.size, lambda: limits.read_and_hash(bench.image))
    packed = Measure(
        "limit: zstd its non-zero part, two threads of libzstd's caller", len(data), lambda: limits.compress(data)
    )
    tasks = Measure("limit: the same in 4 MiB tasks", len(data), lambda: limits.compress_in_tasks(data))
    written = folder / "limit.raw"
    unpack = Measure(
        "limit: unpack and write, two threads, flushed",
        len(data),
        lambda: limits.unpack_and_write(batches, written, bench.size),
        prepare=lambda: written.unlink(missing_ok=True),
    )
    stored = sum(len(one[0]) for one in batches)
    disk = Measure("limit: write the stored bytes, flushed", stored, lambda: limits.write(folder / "w", stored))
    initial = Measure("initial replication", len(data), bench.replicate, prepare=bench.fresh_store)
    delta = Measure("delta by hash, nothing changed", bench.size, bench.replicate)
    change = Measure(
        "delta by hash, 1 % changed",
        bench.size,
        bench.replicate,
        prepare=lambda: change_blocks(bench.image, 0.01, seed + len(change.seconds)),
    )
    target, vhdx = folder / "out.raw", folder / "out.vhdx"
    restore = Measure(
        "restore to raw", len(data), lambda: bench.restore(target), prepare=lambda: target.unlink(missing_ok=True)
    )
    restore_vhdx = Measure(
        "restore to VHDX", len(data), lambda: bench.restore(vhdx), prepare=lambda: vhdx.unlink(missing_ok=True)
    )
    measures = [read, hashed, packed, tasks, disk, initial, delta, change, unpack, restore, restore_vhdx]
    run_in_turn(measures, runs)
    pairs = {
        initial.name: [packed, tasks],
        delta.name: [hashed, read],
        change.name: [hashed],
        restore.name: [unpack],
        restore_vhdx.name: [unpack],
    }
    for measure in measures:
        yield {
            "name": measure.name,
            "mib": round(measure.size / MIB),
            "seconds": measure.seconds,
            "median_seconds": measure.median,
            "mib_per_second": measure.rate,
            "shares": {limit.name: ratios(measure, limit) for limit in pairs.get(measure.name, [])},
        }
