"""A store around a store that is told of every call before and after it: the base of those that limit and stop."""

from __future__ import annotations

from collections.abc import Iterator

from replica.stores.store import ObjectData, ObjectInfo, Store


class AroundStore:
    """Any store; ``before`` and ``after`` do nothing here. What ``before`` raises keeps the call from being made."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    @property
    def inner(self) -> Store:
        """The store that does the work."""
        return self._inner

    @property
    def url(self) -> str:
        """The inner store's address."""
        return self._inner.url

    def before(self, kind: str, key: str, data: ObjectData = b"") -> None:
        """Take note of a call that is about to be made; ``data`` is what is sent."""

    def after(self, received_bytes: int) -> None:
        """Take note of what came back."""

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes or a range of them; see ``Store.get``."""
        self.before("get", key)
        data = self._inner.get(key, start=start, length=length)
        self.after(len(data))
        return data

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its tag; see ``Store.get_tagged``."""
        self.before("get", key)
        data, tag = self._inner.get_tagged(key)
        self.after(len(data))
        return data, tag

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag; see ``Store.head``."""
        self.before("head", key)
        return self._inner.head(key)

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object if none exists; see ``Store.create``."""
        self.before("create", key, data)
        return self._inner.create(key, data)

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object if its tag still is ``tag``; see ``Store.replace``."""
        self.before("replace", key, data)
        return self._inner.replace(key, data, tag=tag)

    def delete(self, key: str) -> None:
        """Remove the object; see ``Store.delete``."""
        self.before("delete", key)
        self._inner.delete(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects in key order; see ``Store.list``."""
        self.before("list", prefix)
        for info in self._inner.list(prefix, start_after=start_after):
            self.before("list", prefix)
            yield info

    def close(self) -> None:
        """Close the inner store."""
        self._inner.close()
