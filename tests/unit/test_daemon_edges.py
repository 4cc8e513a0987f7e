"""What seldom happens to an agent, on a clock that tests move: stopping amidst care, VMs that change amidst a cycle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from replica.daemon import statusfile
from replica.daemon.bandwidth import Limits, Window
from replica.daemon.mailbox import Word
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Facts, Result, Task, Unit, judge
from replica.errors import IntegrityError, LeaseHeldError, StoreUnavailableError
from replica.model import Standing
from replica.sampling import Budget
from tests.support.simulated_agent import Act, Simulation, changed, done, facts, fleet

DAY = 86400
DOWN = StoreUnavailableError("the store does not answer")
QUIET = AgentTerms(prune_seconds=None, gc_seconds=None, verify=None)


def failed(error: Exception) -> Result:
    return Result(judge(error), error=error)


def gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def taking(**seconds: float) -> Act:
    """Return units that take so long, by the task's name, and a moment otherwise."""
    return lambda unit: (seconds.get(unit.task.value, 0.1), done())


def test_told_to_stop_it_gives_up_care_at_once() -> None:
    sim = Simulation(fleet("a", 3600), replace(QUIET, verify=Budget(share=0.1), grace_seconds=600))
    sim.act = taking(verify=300.0)
    begun: list[float] = []

    def stop() -> None:
        begun.extend(sim.begins(Task.VERIFY))
        if begun:
            sim.put(Word.STOP)
        else:
            sim.at(sim.seconds + 50, stop)

    sim.at(50, stop)
    assert sim.run(3 * DAY, care=True).clean
    assert [one.name for one in sim.events][-1] == "agent.stopped"
    assert not sim.told("verify.done", "agent.abandoning")
    assert sim.seconds <= begun[0] + 300 + 1  # the stand-in for a thread notices only when it is done


def test_told_to_stop_twice_it_waits_no_longer_than_when_told_once() -> None:
    sim = Simulation(fleet("a", 60), replace(QUIET, grace_seconds=30))
    sim.act = taking(cycle=1000.0)
    sim.at(200, lambda: sim.put(Word.STOP))
    sim.at(225, lambda: sim.put(Word.STOP))
    sim.run(3600)
    assert len(sim.told("agent.stopping")) == 1
    assert sim.told("agent.abandoning")[0].at == sim.told("agent.stopping")[0].at + timedelta(seconds=30)


def test_a_limit_that_is_read_again_is_in_force() -> None:
    sim = Simulation(fleet("a", 60), QUIET)
    agent = sim.agent()

    def limit() -> None:
        sim.terms = replace(QUIET, limits=Limits((Window(100_000),)))
        sim.put(Word.RELOAD)

    sim.at(100, limit)
    seen: list[object] = []
    sim.at(200, lambda: seen.append(agent.status()["limit_bytes_per_second"]))
    sim.at(300, lambda: sim.put(Word.STOP))
    agent.run()
    assert seen == [100_000]


def test_what_is_switched_on_when_the_configuration_is_read_again_is_done() -> None:
    sim = Simulation(fleet("a", 600), QUIET)

    def switch_on() -> None:
        sim.terms = replace(QUIET, prune_seconds=3600)
        sim.put(Word.RELOAD)

    sim.at(DAY / 2, switch_on)
    sim.run(DAY, care=True)
    begins = sim.begins(Task.PRUNE)
    assert 11 <= len(begins) <= 12 and begins[0] > DAY / 2


def test_a_status_file_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    folder = tmp_path / "not a folder"
    folder.write_text("")
    sim = Simulation(fleet("a", 60), QUIET)
    assert sim.run(3600, status_folder=folder).clean
    assert len(sim.told("status.failed")) == 1
    assert len(sim.begins()) >= 58


def test_the_status_says_at_once_that_it_has_stopped(tmp_path: Path) -> None:
    sim = Simulation(fleet("a", 600), QUIET)
    sim.at(1000, lambda: sim.put(Word.RELOAD))  # after which the status is written
    sim.run(1001, status_folder=tmp_path)
    told = statusfile.read(tmp_path)
    assert told is not None and told["state"] == "stopped"


def test_missed_turns_are_added_up_in_the_status(tmp_path: Path) -> None:
    sim = Simulation(fleet("a", 60), QUIET)
    long = iter([605.0, 1.0, 305.0])
    sim.act = lambda unit: (next(long, 1.0), done())
    sim.run(3600, status_folder=tmp_path)
    told = statusfile.read(tmp_path)
    assert told is not None
    assert told["vms"]["a"]["missed"] == 15
    assert [one.fields["turns"] for one in sim.told("cycle.missed")] == [10, 5]


def test_pruning_waits_for_the_end_of_a_cycle_that_leaves_it_little_room() -> None:
    sim = Simulation(fleet("abc", 60), replace(QUIET, concurrency=3, prune_seconds=600))
    sim.act = taking(cycle=54.0, prune=4.0)
    sim.run(DAY / 4, care=True)
    for name in "abc":
        spans = sorted([(at, at + 54.0) for at in sim.begins(name=name)] + [(at, at + 4) for at in prunes(sim, name)])
        assert all(following >= end - 1e-6 for (_, end), (following, _) in itertools.pairwise(spans)), name
        assert len(prunes(sim, name)) >= 34, name


def prunes(sim: Simulation, name: str) -> list[float]:
    return sim.begins(Task.PRUNE, name)


def test_pruning_that_finds_another_agent_at_work_is_tried_again_without_a_word() -> None:
    sim = Simulation(fleet("a", 3600), replace(QUIET, prune_seconds=21600))
    outcomes = iter([failed(LeaseHeldError("x"))] * 2)
    sim.act = lambda unit: (0.0, next(outcomes, done()) if unit.task is Task.PRUNE else done())
    sim.run(DAY, care=True)
    assert gaps(sim.begins(Task.PRUNE)[:3]) == pytest.approx([60, 120])
    assert not sim.told("prune.failed")


def test_failures_of_care_are_counted_anew_after_a_success() -> None:
    sim = Simulation(fleet("a", 3600), replace(QUIET, prune_seconds=3600))
    outcomes = iter([failed(DOWN), failed(DOWN), done(), failed(DOWN)])
    sim.act = lambda unit: (0.0, next(outcomes, done()) if unit.task is Task.PRUNE else done())
    sim.run(DAY / 4, care=True)
    begins = sim.begins(Task.PRUNE)
    assert gaps(begins[:3]) == pytest.approx([60, 120])
    assert begins[4] - begins[3] == pytest.approx(60)


def test_locks_are_prolonged_once_the_store_is_known_to_have_any() -> None:
    sim = Simulation(fleet("a", 3600), QUIET)
    sim.at(DAY, lambda: setattr(sim, "renewal", timedelta(days=1)))
    sim.run(4 * DAY, care=True)
    begins = sim.begins(Task.RETAIN)
    assert begins[0] > DAY and len(begins) in (5, 6)


def test_a_vm_that_was_stopped_is_not_cared_for() -> None:
    sim = Simulation(fleet(["bad", "good"], 3600), replace(QUIET, prune_seconds=3600))
    sim.act = lambda unit: (
        (0.1, failed(IntegrityError("x")))
        if unit.task is Task.CYCLE and unit.found and unit.found.vm.name == "bad"
        else (0.1, done())
    )
    sim.run(DAY, care=True)
    stopped = sim.told("vm.stopped")[0].at
    last = max(sim.begins(Task.PRUNE, "bad"), default=0.0)
    assert last <= (stopped - sim.events[0].at).total_seconds() + 1
    assert len(sim.begins(Task.PRUNE, "good")) >= 23


def test_a_vm_protected_anew_under_its_name_is_another_and_what_the_old_one_s_cycle_did_is_not_its_own() -> None:
    old = facts("a", 300)
    new = protected_anew(old)
    sim = Simulation({"a": old}, replace(QUIET, concurrency=4))
    lengths = iter([1500.0])

    def act(unit: Unit) -> tuple[float, Result]:
        if unit.found == old.found:
            return next(lengths, 1.0), failed(IntegrityError("damaged"))
        return 290.0, done()  # so that it is under way when the old one's ends

    sim.act = act
    sim.at(600, lambda: sim.fleet.pop("a"))
    sim.at(700, lambda: sim.fleet.update(a=new))
    sim.run(4000)
    assert [one.name for one in sim.told("vm.added", "vm.removed", vm="a")] == ["vm.added", "vm.removed", "vm.added"]
    assert not sim.told("vm.stopped")  # the damage was the old one's
    assert [one.fields["error"] for one in sim.told("cycle.failed", vm="a")] == ["IntegrityError"]
    mine = [at for at, unit in sim.begun if unit.task is Task.CYCLE and unit.found == new.found]
    assert gaps(mine)[2:] == pytest.approx([300] * (len(mine) - 3), abs=2) and len(mine) >= 9


def protected_anew(one: Facts) -> Facts:
    """Return another VM of the same name."""
    found = one.found
    return replace(
        one, found=replace(found, vm=replace(found.vm, vm_id="f" * 32), keys=replace(found.keys, vm_id="f" * 32))
    )


def test_a_stopped_vm_that_is_protected_anew_is_begun_with_anew() -> None:
    sim = Simulation(fleet("a", 300), QUIET)
    new = protected_anew(sim.fleet["a"])
    sim.act = lambda unit: (1.0, done() if unit.found == new.found else failed(IntegrityError("damaged")))
    sim.at(2000, lambda: sim.fleet.update(a=new))
    sim.run(4000)
    assert [one.name for one in sim.events if one.name.startswith("vm.")] == [
        *("vm.added", "vm.stopped", "vm.removed", "vm.added")
    ]
    assert len(sim.told("cycle.done")) >= 5


def test_one_thing_of_care_at_a_time_however_many_are_due() -> None:
    sim = Simulation(fleet((f"vm-{number}" for number in range(30)), 3600), replace(QUIET, verify=Budget(share=0.1)))
    sim.act = taking(verify=3000.0)  # more than a day for all
    sim.run(3 * DAY, care=True)
    begins = sim.begins(Task.VERIFY)
    assert len(begins) >= 70 and min(gaps(begins)) >= 3000


def test_a_cycle_that_learns_of_a_failover_is_the_last_one() -> None:
    sim = Simulation(fleet("a", 300), QUIET)
    away = changed(sim.fleet["a"], standing=Standing.COMMITTED)

    def act(unit: Unit) -> tuple[float, Result]:
        if sim.seconds > 1000:
            sim.fleet["a"] = away
            return 1.0, replace(done(), facts=away)
        return 1.0, done()

    sim.act = act
    sim.run(4000)
    assert len([at for at in sim.begins() if at > 1000]) == 1
    assert [one.fields["standing"] for one in sim.told("vm.skipped")] == ["committed"]


def test_a_cycle_that_begins_a_moment_early_is_that_of_its_turn() -> None:
    """Clocks differ: one that is behind its own monotonic time must not do the same turn twice."""
    sim = Simulation(fleet("a", 600), QUIET)
    sim.act = taking(cycle=0.0)
    for at in range(200, 6000, 20):
        sim.at(at, lambda: sim.clock.jump(-0.02))
    sim.run(6000)
    assert min(gaps(sim.begins())[1:]) > 590  # it began out of turn, being overdue
    assert len(sim.begins()) >= 10
    assert not sim.told("cycle.missed")


def test_after_a_listing_that_failed_and_one_that_did_not_the_count_begins_anew() -> None:
    sim = Simulation(fleet(["a"]), replace(QUIET, refresh_seconds=300), refresh_error=DOWN)
    sim.at(500, lambda: setattr(sim, "refresh_error", None))
    sim.at(1000, lambda: setattr(sim, "refresh_error", DOWN))
    sim.run(2000)
    pauses = [one.fields["retry_in_seconds"] for one in sim.told("vms.failed")]
    first = pauses.index(60.0, 1)
    assert pauses[:first] == [60, 120, 240, 480][:first] and pauses[first : first + 2] == [60, 120]


def test_a_stopped_vm_is_looked_at_again_though_the_listing_in_between_failed() -> None:
    sim = Simulation(fleet(["a"], 300), QUIET)
    sim.act = lambda unit: (0.1, failed(IntegrityError("x")) if sim.seconds < 1000 else done())
    sim.at(100, lambda: setattr(sim, "refresh_error", DOWN))
    sim.at(900, lambda: setattr(sim, "refresh_error", None))
    sim.at(950, lambda: sim.fleet.update(a=changed(sim.fleet["a"])))
    sim.run(6000)
    assert [one.name for one in sim.told("vm.stopped", "vm.resumed")] == ["vm.stopped", "vm.resumed"]
    assert len(sim.told("cycle.done")) >= 10
