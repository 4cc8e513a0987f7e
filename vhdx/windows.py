"""Extents that come in windows, as maps yield them: joined where a window's edge cut one, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vhdx.disk import Extents
from vhdx.extents import total_length


def joined(windows: Iterable[Extents]) -> Iterator[Extents]:
    """Yield the same extents with those joined that touch where one window ends and the next begins."""
    held: Extents | None = None  # the last extent so far, which the next window may go on
    for window in windows:
        if not len(window):
            continue
        if held is not None and held[0, 1] == window[0, 0]:
            window = window.copy()
            window[0, 0] = held[0, 0]
        elif held is not None:
            yield held
        if len(window) > 1:
            yield window[:-1]
        held = window[-1:]
    if held is not None:
        yield held


def length_of(windows: Iterable[Extents]) -> int:
    """Return the bytes that all extents cover."""
    return sum(total_length(window) for window in windows)
