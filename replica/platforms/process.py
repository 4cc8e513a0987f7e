"""Processes that outlive the command that started them: found again by their pid file, and never taken for others."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replica.errors import PlatformError

POLL_SECONDS: Final = 0.02
LARGEST_PID_FILE_BYTES: Final = 64

_children: list[subprocess.Popen[bytes]] = []  # so that those which ended before us are reaped


@dataclass(frozen=True, slots=True)
class Owned:
    """A process of ours: its number is in ``pid_file``, and among its arguments are ``marker``, one after the other.

    A number alone is not trusted: after a crash or a reboot it may be another's. A marker names the machine's folder,
    so that no other process has it.
    """

    pid_file: Path
    marker: tuple[str, ...]

    def pid(self) -> int | None:
        """Return its number, None where it does not run."""
        number = self._noted()
        return number if number is not None and self._is_ours(number) else None

    def send(self, number: signal.Signals) -> bool:
        """Send it a signal; False where it does not run. Nothing comes between looking and sending."""
        with self._held() as handle:
            if handle is None:
                return False
            _send(handle, number)
            return True

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until it has ended; False where it runs on."""
        deadline = time.monotonic() + timeout_seconds
        with self._held() as handle:
            if handle is None:
                return True
            while not select.select([handle], [], [], POLL_SECONDS)[0]:
                if time.monotonic() > deadline:
                    return False
        _reap()
        return True

    def end(self, *, timeout_seconds: float) -> None:
        """End it: asked first, killed after that time. Raises PlatformError where it stays."""
        if not self.send(signal.SIGTERM) or self.wait(timeout_seconds):
            return
        if sys.platform != "win32":
            self.send(signal.SIGKILL)
        if not self.wait(timeout_seconds):
            raise PlatformError(
                f"process {self._noted()} does not end, though it was killed",
                path=str(self.pid_file),
                hint="it waits for a disk or a network that does not answer; try again once that does",
            )

    def _noted(self) -> int | None:
        try:
            with self.pid_file.open("rb") as file:
                text = file.read(LARGEST_PID_FILE_BYTES).split()
        except OSError:
            return None
        return int(text[0]) if text and text[0].isdigit() and 0 < int(text[0]) < 1 << 31 else None

    def _is_ours(self, number: int) -> bool:
        try:
            arguments = Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            return False
        # Nothing is there of one that has ended and was not reaped.
        return os.fsencode("".join(f"\0{one}" for one in self.marker)) + b"\0" in arguments

    @contextlib.contextmanager
    def _held(self) -> Iterator[int | None]:
        """Give a handle of the very process, so that its number cannot become another's meanwhile."""
        if sys.platform != "linux":
            raise PlatformError("recovery machines are run on Linux only", hint="use --platform files")
        else:
            number = self._noted()
            handle = None
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    handle = os.pidfd_open(number)
            try:
                yield handle if handle is not None and number is not None and self._is_ours(number) else None
            finally:
                if handle is not None:
                    os.close(handle)


def start(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    """Start a program that goes on when we end; it writes to ``log``. Raises PlatformError."""
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,  # a Ctrl-C or a closed terminal is not for it
            )
    except OSError as error:
        raise PlatformError(f"{command[0]} cannot be started: {error.strerror or error}", path=str(log)) from error
    _children.append(process)
    return process


def _send(handle: int, number: signal.Signals) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)


def _reap() -> None:
    _children[:] = [one for one in _children if one.poll() is None]
