"""Telling errors of a file under its temporary name by the name that it is to have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vhdx.errors import DiskError


@contextlib.contextmanager
def told_as(target: Path) -> Iterator[None]:
    """Let a DiskError raised inside name ``target`` where it names a temporary file of it."""
    try:
        yield
    except DiskError as error:
        name = Path(error.path).name if error.path else ""
        if name.startswith(".") and name.endswith(".tmp") and f".{target.name}." in name:
            error.path = str(target)
        raise
