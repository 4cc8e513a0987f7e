"""Progress of a long command on stderr: a bar with bytes, rate and time left on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Protocol, Self

from cli.sizes import human_size

if TYPE_CHECKING:
    from cli.output import Output

LINE_INTERVAL_SECONDS = 2.0
_BAR_INTERVAL_SECONDS = 0.1


class ProgressReport(Protocol):
    """A context manager that is called with (done_bytes, total_bytes, phase): a ``vhdx.progress.Progress``."""

    def __call__(self, done_bytes: int, total_bytes: int, phase: str) -> None:
        """Take note of the state."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def report(output: Output, title: str) -> ProgressReport:
    """Return the report that suits where stderr goes: nothing when quiet, a bar on a terminal, otherwise lines."""
    if output.quiet:
        return SilentReport()
    if output.shows_progress_bar():
        return BarReport(output, title)
    return LineReport(output, title)


class SilentReport:
    """Says nothing."""

    def __call__(self, done_bytes: int, total_bytes: int, phase: str) -> None:
        """Ignore the call."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class LineReport:
    """A JSON object a line: every few seconds, and the last state of each phase."""

    def __init__(self, output: Output, title: str) -> None:
        self._output = output
        self._title = title
        self._last: tuple[int, int, str] | None = None
        self._phase_started_seconds = 0.0
        self._written_seconds = 0.0
        self._unwritten = False

    def __call__(self, done_bytes: int, total_bytes: int, phase: str) -> None:
        """Note the state, and write it if the last line is old enough or a phase has ended."""
        now_seconds = time.monotonic()
        if self._last is None or self._last[2] != phase:
            self._finish_phase()
            self._phase_started_seconds = self._written_seconds = now_seconds
        self._last = (done_bytes, total_bytes, phase)
        self._unwritten = True
        if now_seconds - self._written_seconds >= LINE_INTERVAL_SECONDS:
            self._write(now_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finish_phase()

    def _finish_phase(self) -> None:
        if self._unwritten:
            self._write(time.monotonic())

    def _write(self, now_seconds: float) -> None:
        assert self._last is not None
        done_bytes, total_bytes, phase = self._last
        elapsed_seconds = now_seconds - self._phase_started_seconds
        rate = done_bytes / elapsed_seconds if elapsed_seconds > 0 else 0.0
        line: dict[str, object] = {
            "progress": self._title,
            "phase": phase,
            "done_bytes": done_bytes,
            "total_bytes": total_bytes or None,
            "bytes_per_second": int(rate),
            "seconds_left": round((total_bytes - done_bytes) / rate) if rate and total_bytes >= done_bytes else None,
        }
        self._output.stderr.write(json.dumps(line) + "\n")
        self._output.stderr.flush()
        self._written_seconds = now_seconds
        self._unwritten = False


class BarReport:
    """One bar that is redrawn in place; it appears with the first call and stays, complete, for the last phase."""

    def __init__(self, output: Output, title: str) -> None:
        from rich.progress import (  # noqa: PLC0415 - only a terminal needs it
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text  # noqa: PLC0415

        class Rate(ProgressColumn):
            """The rate in the binary units that everything else is shown in."""

            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{human_size(int(speed))}/s" if speed else "")

        self._title = title
        self._phase: str | None = None
        self._drawn_seconds = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=output.console(output.stderr),
            refresh_per_second=10,
        )
        self._task = self._bar.add_task(title, total=None, visible=False)

    def __call__(self, done_bytes: int, total_bytes: int, phase: str) -> None:
        """Move the bar; a new phase starts the rate anew."""
        now_seconds = time.monotonic()
        ended = total_bytes > 0 and done_bytes >= total_bytes
        if phase != self._phase:
            self._phase = phase
            self._bar.reset(self._task, total=total_bytes or None, description=f"{self._title}: {phase}", visible=True)
        elif now_seconds - self._drawn_seconds < _BAR_INTERVAL_SECONDS and not ended:
            return
        self._drawn_seconds = now_seconds
        self._bar.update(self._task, completed=done_bytes, total=total_bytes or None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
