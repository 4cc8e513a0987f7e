"""Which points VMs start from: policies, ages, and a group at one time as nearly as its points allow."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.plans.document import Place
from replica.plans.model import Group, Plan, PlannedVm, PointPolicy, Policy
from replica.plans.points import Prepared, prepare, together
from tests.support.plans import Estate, make_estate

NOWHERE = Place(1, 1)
ZERO = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    """Two VMs of three points each, made at 0, 20, 40 s and 10, 30, 50 s."""
    return make_estate(tmp_path_factory.mktemp("estate"), ("db", "web"), points=3)


def prepared(estate: Estate, *vms: PlannedVm, within: float | None = None) -> Prepared:
    plan = Plan("p", (Group("g", NOWHERE, vms, within_seconds=within),))
    return prepare(plan, estate.means, estate.clock.now())


def vm(name: str, policy: PointPolicy | None = None, **more: object) -> PlannedVm:
    return replace(PlannedVm(name, NOWHERE, point=policy or PointPolicy()), **more)  # type: ignore[arg-type]


def spoil(estate: Estate, name: str, point: int) -> None:
    """Take a segment away that the point needs."""
    prefix = f"{estate.found(name).keys.segments}{point:020}/"
    for info in list(estate.store.list(prefix)):
        estate.store.delete(info.key)


def test_policies(estate: Estate) -> None:
    start = estate.clock.now() - timedelta(seconds=60)
    cases = {
        PointPolicy(): (3, False),
        PointPolicy(Policy.NEWEST): (3, True),
        PointPolicy(Policy.NUMBER, number=2): (2, True),
        PointPolicy(Policy.APPLICATION): (3, True),  # of files at rest: consistent as can be
        PointPolicy(Policy.AT_OR_BEFORE, start + timedelta(seconds=39)): (2, True),
        PointPolicy(Policy.AT_OR_BEFORE, start): (1, True),
    }
    for policy, (number, fixed) in cases.items():
        choice = prepared(estate, vm("db", policy)).choices["db"]
        assert (choice.point.point, choice.is_fixed) == (number, fixed), policy


def test_what_is_not_there_is_told_of_every_vm(estate: Estate) -> None:
    early = PointPolicy(Policy.AT_OR_BEFORE, ZERO)
    found = prepared(estate, vm("db", early), vm("web", PointPolicy(Policy.NUMBER, number=9)))
    assert len(found.problems) == 2
    assert "db has no such point" in found.problems[0] and "there is no recovery point 9" in found.problems[1]


def test_a_damaged_point_is_passed_over_or_stands_against_it(estate: Estate) -> None:
    spoiled = estate.copy()
    spoil(spoiled, "db", 3)
    at = PointPolicy(Policy.AT_OR_BEFORE, estate.clock.now())
    assert prepared(spoiled, vm("db", at)).fixed == {"db": 2}
    assert "does not restore" in prepared(spoiled, vm("db", PointPolicy(Policy.NEWEST))).problems[0]


def test_a_point_that_is_too_old_is_refused_or_asked_about(estate: Estate) -> None:
    old = vm("db", max_point_age_seconds=15.0)
    assert "is 20 s old, and may be 15 s" in prepared(estate, old).problems[0]
    asked = prepared(estate, replace(old, on_old_point="ask"))
    assert asked.problems == () and "point 3 of db is 20 s old" in asked.questions[0]
    assert prepared(estate, vm("db", max_point_age_seconds=20.0)).problems == ()


def test_a_group_takes_points_that_lie_near_one_another(estate: Estate) -> None:
    near = prepared(estate, vm("db"), vm("web"), within=10)
    assert near.fixed == {"db": 3, "web": 3}
    assert [one.seconds for one in near.spreads] == [10.0]
    apart = prepared(estate, vm("db"), vm("web"), within=5)
    assert "no points that lie within 5 s of one another; the nearest lie 10 s apart" in apart.problems[0]
    spoiled = estate.copy()
    spoil(spoiled, "web", 3)
    back = prepared(spoiled, vm("db"), vm("web"), within=10)
    assert back.fixed == {"db": 3, "web": 2}
    number = prepared(estate, vm("db", PointPolicy(Policy.NUMBER, number=1)), vm("web"), within=10)
    assert number.fixed == {"db": 1, "web": 1}


def brute(series: list[list[int]], within: int) -> int | None:
    fits = [chosen for chosen in itertools.product(*series) if max(chosen) - min(chosen) <= within]
    return max((max(chosen) for chosen in fits), default=None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), min_size=1, max_size=4),
    st.integers(0, 8),
)
def test_together_finds_the_newest_time_that_there_is(series: list[list[int]], within: int) -> None:
    ordered = [sorted(one, reverse=True) for one in series]
    times = [[ZERO + timedelta(seconds=second) for second in one] for one in ordered]
    positions, spread = together([iter(one) for one in times], timedelta(seconds=within))
    wanted = brute(ordered, within)
    if wanted is None:
        assert positions is None
        return
    assert positions is not None and spread is not None
    chosen = [one[at] for one, at in zip(ordered, positions, strict=True)]
    assert max(chosen) == wanted
    assert max(chosen) - min(chosen) == spread.total_seconds() <= within
    for one, taken in zip(ordered, chosen, strict=True):  # and of each the newest up to that time
        assert taken == max(second for second in one if second <= wanted)


def test_series_that_end_without_an_answer_are_told_apart(tmp_path: Path) -> None:
    assert together([iter(())], timedelta(1)) == (None, None)
