"""Replication of libvirt domains against a real daemon: instants, deltas by checkpoints, and whatever goes wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from cli import main
from cli.output import Output
from replica import catalog, cycle, history, protection
from replica.errors import GodwitError, SourceError, StoreError
from replica.leftovers import Leftovers
from replica.libvirt.virsh import Virsh
from replica.model import Consistency, Machine, Point
from replica.nbd.disk import NbdDisk
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, WORKERS, make_host, restore_disk
from tests.support.libvirt_host import LibvirtHost, RunningDomain, missing
from vhdx.disk import WritableBuffer

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
    pytest.mark.xdist_group("libvirt"),
]
MIB = 1 << 20
SIZE = 16 * MIB
TRACKED = ("qcow2", "qcow2")
NUMBERS = count(1)


@pytest.fixture(scope="module")
def libvirt() -> Iterator[LibvirtHost]:
    with LibvirtHost() as host:
        yield host


class Lab:
    """A domain under replication, and what its disks held at each point."""

    def __init__(self, domain: RunningDomain, folder: Path) -> None:
        self.domain = domain
        self.store = MemoryStore("libvirt")
        self.host = make_host(folder / "state", seed=next(NUMBERS))
        catalog.init_store(self.store, self.host)
        # As protect does it, but for the look at each disk, which takes its time.
        self.vm = catalog.protect(
            self.store,
            self.host,
            tenant="default",
            name="vm",
            machine=Machine(1),
            sources=protection.number_disks((), domain.addresses(), next_number=0),
            interval_seconds=300,
            compression_level=1,
        )
        self.points: dict[int, tuple[bytes, ...]] = {}

    def replicate(self, *, during: Callable[[], None] | None = None) -> Point:
        """Make a point, ``during`` the reading of which something happens, and compare it with the state before."""
        state = self.domain.state()
        if during is None:
            point = self.cycle()
        else:
            with before_the_first_read(during):
                point = self.cycle()
        self.points[point.point] = state
        assert list(self.domain.host.scratch.iterdir()) == []
        self.assert_restores(point.point)
        return point

    def cycle(self) -> Point:
        return cycle.replicate(self.store, self.host, self.vm, workers=WORKERS)

    def assert_nothing_left(self) -> None:
        assert self.domain.job() is None
        assert list(self.domain.host.scratch.iterdir()) == []

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


@pytest.fixture(scope="module")
def shared(libvirt: LibvirtHost) -> RunningDomain:
    """A domain that tests have in common which leave it running as it is."""
    domain = RunningDomain(libvirt, "shared", TRACKED, SIZE)
    domain.start()
    return domain


@pytest.fixture
def make_domain(libvirt: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunningDomain]]:
    monkeypatch.setattr("replica.libvirt.source.default_scratch_folder", lambda: libvirt.scratch)
    made: list[RunningDomain] = []

    def make(formats: tuple[str, ...] = TRACKED, *, size: int = SIZE, agent: bool = False) -> RunningDomain:
        domain = RunningDomain(libvirt, f"vm{next(NUMBERS)}", formats, size, agent=agent)
        made.append(domain)
        domain.start()
        for number in range(len(formats)):
            domain.write(number, MIB * (1 + number), 3 * MIB, 10 + number)
        return domain

    yield make
    for domain in made:
        domain.kill_soon()


@pytest.fixture
def lab(shared: RunningDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr("replica.libvirt.source.default_scratch_folder", lambda: shared.host.scratch)
    for number in range(2):
        shared.discard(number, 0, SIZE)
        shared.write(number, MIB * (1 + number), 3 * MIB, 10 + number)
    lab = Lab(shared, tmp_path)
    yield lab
    monkeypatch.undo()
    if shared.job() is not None:
        shared.host.virsh("domjobabort", shared.name)
    for name in shared.checkpoints():
        shared.host.virsh("checkpoint-delete", shared.name, name)


@pytest.fixture
def own(make_domain: Callable[..., RunningDomain], tmp_path: Path) -> Lab:
    """A lab whose domain a test may stop, kill and change."""
    return Lab(make_domain(), tmp_path)


def _found_by(point: Point) -> list[str]:
    return [disk.source["found_by"] for disk in point.disks]


# -- points and deltas ------------------------------------------------------------------------------------------------


def test_a_delta_reads_what_the_guest_wrote_and_nothing_else(lab: Lab) -> None:
    first = lab.replicate()
    assert (_found_by(first), first.consistency) == (["scan"] * 2, Consistency.CRASH)
    assert [(disk.format, disk.name) for disk in first.disks] == [("qcow2", "vda"), ("qcow2", "vdb")]
    for number in range(2):
        lab.domain.write(number, 5 * MIB + 4096, 512, 77)
    second = lab.replicate()
    assert _found_by(second) == ["bitmap"] * 2
    assert (second.cycle.read_bytes, second.cycle.changed_blocks) == (2 * BLOCK, 2)
    third = lab.replicate()
    assert (third.cycle.read_bytes, _found_by(third)) == (0, ["bitmap"] * 2)
    assert len(lab.domain.checkpoints()) == len(lab.domain.bitmaps()) == 1
    lab.assert_restores()


def test_what_is_written_while_a_point_is_read_belongs_to_the_next(lab: Lab) -> None:
    """One instant over both disks: both are written to before anything is read of either."""

    def overwrite() -> None:
        for number in range(2):
            lab.domain.write(number, MIB + number * 4096, 8 * MIB, 90 + number)  # over data, and where there was none
            lab.domain.discard(number, 12 * MIB, MIB)

    lab.replicate(during=overwrite)
    second = lab.replicate(during=lambda: lab.domain.write(1, MIB, BLOCK, 3))
    assert _found_by(second) == ["bitmap"] * 2
    third = lab.replicate()
    assert (third.cycle.read_bytes, third.cycle.changed_blocks) == (BLOCK, 1)
    lab.assert_restores()


def test_disks_that_keep_no_bitmaps_are_compared_by_hash_at_the_same_instant(
    make_domain: Callable[..., RunningDomain], tmp_path: Path
) -> None:
    lab = Lab(make_domain(("qcow2", "raw", "qcow2-old")), tmp_path)

    def overwrite() -> None:
        for number in range(3):
            lab.domain.write(number, MIB, 4 * MIB, 50 + number)

    first = lab.replicate(during=overwrite)
    assert [disk.format for disk in first.disks] == ["qcow2", "raw", "qcow2"]
    # An old qcow2 makes libvirt refuse the checkpoint as a whole; the point is none the worse.
    assert "v2 files" in first.disks[0].source["not_tracked"]
    lab.domain.write(1, 9 * MIB, BLOCK, 1)
    second = lab.replicate()
    assert _found_by(second) == ["scan"] * 3
    assert lab.domain.checkpoints() == []


def test_a_raw_disk_beside_a_tracked_one(make_domain: Callable[..., RunningDomain], tmp_path: Path) -> None:
    lab = Lab(make_domain(("qcow2", "raw")), tmp_path)
    lab.replicate()
    lab.domain.write(0, 9 * MIB, BLOCK, 1)
    lab.domain.write(1, 9 * MIB, BLOCK, 1)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["bitmap", "scan"], 2)
    assert "raw" in point.disks[1].source["because"]


def test_what_the_guest_discards_becomes_zero(lab: Lab) -> None:
    lab.replicate()
    for number in range(2):
        lab.domain.discard(number, MIB * (1 + number), 2 * MIB)
    point = lab.replicate()
    assert (point.cycle.zero_blocks, point.cycle.changed_blocks) == (2 * 32, 0)


# -- what outlives what -----------------------------------------------------------------------------------------------


def test_the_record_of_writes_outlives_machine_and_daemon(own: Lab) -> None:
    own.replicate()
    own.domain.write(1, 9 * MIB, BLOCK, 5)
    own.domain.stop()
    own.domain.host.restart()
    own.domain.start()
    own.domain.write(0, 10 * MIB, BLOCK, 6)
    point = own.replicate()
    assert (_found_by(point), point.cycle.read_bytes, point.cycle.changed_blocks) == (["bitmap"] * 2, 2 * BLOCK, 2)


def test_after_a_crash_of_qemu_all_is_compared_by_hash_and_history_stays(own: Lab) -> None:
    own.replicate()
    own.domain.stop()
    own.domain.start()
    own.domain.write(1, 9 * MIB, BLOCK, 5)
    own.domain.flush(1)
    own.domain.kill()
    own.domain.start()
    own.domain.write(0, 10 * MIB, BLOCK, 6)
    point = own.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["scan"] * 2, 2)
    assert "not whole" in point.disks[0].source["because"]
    assert len(own.domain.checkpoints()) == len(own.domain.bitmaps()) == 1
    assert _found_by(own.replicate()) == ["bitmap"] * 2
    own.assert_restores()


def test_a_checkpoint_that_was_lost_costs_a_comparison(lab: Lab) -> None:
    lab.replicate()
    lab.domain.write(0, 9 * MIB, BLOCK, 5)
    lab.domain.host.virsh("checkpoint-delete", lab.domain.name, *lab.domain.checkpoints())
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["scan"] * 2, 1)
    assert "is gone" in point.disks[0].source["because"]
    assert _found_by(lab.replicate()) == ["bitmap"] * 2


def test_a_bitmap_that_was_lost_costs_a_comparison_and_leaves_none_of_the_others_behind(lab: Lab) -> None:
    lab.replicate()
    rows = json.loads(lab.domain.monitor('{"execute": "query-named-block-nodes", "arguments": {"flat": true}}'))
    node = next(row for row in rows["return"] if row["file"] == str(lab.domain.files[0]) and row["drv"] == "qcow2")
    name = node["dirty-bitmaps"][0]["name"]
    remove = {"execute": "block-dirty-bitmap-remove", "arguments": {"node": node["node-name"], "name": name}}
    lab.domain.monitor(json.dumps(remove))
    lab.domain.write(0, 9 * MIB, BLOCK, 5)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["scan"] * 2, 1)
    assert len(lab.domain.checkpoints()) == len(lab.domain.bitmaps()) == 1


def test_a_disk_that_was_exchanged_under_its_name_is_compared_by_hash(own: Lab) -> None:
    own.replicate()
    own.domain.stop()
    old = own.domain.files[0].with_suffix(".old")
    own.domain.files[0].rename(old)
    own.domain.host.run("qemu-img", "convert", "-O", "qcow2", str(old), str(own.domain.files[0]))
    own.domain.start()
    own.domain.write(0, 9 * MIB, BLOCK, 5)
    point = own.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["scan"] * 2, 1)


def test_a_disk_that_went_back_to_an_earlier_state_is_not_taken_for_the_later_one(own: Lab) -> None:
    """The image's own record went back with it: what it lacks makes the checkpoint useless."""
    own.replicate()
    own.domain.write(0, 8 * MIB, BLOCK, 4)
    own.domain.stop()
    kept, earlier = own.domain.files[0].read_bytes(), bytes(own.domain.model[0])
    own.domain.start()
    own.domain.write(0, 9 * MIB, BLOCK, 5)
    own.replicate()
    own.domain.stop()
    with own.domain.files[0].open("r+b") as file:
        file.write(kept)
        file.truncate()
    own.domain.model[0][:] = earlier
    own.domain.start()
    point = own.replicate()
    assert _found_by(point) == ["scan"] * 2
    own.assert_restores()


def test_what_qemu_tools_write_while_the_domain_is_off_is_recorded_too(own: Lab) -> None:
    own.replicate()
    own.domain.stop()
    own.domain.host.run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 9 {9 * MIB} 64k", str(own.domain.files[1]))
    own.domain.model[1][9 * MIB : 9 * MIB + BLOCK] = b"\x09" * BLOCK
    own.domain.start()
    point = own.replicate()
    assert (_found_by(point), point.cycle.read_bytes) == (["bitmap"] * 2, BLOCK)


def test_a_domain_that_was_defined_anew_is_compared_by_hash(own: Lab) -> None:
    own.replicate()
    own.domain.stop()
    own.domain.host.virsh("undefine", own.domain.name, "--checkpoints-metadata")
    own.domain.define()
    own.domain.start()
    assert own.domain.checkpoints() == []
    own.domain.write(0, 9 * MIB, BLOCK, 5)
    assert _found_by(own.replicate()) == ["scan"] * 2


def test_a_disk_that_grew_is_compared_by_hash(own: Lab) -> None:
    own.replicate()
    own.domain.host.virsh("blockresize", own.domain.name, "vdb", f"{SIZE + MIB}b")
    own.domain.model[1] += bytes(MIB)
    own.domain.write(1, SIZE, BLOCK, 5)
    point = own.replicate()
    assert point.disks[1].size == SIZE + MIB
    assert _found_by(point)[1] == "scan"
    assert _found_by(own.replicate()) == ["bitmap"] * 2


# -- cycles that fail -------------------------------------------------------------------------------------------------


def test_nothing_is_lost_by_cycles_that_fail_one_after_the_other(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.replicate()

    def refuse(*_: object) -> None:
        raise StoreError("no manifest today")

    with monkeypatch.context() as patch:
        patch.setattr(history, "publish", refuse)
        for attempt in range(3):
            lab.domain.write(0, (6 + attempt) * MIB, BLOCK, 20 + attempt)
            with pytest.raises(StoreError), before_the_first_read(lambda: lab.domain.write(0, 12 * MIB, BLOCK, 66)):
                lab.cycle()
            lab.assert_nothing_left()
            assert len(lab.domain.checkpoints()) <= 2
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["bitmap"] * 2, 4)
    assert len(lab.domain.checkpoints()) == len(lab.domain.bitmaps()) == 1


def test_a_point_whose_checkpoints_were_not_deleted_any_more_is_continued(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.replicate()
    lab.domain.write(0, 9 * MIB, BLOCK, 1)
    with monkeypatch.context() as patch:
        patch.setattr("replica.libvirt.source._acknowledge", lambda *_: None)
        lab.replicate()
    assert len(lab.domain.checkpoints()) == 2
    lab.domain.write(0, 10 * MIB, BLOCK, 1)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.read_bytes) == (["bitmap"] * 2, BLOCK)
    assert len(lab.domain.checkpoints()) == 1


class KilledError(BaseException):
    """Stands for a process that ended without cleaning up."""


def test_what_a_killed_cycle_left_is_removed_by_the_next(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after any number of questions to libvirt; from then on it asks nothing more."""
    ask = Virsh.ask
    asked = 0
    after_point = lab.replicate().point

    def dying(self: Virsh, command: str, *arguments: str, **options: object) -> str:
        nonlocal asked
        if asked >= after:
            raise KilledError
        asked += 1
        return ask(self, command, *arguments, **options)  # type: ignore[arg-type]

    for after in (3, 4, 6, 8):
        asked = 0
        lab.domain.write(0, 9 * MIB, BLOCK, after)
        with monkeypatch.context() as patch, suppress(KilledError):  # with the last numbers it is through
            patch.setattr(Virsh, "ask", dying)
            lab.cycle()
        lab.domain.write(0, 10 * MIB, BLOCK, after)
        before = history.newest(lab.store, lab.vm.keys)
        assert before is not None
        point = lab.replicate()
        assert _found_by(point) == ["bitmap"] * 2
        assert point.cycle.changed_blocks == (2 if before.point == after_point else 1)
        after_point = point.point
        assert len(lab.domain.checkpoints()) == len(lab.domain.bitmaps()) == 1
    lab.assert_restores()


def test_an_interrupted_cycle_leaves_no_job(lab: Lab) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_the_first_read(interrupt):
        lab.cycle()
    lab.assert_nothing_left()
    lab.replicate()


def test_where_room_for_scratch_gets_short_the_guest_goes_on_and_nothing_is_published(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.replicate()
    lab.domain.write(0, 9 * MIB, BLOCK, 1)

    def fill() -> None:
        monkeypatch.setattr("replica.scratch.LEAST_ROOM_BYTES", 1 << 60)
        while lab.domain.job() is not None:
            pass
        lab.domain.write(0, 9 * MIB, BLOCK, 2)  # what is read now is no instant any more

    with pytest.raises(SourceError, match="MiB are left"), before_the_first_read(fill):
        lab.cycle()
    with pytest.raises(SourceError, match="MiB are left"):
        lab.cycle()
    monkeypatch.setattr("replica.scratch.LEAST_ROOM_BYTES", 1 << 20)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["bitmap"] * 2, 1)


def test_the_job_of_another_program_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    lab.replicate()
    scratch = lab.domain.host.images
    disks = "".join(f"<disk name='{one}'><scratch file='{scratch}/{one}.foreign'/></disk>" for one in ("vda", "vdb"))
    server = f"<server transport='unix' socket='{scratch}/foreign.sock'/>"
    xml = tmp_path / "foreign.xml"
    xml.write_text(f"<domainbackup mode='pull'>{server}<disks>{disks}</disks></domainbackup>")
    lab.domain.host.virsh("backup-begin", lab.domain.name, str(xml))
    lab.domain.host.virsh("checkpoint-list", lab.domain.name)
    with pytest.raises(SourceError, match="another backup of the domain"):
        lab.cycle()
    assert "foreign.sock" in str(lab.domain.job())
    lab.domain.host.virsh("domjobabort", lab.domain.name)
    while lab.domain.job() is not None:  # libvirt answers before it has ended
        pass
    assert _found_by(lab.replicate()) == ["bitmap"] * 2


def test_checkpoints_of_others_are_left_alone(lab: Lab, tmp_path: Path) -> None:
    xml = tmp_path / "foreign.xml"
    xml.write_text("<domaincheckpoint><name>somebody</name></domaincheckpoint>")
    lab.domain.host.virsh("checkpoint-create", lab.domain.name, str(xml))
    lab.replicate()
    lab.domain.write(0, 9 * MIB, BLOCK, 1)
    lab.replicate()
    assert "somebody" in lab.domain.checkpoints()


# -- off, and other states --------------------------------------------------------------------------------------------


def test_a_domain_that_is_off_is_read_from_its_files(make_domain: Callable[..., RunningDomain], tmp_path: Path) -> None:
    lab = Lab(make_domain(("qcow2", "raw")), tmp_path)
    lab.replicate()
    lab.domain.write(0, 9 * MIB, BLOCK, 1)
    lab.domain.stop()
    off = lab.replicate()
    assert (off.consistency, _found_by(off), off.cycle.changed_blocks) == (Consistency.OFFLINE, ["scan"] * 2, 1)
    lab.domain.start()
    lab.domain.write(0, 10 * MIB, BLOCK, 1)
    point = lab.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == (["scan"] * 2, 1)
    lab.domain.write(0, 11 * MIB, BLOCK, 1)
    assert _found_by(lab.replicate()) == ["bitmap", "scan"]
    assert len(lab.domain.checkpoints()) == 1
    lab.assert_restores()


def test_a_domain_may_be_started_while_its_files_are_read_and_gives_no_point_then(
    make_domain: Callable[..., RunningDomain], tmp_path: Path
) -> None:
    lab = Lab(make_domain(("raw", "qcow2")), tmp_path)
    lab.domain.stop()
    lab.replicate()

    def start(_: object) -> Leftovers:
        lab.domain.start()
        return Leftovers()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SourceError, match="was started"):
        patch.setattr("replica.cycle._Cycle._leftovers", start)  # called once the disks are open
        lab.cycle()
    lab.replicate()


def test_what_is_not_there_is_named(lab: Lab) -> None:
    connect = lab.domain.host.connect
    for address, words in (
        (f"libvirt:{lab.domain.name}?connect={connect.replace('?', '%3F').replace('=', '%3D')}#sda", "no disk 'sda'"),
        ("libvirt:nothing?connect=" + connect.replace("?", "%3F").replace("=", "%3D") + "#vda", "failed to get domain"),
        ("libvirt:x?connect=qemu%2Bunix%3A%2F%2F%2Fsession%3Fsocket%3D%2Fnowhere#vda", "Failed to connect"),
        ("libvirt:x?connect=qemu%2Bssh%3A%2F%2Fhost%2Fsystem#vda", "another host"),
    ):
        with pytest.raises(GodwitError, match=words):
            protection.protect(lab.store, lab.host, tenant="default", name="other", disks=[address])


def test_a_guest_whose_agent_does_not_answer_is_replicated_all_the_same(
    make_domain: Callable[..., RunningDomain], tmp_path: Path
) -> None:
    lab = Lab(make_domain(agent=True), tmp_path)
    point = lab.replicate()
    assert point.consistency == Consistency.CRASH
    assert "domfsfreeze" in point.disks[0].source["not_quiesced"]


# -- the commands -----------------------------------------------------------------------------------------------------


def _godwit(*arguments: str) -> tuple[int, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run(list(arguments), output)
    assert isinstance(output.stdout, io.StringIO)
    return code, output.stdout.getvalue()


def test_the_commands_protect_and_replicate_a_domain(
    make_domain: Callable[..., RunningDomain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = make_domain(("qcow2", "raw"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", f"file://{tmp_path}/store")
    here = ["--libvirt", domain.name, "--connect", domain.host.connect]
    assert _godwit("init", f"file://{tmp_path}/store")[0] == 0
    code, said = _godwit("protect", "vm", *here, "--json")
    protected = json.loads(said)
    assert (code, protected["machine"]["cpus"], protected["machine"]["memory_bytes"]) == (0, 3, 32 * MIB)
    assert [disk["name"] for disk in protected["disks"]] == ["vda", "vdb"]
    assert _godwit("replicate", "vm")[0] == 0
    domain.write(0, 9 * MIB, BLOCK, 8)
    assert _godwit("protect", "vm", "--update", *here, "--disk", "vda", "--no-freeze", "--cpus", "5")[0] == 0
    code, said = _godwit("replicate", "vm", "--json")
    point = json.loads(said)
    assert (code, point["consistency"], point["changed_blocks"]) == (0, "crash", 1)
    assert [(disk["number"], disk["name"], disk["found_by"]) for disk in point["disks"]] == [(0, "vda", "bitmap")]
    assert _godwit("restore", "vm", "--to", str(tmp_path / "out"), "--format", "raw")[0] == 0
    assert (tmp_path / "out").read_bytes() == domain.state()[0]
    assert _godwit("protect", "vm", "--update", *here, "--qmp", "x")[0] == 2
    assert _godwit("protect", "vm", "--update", "--no-freeze")[0] == 2


def test_a_cycle_that_is_killed_outright_costs_the_next_nothing(
    make_domain: Callable[..., RunningDomain], tmp_path: Path
) -> None:
    """The real thing: kill -9 within a backup job, the daemon restarted meanwhile."""
    domain = make_domain()
    store = f"file://{tmp_path}/store"
    environment = {
        **os.environ,
        "GODWIT_STATE": str(tmp_path / "state"),
        "GODWIT_STORE": store,
        "TMPDIR": str(domain.host.scratch),
    }
    command = [sys.executable, "-c", "import sys; from cli.main import main; sys.exit(main())"]
    here = ["--libvirt", domain.name, "--connect", domain.host.connect]
    for arguments in (["init", store], ["protect", "vm", *here], ["replicate", "vm"]):
        subprocess.run([*command, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    domain.write(0, 9 * MIB, 4 * MIB, 8)
    process = subprocess.Popen([*command, "replicate", "vm"], env=environment, stdout=subprocess.DEVNULL)
    while domain.job() is None:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert domain.job() is not None
    domain.host.restart(kill=True)
    domain.write(1, 9 * MIB, BLOCK, 8)
    done = subprocess.run([*command, "replicate", "vm", "--json"], env=environment, check=True, stdout=subprocess.PIPE)
    point = json.loads(done.stdout)
    assert (point["disks"][0]["found_by"], point["changed_blocks"]) == ("bitmap", 65)
    assert domain.job() is None
    assert len(domain.checkpoints()) == 1
    assert list(domain.host.scratch.glob("godwit*")) == []
