"""Maps: the bytes of the format, round trips over pages and parts, newest wins, and no damage that passes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import xxhash
import zstandard

from replica import maptable
from replica.block import LARGEST_DISK_NUMBER, disk_base
from replica.errors import FormatVersionError, GodwitError, IntegrityError
from replica.keys import PartId
from replica.maptable import (
    ZERO,
    EncodedPart,
    Entries,
    MapPart,
    MapWriter,
    SegmentRef,
    SegmentTable,
    decode_page,
    encode_page,
    newest_wins,
    zero_entries,
)
from tests.support.engine import random_entries

VM = "0f" * 16
KEY = "the/map"
Value = tuple[SegmentRef | None, int, int, int, int, int]


def as_dict(entries: Entries, table: SegmentTable) -> dict[int, Value]:
    """Return the entries as {key: (segment, offset, length, codec, hash, hash)}, which no numbering can hide in."""
    columns = zip(
        entries.keys.tolist(),
        entries.segments.tolist(),
        entries.offsets.tolist(),
        entries.lengths.tolist(),
        entries.codecs.tolist(),
        entries.hashes.tolist(),
        strict=True,
    )
    return {
        key: (None if number == ZERO else table.refs[number], offset, length, codec, h0, h1)
        for key, number, offset, length, codec, (h0, h1) in columns
    }


def draw_keys(drawn: random.Random, count: int) -> list[int]:
    """Return ascending keys of several disks, in runs and apart."""
    keys: set[int] = set()
    while len(keys) < count:
        base = disk_base(drawn.choice((0, 0, 1, 77))) + drawn.randrange(2**30 - 100)
        keys.update(range(base, base + drawn.choice((1, 1, 3, 60))))
    return sorted(keys)[:count]


def write(entries: Sequence[Entries], table: SegmentTable) -> list[EncodedPart]:
    writer = MapWriter(VM, 7, 3)
    parts = [part for one in entries for part in writer.append(one, table)]
    return [*parts, *writer.finish()]


def opened(made: EncodedPart) -> MapPart:
    return MapPart(made.data, key=KEY, vm_id=VM, part=made.part)


def read_all(parts: Sequence[MapPart], first: int = 0, end: int = 2**64 - 1) -> dict[int, Value]:
    table = SegmentTable()
    found: dict[int, Value] = {}
    for part in parts:
        found.update(as_dict(part.entries_between(first, end, table), table))
    return found


@pytest.fixture(params=[(8, 24), (8, 8), (5, 17), (32768, 2097152)], ids=str)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    page, part = request.param
    monkeypatch.setattr(maptable, "PAGE_ENTRIES", page)
    monkeypatch.setattr(maptable, "PART_ENTRIES", part)
    return page, part


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 24, 25, 48, 100])
def test_what_was_written_is_read_over_pages_and_parts(sizes: tuple[int, int], count: int) -> None:
    drawn = random.Random(count)
    table = SegmentTable()
    entries = random_entries(count, draw_keys(drawn, count), table)
    expected = as_dict(entries, table)
    cuts = sorted({0, count, *(drawn.randrange(count + 1) for _ in range(3))})
    made = write([entries.take(slice(a, b)) for a, b in pairwise(cuts)], table)
    assert len(made) == -(-count // sizes[1])
    assert [one.part for one in made] == [PartId(7, 3, n) for n in range(len(made))]
    assert sum(one.entries for one in made) == count
    assert all(one.last_key < later.first_key for one, later in pairwise(made))
    parts = [opened(one) for one in made]
    assert read_all(parts) == expected
    assert sum(part.data_entries for part in parts) == sum(value[0] is not None for value in expected.values())
    referred = {value[0] for value in expected.values()} - {None}
    assert {ref for part in parts for ref in part.segment_refs()} == referred


def test_any_range_of_keys_is_the_slice_of_the_dict(sizes: tuple[int, int]) -> None:
    drawn = random.Random(3)
    table = SegmentTable()
    entries = random_entries(3, draw_keys(drawn, 60), table)
    expected = as_dict(entries, table)
    parts = [opened(one) for one in write([entries], table)]
    edges = sorted({0, 2**64 - 1, *(k + d for k in expected for d in (-1, 0, 1) if k + d >= 0)})
    for _ in range(300):
        first, end = sorted(drawn.sample(edges, 2))
        assert read_all(parts, first, end) == {k: v for k, v in expected.items() if first <= k < end}
    for key in edges:
        for part, made in zip(parts, write([entries], table), strict=True):
            later = [k for k in expected if made.first_key <= k <= made.last_key and k >= key]
            assert part.next_key(key) == (min(later) if later else None)


def test_a_map_part_is_laid_out_as_the_format_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maptable, "PAGE_ENTRIES", 6)
    table = SegmentTable()
    entries = random_entries(8, draw_keys(random.Random(8), 10), table)
    (made,) = write([entries], table)
    data = made.data
    head = struct.unpack_from("<8sHBBI16sQII8sQ", data)
    assert head[:5] == (b"GWBLKMAP", 1, 0, 0, 65536)
    assert (head[5].hex(), *head[6:10]) == (VM, 7, 3, 0, bytes(8))
    assert head[10] == xxhash.xxh3_64(data[:56]).intdigest()
    tables, pages, segments, count, data_count, tables_sum, check, magic = struct.unpack("<QIIQQ16sQ8s", data[-64:])
    assert (pages, count, magic) == (2, 10, b"GWMAPEND")
    assert check == xxhash.xxh3_64(data[-64:-16]).intdigest()
    assert tables_sum == xxhash.xxh3_128(data[tables:-64]).digest()
    assert made.checksum == xxhash.xxh3_128(data).hexdigest()
    segments_at = tables + pages * 48
    rows = list(struct.iter_unpack("<16sQIIQ", data[segments_at:-64]))
    assert len(rows) == segments
    refs = [SegmentRef(vm.hex(), PartId(point, epoch, ordinal), size) for vm, point, epoch, ordinal, size in rows]
    found: dict[int, Value] = {}
    position = 64
    for first, last, offset, length, n, checksum in struct.iter_unpack("<QQQII16s", data[tables:segments_at]):
        assert offset == position
        stored = data[offset : offset + length]
        assert xxhash.xxh3_128(stored).digest() == checksum
        page = zstandard.ZstdDecompressor().decompress(stored)

        def planes(at: int, width: int, n: int = n, page: bytes = page) -> list[int]:
            return [sum(page[at + p * n + i] << (8 * p) for p in range(width)) for i in range(n)]

        deltas, numbers = planes(0, 8), planes(8 * n, 4)
        gaps, lengths, codecs = planes(12 * n, 4), planes(16 * n, 4), page[20 * n : 21 * n]
        hashes = list(struct.iter_unpack("<QQ", page[21 * n :]))
        key, end = first, 0
        assert deltas[0] == 0
        for i in range(n):
            key += deltas[i]
            start = (end + gaps[i]) % 2**32
            end = start + lengths[i]
            if numbers[i] == 0xFFFFFFFF:
                assert (start, lengths[i]) == (0, 0)
                found[key] = (None, 0, 0, codecs[i], 0, 0)
            else:
                found[key] = (refs[numbers[i]], start, lengths[i], codecs[i], *hashes.pop(0))
        assert key == last
        assert not hashes
        position += length
    assert position == tables
    assert found == as_dict(entries, table)
    assert data_count == sum(value[0] is not None for value in found.values())


def test_the_newest_part_that_has_a_key_wins() -> None:
    drawn = random.Random(11)
    for seed in range(40):
        table = SegmentTable()
        expected: dict[int, Value] = {}
        parts = []
        for age in range(drawn.randrange(1, 7)):
            keys = sorted(drawn.sample(range(60), drawn.randrange(0, 40)))
            entries = random_entries(seed * 10 + age, keys, table)
            parts.append(entries)
            expected.update(as_dict(entries, table))
        merged = newest_wins(parts)
        assert as_dict(merged, table) == expected
        assert merged.keys.tolist() == sorted(expected)


def test_nothing_merged_is_nothing() -> None:
    assert len(newest_wins([])) == 0
    assert len(newest_wins([zero_entries(np.empty(0, np.uint64))])) == 0


def test_keys_at_the_edges_of_disks_survive() -> None:
    keys = [0, 2**30 - 1, disk_base(1), disk_base(LARGEST_DISK_NUMBER), disk_base(LARGEST_DISK_NUMBER) + 2**30 - 1]
    table = SegmentTable()
    entries = random_entries(1, keys, table)
    assert read_all([opened(one) for one in write([entries], table)]) == as_dict(entries, table)


def test_the_largest_offsets_survive_the_page() -> None:
    count = 4
    entries = Entries(
        np.arange(count, dtype=np.uint64),
        np.zeros(count, np.uint32),
        np.array([2**32 - 1, 64, 2**32 - 65536, 0], np.uint32),
        np.array([65536, 1, 65536, 65536], np.uint32),
        np.ones(count, np.uint8),
        np.full((count, 2), 2**64 - 1, np.uint64),
    )
    back = decode_page(encode_page(entries), 0, count, key=KEY)
    assert back.offsets.tolist() == entries.offsets.tolist()
    assert back.lengths.tolist() == entries.lengths.tolist()
    assert (back.hashes == entries.hashes).all()


# --- damage


def small(count: int = 12) -> EncodedPart:
    table = SegmentTable()
    (made,) = write([random_entries(5, draw_keys(random.Random(5), count), table)], table)
    return made


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maptable, "PAGE_ENTRIES", 5)


def read_hostile(data: bytes) -> dict[int, Value]:
    part = MapPart(data, key=KEY, vm_id=VM, part=PartId(7, 3, 0))
    for key in (0, disk_base(1), disk_base(77), 2**64 - 1):
        part.next_key(key)
    list(part.segment_refs())
    return read_all([part])


@pytest.mark.usefixtures("small_pages")
def test_every_truncation_of_a_map_is_noticed() -> None:
    data = small().data
    for length in range(len(data)):
        with pytest.raises(IntegrityError) as caught:
            read_hostile(data[:length])
        assert caught.value.key == KEY


@pytest.mark.usefixtures("small_pages")
def test_every_changed_byte_of_a_map_is_noticed() -> None:
    data = small().data
    read_hostile(data)
    for at in range(len(data)):
        for value in (data[at] ^ 1, data[at] ^ 0xFF):
            with pytest.raises((IntegrityError, FormatVersionError)):
                read_hostile(data[:at] + bytes([value]) + data[at + 1 :])


def reseal(data: bytearray) -> bytes:
    """Return the part with its checksums of header, tables and trailer made right again, as an adversary would."""
    end = len(data) - 64
    tables = struct.unpack_from("<Q", data, end)[0]
    struct.pack_into("<Q", data, 56, xxhash.xxh3_64_intdigest(bytes(data[:56])))
    data[end + 32 : end + 48] = xxhash.xxh3_128_digest(bytes(data[tables:end]))
    struct.pack_into("<Q", data, end + 48, xxhash.xxh3_64_intdigest(bytes(data[end : end + 48])))
    return bytes(data)


def put(
    form: str, at: int, value: int, *, page: int | None = None, trailer: bool = False
) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        end = len(data) - 64
        tables = struct.unpack_from("<Q", data, end)[0]
        base = end if trailer else (0 if page is None else tables + page * 48)
        struct.pack_into(form, data, base + at, value)

    return change


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    "change",
    [
        put("<H", 8, 2),
        put("<B", 10, 1),
        put("<I", 12, 4096),
        put("<Q", 0, 2**64 - 1, page=0),  # first key
        put("<Q", 0, 5, page=1),
        put("<Q", 8, 0, page=1),  # last key
        put("<Q", 8, 2**64 - 1, page=2),
        put("<Q", 8, 2**48 - 1, page=2),
        put("<Q", 16, 0, page=0),  # offset
        put("<Q", 16, 63, page=0),
        put("<Q", 16, 2**64 - 1, page=1),
        put("<Q", 16, 2**63, page=1),
        put("<I", 24, 0, page=0),  # stored length
        put("<I", 24, 2**32 - 1, page=0),
        put("<I", 28, 0, page=0),  # entries
        put("<I", 28, 6, page=0),
        put("<I", 28, 2**32 - 1, page=0),
        put("<Q", 0, 0, trailer=True),
        put("<Q", 0, 2**64 - 1, trailer=True),
        put("<I", 8, 0, trailer=True),
        put("<I", 8, 2**32 - 1, trailer=True),
        put("<I", 12, 0, trailer=True),
        put("<I", 12, 2**32 - 1, trailer=True),
        put("<Q", 16, 0, trailer=True),
        put("<Q", 16, 2**64 - 1, trailer=True),
    ],
)
def test_contradictory_tables_under_right_checksums_are_refused(change: Callable[[bytearray], None]) -> None:
    data = bytearray(small().data)
    tables = struct.unpack_from("<Q", data, len(data) - 64)[0]
    change(data)
    moved = struct.unpack_from("<Q", data, len(data) - 64)[0] != tables
    with pytest.raises((IntegrityError, FormatVersionError)) as caught:
        read_hostile(bytes(data) if moved else reseal(data))
    assert caught.value.key == KEY


def hostile_page(raw: bytes, first: int, last: int, entries: int, *, stored: bytes | None = None) -> bytes:
    """Return a part of one page with exactly this content and page index row, and one segment."""
    page = zstandard.ZstdCompressor().compress(raw) if stored is None else stored
    header = small().data[:64]
    row = struct.pack("<QQQII16s", first, last, 64, len(page), entries, xxhash.xxh3_128_digest(page))
    segment = struct.pack("<16sQIIQ", bytes(16), 1, 1, 0, 1 << 20)
    tables = row + segment
    fields = struct.pack("<QIIQQ16s", 64 + len(page), 1, 1, entries, entries, xxhash.xxh3_128_digest(tables))
    end = struct.pack("<Q8s", xxhash.xxh3_64_intdigest(fields), b"GWMAPEND")
    return header + page + tables + fields + end


def page_of(**columns: Sequence[int]) -> bytes:
    """Return the raw page of three data entries with keys 10, 11, 12, some columns as given."""
    made = {
        "keys": [10, 11, 12],
        "segments": [0, 0, 0],
        "offsets": [64, 164, 264],
        "lengths": [100] * 3,
        "codecs": [1] * 3,
        **columns,
    }
    return encode_page(
        Entries(
            np.array(made["keys"], np.uint64),
            np.array(made["segments"], np.uint32),
            np.array(made["offsets"], np.uint32),
            np.array(made["lengths"], np.uint32),
            np.array(made["codecs"], np.uint8),
            np.zeros((3, 2), np.uint64),
        )
    )


def test_the_hostile_page_is_good_when_nothing_is_wrong() -> None:
    assert list(read_hostile(hostile_page(page_of(), 10, 12, 3))) == [10, 11, 12]


def _announcing(size: int) -> bytes:
    """Return a zstd frame whose header announces ``size`` bytes of content."""
    return struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x50, size) + b"\x01\0\0"


@pytest.mark.parametrize(
    "data",
    [
        hostile_page(page_of(segments=[0, 1, 0]), 10, 12, 3),
        hostile_page(page_of(segments=[0, ZERO - 1, 0]), 10, 12, 3),
        hostile_page(page_of(lengths=[65537, 1, 1]), 10, 12, 3),
        hostile_page(page_of(lengths=[2**32 - 1, 1, 1]), 10, 12, 3),
        hostile_page(page_of(codecs=[2, 1, 1]), 10, 12, 3),
        hostile_page(page_of(codecs=[1, 1, 255]), 10, 12, 3),
        hostile_page(page_of(), 10, 13, 3),
        hostile_page(page_of(keys=[10, 12, 11]), 10, 11, 3),
        hostile_page(page_of(keys=[10, 10, 12]), 10, 12, 3),
        hostile_page(page_of(), 10, 12, 2),
        hostile_page(page_of(), 10, 12, 4),
        hostile_page(page_of(), 10, 12, 32768),
        hostile_page(page_of() + b"\0", 10, 12, 3),
        hostile_page(page_of() + bytes(16), 10, 12, 3),
        hostile_page(page_of()[:-16], 10, 12, 3),
        hostile_page(b"\3" + page_of()[1:], 7, 12, 3),  # the first key is not the page's
        hostile_page(page_of(keys=[2**64 - 3, 2**64 - 2, 2**64 - 1]), 2**64 - 3, 2**64 - 1, 3),
        hostile_page(b"", 10, 12, 3),
        hostile_page(bytes(50 << 20), 10, 12, 3),
        hostile_page(b"", 10, 12, 3, stored=b""),
        hostile_page(b"", 10, 12, 3, stored=b"not zstd at all"),
        hostile_page(b"", 10, 12, 3, stored=zstandard.ZstdCompressor().compress(page_of())[:-3]),
        hostile_page(b"", 10, 12, 3, stored=_announcing(2**62)),
        hostile_page(b"", 10, 12, 3, stored=_announcing(2**36)),
        hostile_page(b"", 10, 12, 3, stored=_announcing(0)),
    ],
)
def test_hostile_pages_under_right_checksums_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        read_hostile(data)
    assert caught.value.key == KEY


@pytest.mark.usefixtures("small_pages")
def test_random_bytes_under_right_checksums_give_our_errors_alone() -> None:
    drawn = random.Random(6)
    good = small().data
    tables = struct.unpack_from("<Q", good, len(good) - 64)[0]
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(drawn.randrange(1, 6)):
            data[drawn.choice((drawn.randrange(64), drawn.randrange(tables, len(good) - 64)))] = drawn.randrange(256)
        try:
            read_hostile(reseal(data))
        except GodwitError as error:
            refused += 1
            assert error.key == KEY
    assert refused > 100


@pytest.mark.parametrize("vm, part", [("0e" * 16, PartId(7, 3, 0)), (VM, PartId(7, 3, 1)), (VM, PartId(6, 3, 0))])
def test_a_map_under_another_key_is_noticed(vm: str, part: PartId) -> None:
    with pytest.raises(IntegrityError, match="mixed up"):
        MapPart(small().data, key=KEY, vm_id=vm, part=part)
