"""The store in memory: the plain meaning of the protocol, for tests and for comparing the other stores with."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import xxhash

from replica.errors import ObjectChangedError, ObjectExistsError, ObjectMissingError
from replica.stores.key import check_key, check_prefix
from replica.stores.store import ObjectData, ObjectInfo


class MemoryStore:
    """Objects in a dictionary; every call is atomic.

    Tags are digests of the content, as S3's ETags mostly are: writing the same bytes again gives the same tag.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, str]] = {}

    @property
    def url(self) -> str:
        """``memory:`` and the name given."""
        return f"memory:{self._name}"

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes or a range of them; see ``Store.get``."""
        data, _ = self.get_tagged(key)
        begin = max(0, len(data) + start) if start < 0 else start
        return data[begin:] if length is None else data[begin : begin + length]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its tag; see ``Store.get_tagged``."""
        with self._lock:
            found = self._objects.get(check_key(key))
        if found is None:
            raise ObjectMissingError("no such object", key=key)
        return found

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag; see ``Store.head``."""
        data, tag = self.get_tagged(key)
        return ObjectInfo(key, len(data), tag)

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object if none exists; see ``Store.create``."""
        content = bytes(data)
        tag = _tag(content)
        with self._lock:
            if check_key(key) in self._objects:
                raise ObjectExistsError("the object exists already", key=key)
            self._objects[key] = content, tag
        return tag

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object if its tag still is ``tag``; see ``Store.replace``."""
        content = bytes(data)
        new_tag = _tag(content)
        with self._lock:
            found = self._objects.get(check_key(key))
            if found is None:
                raise ObjectMissingError("no such object", key=key)
            if found[1] != tag:
                raise ObjectChangedError("the object was changed by another", key=key)
            self._objects[key] = content, new_tag
        return new_tag

    def delete(self, key: str) -> None:
        """Remove the object if it is there; see ``Store.delete``."""
        with self._lock:
            self._objects.pop(check_key(key), None)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield what was there when the listing began, in key order; see ``Store.list``."""
        check_prefix(prefix)
        with self._lock:
            keys = sorted(self._objects)
            begin = max(bisect_left(keys, prefix), bisect_right(keys, start_after))
            chosen = [
                ObjectInfo(key, len(self._objects[key][0]), self._objects[key][1])
                for key in keys[begin:]
                if key.startswith(prefix)
            ]
        return iter(chosen)

    def close(self) -> None:
        """Do nothing: the objects live as long as the store does."""


def _tag(content: bytes) -> str:
    return f"{xxhash.xxh3_128_hexdigest(content)}-{len(content)}"
