"""The godwit checkpoints commands, each loaded when it is run; without the name of one, it lists."""

from __future__ import annotations

import click

from cli.lazy import LazyCommand, LazyGroup

CHECKPOINT_COMMANDS: dict[str, LazyCommand] = {
    "list": LazyCommand("cli.checkpoint_commands:list_", "Show the chains of a VM's disks; 'list' may be left out."),
    "merge": LazyCommand(
        "cli.checkpoint_commands:merge", "Merge all but the newest checkpoint files, with the VM off."
    ),
}


class CheckpointGroup(LazyGroup):
    """A group whose first word may be a VM or a path: then it is ``list`` that is meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``list`` before what is not the name of a command."""
        helps = ctx.help_option_names
        if not args or (args[0] not in self.table and args[0] not in helps):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=CheckpointGroup, table=CHECKPOINT_COMMANDS)
def checkpoints() -> None:
    """Show the files that checkpoints made of a VM's disks, and merge those that nobody needs.

    'godwit checkpoints NAME' is short for 'godwit checkpoints list NAME'.
    """
