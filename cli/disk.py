"""The disk commands: the image tool that is useful without a store."""

from __future__ import annotations

import click


@click.group()
def disk() -> None:
    """Inspect, check, convert and change disk images."""
