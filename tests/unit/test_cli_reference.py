from __future__ import annotations

from pathlib import Path

import click
import pytest

from cli.main import COMMANDS, root
from cli.reference import reference

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def all_commands(command: click.Command, path: str = "godwit") -> list[tuple[str, click.Command]]:
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found += all_commands(child, f"{path} {name}")
    return found


def test_the_reference_in_the_docs_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference(), "run: python -m cli.reference > docs/cli.md"


@pytest.mark.parametrize("path, command", all_commands(root), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_help_and_a_json_form(path: str, command: click.Command) -> None:
    assert command.help
    if not isinstance(command, click.Group):
        names = {name for parameter in command.params for name in parameter.opts}
        assert {"--json", "--quiet"} <= names
        assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_line_in_the_table_is_the_one_of_the_command(name: str) -> None:
    entry = COMMANDS[name]
    command = entry.load()
    assert command.name == name
    assert (command.help or "").splitlines()[0] == entry.help
