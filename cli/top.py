"""godwit top: a live view of the VMs and of what this machine's agent does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from cli.output import Output, escape, output_options
from cli.session import Duration, Session, duration_text, store_options
from cli.sizes import human_size
from replica.daemon import localagent
from replica.errors import StoreUnavailableError
from replica.health.board import Board, Row, Sorting, board
from replica.health.gathering import Gatherer
from replica.health.report import HealthReport, judged
from replica.health.rules import Severity

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

DIRECT_FOR = timedelta(minutes=1)  # how long what was looked at directly is shown
LEAST_ROWS = 3
NARROW = 100  # columns
_STYLE = {Severity.NORMAL: "green", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}


@click.command()
@click.option(
    "--sort",
    "sorting",
    type=click.Choice([one.value for one in Sorting]),
    default=Sorting.HEALTH.value,
    show_default=True,
    help="What comes first: the gravest, the oldest newest point, the latest for its interval, …",
)
@click.option("--interval", type=Duration(), help="Between two looks at the store, 1s or more.  [default: 5s]")
@click.option("--once", is_flag=True, help="Print one frame, and end.")
@store_options
@output_options
def top(output: Output, sorting: str, interval: int | None, once: bool, *, session: Session) -> int | None:
    """Watch the VMs: their health, what their RPO is and should be, and what this machine's agent is doing.

    Agents' digests are read, and again only where they changed. It runs until Ctrl-C. Without a terminal, and with
    --json, one frame is printed.
    """
    seconds = max(1, interval or 5)
    store = session.store()
    gatherer = Gatherer(store, session.host, session.configuration.tenant, direct_for=DIRECT_FOR)
    watching = _Watching(session, gatherer, Sorting(sorting))
    made = watching.look()
    if output.json or once or not output.stdout.isatty():
        output.show(_document(made), lambda: _print_once(output, made, session))
        return None
    try:
        _watch(output, session, watching, made, seconds)
    except KeyboardInterrupt:  # the way to end it
        return None
    return None


class _Watching:
    """Looks again and again, and keeps the last frame while the store does not answer."""

    def __init__(self, session: Session, gatherer: Gatherer, sorting: Sorting) -> None:
        self._session = session
        self._gatherer = gatherer
        self._sorting = sorting
        self._last: HealthReport | None = None

    def look(self) -> Board:
        """Return the next frame. Raises what keeps the first one from being made."""
        problem = None
        try:
            self._last = judged(self._gatherer.gather(), self._session.host)
        except StoreUnavailableError as error:
            if self._last is None:
                raise
            problem = str(error)
        configuration = self._session.configuration
        agent = localagent.read(self._session.host.state_folder, configuration.store, configuration.tenant)
        return board(self._last, agent, self._sorting, problem)


def _watch(output: Output, session: Session, watching: _Watching, made: Board, seconds: int) -> None:
    from rich.live import Live  # noqa: PLC0415 - only a terminal needs it

    frame = _Frame(made, session, seconds)
    with Live(frame, console=output.console(output.stdout), screen=True, refresh_per_second=2) as live:
        while True:
            time.sleep(seconds)
            frame.board = watching.look()
            live.refresh()


def _print_once(output: Output, made: Board, session: Session) -> None:
    console = output.console(output.stdout)
    frame = _Frame(made, session, None)
    if output.stdout.isatty():
        console.print(frame)
        return
    # Into a pipe all VMs go, and nobody has to read a width there.
    for line in frame.head():
        output.line(line.plain)
    output.table(_COLUMNS, [[cell.plain for cell in frame.cells(row)] for row in made.rows], right=(2, 3))
    for line in frame.foot(MOST_FOOT):
        output.line(line.plain)


_COLUMNS = ["VM", "health", "RPO", "wanted", "state", "next", "why"]
MOST_FOOT = 4


class _Frame:
    """One frame, laid out anew for the terminal's size whenever it is drawn."""

    def __init__(self, made: Board, session: Session, seconds: int | None) -> None:
        self.board = made
        self._session = session
        self._seconds = seconds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        height = console.size.height if self._seconds is not None else len(self.board.rows) + 12
        head, foot = self.head(), self.foot(MOST_FOOT if height >= 20 else 1)
        room = max(LEAST_ROWS, height - len(head) - len(foot) - 4)
        for line in head:
            line.truncate(width, overflow="ellipsis")
            yield line
        yield self._table(width, room)
        for line in foot:
            line.truncate(width, overflow="ellipsis")
            yield line

    def _table(self, width: int, room: int) -> RenderableType:
        from rich import box  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, width=width, expand=True
        )
        rows = self.board.rows
        shown = rows if len(rows) <= room else rows[: room - 1]
        longest = max((len(escape(row.name)) for row in shown), default=0)
        for position, column in enumerate(_COLUMNS):
            table.add_column(
                column,
                justify="right" if position in (2, 3) else "left",
                no_wrap=True,
                overflow="ellipsis",
                ratio=1 if position == 6 else None,
                # The name gets what it needs, but leaves room to say what is wrong.
                max_width=max(12, min(longest, width // 5 if width < NARROW else width // 3))
                if position == 0
                else None,
            )
        for row in shown:
            table.add_row(*self.cells(row))
        if len(shown) < len(rows):
            table.add_row(_text(f"… and {len(rows) - len(shown)} more", "dim"))
        return table

    def cells(self, row: Row) -> list[Text]:
        """Return the cells of a VM's row."""
        rpo = "none" if row.rpo_seconds is None else _span(row.rpo_seconds)
        late = "yellow" if row.late > 2 else ""
        why = row.error or ", ".join(row.why)
        return [
            _text(row.name),
            _text(row.health.value, _STYLE[row.health]),
            _text(rpo, late),
            _text(_span(row.wanted_seconds)),
            _text(_short(row.state)),
            _text("" if row.next_at is None else _span((row.next_at - self.board.at).total_seconds())),
            _text(why, "dim" if row.health is Severity.NORMAL else ""),
        ]

    def head(self) -> list[Text]:
        """Return the lines above the table."""
        made = self.board
        configuration = self._session.configuration
        line = _text("godwit top", "bold")
        line.append(f"  {made.at:%Y-%m-%d %H:%M:%S} UTC  {escape(configuration.store)}")
        line.append(f"  tenant {escape(configuration.tenant)}" if configuration.tenant != "default" else "")
        health = _text(f"{len(made.rows)} VMs: ")
        for position, severity in enumerate(reversed(Severity)):
            health.append(", " if position else "")
            count = made.health[severity]
            health.append(f"{count} {severity.value}", style=_STYLE[severity] if count else "dim")
        health.append("; " + ", ".join(f"{count} {one.value}" for one, count in made.readiness.items()))
        worst = made.worst
        rpo = _text("RPO: ")
        rpo.append(
            "none yet" if worst is None else f"{duration_text(worst.rpo_seconds or 0)} at most ({escape(worst.name)})"
        )
        rpo.append(f", {made.late} late", style="yellow" if made.late else "dim")
        if made.oldest_word_seconds is not None:
            words = f"{made.digests} digest{'s' * (made.digests != 1)}"
            rpo.append(f"; {words}, up to {duration_text(made.oldest_word_seconds)} old")
        rpo.append(f"; {made.direct} VM{'s' * (made.direct != 1)} looked at" if made.direct else "")
        lines = [line, health, rpo]
        if made.problem is not None:
            lines.append(_text(f"the store does not answer: {made.problem}", "bold red"))
        return lines

    def foot(self, most: int) -> list[Text]:
        """Return the lines below: what this machine's agent does."""
        made, agent = self.board, self.board.agent
        if agent is None:
            return [_text("no agent of this store has run on this machine", "dim")]
        seen = duration_text(max(0.0, (made.at - agent.written_at).total_seconds()))
        if agent.is_heard_of(made.at):
            states = ", ".join(f"{count} {state}" for state, count in sorted(agent.states.items()))
            rate = agent.stored_bytes_per_second(made.at)
            first = _text(f"agent here: {agent.state}, seen {seen} ago; {states or 'no VMs'}")
            first.append(f"; stores {human_size(int(rate))}/s")
        else:
            first = _text(f"agent here: not heard of for {seen} (it said: {agent.state})", "yellow")
        lines = [first]
        if made.running:
            lines.append(_text("  at work: " + ", ".join(_progress(one, made.at) for one in made.running)))
        if made.coming:
            lines.append(
                _text("  next: " + ", ".join(f"{one.name} {_until(one.next_at, made.at)}" for one in made.coming))
            )
        if made.failing:
            one = made.failing[0]
            lines.append(_text(f"  last error: {one.name} ({one.failures} in a row): {one.error}", "red"))
        return lines[:most]


def _progress(one: Any, now: datetime) -> str:
    progress = one.progress
    if progress is None:
        return str(one.name)
    share = f" {100 * progress.done_bytes // progress.total_bytes} %" if progress.total_bytes else ""
    took = f" {duration_text((now - progress.since).total_seconds())}" if progress.since is not None else ""
    return f"{one.name} ({progress.phase or 'begins'}{share}{took})"


def _span(seconds: float) -> str:
    """Return a span of time as a narrow column has room for it: 45s, 4m35s, 2h5m, 3d4h."""
    whole = max(0, int(seconds))
    for size, unit, smaller, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            left = whole % size // smaller
            return f"{whole // size}{unit}{f'{left}{rest}' if left else ''}"
    return f"{whole}s"


def _until(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return ""
    seconds = (moment - now).total_seconds()
    return f"in {duration_text(seconds)}" if seconds > 0 else "now"


def _short(state: str) -> str:
    return {
        "ready for initial replication": "no point yet",
        "initial replication in progress": "first cycle",
        "replicating from the recovery machine": "reversed",
        "replicating": "replicates",
        "failed over, waiting for commit": "failed over",
    }.get(state, state)


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text  # noqa: PLC0415

    return Text(escape(text), style=style)


def _document(made: Board) -> dict[str, Any]:
    agent = made.agent
    return {
        "at": made.at,
        "health": {severity.value: count for severity, count in made.health.items()},
        "readiness": {readiness.value: count for readiness, count in made.readiness.items()},
        "late": made.late,
        "digests": made.digests,
        "looked_at": made.direct,
        "vms": list(made.rows),
        "agent": None if agent is None else {"heard_of": agent.is_heard_of(made.at), **_agent(agent)},
    }


def _agent(agent: localagent.LocalAgent) -> dict[str, Any]:
    return {
        "state": agent.state,
        "process": agent.process,
        "written_at": agent.written_at,
        "vms": list(agent.vms.values()),
    }
