"""The VMs that an agent looks after, and what it knows of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from replica.daemon.units import Facts, Task


class MemberState(StrEnum):
    """How it goes with a VM."""

    WAITING = "waiting"  # for its turn
    RUNNING = "running"
    RETRYING = "retrying"  # the last cycle failed, another comes
    BUSY = "busy"  # another agent replicates it
    STOPPED = "stopped"  # until its settings change, or the agent is told to try again
    SKIPPED = "skipped"  # its standing forbids cycles
    ELSEWHERE = "elsewhere"  # its disks cannot be read here


IDLE = frozenset({MemberState.STOPPED, MemberState.SKIPPED, MemberState.ELSEWHERE})


@dataclass(slots=True)
class Care:
    """What is known of a task beside cycles: when it was last done, and what came of it."""

    at: datetime | None = None
    event: str | None = None
    failures: int = 0


@dataclass(slots=True)
class Member:
    """A VM, and where it stands with the agent."""

    facts: Facts
    state: MemberState = MemberState.WAITING
    failures: int = 0  # in a row
    busy: int = 0  # times in a row
    begun_at: datetime | None = None  # the last cycle that made a point
    last: dict[str, object] = field(default_factory=dict)  # what it said
    error: dict[str, object] | None = None
    missed: int = 0  # turns that passed without a point, since it is known
    next_at: datetime | None = None
    pruning: bool = False
    due_after_pruning: bool = False
    prune_after_cycle: bool = False
    care: dict[Task, Care] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.facts.name

    @property
    def vm_id(self) -> str:
        """The VM's id."""
        return self.facts.found.keys.vm_id

    def document(self) -> dict[str, object]:
        """Return what the status file says of it; ``remember`` reads some of it back."""
        return {
            "vm_id": self.vm_id,
            "state": self.state.value,
            "standing": self.facts.standing.value,
            "interval_seconds": self.facts.interval_seconds,
            "settings_version": self.facts.settings_version,
            "failures": self.failures,
            "missed": self.missed,
            "begun_at": self.begun_at,
            "next_at": self.next_at,
            "last": self.last,
            "error": self.error,
            "tasks": {task.value: {"at": one.at, "event": one.event} for task, one in self.care.items()},
        }

    def remember(self, told: Mapping[str, Any]) -> None:
        """Take up what an earlier run wrote of the VM. What cannot be understood is as if it were not there."""
        if told.get("vm_id") != self.vm_id:
            return
        self.begun_at = _moment(told.get("begun_at"))
        missed = told.get("missed")
        self.missed = missed if isinstance(missed, int) and 0 <= missed < 1 << 53 else 0
        last = told.get("last")
        self.last = dict(last) if isinstance(last, dict) else {}
        tasks = told.get("tasks")
        for task in Task:
            one = tasks.get(task.value) if isinstance(tasks, dict) else None
            if isinstance(one, dict) and (at := _moment(one.get("at"))) is not None:
                self.care[task] = Care(at, str(one.get("event")))


def _moment(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return None if found is None or found.tzinfo is None else found.astimezone(UTC)
