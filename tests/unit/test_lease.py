"""The lease: one holder at a time, epochs that only grow, clocks that may jump, and hostile records."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from replica import lease, record
from replica.errors import (
    GodwitError,
    IntegrityError,
    LeaseHeldError,
    LeaseLostError,
    SourceError,
    StoreUnavailableError,
)
from replica.host import Host
from replica.keys import VmKeys
from replica.lease import RENEW_AFTER_SECONDS, TERM, Holder, LeaseRecord, acquire, holding
from replica.stores.memory import MemoryStore
from tests.support.engine import START, FakeClock, make_host
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore

KEYS = VmKeys("default", "0f" * 16)
FRESH = LeaseRecord(0, False, None, START, START, 0, 1, False)


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    made.create(KEYS.lease, lease.encode(FRESH))
    return made


def state(store: MemoryStore) -> LeaseRecord:
    return lease.read(store, KEYS)[0]


def hosts(*names: str) -> tuple[FakeClock, list[Host]]:
    clock = FakeClock()
    return clock, [make_host(name=name, clock=clock) for name in names]


def test_a_lease_reads_back_as_it_was_written() -> None:
    holder = Holder("a" * 32, "host\x1b", 17, "b" * 32)
    for made in (FRESH, LeaseRecord(3, True, holder, START, START + TERM, 12, 4, True)):
        assert lease.decode(lease.encode(made), key="k") == made


def test_taking_it_writes_a_new_epoch_holder_and_term(store: MemoryStore) -> None:
    _, (host,) = hosts("a")
    taken = acquire(store, KEYS, host, sole_on_host=False)
    found = state(store)
    assert (taken.epoch, found.epoch, found.held) == (1, 1, True)
    assert found.holder is not None
    assert (found.holder.host_id, found.holder.host_name) == (host.host_id, "a")
    assert (found.acquired_at, found.expires_at) == (START, START + TERM)
    assert not taken.was_held
    assert not taken.leftovers


def test_a_second_agent_waits_for_the_first(store: MemoryStore) -> None:
    clock, (first, second) = hosts("a", "b")
    held = acquire(store, KEYS, first, sole_on_host=True)
    for seconds in (0, 100, 199.9):
        clock.advance(seconds)
        with pytest.raises(LeaseHeldError) as caught:
            acquire(store, KEYS, second, sole_on_host=True)
        assert caught.value.exit_code == 11
        assert "a is at work" in str(caught.value)
    held.release(leftovers=False)
    taken = acquire(store, KEYS, second, sole_on_host=True)
    assert (taken.epoch, taken.was_held, taken.leftovers) == (2, False, False)


def test_the_epoch_never_goes_back(store: MemoryStore) -> None:
    clock, (first, second) = hosts("a", "b")
    epochs = []
    for round_ in range(10):
        taken = acquire(store, KEYS, (first, second)[round_ % 2], sole_on_host=False)
        epochs.append(taken.epoch)
        if round_ % 3:
            taken.release(leftovers=bool(round_ % 2))
        else:
            clock.advance(TERM.total_seconds())
        assert state(store).epoch == taken.epoch
    assert epochs == list(range(1, 11))


def test_a_term_that_ran_out_may_be_taken_over_and_the_first_holder_notices(store: MemoryStore) -> None:
    clock, (first, second) = hosts("a", "b")
    held = acquire(store, KEYS, first, sole_on_host=False)
    clock.advance(TERM.total_seconds())
    taken = acquire(store, KEYS, second, sole_on_host=False)
    assert (taken.epoch, taken.was_held, taken.leftovers) == (2, True, True)
    before = state(store)
    for act in (held.renew_if_due, lambda: held.release(leftovers=False), lambda: held.change_settings(9)):
        with pytest.raises(LeaseLostError) as caught:
            act()
        assert caught.value.exit_code == 11
        assert state(store) == before


def test_renewing_prolongs_the_term_but_not_at_every_call(store: MemoryStore) -> None:
    clock, (first, second) = hosts("a", "b")
    watched = RecordingStore(store)
    held = acquire(watched, KEYS, first, sole_on_host=False)
    watched.forget()
    for _ in range(100):
        clock.advance(RENEW_AFTER_SECONDS / 10)
        held.renew_if_due()
    assert len(watched.writes) == 10
    assert state(store).expires_at >= clock.now() + TERM - timedelta(seconds=RENEW_AFTER_SECONDS)
    with pytest.raises(LeaseHeldError):
        acquire(store, KEYS, second, sole_on_host=False)


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_clock_that_jumps_changes_who_may_try_but_never_two_holders(store: MemoryStore, jump: float) -> None:
    clock, (first, second) = hosts("a", "b")
    held = acquire(store, KEYS, first, sole_on_host=False)
    clock.jump(jump)
    if jump < 0:
        with pytest.raises(LeaseHeldError):
            acquire(store, KEYS, second, sole_on_host=False)
        held.release(leftovers=False)
        assert acquire(store, KEYS, second, sole_on_host=False).epoch == 2
    else:
        taken = acquire(store, KEYS, second, sole_on_host=False)
        assert (taken.epoch, taken.was_held) == (2, True)
        with pytest.raises(LeaseLostError):
            held.release(leftovers=False)


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_jump_of_the_wall_clock_alone_neither_renews_early_nor_stops_renewing(
    store: MemoryStore, jump: float
) -> None:
    clock, (host,) = hosts("a")
    held = acquire(store, KEYS, host, sole_on_host=False)
    clock.jump(jump)
    held.renew_if_due()
    assert state(store).expires_at == START + TERM
    clock.advance(RENEW_AFTER_SECONDS)
    held.renew_if_due()
    assert state(store).expires_at == clock.now() + TERM


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(store: MemoryStore) -> None:
    _, (host, other) = hosts("a", "b")
    acquire(store, KEYS, host, sole_on_host=True)
    with pytest.raises(LeaseHeldError):
        acquire(store, KEYS, host, sole_on_host=False)
    with pytest.raises(LeaseHeldError):
        acquire(store, KEYS, other, sole_on_host=True)
    taken = acquire(store, KEYS, host, sole_on_host=True)
    assert (taken.epoch, taken.was_held) == (2, True)


def test_a_race_for_the_lease_has_one_winner(store: MemoryStore) -> None:
    _, (first, second) = hosts("a", "b")

    class Overtaken(MemoryStore):
        def replace(self, key: str, data: Any, *, tag: str) -> str:
            acquire(store, KEYS, second, sole_on_host=False)
            return store.replace(key, data, tag=tag)

        def get_tagged(self, key: str) -> tuple[bytes, str]:
            return store.get_tagged(key)

    with pytest.raises(LeaseHeldError):
        acquire(Overtaken(), KEYS, first, sole_on_host=False)
    assert state(store).epoch == 1


def test_holding_releases_at_the_end(store: MemoryStore) -> None:
    _, (host,) = hosts("a")
    with holding(store, KEYS, host) as held:
        held.advance(7)
        assert state(store).held
    assert (state(store).held, state(store).point, state(store).leftovers) == (False, 7, False)


@pytest.mark.parametrize("error", [SourceError("x"), KeyboardInterrupt(), ValueError()])
def test_holding_releases_with_leftovers_noted_after_an_error(store: MemoryStore, error: BaseException) -> None:
    _, (host,) = hosts("a")
    with pytest.raises(type(error)), holding(store, KEYS, host):
        raise error
    assert (state(store).held, state(store).leftovers) == (False, True)
    assert acquire(store, KEYS, host, sole_on_host=False).leftovers


def test_leftovers_of_a_dead_cycle_survive_a_failure_after_it(store: MemoryStore) -> None:
    clock, (host,) = hosts("a")
    acquire(store, KEYS, host, sole_on_host=False)  # dies
    clock.advance(TERM.total_seconds())
    with pytest.raises(SourceError), holding(store, KEYS, host) as held:
        assert held.leftovers
        raise SourceError("x")
    assert state(store).leftovers


def test_a_lost_lease_is_not_released(store: MemoryStore) -> None:
    clock, (first, second) = hosts("a", "b")
    with pytest.raises(LeaseLostError), holding(store, KEYS, first) as held:
        clock.advance(TERM.total_seconds())
        acquire(store, KEYS, second, sole_on_host=False)
        held.renew_if_due()
    assert state(store).held
    assert state(store).epoch == 2


@pytest.mark.parametrize("fault", [FaultKind.ERROR, FaultKind.FULL, FaultKind.SLOW_DOWN])
def test_a_release_that_fails_hides_no_earlier_error(store: MemoryStore, fault: FaultKind) -> None:
    _, (host,) = hosts("a")
    faulty = FaultyStore(store, [Fault(fault, ("replace",), skip=1)])
    with pytest.raises(SourceError, match="first"), holding(faulty, KEYS, host):
        raise SourceError("the first error")
    assert state(store).held


def test_a_release_whose_answer_is_lost_is_an_error_and_a_release(store: MemoryStore) -> None:
    _, (host,) = hosts("a")
    faulty = FaultyStore(store, [Fault(FaultKind.APPLIED_ERROR, ("replace",), skip=1)])
    with pytest.raises(StoreUnavailableError), holding(faulty, KEYS, host):
        pass
    assert not state(store).held


def test_two_processes_of_one_machine_exclude_each_other(store: MemoryStore, tmp_path: Path) -> None:
    host = make_host(tmp_path)
    with (
        holding(store, KEYS, host),
        pytest.raises(LeaseHeldError, match="on this machine"),
        holding(store, KEYS, host),
    ):
        pytest.fail("two held it")
    with holding(store, KEYS, host) as again:
        assert again.epoch == 2


def test_without_a_state_folder_the_lease_alone_protects(store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "below"):
        with (
            holding(store, KEYS, make_host(folder)),
            pytest.raises(LeaseHeldError, match="at work on this VM"),
            holding(store, KEYS, make_host(folder)),
        ):
            pytest.fail("two held it")


def test_a_missing_lease_says_that_points_still_restore() -> None:
    with pytest.raises(IntegrityError, match="missing") as caught:
        lease.read(MemoryStore(), KEYS)
    assert "restored" in (caught.value.hint or "")


HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**32,
    2**64,
    10**400,
    1.5,
    "",
    "x",
    [],
    {},
    [{}],
    "9999-12-31T23:59:59-23:59",
)


def test_hostile_values_in_every_field_give_a_lease_or_an_integrity_error() -> None:
    holder = Holder("a" * 32, "host", 17, "b" * 32)
    good = json.loads(lease.encode(LeaseRecord(3, True, holder, START, START, 12, 4, True)))["body"]
    refused = 0

    def check(change: Callable[[Any], None]) -> None:
        nonlocal refused
        body = copy.deepcopy(good)
        change(body)
        try:
            lease.decode(record.encode(lease.KIND, body), key="the/lease")
        except GodwitError as error:
            assert isinstance(error, IntegrityError)
            assert error.key == "the/lease"
            refused += 1

    for name in good:
        check(lambda body, name=name: body.pop(name))  # type: ignore[misc]
        for value in HOSTILE:
            check(lambda body, name=name, value=value: body.update({name: value}))  # type: ignore[misc]
    assert refused > 75
    for name in good["holder"]:
        check(lambda body, name=name: body["holder"].pop(name))  # type: ignore[misc]


def test_a_state_that_is_neither_held_nor_released_is_damage() -> None:
    body = json.loads(lease.encode(FRESH))["body"]
    with pytest.raises(IntegrityError, match="state"):
        lease.decode(record.encode(lease.KIND, {**body, "state": "HELD"}), key="k")


def test_an_epoch_past_the_last_one_is_not_written(store: MemoryStore) -> None:
    _, tag = store.get_tagged(KEYS.lease)
    store.replace(KEYS.lease, lease.encode(replace(FRESH, epoch=2**32 - 1)), tag=tag)
    _, (host,) = hosts("a")
    with pytest.raises(GodwitError):
        acquire(store, KEYS, host, sole_on_host=False)
    assert state(store).epoch == 2**32 - 1
