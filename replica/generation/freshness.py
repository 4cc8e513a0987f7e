"""Keeping the verdict of a VM's points fresh: an inspection in a cycle only where what the last one read has changed.

An inspection takes hundredths of a second for a Linux, and some tenths for a Windows, whose registry changes all the
time. So that this stays nothing beside the cycles, it is made again once a hundred times as long as it took has
passed; until then the verdict is carried on as one that is ``pending``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

import numpy as np

from conversion.finding import RULES_VERSION
from replica.block import KeyArray, disk_base
from replica.generation.convertibility import Convertibility
from vhdx.disk import Disk

REST: Final = 100  # times as long as the inspection took


class Freshness:
    """Whether the verdict of the point that a cycle continues holds for what the cycle reads.

    ``disks`` are numbers and sizes, in the machine's order.
    """

    def __init__(self, before: Convertibility | None, *, generation: int, disks: Sequence[tuple[int, int]]) -> None:
        self._before = before if before is not None and _applies(before, generation, disks) else None
        self._changed = self._before is not None and self._before.pending
        self._generation = generation
        self._edges = _edges(self._before)

    def note(self, keys: KeyArray) -> None:
        """Take note of blocks that differ from those of the point before, by their keys."""
        if self._changed or not len(self._edges) or not len(keys):
            return
        # Between an even edge and the next lies what was read.
        self._changed = bool(np.any(np.searchsorted(self._edges, keys, side="right") % 2))

    def verdict(
        self, disks: Sequence[tuple[int, Disk]], *, now: datetime, monotonic: Callable[[], float]
    ) -> Convertibility:
        """Return what holds now: what held before, or what an inspection of the open disks finds. Never raises."""
        if self._before is not None:
            if not self._changed:
                return self._before
            age = (now - self._before.judged_at).total_seconds()
            if 0 <= age < REST * self._before.seconds:
                return replace(self._before, pending=True)
        from replica.generation.verdict import judged  # noqa: PLC0415 - most cycles need none of the converter

        return judged(disks, generation=self._generation, now=now, monotonic=monotonic)


def _applies(before: Convertibility, generation: int, disks: Sequence[tuple[int, int]]) -> bool:
    """Tell whether it was found by these rules, on these disks, with none before them now."""
    looked = [(one.disk, one.size) for one in before.inspected]
    whole = before.disk is not None or generation == 1 or len(looked) == len(disks)
    return (
        (before.rules, before.generation) == (RULES_VERSION, generation)
        and whole
        and looked == list(disks)[: len(looked)]
    )


def _edges(before: Convertibility | None) -> KeyArray:
    """Return first and end of each range that was read, as keys, ascending."""
    ranges = [
        (disk_base(one.disk) + first, disk_base(one.disk) + end)
        for one in sorted(before.inspected if before is not None else (), key=lambda one: one.disk)
        for first, end in one.blocks
    ]
    return np.array(ranges, np.uint64).reshape(-1)
