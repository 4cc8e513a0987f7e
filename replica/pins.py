"""Pins: immutable objects that keep a recovery point whatever the retention rule says (docs/format.md, 8)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from replica import history, record
from replica.catalog import ProtectedVm
from replica.errors import IntegrityError, ObjectExistsError, ObjectMissingError, UsageError
from replica.host import Host
from replica.keys import VmKeys, point_of
from replica.stores.store import Store

KIND: Final = "pin"
LONGEST_REASON: Final = 1000


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned point, since when, and why if that was said."""

    point: int
    created_at: datetime
    reason: str | None


def numbers(store: Store, keys: VmKeys) -> frozenset[int]:
    """Return the numbers of all pinned points. The keys say it all: a pin whose content is damaged still holds."""
    found = (point_of(info.key) for info in store.list(keys.pins))
    return frozenset(number for number in found if number is not None)


def is_pinned(store: Store, keys: VmKeys, number: int) -> bool:
    """Whether a point is pinned, asked of the one object: sure where a listing may lag."""
    try:
        store.head(keys.pin(number))
    except ObjectMissingError:
        return False
    return True


def pin(store: Store, host: Host, found: ProtectedVm, number: int, reason: str | None = None) -> Pin:
    """Pin a recovery point, and return its pin; one that is pinned already keeps the pin that it has.

    No lease is needed, so it can be done while a cycle is at work. Once this returns, the point stays: the pin was
    there while its manifest was, and whoever prunes looks for pins after deleting. Raises UsageError where there is no
    such point.
    """
    if reason is not None and (len(reason) > LONGEST_REASON or any(0xD800 <= ord(c) < 0xE000 for c in reason)):
        raise UsageError("the reason cannot be recorded", hint=f"use Unicode text of up to {LONGEST_REASON} characters")
    history.point(store, found.keys, number)
    made = Pin(number, host.clock.now(), reason)
    body = {"point": number, "created_at": record.time_text(made.created_at), "reason": reason}
    try:
        store.create(found.keys.pin(number), record.encode(KIND, body))
    except ObjectExistsError:
        made = read(store, found.keys, number)
    try:
        store.head(found.keys.manifest(number))
    except ObjectMissingError as error:
        store.delete(found.keys.pin(number))
        raise UsageError(f"point {number} was pruned at the same moment", hint="pin another point") from error
    return made


def unpin(store: Store, found: ProtectedVm, number: int) -> None:
    """Leave a point to the retention rule again. Raises UsageError where it is not pinned."""
    if not is_pinned(store, found.keys, number):
        raise UsageError(f"point {number} is not pinned", hint="'godwit pin NAME' lists those that are")
    store.delete(found.keys.pin(number))


def read(store: Store, keys: VmKeys, number: int) -> Pin:
    """Return a pin. Raises ObjectMissingError, IntegrityError."""
    key = keys.pin(number)
    body = record.decode(KIND, store.get(key), key=key)
    if body.integer("point", least=1) != number:
        raise IntegrityError("the pin is of another point than its key says: objects were mixed up", key=key)
    return Pin(number, body.time("created_at"), body.optional_text("reason"))


def pins(store: Store, found: ProtectedVm) -> list[Pin]:
    """Return all pins, by point. Raises IntegrityError where one is damaged."""
    listed = []
    for number in sorted(numbers(store, found.keys)):
        try:
            listed.append(read(store, found.keys, number))
        except ObjectMissingError:
            continue
    return listed
