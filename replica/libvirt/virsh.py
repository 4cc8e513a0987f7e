"""Asks libvirt: the one place that runs virsh. Each question is a process, bounded in time and in what it answers.

What is to end with us is begun through a connection that is kept open: a process too, whose end libvirt sees.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
        program = _program()
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
            try:
                done = subprocess.run(
                    [program, *self._connecting, command, *arguments, *made],
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

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Keep a connection open; libvirt ends what was begun through it to end with it. Raises VirshError."""
        program = _program()
        try:
            process = subprocess.Popen(
                [program, *self._connecting],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,  # a Ctrl-C is for us: it ends with its pipe
            )
        except OSError as error:
            raise VirshError(f"{program} cannot be run: {error.strerror or error}") from error
        try:
            yield Connection(process)
        finally:
            assert process.stdin is not None and process.stderr is not None
            with suppress(OSError):
                process.stdin.close()
            try:
                process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stderr.close()

    @property
    def _connecting(self) -> list[str]:
        return ["--connect", self.connect] if self.connect else []


class Connection:
    """A virsh that waits to be told what to do."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._complaint = b""

    def tell(self, *words: str) -> None:
        """Have it run a command. Nobody waits for it: what became of it is to be looked at."""
        assert self._process.stdin is not None
        with suppress(OSError):  # then it has ended, which is a complaint
            self._process.stdin.write(f"{' '.join(map(_quoted, words))}\n".encode())
            self._process.stdin.flush()

    def complaint(self) -> str:
        """Return what it said against what it was told, or nothing so far."""
        stderr = self._process.stderr
        assert stderr is not None
        if not self._complaint and select.select([stderr], [], [], 0)[0]:
            self._complaint = os.read(stderr.fileno(), MOST_ERROR_BYTES) or b"it ended"
        return self._complaint.decode("utf-8", "replace")


def _program() -> str:
    program = shutil.which(PROGRAM)
    if program is None:
        raise VirshError(f"{PROGRAM} is not installed", hint="install libvirt-clients")
    return program


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
