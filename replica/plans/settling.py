"""Settling what a run of a plan made, VM by VM: commit, cleanup and reprotection of all, as far as each goes.

Nothing of this is written down beside the VMs' own settings: each can be repeated, and finds what was done before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conversion.errors import ConversionError
from replica import catalog
from replica.errors import GodwitError, UsageError
from replica.failover import returning, settling
from replica.failover.means import Means
from replica.host import Host
from replica.model import RecoveryMachine, Standing
from replica.plans import graph, running
from replica.plans.graph import StepKind
from replica.plans.model import RunKind
from replica.plans.points import MeansOf
from replica.plans.running import Run
from replica.stores.store import Store
from vhdx.errors import DiskError


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one VM. ``error`` is why it is not as it should be."""

    vm: str
    standing: Standing | None
    machines: tuple[str, ...] = ()  # that were removed
    error: str | None = None


def commit(found: Run, means_of: MeansOf) -> tuple[Settled, ...]:
    """Settle for the points of all VMs that were failed over. Raises UsageError after a test or a failback."""
    _require(found, "commit", RunKind.PLANNED, RunKind.UNPLANNED)

    def work(means: Means) -> tuple[str, ...]:
        settling.commit(means)
        return ()

    return _each(found, means_of, work)


def reprotect(found: Run, means_of: MeansOf) -> tuple[Settled, ...]:
    """Replicate all VMs from their recovery machines. Raises UsageError after a test or a failback."""
    _require(found, "reprotect", RunKind.PLANNED, RunKind.UNPLANNED)

    def work(means: Means) -> tuple[str, ...]:
        returning.reprotect(means)
        return ()

    return _each(found, means_of, work)


def doomed(found: Run, means_of: MeansOf) -> dict[str, tuple[RecoveryMachine, ...]]:
    """Return what a cleanup removes of each VM: the machines of this run's tests, or what nobody has settled for.

    Raises UsageError after a failback.
    """
    _require(found, "clean up", RunKind.TEST, RunKind.PLANNED, RunKind.UNPLANNED)
    machines = {}
    started = [vm for group in found.plan.groups for vm in graph.order(found.plan, group)]
    for vm in reversed(started):
        means = means_of(vm.name)
        state = catalog.settings_in_force(means.store, means.found).state
        if found.header.kind is RunKind.TEST:
            known = found.state.steps.get(f"vm/{vm.name}/{StepKind.START}")
            names = () if known is None else tuple(known.machines)
            listed = tuple(one for one in state.beside if one.name in names)
        elif state.standing in (Standing.FAILING_OVER, Standing.FAILED_OVER):
            listed = settling.doomed(vm.name, state)
        else:
            listed = ()
        if listed:
            machines[vm.name] = listed
    return machines


def clean_up_after(
    store: Store, host: Host, tenant: str, found: Run, means_of: MeansOf, *, forget: bool = False
) -> tuple[Settled, ...]:
    """Remove what ``doomed`` says; once all of it is gone nobody goes on with the run. Raises LeaseHeldError."""
    done = cleanup(found, means_of, forget=forget)
    if all(one.error is None for one in done):
        running.give_up(store, host, found, tenant, "it was cleaned up")
    return done


def cleanup(found: Run, means_of: MeansOf, *, forget: bool = False) -> tuple[Settled, ...]:
    """Remove what ``doomed`` says, the VM that was started last first."""
    machines = doomed(found, means_of)
    is_test = found.header.kind is RunKind.TEST
    done = []
    for vm, listed in machines.items():

        def work(means: Means, listed: tuple[RecoveryMachine, ...] = listed) -> tuple[str, ...]:
            names = tuple(one.name for one in listed) if is_test else ()
            made = settling.cleanup(means, names, forget=forget)
            return tuple(one.name for one in (*made.removed, *made.forgotten))

        done.append(_one(vm, means_of, work))
    return tuple(done)


def _require(found: Run, what: str, *kinds: RunKind) -> None:
    if found.header.kind not in kinds:
        raise UsageError(
            f"run {found.header.run} of the plan {found.header.plan} was a {found.header.kind.value} run: "
            f"there is nothing to {what}",
            hint=f"'godwit plan status {found.header.plan}' says how its VMs stand",
        )


def _each(found: Run, means_of: MeansOf, work: Callable[[Means], tuple[str, ...]]) -> tuple[Settled, ...]:
    return tuple(_one(vm.name, means_of, work) for vm in found.plan.vms)


def _one(vm: str, means_of: MeansOf, work: Callable[[Means], tuple[str, ...]]) -> Settled:
    try:
        means = means_of(vm)
        machines = work(means)
        return Settled(vm, catalog.settings_in_force(means.store, means.found).state.standing, machines)
    except (GodwitError, ConversionError, DiskError) as error:
        return Settled(vm, None, error=str(error))
