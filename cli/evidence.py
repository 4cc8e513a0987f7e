"""The godwit evidence commands, each loaded when it is run."""

from __future__ import annotations

import click

from cli.lazy import LazyCommand, LazyGroup

EVIDENCE_COMMANDS: dict[str, LazyCommand] = {
    "verify": LazyCommand("cli.drill:verify", "Verify the evidence of a drill."),
}


@click.group(cls=LazyGroup, table=EVIDENCE_COMMANDS)
def evidence() -> None:
    """Verify what drills left as evidence. Neither the store nor its key is needed for that."""
