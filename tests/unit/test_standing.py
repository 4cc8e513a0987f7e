"""Where a VM stands: every command in every standing, what it makes of it, and what two operators see of each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replica import catalog, cycle, history, prune, record
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    LeaseHeldError,
    LeaseLostError,
    PlatformError,
    SourceError,
    StandingError,
    UsageError,
)
from replica.failover import failover as failing_over
from replica.failover import ledger, transitions
from replica.failover.adoption import adopt
from replica.failover.failover import Order
from replica.failover.offer import configured
from replica.failover.transitions import ALLOWED, Command
from replica.lease import acquire
from replica.model import FailoverKind, Identity, Standing, State
from replica.platforms.platform import Power
from replica.protection import update
from replica.retention import parse
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, WORKERS, make_host, random_blocks
from tests.support.failover import LOCAL, PLANNED, TEST, UNPLANNED, Site, make_site
from tests.support.fake_platform import FakePlatform
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore
from vhdx.osfile import open_file


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def _run(site: Site, command: Command) -> None:
    match command:
        case Command.REPLICATE:
            cycle.replicate(site.lab.store, site.lab.host, site.lab.found, workers=WORKERS)
        case Command.TEST:
            site.failover(TEST)
        case Command.FAILOVER:
            site.failover(UNPLANNED)
        case Command.COMMIT:
            site.commit()
        case Command.CLEANUP:
            site.cleanup()
        case Command.REPROTECT:
            site.reprotect()
        case Command.FAILBACK:
            site.failback()
        case Command.CHANGE_DISKS:
            update(site.lab.store, site.lab.host, site.lab.found, disks=site.lab.paths)
        case Command.ADOPT:
            adopt(site.means(), [one.path for one in site.settings.sources], Identity("hyperv", "new id"))


BECOMES = {
    (Standing.PROTECTED, Command.FAILOVER): Standing.FAILED_OVER,
    (Standing.FAILING_OVER, Command.FAILOVER): Standing.FAILED_OVER,
    (Standing.FAILING_OVER, Command.CLEANUP): Standing.PROTECTED,
    (Standing.FAILED_OVER, Command.COMMIT): Standing.COMMITTED,
    (Standing.FAILED_OVER, Command.CLEANUP): Standing.PROTECTED,
    (Standing.COMMITTED, Command.REPROTECT): Standing.REPROTECTED,
    (Standing.REPROTECTED, Command.FAILBACK): Standing.PROTECTED,
    (Standing.FAILING_BACK, Command.FAILBACK): Standing.PROTECTED,
}
# Allowed, and done already: everything stays as it is.
REPEATS = {
    (Standing.PROTECTED, Command.CLEANUP),
    (Standing.FAILED_OVER, Command.FAILOVER),
    (Standing.COMMITTED, Command.COMMIT),
    (Standing.REPROTECTED, Command.REPROTECT),
}
KEEPS = {Command.REPLICATE, Command.TEST, Command.CHANGE_DISKS, Command.ADOPT}


@pytest.mark.parametrize("command", list(Command), ids=lambda one: one.name)
@pytest.mark.parametrize("standing", list(Standing), ids=lambda one: one.name)
def test_every_command_in_every_standing(site: Site, standing: Standing, command: Command) -> None:
    site.reach(standing)
    before = site.settings
    if standing not in ALLOWED[command]:
        running = site.hypervisor.running
        with pytest.raises(StandingError) as caught:
            _run(site, command)
        assert standing.value in caught.value.message
        assert any(
            f"godwit {word} " in (caught.value.hint or "") for word in ("failover", "commit", "reprotect", "failback")
        )
        assert caught.value.exit_code == 2
        assert site.settings == before
        assert site.hypervisor.running == running
        return
    _run(site, command)
    if (standing, command) in REPEATS:
        assert site.settings == before
    elif command in KEEPS:
        assert site.standing is standing
    else:
        assert site.standing is BECOMES[standing, command]


def test_the_table_of_commands_has_every_pair() -> None:
    assert set(ALLOWED) == set(Command)
    assert set(transitions.NEXT) == set(Standing)
    changing = {(standing, command) for command in Command if command not in KEEPS for standing in ALLOWED[command]}
    assert changing == set(BECOMES) | REPEATS


def test_a_vm_goes_the_whole_circle_and_loses_nothing(site: Site) -> None:
    at_home = site.lab.contents()
    done = site.failover(PLANNED)
    assert done.final is not None and done.final.point == 3 and done.machine.point == 3
    assert site.hypervisor.running == [done.machine.name]
    assert not site.hypervisor.machines[done.machine.name].spec.isolated
    assert site.hypervisor.machines[done.machine.name].hydrating
    assert site.lab.contents() == at_home  # the source's disks are not written by a failover
    for number, held in enumerate(at_home):
        assert site.lab.restore(3, number) == held

    site.commit()
    settings = site.reprotect()
    assert [one.path for one in settings.sources] == [one.address for one in done.machine.disks]
    assert settings.state.reverse is not None
    assert (settings.state.reverse.point, settings.state.reverse.bitmap) == (3, "godwit-since-3")
    path = Path(settings.sources[0].path)
    content = bytearray(path.read_bytes())
    content[:BLOCK] = random_blocks(9, 1)
    path.write_bytes(content)
    assert cycle.replicate(site.lab.store, site.lab.host, site.lab.found, workers=WORKERS).point == 4
    assert site.lab.contents() == at_home

    back = site.failback()
    assert back.point is not None and back.point.point == 5 and site.brought == [5]
    assert site.lab.contents() == (bytes(content), at_home[1])
    assert site.hypervisor.machines == {}
    assert site.state == State()
    assert [one.path for one in site.settings.sources] == [str(one) for one in site.lab.paths]
    assert site.lab.replicate().point == 6


def test_the_ledger_holds_what_happened_by_whom_and_every_identity(site: Site) -> None:
    site.failover(UNPLANNED)
    site.commit(site.means(host=site.other_host()))
    told = [
        (one.change.command, one.change.host_name)
        for one in ledger.versions(site.lab.store, site.lab.found)
        if one.change
    ]
    assert told == [("commit", "host-b"), ("failover", "host-a"), ("failover", "host-a")]
    identities = [
        one for v in ledger.versions(site.lab.store, site.lab.found) if v.change for one in v.change.identities
    ]
    machine = site.state.machine
    assert machine is not None
    assert identities == [Identity("qemu", f"id-of-{machine.name}", f"uuid-of-{machine.name}", ("00:15:5d:00:00:99",))]


def test_what_was_written_and_never_put_in_force_is_not_in_the_ledger(site: Site) -> None:
    orphan = site.lab.found.keys.settings(2)
    site.lab.store.create(orphan, b"of an attempt that was cut off")
    site.failover(UNPLANNED)
    assert [one.version for one in ledger.versions(site.lab.store, site.lab.found)] == [4, 3, 1]


# -- tests


def test_a_test_runs_beside_a_source_that_goes_on(site: Site) -> None:
    done = site.failover(TEST)
    assert done.machine.isolated and site.hypervisor.machines[done.machine.name].spec.isolated
    assert site.standing is Standing.PROTECTED
    assert [one.name for one in site.state.beside] == [done.machine.name]
    site.lab.replicate()
    second = site.failover(TEST)
    assert second.machine.point == 3
    assert site.cleanup(second.machine.name).removed == (site_machine(second),)
    assert site.hypervisor.running == [done.machine.name]
    site.cleanup(everything=True)
    assert site.hypervisor.machines == {}
    assert not site.state.beside


def site_machine(done: failing_over.Failover) -> Any:
    from dataclasses import replace  # noqa: PLC0415

    return replace(done.machine, disks=())


def test_tests_stay_when_the_vm_is_failed_over_and_taken_back(site: Site) -> None:
    test = site.failover(TEST).machine.name
    site.failover(UNPLANNED)
    site.cleanup()
    assert site.standing is Standing.PROTECTED
    assert site.hypervisor.running == [test]
    with pytest.raises(UsageError, match="test machines only"):  # a cleanup that is repeated reaches no further
        site.cleanup()
    site.cleanup(test)
    assert site.hypervisor.machines == {}


def test_a_machine_is_struck_only_once_it_is_gone(site: Site) -> None:
    site.failover(TEST)
    with pytest.raises(PlatformError, match="still there"):
        site.cleanup(everything=True, means=site.means(platform=FakePlatform(site.hypervisor, stays=True)))
    assert len(site.state.beside) == 1
    with pytest.raises(UsageError, match="no test machine 'other'"):
        site.cleanup("other")
    site.cleanup(everything=True)
    assert not site.state.beside


def test_a_store_that_vanishes_in_the_middle_of_a_test_loses_nothing(site: Site) -> None:
    writes = RecordingStore(site.lab.store)
    site.failover(TEST, site.means(store=writes))
    requests = len(writes.requests)
    site.cleanup(everything=True)
    before = site.settings
    for skip in range(requests):
        faulty = FaultyStore(site.lab.store, [Fault(FaultKind.ERROR, skip=skip)])
        with pytest.raises(Exception) as caught:
            site.failover(TEST, site.means(store=faulty))
        assert type(caught.value).__name__ in ("StoreUnavailableError", "LeaseHeldError"), caught.value
        host = site.other_host()
        assert site.standing is Standing.PROTECTED
        assert set(site.hypervisor.machines) <= {one.name for one in site.state.beside}
        site.cleanup(means=site.means(host=host), everything=True)
        assert site.hypervisor.machines == {}
        site.lab.replicate(host=host)
    assert site.settings.sources == before.sources


# -- choosing


def _damage(site: Site, point: int) -> None:
    found = history.point(site.lab.store, site.lab.found.keys, point)
    refs = [ref for one in found.maps for ref in one.parts if ref.part.point == point]
    site.lab.store.delete(site.lab.found.keys.map_part(refs[-1].part))


def test_an_unplanned_failover_passes_over_what_does_not_restore_and_says_why(site: Site) -> None:
    site.lab.replicate()
    _damage(site, 3)
    done = site.failover(UNPLANNED)
    assert done.machine.point == 2
    assert [one.point for one in done.passed_over] == [3]
    assert "maps/" in done.passed_over[0].because
    assert site.state.home is not None and site.state.home.point == 3
    with pytest.raises(IntegrityError, match="point 3 does not restore"):
        site.failover(Order(point=3))
    assert site.standing is Standing.FAILED_OVER


def test_a_manifest_that_cannot_be_read_is_passed_over(site: Site) -> None:
    key = site.lab.found.keys.manifest(2)
    site.lab.store.delete(key)
    site.lab.store.create(key, b"{")
    done = site.failover(UNPLANNED)
    assert (done.machine.point, done.passed_over[0].point) == (1, 2)


def test_a_point_that_a_machine_runs_from_is_not_pruned(site: Site) -> None:
    site.failover(Order(FailoverKind.TEST, point=1))
    site.lab.replicate()
    done = prune.prune(site.lab.store, site.lab.host, site.lab.found, rule=parse("last:1"))
    assert [one.point for one in done.kept] == [1, 3]
    site.cleanup(everything=True)
    done = prune.prune(site.lab.store, site.lab.host, site.lab.found, rule=parse("last:1"))
    assert [one.point for one in done.kept] == [3]


def test_another_point_before_commit_replaces_the_machine(site: Site) -> None:
    first = site.failover(UNPLANNED).machine
    second = site.failover(Order(point=1)).machine
    assert (first.point, second.point) == (2, 1)
    assert site.hypervisor.running == [second.name]
    assert not site.state.beside
    again = site.failover(Order(point=1))
    assert again.resumed and again.machine.name == second.name


def test_what_is_under_way_goes_on_and_is_not_mixed_with_other_wishes(site: Site) -> None:
    site.reach(Standing.FAILING_OVER)
    with pytest.raises(StandingError, match="to point 2 on qemu"):
        site.failover(Order(FailoverKind.UNPLANNED, point=1))
    done = site.failover(Order())
    assert done.resumed and site.standing is Standing.FAILED_OVER
    with pytest.raises(UsageError, match="takes the point"):
        site.failover(Order(FailoverKind.PLANNED, point=1))


def test_what_kind_of_failover_must_be_said(site: Site) -> None:
    with pytest.raises(UsageError, match="what kind"):
        site.failover(Order())
    assert site.standing is Standing.PROTECTED


def test_a_generation_that_nothing_leads_to_is_refused_before_anything_is_done(site: Site) -> None:
    before = site.settings
    with pytest.raises(UsageError, match="nothing makes one of Generation 2"):
        site.failover(Order(FailoverKind.PLANNED, generation=2))
    assert site.settings == before
    assert site.hypervisor.calls == []


# -- planned


def test_a_planned_failover_is_refused_where_a_disk_is_in_use(site: Site) -> None:
    file = open_file(site.lab.paths[1], writable=True)
    with pytest.raises(SourceError, match="in use"):
        site.failover(PLANNED)
    file.close()
    assert site.standing is Standing.PROTECTED
    assert site.hypervisor.calls == []


def test_a_disk_that_is_written_to_after_its_last_point_ends_a_planned_failover(site: Site) -> None:
    class Writes(RecordingStore):
        """Writes to the source once the last point of it is published."""

        def create(self, key: str, data: Any) -> str:
            tag = super().create(key, data)
            if key == site.lab.found.keys.manifest(3):
                site.lab.patch(5 * BLOCK, random_blocks(77, 1))
            return tag

    with pytest.raises(SourceError, match="written to after point 3"):
        site.failover(PLANNED, site.means(store=Writes(site.lab.store)))
    assert site.standing is Standing.PROTECTED
    assert site.hypervisor.calls == []
    assert site.failover(PLANNED).machine.point == 4


def test_a_planned_failover_does_not_build_upon_damage(site: Site) -> None:
    _damage(site, 2)
    with pytest.raises(IntegrityError, match="point 2 does not restore"):
        site.failover(PLANNED)
    assert site.standing is Standing.PROTECTED


# -- others at the same time


def test_a_cycle_of_the_source_that_is_at_work_publishes_nothing_after_an_unplanned_failover(site: Site) -> None:
    lab = site.lab
    away = make_host(lab.folder / "site", name="lost site", clock=lab.host.clock)  # type: ignore[arg-type]

    class Loses(RecordingStore):
        """Lets the VM be failed over elsewhere before the cycle's manifest is written."""

        def create(self, key: str, data: Any) -> str:
            if "/manifests/" in key:
                site.failover(UNPLANNED)
            return super().create(key, data)

    with pytest.raises(LeaseLostError):
        lab.replicate(store=Loses(lab.store), host=away)
    lab.published.pop(3, None)
    assert site.standing is Standing.FAILED_OVER
    assert site.state.machine is not None and site.state.machine.point == 2
    assert [getattr(one, "point", None) for one in history.points(lab.store, lab.found.keys)] == [1, 2]
    with pytest.raises(StandingError, match=r"^'godwit replicate' cannot be used now, because "):
        lab.replicate(host=away)


def test_a_planned_failover_and_a_test_wait_for_no_cycle_for_ever(site: Site) -> None:
    other = make_host(site.lab.folder / "x", name="host-x", clock=site.lab.host.clock)  # type: ignore[arg-type]
    acquire(site.lab.store, site.lab.found.keys, other, sole_on_host=True)
    for order in (PLANNED, TEST):
        with pytest.raises(LeaseHeldError) as caught:
            site.failover(order)
        assert caught.value.exit_code == 11
    assert site.hypervisor.calls == []


@pytest.mark.parametrize("order", [PLANNED, UNPLANNED], ids=["planned", "unplanned"])
def test_of_two_operators_at_once_the_second_is_refused(site: Site, order: Order) -> None:
    errors: list[LeaseHeldError] = []

    class Meanwhile(FakePlatform):
        def start(self, name: str) -> None:
            with pytest.raises(LeaseHeldError) as caught:
                other = make_host(site.lab.folder / "b", name="host-b", clock=site.lab.host.clock)  # type: ignore[arg-type]
                site.failover(UNPLANNED, site.means(host=other))
            errors.append(caught.value)
            FakePlatform.start(self, name)

    done = site.failover(order, site.means(platform=Meanwhile(site.hypervisor)))
    assert [one.exit_code for one in errors] == [11]
    assert site.hypervisor.running == [done.machine.name]


def test_an_operator_who_read_the_standing_before_another_changed_it_does_not_push_the_other_aside(site: Site) -> None:
    class Late(RecordingStore):
        """Lets the other begin once the settings were read."""

        met = False

        def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
            data = super().get(key, start=start, length=length)
            if "/settings/" in key and not self.met:
                self.met = True
                site.reach(Standing.FAILING_OVER)
                acquire(site.lab.store, site.lab.found.keys, site.lab.host, sole_on_host=False)
            return data

    other = make_host(site.lab.folder / "b", name="host-b", clock=site.lab.host.clock)  # type: ignore[arg-type]
    with pytest.raises(LeaseHeldError):
        site.failover(UNPLANNED, site.means(store=Late(site.lab.store), host=other))


# -- hosts that are gone


def test_a_machine_of_another_host_is_neither_seen_nor_forgotten(tmp_path: Path) -> None:
    site = make_site(tmp_path, offers=LOCAL)
    site.reach(Standing.FAILING_OVER)
    first = site.state.machine
    assert first is not None
    other = site.other_host()
    done = site.failover(Order(), site.means(host=other))
    assert done.machine.name != first.name and done.machine.host_name == "host-b"
    assert [one.name for one in done.left] == [first.name]
    with pytest.raises(PlatformError, match="on the host host-a"):
        site.cleanup(everything=True, means=site.means(host=other))
    site.cleanup(everything=True)
    assert site.hypervisor.running == [done.machine.name]
    with pytest.raises(PlatformError, match="host-b"):
        site.cleanup()
    assert site.standing is Standing.FAILED_OVER


def test_machines_of_a_host_that_burned_can_be_forgotten(tmp_path: Path) -> None:
    from replica.failover import settling  # noqa: PLC0415

    site = make_site(tmp_path, offers=LOCAL)
    site.failover(TEST)
    done = settling.cleanup(site.means(host=site.other_host()), everything=True, forget=True)
    assert len(done.forgotten) == 1 and done.removed == ()
    assert not site.state.beside


def test_a_recovery_machine_that_is_lost_is_brought_home_as_its_newest_point(site: Site) -> None:
    site.reach(Standing.REPROTECTED)
    site.hypervisor.machines.clear()
    for one in site.settings.sources:
        Path(one.path).unlink()
    back = site.failback(lost=True)
    assert back.point is not None and back.point.point == 2
    assert site.standing is Standing.PROTECTED


def test_a_machine_that_is_off_is_not_replicated_from(site: Site) -> None:
    site.reach(Standing.COMMITTED)
    for machine in site.hypervisor.machines.values():
        machine.power = Power.OFF
    with pytest.raises(PlatformError, match="does not run"):
        site.reprotect()
    assert site.standing is Standing.COMMITTED


# -- in the settings


def test_settings_of_before_are_protected_and_updates_keep_the_standing(site: Site) -> None:
    assert "state" not in json.loads(site.lab.store.get(site.lab.found.keys.settings(1)))["body"]
    site.failover(UNPLANNED)
    state = site.state
    update(site.lab.store, site.lab.host, site.lab.found, interval_seconds=900)
    assert site.state == state
    assert site.settings.interval_seconds == 900


def _with(site: Site, **changes: Any) -> None:
    """Write the settings in force anew, with a state that is changed."""
    version = site.settings.version
    key = site.lab.found.keys.settings(version)
    body = json.loads(site.lab.store.get(key))["body"]
    body["state"] = {**body["state"], **changes}
    store = site.lab.store
    assert isinstance(store, MemoryStore)
    store.delete(key)
    store.create(key, record.encode("settings", body))


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": None},
        {"home": None},
        {"standing": "protected"},
        {"standing": "reprotected"},
        {"reverse": {"point": 1, "bitmap": None, "conversions": []}},
        {"beside": [{}]},
        {"beside": 7},
        {"machine": {"name": 1}},
    ],
    ids=str,
)
def test_a_state_that_contradicts_itself_is_refused(site: Site, changes: dict[str, Any]) -> None:
    site.failover(UNPLANNED)
    _with(site, **changes)
    with pytest.raises(IntegrityError):
        catalog.settings_in_force(site.lab.store, site.lab.found)


def test_a_standing_of_a_later_version_is_not_taken_for_another(site: Site) -> None:
    site.failover(UNPLANNED)
    _with(site, standing="somewhere else")
    with pytest.raises(FormatVersionError, match="somewhere else"):
        site.lab.replicate()


# -- adopting


def test_a_vm_that_came_back_elsewhere_is_told_by_what_is_in_its_disks(site: Site, tmp_path: Path) -> None:
    mbr = bytearray(site.lab.contents()[0])
    mbr[440:444], mbr[510:512] = b"\x01\x02\x03\x04", b"\x55\xaa"
    site.lab.write(bytes(mbr))
    site.lab.replicate()
    moved = tmp_path / "moved.img"
    moved.write_bytes(bytes(mbr))
    done = adopt(site.means(), [site.lab.paths[1], moved], Identity("hyperv", "a new id"))
    assert [(one.source.number, one.source.path) for one in done.disks] == [
        (0, str(moved)),
        (1, str(site.lab.paths[1])),
    ]
    point = cycle.replicate(site.lab.store, site.lab.host, site.lab.found, workers=WORKERS)
    assert point.cycle.changed_blocks == 0
    assert [disk.number for disk in point.disks] == [0, 1]


def test_a_disk_of_another_vm_is_not_adopted(site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(random_blocks(55, 6))
    with pytest.raises(StandingError, match="cannot be told"):
        adopt(site.means(), [other, site.lab.paths[1]], Identity("hyperv"))
    with pytest.raises(StandingError, match="has 2 disks"):
        adopt(site.means(), [other], Identity("hyperv"))
    assert site.settings.version == 1


def test_a_known_bios_uuid_stands_in_for_disks_without_any_id(site: Site, tmp_path: Path) -> None:
    adopt(site.means(), list(site.lab.paths), Identity("hyperv", "first", "UUID-1"))
    copies = []
    for number, data in enumerate(site.lab.contents()):
        copies.append(tmp_path / f"copy{number}.img")
        copies[-1].write_bytes(data)
    with pytest.raises(StandingError):
        adopt(site.means(), copies, Identity("hyperv", "second", "uuid-2"))
    adopt(site.means(), copies, Identity("hyperv", "second", "uuid-1"))
    assert [one.path for one in site.settings.sources] == [str(one) for one in copies]


def test_of_a_platform_that_starts_nothing_it_is_told_that_disks_were_written(site: Site) -> None:
    site.failover(UNPLANNED)
    state = site.settings.state
    assert state.machine is not None
    started = {"azure": {"resource_group": "recovery"}}
    for platform, tables, runs in (
        ("qemu", {}, True),
        ("files", started, False),
        ("azure", {}, False),
        ("azure", started, True),
    ):
        one = replace(state, machine=replace(state.machine, platform=platform))
        for standing in (Standing.FAILED_OVER, Standing.COMMITTED, Standing.REPROTECTED):
            told = transitions.say(replace(one, standing=standing), configured(tables))
            assert (" runs" in told) is runs, told
            assert ("the disks of the recovery machine " in told) is not runs, told


def test_a_refused_cycle_leaves_nothing_to_look_for(site: Site) -> None:
    site.failover(UNPLANNED)
    recording = RecordingStore(site.lab.store)
    with pytest.raises(StandingError):
        site.lab.replicate(store=recording)
    site.commit()
    assert recording.counts["list"] == 0
    assert b'"leftovers":false' in site.lab.store.get(site.lab.found.keys.lease)
