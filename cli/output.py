"""What a command says: its result on stdout as JSON, table or plain text; remarks and questions on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from cli.progress import ProgressReport

Function = TypeVar("Function", bound=Callable[..., Any])

# What a terminal would obey rather than show: C0 and C1 controls, and the marks that reorder or hide text.
_CONTROL = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x200B, 0x2010),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
        0xFEFF,
    )
}
_CONTROL_BUT_NEWLINE = {code: text for code, text in _CONTROL.items() if code != 0x0A}


def escape(text: object, *, keep_newlines: bool = False) -> str:
    """Render ``text`` so that a terminal shows it and obeys none of it, whatever a file name or an image holds."""
    shown = str(text).translate(_CONTROL_BUT_NEWLINE if keep_newlines else _CONTROL)
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def to_json(value: object) -> Any:
    """Return ``value`` in terms of JSON: times as UTC RFC 3339, sizes and numbers as integers, bytes as hexadecimal.

    Dataclasses become objects, sets and iterables arrays, paths and GUIDs strings. Raises TypeError for the rest.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    if isinstance(value, PurePath):
        return str(value)
    return _to_json_by_duck(value)


def _to_json_by_duck(value: object) -> Any:
    """Handle types of modules that need not be imported to be recognised: datetime, uuid, enum, numpy."""
    name = type(value).__name__
    if name == "datetime":
        return rfc3339(value)
    if name == "UUID":
        return str(value)
    if hasattr(value, "tolist"):  # a numpy scalar or array
        return value.tolist()
    if hasattr(value, "value") and hasattr(value, "name"):  # an Enum member
        return to_json(value.value)
    if isinstance(value, Iterable):
        return [to_json(item) for item in value]
    raise TypeError(f"no JSON form for {name}")


def rfc3339(moment: Any) -> str:
    """Render an aware datetime as RFC 3339 in UTC, ``2026-05-01T08:00:00Z``, fractions only where there are any."""
    if moment.utcoffset() is None:
        raise TypeError("a time without its zone cannot be written as UTC")
    naive = moment.replace(tzinfo=None) - moment.utcoffset()
    return f"{naive.isoformat()}Z"


class DeclinedError(Exception):
    """A person was asked, and said no."""


class Output:
    """Where a command puts its result, its remarks and its progress. One per process, click's context object.

    stdout carries the result and nothing else: with ``json`` exactly one JSON document, otherwise text, as tables
    where stdout is a terminal. stderr carries everything that is said along the way, unless ``quiet``.
    """

    def __init__(
        self, *, json: bool = False, quiet: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.json = json
        self.quiet = quiet
        self.answered = False  # whether a JSON document has gone out: there is never a second one
        self._stdout = stdout
        self._stderr = stderr

    @property
    def stdout(self) -> TextIO:
        """The stream of the result."""
        return self._stdout or sys.stdout

    @property
    def stderr(self) -> TextIO:
        """The stream of remarks and progress."""
        return self._stderr or sys.stderr

    # --- the result

    def show(self, document: object, render: Callable[[], object]) -> None:
        """Put out the result: ``document`` with --json, otherwise whatever ``render`` writes by the methods below."""
        if self.json:
            self.document(document)
        else:
            render()

    def document(self, value: object) -> None:
        """Write one JSON document to stdout."""
        self.answered = True
        self.stdout.write(json.dumps(to_json(value), indent=2, ensure_ascii=True) + "\n")

    def document_with_items(self, head: Mapping[str, object], name: str, items: Iterable[object]) -> None:
        """Write one JSON document whose member ``name`` is an array too long to hold: one item a line, as they come."""
        self.answered = True
        opening = json.dumps(to_json(head), indent=2, ensure_ascii=True).removesuffix("\n}").removesuffix("{}")
        write = self.stdout.write
        write(f"{opening or '{'}{',' if head else ''}\n  {json.dumps(name)}: [")
        separator = "\n    "
        for item in items:
            write(separator + json.dumps(to_json(item), ensure_ascii=True))
            separator = ",\n    "
        write("\n  ]\n}\n")

    def line(self, text: str = "") -> None:
        """Write one line of the result as text."""
        self.stdout.write(escape(text) + "\n")

    def fields(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Write names and values in two columns; what is None is left out, a list takes a line for each item."""
        shown = [(name, value) for name, value in pairs if value is not None]
        width = max((len(name) for name, _ in shown), default=0) + 2
        for name, value in shown:
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            for position, item in enumerate(values):
                self.line(f"{(name + ':' if position == 0 else ''):<{width}}{item}")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
        """Write a table: ruled on a terminal, otherwise aligned columns with a heading.

        ``right``: the columns that hold numbers.
        """
        aligned = frozenset(right)
        if self._is_terminal(self.stdout):
            self._rich_table(columns, rows, aligned)
            return
        cells = [[escape(column).upper() for column in columns], *([escape(cell) for cell in row] for row in rows)]
        widths = [max(len(row[position]) for row in cells) for position in range(len(columns))]
        for row in cells:
            padded = (
                cell.rjust(width) if position in aligned else cell.ljust(width)
                for position, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            self.stdout.write("  ".join(padded).rstrip() + "\n")

    def _rich_table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], right: frozenset[int]) -> None:
        from rich import box  # noqa: PLC0415 - only a table on a terminal needs it
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for position, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if position in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(escape(cell)) for cell in row))
        self.console(self.stdout).print(table)

    # --- remarks, questions, progress

    def note(self, text: str) -> None:
        """Say something along the way on stderr, unless --quiet."""
        if not self.quiet:
            self.stderr.write(escape(text) + "\n")

    def confirm(self, question: str, *, yes: bool) -> None:
        """Return if ``yes``, or if the person at the terminal agrees.

        Raises click.UsageError where there is nobody to ask, DeclinedError where the answer is no.
        """
        if yes:
            return
        if not sys.stdin.isatty():
            raise click.UsageError("this changes data and there is no terminal to ask on: add --yes to go ahead.")
        if not click.confirm(escape(question), err=True):
            raise DeclinedError

    def progress(self, title: str) -> ProgressReport:
        """Return a context manager whose value is called with (done_bytes, total_bytes, phase)."""
        from cli.progress import report  # noqa: PLC0415 - most commands never show any

        return report(self, title)

    def console(self, stream: TextIO) -> Console:
        """Return a rich console on ``stream`` that interprets no markup in what it is given."""
        from rich.console import Console  # noqa: PLC0415

        return Console(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=False)

    def shows_progress_bar(self) -> bool:
        """Whether stderr is a terminal that can draw a bar."""
        return self._is_terminal(self.stderr)

    @staticmethod
    def _is_terminal(stream: TextIO) -> bool:
        return stream.isatty() and os.environ.get("TERM") != "dumb"


def output_options(function: Function) -> Function:
    """Give a command --json and --quiet, and the process's ``Output`` as its first argument."""
    function = click.pass_obj(function)  # type: ignore[assignment]
    function = click.option(
        "--quiet", "-q", is_flag=True, expose_value=False, callback=_set_quiet, help="No remarks and no progress."
    )(function)
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_json,
        help="The result as one JSON document.",
    )(function)


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Output).json = True


def _set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Output).quiet = True
