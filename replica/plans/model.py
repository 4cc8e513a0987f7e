"""What a plan says, as values: groups in their order, VMs, their points, and what is done before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal

from replica.drills.checks import Check
from replica.plans.document import Place

START_SECONDS: Final = 1800.0
ACTION_SECONDS: Final = 300.0
AT_ONCE: Final = 4


class RunKind(StrEnum):
    """What a plan is run for."""

    TEST = "test"
    PLANNED = "planned"
    UNPLANNED = "unplanned"
    FAILBACK = "failback"


STARTING: Final = frozenset({RunKind.TEST, RunKind.PLANNED, RunKind.UNPLANNED})
FOR_REAL: Final = frozenset({RunKind.PLANNED, RunKind.UNPLANNED})


class OnFailure(StrEnum):
    """What follows where a step fails."""

    STOP = "stop"  # nothing more is begun
    CONTINUE = "continue"  # what does not need it goes on


class ActionKind(StrEnum):
    """What an action does."""

    HOST = "host"  # a program on the host that runs the plan
    GUEST = "guest"  # a program in the guest, through its agent
    AGENT = "agent"  # wait until the guest's agent answers
    CONSOLE = "console"  # wait for a line of the serial console
    TCP = "tcp"  # wait until a port answers, asked from the host
    CONFIRM = "confirm"  # ask a person

    @property
    def is_of_guest(self) -> bool:
        """Whether it needs a machine that runs."""
        return self in (ActionKind.GUEST, ActionKind.AGENT, ActionKind.CONSOLE)

    @property
    def runs(self) -> frozenset[RunKind]:
        """In which runs it is done where the plan does not say: what reaches beyond the machines, not in tests."""
        return STARTING if self.is_of_guest else FOR_REAL


@dataclass(frozen=True, slots=True)
class Action:
    """Something that is done before or after. Which of the fields mean anything is a matter of its ``kind``."""

    kind: ActionKind
    name: str
    place: Place
    command: tuple[str, ...] = ()
    text: str = ""  # a question, or a regular expression for a line
    address: str = ""
    port: int = 0
    vm: str = ""  # whose guest, where it is not the one that the action belongs to
    runs: frozenset[RunKind] = FOR_REAL
    timeout_seconds: float = ACTION_SECONDS
    repeatable: bool = False
    on_failure: OnFailure = OnFailure.STOP


class Policy(StrEnum):
    """Which point a VM starts from."""

    NEWEST = "newest"  # and no older one, whatever is wrong with it
    NEWEST_VERIFIED = "newest-verified"
    APPLICATION = "application-consistent"
    AT_OR_BEFORE = "at-or-before"
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class PointPolicy:
    """Which point a VM starts from; ``at`` or ``number`` where the policy needs one."""

    policy: Policy = Policy.NEWEST_VERIFIED
    at: datetime | None = None
    number: int | None = None

    def __str__(self) -> str:
        if self.policy is Policy.NUMBER:
            return f"point {self.number}"
        if self.policy is Policy.AT_OR_BEFORE and self.at is not None:
            return f"the newest at or before {self.at:%Y-%m-%d %H:%M:%S} UTC"
        return {
            Policy.NEWEST: "the newest point",
            Policy.APPLICATION: "the newest application-consistent point",
        }.get(self.policy, "the newest point that verifies")


@dataclass(frozen=True, slots=True)
class PlannedVm:
    """A VM of a plan."""

    name: str
    place: Place
    depends_on: tuple[tuple[str, Place], ...] = ()
    point: PointPolicy = PointPolicy()
    max_point_age_seconds: float | None = None
    on_old_point: Literal["refuse", "ask"] = "refuse"
    platform: str | None = None
    generation: Literal[1, 2] | None = None
    networks: tuple[tuple[str, str], ...] = ()  # of the source, and on the platform; * stands for all others
    timeout_seconds: float = START_SECONDS
    on_failure: OnFailure = OnFailure.STOP
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """VMs that may be started at the same time, ``at_once`` of them; the next group waits for all."""

    name: str
    place: Place
    vms: tuple[PlannedVm, ...] = ()
    at_once: int = AT_ONCE
    within_seconds: float | None = None  # how far their points may lie apart; None: that is left open
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan. ``text`` is what it was read from, ``sha256`` of it."""

    name: str
    groups: tuple[Group, ...] = ()
    description: str = ""
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()
    text: str = field(default="", repr=False)
    sha256: str = ""

    @property
    def vms(self) -> Iterator[PlannedVm]:
        """All VMs, in the plan's order."""
        return (vm for group in self.groups for vm in group.vms)

    def vm(self, name: str) -> PlannedVm:
        """Return the VM of that name, which is there."""
        return next(one for one in self.vms if one.name == name)
