"""Segments: the bytes of the format, round trips, and that no damaged byte or hostile field passes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
import xxhash
import zstandard

from replica import segment
from replica.block import BLOCK_BYTES, hash_blocks
from replica.errors import FormatVersionError, GodwitError, IntegrityError
from replica.keys import PartId
from replica.segment import (
    HEADER_BYTES,
    TRAILER_BYTES,
    FrameCompressor,
    Frames,
    SegmentWriter,
    decode_header,
    decode_index,
    decode_segment,
    decode_trailer,
)
from tests.support.engine import random_blocks

VM = "0f" * 16
PART = PartId(7, 3, 11)
KEY = "the/segment"
SEED = 99


def frames(data: bytes, keys: list[int]) -> Frames:
    view = memoryview(data)
    picked = np.arange(len(keys))
    return FrameCompressor(1).compress(view, picked, np.array(keys, np.uint64), hash_blocks(view, SEED))


def build(blocks: int = 6, seed: int = 1) -> tuple[bytes, bytes]:
    """Return blocks and a segment of them."""
    data = random_blocks(seed, blocks)
    writer = SegmentWriter(VM, PART)
    half = blocks // 2
    writer.append(frames(data[: half * BLOCK_BYTES], [n * 5 for n in range(half)]))
    writer.append(frames(data[half * BLOCK_BYTES :], [n * 5 for n in range(half, blocks)]))
    assert writer.frames == blocks
    expected = writer.sealed_size
    sealed = bytes(writer.seal())
    assert len(sealed) == expected
    return data, sealed


def small() -> bytes:
    """Return a segment of a few hundred bytes."""
    data = b"".join(bytes([n]) * BLOCK_BYTES for n in (1, 2, 3))
    writer = SegmentWriter(VM, PART)
    writer.append(frames(data, [1, 2, 9]))
    return bytes(writer.seal())


def decode(data: bytes) -> np.ndarray:
    return decode_segment(data, key=KEY, vm_id=VM, part=PART)


def reseal(data: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    """Return the segment with ``change(bytes, offset of the index)`` done to it and every checksum made right again."""
    changed = bytearray(data)
    index = struct.unpack_from("<Q", data, len(data) - 64)[0]
    change(changed, index)
    end = len(changed) - 64
    struct.pack_into("<Q", changed, 56, xxhash.xxh3_64_intdigest(bytes(changed[:56])))
    changed[end + 16 : end + 32] = xxhash.xxh3_128_digest(bytes(changed[index:end]))
    changed[end + 32 : end + 48] = xxhash.xxh3_128_digest(bytes(changed[:end]))
    struct.pack_into("<Q", changed, end + 48, xxhash.xxh3_64_intdigest(bytes(changed[end : end + 48])))
    return bytes(changed)


def test_a_segment_is_laid_out_as_the_format_says() -> None:
    blocks, data = build()
    magic, version, suite, reserved, block_bytes, vm, point, epoch, ordinal, rest, check = struct.unpack_from(
        "<8sHBBI16sQII8sQ", data
    )
    assert (magic, version, suite, reserved, block_bytes) == (b"GWSEGMNT", 1, 0, 0, 65536)
    assert (vm.hex(), point, epoch, ordinal, rest) == (VM, 7, 3, 11, bytes(8))
    assert check == xxhash.xxh3_64(data[:56]).intdigest()
    index, count, zero, index_sum, whole_sum, check, end_magic = struct.unpack("<QII16s16sQ8s", data[-64:])
    assert (count, zero, end_magic) == (6, 0, b"GWSEGEND")
    assert index + count * 40 + 64 == len(data)
    assert index_sum == xxhash.xxh3_128(data[index:-64]).digest()
    assert whole_sum == xxhash.xxh3_128(data[:-64]).digest()
    assert check == xxhash.xxh3_64(data[-64:-16]).intdigest()
    position = 64
    codecs = set()
    for number, (key, offset, length, codec, reserved, digest) in enumerate(
        struct.iter_unpack("<QIIB7s16s", data[index:-64])
    ):
        assert (key, offset, reserved) == (number * 5, position, bytes(7))
        stored = data[offset : offset + length]
        block = blocks[number * 65536 : (number + 1) * 65536]
        if codec == 1:
            parameters = zstandard.get_frame_parameters(stored)
            assert (parameters.content_size, parameters.dict_id, parameters.has_checksum) == (65536, 0, False)
            assert length < 65536
            stored = zstandard.ZstdDecompressor().decompress(stored)
        assert stored == block
        assert digest == xxhash.xxh3_128(block, SEED).digest()
        position += length
        codecs.add(codec)
    assert position == index
    assert codecs == {0, 1}


def test_a_segment_reads_back() -> None:
    blocks, data = build()
    rows = decode(data)
    assert rows["key"].tolist() == [0, 5, 10, 15, 20, 25]
    assert (rows["hash"] == hash_blocks(memoryview(blocks), SEED)).all()


def test_only_the_picked_blocks_of_a_batch_are_packed() -> None:
    data = random_blocks(4, 5)
    view = memoryview(data)
    picked = np.array([1, 4])
    made = FrameCompressor(1).compress(view, picked, picked.astype(np.uint64), hash_blocks(view, SEED)[picked])
    writer = SegmentWriter(VM, PART)
    offsets = writer.append(made).tolist()
    sealed = bytes(writer.seal())
    for at, offset, length, codec in zip(picked, offsets, made.lengths.tolist(), made.codecs.tolist(), strict=True):
        stored = sealed[offset : offset + length]
        block = zstandard.ZstdDecompressor().decompress(stored) if codec else stored
        assert block == data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]


def test_an_empty_segment_is_one() -> None:
    assert len(decode(bytes(SegmentWriter(VM, PART).seal()))) == 0


def test_every_truncation_is_noticed() -> None:
    data = small()
    for length in range(len(data)):
        with pytest.raises(IntegrityError) as caught:
            decode(data[:length])
        assert caught.value.key == KEY


def test_every_changed_byte_is_noticed() -> None:
    data = small()
    decode(data)
    for at in range(len(data)):
        for value in (data[at] ^ 1, data[at] ^ 0x80, data[at] ^ 0xFF):
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            with pytest.raises((IntegrityError, FormatVersionError)):
                decode(damaged)


def test_bytes_after_the_end_are_noticed() -> None:
    for tail in (b"\0", bytes(64), small()):
        with pytest.raises(IntegrityError):
            decode(small() + tail)


@pytest.mark.parametrize(
    "vm, part", [("0e" * 16, PART), (VM, PartId(8, 3, 11)), (VM, PartId(7, 4, 11)), (VM, PartId(7, 3, 0))]
)
def test_a_segment_under_another_key_is_noticed(vm: str, part: PartId) -> None:
    with pytest.raises(IntegrityError, match="mixed up"):
        decode_segment(small(), key=KEY, vm_id=vm, part=part)


def put(
    form: str, at: int, value: int, *, row: bool = False, trailer: bool = False
) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, index: int) -> None:
        base = index if row else (len(data) - 64 if trailer else 0)
        struct.pack_into(form, data, base + at, value)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (put("<H", 8, 2), "format 2"),
        (put("<H", 8, 0), "format 0"),
        (put("<B", 10, 1), "suite 1"),
        (put("<I", 12, 4096), "blocks of 4096"),
        (put("<I", 12, 0), "blocks of 0"),
        (put("<I", 8, 0, row=True), "outside"),
        (put("<I", 8, 63, row=True), "outside"),
        (put("<I", 8, 2**32 - 1, row=True), "outside"),
        (put("<I", 12, 65537, row=True), "outside"),
        (put("<I", 12, 2**32 - 1, row=True), "outside"),
        (put("<B", 16, 2, row=True), "outside"),
        (put("<B", 16, 255, row=True), "outside"),
        (put("<Q", 0, 0, trailer=True), "fit"),
        (put("<Q", 0, 2**64 - 1, trailer=True), "fit"),
        (put("<I", 8, 0, trailer=True), "fit"),
        (put("<I", 8, 2**32 - 1, trailer=True), "fit"),
    ],
)
def test_hostile_fields_under_right_checksums_are_refused(
    change: Callable[[bytearray, int], None], message: str
) -> None:
    with pytest.raises((IntegrityError, FormatVersionError), match=message):
        decode(reseal(small(), change))


def test_resealing_alone_changes_nothing() -> None:
    assert reseal(small(), lambda *_: None) == small()


def test_random_bytes_between_good_edges_give_our_errors_alone() -> None:
    drawn = random.Random(5)
    data = small()

    def scramble(changed: bytearray, index: int) -> None:
        for _ in range(drawn.randrange(1, 8)):
            changed[drawn.randrange(len(changed))] = drawn.randrange(256)

    refused = 0
    for _ in range(300):
        try:
            decode(reseal(data, scramble))
        except GodwitError as error:
            refused += 1
            assert error.key == KEY
    assert refused > 100


def test_the_parts_that_are_fetched_alone_are_checked_alone() -> None:
    data = small()
    decode_header(segment.MAGIC, data[:HEADER_BYTES], key=KEY, vm_id=VM, part=PART)
    trailer = decode_trailer(data[-TRAILER_BYTES:], key=KEY, size=len(data))
    index = data[trailer.index_offset : -TRAILER_BYTES]
    assert len(decode_index(index, trailer, key=KEY)) == 3
    for size in (0, 64, len(data) - 1, len(data) + 1):
        with pytest.raises(IntegrityError):
            decode_trailer(data[-TRAILER_BYTES:], key=KEY, size=size)
    for wrong in (index[:-1], index + b"\0", b"", index[40:] + index[:40]):
        with pytest.raises(IntegrityError):
            decode_index(wrong, trailer, key=KEY)


@pytest.mark.parametrize("level", [-7, 1, 19])
def test_a_block_that_does_not_shrink_is_stored_raw(level: int) -> None:
    data = random.Random(1).randbytes(BLOCK_BYTES) + b"a" * BLOCK_BYTES
    view = memoryview(data)
    made = FrameCompressor(level).compress(view, np.arange(2), np.arange(2, dtype=np.uint64), hash_blocks(view, SEED))
    assert made.codecs.tolist() == [0, 1]
    assert made.lengths.tolist()[0] == BLOCK_BYTES
    payload = b"".join(made.payload)
    assert payload[:BLOCK_BYTES] == data[:BLOCK_BYTES]
    assert len(payload) == made.lengths.sum()
