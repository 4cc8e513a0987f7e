"""The time of `godwit convert --to gen1` as a whole command, and what it writes, on disks of two sizes.

Both hold the same guest; the larger one has a larger last partition, whose file system has not grown: what a
conversion reads and writes must not depend on the disk's size.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support import debian_guest
from tests.support.boot_disks import run as run_tool
from vhdx.create import create_disk
from vhdx.formats import open_disk

GIB = 1 << 30
MIB = 1 << 20
SIZES_GIB = (40, 2047)


def run(folder: Path, *, runs: int) -> list[dict[str, Any]]:
    """Return a row for each size. The sizes take turns, so that what the machine does besides hits both."""
    disks = {size: make(folder / f"disk{size}.vhdx", size * GIB) for size in SIZES_GIB}
    seconds: dict[int, list[float]] = {size: [] for size in SIZES_GIB}
    rows = {size: {"gib": size, "written_bytes": 0, "overlay_file_bytes": 0} for size in SIZES_GIB}
    for _ in range(runs):
        for size, disk in disks.items():
            target = folder / f"disk{size}.gen1.vhdx"
            command = [str(Path(sys.executable).with_name("godwit")), "convert", str(disk), "--to", "gen1", "--json"]
            started = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[size].append(time.perf_counter() - started)
            rows[size]["written_bytes"] = json.loads(done.stdout)["written_bytes"]
            rows[size]["overlay_file_bytes"] = target.stat().st_blocks * 512
            for made in folder.glob(f"disk{size}.gen1.*"):
                made.unlink()
    return [
        {**row, "seconds": seconds[size], "median_seconds": statistics.median(seconds[size])}
        for size, row in rows.items()
    ]


def make(target: Path, size: int) -> Path:
    """Write the guest of the boot tests as a sparse VHDX of ``size``, its last partition grown to the end."""
    raw = target.with_suffix(".raw")
    run_tool("cp", "--sparse=always", debian_guest.cached_guest(), raw)
    with raw.open("r+b") as file:
        file.truncate(size)
    first = debian_guest.ROOT_START_BYTES // 512
    run_tool("sgdisk", "--move-second-header", "--delete=2", f"--new=2:{first}:0", "--typecode=2:8300", raw)
    create_disk(target, size=size)
    with raw.open("rb") as source, open_disk(target, writable=True) as disk:
        for start, length in ((0, debian_guest.SIZE_BYTES), (size - MIB, MIB)):
            copy(source, disk, start, length)
        disk.flush()
    raw.unlink()
    return target


def copy(source: Any, disk: Any, start: int, length: int) -> None:
    """Copy what is not zero."""
    zeros = bytes(MIB)
    for at in range(start, start + length, MIB):
        source.seek(at)
        data = source.read(MIB)
        if data != zeros:
            disk.write_at(at, data)


def show(rows: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    for row in rows:
        spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
        written = f"{row['written_bytes'] / MIB:.2f} MiB planned, {row['overlay_file_bytes'] / MIB:.1f} MiB of file"
        print(f"convert --to gen1, {row['gib']:>5} GiB: {row['median_seconds']:.2f} s ({spread}), {written}")
    small, large = (row["median_seconds"] for row in rows)
    print(f"the large one takes {large / small:.2f} x the small one's time")
