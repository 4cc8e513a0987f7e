"""Seeding: a new VM's first point refers to another VM's point, where both hold the same bytes (docs/adr/0008).

Equality is decided by comparing the bytes themselves. The hash that the other VM's maps hold only tells which blocks
are worth reading for that.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from replica import catalog, history, holds
from replica.block import BLOCK_BITS, BLOCK_BYTES, HashArray, KeyArray
from replica.blockmap import BlockMap, Window
from replica.catalog import ProtectedVm
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError, UsageError
from replica.host import Host
from replica.keys import VmKeys
from replica.mapstore import MapStore
from replica.maptable import Entries, SegmentTable, empty_entries
from replica.model import Point, SeedRef
from replica.reader import BlockReader, Fetch, plan_fetches
from replica.stores.store import Store
from replica.vault import vault_of


def choose(store: Store, tenant: str, text: str, *, encrypted: bool) -> SeedRef:
    """Return the point that ``text`` names, ``NAME`` (its newest) or ``NAME@POINT``. Raises UsageError.

    ``encrypted``: whether the VM that is to be seeded is. What one of them keeps secret must not lie open for the
    other, and what one trusts must not be what anybody could have written, so they have to be alike.
    """
    found, number = _named(store, tenant, text)
    vault = vault_of(store)
    seed_encrypted = vault is not None and vault.is_encrypted(found.keys)
    if seed_encrypted != encrypted:
        raise UsageError(
            f"{found.vm.name} is {'' if seed_encrypted else 'not '}encrypted, and the new VM is "
            f"{'' if encrypted else 'not '}to be: they cannot share blocks",
            hint="protect it with --encrypt" if seed_encrypted else "leave --encrypt out, or --seed-from",
        )
    point = catalog.newest_point(store, found) if number is None else history.point(store, found.keys, number)
    return SeedRef(found.keys.vm_id, point.point)


def _named(store: Store, tenant: str, text: str) -> tuple[ProtectedVm, int | None]:
    name, at, digits = text.rpartition("@")
    if not (at and name and digits.isascii() and digits.isdigit() and len(digits) <= 20):
        return catalog.find(store, tenant, text), None
    try:
        return catalog.find(store, tenant, name), int(digits)
    except UsageError:
        return catalog.find(store, tenant, text), None  # a name may hold an @


def open_seed(store: Store, host: Host, keys: VmKeys, ref: SeedRef) -> SeedPoint | None:
    """Hold the point that a VM is seeded from, and open it; None where it was pruned before the VM's first cycle.

    Without it everything is stored, which costs room and nothing else.
    """
    owner = VmKeys(keys.tenant, ref.vm_id)
    if not holds.hold(store, host, owner, ref.point, keys):
        return None
    try:
        found = ProtectedVm(owner, catalog.read_vm(store, owner))
        return SeedPoint(store, found, history.point(store, owner, ref.point))
    except (IntegrityError, UsageError):
        return None


class SeedPoint:
    """The point that a VM is seeded from. Callable from several threads at once; memory: that of a ``BlockMap``."""

    def __init__(self, store: Store, found: ProtectedVm, point: Point) -> None:
        self._seed = found.vm.hash_seed
        self._map = BlockMap(point.maps, MapStore(store, found.keys, None).fetch)
        self._reader = BlockReader(store, found.keys.tenant, self._seed)
        self._lock = threading.Lock()

    def find(
        self, data: memoryview, picked: npt.NDArray[np.intp], keys: KeyArray, hashes: HashArray, table: SegmentTable
    ) -> tuple[Entries, npt.NDArray[np.bool_]]:
        """Return entries for the blocks that the point holds at the same place, byte for byte, and which they are.

        The blocks lie at positions ``picked`` of ``data``; ``keys``, ascending, and ``hashes``, under the new VM's
        seed, are theirs. Segments are numbered in ``table``. What cannot be read there is not found.
        """
        is_equal = np.zeros(len(keys), np.bool_)
        try:
            with self._lock:
                window = self._map.window(int(keys[0]), int(keys[-1]) + 1)
        except (IntegrityError, FormatVersionError):
            return empty_entries(), is_equal
        places, rows = self._candidates(data, picked, keys, window)
        if not len(places):
            return empty_entries(), is_equal
        likely = Window(window.first, window.end, window.entries.take(rows), window.table)
        position = {int(keys[place]): int(picked[place]) for place in places.tolist()}
        equal_keys: list[int] = []
        for fetch in plan_fetches(likely):
            equal_keys += self._compare(fetch, data, position)
        equal = np.isin(keys[places], np.array(equal_keys, np.uint64))
        places, rows = places[equal], rows[equal]
        is_equal[places] = True
        entries = window.entries.take(rows)
        own = [table.number(window.table.refs[number]) for number in entries.segments.tolist()]
        columns = (entries.offsets, entries.lengths, entries.codecs)
        return Entries(keys[places], np.array(own, np.uint32), *columns, hashes[places]), is_equal

    def _candidates(
        self, data: memoryview, picked: npt.NDArray[np.intp], keys: KeyArray, window: Window
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return which blocks have the hash that the point has there, and the rows of their entries."""
        nothing = np.empty(0, np.intp)
        if not len(window.entries):
            return nothing, nothing
        rows = np.minimum(np.searchsorted(window.entries.keys, keys), len(window.entries) - 1)
        there = np.flatnonzero((window.entries.keys[rows] == keys) & window.entries.is_data[rows])
        if not len(there):
            return nothing, nothing
        digest = xxhash.xxh3_128_digest
        starts = (picked[there] * BLOCK_BYTES).tolist()
        found = b"".join([digest(data[start : start + BLOCK_BYTES], self._seed) for start in starts])
        same = np.all(np.frombuffer(found, "<u8").reshape(-1, 2) == window.entries.hashes[rows[there]], axis=1)
        return there[same], rows[there[same]]

    def _compare(self, fetch: Fetch, data: memoryview, position: dict[int, int]) -> list[int]:
        """Return the keys of those blocks of a fetch that are what ``data`` holds."""
        try:
            blocks = self._reader.read(fetch)
        except (IntegrityError, FormatVersionError, ObjectMissingError):
            return []
        disk = int(fetch.entries.keys[0]) >> BLOCK_BITS << BLOCK_BITS
        equal = []
        for number, held in zip(blocks.numbers, blocks.data, strict=True):
            start = position[disk | number] * BLOCK_BYTES
            if np.array_equal(_words(held), _words(data[start : start + BLOCK_BYTES])):
                equal.append(disk | number)
        return equal


def _words(block: Any) -> npt.NDArray[np.uint64]:
    return np.frombuffer(block, np.uint64)
