"""Verification: reads what recovery points need, says what is damaged and what still restores. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from replica import history, sampling
from replica.catalog import ProtectedVm
from replica.damage import Damage, Report, Sample
from replica.errors import FormatVersionError, IntegrityError
from replica.examination import Examination
from replica.host import Host
from replica.model import Point
from replica.sampling import Budget
from replica.stores.store import Store
from replica.workers import Workers
from vhdx.progress import Progress, silent

Listed = Point | IntegrityError | FormatVersionError


def verify(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    points: Iterable[Listed] | None = None,
    full: bool = False,
    sample: Budget | None = None,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Report:
    """Verify the points given, or all of the VM.

    Quick: every object that a point needs exists in its size, its maps are whole. Full: in addition every segment is
    read and compared with its checksum, and every block of every disk decompressed and compared with the hash that was
    taken when it was replicated; what several points share is read once. With ``sample``, quick, and of the segments
    those are read whose turn it is today (``replica.sampling``). Raises StoreError where the store cannot be asked;
    damage is no error, it is in the report.
    """
    examination = Examination(store, host, found, workers or Workers(), progress=progress)
    listed = list(history.points(store, found.keys) if points is None else points)
    good = [one for one in listed if isinstance(one, Point)]
    for point in good:
        examination.look(point)
    sampled = None
    if full:
        examination.read_segments(examination.segments(good))
        examination.read_frames(good)  # also those that only points refer to whose other maps are damaged
        for point in good:
            examination.read_blocks(point)
    elif sample is not None:
        sampled = _read_sample(examination, host, found, good, sample)
    return report(examination, listed, full=full, sample=sampled)


def report(
    examination: Examination, listed: Iterable[Listed], *, full: bool = False, sample: Sample | None = None
) -> Report:
    """Return what the examination knows of the points, which it has looked at, and of manifests that are damaged."""
    listed = list(listed)
    verdicts, objects = examination.judge(one for one in listed if isinstance(one, Point))
    unreadable = tuple(Damage(one.key, str(one)) for one in listed if not isinstance(one, Point))
    segments = tuple(damage for damage in examination.whole.values() if damage is not None)
    return Report(full, verdicts, unreadable, segments, objects, sample)


def _read_sample(
    examination: Examination, host: Host, found: ProtectedVm, points: list[Point], budget: Budget
) -> Sample:
    refs = examination.segments(points)
    turn = sampling.turn(refs, seed=found.vm.hash_seed, budget=budget, now=host.clock.now())
    examination.read_segments(turn.segments)
    examination.read_frames(points)
    return Sample(
        day=turn.day,
        days=turn.days,
        segments=len(turn.segments),
        read_bytes=sum(ref.size for ref in turn.segments),
        total_segments=len(refs),
        total_bytes=sum(ref.size for ref in refs),
    )


def restorable(report: Report) -> Iterator[int]:
    """Yield the numbers of the points that were found to restore."""
    return (verdict.point for verdict in report.verdicts if verdict.restores)
