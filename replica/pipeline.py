"""Bounded parallel work: results in order from a pool of threads, and uploads in flight; nothing stays behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TICK_SECONDS: Final = 2.0


def nothing() -> None:
    """Do nothing: the tick of those that need none."""


def ordered(
    pool: ThreadPoolExecutor,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    limit: int,
    tick: Callable[[], None] = nothing,
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` for each item, in the items' order, at most ``limit`` of them under way or waiting.

    ``tick`` is called now and then while a result is waited for. The first error of any item ends it; then, and when
    the caller stops early, what has not begun is cancelled and what is under way is waited for.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= limit:
                yield _result(pending.popleft(), tick)
        while pending:
            yield _result(pending.popleft(), tick)
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _result(future: Future[Result], tick: Callable[[], None]) -> Result:
    # Not by the error of a wait that was too short: the work may end between that error and a look at it.
    while not wait((future,), timeout=TICK_SECONDS).done:
        tick()
    return future.result()


class Uploads:
    """Writes under way in the background: a bounded number, whose errors surface at the next call."""

    def __init__(self, pool: ThreadPoolExecutor, *, limit: int, tick: Callable[[], None] = nothing) -> None:
        self._pool = pool
        self._limit = limit
        self._tick = tick
        self._pending: set[Future[None]] = set()

    def submit(self, upload: Callable[[], None]) -> None:
        """Start ``upload`` once fewer than the limit are under way. Raises what an earlier one raised."""
        self._wait_until(self._limit - 1)
        self._pending.add(self._pool.submit(upload))

    def drain(self) -> None:
        """Return once all are done. Raises what one of them raised."""
        self._wait_until(0)

    def abandon(self) -> None:
        """Cancel what has not begun and wait for the rest; errors no longer matter."""
        for future in self._pending:
            future.cancel()
        wait(self._pending)

    def _wait_until(self, left: int) -> None:
        while len(self._pending) > left:
            done, self._pending = wait(self._pending, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            self._tick()
