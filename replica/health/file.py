"""The report's files: written beside and renamed, so that whoever reads them never sees half of one."""

from __future__ import annotations

import os
from pathlib import Path

from replica.errors import GodwitError
from vhdx.temporary import temporary_path


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` under the name at once, in the place of what was there. Raises GodwitError naming the path."""
    temporary = temporary_path(path)
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise GodwitError(
            f"the file cannot be written: {error.strerror}", path=str(path), hint="choose a folder that can be written"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
