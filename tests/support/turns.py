"""Agents that take turns, request by request: each runs in a thread of its own, and only when it is let go on.

Nothing here is left to the system's scheduler: at any instant one thread runs, the test's or one agent's, so the same
seed gives the same run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from replica.stores.store import Store
from tests.support.store_doubles import SimulatedCrash, _Around

WAIT_SECONDS = 120

T = TypeVar("T")


class InlineExecutor(Executor):
    """Does each piece of work where it is handed in, in the place of a pool of threads."""

    def __init__(self, workers: int = 1, prefix: str = "", **options: object) -> None:
        super().__init__()

    def submit(self, work: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:  # a simulated crash too: whoever asks for the result gets it
            future.set_exception(error)
        return future


class Agent:
    """A process that does a job. It stands still before each request to the store until it is let go on, or dies."""

    def __init__(self, name: str, job: Callable[[], None]) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.died = False
        self.next_request = ("", "")  # kind and key of the one that it stands before
        self._job = job
        self._allowed = 0
        self._dies_after = False
        self._is_over = False
        self._go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, with ``error`` or without."""
        return self._is_over

    def allow(self, requests: int) -> None:
        """Let so many requests pass without waiting for the next turn."""
        self._allowed = requests

    def start(self) -> None:
        """Run until the first request."""
        self._thread.start()
        self._await()

    def go_on(self, requests: int) -> None:
        """Run until so many requests were made, or the job has ended."""
        self._allowed = requests
        self._go.release()
        self._await()

    def kill(self, *, applied: bool) -> None:
        """Die at the request that is next, which is still ``applied`` or not."""
        self._dies_after = applied
        self.died = not applied
        self.go_on(1)
        assert self._is_over, f"{self.name} works on although it is dead"

    def before_request(self) -> None:
        """Called in the agent's thread before each request."""
        if not self.died and self._allowed == 0:
            self._stands.release()
            if not self._go.acquire(timeout=WAIT_SECONDS):
                raise SimulatedCrash("nobody lets it go on")
        self._allowed -= 1
        if self.died:
            raise SimulatedCrash(f"{self.name} is dead")

    def after_request(self) -> None:
        """Called in the agent's thread after each request."""
        if self._dies_after:
            self.died = True
            raise SimulatedCrash(f"{self.name} died after a request")

    def _await(self) -> None:
        assert self._stands.acquire(timeout=WAIT_SECONDS), f"{self.name} hangs"

    def _run(self) -> None:
        try:
            self._job()
        except BaseException as error:  # reported to the test, which judges it
            self.error = error
        finally:
            self._is_over = True
            self._stands.release()


class GatedStore(_Around):
    """The way of one agent to the store: before each request it waits for its turn.

    ``done`` is told of each request that was applied: its kind and key.
    """

    def __init__(self, inner: Store, agent: Agent, done: Callable[[str, str], None]) -> None:
        super().__init__(inner)
        self._agent = agent
        self._done = done

    def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
        self._agent.next_request = kind, key
        self._agent.before_request()
        try:
            result = work()
            self._done(kind, key)
        finally:
            self._agent.after_request()
        return result
