"""What the agent has to say: one event a line, with names that stay (docs/daemon.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeAlias

from conversion.errors import ConversionError
from replica.errors import GodwitError
from vhdx.errors import DiskError

Level: TypeAlias = Literal["info", "warning", "error"]

# Every event that there is, and how much it matters.
LEVELS: Final[Mapping[str, Level]] = {
    "agent.started": "info",
    "agent.stopping": "info",
    "agent.abandoning": "warning",
    "agent.stuck": "error",
    "agent.stopped": "info",
    "config.reloaded": "info",
    "config.refused": "error",
    "status.failed": "warning",
    "vms.failed": "error",
    "vm.added": "info",
    "vm.removed": "info",
    "vm.changed": "info",
    "vm.elsewhere": "info",
    "vm.unreachable": "error",
    "vm.skipped": "info",
    "vm.stopped": "error",
    "vm.resumed": "info",
    "cycle.started": "info",
    "cycle.done": "info",
    "cycle.failed": "error",
    "cycle.busy": "warning",
    "cycle.missed": "warning",
    "cycle.abandoned": "warning",
    "prune.done": "info",
    "prune.failed": "error",
    "verify.done": "info",
    "verify.damage": "error",
    "verify.failed": "error",
    "retain.done": "info",
    "retain.missing": "error",
    "retain.failed": "error",
    "drill.done": "info",
    "drill.failed": "error",
    "gc.done": "info",
    "gc.failed": "error",
    "metrics.failed": "warning",
    "digest.failed": "warning",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``fields`` are values of JSON, and times."""

    name: str
    at: datetime
    vm: str | None
    fields: Mapping[str, object]

    @property
    def level(self) -> Level:
        """How much it matters."""
        return LEVELS[self.name]

    def document(self) -> dict[str, object]:
        """Return the line: time, level, event and vm come first."""
        head: dict[str, object] = {"time": self.at, "level": self.level, "event": self.name}
        return {**head, **({} if self.vm is None else {"vm": self.vm}), **self.fields}


Tell: TypeAlias = Callable[[Event], None]


def problem(error: BaseException) -> dict[str, object]:
    """Return what an event says of an error: the type, one sentence, what can be done, and what is concerned."""
    if not isinstance(error, (GodwitError, DiskError, ConversionError)):
        return {"error": "UnexpectedError", "message": f"unexpected {type(error).__name__}: {error}", "hint": None}
    concerned = {name: getattr(error, name, None) for name in ("key", "path")}
    return {
        "error": type(error).__name__,
        "message": str(error),
        "hint": error.hint,
        **{name: value for name, value in concerned.items() if value is not None},
    }
