"""A plan beside the store: which VMs there are, how they stand, what they would start from, and all that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from conversion.errors import ConversionError
from replica import catalog
from replica.errors import GodwitError
from replica.failover import failover as failing_over
from replica.failover import transitions
from replica.failover.failover import DEFAULT_PLATFORM, Order
from replica.failover.means import Means
from replica.failover.transitions import Command
from replica.model import FailoverKind, Standing
from replica.plans.model import Plan, PlannedVm, Policy, RunKind
from replica.plans.networks import TAKING, mapped
from replica.plans.points import Choice, MeansOf, Prepared, prepare
from vhdx.errors import DiskError

_COMMANDS = {
    RunKind.TEST: Command.TEST,
    RunKind.PLANNED: Command.FAILOVER,
    RunKind.UNPLANNED: Command.FAILOVER,
    RunKind.FAILBACK: Command.FAILBACK,
}


@dataclass(frozen=True, slots=True)
class VmSurvey:
    """One VM. ``problems`` keep it from being run for that purpose."""

    vm: str
    standing: Standing | None = None
    point: int | None = None
    created_at: datetime | None = None
    platform: str | None = None
    generation: Literal[1, 2] | None = None
    converted_disk: int | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Survey:
    """A plan beside the store."""

    kind: RunKind
    vms: tuple[VmSurvey, ...]
    prepared: Prepared

    @property
    def problems(self) -> tuple[str, ...]:
        """All that keeps the plan from being run."""
        of_vms = (f"{one.vm}: {text}" for one in self.vms for text in one.problems)
        return tuple(dict.fromkeys((*of_vms, *self.prepared.problems)))


def survey(plan: Plan, kind: RunKind, means_of: MeansOf, now: datetime, *, thoroughly: bool = True) -> Survey:
    """Look at a plan beside the store; nothing is written. ``thoroughly``: points are verified, conversions planned."""
    known = {vm.name: _look(vm, kind, means_of) for vm in plan.vms}
    present = {name for name, one in known.items() if one.standing is not None}
    if kind is RunKind.FAILBACK:
        return Survey(kind, tuple(known.values()), Prepared({}))
    groups = tuple(group for group in plan.groups if all(one.name in present for one in group.vms))
    partly = [one for group in plan.groups if group not in groups for one in group.vms if one.name in present]
    prepared = prepare(Plan(plan.name, groups), means_of, now)
    if kind is RunKind.PLANNED:  # it takes the points that it makes: neither their age nor their policy matters
        prepared = Prepared(prepared.choices)
    surveyed = [
        _look_further(vm, kind, known[vm.name], prepared.choices.get(vm.name), means_of)
        if thoroughly and vm.name in present and vm not in partly
        else _with_point(known[vm.name], prepared.choices.get(vm.name))
        for vm in plan.vms
    ]
    return Survey(kind, tuple(surveyed), prepared)


def _look(vm: PlannedVm, kind: RunKind, means_of: MeansOf) -> VmSurvey:
    try:
        means = means_of(vm.name)
        state = catalog.settings_in_force(means.store, means.found).state
    except GodwitError as error:
        return VmSurvey(vm.name, problems=(str(error),))
    problems = []
    try:
        transitions.require(vm.name, state, _COMMANDS[kind])
    except GodwitError as error:
        problems.append(f"{error}; {error.hint}" if error.hint else str(error))
    return VmSurvey(vm.name, state.standing, problems=tuple(problems))


def _with_point(one: VmSurvey, choice: Choice | None) -> VmSurvey:
    if choice is None:
        return one
    point = choice.point
    return VmSurvey(one.vm, one.standing, point.point, point.created_at, problems=one.problems, notes=one.notes)


def _look_further(vm: PlannedVm, kind: RunKind, one: VmSurvey, choice: Choice | None, means_of: MeansOf) -> VmSurvey:
    if choice is None and vm.point.policy is not Policy.NEWEST_VERIFIED:
        return one
    means: Means = means_of(vm.name)
    number = choice.point.point if choice is not None and choice.is_fixed else None
    platform = vm.platform or DEFAULT_PLATFORM
    problems = list(one.problems)
    notes = list(one.notes)
    try:
        if not means.offer(platform).starts:
            notes.append(f"platform {platform} starts no machine: its disks are laid ready")
        if vm.networks and platform not in TAKING:
            notes.append(f"networks: platform {platform} knows one network at most, and is told of no other")
        # As a test: what is asked of point, platform, generation and conversion is the same, in every standing.
        looked = failing_over.plan(means, Order(FailoverKind.TEST, number, platform, vm.generation))
        if kind in (RunKind.PLANNED, RunKind.UNPLANNED):  # what is not asked of a test: the networks that it is to have
            order = Order(FailoverKind(kind.value), number, platform, vm.generation)
            failing_over.check_machine(mapped(means, dict(vm.networks)), order, looked.point, looked.generation)
    except (GodwitError, ConversionError, DiskError) as error:
        hint = getattr(error, "hint", None)
        problems.append(f"{error}; {hint}" if hint else str(error))
        return VmSurvey(
            vm.name,
            one.standing,
            None if choice is None else choice.point.point,
            None if choice is None else choice.point.created_at,
            platform,
            problems=tuple(problems),
            notes=tuple(notes),
        )
    notes += [f"point {passed.point} is passed over: {passed.because}" for passed in looked.passed_over[:3]]
    return VmSurvey(
        vm.name,
        one.standing,
        looked.point.point,
        looked.point.created_at,
        platform,
        looked.generation,
        looked.converted_disk,
        tuple(problems),
        tuple(notes),
    )
