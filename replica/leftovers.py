"""What unfinished cycles left in the store: segments beyond the newest point, whose frames the next cycle refers to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from replica import keys as object_keys
from replica.block import HashArray, KeyArray
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError
from replica.keys import PartId, VmKeys
from replica.maptable import Entries, SegmentRef, SegmentTable, empty_entries
from replica.segment import MAGIC, TRAILER_BYTES, decode_header, decode_index, decode_trailer
from replica.stores.store import Store

HEADER_BYTES: Final = 64
INDEXES_HELD: Final = 16  # 320 KiB each at most


@dataclass(frozen=True, slots=True)
class _Leftover:
    part: PartId
    size: int
    first_key: int
    last_key: int


class Leftovers:
    """The frames of unfinished cycles, found by block key and hash. Usable from several threads.

    Memory: a few numbers for each segment, and the indexes of the ``INDEXES_HELD`` last asked for.
    """

    def __init__(self, store: Store | None = None, keys: VmKeys | None = None) -> None:
        self._store = store
        self._keys = keys
        self._segments: list[_Leftover] = []
        self._indexes: OrderedDict[PartId, npt.NDArray[np.void]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def after(cls, store: Store, keys: VmKeys, point: int) -> Leftovers:
        """Find the segments that were written for points beyond ``point``. A damaged one is left aside."""
        found = cls(store, keys)
        for info in store.list(keys.segments, start_after=keys.segments_after(point)):
            part = object_keys.part_of(info.key)
            if part is None:
                continue
            try:
                index = found._read_index(part, info.size)
            except (IntegrityError, FormatVersionError, ObjectMissingError):
                continue
            if len(index):
                found._segments.append(_Leftover(part, info.size, int(index["key"].min()), int(index["key"].max())))
        return found

    def __len__(self) -> int:
        return len(self._segments)

    def find(self, keys: KeyArray, hashes: HashArray) -> tuple[Entries, SegmentTable, npt.NDArray[np.bool_]]:
        """Return entries for those blocks that are stored already, the table they count in, and which they are.

        ``keys`` ascending.
        """
        table = SegmentTable()
        is_found = np.zeros(len(keys), np.bool_)
        entries = empty_entries()
        if not self._segments or not len(keys):
            return entries, table, is_found
        columns = Entries(
            keys,
            np.zeros(len(keys), np.uint32),
            np.zeros(len(keys), np.uint32),
            np.zeros(len(keys), np.uint32),
            np.zeros(len(keys), np.uint8),
            hashes,
        )
        for one in self._segments:
            if one.first_key > int(keys[-1]) or one.last_key < int(keys[0]):
                continue
            index = self._index(one)
            places = np.minimum(np.searchsorted(index["key"], keys), len(index) - 1)
            rows = index[places]
            hits = (rows["key"] == keys) & np.all(rows["hash"] == hashes, axis=1) & ~is_found
            if hits.any():
                assert self._keys is not None
                columns.segments[hits] = table.number(SegmentRef(self._keys.vm_id, one.part, one.size))
                columns.offsets[hits] = rows["offset"][hits]
                columns.lengths[hits] = rows["length"][hits]
                columns.codecs[hits] = rows["codec"][hits]
                is_found |= hits
        return columns.take(is_found), table, is_found

    def _index(self, one: _Leftover) -> npt.NDArray[np.void]:
        with self._lock:
            index = self._indexes.get(one.part)
            if index is None:
                index = self._indexes[one.part] = self._read_index(one.part, one.size)
                if len(self._indexes) > INDEXES_HELD:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(one.part)
            return index

    def _read_index(self, part: PartId, size: int) -> npt.NDArray[np.void]:
        """Return the segment's index, sorted by key. Raises IntegrityError, ObjectMissingError."""
        assert self._store is not None
        assert self._keys is not None
        key = self._keys.segment(part)
        header = self._store.get(key, start=0, length=HEADER_BYTES)
        decode_header(MAGIC, header, key=key, vm_id=self._keys.vm_id, part=part)
        trailer = decode_trailer(self._store.get(key, start=-TRAILER_BYTES), key=key, size=size)
        length = size - TRAILER_BYTES - trailer.index_offset
        rows = decode_index(self._store.get(key, start=trailer.index_offset, length=length), trailer, key=key)
        return rows[np.argsort(rows["key"], kind="stable")]
