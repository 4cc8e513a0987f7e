"""The drill of a plan: a test run of it in which every VM is checked, and removed again; told in one signed document.

Nobody goes on with one that was cut off: what it left is known to its VMs, and the next drill on this host removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from replica import record
from replica.drills import evidence, recording
from replica.drills.checks import Terms
from replica.drills.drill import Drill, Trial, trying
from replica.drills.evidence import Written
from replica.failover.failover import Order
from replica.plans import graph
from replica.plans.deeds import RealDeeds
from replica.plans.engine import Engine, Ran
from replica.plans.graph import Step, StepKind
from replica.plans.journal import MemoryJournal, Outcome, Result, RunState
from replica.plans.model import Plan, PlannedVm, RunKind
from replica.plans.running import Operator, prepared_for
from replica.signing import SigningKey, host_key
from vhdx.progress import Progress

Begin = Callable[[], Trial]


@dataclass(frozen=True, slots=True)
class GroupTime:
    """How long after the command all VMs of a group had answered; None where one did not."""

    name: str
    rto_seconds: float | None
    spread_seconds: float | None


@dataclass(frozen=True, slots=True)
class PlanDrill:
    """What a drill of a plan saw. ``drills`` are those of the VMs that were tried, in the order of the plan."""

    begun_at: datetime
    ended_at: datetime
    reasons: tuple[str, ...]
    drills: Mapping[str, Drill]
    groups: tuple[GroupTime, ...]
    steps: tuple[Step, ...]
    state: RunState
    rto_seconds: float | None

    @property
    def passed(self) -> bool:
        """Whether every VM of the plan passed, its cleanup included, and every step was done."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Recorded:
    """A drill with its evidence. ``unrecorded``: VMs whose record in the store is missing, and why."""

    drill: PlanDrill
    written: Written
    unrecorded: Mapping[str, str]


def drill(operator: Operator, plan: Plan, terms: Terms, folder: Path | None = None) -> Recorded:
    """Make a drill of a plan, write its evidence, and record it with every VM that was tried.

    Raises UsageError, LeaseHeldError, ConfigurationError where it cannot be begun, and GodwitError where the evidence
    cannot be written.
    """
    key: SigningKey = host_key(operator.host.state_folder)
    chosen = recording.folder_of(operator.host, terms, folder)
    evidence.prepare(chosen)
    made = run(operator, plan, terms)
    body = body_of(operator, plan, made)
    pictures = {name: one.picture for name, one in made.drills.items() if one.picture is not None}
    written: Written | None = None
    try:
        written = evidence.write_plan(chosen, operator.host, plan.name, body, pictures, key)
    finally:
        unrecorded = {}
        for name, one in made.drills.items():
            means = operator.means_of(name)
            _, why = recording.try_to_record(means, recording.event_of(one, written))
            if why is not None:
                unrecorded[name] = why
    return Recorded(made, written, unrecorded)


def run(operator: Operator, plan: Plan, terms: Terms) -> PlanDrill:
    """Make a drill of a plan, and clean up behind it, interrupted or not. Raises as ``drill``."""
    clock = operator.host.clock
    begun_at, begun = clock.now(), clock.monotonic()
    steps = graph.steps(plan, RunKind.TEST, checks=True)
    journal = MemoryJournal(operator.host)
    with ExitStack() as stack:
        prepared = prepared_for(operator, plan, RunKind.TEST)
        ready: dict[str, Begin] = {}
        for vm in plan.vms:
            order = Order(None, prepared.fixed.get(vm.name), vm.platform, vm.generation)
            ready[vm.name] = stack.enter_context(trying(operator.means_of(vm.name), order, _terms_of(vm, terms)))
        deeds = DrillDeeds(
            plan,
            RunKind.TEST,
            0,
            prepared.fixed,
            operator.means_of,
            operator.ask,
            operator.bring_of,
            journal.state,
            ready=ready,
        )
        ran: Ran | None = None
        try:
            ran = Engine(steps, journal, deeds, operator.host, operator.watch).run()
        finally:
            for name, started in reversed(list(deeds.trials.items())):
                if name not in deeds.looked_at and not started.reasons:
                    started.reasons.append("its checks were not made")
                started.clean_up()
    drills = {vm.name: deeds.trials[vm.name].drill() for vm in plan.vms if vm.name in deeds.trials}
    answers = {name: one.answered_at - begun for name, one in deeds.trials.items() if one.answered_at is not None}
    groups = tuple(
        GroupTime(
            group.name,
            _last([answers.get(vm.name) for vm in group.vms]),
            next((one.seconds for one in prepared.spreads if one.group == group.name), None),
        )
        for group in plan.groups
    )
    assert ran is not None
    return PlanDrill(
        begun_at,
        clock.now(),
        _reasons(plan, steps, journal.state, drills, ran),
        drills,
        groups,
        steps,
        journal.state,
        _last([answers.get(vm.name) for vm in plan.vms]),
    )


@dataclass(slots=True)
class DrillDeeds(RealDeeds):
    """The deeds of a drill: machines are started as trials, and looked at."""

    ready: Mapping[str, Begin] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    looked_at: set[str] = field(default_factory=set)

    def machine_for(self, step: Step, state: object) -> str | None:
        """Return none: a trial names its own, and keeps a note of it."""
        return None

    def do(self, step: Step, machine: str | None, progress: Progress) -> Outcome:
        """Do a step. Raises GodwitError, ConversionError, DiskError."""
        if step.kind is StepKind.START:
            return self._try(step.vm)
        if step.kind is StepKind.CHECK:
            trial = self.trials[step.vm]
            before = len(trial.reasons)
            trial.look()
            self.looked_at.add(step.vm)
            wrong = trial.reasons[before:]
            return Outcome(Result.FAILED if wrong else Result.DONE, "; ".join(wrong) or "all checks passed")
        # Named in full: a class with slots is made anew by its decorator, and super() would mean the first.
        return RealDeeds.do(self, step, machine, progress)

    def _try(self, vm: str) -> Outcome:
        trial = self.ready[vm]()
        self.trials[vm] = trial
        started = trial.start()
        made = trial.machine
        point = None if made is None else made.point
        name = None if made is None else made.name
        if not started:
            return Outcome(Result.FAILED, "; ".join(trial.reasons), machine=name, point=point)
        return Outcome(Result.DONE, f"{name} from point {point}", machine=name, point=point)


def _terms_of(vm: PlannedVm, terms: Terms) -> Terms:
    return replace(
        terms,
        checks=vm.checks or terms.checks,
        platform=vm.platform or terms.platform,
        generation=vm.generation or terms.generation,
    )


def _last(answers: list[float | None]) -> float | None:
    known = [one for one in answers if one is not None]
    return round(max(known), 3) if known and len(known) == len(answers) else None


def _reasons(
    plan: Plan, steps: tuple[Step, ...], state: RunState, drills: Mapping[str, Drill], ran: Ran
) -> tuple[str, ...]:
    found = []
    for vm in plan.vms:
        made = drills.get(vm.name)
        if made is None:
            found.append(f"{vm.name}: it was not tried")
        elif not made.passed:
            found += [f"{vm.name}: {one}" for one in made.reasons]
    for step in steps:
        known = state.steps.get(step.id)
        outcome = None if known is None else known.outcome
        if step.kind is StepKind.ACTION and (outcome is None or outcome.result is not Result.DONE):
            found.append(f"{step.id}: {'it was not done' if outcome is None else outcome.detail}")
    if ran.interrupted:
        found.append("it was interrupted")
    return tuple(found)


def body_of(operator: Operator, plan: Plan, made: PlanDrill) -> dict[str, Any]:
    """Return what the document says, but for the files beside it."""
    return {
        "plan": {
            "name": plan.name,
            "sha256": plan.sha256,
            "document": plan.text,
            "vms": [one.name for one in plan.vms],
        },
        "host": {"name": operator.host.host_name, "id": operator.host.host_id},
        "store": operator.store.url,
        "made_by": evidence.made_by(),
        "verdict": "passed" if made.passed else "failed",
        "reasons": list(made.reasons),
        "begun_at": record.time_text(made.begun_at),
        "ended_at": record.time_text(made.ended_at),
        "rto_seconds": made.rto_seconds,
        "groups": [
            {"name": one.name, "rto_seconds": one.rto_seconds, "spread_seconds": one.spread_seconds}
            for one in made.groups
        ],
        "steps": [_step(one, made.state) for one in made.steps],
        "vms": [evidence.body_of(operator.means_of(name), one) for name, one in made.drills.items()],
        "cleaned": all(one.cleaned for one in made.drills.values()),
    }


def _step(step: Step, state: RunState) -> dict[str, Any]:
    known = state.steps.get(step.id)
    outcome = None if known is None else known.outcome
    return {
        "id": step.id,
        "title": step.title,
        "result": "not done" if outcome is None else outcome.result.value,
        "detail": "" if outcome is None else outcome.detail,
        "seconds": 0.0 if outcome is None else round(outcome.seconds, 3),
    }
