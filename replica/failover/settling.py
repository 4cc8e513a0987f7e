"""Settling a failover: for its point by commit, against it by cleanup; tests are removed by the latter too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from replica.errors import PlatformError, UsageError
from replica.failover import transitions
from replica.failover.means import Means
from replica.failover.transitions import Command
from replica.failover.turn import Turn
from replica.model import RecoveryMachine, Standing, State


@dataclass(frozen=True, slots=True)
class Cleanup:
    """What a cleanup removed, and what it struck from the list without having seen that it is gone."""

    standing: Standing
    removed: tuple[RecoveryMachine, ...] = ()
    forgotten: tuple[RecoveryMachine, ...] = ()


def commit(means: Means) -> State:
    """Settle for the point that was failed over to. Safe to repeat. Raises StandingError, LeaseHeldError."""
    with means.turn(Command.COMMIT) as turn:
        if turn.state.standing is Standing.FAILED_OVER:
            turn.put(replace(turn.settings, state=transitions.commit(turn.state)), Command.COMMIT)
        return turn.state


def doomed(
    name: str, state: State, wanted: Sequence[str] = (), *, everything: bool = False
) -> tuple[RecoveryMachine, ...]:
    """Return the machines that a cleanup removes.

    They are tests by their names, or all that do not count; by default the recovery machine where nobody has settled
    for it, and those that counted before, but no test: what is repeated must not reach further. Raises UsageError
    where there is nothing but tests.
    """
    if wanted and everything:
        raise UsageError("name test machines, or say --all")
    if wanted:
        return tuple(dict.fromkeys(transitions.beside(name, state, one) for one in wanted))
    if everything:
        return state.beside
    chosen = [one for one in state.beside if transitions.is_superseded(one)]
    if state.machine is not None and state.standing in transitions.ALLOWED[Command.CLEANUP]:
        chosen.append(state.machine)
    if state.beside and not chosen:
        names = ", ".join(one.name for one in state.beside)
        raise UsageError(f"{name} has test machines only: {names}", hint="name one with --test, or say --all")
    return tuple(chosen)


def cleanup(means: Means, wanted: Sequence[str] = (), *, everything: bool = False, forget: bool = False) -> Cleanup:
    """Remove machines; see ``doomed``. Once the recovery machine is gone the source counts again. Safe to repeat.

    ``forget``: strike machines of hosts that are gone for good, which nobody can look at any more.
    Raises StandingError, UsageError, LeaseHeldError, PlatformError where one does not go, or is another host's.
    """
    with means.turn(Command.CLEANUP) as turn:
        return _Cleanup(means, turn, forget=forget).run(wanted, everything=everything)


class _Cleanup:
    """A cleanup under a turn at the VM."""

    def __init__(self, means: Means, turn: Turn, *, forget: bool) -> None:
        self._means = means
        self._turn = turn
        self._forget = forget
        self._removed: list[RecoveryMachine] = []
        self._forgotten: list[RecoveryMachine] = []

    def run(self, wanted: Sequence[str], *, everything: bool) -> Cleanup:
        """Remove one after the other; each that is gone is struck at once."""
        machines = doomed(self._means.name, self._turn.state, wanted, everything=everything)
        for machine in machines:
            self._look_at(machine)
        for machine in machines:
            if machine == self._turn.state.machine:
                self._take_back(machine)
            else:
                self._remove(machine)
                self._put(transitions.struck(self._turn.state, machine.name))
        return Cleanup(self._turn.state.standing, tuple(self._removed), tuple(self._forgotten))

    def _look_at(self, machine: RecoveryMachine) -> None:
        if not self._means.is_reachable(machine) and not self._forget:
            raise PlatformError(
                f"the machine {machine.name} is on the host {machine.host_name}, and only seen there",
                hint=f"run the command on {machine.host_name}; if that is gone for good, add --forget",
            )

    def _take_back(self, machine: RecoveryMachine) -> None:
        if self._turn.state.standing is not Standing.FAILING_OVER:
            self._put(transitions.intend_cleanup(self._turn.state))  # or somebody settles for half a machine
        self._remove(machine)
        self._put(transitions.taken_back(self._turn.state))

    def _remove(self, machine: RecoveryMachine) -> None:
        if not self._means.is_reachable(machine):
            self._forgotten.append(machine)
            return
        with self._turn.kept():
            self._means.remove(machine)
        self._removed.append(machine)

    def _put(self, state: State) -> None:
        self._turn.put(replace(self._turn.settings, state=state), Command.CLEANUP)
