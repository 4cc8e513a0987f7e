"""Which command may come when, and what each makes of a VM's standing: pure functions (docs/failover.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Final

from replica.errors import StandingError, UsageError
from replica.failover.offer import OFFERS, Offer
from replica.model import (
    FailoverKind,
    Home,
    MachineDisk,
    RecoveryMachine,
    ReverseBase,
    Settings,
    SourceDisk,
    Standing,
    State,
)


class Command(StrEnum):
    """What is asked for, as the command line has it."""

    REPLICATE = "replicate"
    TEST = "failover --test"
    FAILOVER = "failover"
    COMMIT = "commit"
    CLEANUP = "cleanup"
    REPROTECT = "reprotect"
    FAILBACK = "failback"
    CHANGE_DISKS = "protect --update --disk"
    ADOPT = "adopt"


_EVERY: Final = frozenset(Standing)

# In which standings a command does something, or finds that it was done before.
ALLOWED: Final[Mapping[Command, frozenset[Standing]]] = {
    Command.REPLICATE: frozenset({Standing.PROTECTED, Standing.REPROTECTED}),
    Command.TEST: _EVERY,
    Command.FAILOVER: frozenset({Standing.PROTECTED, Standing.FAILING_OVER, Standing.FAILED_OVER}),
    Command.COMMIT: frozenset({Standing.FAILED_OVER, Standing.COMMITTED}),
    Command.CLEANUP: frozenset({Standing.PROTECTED, Standing.FAILING_OVER, Standing.FAILED_OVER}),
    Command.REPROTECT: frozenset({Standing.COMMITTED, Standing.REPROTECTED}),
    Command.FAILBACK: frozenset({Standing.REPROTECTED, Standing.FAILING_BACK}),
    Command.CHANGE_DISKS: frozenset({Standing.PROTECTED}),
    Command.ADOPT: frozenset({Standing.PROTECTED, Standing.REPROTECTED}),
}

# What leads on, the likeliest first.
NEXT: Final[Mapping[Standing, tuple[str, ...]]] = {
    Standing.PROTECTED: ("failover {} --test", "failover {} --planned", "failover {} --unplanned"),
    Standing.FAILING_OVER: ("failover {}", "cleanup {}"),
    Standing.FAILED_OVER: ("commit {}", "failover {} --point P", "cleanup {}"),
    Standing.COMMITTED: ("reprotect {}",),
    Standing.REPROTECTED: ("replicate {}", "failback {}"),
    Standing.FAILING_BACK: ("failback {}",),
}

_SAYS: Final[Mapping[Standing, str]] = {
    Standing.PROTECTED: "it runs at its source, which is replicated",
    Standing.FAILING_OVER: "{machine} is being started from point {point}; the source is not replicated any more",
    Standing.FAILED_OVER: "{machine} runs from point {point}, which nobody has settled for yet",
    Standing.COMMITTED: "{machine} runs from point {point}, which was settled for; it is not replicated yet",
    Standing.REPROTECTED: "{machine} runs, and is what is replicated",
    Standing.FAILING_BACK: "it is being brought home from {machine}",
}

# The same where the platform started nothing: what uses the disks by now is not known.
_SAYS_OF_DISKS: Final[Mapping[Standing, str]] = {
    **_SAYS,
    Standing.FAILING_OVER: "the disks of {machine} are being written from point {point}; "
    "the source is not replicated any more",
    Standing.FAILED_OVER: "the disks of {machine} were written from point {point}, which nobody has settled for yet",
    Standing.COMMITTED: "the disks of {machine} were written from point {point}, which was settled for; "
    "they are not replicated yet",
    Standing.REPROTECTED: "it is replicated from the disks of {machine}",
}


def say(state: State, offers: Mapping[str, Offer] = OFFERS) -> str:
    """Return where a VM stands, as the rest of a sentence about it; ``offers`` are those of this configuration."""
    machine = state.machine
    if machine is None:
        return _SAYS[state.standing]
    known = offers.get(machine.platform)
    says = _SAYS if known is None or known.starts else _SAYS_OF_DISKS
    named = f"the recovery machine {machine.name} ({machine.platform} on {machine.host_name})"
    return says[state.standing].format(machine=named, point=machine.point)


def next_commands(name: str, state: State) -> tuple[str, ...]:
    """Return the commands that lead on from here, the likeliest first."""
    listed = [f"godwit {one.format(_quoted(name))}" for one in NEXT[state.standing]]
    if state.beside:
        listed.append(f"godwit cleanup {_quoted(name)} --all")
    return tuple(listed)


def _quoted(name: str) -> str:
    plain = all(c.isalnum() or c in "-_." for c in name)
    return name if plain else "'" + name.replace("'", "'\\''") + "'"


def require(name: str, state: State, command: Command) -> None:
    """Raise StandingError, naming the standing and the commands that would be right, where ``command`` may not come."""
    if state.standing in ALLOWED[command]:
        return
    if command is Command.CLEANUP and state.beside:
        return
    if command is Command.FAILBACK and state.standing is Standing.PROTECTED and any(map(is_superseded, state.beside)):
        return  # it came home, and what it left is to be removed
    choices = " or ".join(f"'{one}'" for one in next_commands(name, state))
    raise StandingError(
        f"'godwit {command.value}' cannot be used now, because {name} is {state.standing.value}: {say(state)}",
        hint=choices,
    )


# -- failing over


def add_test(state: State, machine: RecoveryMachine) -> State:
    """Note a test machine that is about to be made."""
    return replace(state, beside=(*state.beside, machine))


def intend(state: State, machine: RecoveryMachine, home: Home) -> State:
    """Note a recovery machine that is about to be made; one that stood in its place is to be removed."""
    replaced = () if state.machine is None else (state.machine,)
    return replace(
        state,
        standing=Standing.FAILING_OVER,
        machine=machine,
        beside=(*state.beside, *replaced),
        home=state.home or home,
    )


def started(state: State, disks: tuple[MachineDisk, ...]) -> State:
    """Note that the recovery machine runs: it is the one that counts."""
    return replace(state, standing=Standing.FAILED_OVER, machine=replace(_machine(state), disks=disks))


def commit(state: State) -> State:
    """Settle for the point that was failed over to."""
    return replace(state, standing=Standing.COMMITTED)


def intend_cleanup(state: State) -> State:
    """Note that the recovery machine is about to be removed: nobody settles for it any more."""
    return replace(state, standing=Standing.FAILING_OVER)


def taken_back(state: State) -> State:
    """Note that the recovery machine is gone: the source counts again."""
    return State(beside=state.beside)


def struck(state: State, name: str) -> State:
    """Note that a machine that does not count is gone."""
    return replace(state, beside=tuple(one for one in state.beside if one.name != name))


def is_superseded(machine: RecoveryMachine) -> bool:
    """Whether a machine beside the one that counts was one that counted, and is only there to be removed."""
    return machine.kind is not FailoverKind.TEST


# -- going home


def reprotect(settings: Settings, sources: tuple[SourceDisk, ...]) -> Settings:
    """Replicate from the recovery machine, whose disks are ``sources``, from now on."""
    machine = _machine(settings.state)
    state = replace(
        settings.state,
        standing=Standing.REPROTECTED,
        reverse=ReverseBase(machine.point, machine.bitmap, machine.conversions),
    )
    described = replace(
        settings.machine,
        generation=machine.generation,
        secure_boot=settings.machine.secure_boot and machine.generation == settings.machine.generation,
    )
    return replace(settings, machine=described, sources=sources, state=state)


def intend_failback(state: State) -> State:
    """Note that the recovery machine is stopped, and that the home disks are about to be made whole."""
    return replace(state, standing=Standing.FAILING_BACK)


def came_home(settings: Settings, sources: tuple[SourceDisk, ...]) -> Settings:
    """Replicate from home, from ``sources``, again; the recovery machine is to be removed."""
    home = settings.state.home
    assert home is not None, "checked when it was decoded"
    state = State(beside=(*settings.state.beside, _machine(settings.state)))
    return replace(settings, machine=home.machine, sources=sources, state=state)


def beside(name: str, state: State, wanted: str) -> RecoveryMachine:
    """Return the machine of that name that does not count. Raises UsageError."""
    for one in state.beside:
        if one.name == wanted:
            return one
    known = ", ".join(one.name for one in state.beside) or "none"
    raise UsageError(f"{name} has no test machine {wanted!r}", hint=f"those it has: {known}")


def _machine(state: State) -> RecoveryMachine:
    assert state.machine is not None, "checked when it was decoded"
    return state.machine
