"""Which points the VMs of a plan start from: by their policies, and for a group at one time as nearly as there are any.

Points are read from the newest on, and no further than needed. What is chosen beforehand is what a policy or a group
asks for; "the newest that verifies" is left to the moment at which the VM is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from replica import history, lease
from replica.errors import FormatVersionError, GodwitError, IntegrityError, ObjectMissingError, UsageError
from replica.failover.choosing import choose
from replica.failover.means import Means
from replica.model import Consistency, Point
from replica.plans.model import Group, Plan, PlannedVm, Policy

MOST_READ: Final = 10_000  # manifests of a VM that are looked at for one that will do

MeansOf = Callable[[str], Means]


@dataclass(frozen=True, slots=True)
class Choice:
    """The point of a VM. ``is_fixed``: it is this one; else a newer one may have come by the time it is started."""

    point: Point
    is_fixed: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the points of a group lie apart, by the clocks of the machines that made them."""

    group: str
    oldest: datetime
    newest: datetime

    @property
    def seconds(self) -> float:
        """The span."""
        return (self.newest - self.oldest).total_seconds()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run starts from. ``problems`` keep it from being begun; ``questions`` are to be asked before."""

    choices: Mapping[str, Choice]
    spreads: tuple[Spread, ...] = ()
    questions: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def fixed(self) -> dict[str, int]:
        """The points that are settled by number."""
        return {name: one.point.point for name, one in self.choices.items() if one.is_fixed}


def prepare(plan: Plan, means_of: MeansOf, now: datetime) -> Prepared:
    """Choose points for all VMs; what stands against it is collected, not raised. Nothing is written."""
    choices: dict[str, Choice] = {}
    spreads: list[Spread] = []
    problems: list[str] = []
    for group in plan.groups:
        try:
            if group.within_seconds is None:
                for vm in group.vms:
                    _choose_one(vm, means_of, choices, problems)
            else:
                spread = _choose_together(group, means_of, choices)
                spreads.append(spread)
        except GodwitError as error:
            problems.append(_told(group.name, error))
    questions: list[str] = []
    for vm in plan.vms:
        if vm.name in choices and vm.max_point_age_seconds is not None:
            age = (now - choices[vm.name].point.created_at).total_seconds()
            if age > vm.max_point_age_seconds:
                number = choices[vm.name].point.point
                said = f"point {number} of {vm.name} is {age:.0f} s old, and may be {vm.max_point_age_seconds:.0f} s"
                (questions if vm.on_old_point == "ask" else problems).append(said)
    return Prepared(choices, tuple(spreads), tuple(questions), tuple(problems))


def _choose_one(vm: PlannedVm, means_of: MeansOf, choices: dict[str, Choice], problems: list[str]) -> None:
    try:
        choices[vm.name] = choose_one(vm, means_of(vm.name))
    except GodwitError as error:
        problems.append(_told(vm.name, error))


def _told(name: str, error: GodwitError) -> str:
    text = str(error)
    return text if name in text else f"{name}: {text}"


def choose_one(vm: PlannedVm, means: Means) -> Choice:
    """Return the point of one VM by its policy. Raises UsageError where there is none, IntegrityError."""
    if vm.point.policy is Policy.NEWEST_VERIFIED:
        first = next(candidates(vm, means), None)
        if first is None:
            raise _none(vm)
        return Choice(first, is_fixed=False)
    if vm.point.policy is Policy.NUMBER:
        return Choice(_verified(means, vm.point.number or 0), is_fixed=True)
    worst: GodwitError | None = None
    for one in candidates(vm, means):
        try:
            return Choice(_verified(means, one.point), is_fixed=True)
        except IntegrityError as error:
            if vm.point.policy is Policy.NEWEST:
                raise
            worst = worst or error
    raise worst or _none(vm)


def _none(vm: PlannedVm) -> UsageError:
    return UsageError(f"{vm.name} has no such point: {vm.point}", hint=f"'godwit points {vm.name}' lists what there is")


def _verified(means: Means, number: int) -> Point:
    return choose(means.store, means.host, means.found, number, workers=means.workers).point


def candidates(vm: PlannedVm, means: Means) -> Iterator[Point]:
    """Yield the points that the policy allows, newest first; none is read before it is asked for."""
    policy = vm.point
    if policy.policy is Policy.NUMBER:
        yield history.point(means.store, means.found.keys, policy.number or 0)
        return
    state, _ = lease.read(means.store, means.found.keys)
    newest = history.newest_number(means.store, means.found.keys, state.point)
    for number in range(newest, max(0, newest - MOST_READ), -1):
        try:
            one = history.read(means.store, means.found.keys, number)
        except (ObjectMissingError, IntegrityError, FormatVersionError):
            if policy.policy is Policy.NEWEST and number == newest:
                raise
            continue
        if not isinstance(one, Point):
            continue
        if policy.policy is Policy.APPLICATION and one.consistency is Consistency.CRASH:
            continue
        if policy.at is not None and one.created_at > policy.at:
            continue
        yield one
        if policy.policy is Policy.NEWEST:
            return


# -- a group at one time ----------------------------------------------------------------------------------------------


def together(times: Sequence[Iterator[datetime]], within: timedelta) -> tuple[tuple[int, ...] | None, timedelta | None]:
    """Choose one of each of several descending series of times, so that all lie ``within`` of the newest of them.

    Returns the positions with the newest possible time, and how far they lie apart; None, and the least spread that
    there is, where none will do. No series is read further than needed.
    """
    heads = [next(one, None) for one in times]
    at = [0] * len(heads)
    best: timedelta | None = None
    while True:
        there = [one for one in heads if one is not None]
        if not there or len(there) < len(heads):
            return None, best
        newest = max(there)
        spread = newest - min(there)
        best = spread if best is None else min(best, spread)
        if spread <= within:
            return tuple(at), spread
        # With the newest of them the others are too old already: it cannot be part of any answer.
        which = heads.index(newest)
        heads[which] = next(times[which], None)
        at[which] += 1


def _choose_together(group: Group, means_of: MeansOf, choices: dict[str, Choice]) -> Spread:
    """Choose points of a group that verify and lie near enough to one another. Raises UsageError, IntegrityError."""
    assert group.within_seconds is not None
    damaged: dict[str, set[int]] = {one.name: set() for one in group.vms}
    while True:
        read: list[list[Point]] = [[] for _ in group.vms]
        series = [
            _times(candidates(vm, means_of(vm.name)), damaged[vm.name], seen)
            for vm, seen in zip(group.vms, read, strict=True)
        ]
        positions, spread = together(series, timedelta(seconds=group.within_seconds))
        if positions is None:
            raise _apart(group, read, spread)
        chosen = [seen[at] for seen, at in zip(read, positions, strict=True)]
        wrong = False
        for vm, one in zip(group.vms, chosen, strict=True):
            try:
                _verified(means_of(vm.name), one.point)
            except IntegrityError:
                damaged[vm.name].add(one.point)
                wrong = True
        if not wrong:
            choices.update((vm.name, Choice(one, is_fixed=True)) for vm, one in zip(group.vms, chosen, strict=True))
            times = [one.created_at for one in chosen]
            return Spread(group.name, min(times), max(times))


def _times(points: Iterator[Point], damaged: set[int], seen: list[Point]) -> Iterator[datetime]:
    """Yield the times of points, never later than those before, whatever clocks did; ``seen`` gets the points."""
    for one in points:
        if one.point not in damaged and (not seen or one.created_at <= seen[-1].created_at):
            seen.append(one)
            yield one.created_at


def _apart(group: Group, read: Sequence[Sequence[Point]], spread: timedelta | None) -> UsageError:
    empty = [vm.name for vm, seen in zip(group.vms, read, strict=True) if not seen]
    if empty:
        return UsageError(f"the group {group.name}: {', '.join(empty)} has no point that its policy allows")
    nearest = "" if spread is None else f"; the nearest lie {spread.total_seconds():.0f} s apart"
    return UsageError(
        f"the group {group.name} has no points that lie within {group.within_seconds:.0f} s of one another{nearest}",
        hint="replicate its VMs at the same interval, or allow more with consistent_within",
    )
