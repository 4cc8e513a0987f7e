"""Extent arithmetic against sets of bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vhdx.disk import Extents
from vhdx.extents import clipped, merged, runs_of, total_length

FLAGS = st.lists(st.booleans(), max_size=60)


def extents_of(flags: list[bool]) -> Extents:
    return runs_of(np.array(flags, dtype=bool))


def covered(extents: Extents) -> set[int]:
    return {byte for start, end in extents.tolist() for byte in range(start, end)}


@settings(deadline=None)
@given(FLAGS)
def test_runs_cover_the_true_flags_and_do_not_touch(flags: list[bool]) -> None:
    extents = extents_of(flags)
    assert covered(extents) == {index for index, flag in enumerate(flags) if flag}
    assert (extents[1:, 0] > extents[:-1, 1]).all()
    assert total_length(extents) == sum(flags)


@settings(deadline=None)
@given(st.lists(FLAGS, max_size=4))
def test_merged_is_the_union(parts: list[list[bool]]) -> None:
    extents = merged([extents_of(flags) for flags in parts])
    assert covered(extents) == set().union(*(covered(extents_of(flags)) for flags in parts))
    assert (extents[1:, 0] > extents[:-1, 1]).all()


@settings(deadline=None)
@given(FLAGS, st.integers(0, 70), st.integers(0, 70))
def test_clipped_is_the_intersection_with_a_range(flags: list[bool], start: int, length: int) -> None:
    extents = clipped(extents_of(flags), start, start + length)
    assert covered(extents) == covered(extents_of(flags)) & set(range(start, start + length))
    assert (extents[:, 0] < extents[:, 1]).all()
