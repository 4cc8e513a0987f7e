"""docs/cli.md, made from the commands themselves: ``python -m cli.reference > docs/cli.md``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from cli.main import root

_OPENING = """# The command line

Made from the commands by `python -m cli.reference > docs/cli.md`; a test holds it current.

- stdout carries the result, stderr remarks and progress. With `--json` stdout is exactly one JSON document: times in
  UTC as RFC 3339, sizes in bytes. Its members only ever grow.
- Progress is a bar on a terminal and JSON lines elsewhere; `--quiet` silences it.
- A failure is a sentence and often a hint on stderr; with `--json` also
  `{"error": {"type", "message", "hint", "exit_code"}}` on stdout, with the `path`, `offset` or `key` concerned.
- Sizes are bytes, or a number with K, M, G or T (powers of 1024).
- `GODWIT_DEBUG=1` adds the traceback to a failure.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage |
| 3 | degraded or partial: done with warnings |
| 10 | no store, or one that cannot be reached or trusted |
| 11 | another agent holds the lease |
| 12 | data is damaged |
| 13 | configuration |
| 14 | conversion refused |
| 130 | interrupted |
"""


def reference(command: click.Command = root) -> str:
    """Return the reference of ``command`` and all below it as Markdown."""
    return "\n".join([_OPENING, *_sections(command, "godwit")])


def _sections(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    if not isinstance(command, click.Group):
        yield from _section(command, context, path)
        return
    if command is not root:
        yield f"## {path}\n\n{_help(command)}\n"
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        if child is not None and not child.hidden:
            yield from _sections(child, f"{path} {name}")


def _section(command: click.Command, context: click.Context, path: str) -> Iterator[str]:
    usage = [path, *command.collect_usage_pieces(context)]
    level = "##" if path.count(" ") == 1 else "###"
    yield f"{level} {path}\n\n    {' '.join(usage)}\n\n{_help(command)}\n"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    rows = [f"| {_names(option)} | {_option_help(option)} |" for option in options if not option.hidden]
    if rows:
        yield "\n".join(["| option | |", "|---|---|", *rows, ""])


def _help(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").replace("\b\n", "").strip()


def _names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        choices = " \\| ".join(str(choice) for choice in option.type.choices)
        return f"{names} {choices}"
    return f"{names} {option.metavar or option.type.name.upper()}"


def _option_help(option: click.Option) -> str:
    text = (option.help or "").replace("|", "\\|")
    if option.show_default and isinstance(option.default, (str, int)):
        text += f" Default: {option.default}."
    remarks = ("Required.", option.required), ("May be repeated.", option.multiple)
    return " ".join([text, *(remark for remark, holds in remarks if holds and remark not in text)]).strip()


if __name__ == "__main__":
    sys.stdout.write(reference())
