from __future__ import annotations

from pathlib import Path

import click
import pytest

from cli.disk import DISK_COMMANDS
from cli.key import KEY_COMMANDS
from cli.lazy import LazyCommand
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


@pytest.mark.parametrize("table", [COMMANDS, DISK_COMMANDS, KEY_COMMANDS], ids=["godwit", "disk", "key"])
def test_a_table_names_commands_as_they_name_themselves(table: dict[str, LazyCommand]) -> None:
    for name, entry in table.items():
        assert entry.load().name == name
        assert entry.help.endswith(".") and len(entry.help) <= 80
