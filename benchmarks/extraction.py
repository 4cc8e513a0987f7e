"""Allocation and change maps of 64 TiB disks, from block allocation tables alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vhdx.chain import open_vhdx
from vhdx.create import create_disk

MIB = 1 << 20
TIB = 1 << 40


def _fill(path: Path, block_size: int, every: int) -> None:
    """Mark every so many payload blocks as present, all in one place of the file: only the table matters here."""
    with open_vhdx(path) as disk:
        image = disk.image
        bat_offset, ratio = image.bat_region.offset, image.geometry.chunk_ratio
    blocks = 64 * TIB // block_size
    block = np.arange(0, blocks, every, dtype=np.int64)
    index = block + block // ratio
    with path.open("r+b") as file:
        table = np.zeros(int(index[-1]) + 1, "<u8")
        table[index] = np.uint64(6) | (
            np.uint64(1 << 20) * (np.uint64(1024) + block.astype(np.uint64) * np.uint64(block_size // MIB))
        )
        file.seek(bat_offset)
        table.tofile(file)
        file.truncate((1024 + blocks * (block_size // MIB)) * MIB)


def _time(work: Callable[[], int], runs: int) -> tuple[float, int]:
    seconds, found = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def run(folder: Path, *, runs: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each block size and fill."""
    for block_size in (32 * MIB, MIB):
        for fill, every in (("empty", 0), ("all present", 1), ("every other present", 2)):
            path = folder / f"map-{block_size}-{every}.vhdx"
            create_disk(path, size=64 * TIB, kind="dynamic", block_size=block_size)
            if every:
                _fill(path, block_size, every)

            def extract(path: Path = path) -> int:
                with open_vhdx(path) as disk:
                    return sum(len(extents) for extents in disk.allocated())

            median, extents = _time(extract, runs)
            path.unlink()
            yield {
                "name": f"64 TiB, {block_size // MIB} MiB blocks, {fill}",
                "median_seconds": median,
                "extents": extents,
                "limit_seconds": 0.5 if block_size > MIB else 5.0,
            }
