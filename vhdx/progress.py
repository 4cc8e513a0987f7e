"""How a long operation tells how far it is: a plain callable, so that nobody needs to know who listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Called with (done_bytes, total_bytes, phase). ``done_bytes`` never falls within a phase; ``total_bytes`` may grow
# while an operation learns what there is to do, and is 0 where nobody knows it; ``phase`` is a short English verb
# form ("copying"). Calls come from one thread at a time and are cheap to make once per buffer, not once per byte.
Progress: TypeAlias = Callable[[int, int, str], None]


def silent(done_bytes: int, total_bytes: int, phase: str) -> None:
    """Listen to nothing: the default where nobody asked to be told."""
