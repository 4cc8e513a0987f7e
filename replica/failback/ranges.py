"""Sets of byte ranges as arrays: made from pairs, rounded to blocks, subtracted, intersected."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from replica.block import BLOCK_BYTES
from vhdx.disk import Extents
from vhdx.extents import EMPTY, merged, runs_of


def extents_from(pairs: Iterable[tuple[int, int]]) -> Extents:
    """Return the extents that pairs of start and end cover; they may come in any order, overlap and touch."""
    return union(np.array(list(pairs), np.int64).reshape(-1, 2))


def union(ranges: Extents) -> Extents:
    """Return the extents that rows of one array cover."""
    return merged([ranges[:1], ranges[1:]])  # a single part would be taken to be extents already


def whole_blocks(extents: Extents, size: int) -> Extents:
    """Return the blocks that ``extents`` touch, cut at the disk's end."""
    if not len(extents):
        return EMPTY
    grown = np.stack(
        (
            extents[:, 0] // BLOCK_BYTES * BLOCK_BYTES,
            np.minimum(-(-extents[:, 1] // BLOCK_BYTES) * BLOCK_BYTES, size),
        ),
        axis=1,
    )
    return union(grown)


def subtracted(extents: Extents, less: Extents) -> Extents:
    """Return what of ``extents`` lies outside of ``less``."""
    return _where(extents, less, inside=False)


def intersected(extents: Extents, other: Extents) -> Extents:
    """Return what both have in common."""
    return _where(extents, other, inside=True)


def _where(extents: Extents, other: Extents, *, inside: bool) -> Extents:
    if not len(extents) or not len(other):
        return EMPTY if inside else extents
    edges = np.unique(np.concatenate((extents.reshape(-1), other.reshape(-1))))
    starts = edges[:-1]
    in_first = np.searchsorted(extents.reshape(-1), starts, side="right") % 2 == 1
    in_other = np.searchsorted(other.reshape(-1), starts, side="right") % 2 == 1
    kept = in_first & (in_other if inside else ~in_other)
    runs = runs_of(kept)
    if not len(runs):
        return EMPTY
    return np.stack((edges[runs[:, 0]], edges[runs[:, 1]]), axis=1)
