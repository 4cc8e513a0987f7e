"""The first delta from a recovery machine reads what its guest wrote and what the conversion changed, no more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from replica import catalog, cycle, history
from replica.errors import StoreError
from replica.failback.departure import Departure
from replica.model import Point, SourceDisk
from tests.support.engine import BLOCK, WORKERS, Lab, make_host, make_lab, random_blocks, restore_disk
from tests.support.running_qemu import RunningQemu, missing

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
    pytest.mark.xdist_group("live"),
]
MIB = 1 << 20
SIZE = 16 * MIB
BEGUN = "since-start"
CONVERTED = (7 * MIB + 512, 7 * MIB + 5120)


class Recovery(RunningQemu):
    """A machine on an overlay over a point's content, the conversion's bytes in what is below."""

    def __init__(self, folder: Path, content: bytes, *, bitmap: str | None = BEGUN) -> None:
        super().__init__(folder, ("qcow2",), SIZE)
        below = folder / "below.img"
        below.write_bytes(content)
        image = str(self.images[0])
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(below), image]
        subprocess.run(command, check=True)
        if bitmap is not None:
            subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", "-g", "65536", image, bitmap], check=True)
        self.model = [bytearray(content)]


@dataclass
class Reprotected:
    """A VM that is replicated from the recovery machine from now on."""

    lab: Lab
    qemu: Recovery
    point: int

    def replicate(self, monkeypatch: pytest.MonkeyPatch, *, point: int | None = None) -> Point:
        """Make a point, the departure being that from ``point``, and compare it with what the machine's disk holds."""
        ranges = np.array([CONVERTED], np.int64)
        start = Departure(self.point if point is None else point, BEGUN, {0: ranges})
        state = self.qemu.state()
        with monkeypatch.context() as patch:
            patch.setattr(cycle._Cycle, "_departure", lambda _: start)
            made = cycle.replicate(self.lab.store, self.lab.host, self.lab.found, workers=WORKERS)
        assert restore_disk(self.lab.store, self.lab.host, self.lab.found, made) == state[0]
        return made

    def refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let a cycle fail at its very end."""

        def refuse(*_: object) -> None:
            raise StoreError("no manifest today")

        with monkeypatch.context() as patch, pytest.raises(StoreError):
            patch.setattr(history, "publish", refuse)
            self.replicate(monkeypatch)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Reprotected]]:
    running: list[Recovery] = []

    def made(*, bitmap: str | None = BEGUN) -> Reprotected:
        data = random_blocks(3, SIZE // BLOCK)
        lab = make_lab(tmp_path / "vm", [data], host=make_host(tmp_path / "state", seed=os.getpid()))
        base = lab.replicate()
        start, end = CONVERTED
        folder = tmp_path / "recovery"
        folder.mkdir()
        qemu = Recovery(folder, data[:start] + b"\x5a" * (end - start) + data[end:], bitmap=bitmap)
        running.append(qemu)
        qemu.start()
        source = SourceDisk(0, "disk0", qemu.addresses()[0])
        catalog.update_settings(lab.store, lab.host, lab.found, sources=(source,))
        return Reprotected(lab, qemu, base.point)

    yield made
    for one in running:
        one.stop(kill=True)


def _found_by(point: Point) -> str:
    return point.disks[0].source["found_by"]


def test_the_first_delta_reads_what_was_written_and_converted(
    make: Callable[..., Reprotected], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make()
    vm.qemu.write(0, 3 * MIB + 512, 512, 7)
    vm.qemu.write(0, 12 * MIB, 2 * BLOCK, 8)
    first = vm.replicate(monkeypatch)
    assert (_found_by(first), first.cycle.read_bytes) == ("bitmap", 4 * BLOCK)  # three written, one converted
    assert "started from point" in first.disks[0].source["because"]
    vm.qemu.write(0, MIB, 512, 9)
    second = vm.replicate(monkeypatch)
    assert (_found_by(second), second.cycle.read_bytes) == ("bitmap", BLOCK)
    assert BEGUN not in vm.qemu.bitmaps()


def test_failed_cycles_lose_nothing_of_what_was_recorded(
    make: Callable[..., Reprotected], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make()
    for attempt in range(3):
        vm.qemu.write(0, (2 + attempt) * MIB, 512, attempt + 1)
        vm.refused(monkeypatch)
    vm.qemu.write(0, 9 * MIB, 512, 9)
    point = vm.replicate(monkeypatch)
    assert (_found_by(point), point.cycle.read_bytes) == ("bitmap", 5 * BLOCK)
    assert len(vm.qemu.bitmaps()) == 1


def test_a_bitmap_that_was_not_dropped_any_more_is_dropped_by_the_next_cycle(
    make: Callable[..., Reprotected], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make()
    with monkeypatch.context() as patch:
        patch.setattr("replica.live.LiveSource._acknowledge", lambda *_: None)
        vm.replicate(monkeypatch)
    assert BEGUN in vm.qemu.bitmaps()
    vm.qemu.write(0, 4 * MIB, 512, 2)
    point = vm.replicate(monkeypatch)
    assert (_found_by(point), point.cycle.read_bytes) == ("bitmap", BLOCK)
    assert len(vm.qemu.bitmaps()) == 1
    assert BEGUN not in vm.qemu.bitmaps()


def test_the_bitmap_outlives_an_orderly_end_of_the_machine(
    make: Callable[..., Reprotected], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make()
    vm.qemu.write(0, 2 * MIB, 512, 1)
    vm.qemu.stop()
    vm.qemu.start()
    vm.qemu.write(0, 4 * MIB, 512, 2)
    point = vm.replicate(monkeypatch)
    assert (_found_by(point), point.cycle.read_bytes) == ("bitmap", 3 * BLOCK)


@pytest.mark.parametrize(
    "doubt", ["missing", "killed", "stopped", "other point", "stopped, then a failed cycle", "attempt lost"]
)
def test_what_is_in_doubt_is_compared_by_hash(
    make: Callable[..., Reprotected], monkeypatch: pytest.MonkeyPatch, doubt: str
) -> None:
    vm = make(bitmap=None if doubt == "missing" else BEGUN)
    vm.qemu.write(0, 2 * MIB, 512, 1)
    if doubt == "killed":
        vm.qemu._io(0, "flush")  # what the guest has not flushed goes with the process
        vm.qemu.stop(kill=True)
        vm.qemu.start()
    elif doubt.startswith("stopped"):
        vm.qemu.control("block-dirty-bitmap-disable", node="d0", name=BEGUN)
    elif doubt == "attempt lost":  # the bitmap that goes on where the first was stopped is kept in no file
        vm.refused(monkeypatch)
        vm.qemu.write(0, 3 * MIB, 512, 3)
        vm.qemu.stop()
        vm.qemu.start()
    vm.qemu.write(0, 4 * MIB, 512, 2)
    if doubt == "stopped, then a failed cycle":
        vm.refused(monkeypatch)
        vm.qemu.write(0, 5 * MIB, 512, 2)
    point = vm.replicate(monkeypatch, point=vm.point + 1 if doubt == "other point" else None)
    assert _found_by(point) == "scan"
    assert point.cycle.read_bytes == SIZE
    vm.qemu.write(0, 6 * MIB, 512, 4)
    assert vm.replicate(monkeypatch).cycle.read_bytes == BLOCK
    assert len(vm.qemu.bitmaps()) == 1
