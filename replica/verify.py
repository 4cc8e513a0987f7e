"""Verification: reads what recovery points need, says what is damaged and what still restores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from replica import history
from replica.catalog import ProtectedVm
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError
from replica.host import Host
from replica.keys import VmKeys
from replica.mapstore import MapStore
from replica.maptable import SegmentRef
from replica.model import Point
from replica.pipeline import ordered
from replica.restore import Nowhere, PointReader
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

    @property
    def damaged(self) -> bool:
        """Whether anything was found wrong."""
        return bool(self.unreadable) or not all(verdict.restores for verdict in self.verdicts)


@dataclass(slots=True)
class _Checked:
    """Segments that were looked at already: None where the segment is as it should be."""

    segments: dict[SegmentRef, Damage | None] = field(default_factory=dict)


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

    Quick: every object that a point needs exists in its size, its maps are whole. Full: in addition every block of
    every disk is read, decompressed and compared with the hash that was taken when it was replicated. Raises
    StoreError where the store cannot be asked; damage is no error, it is in the report.
    """
    workers = workers or Workers()
    checked = _Checked()
    verdicts, unreadable = [], []
    for point in history.points(store, found.keys) if points is None else points:
        if not isinstance(point, Point):
            unreadable.append(Damage(point.key, str(point)))
            continue
        verdict = _quick(store, host, found, point, checked, workers)
        if full and verdict.restores:
            verdict = _full(store, host, found, point, verdict, workers, progress)
        verdicts.append(verdict)
    return Report(full, tuple(verdicts), tuple(unreadable))


def _quick(
    store: Store, host: Host, found: ProtectedVm, point: Point, checked: _Checked, workers: Workers
) -> PointVerdict:
    damage: list[Damage] = []
    refs: dict[SegmentRef, None] = {}
    # No cache: what is verified is what the store holds.
    maps = MapStore(store, found.keys, None)
    parts = [ref for one in point.maps for ref in one.parts]
    for ref in parts:
        try:
            refs.update(dict.fromkeys(maps.fetch(ref).segment_refs()))
        except IntegrityError as error:
            damage.append(Damage(error.key, str(error)))
    new = [ref for ref in refs if ref not in checked.segments]
    with ThreadPoolExecutor(max(workers.uploads, workers.threads), "verify") as pool:
        results = ordered(pool, lambda ref: _look_at(store, found.keys.tenant, ref), new, limit=64)
        with closing(results):
            checked.segments.update(zip(new, results, strict=True))
    damage += [wrong for ref in refs if (wrong := checked.segments[ref]) is not None]
    return PointVerdict(point.point, tuple(damage), len(parts) + len(refs), sum(ref.size for ref in parts))


def _look_at(store: Store, tenant: str, ref: SegmentRef) -> Damage | None:
    key = VmKeys(tenant, ref.vm_id).segment(ref.part)
    try:
        size = store.head(key).size
    except ObjectMissingError:
        return Damage(key, "the segment is missing")
    if size != ref.size:
        return Damage(key, f"the segment has {size} bytes, it should have {ref.size}")
    return None


def _full(
    store: Store,
    host: Host,
    found: ProtectedVm,
    point: Point,
    verdict: PointVerdict,
    workers: Workers,
    progress: Progress,
) -> PointVerdict:
    reader = PointReader(store, host, found, point, workers)
    damage: list[Damage] = []
    read_bytes = verdict.read_bytes
    for disk in point.disks:
        try:
            read_bytes += reader.restore(disk, Nowhere(), progress, phase="verifying").data_bytes
        except IntegrityError as error:
            damage.append(Damage(error.key, f"disk {disk.number} ({disk.name}): {error}"))
    return PointVerdict(point.point, tuple(damage), verdict.objects, read_bytes)


def restorable(report: Report) -> Iterator[int]:
    """Yield the numbers of the points that were found to restore."""
    return (verdict.point for verdict in report.verdicts if verdict.restores)
