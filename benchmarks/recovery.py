"""How soon a machine starts from its recovery point, and how fast the point is read meanwhile.

*First sector*: from the start of ``godwit failover --test`` to the first read that the BIOS makes of our disk, by
QEMU's own trace, for disks of two sizes with the same guest, from a store in a folder and from SeaweedFS. *Up*: until
the guest says so on its console; beside it the other way to get there, all of the disk copied first, and QEMU on that.
*Reads*: nbdcopy of a served disk beside a plain restore, and small reads beside qemu-nbd on the restored file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import conversion
from benchmarks.image import BLOCK, MIB, make_raw

SIZES_GIB = (20, 2047)
READ_MIB = 1024
READS = 4000
DEPTH = 8
READY = "GODWIT-READY"
LIMIT_SECONDS = 600.0
AIM_SECONDS = 3.0
AIM_GROWTH = 1.3
AIM_SHARE = 0.6  # of a plain restore's rate

_READ = re.compile(r"@(\d+\.\d+):blk_co_preadv .*? offset (?:0x)?0 bytes ")
_GODWIT = Path(sys.executable).with_name("godwit")


def run(folder: Path, *, runs: int) -> dict[str, Any]:
    """Return the figures, those of SeaweedFS only where it is installed."""
    import pytest  # noqa: PLC0415 - only this needs what the tests bring

    from tests.support import servers  # noqa: PLC0415

    disks = {size: conversion.make(folder / f"disk{size}.vhdx", size << 30) for size in SIZES_GIB}
    found: dict[str, Any] = {"starts": [], "reads": []}
    with ExitStack() as stack:
        stores = {"folder": (f"file://{folder / 'store'}", dict[str, str]())}
        try:
            server = stack.enter_context(servers.seaweedfs(_made(folder / "server")))
            stores["SeaweedFS"] = (server.url("bench"), servers.aws_environment())
        except pytest.skip.Exception as missing:
            print(f"left out: {missing}")
        sites = [_Site(folder, name, url, environment) for name, (url, environment) in stores.items()]
        for site in sites:
            for size, disk in disks.items():
                site.protect(f"vm{size}", disk)
        starts = [_Start(site, size) for site in sites for size in SIZES_GIB]
        for _ in range(runs):  # in turns, so that what the machine does besides hits all
            for start in starts:
                start.measure()
        found["starts"] = [start.row() for start in starts]
        found["up"] = _compare_up(sites[0], f"vm{SIZES_GIB[0]}", folder)
        image = folder / "image.raw"
        make_raw(image, READ_MIB, 7)
        for site in sites:
            site.protect("reads", image)
            found["reads"].append(_reads(site, image, folder, runs))
    return found


class _Site:
    """A store, and a machine that knows it."""

    def __init__(self, folder: Path, name: str, url: str, environment: dict[str, str]) -> None:
        self.name, self.folder = name, _made(folder / f"site-{name}")
        self.environment = {
            **os.environ,
            **environment,
            "GODWIT_STORE": url,
            "GODWIT_STATE": str(self.folder / "state"),
        }
        self.godwit("init")

    def godwit(self, *arguments: object, **more: str) -> Any:
        """Run a command; return what it tells as JSON."""
        command = [str(_GODWIT), *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**self.environment, **more}, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-800:]}")
        return json.loads(done.stdout) if done.stdout else None

    def protect(self, name: str, disk: Path) -> None:
        """Protect a VM of one disk, and make its first point."""
        self.godwit("protect", name, "--disk", disk)
        self.godwit("replicate", name)

    def forget_blocks(self) -> None:
        """Throw away what this machine has cached of the store."""
        for path in sorted((self.folder / "state").rglob("cache*")):
            if path.is_dir():
                subprocess.run(["rm", "-rf", str(path)], check=True)


class _Start:
    """Test failovers of one VM."""

    def __init__(self, site: _Site, size_gib: int) -> None:
        self._site, self._name, self._size_gib = site, f"vm{size_gib}", size_gib
        self.seconds: list[float] = []

    def measure(self) -> None:
        """Fail over, note when the BIOS read, and clean up."""
        self._site.forget_blocks()
        with _failed_over(self._site, self._name) as (begun, trace, _):
            self.seconds.append(_first_read(trace) - begun)

    def row(self) -> dict[str, Any]:
        """Return what was measured."""
        median = statistics.median(self.seconds)
        return {"store": self._site.name, "gib": self._size_gib, "seconds": self.seconds, "median_seconds": median}


@contextmanager
def _failed_over(site: _Site, name: str) -> Iterator[tuple[float, Path, Path]]:
    """Fail over for a test; yield when that was begun, QEMU's trace, and the machine's console."""
    trace = site.folder / "trace.log"
    trace.unlink(missing_ok=True)
    options = f"-msg timestamp=on -trace blk_co_preadv -D {trace}"
    begun = time.time()
    told = site.godwit(
        "failover", name, "--test", "--platform", "qemu", "--generation", 1, "--yes", GODWIT_QEMU_OPTIONS=options
    )
    machine = told["machine"]["name"]
    try:
        yield begun, trace, site.folder / "state" / "machines" / "qemu" / machine / "console.log"
    finally:
        site.godwit("cleanup", name, "--test", machine, "--yes")


def _first_read(trace: Path) -> float:
    """Return when the first sector was first read, by the clock on the wall."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        match = _READ.search(trace.read_text(errors="replace")) if trace.exists() else None
        if match:
            return float(match[1])
        time.sleep(0.05)
    raise RuntimeError(f"the BIOS has not read from the disk: {trace}")


def _compare_up(site: _Site, name: str, folder: Path) -> dict[str, float]:
    """Return the seconds until the guest is up: at once from the point, and restored first."""
    site.forget_blocks()
    with _failed_over(site, name) as (begun, _, console):
        at_once = _ready(console) - begun
    with _served(site, name, "--generation", "1") as socket:
        restored, console = folder / "restored.qcow2", folder / "console.log"
        begun = time.time()
        convert = ["qemu-img", "convert", "-p", "-n", "-W", "-m", "8", "-f", "raw", "-O", "qcow2"]
        size = SIZES_GIB[0] << 30
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", restored, str(size)], check=True)
        subprocess.run([*convert, f"nbd+unix:///?socket={socket}", restored], check=True, stdout=subprocess.DEVNULL)
    hydrated = time.time() - begun
    drive = f"file={restored},format=qcow2,if=ide"
    command = ["qemu-system-x86_64", "-M", "pc,accel=tcg", "-m", "1024", "-display", "none", "-drive", drive]
    started = time.time()
    machine = subprocess.Popen([*command, "-serial", f"file:{console}", "-nic", "none"])
    try:
        up = _ready(console) - started
    finally:
        machine.kill()
        machine.wait()
        restored.unlink()
    return {"at_once": at_once, "hydrated": hydrated, "up_from_file": up}


def _ready(console: Path) -> float:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if console.exists() and READY in console.read_text(errors="replace"):
            return time.time()
        time.sleep(0.1)
    raise RuntimeError(f"the guest does not come up: {console.read_text(errors='replace')[-800:]}")


@contextmanager
def _served(site: _Site, name: str, *options: str) -> Iterator[Path]:
    """Have a VM's newest point served while the context lasts; yield the socket."""
    socket = site.folder / "serve.sock"
    command = [str(_GODWIT), "serve", name, "--socket", str(socket), "--quiet", *options]
    server = subprocess.Popen(command, env=site.environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for(socket, server)
        yield socket
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _wait_for(socket: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not socket.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.02)


def _reads(site: _Site, image: Path, folder: Path, runs: int) -> dict[str, Any]:
    """Measure reads of a served disk beside a restore, and beside qemu-nbd on what was restored."""
    seconds: dict[str, list[float]] = {"restore": [], "nbdcopy": []}
    operations: dict[str, list[float]] = {}
    restored = folder / "restored.raw"
    for _ in range(runs):
        site.forget_blocks()
        seconds["restore"].append(_timed([_GODWIT, "restore", "reads", "--to", restored, "--quiet"], site.environment))
        site.forget_blocks()
        with _served(site, "reads") as socket:
            copy = folder / "copied.raw"
            seconds["nbdcopy"].append(_timed(["nbdcopy", f"nbd+unix:///?socket={socket}", copy], site.environment))
            subprocess.run(["cmp", copy, image], check=True)
            copy.unlink()
        site.forget_blocks()
        for size in (4096, BLOCK):
            with _served(site, "reads") as socket:
                operations.setdefault(f"served, {size >> 10} KiB", []).append(_per_second(socket, size, site))
            with _plain(restored, site.folder / "plain.sock") as socket:
                operations.setdefault(f"qemu-nbd, {size >> 10} KiB", []).append(_per_second(socket, size, site))
        restored.unlink()
    return {"store": site.name, "seconds": seconds, "operations_per_second": operations}


@contextmanager
def _plain(image: Path, socket: Path) -> Iterator[Path]:
    server = subprocess.Popen(["qemu-nbd", "-t", "-r", "-e", "8", "-f", "raw", "-k", str(socket), str(image)])
    try:
        _wait_for(socket, server)
        yield socket
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


def _per_second(socket: Path, size: int, site: _Site) -> float:
    """Return small reads a second, all over the disk: each is a stride further on, around the end of it."""
    stride = 997 * BLOCK  # a prime of blocks, so that a block is met again only after all others
    command = ["qemu-img", "bench", "-c", str(READS), "-d", str(DEPTH), "-s", str(size), "-S", str(stride)]
    elapsed = _timed([*command, "-f", "raw", f"nbd+unix:///?socket={socket}"], site.environment)
    return READS / elapsed


def _timed(command: list[Any], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    for row in found["starts"]:
        spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
        verdict = "met" if row["median_seconds"] < AIM_SECONDS else "MISSED"
        print(
            f"failover --test to the first sector, {row['gib']:>5} GiB, {row['store']}: {row['median_seconds']:.2f} s "
            f"({spread}; aim {AIM_SECONDS:.0f}: {verdict})"
        )
    for store in dict.fromkeys(row["store"] for row in found["starts"]):
        small, large = (row["median_seconds"] for row in found["starts"] if row["store"] == store)
        print(f"  {store}: the large one takes {large / small:.2f} x the small one's time (aim {AIM_GROWTH})")
    up = found["up"]
    print(
        f"the guest is up after {up['at_once']:.1f} s at once from the point; restored first: {up['hydrated']:.1f} s, "
        f"and up {up['up_from_file']:.1f} s later"
    )
    for row in found["reads"]:
        restore, copy = (statistics.median(row["seconds"][name]) for name in ("restore", "nbdcopy"))
        share = statistics.median(
            a / b for a, b in zip(row["seconds"]["restore"], row["seconds"]["nbdcopy"], strict=True)
        )
        verdict = "met" if share >= AIM_SHARE else "MISSED"
        print(
            f"{READ_MIB} MiB, {row['store']}: restore to raw {restore:.2f} s, nbdcopy of the served disk {copy:.2f} s: "
            f"{share:.2f} of its rate (aim {AIM_SHARE}: {verdict})"
        )
        for name, rates in row["operations_per_second"].items():
            print(f"  random reads, {name}: {statistics.median(rates):.0f} a second")
    print(f"  ({READS} reads, {DEPTH} at a time; {READ_MIB * MIB // BLOCK} blocks)")
    print()
