"""Maps: immutable sorted tables from block key to the block's place in a segment (docs/format.md, section 5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from replica.block import BLOCK_BITS, LARGEST_DISK_BYTES, LARGEST_DISK_NUMBER, HashArray, KeyArray, block_count
from replica.errors import IntegrityError
from replica.keys import PartId
from replica.segment import (
    CODEC_ZSTD,
    HEADER_BYTES,
    LARGEST_FRAME_BYTES,
    TRAILER_BYTES,
    decode_header,
    encode_header,
    open_trailer,
    seal_trailer,
)

MAGIC: Final = b"GWBLKMAP"
END_MAGIC: Final = b"GWMAPEND"
ZERO: Final = 0xFFFFFFFF  # the segment of an entry that says zero
PAGE_ENTRIES: Final = 32768
PART_ENTRIES: Final = 2097152
PAGE_LEVEL: Final = 3
LARGEST_KEY_END: Final = (LARGEST_DISK_NUMBER << BLOCK_BITS) + block_count(LARGEST_DISK_BYTES)
LARGEST_PAGE_BYTES: Final = PAGE_ENTRIES * 37 + 1024

PAGE_ROW: Final = np.dtype(
    [("first", "<u8"), ("last", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("entries", "<u4"), ("checksum", "V16")]
)
SEGMENT_ROW: Final = np.dtype([("vm", "V16"), ("point", "<u8"), ("epoch", "<u4"), ("ordinal", "<u4"), ("size", "<u8")])
_TRAILER = struct.Struct("<QIIQQ16s")
assert PAGE_ROW.itemsize == 48
assert SEGMENT_ROW.itemsize == 40
assert _TRAILER.size == TRAILER_BYTES - 16


@dataclass(frozen=True, slots=True, order=True)
class SegmentRef:
    """A segment that map entries refer to: the VM that owns it, its id there, its size in bytes."""

    vm_id: str
    part: PartId
    size: int


class SegmentTable:
    """The segments that some entries refer to, each once, numbered in order of arrival."""

    __slots__ = ("_numbers", "refs")

    def __init__(self) -> None:
        self.refs: list[SegmentRef] = []
        self._numbers: dict[SegmentRef, int] = {}

    def number(self, ref: SegmentRef) -> int:
        """Return the number of the segment, giving it the next one if it is new."""
        found = self._numbers.get(ref)
        if found is None:
            found = self._numbers[ref] = len(self.refs)
            self.refs.append(ref)
        return found


@dataclass(frozen=True, slots=True)
class Entries:
    """Map entries as columns of n: sorted by key, each key once. ``segments`` count in a SegmentTable, or are ZERO."""

    keys: KeyArray
    segments: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint32]
    codecs: npt.NDArray[np.uint8]
    hashes: HashArray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_data(self) -> npt.NDArray[np.bool_]:
        """Which entries are data; the others say that their block is zero."""
        return np.not_equal(self.segments, ZERO)

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Entries:
        """Return the entries that ``index`` picks."""
        return Entries(
            self.keys[index],
            self.segments[index],
            self.offsets[index],
            self.lengths[index],
            self.codecs[index],
            self.hashes[index],
        )


def empty_entries() -> Entries:
    """Return no entries."""
    return zero_entries(np.empty(0, np.uint64))


def zero_entries(keys: KeyArray) -> Entries:
    """Return entries that say of each of ``keys`` that the block is zero."""
    n = len(keys)
    column = np.zeros(n, np.uint32)
    return Entries(
        keys, np.full(n, ZERO, np.uint32), column, column, np.zeros(n, np.uint8), np.zeros((n, 2), np.uint64)
    )


def join_entries(parts: list[Entries]) -> Entries:
    """Return the entries of all parts one after the other; the caller sees to order."""
    if len(parts) == 1:
        return parts[0]
    return Entries(
        np.concatenate([p.keys for p in parts]) if parts else np.empty(0, np.uint64),
        np.concatenate([p.segments for p in parts]) if parts else np.empty(0, np.uint32),
        np.concatenate([p.offsets for p in parts]) if parts else np.empty(0, np.uint32),
        np.concatenate([p.lengths for p in parts]) if parts else np.empty(0, np.uint32),
        np.concatenate([p.codecs for p in parts]) if parts else np.empty(0, np.uint8),
        np.concatenate([p.hashes for p in parts]) if parts else np.empty((0, 2), np.uint64),
    )


def newest_wins(parts: list[Entries]) -> Entries:
    """Merge entries given oldest first: sorted by key, of equal keys the newest part's entry."""
    joined = join_entries([p for p in parts if len(p)] or [empty_entries()])
    # The stable sort keeps equal keys in order of age, so the last of each run is the newest.
    order = np.argsort(joined.keys, kind="stable")
    keys = joined.keys[order]
    last = np.ones(len(keys), np.bool_)
    last[:-1] = keys[1:] != keys[:-1]
    return joined.take(order[last])


def encode_page(entries: Entries) -> bytes:
    """Return a page, uncompressed. The entries' segments are numbered as in the part's own table."""
    keys = np.diff(entries.keys, prepend=entries.keys[:1])
    ends = entries.offsets + entries.lengths
    gaps = entries.offsets.copy()
    gaps[1:] -= ends[:-1]
    columns = [_planes(keys.astype("<u8")), _planes(entries.segments), _planes(gaps), _planes(entries.lengths)]
    hashes = np.ascontiguousarray(entries.hashes[entries.is_data], "<u8")
    return b"".join([*columns, entries.codecs.tobytes(), hashes.tobytes()])


def decode_page(data: bytes, first_key: int, count: int, *, key: str) -> Entries:
    """Decode an uncompressed page of ``count`` entries. Raises IntegrityError."""
    fixed = count * 21
    if len(data) < fixed or (len(data) - fixed) % 16:
        raise IntegrityError("a page of the map has the wrong length", key=key)
    raw = np.frombuffer(data, np.uint8)
    keys = np.cumsum(_unplanes(raw[: count * 8], "<u8"), dtype=np.uint64) + np.uint64(first_key)
    segments = _unplanes(raw[count * 8 : count * 12], "<u4")
    gaps = _unplanes(raw[count * 12 : count * 16], "<u4")
    lengths = _unplanes(raw[count * 16 : count * 20], "<u4")
    # offset[i] = gap[i] + offset[i-1] + length[i-1], all modulo 2^32
    steps = gaps.copy()
    steps[1:] += lengths[:-1]
    offsets = np.cumsum(steps, dtype=np.uint32)
    is_data = segments != ZERO
    hashes = np.zeros((count, 2), np.uint64)
    if (len(data) - fixed) // 16 != int(is_data.sum()):
        raise IntegrityError("a page of the map has more or fewer hashes than data entries", key=key)
    hashes[is_data] = np.frombuffer(data, "<u8", offset=fixed).reshape(-1, 2)
    if np.any(keys[1:] <= keys[:-1]):
        raise IntegrityError("a page of the map is not in ascending order", key=key)
    return Entries(keys, segments, offsets, lengths, raw[count * 20 : fixed], hashes)


def _planes(column: npt.NDArray[np.uint32] | npt.NDArray[np.uint64]) -> bytes:
    return column.view(np.uint8).reshape(-1, column.itemsize).T.tobytes()


def _unplanes(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    width = np.dtype(dtype).itemsize
    return np.ascontiguousarray(raw.reshape(width, -1).T).reshape(-1).view(dtype)


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """A finished map part and what a manifest says of it."""

    part: PartId
    data: bytes
    entries: int
    first_key: int
    last_key: int

    @property
    def checksum(self) -> str:
        """The xxh3-128 of the whole object, hex."""
        return xxhash.xxh3_128_hexdigest(self.data)


class MapWriter:
    """Builds the parts of one map from entries that come in ascending key order; a finished part is handed out at once.

    Memory: one part compressed (about 25 bytes an entry, 50 MiB at most) and one page.
    """

    def __init__(self, vm_id: str, point: int, epoch: int, *, first_ordinal: int = 0) -> None:
        self._vm_id = vm_id
        self._point = point
        self._epoch = epoch
        self._ordinal = first_ordinal
        self._zstd = zstandard.ZstdCompressor(level=PAGE_LEVEL)
        self._start_part()

    def _start_part(self) -> None:
        self._part = PartId(self._point, self._epoch, self._ordinal)
        self._table = SegmentTable()
        self._data = bytearray(encode_header(MAGIC, self._vm_id, self._part))
        self._pages: list[tuple[int, int, int, int, int, bytes]] = []
        self._entries = 0
        self._data_entries = 0
        self._waiting: list[Entries] = []

    def append(self, entries: Entries, table: SegmentTable) -> Iterator[EncodedPart]:
        """Add entries that follow all before, their segments numbered in ``table``; yield a part that became full."""
        while len(entries):
            room = PART_ENTRIES - self._entries
            fitting, entries = entries.take(slice(0, room)), entries.take(slice(room, None))
            self._waiting.append(replace(fitting, segments=self._renumber(fitting.segments, table)))
            self._entries += len(fitting)
            self._data_entries += int(np.count_nonzero(fitting.is_data))
            if sum(map(len, self._waiting)) >= PAGE_ENTRIES:
                self._write_pages(least=PAGE_ENTRIES)
            if self._entries == PART_ENTRIES:
                yield self._finish_part()

    def finish(self) -> Iterator[EncodedPart]:
        """Yield the part at work, if it holds anything."""
        if self._entries:
            yield self._finish_part()

    def _renumber(self, segments: npt.NDArray[np.uint32], table: SegmentTable) -> npt.NDArray[np.uint32]:
        used, inverse = np.unique(segments, return_inverse=True)
        own = [ZERO if number == ZERO else self._table.number(table.refs[number]) for number in used.tolist()]
        return np.array(own, np.uint32)[inverse]

    def _write_pages(self, *, least: int) -> None:
        """Write out full pages, and with ``least`` 1 what is left as well."""
        joined = join_entries(self._waiting)
        start = 0
        while len(joined) - start >= least:
            page = joined.take(slice(start, start + PAGE_ENTRIES))
            stored = self._zstd.compress(encode_page(page))
            checksum = xxhash.xxh3_128_digest(stored)
            self._pages.append(
                (int(page.keys[0]), int(page.keys[-1]), len(self._data), len(stored), len(page), checksum)
            )
            self._data += stored
            start += len(page)
        self._waiting = [joined.take(slice(start, None))] if start < len(joined) else []

    def _finish_part(self) -> EncodedPart:
        if self._waiting:
            self._write_pages(least=1)
        pages = np.array(self._pages, PAGE_ROW)
        segments = np.array(
            [(bytes.fromhex(r.vm_id), r.part.point, r.part.epoch, r.part.ordinal, r.size) for r in self._table.refs],
            SEGMENT_ROW,
        )
        tables = pages.tobytes() + segments.tobytes()
        fields = _TRAILER.pack(
            len(self._data),
            len(pages),
            len(segments),
            self._entries,
            self._data_entries,
            xxhash.xxh3_128_digest(tables),
        )
        self._data += tables + seal_trailer(fields, END_MAGIC)
        done = EncodedPart(self._part, bytes(self._data), self._entries, self._pages[0][0], self._pages[-1][1])
        self._ordinal += 1
        self._start_part()
        return done


class MapPart:
    """A decoded map part: answers for ranges of keys, decoding the pages that it needs.

    Holds the whole object (up to about 50 MiB) and the last decoded page.
    """

    def __init__(self, data: bytes, *, key: str, vm_id: str, part: PartId) -> None:
        self.key = key
        self._data = data
        decode_header(MAGIC, data, key=key, vm_id=vm_id, part=part)
        fields = open_trailer(data[-TRAILER_BYTES:], END_MAGIC, key=key)
        tables_offset, pages, segments, self.entries, self.data_entries, checksum = _TRAILER.unpack(fields)
        pages_end = tables_offset + pages * PAGE_ROW.itemsize
        tables_end = pages_end + segments * SEGMENT_ROW.itemsize
        if tables_offset < HEADER_BYTES or tables_end + TRAILER_BYTES != len(data):
            raise IntegrityError(f"the trailer does not fit the object's {len(data)} bytes", key=key)
        if xxhash.xxh3_128_digest(data[tables_offset:tables_end]) != checksum:
            raise IntegrityError("the checksum of the map's page index does not match", key=key)
        self._pages = np.frombuffer(data[tables_offset:pages_end], PAGE_ROW)
        self._segments = np.frombuffer(data[pages_end:tables_end], SEGMENT_ROW)
        self._check_pages(tables_offset)
        self._zstd = zstandard.ZstdDecompressor()
        self._last: tuple[int, Entries] | None = None

    def _check_pages(self, end: int) -> None:
        pages = self._pages
        wrong = (
            np.any(pages["first"] > pages["last"])
            or np.any(pages["last"] >= LARGEST_KEY_END)
            or np.any(pages["first"][1:] <= pages["last"][:-1])
            or np.any(pages["offset"] < HEADER_BYTES)
            or np.any(pages["offset"] > end)
            or np.any(pages["offset"] + pages["length"] > end)
            or np.any(pages["entries"] > PAGE_ENTRIES)
            or np.any(pages["entries"] == 0)
            or int(pages["entries"].sum()) != self.entries
        )
        if wrong:
            raise IntegrityError("the map's page index contradicts itself", key=self.key)

    def next_key(self, key: int) -> int | None:
        """Return the first block key from ``key`` on that has an entry, or None."""
        number = int(np.searchsorted(self._pages["last"], np.uint64(key)))
        if number == len(self._pages):
            return None
        first = int(self._pages["first"][number])
        if first >= key:
            return first
        keys = self._page(number).keys
        return int(keys[np.searchsorted(keys, np.uint64(key))])

    def segment_refs(self) -> Iterator[SegmentRef]:
        """Yield the segments that entries refer to."""
        return map(self._ref, range(len(self._segments)))

    def entries_between(self, first: int, end: int, table: SegmentTable) -> Entries:
        """Return the entries with first ≤ key < end, their segments numbered in ``table``. Raises IntegrityError."""
        start = int(np.searchsorted(self._pages["last"], np.uint64(first)))
        stop = int(np.searchsorted(self._pages["first"], np.uint64(end)))
        found = [_between(self._page(number), first, end) for number in range(start, stop)]
        entries = join_entries(found) if found else empty_entries()
        if not len(entries):
            return entries
        used, inverse = np.unique(entries.segments, return_inverse=True)
        numbers = [ZERO if own == ZERO else table.number(self._ref(own)) for own in used.tolist()]
        return replace(entries, segments=np.array(numbers, np.uint32)[inverse])

    def _ref(self, number: int) -> SegmentRef:
        row = self._segments[number]
        part = PartId(int(row["point"]), int(row["epoch"]), int(row["ordinal"]))
        return SegmentRef(bytes(row["vm"]).hex(), part, int(row["size"]))

    def _page(self, number: int) -> Entries:
        if self._last is None or self._last[0] != number:
            self._last = (number, self._decode_page(number))
        return self._last[1]

    def _decode_page(self, number: int) -> Entries:
        row = self._pages[number]
        start = int(row["offset"])
        stored = self._data[start : start + int(row["length"])]
        if xxhash.xxh3_128_digest(stored) != bytes(row["checksum"]):
            raise IntegrityError(f"page {number} of the map does not match its checksum: it is damaged", key=self.key)
        try:
            # A frame that announces its size gets a buffer of that size, whatever the largest output is said to be.
            if zstandard.frame_content_size(stored) > LARGEST_PAGE_BYTES:
                raise IntegrityError(f"page {number} of the map claims to be larger than any page", key=self.key)
            raw = self._zstd.decompress(stored, max_output_size=LARGEST_PAGE_BYTES)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"page {number} of the map cannot be decompressed", key=self.key) from error
        page = decode_page(raw, int(row["first"]), int(row["entries"]), key=self.key)
        data = page.is_data
        if (
            (int(page.keys[0]), int(page.keys[-1])) != (int(row["first"]), int(row["last"]))
            or np.any(page.segments[data] >= len(self._segments))
            or np.any(page.lengths[data] > LARGEST_FRAME_BYTES)
            or np.any(page.codecs > CODEC_ZSTD)
        ):
            raise IntegrityError(f"page {number} of the map contradicts itself", key=self.key)
        return page


def _between(entries: Entries, first: int, end: int) -> Entries:
    start, stop = np.searchsorted(entries.keys, np.array([first, end], np.uint64)).tolist()
    return entries if (start, stop) == (0, len(entries)) else entries.take(slice(start, stop))
