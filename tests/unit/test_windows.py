from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vhdx.windows import joined, length_of

bounds = st.lists(st.integers(0, 60), unique=True).map(sorted)


@given(edges=bounds, cuts=st.lists(st.integers(0, 60), unique=True).map(sorted))
def test_extents_cut_at_any_edges_are_joined_again(edges: list[int], cuts: list[int]) -> None:
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    windows = []
    for start, end in zip([0, *cuts], [*cuts, 60], strict=True):
        clipped = [(max(low, start), min(high, end)) for low, high in pairs if max(low, start) < min(high, end)]
        windows.append(np.array(clipped, dtype=np.int64).reshape(-1, 2))
    kept = [window.copy() for window in windows]
    result = [tuple(pair) for window in joined(windows) for pair in window.tolist()]
    assert result == pairs
    assert all((window == copy).all() for window, copy in zip(windows, kept, strict=True))
    assert length_of(windows) == sum(high - low for low, high in pairs)
