"""Godwit beside its peers: the same image, the same machine, whole commands, in turn.

Each command is timed from its start to its end, the start of its program included. In every round each program begins
an empty repository with empty caches of its own; the image is in the page cache. A restored image is compared with the
original, untimed; one that differs fails the run. Peak memory is that of a command's largest process. On a machine
that others use too, the processor time says more than the time that passed.

Peers that are not installed are left out, with a line that says so. None of them belongs to ``make setup``::

    apt-get install restic casync rsync qemu-utils
    apt-get install gcc pkg-config python3-dev libssl-dev libacl1-dev liblz4-dev libzstd-dev libxxhash-dev
    python3 -m venv TOOLS/borg && TOOLS/borg/bin/pip install 'borgbackup==1.4.*'
    python3 -m venv TOOLS/benji && TOOLS/benji/bin/pip install --no-deps benji==0.17.0 'PrettyTable<1' \\
        'sqlalchemy<2' alembic==1.8.1 Mako MarkupSafe greenlet typing_extensions 'setproctitle<2' python-dateutil six \\
        'ruamel.yaml<0.18' 'psycopg2-binary<3' 'argcomplete<2' 'sparsebitfield<1' sortedcontainers 'cerberus<2' \\
        setuptools pycryptodome 'pyparsing<3' wcwidth 'semantic-version<3' 'dateparser<2' pytz regex tzlocal \\
        structlog colorama diskcache 'attrs<22' zstandard

    python -m benchmarks peers --tools TOOLS --size 1024 --runs 3

TOOLS is a folder outside the checkout that holds a virtual environment for each peer that is a Python program.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.image import MIB, change_blocks, make_raw
from benchmarks.peer import LOCAL, Godwit, Peer, Restic, Rsync, Spent

if TYPE_CHECKING:
    from tests.support.servers import S3Server

CHANGES = 2  # how often a share of the image is changed in a round
CHANGED_SHARE = 0.01
TITLES = {"initial": "initial", "delta": "1 % changed", "restore": "restore to raw"}
# Those that compress; all of them but the converter keep a history.
COMPRESSING = frozenset({"borg", "restic", "casync", "benji", "qemu-img"})
HISTORIES = COMPRESSING - {"qemu-img"}
# How many times as fast as the fastest peer Godwit wants to be.
AIMS = {"initial": 1.5, "delta": 2.0, "restore": 1.3}
S3_AIMS = {"initial": 2.0, "delta": 2.0, "restore": 2.0}
STORED_AIM = 1.05  # how many times the bytes of the one that stores least it may store


@dataclass(slots=True)
class Figures:
    """All that was measured of one program."""

    peer: Peer
    version: str
    spent: dict[str, list[Spent]] = field(default_factory=lambda: {step: [] for step in TITLES})
    stored: dict[str, list[int]] = field(default_factory=lambda: {"initial": [], "delta": []})

    def median(self, step: str) -> float:
        """Return the median seconds of a step."""
        return statistics.median(one.seconds for one in self.spent[step])

    def times(self, step: str, other: Figures) -> list[float]:
        """Return, for each time that a step was done, how many times as long as ``other`` this took."""
        return [a.seconds / b.seconds for a, b in zip(self.spent[step], other.spent[step], strict=True)]

    def document(self, godwit: Figures) -> dict[str, Any]:
        """Return the figures in terms of JSON."""
        return {
            "name": self.peer.name,
            "version": self.version,
            "remark": self.peer.remark,
            "stored_bytes": self.stored,
            "steps": {
                step: {
                    "seconds": [one.seconds for one in spent],
                    "median_seconds": self.median(step),
                    "processor_seconds": [one.processor_seconds for one in spent],
                    "peak_bytes": max(one.peak_bytes for one in spent),
                    "times_godwit": self.times(step, godwit),
                }
                for step, spent in self.spent.items()
                if spent
            },
        }


def run(folder: Path, *, size_mib: int, runs: int, tools: Path | None, seed: int = 7) -> dict[str, Any]:
    """Measure against stores in ``folder``; return the figures, and say on stdout which peers are left out."""
    image, small = _images(folder, size_mib, seed)
    known: tuple[type[Peer], ...] = (Godwit, *LOCAL)
    kinds = [kind for kind in known if _is_there(kind(folder, image, tools))]
    for kind in kinds:
        _warm(kind(folder, small, tools))
    figures = [Figures(peer, peer.version()) for peer in (kind(folder, image, tools) for kind in kinds)]
    for number in range(runs):
        _round(figures, image, number, seed)
    return _document(figures, AIMS)


def run_s3(folder: Path, *, size_mib: int, runs: int, tools: Path | None, seed: int = 7) -> dict[str, Any] | None:
    """Measure Godwit and restic against SeaweedFS on loopback, a new server each round; None where one is missing."""
    import pytest  # noqa: PLC0415 - only this needs what the tests bring

    from tests.support import servers  # noqa: PLC0415

    image, small = _images(folder, size_mib, seed)
    if not _is_there(Restic(folder, image, tools)):
        return None
    figures: list[Figures] = []
    for number in range(runs):
        place = folder / "server"
        place.mkdir()
        try:
            with servers.seaweedfs(place) as server:
                if not figures:
                    for peer in _on_s3(folder, small, tools, server, "warm"):
                        _warm(peer)
                peers = _on_s3(folder, image, tools, server, "bench")
                figures = figures or [Figures(peer, peer.version()) for peer in peers]
                for one, peer in zip(figures, peers, strict=True):
                    one.peer = peer
                _round(figures, image, number, seed)
        except pytest.skip.Exception as missing:
            print(f"left out: {missing}")
            return None
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return _document(figures, S3_AIMS)


def _on_s3(folder: Path, image: Path, tools: Path | None, server: S3Server, prefix: str) -> list[Peer]:
    from tests.support import servers  # noqa: PLC0415

    godwit = Godwit(folder, image, tools, server.url(f"{prefix}-godwit"))
    restic = Restic(folder, image, tools, f"s3:{server.endpoint}/{server.bucket}/{prefix}-restic")
    peers: list[Peer] = [godwit, restic]
    for peer in peers:
        peer.environment |= servers.aws_environment()
        peer.count = partial(_bucket_bytes, server, f"{prefix}-{peer.name}/")
    return peers


def _bucket_bytes(server: S3Server, prefix: str) -> int:
    import boto3  # noqa: PLC0415

    from tests.support import servers  # noqa: PLC0415

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=servers.ACCESS_KEY,
        aws_secret_access_key=servers.SECRET_KEY,
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=server.bucket, Prefix=prefix)
    return sum(one["Size"] for page in pages for one in page.get("Contents", []))


def _images(folder: Path, size_mib: int, seed: int) -> tuple[Path, Path]:
    """Make the image, and a small one to warm up with."""
    image, small = folder / "image.raw", folder / "small.raw"
    make_raw(image, size_mib, seed)
    make_raw(small, 8, seed)
    return image, small


def _is_there(peer: Peer) -> bool:
    if not peer.program:
        print(f"left out: {peer.name} is not installed: {peer.packages}")
    return bool(peer.program)


def _warm(peer: Peer) -> None:
    """Let a program do all it is to do with a small image: the files that it loads are then in the page cache."""
    peer.fresh()
    peer.take()
    if "delta" in peer.steps:
        peer.take()
    if "restore" in peer.steps:
        peer.give_back()
    peer.discard()


def _round(figures: Sequence[Figures], image: Path, number: int, seed: int) -> None:
    """Let every program do each step before the next step begins; every round another goes first."""
    first = number % len(figures)
    turn = [*figures[first:], *figures[:first]]
    try:
        for one in turn:
            one.peer.fresh()
            if "initial" in one.peer.steps:
                _take(one, "initial", image)
            if "delta" not in one.peer.steps:
                _restore(one, image)
        for change in range(CHANGES):
            change_blocks(image, CHANGED_SHARE, seed + 1 + number * CHANGES + change)
            for one in turn:
                if "delta" in one.peer.steps:
                    _take(one, "delta", image)
        for one in turn:
            if "delta" in one.peer.steps and "restore" in one.peer.steps:
                _restore(one, image)
    finally:
        for one in turn:
            one.peer.discard()


def _take(one: Figures, step: str, image: Path) -> None:
    before = one.peer.stored_bytes() if step == "delta" else 0
    with image.open("rb", buffering=0) as file:  # into the page cache, should it have left it
        while file.read(4 * MIB):
            pass
    one.spent[step].append(one.peer.take())
    if one.peer.name != Rsync.name:  # a mirror: a change adds nothing to it, and leaves nothing of what was
        one.stored[step].append(one.peer.stored_bytes() - before)


def _restore(one: Figures, image: Path) -> None:
    one.spent["restore"].append(one.peer.give_back())
    done = subprocess.run(["cmp", str(one.peer.restored), str(image)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{one.peer.name} did not restore what it was given: {done.stdout}{done.stderr}")
    one.peer.drop_restored()


def _document(figures: Sequence[Figures], wanted: dict[str, float]) -> dict[str, Any]:
    godwit, others = figures[0], figures[1:]
    aims: list[dict[str, Any]] = []
    for step, aim in wanted.items():
        for kind, names in (("compresses", COMPRESSING), ("keeps a history too", HISTORIES)):
            rivals = [one for one in others if one.peer.name in names and one.spent[step]]
            rival = min(rivals, key=lambda one: one.median(step), default=None)
            if rival is not None and not (kind != "compresses" and aims[-1]["fastest"] == rival.peer.name):
                times = rival.times(step, godwit)
                aims.append({"step": step, "aim": aim, "fastest": rival.peer.name, "that": kind, "times": times})
    return {"peers": [one.document(godwit) for one in figures], "aims": aims, "stored": _least(godwit, others)}


def _least(godwit: Figures, others: Sequence[Figures]) -> list[dict[str, Any]]:
    """Compare what is stored with the peer that stores least, after the first point and after a change."""
    rows = []
    for step in godwit.stored:
        rivals = [one for one in others if one.stored[step]]
        if rivals:
            least = min(rivals, key=lambda one: statistics.median(one.stored[step]))
            share = statistics.median(godwit.stored[step]) / statistics.median(least.stored[step])
            rows.append({"step": step, "least": least.peer.name, "share": share, "aim": STORED_AIM})
    return rows


def show(title: str, document: dict[str, Any]) -> None:
    """Print the figures as a table, and where Godwit stands in each step."""
    print(
        f"{title:16}{'':12}{'median s':>10}{'CPU s':>8}{'peak MiB':>10}{'stored MiB':>12}  times godwit (least to most)"
    )
    for step, heading in TITLES.items():
        for peer in document["peers"]:
            found = peer["steps"].get(step)
            if found is None:
                continue
            stored = peer["stored_bytes"].get(step)
            shown = f"{statistics.median(stored) / MIB:.1f}" if stored else ""
            times = found["times_godwit"]
            beside = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            print(
                f"{heading:16}{peer['name']:12}{found['median_seconds']:>10.2f}"
                f"{statistics.median(found['processor_seconds']):>8.2f}{found['peak_bytes'] / MIB:>10.0f}"
                f"{shown:>12}  {'' if peer['name'] == 'godwit' else beside}"
            )
    for peer in document["peers"]:
        print(f"  {peer['name']}: {peer['version']}; {peer['remark']}")
    for one in document["aims"]:
        times = statistics.median(one["times"])
        verdict = "met" if times >= one["aim"] else "MISSED" if times >= 1 else "MISSED: slower"
        print(
            f"  {TITLES[one['step']]}: {times:.2f} x as fast as {one['fastest']}, the fastest that {one['that']} "
            f"(aim {one['aim']:.1f}: {verdict})"
        )
    for one in document["stored"]:
        verdict = "met" if one["share"] <= one["aim"] else "MISSED"
        print(
            f"  {TITLES[one['step']]}: stores {one['share']:.3f} x the bytes of {one['least']}, which stores least "
            f"(aim at most {one['aim']:.2f}: {verdict})"
        )
    print()
