"""Replication of a running QEMU: one instant of all disks, only what changed is read, and nothing is ever lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cli import main
from cli.output import Output
from replica import catalog, cycle, history, protection
from replica.errors import GodwitError, SourceError, StoreError
from replica.model import Consistency, Point
from replica.monitor import Monitor
from replica.nbd.disk import NbdDisk
from replica.qemu import LiveAddress
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, WORKERS, make_host, restore_disk
from tests.support.guest_agent import FakeAgent
from tests.support.running_qemu import RunningQemu, missing
from vhdx.disk import WritableBuffer

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
    pytest.mark.xdist_group("live"),
]
MIB = 1 << 20
SIZE = 24 * MIB
OVER = {"snapshot_node_name": "over", "format": "qcow2"}


class Lab:
    """A running machine under replication, and what its disks held at each point."""

    def __init__(self, qemu: RunningQemu, folder: Path, agent: str | None = None) -> None:
        self.qemu = qemu
        self.store = MemoryStore("live")
        # Two runs of these tests side by side must not take each other for one VM: what is left of it is cleared away.
        self.host = make_host(folder / "state", seed=os.getpid())
        catalog.init_store(self.store, self.host)
        self.vm, _ = protection.protect(self.store, self.host, tenant="default", name="vm", disks=qemu.addresses(agent))
        self.points: dict[int, tuple[bytes, ...]] = {}

    def replicate(self, *, during: Callable[[], None] | None = None) -> Point:
        """Make a point, ``during`` the reading of which something happens, and compare it with the state before."""
        state = self.qemu.state()
        if during is None:
            point = cycle.replicate(self.store, self.host, self.vm, workers=WORKERS)
        else:
            with before_the_first_read(during):
                point = cycle.replicate(self.store, self.host, self.vm, workers=WORKERS)
        self.points[point.point] = state
        assert self.qemu.ours() == []
        self.assert_restores(point.point)
        return point

    def assert_restores(self, *numbers: int) -> None:
        for number in numbers or tuple(self.points):
            point = history.point(self.store, self.vm.keys, number)
            for disk, held in enumerate(self.points[number]):
                assert restore_disk(self.store, self.host, self.vm, point, disk) == held, (number, disk)


@contextmanager
def before_the_first_read(act: Callable[[], None]) -> Iterator[None]:
    """Act once the instant has been taken and before anything is read of it."""
    original = NbdDisk.read_into
    done: list[bool] = []

    def read_into(self: NbdDisk, offset: int, buffer: WritableBuffer) -> None:
        if not done:
            done.append(True)
            act()
        original(self, offset, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NbdDisk, "read_into", read_into)
        yield
    assert done


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[RunningQemu]:
    with RunningQemu(tmp_path, ("vhdx", "qcow2", "raw"), SIZE) as running:
        for number in range(3):
            running.write(number, MIB * (1 + number), 3 * MIB, 10 + number)
        yield running


@pytest.fixture
def lab(qemu: RunningQemu, tmp_path: Path) -> Lab:
    return Lab(qemu, tmp_path)


def _found_by(point: Point) -> list[str]:
    return [disk.source["found_by"] for disk in point.disks]


def test_a_delta_reads_what_the_guest_wrote_and_nothing_else(lab: Lab) -> None:
    first = lab.replicate()
    assert (_found_by(first), first.consistency) == (["scan"] * 3, Consistency.CRASH)
    assert [disk.format for disk in first.disks] == ["vhdx", "qcow2", "raw"]
    for number in range(3):
        lab.qemu.write(number, 5 * MIB + 4096, 512, 77)
    second = lab.replicate()
    assert _found_by(second) == ["bitmap"] * 3
    assert (second.cycle.read_bytes, second.cycle.changed_blocks) == (3 * BLOCK, 3)
    third = lab.replicate()
    assert (third.cycle.read_bytes, _found_by(third)) == (0, ["bitmap"] * 3)
    assert [len(lab.qemu.bitmaps(number)) for number in range(3)] == [1, 1, 1]
    lab.assert_restores()


def test_what_is_written_while_a_point_is_read_belongs_to_the_next(lab: Lab) -> None:
    def overwrite() -> None:
        for number in range(3):
            lab.qemu.write(number, MIB + number * 4096, 8 * MIB, 90 + number)  # over data, and where there was none
            lab.qemu.discard(number, 20 * MIB, MIB)

    lab.replicate(during=overwrite)
    second = lab.replicate(during=lambda: lab.qemu.write(2, MIB, BLOCK, 3))
    assert _found_by(second) == ["bitmap"] * 3
    lab.replicate()
    lab.assert_restores()


def test_what_the_guest_discards_becomes_zero(lab: Lab) -> None:
    lab.replicate()
    for number in range(3):
        lab.qemu.discard(number, MIB * (1 + number), 2 * MIB)
    point = lab.replicate()
    assert (point.cycle.zero_blocks, point.cycle.changed_blocks) == (3 * 32, 0)


def test_a_qemu_that_was_started_anew_is_compared_by_hash_and_history_stays(lab: Lab) -> None:
    lab.replicate()
    lab.qemu.stop()
    lab.qemu.start()
    lab.qemu.write(1, 9 * MIB, BLOCK, 5)
    point = lab.replicate()
    assert _found_by(point) == ["scan"] * 3
    assert "started anew" in point.disks[0].source["because"]
    assert point.cycle.changed_blocks == 1
    assert _found_by(lab.replicate()) == ["bitmap"] * 3
    lab.assert_restores()


def test_nothing_is_lost_by_cycles_that_fail_one_after_the_other(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.replicate()
    publish = history.publish
    for attempt in range(3):
        lab.qemu.write(0, (6 + attempt) * MIB, BLOCK, 20 + attempt)

        def refuse(*_: object) -> None:
            raise StoreError("no manifest today")

        monkeypatch.setattr(history, "publish", refuse)
        with pytest.raises(StoreError), before_the_first_read(lambda: lab.qemu.write(0, 12 * MIB, BLOCK, 66)):
            cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
        assert lab.qemu.ours() == []
    monkeypatch.setattr(history, "publish", publish)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["bitmap"] * 3, 4)
    assert len(lab.qemu.bitmaps()) == 1


def test_a_point_whose_bitmaps_were_not_dropped_any_more_is_continued(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.replicate()
    lab.qemu.write(0, 9 * MIB, BLOCK, 1)
    monkeypatch.setattr("replica.live.LiveSource._acknowledge", lambda *_: None)
    lab.replicate()
    assert len(lab.qemu.bitmaps()) == 2
    monkeypatch.undo()
    lab.qemu.write(0, 10 * MIB, BLOCK, 1)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.read_bytes) == (["bitmap"] * 3, BLOCK)
    assert len(lab.qemu.bitmaps()) == 1


class KilledError(BaseException):
    """Stands for a process that ended without cleaning up."""


@pytest.mark.parametrize("after", range(1, 80, 5))
def test_what_a_killed_cycle_left_is_removed_by_the_next(lab: Lab, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process ends after any number of commands to QEMU; from then on it says nothing more to it."""
    lab.replicate()
    lab.qemu.write(0, 9 * MIB, BLOCK, 1)
    execute = Monitor.execute
    count = 0

    def dying(self: Monitor, command: str, **arguments: object) -> object:
        nonlocal count
        if self.path != lab.qemu.socket:
            return execute(self, command, **arguments)  # type: ignore[arg-type]
        if count >= after:
            raise KilledError
        count += 1
        return execute(self, command, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Monitor, "execute", dying)
    with suppress(KilledError):  # with the last numbers it is through
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
    monkeypatch.undo()
    lab.qemu.write(0, 10 * MIB, BLOCK, 2)
    point = lab.replicate()
    assert _found_by(point) == ["bitmap"] * 3
    assert point.cycle.changed_blocks == (2 if point.previous == 1 else 1)
    assert len(lab.qemu.bitmaps()) == 1
    lab.assert_restores()


def test_what_a_killed_look_at_a_disk_left_is_removed_by_the_next_cycle(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.replicate()
    execute = Monitor.execute

    def dying(self: Monitor, command: str, **arguments: object) -> object:
        if command == last:
            raise KilledError
        return execute(self, command, **arguments)  # type: ignore[arg-type]

    for last in ("nbd-server-start", "block-export-add", "block-export-del"):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(Monitor, "execute", dying)
            if last != "block-export-del":
                patch.setattr("replica.qemu.Machine.remove_ours", lambda _: None)
            protection.update(lab.store, lab.host, lab.vm, disks=lab.qemu.addresses())
        assert _found_by(lab.replicate()) == ["bitmap"] * 3


def test_an_interrupted_cycle_leaves_nothing_in_qemu(lab: Lab) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_the_first_read(interrupt):
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
    assert lab.qemu.ours() == []
    lab.replicate()


def test_a_disk_that_grew_is_compared_by_hash(lab: Lab) -> None:
    lab.replicate()
    lab.qemu.control("block_resize", node_name="d2", size=SIZE + MIB)
    lab.qemu.model[2] += bytes(MIB)
    point = lab.replicate()
    assert _found_by(point) == ["bitmap", "bitmap", "scan"]
    assert point.disks[2].size == SIZE + MIB


def test_a_bitmap_that_somebody_removed_is_noticed(lab: Lab) -> None:
    lab.replicate()
    lab.qemu.control("block-dirty-bitmap-remove", node="d1", name=lab.qemu.bitmaps(1)[0])
    lab.qemu.write(1, 9 * MIB, BLOCK, 1)
    assert _found_by(lab.replicate()) == ["bitmap", "scan", "bitmap"]


def test_where_room_for_scratch_gets_short_the_guest_goes_on_and_nothing_is_published(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.replicate()
    lab.qemu.write(0, 9 * MIB, BLOCK, 1)

    def fill() -> None:
        monkeypatch.setattr("replica.scratch.LEAST_ROOM_BYTES", 1 << 60)
        while lab.qemu.control("query-jobs"):
            pass
        lab.qemu.write(0, 9 * MIB, BLOCK, 2)  # what is read now is no instant any more

    with pytest.raises(SourceError, match="MiB are left"), before_the_first_read(fill):
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
    with pytest.raises(SourceError, match="MiB are left"):
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
    monkeypatch.undo()
    assert lab.qemu.ours() == []
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["bitmap"] * 3, 1)


def test_foreign_bitmaps_are_left_alone(lab: Lab) -> None:
    lab.qemu.control("block-dirty-bitmap-add", node="d0", name="somebody's")
    lab.replicate()
    lab.replicate()
    assert "somebody's" in lab.qemu.bitmaps()


def test_a_node_that_was_covered_by_an_overlay_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.replicate()
    lab.qemu.control("blockdev-snapshot-sync", node_name="d0", snapshot_file=str(tmp_path / "over"), **OVER)
    with pytest.raises(SourceError, match="read-only"):
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)


def test_somebody_elses_nbd_server_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "foreign")}}
    lab.qemu.control("nbd-server-start", addr=address)
    lab.qemu.control("block-export-add", type="nbd", id="foreign", node_name="d0", writable=False)
    with pytest.raises(SourceError, match="NBD server is in use"):
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
    assert lab.qemu.ours() == []
    assert lab.qemu.control("query-block-exports")
    lab.qemu.control("nbd-server-stop")
    lab.replicate()


def test_a_machine_that_is_off_and_a_node_that_is_not_there_are_named(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(GodwitError, match="no block node 'nothing'"):
        protection.protect(
            lab.store,
            lab.host,
            tenant="default",
            name="other",
            disks=[str(LiveAddress(lab.qemu.socket, "nothing"))],
        )
    lab.qemu.stop()
    with pytest.raises(SourceError, match="cannot be reached"):
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)


def test_the_delta_costs_the_same_on_a_larger_disk(tmp_path: Path) -> None:
    read = []
    for size in (64 * MIB, 1 << 40):
        folder = tmp_path / str(size)
        folder.mkdir()
        read.append(_delta_of(folder, size))
    assert read[0] == read[1]


def _delta_of(folder: Path, size: int) -> tuple[int, int]:
    with RunningQemu(folder, ("qcow2",), size) as qemu:
        lab = Lab(qemu, folder)
        cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
        for place in range(8):
            qemu.control(
                "human-monitor-command",
                command_line=f'qemu-io -d /machine/peripheral/v0/virtio-backend "write -q {size // 8 * place} 64k"',
            )
        point = cycle.replicate(lab.store, lab.host, lab.vm, workers=WORKERS)
        assert _found_by(point) == ["bitmap"]
        return point.cycle.read_bytes, point.cycle.changed_blocks


def _godwit(*arguments: str) -> tuple[int, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run(list(arguments), output)
    assert isinstance(output.stdout, io.StringIO)
    return code, output.stdout.getvalue()


def test_the_commands_protect_and_replicate_a_running_machine(
    qemu: RunningQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", f"file://{tmp_path}/store")
    assert _godwit("init", f"file://{tmp_path}/store")[0] == 0
    assert _godwit("protect", "vm", "--qmp", qemu.socket, "--disk", "d0", "--disk", "d2")[0] == 0
    assert _godwit("replicate", "vm")[0] == 0
    qemu.write(2, 9 * MIB, BLOCK, 8)
    absent = str(tmp_path / "agent.sock")  # a guest that cannot be frozen is replicated all the same
    nodes = ["--disk", "d0", "--disk", "d2"]
    assert _godwit("protect", "vm", "--update", "--qmp", qemu.socket, *nodes, "--guest-agent", absent)[0] == 0
    code, said = _godwit("replicate", "vm", "--json")
    point = json.loads(said)
    assert (code, point["consistency"], point["changed_blocks"]) == (0, "crash", 1)
    assert [(disk["number"], disk["name"], disk["found_by"]) for disk in point["disks"]] == [
        (0, "d0", "bitmap"),
        (1, "d2", "bitmap"),
    ]
    assert _godwit("restore", "vm", "--to", str(tmp_path / "out"), "--format", "raw")[0] == 0
    for restored, number in zip(sorted((tmp_path / "out").iterdir()), (0, 2), strict=True):
        assert restored.read_bytes() == qemu.state()[number]
    assert _godwit("protect", "vm", "--update", "--guest-agent", absent)[0] == 2


def test_a_guest_that_was_frozen_for_the_instant_makes_the_point_application_consistent(
    qemu: RunningQemu, tmp_path: Path
) -> None:
    agent = FakeAgent(tmp_path / "agent.sock")
    lab = Lab(qemu, tmp_path, agent.path)
    point = lab.replicate(during=lambda: assert_thawed(agent))
    assert point.consistency == Consistency.APPLICATION
    agent.refuses.add("guest-fsfreeze-freeze")
    point = lab.replicate()
    assert (point.consistency, _found_by(point)) == (Consistency.CRASH, ["bitmap"] * 3)
    assert "not today" in point.disks[0].source["not_quiesced"]
    agent.close()


def assert_thawed(agent: FakeAgent) -> None:
    assert agent.frozen_once.is_set()
    assert not agent.frozen


def test_a_cycle_that_is_killed_outright_costs_the_next_nothing(qemu: RunningQemu, tmp_path: Path) -> None:
    """The real thing: kill -9 while the disks are read, and the scratch files with it."""
    store, state = f"file://{tmp_path}/store", str(tmp_path / "state")
    environment = {**os.environ, "GODWIT_STATE": state, "GODWIT_STORE": store}
    command = [sys.executable, "-c", "import sys; from cli.main import main; sys.exit(main())"]
    for arguments in (["init", store], ["protect", "vm", "--qmp", qemu.socket, "--disk", "d0"], ["replicate", "vm"]):
        subprocess.run([*command, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    qemu.write(0, 9 * MIB, 4 * MIB, 8)
    process = subprocess.Popen([*command, "replicate", "vm"], env=environment, stdout=subprocess.DEVNULL)
    while not any(name.startswith("godwit") for name in qemu.ours()):
        assert process.poll() is None
    process.kill()
    process.wait()
    done = subprocess.run([*command, "replicate", "vm", "--json"], env=environment, check=True, stdout=subprocess.PIPE)
    point = json.loads(done.stdout)
    assert (point["disks"][0]["found_by"], point["changed_blocks"]) == ("bitmap", 64)
    assert qemu.ours() == []
    assert len(qemu.bitmaps()) == 1
