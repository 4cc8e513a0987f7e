"""Whether platforms take the machines of a plan, in the networks that it names: known before a source is shut down."""

from __future__ import annotations

from replica import catalog, history
from replica.errors import GodwitError
from replica.failover import failover as failing_over
from replica.failover.failover import DEFAULT_PLATFORM, Order
from replica.model import FailoverKind, Standing
from replica.plans.model import Plan, PlannedVm
from replica.plans.networks import mapped
from replica.plans.points import MeansOf
from replica.platforms.platform import Particular


def refusals(plan: Plan, means_of: MeansOf) -> list[str]:
    """Return why machines of a planned run could not be made, each with its VM; none where nothing is known of it."""
    found = []
    for vm in plan.vms:
        try:
            _require(vm, means_of)
        except GodwitError as error:
            found.append(f"{vm.name}: {error}; {error.hint}" if error.hint else f"{vm.name}: {error}")
    return found


def _require(vm: PlannedVm, means_of: MeansOf) -> None:
    means = mapped(means_of(vm.name), dict(vm.networks))
    platform = vm.platform or DEFAULT_PLATFORM
    if not isinstance(means.open_platform(platform), Particular):
        return
    if catalog.settings_in_force(means.store, means.found).state.standing is not Standing.PROTECTED:
        return  # what was begun goes on as it is
    point = history.newest(means.store, means.found.keys)
    if point is None:
        return  # the run makes its first
    generation = means.offer(platform).generation(point.machine.generation, vm.generation)
    order = Order(FailoverKind.PLANNED, None, vm.platform, vm.generation)
    failing_over.check_machine(means, order, point, generation)
