"""Programs that a plan has run on the host: no shell, no input, a bound on their time, the end of what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

KEPT_BYTES: Final = 4096
# What opens a store's encryption is no business of programs that a plan names.
SECRETS: Final = frozenset({"GODWIT_PASSPHRASE", "GODWIT_KEY_FILE", "GODWIT_KEY_COMMAND"})


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a program: its ``status``, None where it was ended; ``begun`` false where it never ran."""

    begun: bool
    status: int | None
    said: str


def run(command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float) -> Ran:
    """Run a program, and all that it starts, for no longer than that."""
    passed = {name: value for name, value in os.environ.items() if name not in SECRETS} | dict(environment)
    with tempfile.TemporaryFile() as file:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=passed,
                start_new_session=True,  # Ctrl-C is for us: what was begun is let end
            )
        except (OSError, ValueError) as error:
            told = error.strerror if isinstance(error, OSError) else str(error)
            return Ran(False, None, f"{command[0]} cannot be run: {told}")
        try:
            status: int | None = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                _end(process)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - KEPT_BYTES))
        return Ran(True, status, file.read(KEPT_BYTES).decode("utf-8", "replace").strip())


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
