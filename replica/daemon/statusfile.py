"""The status file: what the agent last did for each VM, for other commands of this machine to read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from vhdx.errors import DiskError
from vhdx.osfile import fsync_folder, replace_file
from vhdx.temporary import temporary_path

FILE_NAME: Final = "agent.json"
FORMAT: Final = 1
LARGEST_BYTES: Final = 256 << 20


def write(folder: Path, document: Mapping[str, object]) -> None:
    """Put ``document`` in the place of the file, atomically. Raises OSError, DiskError."""
    path = folder / FILE_NAME
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(as_json({"format": FORMAT, **document}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
        fsync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """Return what the file says, None where there is none that can be understood: it is a convenience."""
    try:
        path = folder / FILE_NAME
        if path.stat().st_size > LARGEST_BYTES:
            return None
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError, DiskError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def as_json(document: Mapping[str, object]) -> str:
    """Return a document of JSON's values and times, which are written in UTC as RFC 3339."""
    return json.dumps(document, default=_text)


def _text(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return str(value)
