"""Asks libvirt: the one place that runs virsh. Each question is a process, bounded in time and in what it answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final

from replica.errors import SourceError

PROGRAM: Final = "virsh"
MOST_ERROR_BYTES: Final = 4000


class VirshError(SourceError):
    """libvirt refused, or cannot be asked. ``message`` holds its own words."""


class VirshRefusedError(VirshError):
    """libvirt answered that it does not do what was asked."""


class VirshTimeoutError(VirshError):
    """libvirt did not answer in time: whether it did what was asked is not known."""

    retryable = True


class Virsh:
    """A libvirt, by its connection URI. For any number of threads."""

    def __init__(self, connect: str | None = None, *, timeout_seconds: float = 60) -> None:
        """``connect`` is the URI, None for libvirt's own default. ``timeout_seconds`` bounds each question."""
        self.connect = connect
        self._timeout = timeout_seconds

    def ask(
        self,
        command: str,
        *arguments: str,
        files: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> str:
        """Run a virsh command and return what it prints.

        ``files``: options whose value is the path of a file, with what that file is to hold.
        Raises VirshRefusedError, VirshTimeoutError, VirshError.
        """
        program = shutil.which(PROGRAM)
        if program is None:
            raise VirshError(f"{PROGRAM} is not installed", hint="install libvirt-clients")
        seconds = self._timeout if timeout_seconds is None else timeout_seconds
        with ExitStack() as stack:
            made: list[str] = []
            passed: list[int] = []
            for option, text in (files or {}).items():  # files without names: none is left where we are killed
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(text.encode())
                file.flush()
                passed.append(file.fileno())
                made += [option, f"/dev/fd/{file.fileno()}"]
            connection = ["--connect", self.connect] if self.connect else []
            try:
                done = subprocess.run(
                    [program, *connection, command, *arguments, *made],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,  # libvirt's protocol bounds what it answers: 4 MiB of text
                    pass_fds=passed,
                    timeout=seconds,
                    check=False,
                    env={**os.environ, "LC_ALL": "C"},
                )
            except subprocess.TimeoutExpired as error:
                raise VirshTimeoutError(
                    f"libvirt did not answer to {command} within {seconds:g} s", path=self.connect
                ) from error
            except OSError as error:
                raise VirshError(f"{program} cannot be run: {error.strerror or error}") from error
            if done.returncode:
                words = done.stderr[:MOST_ERROR_BYTES].decode("utf-8", "replace").replace("error: ", "").split("\n")
                why = "; ".join(dict.fromkeys(word.strip() for word in words if word.strip())) or "it gave no reason"
                raise VirshRefusedError(f"libvirt refuses {command}: {why}", path=self.connect)
            return done.stdout.decode("utf-8", "replace")
