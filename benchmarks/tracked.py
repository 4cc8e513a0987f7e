"""Deltas whose changes are known: the same 1,000 blocks changed in disks of three sizes, and beside a full comparison.

Each disk is a sparse VHDX with the same amount of data; a checkpoint (AVHDX) above it holds the changed blocks. Whole
commands are timed, their start included. A round changes other blocks in a new checkpoint.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vhdx.create import create_disk
from vhdx.formats import open_disk

GIB = 1 << 30
BLOCK = 65536
CHANGED_BLOCKS = 1000
SIZES_GIB = (1, 16, 256)
DATA_BYTES = GIB // 2
COMPARED_GIB = 16
COMPARED_DATA_BYTES = 4 * GIB


def run(folder: Path, *, runs: int) -> list[dict[str, Any]]:
    """Return a row for each size, and one for the full comparison of the middle one with more data in it."""
    godwit = Path(sys.executable).with_name("godwit")
    store = f"file://{folder / 'store'}"
    _run(godwit, "init", store)
    subjects = [_Subject(folder, size, DATA_BYTES, godwit, store) for size in SIZES_GIB]
    for _ in range(runs):  # in turns, so that what the machine does besides hits all
        for one in subjects:
            one.measure()
    rows = [one.row() for one in subjects]
    for one in subjects:
        one.remove()
    compared = _Subject(folder, COMPARED_GIB, COMPARED_DATA_BYTES, godwit, store)
    for _ in range(max(1, runs // 2)):
        compared.measure()
        compared.measure(rescan=True)
    rows.append({**compared.row(), "compared_seconds": compared.compared})
    return rows


class _Subject:
    """A VM of one disk: a base and a growing chain of checkpoints."""

    def __init__(self, folder: Path, size_gib: int, data_bytes: int, godwit: Path, store: str) -> None:
        self.size_gib, self.data_bytes = size_gib, data_bytes
        self._godwit, self._store = godwit, store
        self._folder = folder / f"disk{size_gib}-{data_bytes >> 20}"
        self._folder.mkdir()
        self._name = self._folder.name
        self._drawn = random.Random(size_gib)
        self._top = self._folder / "base.vhdx"
        self._checkpoints = 0
        self.seconds: list[float] = []
        self.compared: list[float] = []
        self.requests: dict[str, Any] = {}
        create_disk(self._top, size=size_gib * GIB, block_size=2 << 20)
        with open_disk(self._top, writable=True) as disk:
            step = size_gib * GIB // (data_bytes >> 21)
            for number in range(data_bytes >> 21):
                disk.write_at(number * step // (2 << 20) * (2 << 20), self._drawn.randbytes(1 << 20) * 2)
            disk.flush()
        _run(godwit, "protect", self._name, "--disk", self._top, "--store", store)
        _run(godwit, "replicate", self._name, "--store", store)

    def measure(self, *, rescan: bool = False) -> None:
        """Change blocks in a new checkpoint, and replicate."""
        self._checkpoints += 1
        child = self._folder / f"checkpoint{self._checkpoints}.avhdx"
        create_disk(child, parent=self._top)
        with open_disk(child, writable=True) as disk:
            for number in self._drawn.sample(range(self.size_gib * GIB // BLOCK), CHANGED_BLOCKS):
                disk.write_at(number * BLOCK, self._drawn.randbytes(BLOCK))
            disk.flush()
        self._top = child
        _run(self._godwit, "protect", self._name, "--update", "--disk", child, "--store", self._store)
        command = ["replicate", self._name, "--store", self._store, "--json", *(["--rescan"] if rescan else [])]
        started = time.perf_counter()
        told = json.loads(_run(self._godwit, *command))
        elapsed = time.perf_counter() - started
        (self.compared if rescan else self.seconds).append(elapsed)
        assert told["changed_blocks"] == CHANGED_BLOCKS, told

    def row(self) -> dict[str, Any]:
        """Return what was measured."""
        return {
            "gib": self.size_gib,
            "data_mib": self.data_bytes >> 20,
            "seconds": self.seconds,
            "median_seconds": statistics.median(self.seconds),
        }

    def remove(self) -> None:
        """Give the room back."""
        for path in self._folder.iterdir():
            path.unlink()


def _run(program: Path, *arguments: object) -> str:
    done = subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True)
    return done.stdout


def show(rows: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    *flat, compared = rows
    for row in flat:
        spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
        print(f"1,000 blocks changed, tracked, {row['gib']:>4} GiB: {row['median_seconds']:.2f} s ({spread})")
    medians = [row["median_seconds"] for row in flat]
    print(f"the slowest takes {max(medians) / min(medians):.2f} x the fastest one's time")
    full = statistics.median(compared["compared_seconds"])
    print(
        f"{compared['gib']} GiB with {compared['data_mib']} MiB of data: tracked {compared['median_seconds']:.2f} s, "
        f"compared by hash {full:.2f} s: {full / compared['median_seconds']:.1f} x"
    )
