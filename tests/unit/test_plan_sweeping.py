"""Sweeping runs of plans: what ended long ago goes whole, and nothing else does, wherever it was cut off."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest

from replica.keys import PlanKeys
from replica.plans import journal
from replica.plans.journal import RunState, StoredJournal, What
from replica.plans.model import Plan, RunKind
from replica.plans.sweeping import KEPT, sweep
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from tests.support.engine import FakeClock, make_host
from tests.support.store_doubles import CrashingStore, CrashMode, SimulatedCrash, crash_points

TENANT = "default"
DAY = timedelta(days=1)


class Runs:
    """Runs of plans, each with two entries and its last."""

    def __init__(self, store: Store | None = None, clock: FakeClock | None = None) -> None:
        self.store = store or MemoryStore()
        self.clock = clock or FakeClock()

    def run(self, plan: str, ending: What | None = What.ENDED) -> int:
        keys, host = PlanKeys(TENANT, plan), make_host(clock=self.clock)
        header = journal.begin(self.store, host, keys, Plan(plan, text="plan: x"), RunKind.TEST, {})
        written = StoredJournal(self.store, host, keys, header.run, RunState())
        for what in (What.TAKEN, What.ALIVE, *([] if ending is None else [ending])):
            written.append(what)
        return header.run

    def sweep(self, after: timedelta) -> int:
        return sweep(self.store, TENANT, self.clock.now() + after)

    def left(self, plan: str) -> tuple[list[int], list[int]]:
        """Return the runs that there are, and those that have entries."""
        keys = PlanKeys(TENANT, plan)
        begun = {int(info.key[-25:-5]) for info in self.store.list(keys.runs)}
        entries = {int(info.key[-36:-16]) for info in self.store.list(keys.runs.replace(".runs/", ".journal/"))}
        return sorted(begun), sorted(entries)


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_what_ended_long_ago_goes_and_the_last_run_stays(runs: Runs) -> None:
    assert [runs.run("shop"), runs.run("shop", What.GIVEN_UP), runs.run("shop"), runs.run("till")] == [1, 2, 3, 1]
    assert runs.sweep(KEPT) == 0
    assert runs.left("shop") == ([1, 2, 3], [1, 2, 3])
    assert runs.sweep(KEPT + timedelta(seconds=1)) == 2
    assert runs.left("shop") == ([3], [3]) and runs.left("till") == ([1], [1])
    assert journal.read(runs.store, PlanKeys(TENANT, "shop"), 3).ending is What.ENDED
    assert runs.sweep(1000 * DAY) == 0
    assert runs.run("shop") == 4, "no number is given twice"


def test_age_is_counted_from_the_end_of_each(runs: Runs) -> None:
    runs.run("shop")
    runs.clock.advance(60 * 86400)
    runs.run("shop")
    runs.run("shop")
    assert runs.sweep(40 * DAY) == 1
    assert runs.left("shop")[0] == [2, 3]


@pytest.mark.parametrize("ending", [None, What.STOPPED])
def test_what_nobody_brought_to_an_end_stays(runs: Runs, ending: What | None) -> None:
    runs.run("shop", ending)
    runs.run("shop")
    assert runs.sweep(1000 * DAY) == 0
    assert runs.left("shop") == ([1, 2], [1, 2])


def test_what_cannot_be_read_stays_and_other_runs_go(runs: Runs) -> None:
    for _ in range(3):
        runs.run("shop")
    key = PlanKeys(TENANT, "shop").entry(1, 3)
    runs.store.delete(key)
    runs.store.create(key, b"{}")
    strange = "tenants/default/plans/shop.notes/00000000000000000001.json"
    runs.store.create(strange, b"a later version's")
    assert runs.sweep(1000 * DAY) == 1
    assert runs.left("shop") == ([1, 3], [1, 3]) and runs.store.get(strange)


def test_a_run_that_is_known_by_its_entries_alone_is_not_the_last(runs: Runs) -> None:
    runs.run("shop")
    runs.run("shop")
    runs.store.delete(PlanKeys(TENANT, "shop").run(2))
    assert runs.sweep(1000 * DAY) == 0, "what is newer than the last run may be one that the listing lacks"
    assert runs.left("shop") == ([1], [1, 2])


@pytest.mark.parametrize(("at", "mode"), [*crash_points(8)])
def test_cut_off_anywhere_no_run_is_there_in_part_and_the_next_sweep_ends_it(at: int, mode: CrashMode) -> None:
    runs = Runs()
    for _ in range(3):
        runs.run("shop")
    later, keys = runs.clock.now() + 100 * DAY, PlanKeys(TENANT, "shop")
    crashing = CrashingStore(runs.store, at=at, mode=mode)
    with suppress(SimulatedCrash):
        sweep(crashing, TENANT, later)
    assert crashing.crashed
    for number in runs.left("shop")[0]:
        assert journal.header(runs.store, keys, number).run == number
        assert journal.read(runs.store, keys, number).ending is What.ENDED
    sweep(runs.store, TENANT, later)
    assert runs.left("shop") == ([3], [3])
