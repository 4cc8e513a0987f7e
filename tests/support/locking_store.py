"""A store in memory that can lock its objects, at the time of a test's clock."""

from __future__ import annotations

from datetime import datetime

from replica import keys, locking
from replica.errors import ObjectLockedError, ObjectMissingError
from replica.host import Clock
from replica.locking import Terms
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData


class LockingMemoryStore(MemoryStore):
    """Locks what points need, as a bucket does, and refuses to delete it before its time."""

    def __init__(self, clock: Clock, terms: Terms) -> None:
        super().__init__("locking")
        self.clock = clock
        self.terms = terms
        self.ends: dict[str, datetime] = {}

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object, and lock it where points need it."""
        tag = super().create(key, data)
        if keys.is_lasting(key):
            self.ends[key] = self.terms.lock_until(self.clock.now())
        return tag

    def delete(self, key: str) -> None:
        """Remove the object. Raises ObjectLockedError."""
        end = self.ends.get(key)
        if end is not None and end > self.clock.now():
            raise ObjectLockedError("locked", key=key, until=end)
        super().delete(key)
        self.ends.pop(key, None)

    def check_locks(self) -> None:
        """Do nothing: these locks hold."""

    def first_versions(self, prefix: str) -> dict[str, str]:
        """Return the one version of each object."""
        return {info.key: "1" for info in self.list(prefix)}

    def locked_until(self, key: str, version: str) -> datetime | None:
        """Return the end of the lock."""
        self.head(key)
        return self.ends.get(key)

    def lock(self, key: str, version: str, until: datetime) -> None:
        """Lock until then; a lock never ends earlier than it did."""
        if version != "1":
            raise ObjectMissingError("no such version", key=key)
        self.head(key)
        assert until >= self.ends.get(key, until)
        self.ends[key] = until


assert issubclass(LockingMemoryStore, locking.LockingStore)
