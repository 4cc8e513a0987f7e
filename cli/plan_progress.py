"""What a run of a plan says along the way: lines and bars for each step on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol, Self

import click

from cli.output import Output, escape
from cli.progress import LINE_INTERVAL_SECONDS
from cli.sizes import human_size
from replica.plans.engine import Mark, Told
from replica.plans.model import ActionKind

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class PlanReport(Protocol):
    """A context manager that is told what happens in a run, and asks its questions."""

    def __call__(self, told: Told) -> None:
        """Take note of it; any thread may call."""

    def ask(self, question: str) -> bool | None:
        """Ask a person; None where there is nobody."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def report(output: Output, name: str, *, confirm_all: bool = False) -> PlanReport:
    """Return the report that suits where stderr goes. ``confirm_all``: every question is answered with yes."""
    if output.shows_progress_bar() and not output.quiet:
        return BarsReport(output, confirm_all=confirm_all)
    return LinesReport(output, name, confirm_all=confirm_all)


def _asked(output: Output, question: str, *, confirm_all: bool) -> bool | None:
    if confirm_all:
        output.note(f"{question} yes, as --confirm-all says")
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return bool(click.confirm(escape(question), err=True))


class LinesReport:
    """A JSON object a line; nothing when quiet."""

    def __init__(self, output: Output, name: str, *, confirm_all: bool) -> None:
        self._output = output
        self._name = name
        self._confirm_all = confirm_all
        self._lock = threading.Lock()
        self._written: dict[str, float] = {}

    def __call__(self, told: Told) -> None:
        """Write a line; of progress one every few seconds for each step."""
        if self._output.quiet:
            return
        step = told.step
        with self._lock:
            now = time.monotonic()
            if told.mark is Mark.PROGRESS and step is not None:
                if now - self._written.get(step.id, 0.0) < LINE_INTERVAL_SECONDS:
                    return
                self._written[step.id] = now
            line: dict[str, object] = {
                "plan": self._name,
                "event": told.mark.value,
                "step": None if step is None else step.id,
                "vm": None if step is None or not step.vm else step.vm,
                "text": told.text,
                "result": None if told.result is None else told.result.value,
            }
            if told.mark is Mark.PROGRESS:
                line |= {"done_bytes": told.done_bytes, "total_bytes": told.total_bytes or None}
            self._output.stderr.write(json.dumps(line) + "\n")
            self._output.stderr.flush()

    def ask(self, question: str) -> bool | None:
        """Ask a person."""
        return _asked(self._output, question, confirm_all=self._confirm_all)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class BarsReport:
    """A line for each step under way that moves, and one that stays for each that is settled."""

    def __init__(self, output: Output, *, confirm_all: bool) -> None:
        from rich.progress import (  # noqa: PLC0415 - only a terminal needs it
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._output = output
        self._confirm_all = confirm_all
        self._asking = threading.Lock()
        self._console = output.console(output.stderr)
        self._bars: Progress = Progress(
            SpinnerColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, told: Told) -> None:
        """Move the bars, and write what is settled above them."""
        step = told.step
        if step is None:
            self._console.print(escape(told.text))
        elif told.mark is Mark.BEGUN:
            if step.action is not None and step.action.kind is ActionKind.CONFIRM:
                return  # it is on the screen as a question
            self._bars.start()  # not before: until then a passphrase may be asked for
            self._tasks[step.id] = self._bars.add_task(escape(step.title), total=None)
        elif told.mark is Mark.PROGRESS and step.id in self._tasks:
            of = f" of {human_size(told.total_bytes)}" if told.total_bytes else ""
            much = f" {human_size(told.done_bytes)}{of}" if told.done_bytes else ""
            self._bars.update(self._tasks[step.id], description=escape(f"{step.title}: {told.text}{much}"))
        elif told.mark is Mark.SETTLED:
            task = self._tasks.pop(step.id, None)
            if task is not None:
                self._bars.remove_task(task)
            result = "" if told.result is None else told.result.value
            self._console.print(escape(f"{result:>8}  {step.title}{f': {told.text}' if told.text else ''}"))

    def ask(self, question: str) -> bool | None:
        """Ask a person, with the bars out of the way."""
        with self._asking:  # one question at a time
            self._bars.stop()
            try:
                return _asked(self._output, question, confirm_all=self._confirm_all)
            finally:
                if self._tasks:
                    self._bars.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()
