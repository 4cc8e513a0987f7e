"""Verification: reads what recovery points need, says what is damaged and what still restores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from replica import history
from replica.block import BLOCK_BYTES
from replica.blockmap import Window
from replica.catalog import ProtectedVm
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError
from replica.host import Host
from replica.keys import VmKeys
from replica.mapstore import MapStore
from replica.maptable import SegmentRef
from replica.model import Point
from replica.pipeline import ordered
from replica.restore import Nowhere, PointReader
from replica.segment import decode_segment
from replica.stores.store import Store
from replica.workers import Workers
from vhdx.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: the object concerned, and what was found."""

    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class PointVerdict:
    """What verification found of one point; it restores if nothing is damaged."""

    point: int
    damage: tuple[Damage, ...]
    objects: int
    read_bytes: int

    @property
    def restores(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.damage


@dataclass(frozen=True, slots=True)
class Report:
    """What verification found. ``full``: every block was read and hashed; otherwise only presence and sizes."""

    full: bool
    verdicts: tuple[PointVerdict, ...]
    unreadable: tuple[Damage, ...]  # manifests that cannot be read, so that their points are unknown
    segments: tuple[Damage, ...] = ()  # segments that are not as they were written, whether a point is harmed or not

    @property
    def damaged(self) -> bool:
        """Whether anything was found wrong."""
        return bool(self.unreadable or self.segments) or not all(verdict.restores for verdict in self.verdicts)


def verify(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    points: Iterable[Point | IntegrityError | FormatVersionError] | None = None,
    full: bool = False,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Report:
    """Verify the points given, or all of the VM.

    Quick: every object that a point needs exists in its size, its maps are whole. Full: in addition every segment is
    read and compared with its checksum, and every block of every disk decompressed and compared with the hash that was
    taken when it was replicated; what several points share is read once. Raises StoreError where the store cannot be
    asked; damage is no error, it is in the report.
    """
    verification = _Verification(store, host, found, workers or Workers(), progress)
    verdicts, unreadable = [], []
    for point in history.points(store, found.keys) if points is None else points:
        if isinstance(point, Point):
            verdict = verification.quick(point)
            verdicts.append(verification.full(point, verdict) if full and verdict.restores else verdict)
        else:
            unreadable.append(Damage(point.key, str(point)))
    segments = tuple(damage for damage in verification.whole.values() if damage is not None)
    return Report(full, tuple(verdicts), tuple(unreadable), segments)


class _Verification:
    """One run, and what it has looked at: nothing is read twice that several points share.

    Memory: 16 bytes for each block that was read, in arrays.
    """

    def __init__(self, store: Store, host: Host, found: ProtectedVm, workers: Workers, progress: Progress) -> None:
        self._store = store
        self._host = host
        self._found = found
        self._workers = workers
        self._progress = progress
        self._present: dict[SegmentRef, Damage | None] = {}
        self.whole: dict[SegmentRef, Damage | None] = {}
        self._frames = _Frames()

    def quick(self, point: Point) -> PointVerdict:
        """Look whether everything that a point needs is there in its size, its maps read and checked."""
        damage: list[Damage] = []
        parts = [ref for one in point.maps for ref in one.parts]
        refs, damaged_maps = self._segments_of(point)
        damage += damaged_maps
        self._look_at(refs, self._present, self._look_at_size)
        damage += [wrong for ref in refs if (wrong := self._present[ref]) is not None]
        return PointVerdict(point.point, tuple(damage), len(parts) + len(refs), sum(ref.size for ref in parts))

    def full(self, point: Point, verdict: PointVerdict) -> PointVerdict:
        """Read all that a point needs and was not read before. Damage to segments is noted apart, in ``whole``."""
        refs, _ = self._segments_of(point)
        self._look_at(refs, self.whole, self._look_at_all)
        reader = PointReader(self._store, self._host, self._found, point, self._workers)
        damage: list[Damage] = []
        read_bytes = verdict.read_bytes
        for disk in point.disks:
            try:
                reader.restore(disk, Nowhere(), self._progress, phase="verifying", needed=self._frames.unread)
                read_bytes += self._frames.settle()
            except (IntegrityError, FormatVersionError) as error:
                self._frames.forget()
                damage.append(Damage(error.key, f"disk {disk.number} ({disk.name}): {error}"))
        return PointVerdict(point.point, tuple(damage), verdict.objects, read_bytes)

    def _segments_of(self, point: Point) -> tuple[list[SegmentRef], list[Damage]]:
        # No cache: what is verified is what the store holds.
        maps = MapStore(self._store, self._found.keys, None)
        refs: dict[SegmentRef, None] = {}
        damage = []
        for ref in (ref for one in point.maps for ref in one.parts):
            try:
                refs.update(dict.fromkeys(maps.fetch(ref).segment_refs()))
            except (IntegrityError, FormatVersionError) as error:
                damage.append(Damage(error.key, str(error)))
        return list(refs), damage

    def _look_at(
        self,
        refs: Iterable[SegmentRef],
        seen: dict[SegmentRef, Damage | None],
        look: Callable[[SegmentRef], Damage | None],
    ) -> None:
        new = [ref for ref in refs if ref not in seen]
        threads = max(self._workers.uploads, self._workers.threads)
        with ThreadPoolExecutor(threads, "verify") as pool:
            results = ordered(pool, look, new, limit=2 * threads)
            with closing(results):
                seen.update(zip(new, results, strict=True))

    def _key(self, ref: SegmentRef) -> str:
        return VmKeys(self._found.keys.tenant, ref.vm_id).segment(ref.part)

    def _look_at_size(self, ref: SegmentRef) -> Damage | None:
        key = self._key(ref)
        try:
            size = self._store.head(key).size
        except ObjectMissingError:
            return Damage(key, "the segment is missing")
        if size != ref.size:
            return Damage(key, f"the segment has {size} bytes, it should have {ref.size}")
        return None

    def _look_at_all(self, ref: SegmentRef) -> Damage | None:
        key = self._key(ref)
        try:
            decode_segment(self._store.get(key), key=key, vm_id=ref.vm_id, part=ref.part)
        except ObjectMissingError:
            return Damage(key, "the segment is missing")
        except (IntegrityError, FormatVersionError) as error:
            return Damage(key, str(error))
        return None


class _Frames:
    """The frames that were read and found good: for each segment their offsets, with half of the hash expected."""

    def __init__(self) -> None:
        self._good: dict[SegmentRef, npt.NDArray[np.uint64]] = {}  # shape (n, 2), sorted by offset
        self._planned: dict[SegmentRef, list[npt.NDArray[np.uint64]]] = {}

    def unread(self, window: Window) -> Window:
        """Return the window with only those blocks that are still to be read, which are noted as planned."""
        keep = np.zeros(len(window.entries), np.bool_)
        for number, ref in enumerate(window.table.refs):
            rows = np.flatnonzero(window.entries.segments == number)
            wanted = np.stack((window.entries.offsets[rows].astype(np.uint64), window.entries.hashes[rows, 0]), axis=1)
            good = self._good.get(ref)
            if good is not None:
                places = np.minimum(np.searchsorted(good[:, 0], wanted[:, 0]), len(good) - 1)
                new = np.any(good[places] != wanted, axis=1)
                rows, wanted = rows[new], wanted[new]
            keep[rows] = True
            self._planned.setdefault(ref, []).append(wanted)
        return replace(window, entries=window.entries.take(keep))

    def settle(self) -> int:
        """Note what was planned as good; return the bytes of its blocks."""
        count = 0
        for ref, planned in self._planned.items():
            new = np.concatenate(planned)
            count += len(new)
            joined = np.concatenate((self._good[ref], new)) if ref in self._good else new
            if len(joined):
                self._good[ref] = joined[np.argsort(joined[:, 0], kind="stable")]
        self._planned.clear()
        return count * BLOCK_BYTES

    def forget(self) -> None:
        """Forget what was planned: somewhere in it there is damage."""
        self._planned.clear()


def restorable(report: Report) -> Iterator[int]:
    """Yield the numbers of the points that were found to restore."""
    return (verdict.point for verdict in report.verdicts if verdict.restores)
