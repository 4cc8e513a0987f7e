"""Condemned lists: immutable records of what garbage collection found unreferenced, and when (docs/format.md, 8)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from replica import record
from replica.errors import IntegrityError, ObjectExistsError, ObjectMissingError
from replica.host import Host
from replica.keys import VmKeys, point_of
from replica.stores.store import Store

KIND: Final = "condemned"
LIST_OBJECTS: Final = 10_000

_COLLECTABLE: Final = re.compile(r"(segments|maps)/[0-9]{20}/[0-9]{10}-[0-9]{6}")
_LARGEST_JUMP: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class CondemnedList:
    """Objects that were found unreferenced at a time: bytes by key, the keys relative to the VM's prefix.

    One whose content cannot be trusted, damaged or of a time that is far ahead, has no objects and no time: they are
    condemned anew.
    """

    number: int
    condemned_at: datetime | None
    sizes: Mapping[str, int]

    def is_due(self, now: datetime, grace: timedelta) -> bool:
        """Whether the grace period is over."""
        return self.condemned_at is None or now - self.condemned_at >= grace


def write(store: Store, host: Host, keys: VmKeys, sizes: Mapping[str, int]) -> None:
    """Record objects as condemned now."""
    number = max((found for info in store.list(keys.condemned) if (found := point_of(info.key))), default=0)
    items = sorted(sizes.items())
    for start in range(0, len(items), LIST_OBJECTS):
        objects = [{"key": key, "size_bytes": size} for key, size in items[start : start + LIST_OBJECTS]]
        body = {"condemned_at": record.time_text(host.clock.now()), "objects": objects}
        while True:
            number += 1
            try:
                store.create(keys.condemned_list(number), record.encode(KIND, {"number": number, **body}))
                break
            except ObjectExistsError:  # another collector at the same moment
                continue


def read_all(store: Store, keys: VmKeys, now: datetime) -> Iterator[CondemnedList]:
    """Yield all lists by number. Raises FormatVersionError for one that a later version wrote."""
    for info in store.list(keys.condemned):
        number = point_of(info.key)
        if number is None:
            continue
        try:
            found = _decode(store.get(info.key), info.key, number)
        except IntegrityError:
            found = CondemnedList(number, None, {})
        except ObjectMissingError:
            continue
        if found.condemned_at is not None and found.condemned_at - now > _LARGEST_JUMP:
            found = CondemnedList(number, None, {})
        yield found


def _decode(data: bytes, key: str, number: int) -> CondemnedList:
    body = record.decode(KIND, data, key=key)
    if body.integer("number", least=1) != number:
        raise IntegrityError("the list is another one than its key says: objects were mixed up", key=key)
    sizes = {one.text("key"): one.integer("size_bytes") for one in body.list_of_fields("objects")}
    if not all(map(_COLLECTABLE.fullmatch, sizes)):
        raise IntegrityError("the list names what is neither a segment nor a map", key=key)
    return CondemnedList(number, body.time("condemned_at"), sizes)
