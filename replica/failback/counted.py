"""A store that counts what is read from it: what crossed the network."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from replica.stores.store import ObjectData, ObjectInfo, Store


class CountedStore:
    """Passes everything on; ``fetched_bytes`` is what its reads returned."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.fetched_bytes = 0

    @property
    def url(self) -> str:
        """The address."""
        return self._inner.url

    def _count(self, data: bytes) -> bytes:
        with self._lock:
            self.fetched_bytes += len(data)
        return data

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes."""
        return self._count(self._inner.get(key, start=start, length=length))

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return an object and its tag."""
        data, tag = self._inner.get_tagged(key)
        return self._count(data), tag

    def head(self, key: str) -> ObjectInfo:
        """Return an object's size and tag."""
        return self._inner.head(key)

    def create(self, key: str, data: ObjectData) -> str:
        """Write an object."""
        return self._inner.create(key, data)

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write an object in the place of another."""
        return self._inner.replace(key, data, tag=tag)

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._inner.delete(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield objects."""
        return self._inner.list(prefix, start_after=start_after)

    def close(self) -> None:
        """Let connections go."""
        self._inner.close()
