"""Packs a cycle's changes: frames into segments that upload in the background, entries in key order into its map."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from replica.keys import PartId, VmKeys
from replica.mapstore import MapBuilder
from replica.maptable import Entries, SegmentRef, SegmentTable, newest_wins, zero_entries
from replica.pipeline import Uploads
from replica.scan import Changes
from replica.segment import Frames, SegmentWriter
from replica.stores.store import Store

SEGMENT_BYTES: Final = 16 << 20
SEGMENT_FRAMES: Final = 8192
WAITING_ENTRIES: Final = 1 << 18


@dataclass(slots=True)
class _Place:
    """Where entries point to: a segment, whose size is known once it is sealed."""

    part: PartId
    size: int = 0


@dataclass(slots=True)
class _WindowEntries:
    """The entries of one window, which go into the map once their segments are sealed and none can follow."""

    window: tuple[int, int]  # disk number, window number
    stored: list[tuple[_Place, Entries]] = field(default_factory=list)
    found: list[tuple[Entries, SegmentTable]] = field(default_factory=list)
    zeros: list[Entries] = field(default_factory=list)


class Packer:
    """Takes a cycle's changes in order. Memory: segments under way, ``WAITING_ENTRIES`` and a window of entries."""

    def __init__(
        self, store: Store, keys: VmKeys, maps: MapBuilder, uploads: Uploads, *, point: int, epoch: int
    ) -> None:
        self._store = store
        self._keys = keys
        self._maps = maps
        self._uploads = uploads
        self._point = point
        self._epoch = epoch
        self._segment: SegmentWriter | None = None
        self._place = _Place(PartId(point, epoch, 0))
        self._windows: deque[_WindowEntries] = deque()
        self._waiting = 0
        self.segments = 0
        self.stored_bytes = 0

    def add(self, disk_number: int, changes: Changes) -> None:
        """Take the changes of the next batch. Raises StoreError where an earlier upload failed."""
        window = self._window((disk_number, changes.window))
        if changes.frames is not None:
            self._store_frames(window, changes.frames)
        if changes.found is not None:
            window.found.append(changes.found)
            self._waiting += len(changes.found[0])
        for zeros in changes.zeros:
            window.zeros.append(zero_entries(zeros))
            self._waiting += len(zeros)
        if self._waiting >= WAITING_ENTRIES:
            self._seal()

    def finish(self) -> None:
        """Seal the last segment, hand all entries to the map, and return once every segment is stored."""
        self._seal()
        while self._windows:
            self._flush(self._windows.popleft())
        self._uploads.drain()

    def _window(self, window: tuple[int, int]) -> _WindowEntries:
        if not self._windows or self._windows[-1].window != window:
            self._windows.append(_WindowEntries(window))
        return self._windows[-1]

    def _store_frames(self, window: _WindowEntries, frames: Frames) -> None:
        if self._segment is None:
            self._place = _Place(PartId(self._point, self._epoch, self.segments))
            self._segment = SegmentWriter(self._keys.vm_id, self._place.part)
            self.segments += 1
        segment = self._segment
        offsets = segment.append(frames)
        unnumbered = np.zeros(len(offsets), np.uint32)
        entries = Entries(frames.keys, unnumbered, offsets, frames.lengths, frames.codecs, frames.hashes)
        window.stored.append((self._place, entries))
        self._waiting += len(entries)
        if segment.size >= SEGMENT_BYTES or segment.frames >= SEGMENT_FRAMES:
            self._seal()

    def _seal(self) -> None:
        """Send the segment at work on its way and flush the windows that wait for nothing more."""
        segment, self._segment = self._segment, None
        if segment is not None:
            self._place.size = segment.sealed_size
            self.stored_bytes += segment.sealed_size
            key = self._keys.segment(segment.part)
            # Sealing hashes the whole segment, so it is left to the thread that uploads it.
            self._uploads.submit(lambda: _upload(self._store, key, segment))
        while len(self._windows) > 1:
            self._flush(self._windows.popleft())
        self._waiting = 0

    def _flush(self, window: _WindowEntries) -> None:
        table = SegmentTable()
        parts = list(window.zeros)
        for place, entries in window.stored:
            entries.segments[:] = table.number(SegmentRef(self._keys.vm_id, place.part, place.size))
            parts.append(entries)
        for entries, their_table in window.found:
            own = np.array([table.number(ref) for ref in their_table.refs], np.uint32)
            parts.append(replace(entries, segments=own[entries.segments]))
        if parts:
            self._maps.append(newest_wins(parts), table)


def _upload(store: Store, key: str, segment: SegmentWriter) -> None:
    store.create(key, segment.seal())
