"""The protocol that every object store satisfies: whole objects by key, created once, swapped by tag, listed by prefix.

Keys are relative to the store's address: ASCII, ``/`` between parts, no empty, ``.`` or ``..`` part. A tag is an
opaque string that changes whenever the object's content does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

ObjectData: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing or a head request tells of an object."""

    key: str
    size: int  # bytes
    tag: str


class Store(Protocol):
    """An object store. Every method may be called from several threads at once.

    Errors: ``ObjectMissingError``, ``ObjectExistsError``, ``ObjectChangedError`` as said below; otherwise
    ``StoreUnavailableError`` (a retry may help), ``StoreRefusedError``, ``StoreFullError`` or ``StoreError``.
    """

    @property
    def url(self) -> str:
        """The address as a user writes it, without credentials."""

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or those of [start, start+length), shorter where the object ends.

        A negative ``start`` counts from the end (the last ``-start`` bytes). Raises ObjectMissingError.
        """

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its tag, consistently. Raises ObjectMissingError."""

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag without the content. Raises ObjectMissingError."""

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object if none exists, atomically and durably; return its tag. Raises ObjectExistsError."""

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object if its tag still is ``tag``; return the new tag.

        Raises ObjectChangedError where it has another tag, ObjectMissingError where it is gone.
        """

    def delete(self, key: str) -> None:
        """Remove the object; one that does not exist is no error."""

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose keys begin with ``prefix`` and sort after ``start_after``, in ascending key order."""

    def close(self) -> None:
        """Let connections and handles go."""
