"""The disk commands: the image tool that is useful without a store."""

from __future__ import annotations

import click

from cli.lazy import LazyCommand, LazyGroup

DISK_COMMANDS: dict[str, LazyCommand] = {
    "info": LazyCommand("cli.disk_look:info", "Show what an image is: sizes, identities, log, parents."),
    "check": LazyCommand("cli.disk_look:check", "Look for damage; nothing is ever changed."),
    "map": LazyCommand("cli.disk_look:show_map", "List the extents that hold data."),
    "diff": LazyCommand(
        "cli.disk_look:diff", "List where a child differs from its parent, or two disks from each other."
    ),
    "create": LazyCommand("cli.disk_make:create", "Create an empty image."),
    "convert": LazyCommand("cli.disk_make:convert", "Convert an image, parents included, to a new one."),
    "merge": LazyCommand("cli.disk_make:merge", "Merge a differencing VHDX into its parent."),
    "resize": LazyCommand("cli.disk_make:resize", "Change the virtual size of an image."),
    "compact": LazyCommand("cli.disk_make:compact", "Give back the storage of what holds nothing."),
}


@click.group(cls=LazyGroup, table=DISK_COMMANDS)
def disk() -> None:
    """Inspect, check, convert and change disk images."""
