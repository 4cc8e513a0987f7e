"""Observations: what is known of one VM at one moment, before any rule judges it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from replica.block import BLOCK_BYTES
from replica.model import Consistency, Point, Standing
from replica.tracking import ABOVE


@dataclass(frozen=True, slots=True)
class PointSample:
    """What a report needs of one recovery point; sizes in bytes.

    ``found_by`` is how most was found out about changes (``scan`` where any disk was compared), ``chain_files`` the
    files of the longest chain of any disk, 0 where that is not recorded. ``not_followed``: a disk was read from a file
    that other disks stood on.
    """

    point: int
    created_at: datetime
    published_at: datetime
    consistency: Consistency
    size_bytes: int
    data_bytes: int
    read_bytes: int
    changed_bytes: int
    stored_bytes: int
    seconds: float
    is_first: bool = False
    found_by: str = ""
    chain_files: int = 0
    not_quiesced: bool = False
    not_followed: bool = False
    rewritten: bool = False  # no cycle made it: it holds an older point's content, and has its time

    @property
    def by_cycle(self) -> bool:
        """Whether it tells how a delta went: neither the first point nor a rewritten one does."""
        return not (self.is_first or self.rewritten)

    @property
    def latency_seconds(self) -> float:
        """From the instant that the point holds until it could be restored; not below 0, whatever the clock did."""
        return max(0.0, (self.published_at - self.created_at).total_seconds())


def sample_of(point: Point) -> PointSample:
    """Return what a report needs of a point."""
    ways = [disk.source.get("found_by", "") for disk in point.disks]
    chains = [disk.source["files"].count("\n") + 1 for disk in point.disks if disk.source.get("files")]
    return PointSample(
        point=point.point,
        created_at=point.created_at,
        published_at=point.published_at,
        consistency=point.consistency,
        size_bytes=point.size,
        data_bytes=sum(disk.data_blocks for disk in point.disks) * BLOCK_BYTES,
        read_bytes=point.cycle.read_bytes,
        changed_bytes=point.cycle.changed_blocks * BLOCK_BYTES,
        stored_bytes=point.cycle.stored_bytes,
        seconds=point.cycle.seconds,
        is_first=point.previous == 0,
        found_by="scan" if "scan" in ways else next((way for way in ways if way), ""),
        chain_files=max(chains, default=0),
        not_quiesced=any("not_quiesced" in disk.source for disk in point.disks),
        not_followed=any(ABOVE in disk.source for disk in point.disks),
        rewritten=point.repeats != 0,
    )


class EventKind(StrEnum):
    """What is remembered of a VM beside its points and its settings."""

    DRILL = "drill"
    VERIFY = "verify"
    HEALTH = "health"  # it changed
    CONVERTIBILITY = "convertibility"  # whether its boot disk converts became another


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a VM.

    ``result`` is one word: of a drill ``passed`` (its cleanup did too) or ``failed``; of a verification ``whole``
    (every byte was read), ``partial`` (nothing was found in what was looked at) or ``damaged``; of a change of health
    or of convertibility what it became. ``points`` are those concerned: the one that was started, those that were found
    damaged.
    """

    kind: EventKind
    at: datetime
    result: str
    host_name: str = ""
    points: tuple[int, ...] = ()
    seconds: float = 0.0  # of a drill: from the command until the guest answered
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """The room of the file system that a folder lies on."""

    path: str
    free_bytes: int
    total_bytes: int

    @property
    def percent(self) -> float:
        """What is free, of all."""
        return 100.0 * self.free_bytes / self.total_bytes if self.total_bytes else 100.0


@dataclass(frozen=True, slots=True)
class AgentNote:
    """How it goes with a VM's cycles at the agent that looks after it, by a digest that it wrote."""

    host_name: str
    written_at: datetime  # the digest
    state: str
    failures: int = 0  # in a row
    error: str | None = None
    hint: str | None = None
    missed: int = 0
    next_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one VM at the moment ``at``.

    ``samples`` are points that can be read, in ascending number, always with the newest and the oldest; ``remembered``
    are points that retention removed since. ``listed`` is how many manifests there are. ``damaged`` are
    the numbers that do not restore: those of manifests that cannot be read, and those that verification found damaged
    since it last found everything whole. ``unread`` is why nothing could be found out, and then nothing else is meant.
    """

    vm_id: str
    name: str
    at: datetime
    unread: str | None = None
    key_missing: bool = False
    encrypted: bool = False
    protected_since: datetime | None = None
    interval_seconds: int = 300
    retention: str | None = None
    retention_since: datetime | None = None
    standing: Standing = Standing.PROTECTED
    standing_since: datetime | None = None
    recovery_host: str = ""
    source_host: str = ""
    lease_held: bool = False
    lease_expires_at: datetime | None = None
    leftovers: bool = False
    samples: tuple[PointSample, ...] = ()
    remembered: tuple[PointSample, ...] = ()
    listed: int = 0
    damaged: frozenset[int] = frozenset()
    last_verify: Event | None = None
    drills: tuple[Event, ...] = ()  # oldest first
    changes: tuple[tuple[datetime, str], ...] = ()  # of health, oldest first: when, and what it became
    convertibility: str | None = None  # of the newest point's manifest
    free_space: FreeSpace | None = None  # on this machine, where it holds a disk of the VM
    store_skew_seconds: float | None = None  # this machine's clock less the store's
    source_skew_seconds: float | None = None  # that of the machine whose agent wrote the digest
    epoch: int = 0  # of the newest lease known
    settings_version: int = 0
    event_at: datetime | None = None  # the newest event known
    as_of: datetime | None = None  # when all this was so, by a digest; None where the store was looked at
    agent: AgentNote | None = None  # of the digest
    warnings: tuple[str, ...] = ()  # what could not be found out besides

    @property
    def known_at(self) -> datetime:
        """The moment that is known of last: what has not happened until then may have happened since."""
        return self.at if self.as_of is None else min(self.at, self.as_of)

    @property
    def timeline(self) -> tuple[PointSample, ...]:
        """All points that are known of, removed ones included, in ascending number."""
        known = {one.point: one for one in (*self.remembered, *self.samples)}
        return tuple(known[number] for number in sorted(known))

    @property
    def newest(self) -> PointSample | None:
        """The newest point that can be read, whether it restores or not."""
        return self.samples[-1] if self.samples else None

    @property
    def newest_restorable(self) -> PointSample | None:
        """The newest point that restores, as far as is known."""
        return next((one for one in reversed(self.samples) if one.point not in self.damaged), None)

    @property
    def last_drill(self) -> Event | None:
        """The drill that ended last."""
        return self.drills[-1] if self.drills else None

    @property
    def rpo(self) -> timedelta | None:
        """Age of the newest restorable point, by the clock that looks; negative where its time is yet to come."""
        newest = self.newest_restorable
        return None if newest is None else self.at - newest.created_at
