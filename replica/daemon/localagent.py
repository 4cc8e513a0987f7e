"""What the agent of this machine does, from its status file: for other commands, which believe it with care."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from replica.daemon import statusfile
from replica.health.units import duration_text

HEARD_OF: Final = timedelta(seconds=90)  # an agent that runs writes its file once a minute at least
RECENT: Final = timedelta(minutes=5)  # over which the throughput is told
LARGEST: Final = 1 << 62
RUNNING: Final = "running"  # as a state of a VM


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a cycle is."""

    since: datetime | None
    phase: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LocalVm:
    """A VM as the agent of this machine sees it. ``last_*`` are of the last cycle that made a point."""

    name: str
    vm_id: str
    state: str
    failures: int
    missed: int
    error: str | None
    hint: str | None
    next_at: datetime | None
    last_at: datetime | None
    last_point: int | None
    last_stored_bytes: int
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class LocalAgent:
    """The agent of this machine, as of ``written_at``."""

    state: str
    host_name: str
    process: int
    store: str
    tenant: str
    started_at: datetime | None
    written_at: datetime
    vms: Mapping[str, LocalVm] = field(default_factory=dict)

    @property
    def states(self) -> Mapping[str, int]:
        """How many VMs are in which state."""
        return Counter(one.state for one in self.vms.values())

    def is_heard_of(self, now: datetime) -> bool:
        """Whether it runs, as far as its file tells: it says so, and has written it a moment ago."""
        return self.state in ("running", "stopping") and now - self.written_at <= HEARD_OF

    def stored_bytes_per_second(self, now: datetime) -> float:
        """Return what the cycles of the last five minutes stored, a second: one for each VM at the most."""
        recent = (
            one.last_stored_bytes
            for one in self.vms.values()
            if one.last_at is not None and timedelta(0) <= now - one.last_at <= RECENT
        )
        return sum(recent) / RECENT.total_seconds()


def read(folder: Path | None, store_url: str | None, tenant: str) -> LocalAgent | None:
    """Return this machine's agent of that store and tenant; None where its file is not there, or of another."""
    told = None if folder is None else statusfile.read(folder)
    if told is None or (told.get("store"), told.get("tenant")) != (store_url, tenant):
        return None
    written_at = _moment(told.get("written_at"))
    if written_at is None:
        return None
    vms = told.get("vms")
    return LocalAgent(
        state=_text(told.get("state")),
        host_name=_text(told.get("host_name")),
        process=_count(told.get("process")),
        store=_text(told.get("store")),
        tenant=_text(told.get("tenant")),
        started_at=_moment(told.get("started_at")),
        written_at=written_at,
        vms={
            name: _vm(name, one)
            for name, one in (vms if isinstance(vms, dict) else {}).items()
            if isinstance(one, dict)
        },
    )


def _vm(name: str, told: Mapping[str, Any]) -> LocalVm:
    error, last = _table(told.get("error")), _table(told.get("last"))
    point = last.get("point")
    state = _text(told.get("state"))
    return LocalVm(
        name=name,
        vm_id=_text(told.get("vm_id")),
        state=state,
        failures=_count(told.get("failures")),
        missed=_count(told.get("missed")),
        error=_text(error.get("message")) or None,
        hint=_text(error.get("hint")) or None,
        next_at=_moment(told.get("next_at")),
        last_at=_moment(last.get("at")),
        last_point=_count(point) if point is not None else None,
        last_stored_bytes=_count(last.get("stored_bytes")),
        progress=_progress(told.get("progress")) if state == RUNNING else None,
    )


def _progress(told: object) -> Progress | None:
    if not isinstance(told, dict):
        return None
    return Progress(
        _moment(told.get("since")),
        _text(told.get("phase")),
        _count(told.get("done_bytes")),
        _count(told.get("total_bytes")),
    )


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST else 0


def _moment(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
        return None if found is None or found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def document(agent: LocalAgent, now: datetime, name: str | None = None) -> dict[str, Any]:
    """Return what there is to say in terms of JSON (times as they are), of one VM or of all."""
    one = None if name is None else agent.vms.get(name)
    told: dict[str, Any] = {
        "running": agent.is_heard_of(now),
        "state": agent.state,
        "process": agent.process,
        "written_at": agent.written_at,
    }
    if name is None:
        return {**told, "vms": len(agent.vms), "states": dict(agent.states)}
    return {**told, "vm": one}


def sentence(agent: LocalAgent, now: datetime, name: str | None = None) -> str:
    """Return what the agent does, for one VM or for all."""
    ago = duration_text(max(0.0, (now - agent.written_at).total_seconds()))
    if not agent.is_heard_of(now):
        said = "it was stopped" if agent.state == "stopped" else "it did not say that it ends"
        return f"not running: last heard of {ago} ago, {said}"
    if name is None:
        states = ", ".join(f"{count} {state}" for state, count in sorted(agent.states.items()))
        return f"running, seen {ago} ago; {states or 'no VMs'}"
    one = agent.vms.get(name)
    if one is None:
        return f"running, seen {ago} ago; it does not look after this VM"
    return f"running, seen {ago} ago; {_doing(one, now)}"


def _doing(one: LocalVm, now: datetime) -> str:
    parts = [one.state]
    if one.progress is not None and one.progress.total_bytes:
        done = 100 * one.progress.done_bytes // one.progress.total_bytes
        parts[0] += f" ({one.progress.phase} {done} %)"
    if one.next_at is not None:
        seconds = (one.next_at - now).total_seconds()
        parts.append(f"next turn {f'in {duration_text(seconds)}' if seconds > 0 else 'now'}")
    if one.error is not None:
        parts.append(f"last failure ({one.failures} in a row): {one.error}")
    return ", ".join(parts)
