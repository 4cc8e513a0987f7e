"""Healing: puts a damaged map part or segment back under its key, once all that it held was found and checked.

An object that is put back holds at every offset what it held when it was written, so that every point that refers to
it restores again. It takes the damaged one's place by compare-and-swap: whoever slept meanwhile undoes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from replica.blockmap import WINDOW_BLOCKS, BlockMap
from replica.catalog import ProtectedVm
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    LeaseLostError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreRefusedError,
)
from replica.examination import Examination, entries_of
from replica.host import Host
from replica.keys import VmKeys
from replica.lease import Lease
from replica.mapstore import MapStore, map_cache
from replica.maptable import Entries, SegmentRef, join_entries
from replica.model import MapPartRef, MapRef, Point
from replica.reader import Fetch, plan_fetches
from replica.segment import (
    HEADER_BYTES,
    INDEX_ROW,
    TRAILER_BYTES,
    Frames,
    SegmentWriter,
    decode_index,
    decode_segment,
    decode_trailer,
)
from replica.stores.store import ObjectData, Store


@dataclass(frozen=True, slots=True)
class Unhealed:
    """An object that could not be put back, and why."""

    key: str
    why: str


class Healer:
    """Puts objects of one VM back, under a lease."""

    def __init__(self, store: Store, host: Host, found: ProtectedVm, examination: Examination, held: Lease) -> None:
        self._store = store
        self._keys = found.keys
        self._examination = examination
        self._held = held
        self._maps = MapStore(store, found.keys, map_cache(host))
        self.healed: list[str] = []
        self.unhealed: list[Unhealed] = []

    def heal_maps(self, points: Iterable[Point]) -> None:
        """Put back those damaged map parts of which this machine keeps a copy that matches the manifest's checksum."""
        damaged = dict.fromkeys(part for point in points for part, _ in self._examination.damaged_parts(point))
        for part in damaged:
            key = self._keys.map_part(part.part)
            copy = self._maps.cached(part)
            if copy is None:
                self.unhealed.append(Unhealed(key, "this machine keeps no copy of the map"))
            elif self._put(key, copy):
                self._examination.forget_part(part)

    def heal_segments(self, points: list[Point], whole: Point | None) -> None:
        """Put back those damaged segments whose every frame is good still, or has a copy that ``whole`` refers to."""
        for ref in self._examination.segments(points):
            if not self._examination.is_damaged(ref):
                continue
            key = self._examination.key(ref)
            if ref.vm_id != self._keys.vm_id:
                self.unhealed.append(Unhealed(key, "it belongs to another VM, which has to be repaired itself"))
                continue
            made = self._rebuilt(ref, points, whole)
            if isinstance(made, str):
                self.unhealed.append(Unhealed(key, made))
            elif self._put(key, made):
                self._examination.forget(ref)

    def _put(self, key: str, data: ObjectData) -> bool:
        self._held.check()
        try:
            try:
                tag = self._store.head(key).tag
            except ObjectMissingError:
                self._store.create(key, data)
            else:
                self._store.replace(key, data, tag=tag)
        except StoreRefusedError as error:
            self.unhealed.append(Unhealed(key, f"the store refuses it: {error.message}"))
            return False
        except (ObjectChangedError, ObjectExistsError, ObjectMissingError) as error:
            raise LeaseLostError("another agent repairs this VM", key=key, hint="stop one of the two") from error
        self.healed.append(key)
        return True

    def _rebuilt(self, ref: SegmentRef, points: list[Point], whole: Point | None) -> bytes | str:
        """Return the segment as it was, or why that cannot be."""
        key = self._examination.key(ref)
        data = self._read(key)
        entries = _index_of(data, key) if data is not None else None
        if entries is None:
            entries = self._entries_of_maps(ref, points)
        if not _fill(ref, entries):
            return "what it held is not known: its index cannot be read, and points that knew the rest were pruned"
        bad = np.ones(len(entries), np.bool_)
        if data is not None:
            bad = self._examination.bad_frames(ref, entries, data)
        copies = self._copies(entries.take(bad), whole) if whole is not None and bad.any() else {}
        if len(copies) < int(np.count_nonzero(bad)):
            return (
                f"{int(np.count_nonzero(bad)) - len(copies)} of its blocks are lost: "
                "the source no longer holds what they held"
            )
        payload = []
        for offset, length in zip(entries.offsets.tolist(), entries.lengths.tolist(), strict=True):
            payload.append(copies[offset] if offset in copies else (data or b"")[offset : offset + length])
        writer = SegmentWriter(ref.vm_id, ref.part)
        writer.append(Frames(entries.keys, entries.hashes, entries.lengths, entries.codecs, payload))
        made = writer.seal()
        # It was put together from what was checked; but it takes a place for good, so it is read as any other.
        again = entries_of(decode_segment(made, key=key, vm_id=ref.vm_id, part=ref.part))
        same = len(made) == ref.size and np.array_equal(again.offsets, entries.offsets)
        if not same or self._examination.bad_frames(ref, again, made).any():
            return "it could not be put together as it was"
        return made

    def _read(self, key: str) -> bytes | None:
        try:
            return self._store.get(key)
        except (ObjectMissingError, IntegrityError, FormatVersionError):
            return None

    def _entries_of_maps(self, ref: SegmentRef, points: list[Point]) -> Entries:
        """Return the entries that any map part has of the segment's frames, in order of place, each frame once."""
        found: dict[int, Entries] = {}
        for part in self._readable_parts(points):
            for window in BlockMap([MapRef(0, (part,))], self._maps.fetch).windows(0, 1 << 64):
                if ref not in window.table.refs:
                    continue
                own = window.entries.take(window.entries.segments == window.table.refs.index(ref))
                for at, offset in enumerate(own.offsets.tolist()):
                    found.setdefault(offset, own.take(slice(at, at + 1)))
        return join_entries([found[offset] for offset in sorted(found)])

    def _readable_parts(self, points: list[Point]) -> Iterator[MapPartRef]:
        damaged = {part for point in points for part, _ in self._examination.damaged_parts(point)}
        parts = dict.fromkeys(part for point in points for one in point.maps for part in one.parts)
        return (part for part in parts if part not in damaged)

    def _copies(self, wanted: Entries, whole: Point) -> dict[int, bytes]:
        """Return frames that ``whole`` has of the same blocks, by the offsets at which they are wanted."""
        wanted = wanted.take(np.argsort(wanted.keys, kind="stable"))
        offsets = dict(zip(wanted.keys.tolist(), wanted.offsets.tolist(), strict=True))
        block_map = BlockMap(whole.maps, self._maps.fetch)
        copies = {}
        for number in np.unique(wanted.keys // np.uint64(WINDOW_BLOCKS)).tolist():
            window = block_map.window(number * WINDOW_BLOCKS, (number + 1) * WINDOW_BLOCKS)
            trusted = window.entries.take(window.entries.is_data & ~self._examination.distrusted(window))
            for fetch in plan_fetches(replace(window, entries=_same_frames(trusted, wanted))):
                for key, frame in self._frames(fetch):
                    copies[offsets[key]] = frame
        return copies

    def _frames(self, fetch: Fetch) -> Iterator[tuple[int, bytes]]:
        """Yield the block keys and frames of a fetch, as they are stored."""
        key = VmKeys(self._keys.tenant, fetch.ref.vm_id).segment(fetch.ref.part)
        try:
            data = self._store.get(key, start=fetch.start, length=fetch.length)
        except (ObjectMissingError, IntegrityError, FormatVersionError):
            return
        for at, offset in enumerate(fetch.entries.offsets.tolist()):
            start = offset - fetch.start
            yield int(fetch.entries.keys[at]), data[start : start + int(fetch.entries.lengths[at])]


def _index_of(data: bytes, key: str) -> Entries | None:
    """Return what a segment's index says, whatever became of its frames; None where the index is damaged too."""
    try:
        trailer = decode_trailer(memoryview(data)[-TRAILER_BYTES:], key=key, size=len(data))
        return entries_of(decode_index(memoryview(data)[trailer.index_offset : -TRAILER_BYTES], trailer, key=key))
    except (IntegrityError, FormatVersionError):
        return None


def _fill(ref: SegmentRef, entries: Entries) -> bool:
    """Whether the frames lie one after the other and make up the whole segment."""
    if not len(entries):
        return False
    starts = entries.offsets.astype(np.int64)
    ends = starts + entries.lengths
    size = int(ends[-1]) + len(entries) * INDEX_ROW.itemsize + TRAILER_BYTES
    return int(starts[0]) == HEADER_BYTES and bool(np.all(starts[1:] == ends[:-1])) and size == ref.size


def _same_frames(held: Entries, wanted: Entries) -> Entries:
    """Return those entries of ``held`` whose frame is stored as one of ``wanted`` is. Both ascend by key."""
    if not len(held) or not len(wanted):
        return held.take(slice(0, 0))
    places = np.minimum(np.searchsorted(wanted.keys, held.keys), len(wanted) - 1)
    like = wanted.take(places)
    same = (
        (held.keys == like.keys)
        & np.all(held.hashes == like.hashes, axis=1)
        & (held.lengths == like.lengths)
        & (held.codecs == like.codecs)
    )
    return held.take(same)
