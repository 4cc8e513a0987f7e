"""Runs the benchmarks and prints tables; --json writes every figure to a file as well."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import conversion, extraction, fleet, live, memory, peers, peers_tracked, recovery, replication, tracked


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        default=["replication", "maps", "memory"],
        help="replication, maps, memory; if named also conversion, tracked, recovery, live, fleet, peers, "
        "peers-s3, peers-tracked (see benchmarks/peers.py)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where images and stores go  [a memory file system, if there is room]"
    )
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="size of the image  [2048]")
    parser.add_argument("--runs", type=int, default=5, help="how often each is measured  [5]")
    parser.add_argument("--tools", type=Path, metavar="FOLDER", help="where peers that are Python programs have a venv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="godwit-bench-", dir=options.folder or _roomy(options.size)))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, in {_kind(folder)}\n")
    results: dict[str, Any] = {"folder": _kind(folder), "processors": os.cpu_count(), "size_mib": options.size}
    try:
        if "replication" in options.what:
            results["replication"] = _show_replication(
                replication.run(folder, size_mib=options.size, runs=options.runs)
            )
        if "maps" in options.what:
            results["maps"] = _show_maps(extraction.run(folder, runs=options.runs))
        if "memory" in options.what:
            results["memory"] = _show_memory(memory.run(folder))
        for module in (conversion, tracked, recovery, live):
            what = module.__name__.rpartition(".")[2]
            if what in options.what and (measured := module.run(folder, runs=options.runs)) is not None:
                results[what] = measured
                module.show(measured)
        if "fleet" in options.what:
            results["fleet"] = fleet.run(folder)
            fleet.show(results["fleet"])
        if "peers-tracked" in options.what:
            results["peers-tracked"] = peers_tracked.run(folder, runs=options.runs, tools=options.tools)
            peers_tracked.show(results["peers-tracked"])
        for what, measure in (("peers", peers.run), ("peers-s3", peers.run_s3)):
            if what in options.what:
                found = measure(folder, size_mib=options.size, runs=options.runs, tools=options.tools)
                if found is not None:
                    results[what] = found
                    peers.show(what, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2))


def _roomy(size_mib: int) -> Path | None:
    """Return a memory file system with room enough, so that the codec and not the disk is what is measured."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > size_mib * 6 << 20:
        return shared
    return None


def _kind(folder: Path) -> str:
    return "memory file system" if str(folder).startswith("/dev/shm") else "disk file system"


def _show_replication(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    print(f"{'':62}{'MiB':>7}{'median s':>10}{'MiB/s':>8}  share of the limit: median (least to most)")
    for row in rows:
        shown.append(row)
        print(f"{row['name']:62}{row['mib']:>7}{row['median_seconds']:>10.3f}{row['mib_per_second']:>8.0f}", end="")
        for position, (limit, shares) in enumerate(row["shares"].items()):
            spread = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
            text = f"{spread} of {limit.removeprefix('limit: ')}"
            print(f"{'' if position == 0 else chr(10) + ' ' * 87}  {text}", end="")
        print()
    print()
    return shown


def _show_maps(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    print(f"{'allocation map of':62}{'extents':>10}{'median s':>10}{'aim s':>8}")
    for row in rows:
        shown.append(row)
        print(f"{row['name']:62}{row['extents']:>10}{row['median_seconds']:>10.3f}{row['limit_seconds']:>8.1f}")
    print()
    return shown


def _show_memory(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = list(rows)
    print(f"{'64 TiB dynamic VHDX holding 2 GiB, whole commands':62}{'s':>10}{'peak MiB':>10}")
    for row in shown:
        print(f"{row['name']:62}{row['seconds']:>10.2f}{row['peak_mib']:>10.0f}")
    print()
    return shown


if __name__ == "__main__":
    main()
