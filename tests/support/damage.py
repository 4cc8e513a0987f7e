"""Damage done to a store on purpose: bits flipped, objects cut, lost or exchanged; and which objects a VM has."""

from __future__ import annotations

from collections.abc import Iterator

from replica import history
from replica.errors import GodwitError
from replica.model import Point
from replica.stores.store import Store
from tests.support.engine import Lab, make_host, restore_disk

KINDS = ("flipped", "missing", "cut")


def exchange(store: Store, key: str, data: bytes) -> None:
    """Let the object be ``data``."""
    store.delete(key)
    store.create(key, data)


def harm(store: Store, key: str, kind: str, *, at: int | None = None) -> None:
    """Flip a bit of an object (in its middle unless said otherwise), lose it, or cut it."""
    data = bytearray(store.get(key))
    store.delete(key)
    if kind == "flipped":
        data[len(data) // 2 if at is None else at] ^= 0x10
    elif kind == "cut":
        del data[len(data) // 2 :]
    if kind != "missing":
        store.create(key, bytes(data))


def segments(lab: Lab, point: int) -> list[str]:
    """Return the keys of the segments that a point's cycle wrote."""
    return [info.key for info in lab.store.list(f"{lab.found.keys.segments}{point:020}/")]


def maps(lab: Lab, point: int) -> list[str]:
    """Return the keys of the map parts that a point's cycle wrote."""
    return [info.key for info in lab.store.list(f"{lab.found.keys.maps}{point:020}/")]


def listed(lab: Lab) -> list[Point]:
    """Return the points that can be read."""
    return [one for one in history.points(lab.store, lab.found.keys) if isinstance(one, Point)]


def restoring(lab: Lab, store: Store | None = None) -> Iterator[int]:
    """Yield the points that restore on a machine that knows nothing, each compared with what its disks held."""
    for number, held in lab.published.items():
        try:
            point = history.point(store or lab.store, lab.found.keys, number)
            found = [
                restore_disk(store or lab.store, make_host(name="elsewhere"), lab.found, point, disk)
                for disk in range(len(held))
            ]
        except GodwitError:
            continue
        assert found == list(held), f"point {number} restores to other bytes"
        yield number
