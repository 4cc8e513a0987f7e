"""Deltas whose changes are known, beside peers that look for them: one disk of 16 GiB, 1 % of its blocks changed.

The peers read a raw image; Godwit replicates a VHDX of the same content, each round's changes in a checkpoint (AVHDX)
above the last, and the same content once more by comparing all hashes. Whole commands are timed, their start included.
What Godwit restores at the end is compared with the raw image, untimed.
"""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.image import BLOCK, MIB, Content
from benchmarks.peer import Borg, Godwit, Peer, Restic, Spent
from vhdx.convert import convert_disk
from vhdx.create import create_disk
from vhdx.formats import open_disk
from vhdx.osfile import open_file

SIZE_MIB = 16 << 10
DATA_MIB = 8 << 10
RUN_MIB = 32  # data and holes take turns in runs of this
CHANGED_SHARE = 0.01
AIM = 20.0  # how many times as fast as the fastest peer that keeps a history


class _Tracked(Godwit):
    """Godwit on the chain of checkpoints; ``rescan`` compares all in spite of it."""

    def __init__(self, folder: Path, image: Path, base: Path) -> None:
        super().__init__(folder, image, None)
        self.disks = [base]

    def prepare(self) -> None:
        """Make the store and protect the disk."""
        self.run("init", "--quiet")
        self.run("protect", "vm", "--disk", str(self.disks[0]), "--quiet")

    def add_checkpoint(self, changes: list[tuple[int, bytes]]) -> None:
        """Put changes, (offset in bytes, content), in a checkpoint of their own, as a hypervisor would."""
        child = self.disks[0].with_name(f"checkpoint{len(self.disks)}.avhdx")
        create_disk(child, parent=self.disks[-1])
        with open_disk(child, writable=True) as disk:
            for offset, content in changes:
                disk.write_at(offset, content)
            disk.flush()
        self.disks.append(child)
        self.run("protect", "vm", "--update", "--disk", str(child), "--quiet")

    def rescan(self) -> Spent:
        """Compare everything with what is stored."""
        return self.run("replicate", "vm", "--rescan", "--quiet")


def run(folder: Path, *, runs: int, tools: Path | None, size_mib: int = SIZE_MIB, seed: int = 7) -> dict[str, Any]:
    """Return the figures of each program; say on stdout which peers are left out."""
    image, base = folder / "image.raw", folder / "base.vhdx"
    _make_sparse(image, size_mib, seed)
    with open_disk(image, format="raw") as source:
        convert_disk(source, base, format="vhdx")
    godwit = _Tracked(folder, image, base)
    peers: list[Peer] = [kind(folder, image, tools) for kind in (Borg, Restic)]
    for missing in [one for one in peers if not one.program]:
        print(f"left out: {missing.name} is not installed: {missing.packages}")
        peers.remove(missing)
    spent: dict[str, list[Spent]] = {"godwit": [], "godwit by hash": [], **{one.name: [] for one in peers}}
    initial: dict[str, float] = {}
    for peer in (godwit, *peers):
        peer.fresh()
        initial[peer.name] = peer.take().seconds
    for number in range(runs):
        changes = _changes(size_mib, seed + 1 + number)
        _apply(image, changes)
        godwit.add_checkpoint(changes)
        spent["godwit"].append(godwit.take())
        spent["godwit by hash"].append(godwit.rescan())
        for peer in peers:
            spent[peer.name].append(peer.take())
    godwit.give_back()
    subprocess.run(["cmp", str(godwit.restored), str(image)], check=True)
    for peer in (godwit, *peers):
        peer.discard()
    return _document(size_mib, initial, spent, [one.name for one in peers])


def _make_sparse(path: Path, size_mib: int, seed: int) -> None:
    """Make a raw image of which every other run holds data, half noise and half text; the others are holes."""
    content = Content(seed)
    with path.open("wb") as file:
        file.truncate(size_mib * MIB)
        for number in range(size_mib):
            if number // RUN_MIB % 2 == 0:
                file.seek(number * MIB)
                file.write(content.noise(MIB) if number % 2 else content.text(MIB))


def _changes(size_mib: int, seed: int) -> list[tuple[int, bytes]]:
    rng = np.random.default_rng(seed)
    blocks = size_mib * MIB // BLOCK
    chosen = np.sort(rng.choice(blocks, int(blocks * CHANGED_SHARE), replace=False))
    return [(block * BLOCK, rng.bytes(BLOCK)) for block in chosen.tolist()]


def _apply(image: Path, changes: list[tuple[int, bytes]]) -> None:
    file = open_file(image, writable=True)
    try:
        for offset, content in changes:
            file.pwrite(offset, content)
    finally:
        file.close()


def _document(
    size_mib: int, initial: dict[str, float], spent: dict[str, list[Spent]], peers: list[str]
) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "initial_seconds": initial.get(name),
            "seconds": [one.seconds for one in found],
            "median_seconds": statistics.median(one.seconds for one in found),
            "processor_seconds": statistics.median(one.processor_seconds for one in found),
            "peak_bytes": max(one.peak_bytes for one in found),
            "times_godwit": [one.seconds / own.seconds for one, own in zip(found, spent["godwit"], strict=True)],
        }
        for name, found in spent.items()
    ]
    rivals = [row for row in rows if row["name"] in peers]
    fastest = min(rivals, key=lambda row: float(str(row["median_seconds"])), default=None)
    return {"size_mib": size_mib, "rows": rows, "fastest": fastest and fastest["name"], "aim": AIM}


def show(document: dict[str, Any]) -> None:
    """Print what was measured."""
    print(f"1 % of {document['size_mib'] >> 10} GiB changed in random blocks of 64 KiB; whole commands")
    print(f"{'':18}{'median s':>10}{'CPU s':>8}{'peak MiB':>10}  times godwit (least to most)")
    for row in document["rows"]:
        times = row["times_godwit"]
        beside = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        print(
            f"{row['name']:18}{row['median_seconds']:>10.2f}{row['processor_seconds']:>8.2f}"
            f"{row['peak_bytes'] / MIB:>10.0f}  {'' if row['name'] == 'godwit' else beside}"
        )
    for row in document["rows"]:
        if row["name"] == document["fastest"]:
            times = statistics.median(row["times_godwit"])
            verdict = "met" if times >= document["aim"] else "MISSED"
            print(f"  {times:.1f} x as fast as {row['name']}, the fastest peer (aim {document['aim']:.0f}: {verdict})")
    print()
