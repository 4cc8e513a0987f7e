"""Object Lock: for how long a store locks what points need, and the calls that only a store with locks has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol, TypeVar, cast, runtime_checkable

from replica import record
from replica.errors import ConfigurationError, UsageError
from replica.stores.store import Store

T = TypeVar("T")

FIELD: Final = "immutable_seconds"
LONGEST: Final = timedelta(days=36500)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a store promises: for ``period`` after it was published, nobody can delete what a point needs.

    Points share objects. A lock therefore begins with half a period more than was promised, and is prolonged to that
    again once less than a quarter more is left: one request for an object in a quarter of the period at the most, and
    nothing to do for cycles.
    """

    period: timedelta

    def __post_init__(self) -> None:
        if not timedelta(0) < self.period <= LONGEST:
            raise UsageError("points cannot be immutable for that long", hint=f"{LONGEST.days} days are the most")

    def lock_until(self, now: datetime) -> datetime:
        """Return until when an object that is written or prolonged now is locked."""
        return now + self.period * 3 / 2

    def is_due(self, locked_until: datetime | None, now: datetime) -> bool:
        """Whether a lock that lasts until then is to be prolonged."""
        return locked_until is None or locked_until < now + self.period * 5 / 4

    @property
    def renewal(self) -> timedelta:
        """How often locks must be prolonged at least."""
        return self.period / 4


def encode(terms: Terms | None) -> dict[str, Any]:
    """Return what the store's record says of it."""
    return {} if terms is None else {FIELD: round(terms.period.total_seconds())}


def decode(body: record.Fields) -> Terms | None:
    """Return what a store's record says of it. Raises IntegrityError."""
    if body.values.get(FIELD) is None:
        return None
    seconds = body.integer(FIELD, least=1, most=int(LONGEST.total_seconds()))
    return Terms(timedelta(seconds=seconds))


@runtime_checkable
class LockingStore(Protocol):
    """A store that can lock its objects."""

    def check_locks(self) -> None:
        """Try out that a lock holds. Raises ConfigurationError where the store has none, StoreRefusedError."""

    def first_versions(self, prefix: str) -> dict[str, str]:
        """Return what was written first under each key that begins with ``prefix``: versions by key."""

    def locked_until(self, key: str, version: str) -> datetime | None:
        """Return until when the version cannot be deleted, None where it can. Raises ObjectMissingError."""

    def lock(self, key: str, version: str, until: datetime) -> None:
        """Lock the version until then, later than it is now. Raises ObjectMissingError, StoreRefusedError."""


class Locks:
    """The locks of a store, wherever it is wrapped in others, repeated as patiently as its other calls.

    Raises ConfigurationError where the store has none.
    """

    def __init__(self, store: Store) -> None:
        self._repeat: Callable[[Callable[[], Any]], Any] = lambda attempt: attempt()
        inner: Any = store
        while not isinstance(inner, LockingStore):
            self._repeat = getattr(inner, "repeat", self._repeat)
            inner = getattr(inner, "inner", None)
            if inner is None:
                raise ConfigurationError(
                    f"{store.url} cannot make points immutable: it has no Object Lock",
                    hint="use a bucket that was made with Object Lock; a folder can be kept on a file system that "
                    "makes read-only snapshots of itself",
                )
        self._store: LockingStore = inner

    def check(self) -> None:
        """Try out that a lock holds."""
        self._patiently(self._store.check_locks)

    def first_versions(self, prefix: str) -> dict[str, str]:
        """Return what was written first under each key that begins with ``prefix``."""
        return self._patiently(lambda: self._store.first_versions(prefix))

    def locked_until(self, key: str, version: str) -> datetime | None:
        """Return until when the version is locked."""
        return self._patiently(lambda: self._store.locked_until(key, version))

    def lock(self, key: str, version: str, until: datetime) -> None:
        """Lock the version until then."""
        self._patiently(lambda: self._store.lock(key, version, until))

    def _patiently(self, attempt: Callable[[], T]) -> T:
        return cast(T, self._repeat(attempt))
