"""Every write to the store and every change of a machine in runs of plans, died at: another host ends as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replica.errors import GodwitError, UsageError
from replica.keys import PlanKeys
from replica.plans import running
from replica.plans.journal import Result
from replica.plans.model import RunKind
from replica.plans.running import Operator
from tests.support.fake_platform import FakePlatform
from tests.support.plans import Estate, make_estate, plan_of
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash

PLAN = """
plan: shop
before:
  - host: [sh, -c, 'echo once >> MARK']
    runs: [test, planned, unplanned]
groups:
  - group: data
    at_once: 1
    vms: [db]
  - group: front
    at_once: 1
    vms:
      - vm: web
        after:
          - host: [sh, -c, 'echo twice-or-more >> MARK']
            runs: [test, planned, unplanned]
            repeatable: true
after:
  - host: [sh, -c, 'echo last >> MARK']
    runs: [test, planned, unplanned]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    return make_estate(tmp_path_factory.mktemp("estate"), ("db", "web"))


def text_of(folder: Path) -> str:
    (folder / "mark").unlink(missing_ok=True)
    return PLAN.replace("MARK", str(folder / "mark"))


def marks(folder: Path) -> list[str]:
    path = folder / "mark"
    return path.read_text().split() if path.exists() else []


def cuts(whole: Estate, folder: Path, kind: RunKind) -> Iterator[tuple[str, Callable[[Estate], Operator]]]:
    """Yield every place where a run can be cut off: at each write, in each way, and at each call that changes."""
    estate = whole.copy()
    recording = RecordingStore(estate.store)
    running.run(estate.operator(store=recording), plan_of(text_of(folder)), kind)
    for at in range(len(recording.writes)):
        for mode in (CrashMode.BEFORE, CrashMode.AFTER, CrashMode.APPLIED_ERROR):
            yield (
                f"write {at} {mode.value} ({recording.writes[at].key[-40:]})",
                lambda estate, at=at, mode=mode: estate.operator(  # type: ignore[misc]
                    store=CrashingStore(estate.store, at=at, mode=mode)
                ),
            )
    for at in range(len(estate.hypervisor.calls)):
        for mode in (CrashMode.BEFORE, CrashMode.AFTER):
            yield (
                f"call {at} {mode.value}",
                lambda estate, at=at, mode=mode: estate.operator(  # type: ignore[misc]
                    platform=FakePlatform(estate.hypervisor, crash_at=at, crash_mode=mode)
                ),
            )


def brought_to_its_end(estate: Estate, folder: Path, text: str, kind: RunKind) -> running.Run:
    """Go on with the run on another host, as an operator does who looks whether an action was done."""
    host = estate.other_host()
    operator = estate.operator(host=host)
    keys = PlanKeys("default", "shop")
    try:
        found = running.status(estate.store, keys)
    except UsageError:  # it died before there was a run
        return running.run(operator, plan_of(text), kind)
    if found.is_over:
        return found
    words: dict[str, list[str]] = {"redo": [], "skip": []}
    for _ in range(3):
        try:
            return running.resume(operator, "shop", redo=words["redo"], skip=words["skip"])
        except UsageError as error:
            step = next(one for one in found.steps if one.id in str(error))
            assert not step.repeatable, error
            assert step.action is not None
            mark = step.action.command[2].split()[1]
            words["skip" if mark in marks(folder) else "redo"].append(step.id)
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("kind", [RunKind.TEST, RunKind.UNPLANNED, RunKind.PLANNED])
def test_wherever_a_run_is_cut_off_another_host_brings_it_to_the_same_end(
    whole: Estate, tmp_path: Path, kind: RunKind
) -> None:
    count = 0
    for name, operator in cuts(whole, tmp_path, kind):
        estate = whole.copy()
        text = text_of(tmp_path)
        with suppress(SimulatedCrash, GodwitError):  # a store that errs may make a step fail, and no more
            running.run(operator(estate), plan_of(text), kind)
        done = brought_to_its_end(estate, tmp_path, text, kind)
        assert done.is_over, name
        known = {step: one.outcome.result for step, one in done.state.steps.items() if one.outcome is not None}
        assert set(known.values()) <= {Result.DONE, Result.SKIPPED} and len(known) == len(done.steps) >= 5, name
        seen = marks(tmp_path)
        assert seen.count("once") == seen.count("last") == 1, name
        assert seen.count("twice-or-more") in (1, 2), name
        assert len(estate.hypervisor.running) == len(estate.hypervisor.machines) == 2, name
        machines = [
            *(one.name for vm in ("db", "web") for one in estate.state(vm).beside),
            *(one.machine.name for one in map(estate.state, ("db", "web")) if one.machine is not None),
        ]
        assert sorted(machines) == sorted(estate.hypervisor.machines), name
        assert set(estate.standings().values()) == {"protected" if kind is RunKind.TEST else "failed-over"}, name
        count += 1
    assert count > 60
