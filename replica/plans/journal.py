"""The journal of a run in the store: what was intended and what became of it, created entry by entry.

The entries' numbers have no gaps, and each is created by whoever has read all before it, so that of two operators one
meets an existing object, and stops (docs/format.md, 8). Nothing is ever replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Protocol

from replica import record
from replica.errors import (
    IntegrityError,
    LeaseHeldError,
    LeaseLostError,
    ObjectExistsError,
    ObjectMissingError,
    UsageError,
)
from replica.host import Host
from replica.keys import PlanKeys, point_of
from replica.lease import Holder
from replica.plans.model import Plan, RunKind
from replica.record import Fields
from replica.stores.store import Store

RUN_KIND: Final = "plan-run"
ENTRY_KIND: Final = "plan-entry"
TERM: Final = timedelta(minutes=5)
ALIVE_AFTER_SECONDS: Final = 60.0
MOST_ENTRIES: Final = 1_000_000
LONGEST_DETAIL: Final = 1000


class What(StrEnum):
    """What an entry says."""

    TAKEN = "taken"
    ALIVE = "alive"
    STOPPED = "stopped"
    ENDED = "ended"
    GIVEN_UP = "given-up"
    INTENDED = "intended"
    SETTLED = "settled"


class Result(StrEnum):
    """What became of a step."""

    DONE = "done"
    FAILED = "failed"
    LEFT_OUT = "left-out"  # what it needs did not go well
    SKIPPED = "skipped"  # an operator said so
    REDO = "redo"  # an operator said that it may be done again


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step. ``begun`` false: it is certain that nothing of it was done."""

    result: Result
    detail: str = ""
    begun: bool = True
    seconds: float = 0.0
    machine: str | None = None
    point: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry."""

    number: int
    at: datetime
    holder: Holder
    what: What
    step: str = ""
    detail: str = ""
    attempt: int = 0
    machine: str | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """How a run was begun. ``points``: of the VMs whose point was chosen beforehand."""

    run: int
    plan: str
    kind: RunKind
    begun_at: datetime
    document: str
    sha256: str
    points: Mapping[str, int] = field(default_factory=dict)
    host_name: str = ""


@dataclass(slots=True)
class StepState:
    """What is known of a step. ``outcome`` None with ``attempts``: nobody knows what became of the last."""

    attempts: int = 0
    outcome: Outcome | None = None
    machines: list[str] = field(default_factory=list)  # names that tests were given, the last one last
    settled_at: datetime | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether it was begun, and nobody knows how it ended."""
        return self.attempts > 0 and self.outcome is None


@dataclass(slots=True)
class RunState:
    """What a journal says, all in all. ``ending`` is the last entry's, where it ends or interrupts the run."""

    entries: int = 0
    steps: dict[str, StepState] = field(default_factory=dict)
    holder: Holder | None = None
    heard_at: datetime | None = None
    ending: What | None = None
    detail: str = ""

    def step(self, step_id: str) -> StepState:
        """Return what is known of a step."""
        return self.steps.setdefault(step_id, StepState())

    def take(self, entry: Entry) -> None:
        """Take note of the next entry."""
        self.entries = entry.number
        self.holder, self.heard_at = entry.holder, entry.at
        self.ending = entry.what if entry.what in (What.STOPPED, What.ENDED, What.GIVEN_UP) else None
        self.detail = entry.detail
        if entry.what is What.INTENDED:
            state = self.step(entry.step)
            state.attempts = max(state.attempts + 1, entry.attempt)
            state.outcome = None
            if entry.machine is not None and entry.machine not in state.machines[-1:]:
                state.machines.append(entry.machine)
        elif entry.what is What.SETTLED and entry.outcome is not None:
            redo = entry.outcome.result is Result.REDO
            self.step(entry.step).outcome = None if redo else entry.outcome
            self.step(entry.step).settled_at = entry.at
            if redo:
                self.step(entry.step).attempts = 0

    def is_held(self, now: datetime) -> bool:
        """Whether somebody is at work on it, as far as its entries tell."""
        return self.heard_at is not None and self.ending is None and self.heard_at + TERM > now


class Journal(Protocol):
    """Where a run is written down."""

    @property
    def state(self) -> RunState:
        """What it says so far."""

    def append(
        self,
        what: What,
        *,
        step: str = "",
        detail: str = "",
        machine: str | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        """Add an entry. Raises LeaseLostError where another operator took the run over, StoreError."""


class MemoryJournal:
    """A run that nobody goes on with: a drill's."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.state = RunState()
        self._holder = _holder(host)

    def append(
        self,
        what: What,
        *,
        step: str = "",
        detail: str = "",
        machine: str | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        """Add an entry."""
        attempt = self.state.step(step).attempts + 1 if what is What.INTENDED else 0
        now = self._host.clock.now()
        self.state.take(Entry(self.state.entries + 1, now, self._holder, what, step, detail, attempt, machine, outcome))


class StoredJournal:
    """The journal of one run as one operator writes it on."""

    def __init__(self, store: Store, host: Host, keys: PlanKeys, run: int, state: RunState) -> None:
        self._store = store
        self._host = host
        self._keys = keys
        self.run = run
        self.state = state
        self._holder = _holder(host)

    def append(
        self,
        what: What,
        *,
        step: str = "",
        detail: str = "",
        machine: str | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        """Add an entry. Raises LeaseLostError where another operator took the run over, StoreError."""
        attempt = self.state.step(step).attempts + 1 if what is What.INTENDED else 0
        entry = Entry(0, self._host.clock.now(), self._holder, what, step, detail, attempt, machine, outcome)
        while True:
            made = replace(entry, number=self.state.entries + 1)
            key = self._keys.entry(self.run, made.number)
            try:
                self._store.create(key, _encode(self.run, made))
            except ObjectExistsError as error:
                there = _decode(self._store.get(key), key=key, run=self.run, number=made.number)
                if there.holder != self._holder:
                    raise LeaseLostError(
                        "another operator took this run of the plan over; nothing more was begun here",
                        key=key,
                        hint=f"'godwit plan status {self._keys.plan}' says who, and how it stands",
                    ) from error
                self.state.take(there)  # our own, of which an interruption kept us from hearing
                if replace(there, at=made.at) == made:
                    return
            else:
                self.state.take(made)
                return


def begin(store: Store, host: Host, keys: PlanKeys, plan: Plan, kind: RunKind, points: Mapping[str, int]) -> Header:
    """Make a new run. Raises LeaseHeldError where another operator begins one at the same moment."""
    number = latest(store, keys) + 1
    header = Header(number, plan.name, kind, host.clock.now(), plan.text, plan.sha256, dict(points), host.host_name)
    body = {
        "plan": header.plan,
        "run": number,
        "kind": kind.value,
        "begun_at": record.time_text(header.begun_at),
        "holder": _encode_holder(_holder(host)),
        "document": header.document,
        "sha256": header.sha256,
        "points": dict(points),
    }
    try:
        store.create(keys.run(number), record.encode(RUN_KIND, body))
    except ObjectExistsError as error:
        raise LeaseHeldError(
            f"another operator began run {number} of the plan {plan.name} at the same moment", hint="see what it does"
        ) from error
    return header


def latest(store: Store, keys: PlanKeys) -> int:
    """Return the number of the newest run, 0 where there is none."""
    numbers = (point_of(info.key) for info in store.list(keys.runs))
    return max((one for one in numbers if one is not None), default=0)


def header(store: Store, keys: PlanKeys, run: int) -> Header:
    """Return how a run was begun. Raises UsageError where there is none, IntegrityError."""
    key = keys.run(run)
    try:
        body = record.decode(RUN_KIND, store.get(key), key=key)
    except ObjectMissingError as error:
        raise UsageError(f"the plan {keys.plan} has no run {run}") from error
    if body.integer("run", least=1) != run or body.text("plan") != keys.plan:
        raise IntegrityError("the run is another than its key says: objects were mixed up", key=key)
    points = body.fields("points")
    return Header(
        run,
        keys.plan,
        _one_of(RunKind, body, "kind"),
        body.time("begun_at"),
        body.text("document"),
        body.text("sha256"),
        {name: points.integer(name, least=1) for name in points.values},
        _decode_holder(body).host_name,
    )


def read(store: Store, keys: PlanKeys, run: int) -> RunState:
    """Return what the journal of a run says. Raises IntegrityError where an entry is damaged or missing."""
    state = RunState()
    for info in store.list(keys.journal(run)):
        _take(store, keys, run, info.key, state)
    while True:  # what a listing did not have yet
        try:
            _take(store, keys, run, keys.entry(run, state.entries + 1), state)
        except ObjectMissingError:
            return state


def ended_at(store: Store, keys: PlanKeys, run: int, last: int) -> datetime | None:
    """Return when a run ended or was given up, by its ``last`` entry; None where that is not what it says.

    Raises IntegrityError, FormatVersionError, ObjectMissingError.
    """
    key = keys.entry(run, last)
    entry = _decode(store.get(key), key=key, run=run, number=last)
    return entry.at if entry.what in (What.ENDED, What.GIVEN_UP) else None


def _take(store: Store, keys: PlanKeys, run: int, key: str, state: RunState) -> None:
    if key != keys.entry(run, state.entries + 1) or state.entries >= MOST_ENTRIES:
        raise IntegrityError(
            "an entry of the run's journal is missing", key=keys.entry(run, state.entries + 1),
            hint="give the run up with 'godwit plan run --anew', and see what its machines are by 'godwit status'",
        )  # fmt: skip
    state.take(_decode(store.get(key), key=key, run=run, number=state.entries + 1))


def take_over(store: Store, host: Host, keys: PlanKeys, run: int, *, sole_on_host: bool) -> StoredJournal:
    """Take a run, to write its journal on. Raises LeaseHeldError where another operator is at work on it.

    ``sole_on_host``: no other process of this machine works on the plan, so that whoever did so here is gone.
    """
    state = read(store, keys, run)
    holder = state.holder
    here = holder is not None and holder.host_id == host.host_id and sole_on_host
    if state.is_held(host.clock.now()) and not here:
        assert holder is not None and state.heard_at is not None
        until = state.heard_at + TERM
        raise LeaseHeldError(
            f"{holder.host_name} is at work on run {run} of the plan {keys.plan}, and was heard of last at "
            f"{state.heard_at:%H:%M:%S} UTC",
            hint=f"if that machine is gone, the run can be gone on with after {until:%H:%M:%S} UTC",
        )
    journal = StoredJournal(store, host, keys, run, state)
    try:
        journal.append(What.TAKEN)
    except LeaseLostError as error:
        raise LeaseHeldError(
            f"another operator took run {run} of the plan {keys.plan} at the same moment", hint="see what it does"
        ) from error
    return journal


# -- entries ----------------------------------------------------------------------------------------------------------


def _holder(host: Host) -> Holder:
    return Holder(host.host_id, host.host_name, os.getpid(), host.randomness.new_id())


def _encode_holder(holder: Holder) -> dict[str, Any]:
    return {
        "host_id": holder.host_id,
        "host_name": holder.host_name,
        "process": holder.process,
        "nonce": holder.nonce,
    }


def _decode_holder(body: Fields) -> Holder:
    fields = body.fields("holder")
    return Holder(fields.text("host_id"), fields.text("host_name"), fields.integer("process"), fields.text("nonce"))


def _encode(run: int, entry: Entry) -> bytes:
    body: dict[str, Any] = {
        "run": run,
        "entry": entry.number,
        "at": record.time_text(entry.at),
        "holder": _encode_holder(entry.holder),
        "what": entry.what.value,
        "detail": _clean(entry.detail),
    }
    if entry.step:
        body |= {"step": entry.step, "attempt": entry.attempt, "machine": entry.machine}
    if entry.outcome is not None:
        one = entry.outcome
        body |= {
            "result": one.result.value,
            "begun": one.begun,
            "detail": _clean(one.detail),
            "seconds": round(one.seconds, 3),
            "machine": one.machine,
            "point": one.point,
        }
    return record.encode(ENTRY_KIND, body)


def _clean(text: str) -> str:
    return text[:LONGEST_DETAIL].encode("utf-8", "backslashreplace").decode()


def _decode(data: bytes, *, key: str, run: int, number: int) -> Entry:
    body = record.decode(ENTRY_KIND, data, key=key)
    if (body.integer("run"), body.integer("entry")) != (run, number):
        raise IntegrityError("the entry is another than its key says: objects were mixed up", key=key)
    what = _one_of(What, body, "what")
    detail = body.optional_text("detail") or ""
    if what not in (What.INTENDED, What.SETTLED):
        return Entry(number, body.time("at"), _decode_holder(body), what, detail=detail)
    machine = body.optional_text("machine")
    outcome = None
    if what is What.SETTLED:
        point = None if body.values.get("point") is None else body.integer("point", least=1)
        result = _one_of(Result, body, "result")
        outcome = Outcome(result, detail, body.truth("begun"), body.number("seconds"), machine, point)
    attempt = body.integer("attempt")
    at, holder, step = body.time("at"), _decode_holder(body), body.text("step")
    return Entry(number, at, holder, what, step, detail, attempt, machine, outcome)


def _one_of(kind: Any, body: Fields, field_name: str) -> Any:
    try:
        return kind(body.text(field_name))
    except ValueError as error:
        known: Iterable[str] = (one.value for one in kind)
        raise IntegrityError(
            f"field {field_name!r} should be one of {', '.join(known)}", key=body.key, hint="is there a newer godwit?"
        ) from error
