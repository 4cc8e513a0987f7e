"""The way into a guest through the QEMU guest agent: programs are run and files copied without any network."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Protocol

from replica.agent import Agent
from replica.errors import PlatformError
from replica.monitor import MonitorError, MonitorGoneError

PIECE_BYTES: Final = 1 << 20  # of a file at once: the agent takes 48 MiB at most, and holds all of it
POLL_SECONDS: Final = 0.05
SLOWEST_POLL_SECONDS: Final = 1.0


class Answering(Protocol):
    """An agent that is connected to."""

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command. ``_`` in argument names stands for ``-``. Raises MonitorError, MonitorGoneError."""

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command that may have no answer. Raises MonitorError."""


class Connect(Protocol):
    """How an agent is connected to."""

    def __call__(self, path: str, *, timeout_seconds: float) -> AbstractContextManager[Answering]:
        """Connect to what ``path`` names. Raises MonitorGoneError."""


class AgentChannel:
    """A ``GuestChannel`` over the socket at ``path``. One command uses it at a time; connected to for each call.

    ``connect`` is how it is connected to, where that is by other means; ``piece_bytes`` what these take of a file at
    once; and ``poll_seconds`` how long a guest that is silent is left alone.
    """

    def __init__(
        self,
        path: str,
        connect: Connect = Agent,
        *,
        piece_bytes: int = PIECE_BYTES,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.path = path
        self._connect = connect
        self._piece = piece_bytes
        self._poll = poll_seconds

    def ping(self, *, timeout_seconds: float) -> bool:
        """Whether the guest answers within that time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = deadline - time.monotonic()
            try:
                with self._connect(self.path, timeout_seconds=max(0.01, left)) as agent:
                    agent.execute("guest-ping")
                    return True
            except MonitorError:
                if deadline - time.monotonic() <= self._poll:
                    return False
                time.sleep(self._poll)  # the socket may not be there yet, or the last client be hanging up

    def execute(self, command: Sequence[str], *, timeout_seconds: float) -> tuple[int, bytes, bytes]:
        """Run a program in the guest; return its status, output and error output. Raises PlatformError."""
        if not command:
            raise PlatformError("there is no command to run in the guest")
        deadline = time.monotonic() + timeout_seconds
        with self._agent(timeout_seconds) as agent:
            begun = agent.execute("guest-exec", path=command[0], arg=list(command[1:]), capture_output=True)
            number = _field(begun, "pid", int)
            pause = POLL_SECONDS
            while True:
                state = agent.execute("guest-exec-status", pid=number)
                if _field(state, "exited", bool):
                    return _status(state), _decoded(state, "out-data"), _decoded(state, "err-data")
                if time.monotonic() > deadline:
                    raise PlatformError(
                        f"{command[0]} did not end in the guest within {timeout_seconds:.0f} s",
                        hint="it is left running there; give it longer with --timeout",
                    )
                time.sleep(pause)
                pause = min(2 * pause, SLOWEST_POLL_SECONDS)

    def write_file(self, path: str, content: bytes, *, timeout_seconds: float) -> None:
        """Write a file in the guest, in the place of one that is there. Raises PlatformError."""
        with self._agent(timeout_seconds) as agent, _opened(agent, path, "wb") as handle:
            view = memoryview(content)
            while view:
                text = base64.b64encode(view[: self._piece]).decode()
                written = _field(agent.execute("guest-file-write", handle=handle, buf_b64=text), "count", int)
                if not 0 < written <= len(view):
                    raise PlatformError(f"{path}: the guest wrote {written} bytes", hint="is its disk full?")
                view = view[written:]
            agent.execute("guest-file-flush", handle=handle)

    def read_file(self, path: str, *, timeout_seconds: float, largest_bytes: int = 64 << 20) -> bytes:
        """Read a file of the guest. Raises PlatformError, for one that is larger too."""
        content = bytearray()
        with self._agent(timeout_seconds) as agent, _opened(agent, path, "rb") as handle:
            while True:
                answer = agent.execute("guest-file-read", handle=handle, count=PIECE_BYTES)
                content += _decoded(answer, "buf-b64")
                if len(content) > largest_bytes:
                    raise PlatformError(f"{path} holds more than {largest_bytes} bytes", hint="copy a smaller file")
                if _field(answer, "eof", bool):
                    return bytes(content)
                if not _field(answer, "count", int):
                    raise PlatformError(f"{path}: the guest reads nothing, and not the end either")

    def shut_down(self, *, timeout_seconds: float) -> bool:
        """Ask the guest to shut down; False where it does not hear."""
        try:
            with self._connect(self.path, timeout_seconds=timeout_seconds) as agent:
                agent.execute("guest-ping")
                agent.send("guest-shutdown")  # without an answer where it is obeyed
                return True
        except MonitorError:
            return False

    @contextmanager
    def _agent(self, timeout_seconds: float) -> Iterator[Answering]:
        try:
            with self._connect(self.path, timeout_seconds=timeout_seconds) as agent:
                yield agent
        except MonitorGoneError as error:
            raise PlatformError(
                f"the guest does not answer: {error.message}",
                path=self.path,
                hint="is it up, and does the QEMU guest agent run in it?",
            ) from error
        except MonitorError as error:
            raise PlatformError(error.message, path=self.path, hint=error.hint) from error


@contextmanager
def _opened(agent: Answering, path: str, mode: str) -> Iterator[int]:
    handle = agent.execute("guest-file-open", path=path, mode=mode)
    if not isinstance(handle, int):
        raise PlatformError("the guest agent answers in an unknown way", path=path)
    try:
        yield handle
    except BaseException:
        with suppress(MonitorError):
            agent.execute("guest-file-close", handle=handle)
        raise
    agent.execute("guest-file-close", handle=handle)


def _status(state: Any) -> int:
    """Return the exit status; of a program that a signal ended, as a shell tells it."""
    if "signal" in state:
        return 128 + _field(state, "signal", int)
    return _field(state, "exitcode", int)


def _field(answer: Any, name: str, kind: type[int]) -> int:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise PlatformError("the guest agent answers in an unknown way", hint=f"{name!r} is missing")
    return value


def _decoded(answer: Any, name: str) -> bytes:
    text = answer.get(name, "") if isinstance(answer, dict) else ""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError, binascii.Error) as error:
        raise PlatformError("the guest agent answers in an unknown way", hint=f"{name!r} is no base64") from error
