"""Names of files that are not whole yet, and the removal of those that an interruption left behind.

Whoever makes such a file removes it when something fails. An interruption may come between the making and the first
line that would remove it, where no ``try`` can reach; so the process remembers in which folders it made any.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Final

_PROCESS: Final = secrets.token_hex(4)  # in each name, so that no other process's files are taken for ours
_folders: set[Path] = set()


def temporary_path(target: Path | str) -> Path:
    """Return a fresh hidden name beside ``target``, for a file that is to get its name once it is whole."""
    target = Path(target)
    _folders.add(target.parent.absolute())
    return target.with_name(f".{target.name}.{_PROCESS}{secrets.token_hex(4)}.tmp")


def sweep_temporaries() -> None:
    """Remove every file of this process that still has a temporary name: for a process about to end."""
    for folder in tuple(_folders):
        with contextlib.suppress(OSError):
            for path in folder.glob(f".*.{_PROCESS}????????.tmp"):
                path.unlink(missing_ok=True)
