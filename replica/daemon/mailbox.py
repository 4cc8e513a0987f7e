"""Where what happens meets the agent's loop: finished units, signals. And the threads that work."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol, TypeAlias

from replica.daemon.site import Site
from replica.daemon.terms import MOST_CONCURRENT
from replica.daemon.units import Result, Unit, perform

SLICE_SECONDS: Final = 1.0


class Word(Enum):
    """What the agent can be told."""

    STOP = "stop"
    RELOAD = "reload"


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit has come to its end."""

    number: int
    unit: Unit
    result: Result


Message: TypeAlias = Word | Finished


class Mailbox(Protocol):
    """Messages in the order in which they came. ``put`` may be called from anywhere, signal handlers included."""

    def put(self, message: Message) -> None:
        """Leave a message."""

    def get(self, seconds: float) -> Message | None:
        """Return the next message, waiting for it so long at the most; None where none came."""


class QueueMailbox:
    """A mailbox for threads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()  # the one whose put can be interrupted by itself

    def put(self, message: Message) -> None:
        """Leave a message."""
        self._queue.put(message)

    def get(self, seconds: float) -> Message | None:
        """Return the next message, or None after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            try:
                # In slices, since on Windows a signal waits until the wait is over.
                return self._queue.get(timeout=min(left, SLICE_SECONDS)) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                if left <= 0:
                    return None


# Does a unit somewhere, and calls back, from any thread, with what became of it.
Perform: TypeAlias = Callable[[Unit, Site, Callable[[Result], None]], None]


class Threads:
    """Performs units in threads of this process: cycles in one pool, refreshes in one, all else in a third."""

    def __init__(self) -> None:
        self._cycles = ThreadPoolExecutor(MOST_CONCURRENT, "cycle")  # the agent bounds how many are under way
        self._care = ThreadPoolExecutor(1, "care")
        self._watch = ThreadPoolExecutor(1, "watch")

    def __call__(self, unit: Unit, site: Site, done: Callable[[Result], None]) -> None:
        """Begin a unit."""
        pool = {"cycle": self._cycles, "refresh": self._watch}.get(unit.task.value, self._care)

        def settle(future: Future[Result]) -> None:
            done(future.result())

        pool.submit(perform, unit, site).add_done_callback(settle)

    def close(self, *, wait: bool) -> None:
        """End the threads; without ``wait``, those that hang are left behind."""
        for pool in (self._cycles, self._care, self._watch):
            pool.shutdown(wait=wait, cancel_futures=True)
