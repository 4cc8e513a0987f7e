"""Repair: makes the newest point of a VM whole again from its source, and older ones as far as that is possible.

What it may write, in which order, and why no crash makes anything worse, is set out in docs/ordering.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from replica import cycle, history, lease, manifest, verify
from replica.catalog import ProtectedVm
from replica.cycle import Basis
from replica.damage import PointVerdict, Report
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    LeaseLostError,
    ObjectChangedError,
    ObjectMissingError,
)
from replica.examination import Examination
from replica.healing import Healer, Unhealed
from replica.host import Host
from replica.keys import VmKeys, point_of
from replica.lease import Lease
from replica.model import Fence, Point
from replica.pipeline import nothing
from replica.source import OpenDisk, open_for_reading
from replica.stores.store import ObjectInfo, Store
from replica.workers import Workers
from vhdx.progress import Progress, silent

READINGS: Final = 3  # of a manifest before it is given up: a good one that is fenced off is lost


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found, and what repair would do about it.

    ``basis`` is the newest point whose maps can be trusted (None: there is none, all is sent again); ``manifests`` the
    numbers whose manifests no longer decode; ``quick``: blocks were not read, only looked for.
    """

    examination: Examination
    report: Report
    newest: Point | None
    basis: Point | None
    manifests: tuple[int, ...]
    quick: bool

    @property
    def resends(self) -> bool:
        """Whether a new recovery point is needed, since the newest does not restore."""
        newest = self.newest.point if self.newest else 0
        lost = any(number > newest for number in self.manifests)
        return lost or any(one.point == newest and not one.restores for one in self.report.verdicts)

    @property
    def is_needed(self) -> bool:
        """Whether anything was found that repair can try to put right."""
        return self.resends or bool(self.manifests or self.report.objects)


@dataclass(frozen=True, slots=True)
class Repair:
    """What repair did. ``report`` is how all points stand afterwards."""

    point: Point | None  # the recovery point that was made, None where the newest was whole, or became so
    verdict: PointVerdict | None  # what reading the newest point found afterwards
    replaced_manifests: tuple[int, ...]
    healed: tuple[str, ...]  # objects that were put back
    unhealed: tuple[Unhealed, ...]
    report: Report

    @property
    def is_whole(self) -> bool:
        """Whether the newest point restores."""
        return self.verdict is not None and self.verdict.restores


def plan(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    quick: bool = False,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Plan:
    """Find what is damaged, changing nothing: all points' objects are looked for, the newest point is read in full.

    With ``quick`` it is not read. Raises FormatVersionError where the newest point is a later version's.
    """
    examination = Examination(store, host, found, workers or Workers(), progress=progress)
    listed = _listed(store, found.keys)
    points = [one for one in listed if isinstance(one, Point)]
    _look(examination, points)
    basis = _basis(examination, points, quick=quick)
    return Plan(
        examination=examination,
        report=verify.report(examination, listed),
        newest=points[-1] if points else None,
        basis=basis,
        manifests=tuple(
            number
            for one in listed
            if isinstance(one, IntegrityError) and one.key and (number := point_of(one.key)) is not None
        ),
        quick=quick,
    )


def repair(
    store: Store,
    host: Host,
    found: ProtectedVm,
    planned: Plan,
    *,
    workers: Workers | None = None,
    progress: Progress = silent,
    open_disk: OpenDisk = open_for_reading,
) -> Repair:
    """Do what was planned, under the VM's lease.

    Manifests that do not decode give way to fences. Where the newest point does not restore, a new one is made: all
    that the disks hold is compared, and blocks whose stored copies are damaged are stored again. Then damaged objects
    are put back whose content is known in full. Cut off at any instant, every point restores that did before.
    Raises as ``cycle.replicate`` does.
    """
    examination, made = planned.examination, None
    with lease.holding(store, found.keys, host) as held:
        examination.tick = held.renew_if_due
        replaced = tuple(number for number in planned.manifests if _give_way(store, host, found.keys, held, number))
        history.begin(store, found.keys, host, held)
        points = _points(store, found.keys)
        _look(examination, points)
        healer = Healer(store, host, found, examination, held)
        healer.heal_maps(points)
        _look(examination, points)
        basis = _basis(examination, points, quick=planned.quick)
        lost = bool(replaced) and replaced[-1] > (points[-1].point if points else 0)
        if lost or (points and not _restores(examination, points[-1])):
            made = cycle.run(
                store,
                host,
                found,
                held,
                Basis(basis, examination.distrusted),
                workers=workers,
                progress=progress,
                open_disk=open_disk,
            )
            examination.look(made)
            points.append(made)
        healer.heal_segments(points, points[-1] if points else None)
        verdict = _read_again(examination, points, quick=planned.quick)
        examination.tick = nothing
    # Since the lease was given back another agent may have published, or a listing that lagged has caught up.
    listed = _listed(store, found.keys)
    _look(examination, (one for one in listed if isinstance(one, Point)))
    report = verify.report(examination, listed)
    return Repair(made, verdict, replaced, tuple(healer.healed), tuple(healer.unhealed), report)


def _listed(store: Store, keys: VmKeys) -> list[verify.Listed]:
    """Return the points and what cannot be read, oldest first; the newest also where a listing lags behind."""
    listed = list(history.points(store, keys))
    state, _ = lease.read(store, keys)
    newest = history.point_at_or_before(store, keys, history.newest_number(store, keys, state.point), damaged_too=False)
    if newest is not None and all(not isinstance(one, Point) or one.point < newest.point for one in listed):
        listed.append(newest)
    return listed


def _points(store: Store, keys: VmKeys) -> list[Point]:
    return [one for one in _listed(store, keys) if isinstance(one, Point)]


def _look(examination: Examination, points: Iterable[Point]) -> None:
    for point in points:
        examination.look(point)


def _basis(examination: Examination, points: Iterable[Point], *, quick: bool) -> Point | None:
    """Return the newest point whose maps can be trusted, having looked for damage in all that it refers to."""
    for point in sorted(points, key=lambda one: one.point, reverse=True):
        if not quick:
            _read(examination, point)
        if examination.has_sound_maps(point):
            return point
    return None


def _read(examination: Examination, point: Point) -> None:
    if any(examination.damaged_parts(point)):
        return
    examination.read_segments(examination.segments([point]))
    examination.read_frames([point])
    examination.read_blocks(point)


def _restores(examination: Examination, point: Point) -> bool:
    return examination.verdict(point).restores


def _read_again(examination: Examination, points: list[Point], *, quick: bool) -> PointVerdict | None:
    """Look at everything that was written, and return how the newest point stands."""
    _look(examination, points)
    if not points:
        return None
    if not quick:
        _read(examination, points[-1])
    return examination.verdict(points[-1])


def _is_sound(store: Store, key: str, info: ObjectInfo, keys: VmKeys, number: int) -> bool:
    """Whether the manifest can be read after all, or was read short, which says nothing of what is there."""
    try:
        data = store.get(key)
        if len(data) != info.size:
            return True
        manifest.decode(data, key=key, vm_id=keys.vm_id, point=number)
    except IntegrityError:  # where it is encrypted, an answer that was cut off looks like this too
        return False
    return True


def _give_way(store: Store, host: Host, keys: VmKeys, held: Lease, number: int) -> bool:
    """Put a fence in the place of a manifest that does not decode, so that its number stays taken."""
    key = keys.manifest(number)
    try:
        info = store.head(key)
        if any(_is_sound(store, key, info, keys, number) for _ in range(READINGS)):
            return False
    except (ObjectMissingError, FormatVersionError, IntegrityError):
        return False
    held.check()
    fence = Fence(keys.vm_id, number, held.epoch, host.clock.now())
    try:
        store.replace(key, manifest.encode(fence), tag=info.tag)
    except (ObjectChangedError, ObjectMissingError) as error:
        raise LeaseLostError("another agent repairs this VM", key=key, hint="stop one of the two") from error
    return True
