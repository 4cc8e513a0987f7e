"""The documents are kept true: links lead somewhere, commands that are shown exist with the options shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from cli.main import root

CHECKOUT = Path(__file__).parents[2]
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md")])
SHOWN = [
    line.strip().removeprefix("$ ")
    for document in DOCUMENTS
    if document.name != "cli.md"  # made from the commands, with their usage lines
    for line in document.read_text(encoding="utf-8").splitlines()
    if re.match(r"(    |\$ )+godwit ", line)
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_relative_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("line", SHOWN)
def test_commands_that_are_shown_are_understood(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    command: click.Command = root
    context = click.Context(root, info_name="godwit")
    while isinstance(command, click.Group):
        name = arguments.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command {name!r}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_parser(context).parse_args(arguments)


def test_the_readme_shows_commands() -> None:
    assert len(SHOWN) >= 10
