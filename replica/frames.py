"""What is known of frames: which were read and found good, which are damaged, which are lost with their segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from replica.blockmap import Window
from replica.maptable import Entries, SegmentRef

Identities = npt.NDArray[np.uint64]  # shape (n,)
Mask = npt.NDArray[np.bool_]

_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)


def identities(entries: Entries) -> Identities:
    """Return a number for each entry that tells its frame, within a segment, and the content that it should have."""
    places = entries.offsets.astype(np.uint64) | (entries.lengths.astype(np.uint64) << np.uint64(32))
    return places * _SPREAD + entries.hashes[:, 0]


class FrameVerdicts:
    """The frames that were judged, by segment. Memory: 8 bytes for each."""

    def __init__(self) -> None:
        self._good: dict[SegmentRef, Identities] = {}  # each sorted
        self._bad: dict[SegmentRef, Identities] = {}
        self._lost: set[SegmentRef] = set()

    def lose(self, ref: SegmentRef) -> None:
        """Note that all frames of the segment are damaged."""
        self._lost.add(ref)

    def add(self, ref: SegmentRef, *, good: Identities, bad: Identities) -> None:
        """Note frames that were read."""
        for verdicts, new in ((self._good, good), (self._bad, bad)):
            if len(new):
                verdicts[ref] = np.union1d(verdicts[ref], new) if ref in verdicts else np.unique(new)

    def forget(self, ref: SegmentRef) -> None:
        """Forget all that was known of a segment, since it was written anew."""
        self._lost.discard(ref)
        self._good.pop(ref, None)
        self._bad.pop(ref, None)

    def harms(self, ref: SegmentRef) -> bool:
        """Whether a frame of the segment is damaged."""
        return ref in self._lost or ref in self._bad

    def bad(self, window: Window) -> Mask:
        """Tell which entries of the window are of damaged frames."""
        mask = np.zeros(len(window.entries), np.bool_)
        for ref, rows in _by_segment(window):
            if ref in self._lost:
                mask[rows] = True
            elif ref in self._bad:
                mask[rows] = np.isin(identities(window.entries.take(rows)), self._bad[ref])
        return mask

    def unknown(self, window: Window) -> Mask:
        """Tell which entries of the window are of frames that nothing is known of."""
        mask = np.zeros(len(window.entries), np.bool_)
        for ref, rows in _by_segment(window):
            if ref in self._lost:
                continue
            wanted = identities(window.entries.take(rows))
            known = np.zeros(len(rows), np.bool_)
            for verdicts in (self._good, self._bad):
                if ref in verdicts:
                    known |= _contains(verdicts[ref], wanted)
            mask[rows] = ~known
        return mask


def _contains(held: Identities, wanted: Identities) -> Mask:
    places = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
    return np.equal(held[places], wanted)


def _by_segment(window: Window) -> Iterator[tuple[SegmentRef, npt.NDArray[np.intp]]]:
    """Yield the segments that the window's data entries refer to, each with the rows of those entries."""
    order = np.argsort(window.entries.segments, kind="stable")
    ordered = window.entries.segments[order]
    for number, ref in enumerate(window.table.refs):
        first, end = np.searchsorted(ordered, (number, number + 1)).tolist()
        if first < end:
            yield ref, order[first:end]
