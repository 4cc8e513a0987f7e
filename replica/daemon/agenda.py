"""What is due when: names with their moments, the earliest first."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Agenda(Generic[Key]):
    """Moments by key, one for each. Setting and taking cost the logarithm of their number."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._valid: dict[Key, tuple[float, int]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._valid)

    def set(self, key: Key, due: float) -> None:
        """Put ``key`` down for that moment, and for no other."""
        self._count += 1
        self._valid[key] = due, self._count  # of two at the same moment, the one that was put down first
        heapq.heappush(self._heap, (due, self._count, key))
        if len(self._heap) > 4 * len(self._valid) + 64:
            self._heap = [(*mark, one) for one, mark in self._valid.items()]
            heapq.heapify(self._heap)

    def drop(self, key: Key) -> None:
        """Strike ``key``, if it is there."""
        self._valid.pop(key, None)

    def due(self, key: Key) -> float | None:
        """Return when ``key`` is due."""
        mark = self._valid.get(key)
        return None if mark is None else mark[0]

    def next(self) -> float | None:
        """Return the earliest moment."""
        while self._heap and self._valid.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> Key | None:
        """Strike and return the key that has been due for the longest, None where none is due."""
        first = self.next()
        if first is None or first > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._valid[key]
        return key
