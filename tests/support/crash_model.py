"""What a disk may read as after a crash: each sector as at the last flush, or as after any request begun since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Begun:
    """A request began; when it is done the disk reads as ``content``."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Flushed:
    """A flush returned when the disk read as ``content``."""

    content: bytes


def assert_possible(actual: bytes, initial: bytes, marks: Iterable[object], where: object) -> None:
    """Fail unless every sector of ``actual`` is as the contract of ``flush`` allows after ``marks``."""
    candidates = [initial]
    for mark in marks:
        if isinstance(mark, Flushed):
            candidates = [mark.content]
        elif isinstance(mark, Begun):
            candidates.append(mark.content)
    assert len(actual) == len(candidates[-1]), f"{where}: {len(actual)} bytes long, not {len(candidates[-1])}"
    if actual == candidates[-1]:
        return
    found = np.frombuffer(actual, dtype=np.uint8).reshape(-1, SECTOR)
    good = np.zeros(len(found), dtype=bool)
    for candidate in candidates:
        good |= (np.frombuffer(candidate, dtype=np.uint8).reshape(-1, SECTOR) == found).all(axis=1)
    bad = np.flatnonzero(~good)
    assert not len(bad), f"{where}: sectors {bad[:8].tolist()} of {len(found)} are neither old nor new"
