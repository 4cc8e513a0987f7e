"""Extent arithmetic on whole arrays: shape (n, 2), int64, half-open byte ranges, sorted and apart from each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vhdx.disk import Extents

EMPTY: Extents = np.empty((0, 2), dtype=np.int64)


def runs_of(flags: npt.NDArray[np.bool_]) -> Extents:
    """Return the runs of True in ``flags`` as index ranges."""
    if not len(flags):
        return EMPTY
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    ends = [len(flags)] if flags[-1] else []
    bounds = np.concatenate(([0] if flags[0] else [], edges, ends)).astype(np.int64)
    return bounds.reshape(-1, 2)


def merged(parts: list[Extents]) -> Extents:
    """Return the union of arrays that may overlap and touch each other."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return EMPTY
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate(parts)
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    reach = np.maximum.accumulate(joined[:, 1])
    first = np.ones(len(joined), dtype=bool)
    first[1:] = joined[1:, 0] > reach[:-1]
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(joined)) - 1
    return np.column_stack((joined[starts, 0], reach[ends]))


def clipped(extents: Extents, start: int, end: int) -> Extents:
    """Return what of ``extents`` lies in [start, end)."""
    low = int(np.searchsorted(extents[:, 1], start, side="right"))
    high = int(np.searchsorted(extents[:, 0], end, side="left"))
    if low >= high:
        return EMPTY
    return np.clip(extents[low:high], start, end)


def total_length(extents: Extents) -> int:
    """Return the bytes that ``extents`` cover."""
    return int((extents[:, 1] - extents[:, 0]).sum())
