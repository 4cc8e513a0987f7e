"""Blocks: their count, hashes and zero test, and the digest computed as docs/format.md writes it down."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from replica.block import (
    BLOCK_BYTES,
    LARGEST_DISK_BYTES,
    Digest,
    block_count,
    disk_base,
    hash_blocks,
    zero_hash,
)

MASK = 2**64 - 1


def mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def naive_digest(blocks: dict[int, bytes]) -> str:
    """The digest over {block number: the 16 digest bytes of its hash}, as the format says."""
    first = second = 0
    for number, digest in blocks.items():
        h0, h1 = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        first += mix((h0 + mix(number + 1)) & MASK)
        second += mix(h1 ^ mix((number + 0x9E3779B97F4A7C15) & MASK))
    return f"{first & MASK:016x}{second & MASK:016x}"


def columns(blocks: dict[int, bytes], disk: int = 0) -> tuple[np.ndarray, np.ndarray]:
    keys = np.array([disk_base(disk) + number for number in blocks], np.uint64)
    return keys, np.frombuffer(b"".join(blocks.values()), "<u8").reshape(-1, 2)


def random_blocks(seed: int, count: int) -> dict[int, bytes]:
    drawn = random.Random(seed)
    numbers = [*drawn.sample(range(2**30), count - 3), 0, 1, 2**48 - 1]
    return {number: drawn.randbytes(16) for number in numbers}


def test_the_digest_is_that_of_the_format() -> None:
    for seed in range(5):
        blocks = random_blocks(seed, 50)
        digest = Digest()
        digest.add(*columns(blocks, disk=seed * 16000))
        assert str(digest) == naive_digest(blocks)
    assert str(Digest()) == naive_digest({}) == "0" * 32


def test_the_digest_of_hashes_of_ones_wraps_as_the_format_says() -> None:
    blocks = dict.fromkeys((0, 2**48 - 1), b"\xff" * 16)
    digest = Digest()
    digest.add(*columns(blocks))
    assert str(digest) == naive_digest(blocks)


def test_adding_and_subtracting_in_any_order_ends_at_the_same_digest() -> None:
    blocks = random_blocks(9, 60)
    halves = dict(list(blocks.items())[:30]), dict(list(blocks.items())[30:])
    other = {number: bytes(16) for number in halves[0]}
    digest = Digest()
    digest.add(*columns(halves[1]))
    digest.subtract(*columns(other))
    digest.add(*columns(halves[0]))
    digest.add(*columns(other))
    assert str(digest) == naive_digest(blocks)
    added, removed = Digest(), Digest()
    added.add(*columns(other))
    removed.add(*columns(halves[0]))
    digest.combine(added, removed)
    assert str(digest) == naive_digest({**blocks, **other})


def test_blocks_that_change_places_change_the_digest() -> None:
    assert naive_digest({1: b"a" * 16, 2: b"b" * 16}) != naive_digest({1: b"b" * 16, 2: b"a" * 16})
    digests = []
    for blocks in ({1: b"a" * 16, 2: b"b" * 16}, {1: b"b" * 16, 2: b"a" * 16}, {1: b"a" * 16}, {2: b"a" * 16}):
        digest = Digest()
        digest.add(*columns(blocks))
        digests.append(digest)
    assert len(set(digests)) == 4


def test_a_digest_is_read_as_it_is_written() -> None:
    digest = Digest(1, MASK)
    assert str(digest) == "0000000000000001ffffffffffffffff"
    assert Digest.parse(str(digest)) == digest
    assert Digest.parse(str(digest)) != Digest(MASK, 1)


def test_hashes_are_the_xxh3_128_of_each_block_under_the_seed() -> None:
    data = random.Random(1).randbytes(3 * BLOCK_BYTES)
    for seed in (0, 1, MASK):
        raw = b"".join(
            xxhash.xxh3_128(data[at : at + BLOCK_BYTES], seed).digest() for at in range(0, len(data), BLOCK_BYTES)
        )
        assert hash_blocks(memoryview(data), seed).astype("<u8").tobytes() == raw
        zero = xxhash.xxh3_128(bytes(BLOCK_BYTES), seed).digest()
        assert zero_hash(seed).astype("<u8").tobytes() == zero


@pytest.mark.parametrize(
    "size, count",
    [(1, 1), (512, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2), (10 * BLOCK_BYTES - 1, 10), (LARGEST_DISK_BYTES, 2**30)],
)
def test_a_disk_has_as_many_blocks_as_cover_it(size: int, count: int) -> None:
    assert block_count(size) == count


def test_keys_of_different_disks_never_meet() -> None:
    assert disk_base(1) == 2**48
    assert disk_base(0) + block_count(LARGEST_DISK_BYTES) < disk_base(1)
    assert disk_base(0xFFFF) + block_count(LARGEST_DISK_BYTES) < 2**64
