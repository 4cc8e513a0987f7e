"""VMs on a stand-in for a Hyper-V host: what is read of them, when all is compared, and what is left behind."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import main
from cli.output import Output
from replica import catalog, cycle, protection
from replica.catalog import ProtectedVm
from replica.errors import SourceError
from replica.host import Host
from replica.hyperv import connect as connecting
from replica.hyperv import instants, scripts
from replica.hyperv.address import HypervAddress, Take
from replica.hyperv.protecting import FoundVm, find_vm
from replica.hyperv.session import SessionError
from replica.model import Consistency, Point
from replica.protection import MachineWishes
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, WORKERS, make_host, restore_disk
from tests.support.fake_hyperv import FakeHost, FakeVm, HostFaultError, Killed
from vhdx import osfile
from vhdx.resize import resize_disk

MIB = 1 << 20
SIZE = 6 * MIB
HOST = "https://hv1.example:5986"


class HypervLab:
    """A VM of two disks on the stand-in, protected in a store; with ``mapped`` its files are reached by a folder."""

    def __init__(self, folder: Path, *, mapped: bool = True, take: Take = Take.EITHER, **about: object) -> None:
        self.fake = FakeHost(folder / "host")
        self.store = MemoryStore("hyperv")
        self.agent: Host = make_host(folder / "state")
        self.maps = (f"C:\\={self.fake.here('C:')}",) if mapped else ()
        self.take = take
        self.vm: FakeVm = self.fake.add_vm("web 1", **about)  # type: ignore[arg-type]
        for name, controller in (("os", "SCSI"), ("data", "SCSI")):
            disk = self.vm.add_disk(name, SIZE, controller=controller)
            disk.write(BLOCK, random.Random(name).randbytes(3 * BLOCK))
        catalog.init_store(self.store, self.agent)
        self.found: ProtectedVm
        self.held: dict[int, dict[str, bytes]] = {}  # by point and place, what the disks held

    def find(self) -> FoundVm:
        return find_vm("web 1", host="hv1.example", take=self.take, maps=self.maps, wishes=MachineWishes())

    def protect(self) -> HypervLab:
        if self.take is Take.CHECKPOINT and not self.vm.off:
            self.vm.create_snapshot("Standard")
        origin = self.find()
        self.found, _ = protection.protect(
            self.store,
            self.agent,
            tenant=catalog.DEFAULT_TENANT,
            name="web 1",
            disks=origin.disks,
            buses=origin.buses,
            wishes=origin.machine,
        )
        self.fake.asked.clear()
        return self

    def write(self, seed: int, number: int = 0, *, blocks: int = 1) -> None:
        drawn = random.Random(seed)
        offset = drawn.randrange(0, SIZE - blocks * BLOCK) // 512 * 512
        self.vm.disks[number].write(offset, drawn.randbytes(blocks * BLOCK))

    def replicate(self, *, rescan: bool = False) -> Point:
        return cycle.replicate(self.store, self.agent, self.found, workers=WORKERS, rescan=rescan)

    def contents(self) -> dict[str, bytes]:
        return {one.position: bytes(one.content) for one in self.vm.disks}

    def assert_restores(self, point: Point) -> None:
        for disk in point.disks:
            data = restore_disk(self.store, self.agent, self.found, point, disk.number)
            assert data == self.held[point.point][disk.source["disk"]], disk.name

    def point(self, held: dict[str, bytes] | None = None) -> Point:
        """Replicate, and look at what was made: it is to hold ``held``, or else what the disks hold now."""
        held = held or self.contents()
        point = self.replicate()
        self.held[point.point] = held
        self.assert_restores(point)
        return point

    def assert_clean(self) -> None:
        """Assert that what a cycle leaves is one reference point, and disks of one file."""
        assert self.vm.recovery_checkpoints() == []
        assert len(self.vm.references) == 1
        assert [len(one.files) for one in self.vm.disks] == [1] * len(self.vm.disks)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HypervLab]:
    def make(**about: object) -> HypervLab:
        made = HypervLab(tmp_path, **about)  # type: ignore[arg-type]
        monkeypatch.setattr(connecting, "connect", made.fake.connect)
        monkeypatch.setattr(osfile.PosixFile, "fsync", lambda file: None)  # no power fails here
        return made.protect()

    return make


def how(point: Point) -> list[str]:
    return [one.source["found_by"] for one in point.disks]


def why(point: Point) -> str:
    return point.disks[0].source["because"]


def test_a_later_point_reads_what_was_written_and_nothing_else(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    first = made.point()
    assert how(first) == ["scan", "scan"]
    assert first.consistency is Consistency.APPLICATION
    made.assert_clean()
    made.write(1)
    made.write(2, number=1)
    second = made.point()
    assert how(second) == ["rct", "rct"]
    assert second.cycle.read_bytes <= 6 * BLOCK  # a block's worth, unaligned, grows by one on either side at the most
    made.assert_clean()
    third = made.point()
    assert how(third) == ["rct", "rct"]
    assert third.cycle.read_bytes == 0
    made.assert_clean()


def test_files_are_read_through_the_session_where_no_folder_leads_to_them(lab: Callable[..., HypervLab]) -> None:
    made = lab(mapped=False)
    made.point()
    made.write(1)
    made.fake.asked.clear()
    second = made.point()
    assert how(second) == ["rct", "rct"]
    assert scripts.READ.name in made.fake.names()
    assert made.fake.urls[-1] == HOST


def test_all_disks_are_of_one_instant(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    made.write(1)
    made.write(2, number=1)
    held = made.contents()
    # As soon as the checkpoint stands, and before anything is read, the guest writes on, to both disks.
    written: list[int] = []

    def writes(name: str, number: int) -> None:
        if name == scripts.CHANGES.name and not written:
            written.append(number)
            made.write(3)
            made.write(4, number=1)

    made.fake.before = writes
    made.point(held)
    assert written
    made.fake.before = lambda name, number: None
    assert how(made.point()) == ["rct", "rct"]  # which has what was written meanwhile


@pytest.mark.parametrize("quirk", ["bom", "single", "null", "wrapped", "lines"])
def test_json_is_read_in_every_shape_that_powershell_gives_it(lab: Callable[..., HypervLab], quirk: str) -> None:
    made = lab()
    made.fake.quirks = {quirk}
    made.find()
    made.point()
    made.write(1)
    assert how(made.point()) == ["rct", "rct"]
    made.assert_clean()


@pytest.mark.parametrize(("quirks", "is_2016"), [({"silent jobs"}, False), (set(), True)], ids=["jobs", "2016"])
def test_what_was_made_is_found_where_jobs_do_not_tell_and_on_older_hosts(
    lab: Callable[..., HypervLab], quirks: set[str], is_2016: bool
) -> None:
    made = lab()
    made.fake.quirks, made.fake.is_2016 = quirks, is_2016
    made.point()
    made.write(1)
    assert how(made.point()) == ["rct", "rct"]
    made.assert_clean()


def test_answers_that_come_in_many_pieces_are_put_together(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    made.fake.most_processed = 512 << 10
    made.write(1, blocks=20)
    second = made.point()
    assert how(second) == ["rct", "rct"]
    assert made.fake.names().count(scripts.CHANGES.name) >= 24


# -- tracking that is lost --------------------------------------------------------------------------------------------


def lose_reference(made: HypervLab) -> None:
    made.vm.destroy_reference(made.vm.references[0])


def lose_record(made: HypervLab) -> None:
    made.vm.lose_tracking()


def restored_elsewhere(made: HypervLab) -> None:
    for disk in made.vm.disks:
        there = disk.files[0].replace("VMs", "Moved")
        made.fake.here(there).parent.mkdir(parents=True, exist_ok=True)
        made.fake.here(disk.files[0]).rename(made.fake.here(there))
        disk.files = [there]


def checkpoint_made(made: HypervLab) -> None:
    made.vm.create_snapshot("Standard")


def replaced(made: HypervLab) -> None:
    for disk in made.vm.disks:
        made.fake.here(disk.files[0]).unlink()
        name = disk.files[0].rpartition("\\")[2].removesuffix(".vhdx")
        content = bytes(disk.content)
        fresh = made.fake.add_vm("other")
        fresh.guid = made.vm.guid
        other = fresh.add_disk(name, SIZE)
        made.fake.vms.remove(fresh)
        other.write(0, content[::-1])
        disk.content = other.content


def other_owner(made: HypervLab) -> None:
    made.vm.references[0].disks = ["Microsoft:X\\Y"] * 2


def one_missing(made: HypervLab) -> None:
    del made.vm.references[0].disks[1]


def ledger_gone(made: HypervLab) -> None:
    made.fake.ledgers.clear()


LOSSES = [
    (lose_reference, "is gone"),
    (lose_record, "cannot tell what was written"),
    (restored_elsewhere, "in another file"),
    (checkpoint_made, "in another file"),
    (replaced, "another disk"),
    (other_owner, "does not tell which"),
    (one_missing, "does not tell which"),
    (ledger_gone, "is gone"),
]


@pytest.mark.parametrize(("lose", "told"), LOSSES, ids=[one.__name__ for one, _ in LOSSES])
def test_what_tracking_cannot_tell_is_compared(
    lab: Callable[..., HypervLab], lose: Callable[[HypervLab], None], told: str
) -> None:
    made = lab()
    first = made.point()
    made.write(1)
    lose(made)
    second = made.point()
    assert how(second) == ["scan", "scan"]
    assert told in why(second)
    made.write(2)
    third = made.point()
    assert how(third) == ["rct", "rct"]  # and from there on it is tracked again
    for point in (first, second, third):
        made.assert_restores(point)


def test_one_disk_whose_changes_cannot_be_told_costs_the_other_nothing(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    made.write(1)
    made.fake.faults[scripts.CHANGES.name] = [HostFaultError("Refused", 32775)]
    second = made.point()
    assert "0x8007" in why(second)
    assert how(second) == ["scan", "rct"]


def test_a_grown_disk_is_compared(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    disk = made.vm.disks[1]  # which is the first to boot
    resize_disk(made.fake.here(disk.files[0]), SIZE + MIB)
    disk.size += MIB
    disk.content += bytes(MIB)
    second = made.point()
    assert how(second) == ["scan", "rct"]
    assert "size" in why(second)


def test_a_rescan_keeps_the_reference_points_in_order(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    made.write(1)
    assert how(made.replicate(rescan=True)) == ["scan", "scan"]
    made.assert_clean()
    made.write(2)
    assert how(made.point()) == ["rct", "rct"]


# -- consistency ------------------------------------------------------------------------------------------------------


def vss_fails() -> HostFaultError:
    return HostFaultError("Refused", 32768, "Die VSS-Writer im Gast sind in einem fehlerhaften Zustand.")


def test_crash_consistent_where_the_guest_cannot_be_quiesced(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.fake.faults[scripts.TAKE.name] = [vss_fails()]
    point = made.point()
    assert point.consistency is Consistency.CRASH
    assert "fehlerhaften Zustand" in point.disks[0].source["not_quiesced"]
    made.assert_clean()


def test_only_frozen_is_kept_to(lab: Callable[..., HypervLab]) -> None:
    made = lab(take=Take.APPLICATION)
    made.fake.faults[scripts.TAKE.name] = [vss_fails()]
    with pytest.raises(SourceError, match="0x8000"):
        made.replicate()
    assert made.vm.recovery_checkpoints() == []
    assert made.fake.names().count(scripts.TAKE.name) == 1
    assert made.point().consistency is Consistency.APPLICATION


def test_no_freeze_asks_for_none(lab: Callable[..., HypervLab]) -> None:
    made = lab(take=Take.CRASH)
    assert made.point().consistency is Consistency.CRASH
    assert set(made.vm.asked_levels) == {2}


def test_a_vm_that_is_off_is_tracked_too(lab: Callable[..., HypervLab]) -> None:
    made = lab(off=True)
    assert made.point().consistency is Consistency.OFFLINE
    made.write(1)
    assert how(made.point()) == ["rct", "rct"]


@pytest.mark.parametrize(
    ("kind", "code", "hint"), [("Denied", -2147024891, "administrator"), ("NotFound", 0, None), ("Timeout", 0, "next")]
)
def test_what_is_no_trouble_with_freezing_is_not_tried_again(
    lab: Callable[..., HypervLab], kind: str, code: int, hint: str | None
) -> None:
    made = lab()
    made.fake.faults[scripts.TAKE.name] = [HostFaultError(kind, code, "Zugriff verweigert: äöü")]
    with pytest.raises(SourceError, match="Zugriff verweigert") as refused:
        made.replicate()
    assert (hint or "") in (refused.value.hint or "")
    assert made.fake.names().count(scripts.TAKE.name) == 1
    made.point()


def test_a_configuration_without_tracking_is_refused(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.vm.version = "5.0"
    with pytest.raises(SourceError, match=r"version 5\.0") as refused:
        made.replicate()
    assert "--checkpoints" in (refused.value.hint or "")


# -- ends at any place ------------------------------------------------------------------------------------------------


def killed_at(made: HypervLab, number: int, *, done: bool) -> bool:
    """Kill the agent at the question of that number of a cycle, before it is asked or once it is answered."""
    made.fake.asked.clear()

    def kill(name: str, at: int) -> None:
        if at == number:
            raise Killed

    made.fake.before, made.fake.after = ((lambda n, a: None), kill) if done else (kill, (lambda n, a: None))
    try:
        made.replicate()
    except Killed:
        return True
    finally:
        made.fake.before = made.fake.after = lambda name, at: None
    return False


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_cycle_killed_at_any_question_leaves_nothing_behind(lab: Callable[..., HypervLab], done: bool) -> None:
    made = lab()
    made.point()
    number, seen = 0, set()
    while True:
        number += 1
        made.write(number)
        made.write(1000 + number, number=1)
        if not killed_at(made, number, done=done):
            break
        seen.add(made.fake.names()[number - 1])
        made.write(2000 + number)
        point = made.point()
        assert how(point) == ["rct", "rct"], f"tracking was lost by an end at question {number}"
        made.assert_clean()
    assert {
        scripts.SURVEY.name,
        scripts.TAKE.name,
        scripts.CHANGES.name,
        scripts.CONVERT.name,
        scripts.FORGET.name,
    } <= seen


@pytest.mark.parametrize("place", ["take", "convert"])
def test_a_host_that_ends_halfway_costs_a_comparison_at_the_most(lab: Callable[..., HypervLab], place: str) -> None:
    made = lab()
    made.point()
    made.write(1)
    made.fake.dies_in = place
    try:
        made.replicate()
    except SessionError:
        assert place == "take"
    made.write(2)
    made.point()
    # Nothing says whose it is, so it is left alone.
    assert len(made.vm.recovery_checkpoints()) == (1 if place == "take" else 0)
    assert len(made.vm.references) == (1 if place == "take" else 2)
    made.write(3)
    assert how(made.point()) == ["rct", "rct"]


def test_a_checkpoint_that_cannot_be_converted_is_let_go(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.fake.faults[scripts.CONVERT.name] = [HostFaultError("Refused", 32775) for _ in range(2)]
    made.point()
    assert len(made.vm.recovery_checkpoints()) == 1
    made.write(1)
    second = made.point()
    assert how(second) == ["scan", "scan"]
    made.assert_clean()


def test_what_is_of_others_stays(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    theirs = made.vm.convert(made.vm.create_snapshot())
    made.point()
    made.write(1)
    made.point()
    assert theirs in made.vm.references
    assert len(made.vm.references) == 2
    second, _ = protection.protect(
        made.store,
        made.agent,
        tenant=catalog.DEFAULT_TENANT,
        name="again",
        disks=made.find().disks,
        wishes=MachineWishes(),
    )
    cycle.replicate(made.store, made.agent, second, workers=WORKERS)
    made.write(2)
    assert how(made.point()) == ["rct", "rct"]  # two protections of one VM do not disturb each other
    assert how(cycle.replicate(made.store, made.agent, second, workers=WORKERS)) == ["rct", "rct"]
    assert len(made.vm.references) == 3


def test_a_checkpoint_removed_meanwhile_publishes_nothing(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    made.write(1)

    def removes(name: str, number: int) -> None:
        if name == scripts.CHANGES.name and made.vm.snapshots:
            made.vm.destroy_snapshot(made.vm.snapshots[0])

    made.fake.after = removes
    with pytest.raises(SourceError):
        made.replicate()
    made.fake.after = lambda name, number: None
    assert made.point().previous == 1
    made.assert_clean()


def test_the_ledger_does_not_grow_without_end(lab: Callable[..., HypervLab], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instants, "COMPACT_LINES", 8)
    made = lab()
    for seed in range(6):
        made.write(seed)
        made.point()
    assert made.fake.ledgers[made.found.vm.vm_id].count("\n") <= 14
    assert scripts.COMPACT.name in made.fake.names()
    assert how(made.point()) == ["rct", "rct"]


# -- protecting -------------------------------------------------------------------------------------------------------


def test_protecting_tries_it_out_and_leaves_nothing(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    assert made.vm.recovery_checkpoints() == []
    assert made.vm.references == []
    settings = catalog.settings_in_force(made.store, made.found)
    assert [one.bus for one in settings.sources] == ["scsi", "scsi"]
    assert HypervAddress.parse(settings.sources[0].path).disk == "scsi-0-1"  # which the firmware tries first


def test_a_disk_that_was_moved_to_another_place_is_named(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.vm.disks[0].location = 9
    with pytest.raises(SourceError, match="no disk at scsi-0-0, but"):
        made.replicate()
    assert made.vm.recovery_checkpoints() == []


# -- checkpoints of others --------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_followed_by_itself(lab: Callable[..., HypervLab]) -> None:
    made = lab(take=Take.CHECKPOINT)
    frozen = made.contents()
    made.write(1)
    made.point(frozen)
    made.vm.create_snapshot("Standard")
    frozen = made.contents()
    made.write(2)
    second = made.point(frozen)
    assert how(second) == ["chain", "chain"]
    assert second.cycle.read_bytes <= 6 * BLOCK
    assert second.consistency is Consistency.CRASH
    made.vm.destroy_snapshot(made.vm.snapshots[0])
    assert how(made.point(frozen)) == ["scan", "scan"]


def test_without_a_checkpoint_a_running_vm_has_nothing_that_stands_still(lab: Callable[..., HypervLab]) -> None:
    made = lab(take=Take.CHECKPOINT)
    made.vm.destroy_snapshot(made.vm.snapshots[0])
    with pytest.raises(SourceError, match="has no checkpoint"):
        made.replicate()
    made.vm.off = True
    assert made.point().consistency is Consistency.OFFLINE


def test_turning_to_checkpoints_of_others_gives_up_our_own(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.point()
    made.vm.create_snapshot("Standard")
    made.take = Take.CHECKPOINT
    protection.update(made.store, made.agent, made.found, disks=made.find().disks)
    made.point()
    assert made.vm.references == []


# -- hosts that go away, and commands ---------------------------------------------------------------------------------


def test_a_host_that_restarts_while_it_is_read_loses_nothing(lab: Callable[..., HypervLab]) -> None:
    made = lab(mapped=False)
    made.point()
    made.write(1)

    def restarts(name: str, number: int) -> None:
        if name == scripts.READ.name:
            raise SessionError("the host is gone")

    made.fake.before = restarts
    with pytest.raises(SessionError):
        made.replicate()
    assert len(made.vm.recovery_checkpoints()) == 1  # it could not be told to remove it
    made.fake.before = lambda name, number: None
    made.write(2)
    assert how(made.point()) == ["rct", "rct"]
    made.assert_clean()


def test_a_vm_that_is_gone_is_named(lab: Callable[..., HypervLab]) -> None:
    made = lab()
    made.fake.vms.clear()
    with pytest.raises(SourceError, match="nicht gefunden"):
        made.replicate()


def run(*arguments: str | Path) -> tuple[int, str, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run([str(one) for one in arguments], output)
    assert isinstance(output.stdout, io.StringIO)
    assert isinstance(output.stderr, io.StringIO)
    return code, output.stdout.getvalue(), output.stderr.getvalue()


def test_the_commands_protect_replicate_and_restore(
    lab: Callable[..., HypervLab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "agent"))
    monkeypatch.setenv("GODWIT_STORE", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("GODWIT_HYPERV_USER", "LAB\\agent")
    monkeypatch.setenv("GODWIT_HYPERV_PASSWORD", "correct horse")
    made = lab()
    assert run("init", f"file://{tmp_path / 'store'}")[0] == 0
    code, out, err = run("protect", "erp", "--hyperv", "web 1", "--host", "hv1", "--host-path", made.maps[0], "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [one["name"] for one in document["disks"]] == ["scsi-0-1", "scsi-0-0"]
    assert document["machine"]["cpus"] == 4
    assert run("replicate", "erp")[0] == 0
    made.write(1)
    code, out, err = run("replicate", "erp", "--json")
    assert code == 0, err
    code, _, err = run("restore", "erp", "--to", tmp_path / "back", "--format", "raw")
    assert code == 0, err
    restored = {path.stem: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    for disk in made.vm.disks:
        assert any(disk.position in stem and data == disk.content for stem, data in restored.items())
    for path in [*(tmp_path / "store").rglob("*"), *(tmp_path / "agent").rglob("*")]:
        assert not path.is_file() or b"correct horse" not in path.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--host", "hv1"),
        ("--checkpoints",),
        ("--hyperv", "x", "--libvirt", "y"),
        ("--hyperv", "x", "--no-freeze", "--only-frozen"),
        ("--hyperv", "x", "--host", "user:geheim@hv1"),
        ("--hyperv", "x", "--host", "hv1", "--host-path", "nothing"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: tuple[str, ...]) -> None:
    code, out, err = run("protect", "erp", *arguments, "--store", "file:///nowhere")
    assert code == 2
    assert "geheim" not in out + err
