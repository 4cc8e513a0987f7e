"""The way home: replication from the recovery machine, and the VM brought back to its source's disks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

from replica.errors import PlatformError, SourceError
from replica.failback.home import Homecoming
from replica.failover import transitions
from replica.failover.failover import final_point, remove_superseded
from replica.failover.means import Means
from replica.failover.transitions import Command
from replica.failover.turn import Turn
from replica.model import Point, RecoveryMachine, Settings, SourceDisk, Standing, State
from replica.platforms.platform import Power
from replica.source import change_source
from vhdx.errors import DiskError
from vhdx.progress import Progress, silent

# Makes the home disks what the newest point holds: ``replica.failover.homecoming.bring`` with its destination.
Bring: TypeAlias = Callable[[Means, State, Point, Progress], tuple[tuple[SourceDisk, ...], Homecoming]]


@dataclass(frozen=True, slots=True)
class Failback:
    """What a failback did. ``left``: the recovery machine where it is not gone yet, since another host has it.

    ``homecoming`` and ``point`` are None where it was home already, and only its machine was there still.
    """

    sources: tuple[SourceDisk, ...]
    point: Point | None
    homecoming: Homecoming | None
    removed: RecoveryMachine | None
    left: tuple[RecoveryMachine, ...] = ()


def reprotect(means: Means) -> Settings:
    """Replicate from the recovery machine from now on. Safe to repeat.

    Raises StandingError, LeaseHeldError, PlatformError where the machine does not run, or is another host's.
    """
    with means.turn(Command.REPROTECT) as turn:
        machine = turn.state.machine
        assert machine is not None, "checked when it was decoded"
        if turn.state.standing is Standing.REPROTECTED:
            return turn.settings
        with turn.kept():
            sources = _sources(means, turn, machine)
        return turn.put(transitions.reprotect(turn.settings, sources), Command.REPROTECT)


def _sources(means: Means, turn: Turn, machine: RecoveryMachine) -> tuple[SourceDisk, ...]:
    if not means.offer(machine.platform).returns:
        raise PlatformError(
            f"this version does not replicate from machines of {machine.platform}, and {machine.name} is one",
            hint="to bring it home, copy its disks out as VHD files, and protect those as a VM of another name with "
            f"--seed-from {means.name}: what is in the store already is not sent again",
        )
    platform = means.platform_of(machine)
    if means.offer(machine.platform).starts and platform.power(machine.name) is not Power.RUNNING:
        raise PlatformError(
            f"the machine {machine.name} does not run, and where its disks are read from is known while it does",
            hint="start it, and try again",
        )
    addresses = {one.number: one.address for one in platform.disks(machine.name)}
    missing = [one.number for one in turn.settings.sources if one.number not in addresses]
    if missing:
        raise PlatformError(f"the machine {machine.name} has no disk {missing[0]}")
    sources = tuple(replace(one, path=addresses[one.number]) for one in turn.settings.sources)
    change_source(sources)
    return sources


def failback(
    means: Means,
    bring: Bring,
    *,
    lost: bool = False,
    progress: Progress = silent,
) -> Failback:
    """Bring the VM home: the recovery machine is shut down, its last point made, the home disks made of it.

    ``lost``: the recovery machine is gone, and the newest point is all that there is of it. Safe to repeat: what was
    begun goes on. Raises StandingError, LeaseHeldError, SourceError, PlatformError, and what ``bring`` raises.
    """
    with means.turn(Command.FAILBACK) as turn:
        machine = turn.state.machine
        if machine is None:
            return _finish(means, turn, None, None)
        if turn.state.standing is Standing.REPROTECTED:
            _shut_down_and_intend(means, turn, lost=lost, progress=progress)
        newest = turn.newest
        if newest is None:
            raise SourceError("no point of the VM can be read", hint=f"'godwit verify {means.name}' says why")
        with turn.kept():
            if means.is_reachable(machine) and means.offer(machine.platform).starts and not lost:
                means.platform_of(machine).stop(machine.name, force=True)
            sources, homecoming = bring(means, turn.state, newest, progress)
        turn.put(transitions.came_home(turn.settings, sources), Command.FAILBACK)
        return _finish(means, turn, newest, homecoming)


def _finish(means: Means, turn: Turn, newest: Point | None, homecoming: Homecoming | None) -> Failback:
    """Remove the machine that the VM came home from."""
    before = turn.state.beside
    remove_superseded(means, turn, Command.FAILBACK)
    left = tuple(one for one in turn.state.beside if transitions.is_superseded(one))
    removed = next((one for one in before if one not in turn.state.beside), None)
    return Failback(turn.settings.sources, newest, homecoming, removed, left)


def _shut_down_and_intend(means: Means, turn: Turn, *, lost: bool, progress: Progress) -> None:
    if lost:
        turn.put(replace(turn.settings, state=transitions.intend_failback(turn.state)), Command.FAILBACK)
        return
    with ExitStack() as stack:
        try:
            _, off = stack.enter_context(final_point(means, turn, progress))
        except (SourceError, PlatformError, DiskError) as error:
            lost_hint = (
                f"if that machine is gone for good, 'godwit failback {means.name} --lost' brings the newest point"
            )
            error.hint = f"{error.hint}; {lost_hint}" if error.hint else lost_hint
            raise
        turn.put(replace(turn.settings, state=transitions.intend_failback(turn.state)), Command.FAILBACK)
        off.finish()
