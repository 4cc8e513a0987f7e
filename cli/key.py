"""The godwit key commands, each loaded when it is run."""

from __future__ import annotations

import click

from cli.lazy import LazyCommand, LazyGroup

KEY_COMMANDS: dict[str, LazyCommand] = {
    "init": LazyCommand("cli.key_commands:init", "Give a tenant its encryption key."),
    "check": LazyCommand("cli.key_commands:check", "Try the key that is given."),
    "show": LazyCommand("cli.key_commands:show", "Show which key a tenant has."),
    "rotate": LazyCommand("cli.key_commands:rotate", "Change what opens a tenant's key."),
    "export": LazyCommand("cli.key_commands:export", "Write the recovery kit."),
}


@click.group(cls=LazyGroup, table=KEY_COMMANDS)
def key() -> None:
    """Make and care for the key that encrypts a tenant's VMs.

    The key that opens what is encrypted comes from GODWIT_KEY_FILE, GODWIT_PASSPHRASE, key_file or key_command in
    godwit.toml, or a question on the terminal, in this order.
    """
