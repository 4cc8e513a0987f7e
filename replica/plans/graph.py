"""The steps of a run and what each waits for: pure functions of the plan and of what it is run for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from replica.plans.document import Mistake
from replica.plans.model import Action, ActionKind, Group, OnFailure, Plan, PlannedVm, RunKind


class StepKind(StrEnum):
    """What a step does."""

    STOP = "stop"  # the source is shut down
    START = "start"
    HOME = "home"  # brought home
    CHECK = "check"  # looked at, in a drill
    ACTION = "action"


@dataclass(frozen=True, slots=True)
class Step:
    """One step. It waits until all of ``follows`` are settled, and is left out unless all of ``needs`` went well."""

    id: str
    kind: StepKind
    title: str
    group: str = ""
    vm: str = ""  # whose machine it is about
    action: Action | None = None
    needs: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    on_failure: OnFailure = OnFailure.STOP
    timeout_seconds: float = 0.0
    at_once: int = 0  # how many of its group may be under way, itself included; 0: as many as like

    @property
    def repeatable(self) -> bool:
        """Whether it can be done again without asking, where nobody knows whether it was done."""
        return self.action is None or self.action.repeatable


def mistakes(plan: Plan) -> list[Mistake]:
    """Return what keeps the plan from being put in order: VMs that are unknown, circles, guests that do not run yet."""
    found = _unknown(plan)
    found += _circles(plan)
    if not found:
        for kind in RunKind:
            found += _not_running(plan, kind)
    found.sort(key=lambda one: (one.place.line, one.place.column))
    return list(dict.fromkeys(found))


def steps(plan: Plan, kind: RunKind, *, checks: bool = False) -> tuple[Step, ...]:
    """Return the steps of a run of that kind, each after all that it waits for; always in the same order.

    ``checks``: each VM is looked at last, as drills do. The plan has none of ``mistakes``.
    """
    return _Steps(plan, kind, checks=checks).all()


def order(plan: Plan, group: Group) -> tuple[PlannedVm, ...]:
    """Return the VMs of a group, each after those that it depends on, else as they are written."""
    left = list(group.vms)
    names = {one.name for one in left}
    done: set[str] = set()
    ordered: list[PlannedVm] = []
    while left:
        ready = next(
            (one for one in left if all(name in done or name not in names for name, _ in one.depends_on)), None
        )
        chosen = ready or left[0]  # in a circle: it is told elsewhere
        left.remove(chosen)
        done.add(chosen.name)
        ordered.append(chosen)
    return tuple(ordered)


def _unknown(plan: Plan) -> list[Mistake]:
    known = {one.name for one in plan.vms}
    found = [
        Mistake(place, f"{vm.name} depends on {name!r:.100}, which is not in the plan")
        for vm in plan.vms
        for name, place in vm.depends_on
        if name not in known
    ]
    actions = [*plan.before, *plan.after, *(one for group in plan.groups for one in (*group.before, *group.after))]
    found += [
        Mistake(one.place, f"the action is about {one.vm!r:.100}, which is not in the plan")
        for one in actions
        if one.vm and one.vm not in known
    ]
    return found


def _circles(plan: Plan) -> list[Mistake]:
    """Name VMs that depend on one another, or on one of a later group."""
    number = {vm.name: index for index, group in enumerate(plan.groups) for vm in group.vms}
    found = []
    for vm in plan.vms:
        for name, place in vm.depends_on:
            if name in number and number[name] > number[vm.name]:
                later = plan.groups[number[name]].name
                found.append(
                    Mistake(place, f"{vm.name} depends on {name}, which is only started later, with the group {later}")
                )
    for group in plan.groups:
        circle = _circle({vm.name: [name for name, _ in vm.depends_on] for vm in group.vms})
        if circle:
            place = plan.vm(circle[0]).place
            found.append(Mistake(place, f"these depend on one another: {' → '.join((*circle, circle[0]))}"))
    return found


def _circle(needs: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Return one circle, from the name that is written first; nothing where there is none."""
    settled: set[str] = set()
    for first in needs:
        path: list[str] = []
        ways = [iter((first,))]
        while ways:
            name = next(ways[-1], None)
            if name is None:
                ways.pop()
                if path:
                    settled.add(path.pop())
            elif name in path:
                circle = path[path.index(name) :]
                begins = min(range(len(circle)), key=lambda at: list(needs).index(circle[at]))
                return (*circle[begins:], *circle[:begins])
            elif name in needs and name not in settled:
                path.append(name)
                ways.append(iter(needs[name]))
    return ()


def _not_running(plan: Plan, kind: RunKind) -> list[Mistake]:
    """Name actions in guests of machines that do not run when the action comes."""
    made = {one.id: one for one in steps(plan, kind)}
    goes_home = kind is RunKind.FAILBACK
    found = []
    for one in made.values():
        if one.action is None or not one.action.kind.is_of_guest:
            continue
        turn = f"vm/{one.vm}/{StepKind.HOME if goes_home else StepKind.START}"
        if one.id.startswith("vm/"):  # its own: before or after its turn
            runs = one.id.startswith(f"vm/{one.vm}/before/") == goes_home
        else:
            runs = one.id in above(made, turn) if goes_home else turn in above(made, one.id)
        if not runs:
            when = f"in a run for {kind.value}" if goes_home else "at that time"
            found.append(Mistake(one.action.place, f"the machine of {one.vm} does not run {when}: {one.action.name}"))
    return found


def above(made: Mapping[str, Step], step_id: str) -> frozenset[str]:
    """Return all that come before a step."""
    seen: set[str] = set()
    left = [step_id]
    while left:
        one = made[left.pop()]
        new = {*one.needs, *one.follows} - seen
        seen |= new
        left += new
    return frozenset(seen)


class _Steps:
    """Steps being put together. ``_last`` is what whatever comes next waits for."""

    def __init__(self, plan: Plan, kind: RunKind, *, checks: bool) -> None:
        self._plan = plan
        self._kind = kind
        self._checks = checks
        self._made: list[Step] = []
        self._last: tuple[str, ...] = ()
        self._ends: dict[str, str] = {}  # the last step of each VM so far
        self._dependents: dict[str, list[str]] = {one.name: [] for one in plan.vms}
        for vm in plan.vms:
            for name, _ in vm.depends_on:
                self._dependents[name].append(vm.name)

    def all(self) -> tuple[Step, ...]:
        plan = self._plan
        backwards = self._kind is RunKind.FAILBACK
        self._chain(plan.before, "plan/before", "")
        if self._kind is RunKind.PLANNED:
            for group in reversed(plan.groups):
                self._vms(group, self._stop, backwards=True)
            self._ends.clear()
        for group in reversed(plan.groups) if backwards else plan.groups:
            self._chain(group.before, f"group/{group.name}/before", group.name)
            self._vms(group, self._home if backwards else self._start, backwards=backwards)
            self._chain(group.after, f"group/{group.name}/after", group.name)
        self._chain(plan.after, "plan/after", "")
        return tuple(self._made)

    def _chain(self, actions: Iterable[Action], prefix: str, group: str) -> None:
        """Add actions one after the other; each begins once the one before is settled, however it went."""
        for number, action in enumerate(actions, start=1):
            if self._kind in action.runs:
                self._made.append(_action_step(f"{prefix}/{number}", action, group, action.vm, follows=self._last))
                self._last = (self._made[-1].id,)

    def _vms(self, group: Group, add: Callable[[PlannedVm, Group, tuple[str, ...]], str], *, backwards: bool) -> None:
        ends: list[str] = []
        ordered = order(self._plan, group)
        for vm in reversed(ordered) if backwards else ordered:
            waits = self._dependents[vm.name] if backwards else [name for name, _ in vm.depends_on]
            needs = tuple(self._ends[name] for name in dict.fromkeys(waits) if name in self._ends)
            self._ends[vm.name] = add(vm, group, needs)
            ends.append(self._ends[vm.name])
        self._last = tuple(ends) or self._last

    def _stop(self, vm: PlannedVm, group: Group, needs: tuple[str, ...]) -> str:
        self._made.append(
            Step(
                f"vm/{vm.name}/stop",
                StepKind.STOP,
                f"shut {vm.name} down at its source",
                group.name,
                vm.name,
                needs=needs,
                follows=self._last,
                on_failure=vm.on_failure,
                timeout_seconds=vm.timeout_seconds,
                at_once=group.at_once,
            )
        )
        return self._made[-1].id

    def _start(self, vm: PlannedVm, group: Group, needs: tuple[str, ...]) -> str:
        shut = (f"vm/{vm.name}/{StepKind.STOP}",) if self._kind is RunKind.PLANNED else ()
        return self._around(vm, group, (*shut, *needs), StepKind.START, f"start {vm.name}")

    def _home(self, vm: PlannedVm, group: Group, needs: tuple[str, ...]) -> str:
        return self._around(vm, group, needs, StepKind.HOME, f"bring {vm.name} home")

    def _around(self, vm: PlannedVm, group: Group, needs: tuple[str, ...], kind: StepKind, title: str) -> str:
        """Add the step that matters for a VM, with its actions before and after; return the last one's id."""
        last: tuple[str, ...] = ()
        parts: list[tuple[str, Action | None]] = [
            *((f"before/{number}", one) for number, one in enumerate(vm.before, start=1)),
            (kind.value, None),
            *((f"after/{number}", one) for number, one in enumerate(vm.after, start=1)),
        ]
        for name, action in parts:
            if action is not None and self._kind not in action.runs:
                continue
            step_id = f"vm/{vm.name}/{name}"
            waits = last or needs
            if action is not None:
                made = _action_step(step_id, action, group.name, vm.name, needs=waits, follows=self._last)
                made = replace(made, at_once=group.at_once)
            else:
                made = Step(
                    step_id,
                    kind,
                    title,
                    group.name,
                    vm.name,
                    needs=waits,
                    follows=self._last,
                    on_failure=vm.on_failure,
                    timeout_seconds=vm.timeout_seconds,
                    at_once=group.at_once,
                )
            self._made.append(made)
            last = (step_id,)
        if self._checks:  # what fails here keeps no other VM from being tried
            name = f"vm/{vm.name}/{StepKind.CHECK}"
            title = f"check {vm.name}"
            seconds = vm.timeout_seconds
            self._made.append(
                Step(
                    name,
                    StepKind.CHECK,
                    title,
                    group.name,
                    vm.name,
                    needs=last,
                    follows=self._last,
                    on_failure=OnFailure.CONTINUE,
                    timeout_seconds=seconds,
                    at_once=group.at_once,
                )
            )
            last = (name,)
        return last[0]


def _action_step(
    step_id: str,
    action: Action,
    group: str,
    vm: str,
    *,
    needs: tuple[str, ...] = (),
    follows: tuple[str, ...] = (),
) -> Step:
    about = f"{action.name} ({vm})" if vm else action.name
    return Step(
        step_id,
        StepKind.ACTION,
        f"ask: {action.name}" if action.kind is ActionKind.CONFIRM else about,
        group,
        vm,
        action,
        needs,
        follows,
        action.on_failure,
        action.timeout_seconds,
    )
