"""The order of steps: whatever plans say, nothing comes before what it waits for, and circles are named."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from replica.plans import description, graph
from replica.plans.document import Place
from replica.plans.graph import StepKind
from replica.plans.model import Action, ActionKind, Group, Plan, PlannedVm, RunKind
from tests.support.plans import plan_of

NOWHERE = Place(1, 1)
ALL = frozenset(RunKind)


@st.composite
def plans(draw: st.DrawFn, *, circles: bool = False) -> Plan:
    """Draw a plan whose VMs depend on some that are written before them, or with ``circles`` on any of their group."""
    groups: list[Group] = []
    known: list[str] = []
    for number in range(draw(st.integers(1, 3))):
        names = [f"vm{number}-{one}" for one in range(draw(st.integers(1, 4)))]
        vms = []
        for at, name in enumerate(names):
            others = names if circles else [*known, *names[:at]]
            needs = draw(st.lists(st.sampled_from(others), max_size=3, unique=True)) if others else []
            actions = tuple(
                Action(ActionKind.HOST, "x", NOWHERE, ("x",), runs=ALL) for _ in range(draw(st.integers(0, 2)))
            )
            vms.append(PlannedVm(name, NOWHERE, tuple((one, NOWHERE) for one in needs), before=actions, after=actions))
        shuffled = draw(st.permutations(vms))
        groups.append(Group(f"g{number}", NOWHERE, tuple(shuffled), after=vms[0].before))
        known += names
    return Plan("p", tuple(groups))


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from(RunKind))
def test_steps_come_after_all_that_they_wait_for(plan: Plan, kind: RunKind) -> None:
    assert graph.mistakes(plan) == []
    made = graph.steps(plan, kind)
    assert made == graph.steps(plan, kind)
    at = {one.id: number for number, one in enumerate(made)}
    assert len(at) == len(made)
    for one in made:
        assert all(at[name] < at[one.id] for name in (*one.needs, *one.follows))
    known = {one.id: one for one in made}
    turn = StepKind.HOME if kind is RunKind.FAILBACK else StepKind.START
    group_of = {vm.name: number for number, group in enumerate(plan.groups) for vm in group.vms}
    names = [vm.name for vm in plan.vms]
    needs = {vm.name: {name for name, _ in vm.depends_on} for vm in plan.vms}
    for first in names:
        above = graph.above(known, f"vm/{first}/{turn}")
        for second in names:
            before = second in needs[first] or group_of[second] < group_of[first]
            after = first in needs[second] or group_of[first] < group_of[second]
            if after if kind is RunKind.FAILBACK else before:
                assert f"vm/{second}/{turn}" in above
        if kind is RunKind.PLANNED:
            assert {f"vm/{name}/stop" for name in names} <= above
    turns = description.waves(made)
    assert max(turns.values()) <= len(made) and min(turns.values()) == 1


@settings(max_examples=60, deadline=None)
@given(plans(circles=True))
def test_circles_are_found_where_there_are_any(plan: Plan) -> None:
    def is_circular(group: Group) -> bool:
        left = {vm.name: {name for name, _ in vm.depends_on} for vm in group.vms}
        while True:
            free = [name for name, needs in left.items() if not needs & left.keys()]
            if not free:
                return bool(left)
            for name in free:
                del left[name]

    found = graph.mistakes(plan)
    assert bool(found) == any(map(is_circular, plan.groups))
    for one in found:
        circle = one.text.partition(": ")[2].split(" → ")
        needs = {vm.name: {name for name, _ in vm.depends_on} for vm in plan.vms}
        assert circle[0] == circle[-1]
        assert all(later in needs[name] for name, later in pairwise(circle))


def test_a_thousand_vms_are_put_in_order_at_once() -> None:
    vms = "\n".join(f"      - {{vm: v{n}, depends_on: [v{max(0, n - 7)}]}}" if n else "      - v0" for n in range(500))
    more = "\n".join(f"      - w{n}" for n in range(500))
    plan = plan_of(f"plan: big\ngroups:\n  - group: a\n    vms:\n{vms}\n  - group: b\n    vms:\n{more}\n")
    assert len(graph.steps(plan, RunKind.PLANNED)) == 2000
