"""Runs steps: each once all before it is settled, several at the same time, the intent written before the deed.

Only the thread that runs the engine writes the journal. Deeds are done by threads of their own, which end with the
process: whatever it dies of, the journal tells what was begun.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from conversion.errors import ConversionError
from replica.errors import GodwitError, UsageError
from replica.host import Host
from replica.plans.deeds import Deeds
from replica.plans.graph import Step, StepKind
from replica.plans.journal import ALIVE_AFTER_SECONDS, Journal, Outcome, Result, RunState, What
from replica.plans.model import OnFailure
from vhdx.errors import DiskError

POLL_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 30.0  # that an action has beyond its own time to tell that it is up
MOST_THREADS: Final = 256


class Mark(StrEnum):
    """What is told of a step."""

    BEGUN = "begun"
    PROGRESS = "progress"
    SETTLED = "settled"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Told:
    """Something that happened in a run, for whoever watches."""

    mark: Mark
    step: Step | None = None
    text: str = ""
    result: Result | None = None
    done_bytes: int = 0
    total_bytes: int = 0


Watch: TypeAlias = Callable[[Told], None]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run stands when the engine ends. ``stopped`` is why there is something left to do, None where nothing is.

    ``failed`` are steps that failed, ``left_out`` those that were not done because of that.
    """

    stopped: str | None
    failed: tuple[Step, ...]
    left_out: tuple[Step, ...]
    interrupted: bool = False

    @property
    def went_well(self) -> bool:
        """Whether all was done."""
        return self.stopped is None and not self.failed and not self.left_out


def silent(told: Told) -> None:
    """Watch nothing."""


def doubtful(steps: Iterable[Step], state: RunState) -> tuple[Step, ...]:
    """Return the steps that cannot be repeated, and of which nobody knows whether, or how far, they were done."""
    found = []
    for one in steps:
        known = state.steps.get(one.id)
        if known is None or one.repeatable:
            continue
        outcome = known.outcome
        half_done = outcome is not None and outcome.result is Result.FAILED and outcome.begun
        if known.is_unknown or (half_done and one.on_failure is OnFailure.STOP):
            found.append(one)
    return tuple(found)


class Engine:
    """A run that goes on from where its journal says that it stands."""

    def __init__(
        self,
        steps: Sequence[Step],
        journal: Journal,
        deeds: Deeds,
        host: Host,
        watch: Watch = silent,
        *,
        ends: bool = True,
    ) -> None:
        self._steps = {one.id: one for one in steps}
        self._journal = journal
        self._deeds = deeds
        self._host = host
        self._watch = watch
        self._ends = ends
        self._results: dict[str, Result] = {}
        self._under_way: dict[str, float] = {}  # since when, by the host's clock
        self._answers: queue.SimpleQueue[tuple[Step, Outcome | BaseException]] = queue.SimpleQueue()
        self._why: str | None = None
        self._interrupted = False
        self._heard = host.clock.monotonic()
        for one in steps:
            known = journal.state.steps.get(one.id)
            if known is not None and known.outcome is not None:
                settled = known.outcome.result
                goes_on = settled is Result.FAILED and one.on_failure is OnFailure.CONTINUE
                if settled in (Result.DONE, Result.SKIPPED) or goes_on:
                    self._results[one.id] = settled

    def run(self) -> Ran:
        """Do all that is left. Raises UsageError where that would repeat what must not be, and what the store raises.

        KeyboardInterrupt lets what is under way end, and begins nothing more; a second one leaves at once.
        """
        self._refuse_doubtful()
        while True:
            try:
                if self._why is None:
                    self._advance()
                if not self._under_way:
                    return self._end()
                self._await()
            except KeyboardInterrupt:
                if self._interrupted:
                    raise
                self._interrupted = True
                self._why = "it was interrupted"
                self._deeds.give_up_waiting()
                self._watch(Told(Mark.LEAVING, text="what is under way is let end; once more to leave it"))

    def _refuse_doubtful(self) -> None:
        steps = doubtful(self._steps.values(), self._journal.state)
        if not steps:
            return
        self._journal.append(What.STOPPED, detail="an operator has to say what became of actions")
        names = ", ".join(f"{one.id} ({one.title})" for one in steps)
        first = steps[0].id
        raise UsageError(
            f"nobody knows whether these were done, and they are not to be done twice: {names}",
            hint=f"look whether they were; then say --skip {first} if it was, --redo {first} if it may be done (again)",
        )

    # -- what can be done

    def _advance(self) -> None:
        """Begin all that can be, and settle what is to be left out."""
        moved = True
        while moved and self._why is None:
            moved = False
            for one in self._steps.values():
                if one.id in self._results or one.id in self._under_way:
                    continue
                if not all(name in self._results for name in (*one.needs, *one.follows) if name in self._steps):
                    continue
                if not all(self._is_good(name) for name in one.needs):
                    lacking = ", ".join(name for name in one.needs if not self._is_good(name))
                    self._settle(one, Outcome(Result.LEFT_OUT, f"it needs {lacking}", begun=False))
                    moved = True
                elif self._has_room(one):
                    self._begin(one)

    def _is_good(self, step_id: str) -> bool:
        result = self._results.get(step_id)
        if result is Result.FAILED:  # it goes on, or nobody would ask
            return self._steps[step_id].kind in (StepKind.ACTION, StepKind.CHECK)
        return result in (Result.DONE, Result.SKIPPED)

    def _has_room(self, step: Step) -> bool:
        if len(self._under_way) >= MOST_THREADS:
            return False
        beside = sum(self._steps[one].group == step.group and self._steps[one].at_once > 0 for one in self._under_way)
        return not step.at_once or beside < step.at_once

    def _begin(self, step: Step) -> None:
        machine = self._deeds.machine_for(step, self._journal.state.step(step.id))
        self._append(What.INTENDED, step=step.id, machine=machine)
        self._under_way[step.id] = self._host.clock.monotonic()
        self._watch(Told(Mark.BEGUN, step, step.title))
        threading.Thread(target=self._do, args=(step, machine), name=step.id, daemon=True).start()

    def _do(self, step: Step, machine: str | None) -> None:
        def progress(done_bytes: int, total_bytes: int, phase: str) -> None:
            self._watch(Told(Mark.PROGRESS, step, phase, None, done_bytes, total_bytes))

        try:
            answer: Outcome | BaseException = self._deeds.do(step, machine, progress)
        except (GodwitError, ConversionError, DiskError) as error:
            hint = getattr(error, "hint", None)
            answer = Outcome(Result.FAILED, f"{error}; {hint}" if hint else str(error), machine=machine)
        except BaseException as error:  # raised again by the thread that runs the engine
            answer = error
        self._answers.put((step, answer))

    # -- what became of it

    def _await(self) -> None:
        try:
            step, answer = self._answers.get(timeout=POLL_SECONDS)
        except queue.Empty:
            self._look_at_clocks()
            return
        if isinstance(answer, BaseException):
            raise answer
        if step.id in self._under_way:  # else its time was up before
            self._settle(step, answer)

    def _look_at_clocks(self) -> None:
        now = self._host.clock.monotonic()
        for name, since in list(self._under_way.items()):
            step = self._steps[name]
            allowed = step.timeout_seconds + (GRACE_SECONDS if step.kind is StepKind.ACTION else 0)
            if now - since > allowed:
                self._settle(step, Outcome(Result.FAILED, f"it did not end within {step.timeout_seconds:.0f} s"))
        if self._under_way and now - self._heard >= ALIVE_AFTER_SECONDS:
            self._append(What.ALIVE)

    def _settle(self, step: Step, outcome: Outcome) -> None:
        since = self._under_way.pop(step.id, None)
        if since is not None:
            seconds = self._host.clock.monotonic() - since
            outcome = Outcome(
                outcome.result, outcome.detail, outcome.begun, seconds, outcome.machine, outcome.point
            )  # fmt: skip
        self._results[step.id] = outcome.result
        known = self._journal.state.step(step.id).outcome
        if known is None or known.result is not outcome.result or since is not None:
            self._append(What.SETTLED, step=step.id, outcome=outcome)
        self._watch(Told(Mark.SETTLED, step, outcome.detail, outcome.result))
        if outcome.result is Result.FAILED and step.on_failure is OnFailure.STOP and self._why is None:
            self._why = f"{step.title}: {outcome.detail}"

    def _append(
        self, what: What, *, step: str = "", machine: str | None = None, outcome: Outcome | None = None
    ) -> None:
        self._journal.append(what, step=step, machine=machine, outcome=outcome)
        self._heard = self._host.clock.monotonic()

    def _end(self) -> Ran:
        failed = tuple(one for one in self._steps.values() if self._results.get(one.id) is Result.FAILED)
        left_out = tuple(one for one in self._steps.values() if self._results.get(one.id) is Result.LEFT_OUT)
        if len(self._results) == len(self._steps):  # though it was interrupted, or told to stop, there is nothing left
            stops = [one for one in failed if one.on_failure is OnFailure.STOP]
            if not stops:
                self._why, self._interrupted = None, False
        if self._why is not None:
            self._journal.append(What.STOPPED, detail=self._why)
        elif self._ends:
            told = f"{len(failed)} steps failed, {len(left_out)} were left out" if failed or left_out else ""
            self._journal.append(What.ENDED, detail=told)
        return Ran(self._why, failed, left_out, self._interrupted)
