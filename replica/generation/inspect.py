"""Inspecting a disk image: what system is on it, and whether it can start as the other generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conversion.inspection import Inspection, inspect
from replica.generation.image import Image


def inspect_image(path: Path, *, folders: Sequence[Path] = ()) -> Inspection:
    """Look at the OS disk at ``path``. Raises DiskError; what is strange about the system is a finding."""
    with Image.find(path, folders=folders).opened() as disk:
        return inspect(disk)
