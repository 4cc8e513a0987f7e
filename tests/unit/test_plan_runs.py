"""Runs of plans on a platform in memory: order, failures and rules, confirmations, what is asked and resumed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from replica.errors import GodwitError, LeaseHeldError, LeaseLostError, UsageError
from replica.keys import PlanKeys
from replica.plans import running, settling
from replica.plans.engine import Mark, Told
from replica.plans.journal import Result, What
from replica.plans.model import RunKind
from tests.support.failover import LOCAL
from tests.support.fake_platform import FakePlatform
from tests.support.plans import Estate, make_estate, plan_of

THREE = """
plan: shop
groups:
  - group: data
    vms:
      - db
  - group: front
    vms:
      - vm: web
        depends_on: [app]
      - app
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    return make_estate(tmp_path_factory.mktemp("estate"))


@pytest.fixture
def estate(whole: Estate) -> Estate:
    return whole.copy()


def begun(estate: Estate) -> list[str]:
    return [one.step.id for one in estate.told if one.mark is Mark.BEGUN and one.step is not None]


def results(found: running.Run) -> dict[str, str]:
    return {
        name: "unknown" if one.outcome is None else one.outcome.result.value for name, one in found.state.steps.items()
    }


def test_an_unplanned_run_starts_all_in_order_and_ends(estate: Estate) -> None:
    done = running.run(estate.operator(), plan_of(THREE), RunKind.UNPLANNED)
    assert done.ran is not None and done.ran.went_well
    assert begun(estate) == ["vm/db/start", "vm/app/start", "vm/web/start"]
    assert estate.standings() == {"db": "failed-over", "app": "failed-over", "web": "failed-over"}
    assert len(estate.hypervisor.running) == 3
    again = running.status(estate.store, PlanKeys("default", "shop"))
    assert again.is_over and set(results(again).values()) == {"done"}
    with pytest.raises(UsageError, match="over"):
        running.resume(estate.operator(), "shop")


def test_a_test_run_leaves_the_vms_as_they_stand_and_is_cleaned_up(estate: Estate) -> None:
    done = running.run(estate.operator(), plan_of(THREE), RunKind.TEST)
    assert set(estate.standings().values()) == {"protected"}
    assert len(estate.hypervisor.running) == 3
    assert [one.isolated for one in estate.state("db").beside] == [True]
    with pytest.raises(UsageError, match="nothing to commit"):
        settling.commit(done, estate.means)
    settled = settling.cleanup(done, estate.means)
    assert [one.vm for one in settled] == ["app", "web", "db"] or [one.vm for one in settled] == ["web", "app", "db"]
    assert all(one.error is None and one.machines for one in settled)
    assert estate.hypervisor.machines == {}
    assert settling.cleanup(done, estate.means) == ()


def test_a_planned_run_shuts_all_down_in_reverse_and_goes_home_in_reverse(estate: Estate) -> None:
    done = running.run(estate.operator(), plan_of(THREE), RunKind.PLANNED)
    assert done.ran is not None and done.ran.went_well
    assert estate.shut_down[:3] == ["web", "app", "db"]
    assert [one for one in begun(estate) if one.endswith("start")] == ["vm/db/start", "vm/app/start", "vm/web/start"]
    assert all(one.error is None for one in settling.commit(done, estate.means))
    assert set(estate.standings().values()) == {"committed"}


def test_what_fails_stops_the_run_and_it_goes_on_from_there(estate: Estate) -> None:
    broken = FakePlatform(estate.hypervisor, refuses=frozenset({"start"}))
    done = running.run(estate.operator(platform=broken), plan_of(THREE), RunKind.UNPLANNED)
    assert done.ran is not None and done.ran.stopped is not None
    assert "start db: simulated" in done.ran.stopped
    assert begun(estate) == ["vm/db/start"]
    with pytest.raises(UsageError, match="not brought to its end"):
        running.run(estate.operator(), plan_of(THREE), RunKind.UNPLANNED)
    again = running.resume(estate.operator(host=estate.host("host-b")), "shop")
    assert again.ran is not None and again.ran.went_well
    assert len(estate.hypervisor.running) == 3
    assert again.state.steps["vm/db/start"].attempts == 2


CONTINUES = """
plan: shop
defaults: {on_failure: continue}
groups:
  - group: data
    vms: [{vm: db, before: [{host: ["false"], on_failure: continue, runs: unplanned}]}]
  - group: front
    vms:
      - {vm: app, before: [{host: ["false"], runs: [unplanned], name: gate, on_failure: continue}]}
      - {vm: web, depends_on: [app]}
"""


def test_what_may_fail_is_gone_on_from_and_what_needs_it_is_left_out(estate: Estate) -> None:
    class Broken(FakePlatform):
        def start(self, name: str) -> None:
            if name.startswith(f"godwit-{estate.found('app').vm.vm_id[:8]}"):
                raise GodwitError("app does not start")
            FakePlatform.start(self, name)

    done = running.run(estate.operator(platform=Broken(estate.hypervisor)), plan_of(CONTINUES), RunKind.UNPLANNED)
    assert done.ran is not None and done.ran.stopped is None and not done.ran.went_well
    assert results(done) == {
        "vm/db/before/1": "failed",
        "vm/db/start": "done",  # a failed action that may fail does not stand against it
        "vm/app/before/1": "failed",
        "vm/app/start": "failed",
        "vm/web/start": "left-out",
    }
    assert done.is_over


def test_a_run_waits_for_nobody_but_says_that_nobody_was_there(estate: Estate) -> None:
    plan = plan_of(THREE.replace("groups:", "before: [{confirm: 'Is the line open?'}]\ngroups:"))
    estate.answer = None
    done = running.run(estate.operator(), plan, RunKind.UNPLANNED)
    assert done.ran is not None and done.ran.stopped == "ask: Is the line open?: nobody was there to be asked"
    assert estate.hypervisor.machines == {}
    estate.answer = True
    again = running.resume(estate.operator(), "shop")
    assert again.ran is not None and again.ran.went_well
    assert estate.asked == ["Is the line open?"] * 2


def marking(estate: Estate, *, repeatable: bool = False) -> str:
    mark = estate.folder / f"mark-{len(list(estate.folder.iterdir()))}"
    return (
        f"plan: shop\ngroups:\n  - group: one\n    vms:\n      - vm: db\n        after:\n"
        f"          - host: [sh, -c, 'echo $GODWIT_VM:$GODWIT_KIND:$GODWIT_POINT >> {mark}']\n"
        f"            repeatable: {str(repeatable).lower()}\n"
        f"            runs: [test]\n"
    )


def mark_of(text: str) -> list[str]:
    path = Path(text.partition(">> ")[2].partition("'")[0])
    return path.read_text().splitlines() if path.exists() else []


def test_an_action_is_told_what_it_is_about(estate: Estate) -> None:
    text = marking(estate)
    running.run(estate.operator(), plan_of(text), RunKind.TEST)
    assert mark_of(text) == ["db:test:1"]


def test_what_must_not_be_done_twice_is_asked_about(estate: Estate) -> None:
    text = marking(estate)
    done = running.run(estate.operator(), plan_of(text.replace("echo", "exit 3; echo")), RunKind.TEST)
    assert done.ran is not None and done.ran.stopped is not None and "status 3" in done.ran.stopped
    with pytest.raises(UsageError, match="not to be done twice: vm/db/after/1") as caught:
        running.resume(estate.operator(), "shop")
    assert caught.value.hint is not None and "--skip vm/db/after/1" in caught.value.hint
    with pytest.raises(UsageError, match="no step 'vm/db/after/9'"):
        running.resume(estate.operator(), "shop", skip=["vm/db/after/9"])
    skipped = running.resume(estate.operator(), "shop", skip=["vm/db/after/1"])
    assert skipped.ran is not None and skipped.ran.went_well
    assert skipped.state.steps["vm/db/after/1"].outcome is not None
    assert skipped.state.steps["vm/db/after/1"].outcome.result is Result.SKIPPED


def test_it_is_done_again_where_that_was_said_or_the_plan_says_so(estate: Estate) -> None:
    go = estate.folder / "go"
    text = marking(estate).replace("echo", f"test -e {go} || exit 3; echo")
    running.run(estate.operator(), plan_of(text), RunKind.TEST)
    go.touch()
    done = running.resume(estate.operator(), "shop", redo=["vm/db/after/1"])
    assert done.ran is not None and done.ran.went_well
    assert mark_of(text) == ["db:test:1"]


def test_a_program_that_is_not_there_was_not_begun_and_may_be_tried_again(estate: Estate) -> None:
    text = marking(estate).replace("sh, -c", "/no/such/program, -c")
    done = running.run(estate.operator(), plan_of(text), RunKind.TEST)
    assert done.ran is not None and "cannot be run" in (done.ran.stopped or "")
    again = running.resume(estate.operator(), "shop")
    assert again.ran is not None and "cannot be run" in (again.ran.stopped or "")


def test_a_program_is_ended_when_its_time_is_up(estate: Estate) -> None:
    text = marking(estate).replace("'echo", "'sleep 60; echo") + "            timeout: 1s\n"
    done = running.run(estate.operator(), plan_of(text), RunKind.TEST)
    assert done.ran is not None and "did not end within 1 s" in (done.ran.stopped or "")
    assert mark_of(text) == []


def test_of_two_operators_the_second_is_refused_and_a_dead_one_is_followed(estate: Estate) -> None:
    plan = plan_of(THREE)
    refused: list[BaseException] = []

    def watch(told: Told) -> None:
        if told.mark is Mark.BEGUN and told.step is not None and told.step.id == "vm/app/start":
            with pytest.raises(LeaseHeldError) as caught:
                running.resume(estate.operator(host=estate.host("host-b")), "shop")
            refused.append(caught.value)
            with pytest.raises(LeaseHeldError) as caught:
                running.run(estate.operator(host=estate.host("host-b")), plan, RunKind.UNPLANNED, anew=True)
            refused.append(caught.value)

    running.run(estate.operator(watch=watch), plan, RunKind.UNPLANNED)
    assert len(refused) == 2 and "host-a is at work" in str(refused[0])


def test_an_operator_who_slept_too_long_begins_nothing_more(estate: Estate) -> None:
    plan = plan_of(THREE)

    def watch(told: Told) -> None:
        if told.mark is Mark.SETTLED and told.step is not None and told.step.id == "vm/db/start":
            done = running.resume(estate.operator(host=estate.other_host(), watch=lambda _: None), "shop")
            assert done.ran is not None and done.ran.went_well

    with pytest.raises(LeaseLostError, match="took this run of the plan over"):
        running.run(estate.operator(watch=watch), plan, RunKind.UNPLANNED)
    assert len(estate.hypervisor.running) == 3


def test_an_interrupted_run_lets_what_is_under_way_end_and_is_gone_on_with(estate: Estate) -> None:
    def watch(told: Told) -> None:
        if told.mark is Mark.SETTLED and told.step is not None and told.step.id == "vm/db/start":
            raise KeyboardInterrupt

    done = running.run(estate.operator(watch=watch), plan_of(THREE), RunKind.TEST)
    assert done.ran is not None and done.ran.interrupted
    assert done.state.ending is What.STOPPED
    again = running.resume(estate.operator(), "shop")
    assert again.ran is not None and again.ran.went_well
    assert len(estate.hypervisor.running) == 3


def test_a_run_that_is_given_up_makes_room_for_another(estate: Estate) -> None:
    broken = FakePlatform(estate.hypervisor, refuses=frozenset({"start"}))
    running.run(estate.operator(platform=broken), plan_of(THREE), RunKind.TEST)
    done = running.run(estate.operator(), plan_of(THREE), RunKind.TEST, anew=True)
    assert done.header.run == 2
    first = running.status(estate.store, PlanKeys("default", "shop"), 1)
    assert first.state.ending is What.GIVEN_UP


def test_a_run_that_was_cleaned_up_is_gone_on_with_by_nobody(estate: Estate) -> None:
    broken = FakePlatform(estate.hypervisor, refuses=frozenset({"start"}))
    found = running.run(estate.operator(platform=broken), plan_of(THREE), RunKind.TEST)
    assert not found.is_over and estate.state("db").beside != ()
    host = estate.host()
    stuck = FakePlatform(estate.hypervisor, refuses=frozenset({"delete"}))
    failed = settling.clean_up_after(
        estate.store, host, "default", found, lambda name: estate.means(name, platform=stuck)
    )
    assert failed[0].error is not None
    assert not running.status(estate.store, PlanKeys("default", "shop")).is_over
    settling.clean_up_after(estate.store, host, "default", found, estate.means)
    assert estate.state("db").beside == ()
    assert running.status(estate.store, PlanKeys("default", "shop")).state.ending is What.GIVEN_UP
    assert running.run(estate.operator(), plan_of(THREE), RunKind.TEST).header.run == 2


def test_no_more_than_so_many_at_once(estate: Estate) -> None:
    text = "plan: shop\ngroups:\n  - group: all\n    at_once: 2\n    vms: [db, app, web]\n"
    most = 0
    now: set[str] = set()

    def watch(told: Told) -> None:
        nonlocal most
        if told.step is not None and told.mark is Mark.BEGUN:
            now.add(told.step.id)
        if told.step is not None and told.mark is Mark.SETTLED:
            now.discard(told.step.id)
        most = max(most, len(now))

    running.run(estate.operator(watch=watch), plan_of(text), RunKind.TEST)
    assert most == 2


def test_a_step_that_takes_too_long_has_failed(estate: Estate) -> None:
    seen = threading.Event()

    class Slow(FakePlatform):
        def start(self, name: str) -> None:
            estate.clock.advance(2000)
            assert seen.wait(60)
            FakePlatform.start(self, name)

    def watch(told: Told) -> None:
        if told.mark is Mark.SETTLED:
            seen.set()

    operator = estate.operator(platform=Slow(estate.hypervisor), watch=watch)
    done = running.run(operator, plan_of(THREE), RunKind.TEST)
    assert done.ran is not None and "did not end within 1800 s" in (done.ran.stopped or "")


def test_a_test_that_is_gone_on_with_on_another_host_begins_a_machine_of_its_own_there(estate: Estate) -> None:
    estate.offers = LOCAL
    broken = FakePlatform(estate.hypervisor, refuses=frozenset({"start"}))
    running.run(estate.operator(platform=broken), plan_of(THREE), RunKind.TEST)
    (left,) = estate.state("db").beside
    other = estate.host("host-b")
    done = running.resume(estate.operator(host=other), "shop")
    assert done.ran is not None and done.ran.went_well
    assert len(estate.state("db").beside) == 2 and done.state.steps["vm/db/start"].machines[0] == left.name
    here = [one.vm for one in settling.cleanup(done, lambda name: estate.means(name, host=other)) if one.error]
    assert here == ["db"]  # one of its machines is seen by the first host only
    settled = settling.cleanup(done, lambda name: estate.means(name, host=other), forget=True)
    assert [one.error for one in settled] == [None] and estate.state("db").beside == ()


def test_a_home_disk_that_is_gone_is_missed_before_anything_is_shut_down(tmp_path: Path) -> None:
    estate = make_estate(tmp_path, ("db",))
    plan = plan_of("plan: shop\ngroups: [{group: g, vms: [db]}]\n")
    done = running.run(estate.operator(), plan, RunKind.UNPLANNED)
    settling.commit(done, estate.means)
    machine = estate.state("db").machine
    assert machine is not None
    path = tmp_path / "recovered.img"
    path.write_bytes(estate.labs["db"].restore(machine.point))
    estate.hypervisor.paths = lambda name, number: path
    assert [one.error for one in settling.reprotect(done, estate.means)] == [None]
    (disk,) = estate.labs["db"].paths
    moved = disk.rename(tmp_path / "moved")
    stopped = running.run(estate.operator(), plan, RunKind.FAILBACK)
    assert stopped.ran is not None and "the home disk is not there" in (stopped.ran.stopped or "")
    assert estate.hypervisor.running == [machine.name]
    moved.rename(disk)
    home = running.resume(estate.operator(), "shop")
    assert home.ran is not None and home.ran.went_well
    assert estate.standings() == {"db": "protected"} and estate.hypervisor.machines == {}
