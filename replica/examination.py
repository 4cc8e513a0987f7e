"""Examines what recovery points need: maps, segments, frames, each looked at once, and tells what its damage costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from replica.block import Digest, block_count, disk_base
from replica.blockmap import WINDOW_BLOCKS, BlockMap, Window
from replica.catalog import ProtectedVm
from replica.damage import (
    Damage,
    DamagedObject,
    KeyRanges,
    PointVerdict,
    merged,
    no_ranges,
    on_disks,
    ranges_of,
)
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError
from replica.frames import FrameVerdicts, Identities, Mask, identities
from replica.host import Host
from replica.keys import VmKeys
from replica.mapstore import MapStore, map_cache
from replica.maptable import Entries, SegmentRef
from replica.model import DiskRecord, MapPartRef, MapRef, Point
from replica.pipeline import nothing, ordered
from replica.reader import FETCH_BLOCKS, BlockReader, Fetch, digest_of, plan_fetches
from replica.segment import decode_segment
from replica.stores.store import Store
from replica.workers import BATCHES_PER_THREAD, Workers
from vhdx.progress import Progress, silent

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Judged:
    """Frames of a segment that were read."""

    ref: SegmentRef
    good: Identities
    bad: Identities


@dataclass(slots=True)
class _Cost:
    """What a damaged object costs, gathered point by point."""

    message: str
    points: list[int] = field(default_factory=list)
    ranges: KeyRanges = field(default_factory=no_ranges)


class Examination:
    """What one run has looked at, of one VM. Nothing is read twice that several points share.

    Memory: 8 bytes for each block that was read, 8 for each reference of a map part to a segment, a segment (16 MiB)
    for each thread, and 16 bytes for each range of damaged blocks. ``tick`` is called now and then, as by ``ordered``.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        found: ProtectedVm,
        workers: Workers,
        *,
        progress: Progress = silent,
        tick: Callable[[], None] = nothing,
    ) -> None:
        self._store = store
        self._keys = found.keys
        self._workers = workers
        self._progress = progress
        self.tick = tick
        # No cache at first: what is verified is what the store holds. Once that is known to be whole, copies will do.
        self._stored_maps = MapStore(store, found.keys, None)
        self._maps = MapStore(store, found.keys, map_cache(host))
        self._reader = BlockReader(store, found.keys.tenant, found.vm.hash_seed)
        self._frames = FrameVerdicts()
        self._parts: dict[MapPartRef, tuple[SegmentRef, ...] | Damage] = {}
        self._refs: dict[SegmentRef, SegmentRef] = {}  # so that each is held once
        self._present: dict[SegmentRef, Damage | None] = {}
        self.whole: dict[SegmentRef, Damage | None] = {}  # of the segments that were read as a whole
        self._digests: dict[int, list[Damage]] = {}
        self._block_bytes: dict[int, int] = {}
        self._costs: dict[str | None, _Cost] = {}
        self._disks: dict[int, DiskRecord] = {}
        self._suspects: dict[MapPartRef, npt.NDArray[np.uint64]] = {}

    # --- looking

    def look(self, point: Point) -> None:
        """Look whether everything that a point needs is there in its size; its maps are read and checked."""
        for part in _parts(point):
            if part not in self._parts:
                self._parts[part] = self._read_part(part)
        new = [ref for ref in self.segments([point]) if ref not in self._present]
        for ref, damage in zip(new, self._all(self._look_at_size, new), strict=True):
            self._present[ref] = damage
            if damage is not None:
                self._frames.lose(ref)
                self._suspects.clear()

    def read_segments(self, refs: Iterable[SegmentRef]) -> None:
        """Read segments that were looked at, whole: every byte is compared with their checksums, every block hashed."""
        new = [ref for ref in refs if ref not in self.whole]
        self.whole.update({ref: self._present[ref] for ref in new})
        there = [ref for ref in new if self._present[ref] is None]
        total, done = sum(ref.size for ref in there), 0
        for ref, (damage, judged) in zip(there, self._all(self._read_segment, there), strict=True):
            self.whole[ref] = damage
            self._note(judged)
            done += ref.size
            self._progress(done, total, "verifying")

    def read_blocks(self, point: Point) -> None:
        """Compare every block of a point with the hash taken when it was replicated, and all with the disks' digests.

        Blocks that reading their segments has judged are not read again.
        """
        if any(self.damaged_parts(point)):
            return  # what its blocks are is not known
        wrong = []
        count = 0
        for disk in point.disks:
            digest, blocks = self._read_disk(point, disk)
            count += blocks
            if digest != disk.digest or blocks != disk.data_blocks:
                message = (
                    f"disk {disk.number} ({disk.name}): holds other blocks than were replicated: its maps are damaged "
                    f"(digest {digest}, expected {disk.digest})"
                )
                base = disk_base(disk.number)
                everything = np.array([[base, base + block_count(disk.size)]], np.uint64)
                wrong.append(Damage(None, message, on_disks(everything, [disk])))
        self._digests[point.point] = wrong
        self._block_bytes[point.point] = count * 65536

    def read_frames(self, points: Iterable[Point]) -> None:
        """Read, one by one, the frames of those segments that were read and are not whole: some may be good."""
        doubtful = {ref for ref, damage in self.whole.items() if damage is not None and self._present[ref] is None}
        if not doubtful:
            return
        for part in dict.fromkeys(part for point in points for part in _parts(point)):
            seen = self._parts[part]
            if isinstance(seen, Damage) or doubtful.isdisjoint(seen):
                continue
            for window in BlockMap([MapRef(0, (part,))], self._maps.fetch).windows(0, 1 << 64):
                unread = replace(window, entries=window.entries.take(self._frames.unknown(window)))
                fetches = [fetch for fetch in plan_fetches(unread) if fetch.ref in doubtful]
                for judged in self._all(self._read_fetch, fetches):
                    self._note(judged)

    def forget_part(self, ref: MapPartRef) -> None:
        """Forget what is known of a map part that was written anew."""
        self._parts.pop(ref, None)

    def forget(self, ref: SegmentRef) -> None:
        """Forget what is known of a segment that was written anew."""
        self._frames.forget(ref)
        self._present.pop(ref, None)
        self.whole.pop(ref, None)
        self._suspects.clear()

    # --- asking

    def segments(self, points: Iterable[Point]) -> list[SegmentRef]:
        """Return the segments that the points refer to, each once, as far as their maps can be read."""
        found: dict[SegmentRef, None] = {}
        for ref in dict.fromkeys(part for point in points for part in _parts(point)):
            seen = self._parts[ref]
            if not isinstance(seen, Damage):
                found.update(dict.fromkeys(seen))
        return list(found)

    def damaged_parts(self, point: Point) -> Iterator[tuple[MapPartRef, Damage]]:
        """Yield the map parts of a point that are damaged or missing."""
        for ref in _parts(point):
            seen = self._parts[ref]
            if isinstance(seen, Damage):
                yield ref, seen

    def has_sound_maps(self, point: Point) -> bool:
        """Whether the point's maps can be read, and hold what was replicated as far as that was looked at."""
        return not any(self.damaged_parts(point)) and not self._digests.get(point.point)

    def is_damaged(self, ref: SegmentRef) -> bool:
        """Whether a segment is damaged, or any of its frames."""
        return self._frames.harms(ref) or self.whole.get(ref) is not None

    def distrusted(self, window: Window) -> Mask:
        """Tell which entries of a window are of frames that were found damaged."""
        return self._frames.bad(window)

    def judge(self, points: Iterable[Point]) -> tuple[tuple[PointVerdict, ...], tuple[DamagedObject, ...]]:
        """Return what is known of the points, and of every damaged object what it costs all of them together."""
        self._costs.clear()
        verdicts = tuple(map(self.verdict, points))
        return verdicts, self._objects()

    def verdict(self, point: Point) -> PointVerdict:
        """Return what is known of a point."""
        damage = []
        for part, wrong in self.damaged_parts(point):
            ranges = np.array([[part.first_key, part.last_key + 1]], np.uint64)
            damage.append(self._counted(point, wrong.key, wrong.message, ranges))
        for ref, ranges in self._harmed(point).items():
            damage.append(self._counted(point, self.key(ref), self._why(ref), ranges))
        damage += self._digests.get(point.point, [])
        hit = {disk.number for one in damage for disk in one.disks}
        refs, parts = self.segments([point]), list(_parts(point))
        return PointVerdict(
            point.point,
            tuple(damage),
            len(refs) + len(parts),
            sum(part.size for part in parts) + self._block_bytes.get(point.point, 0),
            tuple(disk.number for disk in point.disks if disk.number not in hit),
        )

    def _objects(self) -> tuple[DamagedObject, ...]:
        found = [
            DamagedObject(
                key, cost.message, tuple(sorted(set(cost.points))), on_disks(cost.ranges, self._disks.values())
            )
            for key, cost in self._costs.items()
        ]
        harmless = [one for one in self.whole.values() if one is not None and one.key not in self._costs]
        return (*found, *(DamagedObject(one.key, one.message, (), ()) for one in harmless))

    def key(self, ref: SegmentRef) -> str:
        """Return a segment's key."""
        return VmKeys(self._keys.tenant, ref.vm_id).segment(ref.part)

    # --- what damage costs

    def _why(self, ref: SegmentRef) -> str:
        known = self._present.get(ref) or self.whole.get(ref)
        return known.message if known else f"{self.key(ref)}: blocks of the segment are damaged"

    def _counted(self, point: Point, key: str | None, message: str, ranges: KeyRanges) -> Damage:
        cost = self._costs.setdefault(key, _Cost(message))
        cost.points.append(point.point)
        cost.ranges = merged([cost.ranges, ranges])
        self._disks.update((disk.number, disk) for disk in point.disks)
        return Damage(key, message, on_disks(ranges, point.disks))

    def _harmed(self, point: Point) -> dict[SegmentRef, KeyRanges]:
        """Return the block keys of a point that are damaged, by segment.

        A map may refer to a damaged frame that a newer map has replaced: that harms nothing.
        """
        harmful = {ref for ref in self.segments([point]) if self._frames.harms(ref)}
        if not harmful:
            return {}
        readable = self._readable(point)
        windows: set[int] = set()
        for one in readable:
            for part in one.parts:
                seen = self._parts[part]
                if not isinstance(seen, Damage) and not harmful.isdisjoint(seen):
                    windows.update(self._suspect_windows(part).tolist())
        block_map = BlockMap(readable, self._maps.fetch)
        harmed: dict[SegmentRef, list[KeyRanges]] = {}
        for first in sorted(windows):
            window = block_map.window(first, first + WINDOW_BLOCKS)
            bad = window.entries.take(self._frames.bad(window))
            for number in np.unique(bad.segments).tolist():
                keys = bad.keys[bad.segments == number]
                harmed.setdefault(window.table.refs[number], []).append(ranges_of(keys))
        return {ref: merged(ranges) for ref, ranges in harmed.items()}

    def _suspect_windows(self, part: MapPartRef) -> npt.NDArray[np.uint64]:
        """Return the first keys of the windows in which a map part refers to damaged frames."""
        if part not in self._suspects:
            alone = BlockMap([MapRef(0, (part,))], self._maps.fetch)
            found = [window.first for window in alone.windows(0, 1 << 64) if self._frames.bad(window).any()]
            self._suspects[part] = np.array(found, np.uint64)
        return self._suspects[part]

    def _readable(self, point: Point) -> list[MapRef]:
        maps = []
        for one in point.maps:
            parts = tuple(ref for ref in one.parts if not isinstance(self._parts[ref], Damage))
            if parts:
                maps.append(replace(one, parts=parts))
        return maps

    # --- reading

    def _all(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
        threads = max(self._workers.uploads, self._workers.threads)
        with ThreadPoolExecutor(threads, "verify") as pool:
            results = ordered(pool, work, items, limit=2 * threads, tick=self.tick)
            with closing(results):
                for result in results:
                    self.tick()
                    yield result

    def _read_part(self, ref: MapPartRef) -> tuple[SegmentRef, ...] | Damage:
        self.tick()
        try:
            refs = self._stored_maps.fetch(ref).segment_refs()
            return tuple(self._refs.setdefault(one, one) for one in refs)
        except (IntegrityError, FormatVersionError) as error:
            return Damage(error.key, str(error))

    def _look_at_size(self, ref: SegmentRef) -> Damage | None:
        key = self.key(ref)
        try:
            size = self._store.head(key).size
        except ObjectMissingError:
            return Damage(key, "the segment is missing")
        if size != ref.size:
            return Damage(key, f"the segment has {size} bytes, it should have {ref.size}")
        return None

    def _read_segment(self, ref: SegmentRef) -> tuple[Damage | None, _Judged | None]:
        key = self.key(ref)
        try:
            data = self._store.get(key)
            rows = decode_segment(data, key=key, vm_id=ref.vm_id, part=ref.part)
        except ObjectMissingError:
            return Damage(key, "the segment is missing"), None
        except (IntegrityError, FormatVersionError) as error:
            return Damage(key, str(error)), None  # which of its blocks are harmed is found by reading them one by one
        if ref.vm_id != self._keys.vm_id:
            return None, None  # its index has the hashes of the other VM's seed
        entries = entries_of(rows)
        bad = self.bad_frames(ref, entries, data)
        judged = _Judged(ref, identities(entries.take(~bad)), identities(entries.take(bad)))
        if bad.any():
            message = f"{key}: {int(bad.sum())} blocks of the segment do not have the hashes that its index says"
            return Damage(key, message), judged
        return None, judged

    def bad_frames(self, ref: SegmentRef, entries: Entries, data: bytes) -> Mask:
        """Tell which frames of a segment are damaged. ``entries`` are in order of place, ``data`` is all of it."""
        slices = [slice(at, at + FETCH_BLOCKS) for at in range(0, len(entries), FETCH_BLOCKS)]
        found = [self.bad_blocks(fetch_of(ref, entries, rows), data) for rows in slices]
        return np.concatenate(found) if found else np.zeros(0, np.bool_)

    def bad_blocks(self, fetch: Fetch, data: bytes | None) -> Mask:
        """Tell which blocks of a fetch are damaged. ``data`` is the segment, None to read from the store."""
        try:
            self._unpack(fetch, data)
        except (IntegrityError, FormatVersionError):
            if len(fetch.entries) == 1:
                return np.ones(1, np.bool_)
            singles = [fetch_of(fetch.ref, fetch.entries, slice(at, at + 1)) for at in range(len(fetch.entries))]
            return np.concatenate([self.bad_blocks(one, data) for one in singles])
        return np.zeros(len(fetch.entries), np.bool_)

    def _unpack(self, fetch: Fetch, data: bytes | None) -> None:
        if data is None:
            self._reader.read(fetch)
        else:
            self._reader.unpack(fetch, data[fetch.start : fetch.start + fetch.length])

    def _read_disk(self, point: Point, disk: DiskRecord) -> tuple[Digest, int]:
        digest = Digest()
        blocks = 0
        block_map = BlockMap(point.maps, self._maps.fetch)

        def fetches() -> Iterator[Fetch]:
            nonlocal blocks
            base = disk_base(disk.number)
            for window in block_map.windows(base, base + block_count(disk.size)):
                found, count = digest_of(window)
                digest.combine(found, Digest())
                blocks += count
                yield from plan_fetches(replace(window, entries=window.entries.take(self._frames.unknown(window))))

        threads = self._workers.fetches(self._store.url)
        with ThreadPoolExecutor(threads, "verify") as pool:
            results = ordered(pool, self._read_fetch, fetches(), limit=threads * BATCHES_PER_THREAD, tick=self.tick)
            with closing(results):
                for judged in results:
                    self._note(judged)
                    self.tick()
        return digest, blocks

    def _read_fetch(self, fetch: Fetch) -> _Judged:
        bad = self.bad_blocks(fetch, None)
        return _Judged(fetch.ref, identities(fetch.entries.take(~bad)), identities(fetch.entries.take(bad)))

    def _note(self, judged: _Judged | None) -> None:
        if judged is not None:
            self._frames.add(judged.ref, good=judged.good, bad=judged.bad)
            if len(judged.bad):
                self._suspects.clear()


def _parts(point: Point) -> Iterator[MapPartRef]:
    return (ref for one in point.maps for ref in one.parts)


def entries_of(rows: npt.NDArray[np.void]) -> Entries:
    """Return a segment's index as entries, all in segment 0."""
    nowhere = np.zeros(len(rows), np.uint32)
    return Entries(rows["key"], nowhere, rows["offset"], rows["length"], rows["codec"], rows["hash"])


def fetch_of(ref: SegmentRef, entries: Entries, rows: slice) -> Fetch:
    """Return what fetches some neighbouring entries, which are in order of place."""
    chosen = entries.take(rows)
    start = int(chosen.offsets[0])
    end = int((chosen.offsets.astype(np.int64) + chosen.lengths).max())
    return Fetch(ref, start, end - start, chosen)
