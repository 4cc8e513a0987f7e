"""Freezes a guest's file systems for a moment through the QEMU guest agent, and thaws them whatever happens.

The freezing is done by a process of its own: should the one that wants it be killed, its pipe closes, and the helper
thaws; should it be slow, the helper thaws after the time it was given.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final, Self

from replica.monitor import Lines, MonitorError, MonitorGoneError

FREEZE_SECONDS: Final = 10.0  # how long the guest may take to freeze, and then how long it is kept so
THAW_ATTEMPTS: Final = 5


@dataclass(slots=True)
class Quiesced:
    """Whether file systems were frozen from the beginning of the context to its end; known after it."""

    held: bool = False
    why_not: str | None = None


def quiesced(path: str, *, seconds: float = FREEZE_SECONDS) -> contextlib.AbstractContextManager[Quiesced]:
    """Keep the file systems of the guest whose agent is behind the socket ``path`` frozen while the context lasts.

    Never raises by itself: where the guest cannot be frozen, the context runs all the same, and ``held`` stays False.
    """
    return quiesced_by([sys.executable, "-m", "replica.agent", path, str(seconds)])


@contextlib.contextmanager
def quiesced_by(command: Sequence[str]) -> Iterator[Quiesced]:
    """Keep a guest frozen while the context lasts, by a helper of this command.

    The helper writes ``frozen`` once it is so, or why not; thaws when its stdin ends or its time is over; and
    then writes ``held`` if the guest was frozen until then, or why not.
    """
    state = Quiesced()
    try:
        helper = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for us: the helper thaws when we go
        )
    except OSError as error:
        state.why_not = f"the helper that freezes cannot be started: {error}"
        yield state
        return
    assert helper.stdin is not None and helper.stdout is not None
    try:
        said = helper.stdout.readline().strip()  # bounded: the helper gives up by itself
        if said != "frozen":
            state.why_not = said or "the helper that freezes ended"
        yield state
        if state.why_not is None:
            with contextlib.suppress(OSError):
                helper.stdin.close()
            said = helper.stdout.readline().strip()
            state.held = said == "held"
            state.why_not = None if state.held else said or "the helper that freezes ended"
    finally:
        with contextlib.suppress(OSError):
            helper.stdin.close()
        helper.wait()
        helper.stdout.close()


class Agent:
    """A connection to a guest agent."""

    def __init__(self, path: str, *, timeout_seconds: float) -> None:
        """Connect, and step over what the agent still had to say to somebody else. Raises MonitorGoneError."""
        self._lines = Lines(path, what="the guest agent", timeout_seconds=timeout_seconds)
        token = time.monotonic_ns() & 0x7FFFFFFF
        try:
            self._lines.send({"execute": "guest-sync-delimited", "arguments": {"id": token}}, prefix=b"\xff")
            deadline = self._lines.deadline()
            while self._lines.receive(deadline).get("return") != token:
                pass
        except BaseException:
            self._lines.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command. ``_`` in argument names stands for ``-``. Raises MonitorError, MonitorGoneError."""
        self.send(command, **arguments)
        answer = self._lines.receive(self._lines.deadline())
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        text = error.get("desc") if isinstance(error, dict) else "no answer"
        raise MonitorError(f"the guest agent refuses {command}: {text}", path=self._lines.path)

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command that may have no answer. Raises MonitorGoneError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._lines.send({"execute": command, "arguments": named} if named else {"execute": command})

    def close(self) -> None:
        """Hang up."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def hold(path: str, seconds: float, stdin: IO[str], stdout: IO[str]) -> None:
    """Freeze, say so, wait until stdin ends or the time is over, thaw, and say whether it held until then."""

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            stdout.write(f"{text}\n")
            stdout.flush()

    try:
        agent = Agent(path, timeout_seconds=seconds)
    except MonitorError as error:
        say(str(error))
        return
    outcome = "the guest was kept frozen for too long"
    try:
        if agent.execute("guest-fsfreeze-status") == "frozen":  # by a helper that did not live to thaw
            agent.execute("guest-fsfreeze-thaw")
        if not agent.execute("guest-fsfreeze-freeze"):
            outcome = "the guest froze no file system"
            say(outcome)
        else:
            say("frozen")
            ended = bool(select.select([stdin], [], [], seconds)[0])
            if ended and agent.execute("guest-fsfreeze-status") == "frozen":
                outcome = "held"
            elif ended:
                outcome = "the guest did not stay frozen"
    except MonitorError as error:
        outcome = str(error)
    finally:
        thawed = _thaw(agent, path, seconds)
        say(outcome if thawed else f"the guest could not be thawed: {outcome}")


def _thaw(agent: Agent, path: str, seconds: float) -> bool:
    for attempt in range(THAW_ATTEMPTS):
        try:
            if attempt:
                agent.close()
                agent = Agent(path, timeout_seconds=seconds)
            agent.execute("guest-fsfreeze-thaw")
        except MonitorGoneError:
            time.sleep(0.2)
        except MonitorError:  # nothing was frozen
            return True
        else:
            return True
        finally:
            agent.close()
    return False


if __name__ == "__main__":
    hold(sys.argv[1], float(sys.argv[2]), sys.stdin, sys.stdout)
