"""Holds: immutable objects that keep a point while a VM that is seeded from it has no point of its own."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from replica import history, record
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    ObjectExistsError,
    ObjectLockedError,
    ObjectMissingError,
    StoreRefusedError,
)
from replica.host import Host
from replica.keys import VmKeys
from replica.stores.store import Store

KIND: Final = "hold"
ABANDONED: Final = timedelta(days=1)  # then a VM that was to hold the point was never made

_NAME: Final = re.compile(r"(\d{20})-([0-9a-f]{32})\.json")


@dataclass(frozen=True, slots=True)
class Hold:
    """A point that is held, and for which VM."""

    point: int
    holder: VmKeys


def hold(store: Store, host: Host, owner: VmKeys, number: int, holder: VmKeys) -> bool:
    """Hold a point for ``holder``; return whether the point is there, and stays. Safe to repeat.

    The hold is there before the manifest is looked for, and pruning deletes the manifest before it looks for holds, so
    that one of the two sees the other.
    """
    key = owner.hold(number, holder.vm_id)
    body = {"point": number, "holder": holder.vm_id, "created_at": record.time_text(host.clock.now())}
    with contextlib.suppress(ObjectExistsError):
        store.create(key, record.encode(KIND, body))
    try:
        store.head(owner.manifest(number))
    except ObjectMissingError:
        release(store, owner, number, holder)
        return False
    return True


def release(store: Store, owner: VmKeys, number: int, holder: VmKeys) -> None:
    """Let the point go, if these credentials may; if they may not, pruning does it."""
    with contextlib.suppress(StoreRefusedError, ObjectLockedError):
        store.delete(owner.hold(number, holder.vm_id))


def numbers(store: Store, keys: VmKeys) -> frozenset[int]:
    """Return the numbers of all points that are held."""
    return frozenset(one.point for one in holds(store, keys))


def in_force(store: Store, keys: VmKeys, now: datetime) -> frozenset[int]:
    """Return the numbers of the points that are held once ``sweep`` has been there."""
    return frozenset(one.point for one in holds(store, keys) if not _is_over(store, keys, one, now))


def holds(store: Store, keys: VmKeys) -> Iterator[Hold]:
    """Yield all holds on a VM's points. Their keys say it all: one whose content is damaged still holds."""
    for info in store.list(keys.holds):
        match = _NAME.fullmatch(info.key.removeprefix(keys.holds))
        if match is not None:
            yield Hold(int(match[1]), VmKeys(keys.tenant, match[2]))


def sweep(store: Store, host: Host, keys: VmKeys) -> None:
    """Delete the holds of VMs that have a point of their own by now, or that were never made."""
    for one in list(holds(store, keys)):
        if _is_over(store, keys, one, host.clock.now()):
            release(store, keys, one.point, one.holder)


def _is_over(store: Store, keys: VmKeys, one: Hold, now: datetime) -> bool:
    try:
        return history.newest(store, one.holder) is not None
    except FormatVersionError:
        return False
    except IntegrityError:
        try:
            store.head(one.holder.lease)
        except ObjectMissingError:
            return _is_abandoned(store, keys.hold(one.point, one.holder.vm_id), now)
        return False  # damaged: it may have a point, and it may not


def _is_abandoned(store: Store, key: str, now: datetime) -> bool:
    try:
        made = record.decode(KIND, store.get(key), key=key).time("created_at")
    except (IntegrityError, ObjectMissingError):
        return False
    return now - made > ABANDONED
