"""How far this machine's clock is from the store's, where the store says what time it is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from replica.stores.store import Store


@runtime_checkable
class TellsTime(Protocol):
    """A store whose answers say when they were given."""

    @property
    def skew_seconds(self) -> float | None:
        """This machine's clock less the store's, by the newest answer; None before the first."""


def skew_of(store: Store) -> float | None:
    """Return this machine's clock less the store's, to a second or two; None where the store tells no time."""
    inner: object = store
    while inner is not None:
        if isinstance(inner, TellsTime):
            return inner.skew_seconds
        inner = getattr(inner, "inner", None)
    return None
