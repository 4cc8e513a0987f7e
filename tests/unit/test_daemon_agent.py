"""The agent on a clock that tests move: days pass in a moment, and what is due, when, and what is told is compared."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from replica.daemon import statusfile, timing
from replica.daemon.mailbox import Word
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Result, Task, Unit, Verdict, judge
from replica.errors import (
    ConfigurationError,
    FormatVersionError,
    IntegrityError,
    LeaseHeldError,
    LeaseLostError,
    SourceError,
    StandingError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
    TenantKeyError,
    UsageError,
)
from replica.model import Standing
from replica.sampling import Budget
from tests.support.simulated_agent import Simulation, changed, done, facts, fleet
from vhdx.errors import DiskError

DAY = 86400
DOWN = StoreUnavailableError("the store does not answer")


def gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def failed(error: Exception, *, own: bool = False) -> Result:
    return Result(judge(error), error=error, own=own)


def test_every_vm_has_its_turn_for_three_days_at_its_interval() -> None:
    sim = Simulation({**fleet("abc", 300), **fleet("de", 3600), **fleet("f", 86400)})
    ending = sim.run(3 * DAY)
    assert (ending.complete, ending.clean) == (True, True)
    counts = Counter(unit.found.vm.name for _, unit in sim.begun if unit.found)
    assert all(abs(counts[name] - 3 * DAY / 300) <= 1 for name in "abc")
    assert all(abs(counts[name] - 72) <= 1 for name in "de")
    assert 3 <= counts["f"] <= 4
    for name, one in sim.fleet.items():
        begins = sim.begins(name=name)
        assert begins[0] <= timing.SPREAD_SECONDS + 1
        assert gaps(begins[1:]) == pytest.approx([one.interval_seconds] * (len(begins) - 2), abs=2)  # others go first
    assert not sim.told("cycle.missed", "cycle.failed")
    assert sim.most_at_once <= 2


def test_vms_start_spread_over_their_interval() -> None:
    sim = Simulation(fleet((f"vm-{n}" for n in range(3000)), 300), AgentTerms(concurrency=64))
    sim.act = lambda unit: (0.5, done())
    sim.run(620)
    per_second = Counter(int(at) for at in sim.begins())
    assert max(per_second.values()) < 35  # 10 on average
    assert set(Counter(unit.found.vm.name for _, unit in sim.begun if unit.found).values()) <= {2, 3}
    assert sim.most_at_once <= 64


def test_a_cycle_that_is_late_does_not_pile_up_and_its_missed_turns_are_told() -> None:
    sim = Simulation(fleet(["slow", "quick"], 60))
    long = iter([10 * 60.0 + 5])
    sim.act = lambda unit: (next(long, 1.0) if unit.found and unit.found.vm.name == "slow" else 1.0, done())
    sim.run(1800)
    begins = sim.begins(name="slow")
    assert begins[1] - begins[0] > 600
    assert gaps(begins[1:])[1:] == pytest.approx([60] * (len(begins) - 3), abs=1.5)
    (missed,) = sim.told("cycle.missed")
    assert (missed.vm, missed.fields["turns"]) == ("slow", 10)
    assert len(sim.begins(name="quick")) >= 29  # it went on meanwhile


def test_with_too_little_room_all_are_late_by_the_same() -> None:
    sim = Simulation(fleet((f"vm-{n}" for n in range(20)), 60), AgentTerms(concurrency=1))
    sim.act = lambda unit: (10.0, done())  # 20 VMs need 200 s for a round
    sim.run(4000)
    counts = Counter(unit.found.vm.name for _, unit in sim.begun if unit.found)
    assert max(counts.values()) - min(counts.values()) <= 2
    assert min(counts.values()) >= 18
    assert sim.most_at_once == 1


def test_failures_are_repeated_by_the_table_and_then_every_half_hour() -> None:
    sim = Simulation(fleet(["down", "up"], 300))
    sim.act = lambda unit: (0.0, failed(DOWN) if unit.found and unit.found.vm.name == "down" else done())
    sim.run(4 * 3600)
    begins = sim.begins(name="down")
    pauses = [gap / 60 for gap in gaps(begins)]
    assert pauses[:9] == pytest.approx([1, 2, 4, 8, 10, 30, 30, 30, 30])
    told = sim.told("cycle.failed")
    assert [one.fields["retry_in_seconds"] for one in told[:6]] == [60, 120, 240, 480, 600, 1800]
    assert [one.fields["failures"] for one in told[:3]] == [1, 2, 3]
    assert told[0].fields["error"] == "StoreUnavailableError"
    assert len(sim.begins(name="up")) >= 47


def test_after_a_success_the_count_begins_anew_and_turns_go_on() -> None:
    sim = Simulation(fleet(["a"], 3600))
    outcomes = iter([failed(DOWN)] * 3 + [done()] + [failed(DOWN)] + [done()] * 9)
    sim.act = lambda unit: (0.0, next(outcomes, done()))
    sim.run(5 * 3600)
    begins = sim.begins()
    assert begins[3] - begins[0] == pytest.approx(7 * 60)
    assert begins[5] - begins[4] == pytest.approx(60)
    assert begins[6] - begins[4] == pytest.approx(3600)


@pytest.mark.parametrize(
    "error, verdict",
    [
        (ConfigurationError("x"), Verdict.STOP),
        (TenantKeyError("x"), Verdict.STOP),
        (IntegrityError("x"), Verdict.STOP),
        (FormatVersionError("x"), Verdict.STOP),
        (UsageError("x"), Verdict.STOP),
        (DOWN, Verdict.RETRY),
        (StoreRefusedError("x"), Verdict.RETRY),
        (StoreFullError("x"), Verdict.RETRY),
        (SourceError("x"), Verdict.RETRY),
        (DiskError("x"), Verdict.RETRY),
        (LeaseLostError("x"), Verdict.RETRY),
        (ZeroDivisionError("x"), Verdict.RETRY),
        (LeaseHeldError("x"), Verdict.BUSY),
        (StandingError("x"), Verdict.SKIP),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.value,
)
def test_what_an_error_means(error: Exception, verdict: Verdict) -> None:
    assert judge(error) is verdict


def test_what_is_in_vain_stops_that_vm_until_its_settings_change() -> None:
    sim = Simulation(fleet(["bad", "good"], 300))
    mended = False

    def act(unit: Unit) -> tuple[float, Result]:
        bad = unit.found is not None and unit.found.vm.name == "bad" and not mended
        return 1.0, failed(IntegrityError("damaged", key="k")) if bad else done()

    def mend() -> None:
        nonlocal mended
        mended = True
        sim.fleet["bad"] = changed(sim.fleet["bad"], interval_seconds=60)

    sim.act = act
    sim.at(7200, mend)
    sim.run(9000)
    begins = sim.begins(name="bad")
    assert begins[0] <= 301
    assert 7200 < begins[1] <= 7200 + 300 + 61  # looked at once in its interval
    assert begins[4] - begins[3] == pytest.approx(60, abs=1)
    assert len(sim.told("vm.stopped")) == 1
    assert sim.told("vm.stopped")[0].fields["key"] == "k"
    assert [one.vm for one in sim.told("vm.resumed")] == ["bad"]
    assert len(sim.begins(name="good")) >= 29


def test_what_was_stopped_or_waits_is_tried_again_when_the_agent_is_told() -> None:
    sim = Simulation(fleet(["stopped", "waits"], 300))
    sim.act = lambda unit: (
        0.0,
        done()
        if sim.seconds > 5000
        else failed(TenantKeyError("x") if unit.found and unit.found.vm.name == "stopped" else DOWN),
    )
    sim.at(5001, lambda: sim.put(Word.RELOAD))
    sim.run(5400)
    for name in ("stopped", "waits"):
        assert next(at for at in sim.begins(name=name) if at > 4900) == pytest.approx(5001)
    assert len(sim.told("config.reloaded")) == 1


def test_settings_that_change_are_picked_up_by_the_next_cycle() -> None:
    sim = Simulation(fleet(["a"], 600))
    new = changed(sim.fleet["a"], interval_seconds=30)
    sim.act = lambda unit: (
        1.0,
        Result(fields={}, facts=new if unit.settings_version == 1 and sim.seconds > 1500 else None),
    )
    sim.run(4000)
    late = [at for at in sim.begins() if at > 2200]
    assert gaps(late) == pytest.approx([30] * (len(late) - 1), abs=1)
    assert [one.fields["interval_seconds"] for one in sim.told("vm.changed")] == [30]


def test_a_vm_that_failed_over_is_skipped_with_one_line_and_taken_up_when_it_is_home() -> None:
    away = facts("away", 300, standing=Standing.FAILED_OVER)
    sim = Simulation({"away": away, "here": facts("here")})
    sim.at(7200, lambda: sim.fleet.update(away=changed(away, standing=Standing.PROTECTED)))
    sim.run(9000)
    assert len(sim.told("vm.skipped")) == 1
    assert sim.told("vm.skipped")[0].fields["standing"] == "failed-over"
    assert 7200 < sim.begins(name="away")[0] <= 7200 + 400


def test_a_failover_meanwhile_is_one_line_too() -> None:
    sim = Simulation(fleet(["a", "b"], 300))

    def act(unit: Unit) -> tuple[float, Result]:
        if unit.found and unit.found.vm.name == "a" and sim.seconds > 1000:
            sim.fleet["a"] = facts("a", version=2, standing=Standing.COMMITTED)
            return 0.1, failed(StandingError("a is committed"))
        return 1.0, done()

    sim.act = act
    sim.run(8000)
    assert [one.vm for one in sim.told("vm.skipped")] == ["a"]
    assert max(sim.begins(name="a")) < 1400
    assert not sim.told("cycle.failed", "vm.stopped")


def test_another_agent_at_work_is_one_line_until_it_is_gone() -> None:
    sim = Simulation(fleet(["a", "b"], 300))
    sim.act = lambda unit: (
        0.1,
        failed(LeaseHeldError("host-b is replicating this VM"))
        if unit.found and unit.found.vm.name == "a" and sim.seconds < 3600
        else done(),
    )
    sim.run(9000)
    assert len(sim.told("cycle.busy")) == 1
    assert [one for one in sim.told("cycle.done") if one.vm == "a"]
    assert len(sim.begins(name="b")) >= 29


def test_the_agent_s_own_garbage_collection_is_waited_for_without_a_word() -> None:
    sim = Simulation(fleet(["a"], 300))
    outcomes = iter([failed(LeaseHeldError("x"), own=True)] * 2)
    sim.act = lambda unit: (0.1, next(outcomes, done()))
    sim.run(400)
    begins = sim.begins()
    assert gaps(begins[:3]) == pytest.approx([5.1, 5.1])
    assert not sim.told("cycle.busy", "cycle.failed")


def test_vms_come_and_go() -> None:
    sim = Simulation(fleet(["old"]), AgentTerms(refresh_seconds=60))
    sim.at(1000, lambda: sim.fleet.update(fleet(["new"])))
    sim.at(2000, lambda: sim.fleet.pop("old"))
    sim.run(4000)
    assert [(one.name, one.vm) for one in sim.told("vm.added", "vm.removed")] == [
        ("vm.added", "old"),
        ("vm.added", "new"),
        ("vm.removed", "old"),
    ]
    assert 1000 < sim.begins(name="new")[0] <= 1000 + 61 + 300
    assert max(sim.begins(name="old")) < 2061


def test_vms_of_other_hosts_are_told_once_and_taken_up_when_their_disks_come() -> None:
    sim = Simulation(fleet(["there", "here"]), missing={"there": "/disks/there"})
    sim.at(5000, sim.missing.clear)
    sim.run(6000)
    assert [(one.vm, one.fields["missing"]) for one in sim.told("vm.elsewhere")] == [("there", "/disks/there")]
    assert 5000 < sim.begins(name="there")[0] <= 5361


def test_a_store_that_cannot_be_listed_is_asked_again_by_the_table() -> None:
    sim = Simulation(fleet(["a"]), refresh_error=DOWN)
    sim.at(500, lambda: setattr(sim, "refresh_error", None))
    sim.run(2000)
    at = sim.begins(Task.REFRESH)
    assert gaps(at[:4]) == pytest.approx([60.1, 120.1, 240.1])
    assert len(sim.told("vms.failed")) == 4
    assert sim.begins(name="a")[0] > at[4]


def test_a_vm_of_which_the_store_tells_nothing_keeps_no_other_waiting() -> None:
    sim = Simulation(fleet(["away", "here"], 300), unreachable={"away": DOWN})
    sim.at(2000, sim.unreachable.clear)
    sim.run(4000)
    assert sim.begins(name="here")[0] <= 301
    (told,) = sim.told("vm.unreachable")
    assert (told.vm, told.fields["error"]) == ("away", "StoreUnavailableError")
    assert 2000 < sim.begins(name="away")[0] <= 2000 + 61 + 300
    once = Simulation(fleet(["away", "here"], 300), unreachable={"away": DOWN})
    assert not once.run(4000, once=True).complete


def test_a_stopped_vm_that_cannot_be_asked_stays_known() -> None:
    sim = Simulation(fleet(["bad"], 300))
    sim.act = lambda unit: (1.0, failed(IntegrityError("x")) if sim.seconds < 2000 else done())
    sim.at(1000, lambda: sim.unreachable.update(bad=DOWN))
    sim.at(1500, lambda: sim.fleet.update(bad=changed(sim.fleet["bad"])))
    sim.at(3000, sim.unreachable.clear)
    sim.run(4000)
    assert not sim.told("vm.unreachable", "vm.removed")
    assert [one.name for one in sim.told("vm.added", "vm.stopped", "vm.resumed")] == [
        *("vm.added", "vm.stopped", "vm.resumed")
    ]
    assert 3000 < sim.begins()[-1] <= 4000


def test_care_is_taken_at_turns_of_its_own_one_thing_at_a_time() -> None:
    sim = Simulation(fleet("abcd", 3600), AgentTerms(prune_seconds=7200, gc_seconds=43200, drill_seconds=7 * DAY))
    sim.renewal = timedelta(days=5)

    def act(unit: Unit) -> tuple[float, Result]:
        return (60.0 if unit.task is Task.VERIFY else 5.0), done()

    sim.act = act
    sim.run(14 * DAY, care=True)
    per_vm = {task: Counter(u.found.vm.name for _, u in sim.begun if u.task is task and u.found) for task in Task}
    for name in "abcd":
        assert abs(per_vm[Task.PRUNE][name] - 14 * 12) <= 1
        assert abs(per_vm[Task.VERIFY][name] - 14) <= 1
        assert abs(per_vm[Task.RETAIN][name] - 14 / 2.5) <= 1
        assert abs(per_vm[Task.DRILL][name] - 2) <= 1
    assert abs(len(sim.begins(Task.GC)) - 28) <= 1
    care = [(at, unit) for at, unit in sim.begun if unit.task not in (Task.CYCLE, Task.REFRESH)]
    for (at, unit), (following, _) in itertools.pairwise(care):
        assert following >= at + act(unit)[0] - 1e-6
    assert len(set(sim.begins(Task.PRUNE)[:4])) == 4  # jitter


def test_pruning_and_a_cycle_of_a_vm_are_never_under_way_together() -> None:
    sim = Simulation(fleet(["a"], 60), AgentTerms(prune_seconds=300, verify=None, gc_seconds=None))
    sim.act = lambda unit: (40.0 if unit.task is Task.PRUNE else 30.0, done())
    sim.run(DAY / 4, care=True)
    spans = [
        (at, at + (40.0 if unit.task is Task.PRUNE else 30.0))
        for at, unit in sim.begun
        if unit.task is not Task.REFRESH
    ]
    assert all(following >= end - 1e-6 for (_, end), (following, _) in itertools.pairwise(spans))
    assert len(sim.begins(Task.PRUNE)) >= 70  # of 72: none is put off for longer than a cycle takes


def test_what_is_off_is_not_done() -> None:
    sim = Simulation(fleet("ab"), AgentTerms(prune_seconds=None, gc_seconds=None, verify=None))
    sim.run(3 * DAY, care=True)
    assert {unit.task for _, unit in sim.begun} == {Task.CYCLE, Task.REFRESH}


def test_damage_is_told_and_a_failure_of_care_is_tried_again() -> None:
    sim = Simulation(fleet(["a"], 3600), AgentTerms(prune_seconds=None, gc_seconds=None, verify=Budget(share=0.1)))
    outcomes = iter([failed(DOWN), failed(DOWN), Result(fields={"damaged_points": [3]}, event="verify.damage")])
    sim.act = lambda unit: (0.0, next(outcomes, done()) if unit.task is Task.VERIFY else done())
    sim.run(2 * DAY, care=True)
    begins = sim.begins(Task.VERIFY)
    assert gaps(begins[:3]) == pytest.approx([60, 120])
    assert begins[3] - begins[0] == pytest.approx(DAY, abs=1)
    assert [one.name for one in sim.told("verify.failed", "verify.damage", "verify.done")][:3] == [
        "verify.failed",
        "verify.failed",
        "verify.damage",
    ]


# --- stopping, starting again


def test_told_to_stop_it_lets_a_cycle_end_within_its_grace() -> None:
    sim = Simulation(fleet(["a"], 60), AgentTerms(grace_seconds=30))
    begun: list[float] = []

    def act(unit: Unit) -> tuple[float, Result]:
        begun.append(sim.seconds)
        sim.put(Word.STOP)
        return 20.0, done()

    sim.act = act
    ending = sim.run(3600)
    assert ending.clean
    assert sim.seconds == pytest.approx(begun[0] + 20)
    assert [one.name for one in sim.events][-3:] == ["agent.stopping", "cycle.done", "agent.stopped"]


def test_after_its_grace_a_cycle_is_given_up_and_what_hangs_is_left() -> None:
    for hangs, names in (
        (5.0, ["agent.stopping", "agent.abandoning", "cycle.abandoned", "agent.stopped"]),
        (1e6, ["agent.stopping", "agent.abandoning", "agent.stuck", "agent.stopped"]),
    ):
        sim = Simulation(fleet(["a"], 60), AgentTerms(grace_seconds=30))
        begun: list[float] = []

        def act(unit: Unit) -> tuple[float, Result]:
            begun.append(sim.seconds)  # noqa: B023
            sim.put(Word.STOP)  # noqa: B023
            return 30 + hangs, done()  # noqa: B023

        sim.act = act
        ending = sim.run(3600)
        assert ending.clean == (hangs == 5.0)
        assert sim.seconds - begun[0] <= 30 + 30 + 1e-3
        assert [one.name for one in sim.events][-len(names) :] == names


def test_once_is_one_cycle_of_each_and_says_whether_all_were_done() -> None:
    sim = Simulation({**fleet("abc"), "away": facts("away", standing=Standing.COMMITTED)})
    ending = sim.run(10 * DAY, once=True)
    assert (ending.complete, ending.clean) == (True, True)
    assert Counter(unit.found.vm.name for _, unit in sim.begun if unit.found) == Counter("abc")
    assert sim.seconds < 10
    sim = Simulation(fleet("abc"))
    sim.act = lambda unit: (1.0, failed(DOWN) if unit.found and unit.found.vm.name == "b" else done())
    assert not sim.run(10 * DAY, once=True).complete
    assert len(sim.begins()) == 3
    sim = Simulation(refresh_error=DOWN)
    assert not sim.run(10 * DAY, once=True).complete
    assert sim.seconds < 10


def test_what_an_earlier_run_did_is_known_to_the_next_and_the_turns_between_are_missed(tmp_path: Path) -> None:
    sim = Simulation(fleet("abcdefgh", 3600))
    sim.run(2 * 3600, status_folder=tmp_path)
    told = statusfile.read(tmp_path)
    assert told is not None and told["state"] == "stopped" and set(told["vms"]) == set("abcdefgh")
    assert told["vms"]["a"]["last"]["point"] == 1
    # At once again: nothing is overdue, so each waits for its turn, although some would be early.
    soon = Simulation(sim.fleet, clock=sim.clock)
    soon.run(3600, status_folder=tmp_path)
    for name, one in soon.fleet.items():
        own = timing.phase(one.found.keys.vm_id, "cycle")
        begun = next(unit.begun_at for _, unit in soon.begun if unit.found and unit.found.vm.name == name)
        assert begun is not None
        assert (begun.timestamp() - own * 3600 + 1) % 3600 < 15
    assert not soon.told("cycle.missed")
    sim.clock.advance(10 * 3600)
    later = Simulation(sim.fleet, clock=sim.clock)
    later.run(3600, status_folder=tmp_path)
    assert {one.vm for one in later.told("cycle.missed")} == set("abcdefgh")
    assert all(9 <= int(str(one.fields["turns"])) <= 11 for one in later.told("cycle.missed"))
    assert all(later.begins(name=name)[0] <= timing.SPREAD_SECONDS + 10 for name in "abcdefgh")


def test_the_first_cycle_of_a_run_asks_the_point_before_it_how_many_turns_went_by(tmp_path: Path) -> None:
    """A status file may lack the last cycles of a run that was killed, or all of them."""
    sim = Simulation(fleet("a", 60))
    sim.run(600, status_folder=tmp_path)
    sim.clock.advance(20 * 60)
    for folder in (tmp_path, None):
        later = Simulation(sim.fleet, clock=sim.clock)
        before = sim.clock.now() - timedelta(minutes=5)
        outcomes = iter([replace(done(), before=before), replace(done(), before=before)])
        later.act = lambda unit, outcomes=outcomes: (0.5, next(outcomes, done()))  # type: ignore[misc]
        later.run(300, status_folder=folder)
        (missed,) = later.told("cycle.missed")  # of this run's own cycles it knows itself
        assert missed.fields["turns"] == pytest.approx((later.begins()[0] + 300) // 60, abs=1)
        assert missed.fields["turns"] in (4, 5)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "store": "memory:none"}'])
def test_a_status_file_that_says_nothing_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "agent.json").write_bytes(content)
    sim = Simulation(fleet("a"))
    sim.run(600, status_folder=tmp_path)
    assert len(sim.begins(name="a")) >= 2


@pytest.mark.parametrize("other", [{"store": "memory:another"}, {"tenant": "another"}])
def test_a_status_file_of_another_store_or_tenant_counts_for_nothing(tmp_path: Path, other: dict[str, str]) -> None:
    sim = Simulation(fleet("a", 3600))
    sim.run(2 * 3600, status_folder=tmp_path)
    told = statusfile.read(tmp_path)
    assert told is not None
    statusfile.write(tmp_path, {**told, **other})
    sim.clock.advance(10 * 3600)
    later = Simulation(sim.fleet, clock=sim.clock)
    later.run(3600, status_folder=tmp_path)
    assert later.told("cycle.done") and not later.told("cycle.missed")


def test_hostile_members_of_a_status_file_do_no_harm(tmp_path: Path) -> None:
    one = facts("a")
    vms: dict[str, object] = {
        "a": {
            "vm_id": one.found.keys.vm_id,
            "begun_at": "never",
            "missed": "x",
            "last": 3,
            "tasks": {"prune": {"at": 7}},
        }
    }
    document: dict[str, object] = {"store": "memory:none", "tenant": "default", "vms": vms}
    statusfile.write(tmp_path, document)
    sim = Simulation({"a": one})
    sim.run(600, status_folder=tmp_path)
    assert len(sim.begins(name="a")) >= 2
    statusfile.write(tmp_path, {**document, "vms": {"a": [1]}})
    sim.run(600, status_folder=tmp_path)


def test_a_clock_that_jumps_neither_stops_nor_floods() -> None:
    sim = Simulation(fleet("ab", 300))
    sim.at(3000, lambda: sim.clock.jump(-DAY))
    sim.at(6000, lambda: sim.clock.jump(3 * DAY))
    sim.run(9000)
    begins = sim.begins(name="a")
    pauses = gaps(begins)
    assert max(pauses) <= 602
    assert len(begins) <= 9000 / 300 + 3


def test_a_configuration_that_is_wrong_is_refused_and_the_old_one_stays() -> None:
    sim = Simulation(fleet("a"))
    agent = sim.agent()

    def refuse() -> AgentTerms:
        raise ConfigurationError("agent.gc: is wrong", path="godwit.toml")

    agent._reload = refuse
    sim.at(100, lambda: sim.put(Word.RELOAD))
    sim.at(700, lambda: sim.put(Word.STOP))
    agent.run()
    assert [one.name for one in sim.told("config.refused", "config.reloaded")] == ["config.refused"]
    assert len(sim.begins(name="a")) >= 2


def test_a_vm_that_is_not_chosen_any_more_leaves() -> None:
    sim = Simulation(fleet(["web", "db"], 60))

    def choose() -> None:
        sim.terms = AgentTerms(vms=("d*",))
        sim.fleet.pop("web")  # what a listing by the new patterns gives
        sim.put(Word.RELOAD)

    sim.at(1000, choose)
    sim.run(2000)
    assert [one.vm for one in sim.told("vm.removed")] == ["web"]
    assert max(sim.begins(name="web")) <= 1000
    assert max(sim.begins(name="db")) > 1900
