"""Talks to a running QEMU through its monitor (QMP): commands and their answers, each within a time."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Self

from replica.errors import SourceError
from replica.nbd.connection import connect_unix

MOST_MESSAGE_BYTES: Final = 16 << 20
POLL_SECONDS: Final = 0.02


class MonitorError(SourceError):
    """QEMU refused a command. ``error_class`` is its own name for the kind of refusal."""

    def __init__(self, message: str, *, path: str, hint: str | None = None, error_class: str = "GenericError") -> None:
        super().__init__(message, path=path, hint=hint)
        self.error_class = error_class


class MonitorGoneError(MonitorError):
    """QEMU, or the socket of its monitor, cannot be reached or does not answer any more."""

    retryable = True


class Lines:
    """JSON values over a socket, one a line, each awaited for a bounded time and of a bounded size."""

    def __init__(self, path: str, *, what: str, timeout_seconds: float) -> None:
        """Connect to the socket at ``path``; ``what`` names the other side in errors. Raises MonitorGoneError."""
        self.path = path
        self._what = what
        self._timeout = timeout_seconds
        self._received = bytearray()
        try:
            self._socket = connect_unix(path, timeout_seconds)
        except OSError as error:
            raise MonitorGoneError(
                f"{what} cannot be reached: {error.strerror or error}", path=path, hint="is the VM running?"
            ) from error

    def send(self, message: dict[str, Any], *, prefix: bytes = b"", descriptor: int | None = None) -> None:
        """Send a value, and with it an open file where ``descriptor`` is given. Raises MonitorGoneError."""
        data = prefix + json.dumps(message).encode() + b"\n"
        try:
            if descriptor is not None:
                _send_descriptor(self._socket, data, descriptor)
            else:
                self._socket.sendall(data)
        except OSError as error:
            raise MonitorGoneError(f"{self._what} hung up: {error.strerror or error}", path=self.path) from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next value. ``deadline`` is in seconds of ``time.monotonic``. Raises MonitorGoneError."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MOST_MESSAGE_BYTES:
                raise MonitorGoneError(f"{self._what} sends messages without end", path=self.path)
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
                got = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise MonitorGoneError(
                    f"{self._what} does not answer",
                    path=self.path,
                    hint="a monitor serves one client at a time: is another program connected to this socket?",
                ) from error
            except OSError as error:
                raise MonitorGoneError(f"{self._what} hung up: {error.strerror or error}", path=self.path) from error
            if not got:
                raise MonitorGoneError(f"{self._what} hung up", path=self.path)
            self._received += got
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line.rpartition(b"\xff")[2])  # the guest agent puts this byte before an answer
        except (ValueError, RecursionError) as error:
            raise MonitorGoneError(f"{self._what} sends what is no JSON", path=self.path) from error
        if not isinstance(message, dict):
            raise MonitorGoneError(f"{self._what} sends what is no message", path=self.path)
        return message

    def deadline(self) -> float:
        """Return when an answer to something sent now is given up."""
        return time.monotonic() + self._timeout

    def close(self) -> None:
        """Hang up. Safe to repeat."""
        self._socket.close()


class Monitor:
    """A connection to a QEMU. Events are left aside."""

    def __init__(self, path: str, *, timeout_seconds: float = 30) -> None:
        """Connect, and leave the negotiation mode. Raises MonitorGoneError."""
        self.path = path
        self._commands = 0
        self._lines = Lines(path, what="QEMU's monitor", timeout_seconds=timeout_seconds)
        try:
            if "QMP" not in self._lines.receive(self._lines.deadline()):
                raise MonitorGoneError("this is no QMP monitor", path=path, hint="start QEMU with -qmp unix:PATH")
            self.execute("qmp_capabilities")
        except BaseException:
            self._lines.close()
            raise

    def execute(self, command: str, *, descriptor: int | None = None, **arguments: Any) -> Any:
        """Run a command and return what it answers. ``_`` in argument names stands for ``-``.

        Raises MonitorError where QEMU refuses, MonitorGoneError where it does not answer.
        """
        self._commands += 1
        number = self._commands
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": named, "id": number}
        self._lines.send(message, descriptor=descriptor)
        deadline = self._lines.deadline()
        while True:
            answer = self._lines.receive(deadline)
            if answer.get("id") != number:
                continue  # an event, or the answer to a command that was interrupted
            if "return" in answer:
                return answer["return"]
            error = answer.get("error")
            if not isinstance(error, dict):
                raise MonitorGoneError("QEMU's monitor answers neither yes nor no", path=self.path)
            raise MonitorError(
                f"QEMU refuses {command}: {error.get('desc')}", path=self.path, error_class=str(error.get("class"))
            )

    def rows(self, command: str, **arguments: Any) -> list[dict[str, Any]]:
        """Run a command that answers with a list of objects."""
        answer = self.execute(command, **arguments)
        if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
            raise MonitorGoneError(f"QEMU's answer to {command} is no list", path=self.path)
        return answer

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Call ``done`` until it says so. Raises MonitorGoneError after the time that an answer may take."""
        deadline = self._lines.deadline()
        while not done():
            if time.monotonic() > deadline:
                raise MonitorGoneError(f"QEMU does not finish to {what}", path=self.path)
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Hang up. Safe to repeat."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _send_descriptor(to: socket.socket, data: bytes, descriptor: int) -> None:
    """Send data with an open file, so that QEMU needs no right to its path."""
    if sys.platform == "win32":
        raise OSError("this system cannot pass open files on")
    else:  # noqa: RET506 - mypy looks at one branch only, by platform
        duplicate = os.dup(descriptor)
        try:
            socket.send_fds(to, [data], [duplicate])
        finally:
            os.close(duplicate)
