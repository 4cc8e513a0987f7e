"""Work on the pieces of a disk in two threads, results in the order of the pieces: what is in flight is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

WORKERS: Final = 2  # one waits for storage or copies memory while the other does
IN_FLIGHT: Final = 2 * WORKERS  # pieces begun or waiting, so that no worker waits for the caller

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def worked(pieces: Iterable[Piece], work: Callable[[Piece], Result]) -> Iterator[Result]:
    """Yield ``work(piece)`` for each piece, in order; ``WORKERS`` of them run at a time.

    Raises what ``work`` raises, at the place of its piece; pieces that have not begun by then are not begun, nor are
    they when the caller stops listening.
    """
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="pieces") as pool:
        running: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                if len(running) == IN_FLIGHT:
                    yield running.popleft().result()
                running.append(pool.submit(work, piece))
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


class Buffers:
    """Buffers for what runs at a time, one set for each worker; ``take`` never waits inside ``work``."""

    def __init__(self, size: int, count: int = 1) -> None:
        self._free = [tuple(bytearray(size) for _ in range(count)) for _ in range(WORKERS)]

    def take(self) -> tuple[bytearray, ...]:
        """Return a set of buffers that nobody else has until it is given back."""
        return self._free.pop()

    def give_back(self, buffers: tuple[bytearray, ...]) -> None:
        """Let another piece have the set."""
        self._free.append(buffers)
