"""The godwit guest commands, each loaded when it is run."""

from __future__ import annotations

import click

from cli.lazy import LazyCommand, LazyGroup

GUEST_COMMANDS: dict[str, LazyCommand] = {
    "exec": LazyCommand("cli.guest_commands:execute", "Run a program in the guest of a recovery machine."),
    "copy": LazyCommand("cli.guest_commands:copy", "Copy a file into the guest of a recovery machine, or out of it."),
}


@click.group(cls=LazyGroup, table=GUEST_COMMANDS)
def guest() -> None:
    """Reach into the guest of a recovery machine without any network.

    On the platforms qemu and libvirt that is done by the QEMU guest agent, which has to run in the guest; on hyperv by
    PowerShell Direct, which takes a Windows guest and an account of it, and by the host's own copying of files.
    """
