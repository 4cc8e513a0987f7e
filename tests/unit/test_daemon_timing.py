"""When things are due: turns, spread, missed turns, and the pauses after failures."""

from __future__ import annotations

import random

import pytest

from replica.daemon.agenda import Agenda
from replica.daemon.timing import SPREAD_SECONDS, first_due, missed_slots, next_slot, phase, retry_seconds

NOW = 1_790_000_000.0


def test_the_pauses_after_failures_are_those_of_site_recovery() -> None:
    minutes = [retry_seconds(failures) / 60 for failures in range(1, 10)]
    assert minutes == [1, 2, 4, 8, 10, 30, 30, 30, 30]


@pytest.mark.parametrize("period", [10.0, 300.0, 3600.0, 86400.0])
def test_a_turn_comes_once_in_each_period_and_is_kept(period: float) -> None:
    draw = random.Random(int(period))
    for _ in range(200):
        own = draw.random()
        slot = next_slot(NOW + draw.random() * period, period, own)
        following = next_slot(slot, period, own)
        assert following - slot == pytest.approx(period, abs=1e-5)
        just_before = next_slot(slot - 0.001, period, own)
        assert just_before == pytest.approx(slot, abs=1e-5)
        assert NOW < slot <= NOW + 2 * period


def test_ten_thousand_vms_do_not_start_in_the_same_second() -> None:
    per_second = [0] * 300
    for number in range(10_000):
        slot = next_slot(NOW, 300.0, phase(f"{number:032x}", "cycle"))
        assert NOW < slot <= NOW + 300
        per_second[int(slot - NOW - 1e-9) % 300] += 1
    assert max(per_second) < 80  # 33 on average
    assert min(per_second) > 8


def test_a_turn_is_the_same_on_every_machine_and_another_for_each_task() -> None:
    assert phase("a" * 32, "cycle") == phase("a" * 32, "cycle")
    assert phase("a" * 32, "cycle") != phase("a" * 32, "prune") != phase("b" * 32, "prune")


def test_turns_that_passed_are_counted() -> None:
    slot = next_slot(NOW, 60.0, 0.25)
    assert missed_slots(slot, slot + 59, 60.0, 0.25) == 0
    assert missed_slots(slot, slot + 60, 60.0, 0.25) == 1
    assert missed_slots(slot - 1, slot + 1, 60.0, 0.25) == 1
    assert missed_slots(slot, slot + 601, 60.0, 0.25) == 10


def test_what_is_overdue_comes_soon_and_spread_and_what_is_not_comes_at_its_turn() -> None:
    for number in range(200):
        own = phase(str(number), "cycle")
        slot = next_slot(NOW, 3600.0, own)
        assert first_due(NOW, slot - 3600.0, 3600.0, own) == slot
        for last in (None, NOW - 86400.0, NOW + 500.0):  # never, long ago, or by a clock that was wrong
            due = first_due(NOW, last, 3600.0, own)
            assert NOW <= due <= NOW + SPREAD_SECONDS
        assert NOW <= first_due(NOW, None, 10.0, own) <= NOW + 10


def test_an_agenda_gives_what_is_due_the_longest_and_each_once() -> None:
    agenda: Agenda[str] = Agenda()
    for number in range(1000):
        agenda.set("a", 5.0 + number)
        agenda.set("b", 3.0)
    agenda.set("c", 3.0)
    agenda.set("d", 1.0)
    agenda.drop("d")
    assert (len(agenda), agenda.next(), agenda.due("a"), agenda.due("d")) == (3, 3.0, 1004.0, None)
    assert agenda.take(2.9) is None
    assert [agenda.take(2000.0) for _ in range(4)] == ["b", "c", "a", None]
