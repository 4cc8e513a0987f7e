"""What a disk is to hold when it is home: where it is read from, what of the home disk it differs in, its digest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID, uuid5

import numpy as np

from conversion.manifest import Manifest
from conversion.plan import Plan
from conversion.touefi import plan_uefi
from conversion.verify import verify
from replica.block import BLOCK_BYTES, Digest, disk_base, hash_blocks
from replica.blockmap import BlockMap
from replica.errors import IntegrityError
from replica.failback.content import HomeView, LaidOver
from replica.failback.difference import (
    NO_DIFFERENCE,
    WINDOW_BYTES,
    Difference,
    blocks_of,
    dense_window,
)
from replica.failback.examination import Examined
from replica.failback.hashing import Hasher
from replica.failback.ranges import extents_from, whole_blocks
from replica.model import DiskRecord
from replica.view import PointView
from vhdx.disk import Disk, Extents
from vhdx.extents import EMPTY, clipped, merged, runs_of, total_length

_NAMESPACE = UUID("5d1f6bd2-7b36-4c0e-9a0f-3a1c6c3e6d57")


@dataclass(frozen=True, slots=True)
class Way:
    """A disk on its way home: its number in the points, its newest state, and how that is converted back."""

    record: DiskRecord
    map: BlockMap
    hash_seed: int
    identity: str  # the same in each attempt: what new partitions are named after
    manifest: Manifest | None = None

    def planned(self, device: Disk) -> Plan | None:
        """Plan the way back of the newest state, None where it was not converted. Raises RefusedError."""
        if self.manifest is None:
            return None
        count = 0

        def new_guid() -> UUID:
            nonlocal count
            count += 1
            return uuid5(_NAMESPACE, f"{self.identity}/{self.record.number}/{count}")

        plan = plan_uefi(device, self.manifest, new_guid=new_guid)
        plan.require()
        return plan


@dataclass(frozen=True, slots=True)
class Goal:
    """The disk as it is to be. ``content`` reads as it; ``stored`` and ``laid`` are where it differs from home.

    ``stored`` are blocks that are as the store has them, ``laid`` those that the way back changes something of.
    """

    way: Way
    content: Disk
    plan: Plan | None
    stored: Difference
    laid: Extents
    digest: Digest

    @property
    def bytes(self) -> int:
        """How much of the home disk differs."""
        return self.stored.bytes + total_length(self.laid)

    @property
    def extents(self) -> Extents:
        """Where the home disk differs."""
        return merged([self.stored.all, self.laid])


@contextmanager
def goal_over(home: Disk, examined: Examined, way: Way, point: PointView) -> Iterator[Goal]:
    """Work out what is to change of a home disk. The goal can be read while the context lasts.

    Raises ConversionError where it cannot be converted back, IntegrityError, StoreError, DiskError.
    """
    view = HomeView(home, point, examined.difference)
    plan = way.planned(view)
    content = LaidOver(view, _written(plan))
    laid = _unequal(content, home, content.touched)
    stored = examined.difference.without(content.touched)
    yield Goal(way, content, plan, stored, laid, _digest(way, content))


@contextmanager
def goal_alone(way: Way, point: PointView) -> Iterator[Goal]:
    """Work out what a disk is to hold that has no home disk."""
    plan = way.planned(point)
    content = LaidOver(point, _written(plan))
    yield Goal(way, content, plan, NO_DIFFERENCE, EMPTY, _digest(way, content))


def _written(plan: Plan | None) -> list[tuple[int, bytes]]:
    return [] if plan is None else list(plan.require().written())


def _unequal(content: Disk, home: Disk, blocks: Extents) -> Extents:
    """Return those of the blocks in which ``content`` differs from the home disk."""
    found = []
    for start, end in blocks_of(blocks):
        inside = max(0, min(end, home.size) - start)
        before = home.read_at(start, inside) + bytes(end - start - inside) if inside else bytes(end - start)
        if content.read_at(start, end - start) != before:
            found.append((start, end))
    return extents_from(found)


def _digest(way: Way, content: LaidOver) -> Digest:
    """Return the digest that the whole disk is to have: the point's, with what is laid over it counted in."""
    digest = Digest(way.record.digest.first, way.record.digest.second)
    base = disk_base(way.record.number)
    for window_start in range(0, content.size if len(content.touched) else 0, WINDOW_BYTES):
        blocks = clipped(content.touched, window_start, window_start + WINDOW_BYTES)
        if not len(blocks):
            continue
        dense = dense_window(way.map, way.record.number, window_start // WINDOW_BYTES)
        for start, end in blocks_of(blocks):
            number, place = start // BLOCK_BYTES, (start - window_start) // BLOCK_BYTES
            key = np.array([base + number], np.uint64)
            if dense.is_data[place]:
                digest.subtract(key, dense.hashes[place : place + 1])
            data = content.read_at(start, end - start)
            if data.count(0) != len(data):
                padded = memoryview(data + bytes(BLOCK_BYTES - len(data)))
                digest.add(key, hash_blocks(padded, way.hash_seed))
    return digest


def amiss(made: Disk, goal: Goal, hasher: Hasher) -> Difference:
    """Return which of the goal's stored blocks ``made`` does not hold as the store has them: all are read and hashed.

    Raises DiskError.
    """
    size = goal.way.record.size
    data: list[Extents] = []
    zeros: list[Extents] = []
    for window_start in range(0, size, WINDOW_BYTES):
        wanted = clipped(goal.stored.data, window_start, window_start + WINDOW_BYTES)
        if len(wanted):
            dense = dense_window(goal.way.map, goal.way.record.number, window_start // WINDOW_BYTES)
            for one in hasher.hashed(made, wanted):
                places = one.numbers - window_start // BLOCK_BYTES
                wrong = np.any(one.hashes != dense.hashes[places], axis=1)
                data.append(_blocks(one.numbers[wrong], size))
        for one in hasher.hashed(made, clipped(goal.stored.zeros, window_start, window_start + WINDOW_BYTES)):
            zeros += [_blocks(one.numbers[~one.is_zero], size)]
    return Difference(merged(data), merged(zeros))


def _blocks(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> Extents:
    if not len(numbers):
        return EMPTY
    flags = np.zeros(int(numbers[-1] - numbers[0]) + 1, np.bool_)
    flags[numbers - numbers[0]] = True
    return whole_blocks((runs_of(flags) + int(numbers[0])) * BLOCK_BYTES, size)


def check(made: Disk, goal: Goal, hasher: Hasher, *, whole: bool) -> None:
    """Look at a finished disk: each block that was written, the way back, and with ``whole`` everything.

    Raises IntegrityError, ConversionError, DiskError.
    """
    wrong = amiss(made, goal, hasher)
    unequal = _unequal(goal.content, made, goal.laid)
    if wrong.bytes or len(unequal):
        raise _damaged(made, f"{wrong.bytes + total_length(unequal)} bytes read back are not what was written")
    if goal.plan is not None and goal.way.manifest is not None:
        findings = verify(made, goal.plan, goal.way.manifest)
        if findings:
            raise _damaged(made, " ".join(f"{one.subject}: {one.message} ({one.evidence})" for one in findings))
    if whole:
        digest, _ = hasher.digest(made)
        if digest != goal.digest:
            raise _damaged(made, f"its digest is {digest}, expected {goal.digest}")


def _damaged(made: Disk, what: str) -> IntegrityError:
    return IntegrityError(
        f"the disk that was built beside the home disk is not what it should be: {what}",
        path=str(made.path),
        hint="it was thrown away, and the home disk is as it was; run failback again",
    )


def is_goal(made: Disk, goal: Goal, hasher: Hasher) -> bool:
    """Whether a disk holds all of the goal and nothing else; all of it is read. Raises DiskError."""
    return made.size == goal.content.size and hasher.digest(made)[0] == goal.digest
