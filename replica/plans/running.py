"""Runs of a plan: begun, gone on with by whoever comes next, given up, and looked at from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from replica.errors import LeaseHeldError, UsageError
from replica.host import Host
from replica.keys import PlanKeys
from replica.plans import graph, journal, reading
from replica.plans.deeds import Ask, BringOf, RealDeeds
from replica.plans.engine import Engine, Ran, Watch, silent
from replica.plans.graph import Step
from replica.plans.journal import Header, Outcome, Result, RunState, StoredJournal, What
from replica.plans.model import Plan, RunKind
from replica.plans.places import refusals
from replica.plans.points import MeansOf, Prepared, prepare
from replica.stores.store import Store

CHOOSING = frozenset({RunKind.TEST, RunKind.UNPLANNED})  # the others take the point that they make


def keys_of(tenant: str, name: str) -> PlanKeys:
    """Return the keys of a plan's runs. Raises UsageError."""
    return PlanKeys(tenant, name)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who runs plans, and with what."""

    store: Store
    host: Host
    tenant: str
    means_of: MeansOf
    ask: Ask
    bring_of: BringOf
    watch: Watch = silent

    def keys(self, name: str) -> PlanKeys:
        """Return the keys of a plan's runs. Raises UsageError."""
        return PlanKeys(self.tenant, name)


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it stands, with the plan that it was begun with."""

    header: Header
    plan: Plan
    steps: tuple[Step, ...]
    state: RunState
    ran: Ran | None = None  # what was done of it here

    @property
    def is_over(self) -> bool:
        """Whether nobody is to go on with it."""
        return self.state.ending in (What.ENDED, What.GIVEN_UP)

    def seconds_of(self, group: str) -> float | None:
        """Return how long after its begin the run had done all steps of a group; None where it has not."""
        known = [self.state.steps.get(one.id) for one in self.steps if one.group == group]
        times = [one.settled_at for one in known if one is not None and one.outcome is not None and one.settled_at]
        return (max(times) - self.header.begun_at).total_seconds() if times and len(times) == len(known) else None


def run(operator: Operator, plan: Plan, kind: RunKind, *, anew: bool = False) -> Run:
    """Run a plan. ``anew`` gives up a run of it that was not brought to its end.

    Raises UsageError where such a run is there, or points cannot be chosen, naming all reasons; LeaseHeldError where
    another operator is at work; and as ``Engine.run``.
    """
    keys = operator.keys(plan.name)
    with operator.host.exclusive(_lock(keys)) as sole:
        _meet(operator, plan)
        _leave_behind(operator, keys, anew=anew, sole=sole)
        prepared = prepared_for(operator, plan, kind)
        header = journal.begin(operator.store, operator.host, keys, plan, kind, prepared.fixed)
        written = StoredJournal(operator.store, operator.host, keys, header.run, RunState())
        written.append(What.TAKEN)
        return _go(operator, header, plan, written)


def resume(operator: Operator, name: str, *, redo: Sequence[str] = (), skip: Sequence[str] = ()) -> Run:
    """Go on with the newest run of a plan, as it was begun, from where it stands.

    ``redo``: steps that may be done although they may have been done before; ``skip``: steps that count as done.
    Raises UsageError where there is no run, or nothing left of it, or no such step; LeaseHeldError; as ``Engine.run``.
    """
    keys = operator.keys(name)
    with operator.host.exclusive(_lock(keys)) as sole:
        found = status(operator.store, keys)
        if found.is_over:
            raise UsageError(
                f"run {found.header.run} of the plan {name} is over: nothing is left to do",
                hint="begin another with 'godwit plan run'",
            )
        _look_at_words(found, (*redo, *skip))
        _meet(operator, found.plan)
        written = journal.take_over(operator.store, operator.host, keys, found.header.run, sole_on_host=sole)
        for step, result in (*((one, Result.REDO) for one in redo), *((one, Result.SKIPPED) for one in skip)):
            written.append(What.SETTLED, step=step, outcome=Outcome(result, f"said on {operator.host.host_name}"))
        return _go(operator, found.header, found.plan, written)


def status(store: Store, keys: PlanKeys, number: int | None = None) -> Run:
    """Return a run of a plan, the newest where none is named. Raises UsageError where there is none."""
    number = number or journal.latest(store, keys)
    if not number:
        raise UsageError(f"no run of the plan {keys.plan} is in this store", hint="begin one with 'godwit plan run'")
    header = journal.header(store, keys, number)
    plan = reading.required(*reading.read(header.document), path=keys.run(number))
    steps = graph.steps(plan, header.kind)
    return Run(header, plan, steps, journal.read(store, keys, number))


def give_up(store: Store, host: Host, found: Run, tenant: str, why: str) -> None:
    """Let nobody go on with a run; nothing where it is over. Raises LeaseHeldError where somebody is at work on it."""
    if found.is_over:
        return
    keys = keys_of(tenant, found.header.plan)
    with host.exclusive(_lock(keys)) as sole:
        taken = journal.take_over(store, host, keys, found.header.run, sole_on_host=sole)
        taken.append(What.GIVEN_UP, detail=why)


def refuse_busy(found: Run, now: datetime) -> None:
    """Raise LeaseHeldError where somebody is at work on a run."""
    holder = found.state.holder
    if found.state.is_held(now) and holder is not None:
        raise LeaseHeldError(
            f"{holder.host_name} is at work on run {found.header.run} of the plan {found.header.plan}",
            hint="wait until it is done",
        )


def prepared_for(operator: Operator, plan: Plan, kind: RunKind) -> Prepared:
    """Choose the points of a run, asking what is to be asked. Raises UsageError naming all that stands against it."""
    if kind is RunKind.PLANNED and (refused := refusals(plan, operator.means_of)):
        raise UsageError("; ".join(refused), hint="nothing was shut down: correct the plan, or the configuration")
    if kind not in CHOOSING:
        return Prepared({})
    prepared = prepare(plan, operator.means_of, operator.host.clock.now())
    problems = list(prepared.problems)
    for question in prepared.questions:
        answer = operator.ask(f"{question}: start from it all the same?")
        if not answer:
            problems.append(
                f"{question}, and {'nobody was there to be asked' if answer is None else 'that was declined'}"
            )
    if problems:
        raise UsageError("; ".join(problems), hint="'godwit plan validate' names all that stands against a run")
    return prepared


def _go(operator: Operator, header: Header, plan: Plan, written: StoredJournal) -> Run:
    steps = graph.steps(plan, header.kind)
    deeds = RealDeeds(
        plan,
        header.kind,
        header.run,
        header.points,
        operator.means_of,
        operator.ask,
        operator.bring_of,
        written.state,
    )
    ran = Engine(steps, written, deeds, operator.host, operator.watch).run()
    return Run(header, plan, steps, written.state, ran)


def _meet(operator: Operator, plan: Plan) -> None:
    """Find all VMs before anything is begun: a passphrase that is asked for is asked now. Raises TenantKeyError."""
    for vm in plan.vms:
        with suppress(UsageError):  # one that is not there is told of with all else that is wrong
            operator.means_of(vm.name)


def _lock(keys: PlanKeys) -> str:
    return f"plan-{keys.tenant}-{keys.plan}"


def _leave_behind(operator: Operator, keys: PlanKeys, *, anew: bool, sole: bool) -> None:
    """See that no run is open, or give it up."""
    number = journal.latest(operator.store, keys)
    if not number:
        return
    if not anew:
        state = journal.read(operator.store, keys, number)
        if state.ending in (What.ENDED, What.GIVEN_UP):
            return
        if state.is_held(operator.host.clock.now()) and state.holder is not None and not sole:
            raise LeaseHeldError(f"{state.holder.host_name} is at work on run {number} of the plan {keys.plan}")
        why = f" ({state.detail})" if state.detail else ""
        raise UsageError(
            f"run {number} of the plan {keys.plan} was not brought to its end{why}",
            hint=f"'godwit plan resume {keys.plan}' goes on with it, --anew gives it up",
        )
    if journal.read(operator.store, keys, number).ending in (What.ENDED, What.GIVEN_UP):
        return
    taken = journal.take_over(operator.store, operator.host, keys, number, sole_on_host=sole)
    taken.append(What.GIVEN_UP, detail="another run was begun")


def _look_at_words(found: Run, named: Iterable[str]) -> None:
    known = {one.id for one in found.steps}
    wrong = [one for one in named if one not in known]
    if wrong:
        raise UsageError(
            f"the run has no step {wrong[0]!r}", hint=f"'godwit plan status {found.header.plan}' lists its steps"
        )
