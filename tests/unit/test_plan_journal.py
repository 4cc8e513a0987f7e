"""The journal of a run: what it says is read back, gaps and damage are found, of two writers one stops."""

from __future__ import annotations

import pytest

from replica.errors import FormatVersionError, IntegrityError, LeaseHeldError, LeaseLostError, UsageError
from replica.host import Host
from replica.keys import PlanKeys
from replica.plans import journal
from replica.plans.journal import Outcome, Result, RunState, StoredJournal, What
from replica.plans.model import Plan, RunKind
from replica.stores.memory import MemoryStore
from tests.support.engine import FakeClock, make_host
from tests.support.store_doubles import CrashingStore, CrashMode

KEYS = PlanKeys("default", "shop")
PLAN = Plan("shop", text="plan: shop", sha256="ab" * 32)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def host(clock: FakeClock, name: str = "host-a") -> Host:
    return make_host(name=name, clock=clock)


def begun(store: MemoryStore, clock: FakeClock) -> StoredJournal:
    made = journal.begin(store, host(clock), KEYS, PLAN, RunKind.TEST, {"web": 7})
    written = StoredJournal(store, host(clock), KEYS, made.run, RunState())
    written.append(What.TAKEN)
    written.append(What.INTENDED, step="vm/web/start", machine="m-1")
    return written


def test_what_was_written_is_read_back(clock: FakeClock) -> None:
    store = MemoryStore()
    written = begun(store, clock)
    read = journal.read(store, KEYS, 1)
    assert read == written.state and read.steps["vm/web/start"].is_unknown
    outcome = Outcome(Result.DONE, "lone \ud800 surrogate", True, 1.5, "m-1", 7)
    written.append(What.SETTLED, step="vm/web/start", outcome=outcome)
    written.append(What.ENDED)
    read = journal.read(store, KEYS, 1)
    known = read.steps["vm/web/start"]
    assert known.outcome is not None and known.outcome.detail == "lone \\ud800 surrogate"
    assert (known.outcome.machine, known.outcome.point, known.machines) == ("m-1", 7, ["m-1"])
    assert read.ending is What.ENDED and not read.is_held(clock.now())
    header = journal.header(store, KEYS, 1)
    assert (header.kind, dict(header.points), header.document) == (RunKind.TEST, {"web": 7}, PLAN.text)
    with pytest.raises(UsageError):
        journal.header(store, KEYS, 2)


def test_a_gap_and_any_damage_are_found(clock: FakeClock) -> None:
    whole = MemoryStore()
    begun(whole, clock).append(What.ENDED)
    for number in (1, 2):
        store = MemoryStore()
        store._objects = dict(whole._objects)
        store.delete(KEYS.entry(1, number))
        with pytest.raises(IntegrityError, match="missing"):
            journal.read(store, KEYS, 1)
    for key in (KEYS.run(1), KEYS.entry(1, 2)):
        held = whole.get(key)
        for at in range(len(held)):
            store = MemoryStore()
            store._objects = dict(whole._objects)
            store.delete(key)
            store.create(key, held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :])
            with pytest.raises((IntegrityError, FormatVersionError)):
                journal.header(store, KEYS, 1)
                journal.read(store, KEYS, 1)
    swapped = MemoryStore()
    swapped._objects = dict(whole._objects)
    swapped._objects[KEYS.entry(1, 1)] = swapped._objects[KEYS.entry(1, 2)]
    with pytest.raises(IntegrityError, match="mixed up"):
        journal.read(swapped, KEYS, 1)


def test_a_run_is_held_until_its_term_is_over_or_it_was_let_go(clock: FakeClock) -> None:
    store = MemoryStore()
    first = begun(store, clock)
    with pytest.raises(LeaseHeldError, match="host-a is at work"):
        journal.take_over(store, host(clock, "host-b"), KEYS, 1, sole_on_host=True)
    with pytest.raises(LeaseHeldError):  # another process of the same machine may have it
        journal.take_over(store, host(clock), KEYS, 1, sole_on_host=False)
    clock.advance(journal.TERM.total_seconds())
    second = journal.take_over(store, host(clock, "host-b"), KEYS, 1, sole_on_host=True)
    assert second.state.steps["vm/web/start"].is_unknown
    with pytest.raises(LeaseLostError):
        first.append(What.ALIVE)
    second.append(What.STOPPED, detail="enough")
    third = journal.take_over(store, host(clock), KEYS, 1, sole_on_host=False)
    assert third.state.entries == 5


def test_of_two_that_take_it_at_the_same_moment_one_does(clock: FakeClock) -> None:
    store = MemoryStore()
    begun(store, clock).append(What.STOPPED)
    state = journal.read(store, KEYS, 1)
    one = StoredJournal(store, host(clock, "host-b"), KEYS, 1, state)
    other = StoredJournal(store, host(clock, "host-c"), KEYS, 1, journal.read(store, KEYS, 1))
    one.append(What.TAKEN)
    with pytest.raises(LeaseLostError):
        other.append(What.TAKEN)
    made = journal.begin(store, host(clock), KEYS, PLAN, RunKind.TEST, {})
    assert made.run == 2


def test_an_entry_of_which_nothing_was_heard_is_known_again(clock: FakeClock) -> None:
    inner = MemoryStore()
    begun(inner, clock)
    crashing = CrashingStore(inner, at=0, mode=CrashMode.APPLIED_ERROR)
    written = journal.take_over(inner, host(clock), KEYS, 1, sole_on_host=True)
    written._store = crashing
    with pytest.raises(Exception, match="answer was lost"):
        written.append(What.INTENDED, step="vm/db/start")
    written.append(What.STOPPED, detail="the store erred")  # its own entry is no other operator's
    read = journal.read(inner, KEYS, 1)
    assert read.steps["vm/db/start"].is_unknown and read.ending is What.STOPPED
