"""Blocks: the fixed unit of tracking, their keys, hashes, and the digest over a disk (docs/format.md, 3 and 6)."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

BLOCK_BYTES: Final = 65536
BLOCK_BITS: Final = 48  # the low bits of a block key are the block's number, the high ones the disk's
LARGEST_DISK_NUMBER: Final = 0xFFFF
LARGEST_DISK_BYTES: Final = 64 << 40
ZERO_BLOCK: Final = bytes(BLOCK_BYTES)

KeyArray: TypeAlias = npt.NDArray[np.uint64]  # shape (n,)
HashArray: TypeAlias = npt.NDArray[np.uint64]  # shape (n, 2): the 16 digest bytes as two little-endian numbers

_ONE: Final = np.uint64(1)
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX2: Final = np.uint64(0x94D049BB133111EB)
_MASK: Final = (1 << 64) - 1


def disk_base(disk_number: int) -> int:
    """Return the key of a disk's block 0."""
    return disk_number << BLOCK_BITS


def block_count(size_bytes: int) -> int:
    """Return how many blocks a disk of that size has."""
    return -(-size_bytes // BLOCK_BYTES)


def hash_blocks(data: memoryview, seed: int) -> HashArray:
    """Return the hashes of consecutive blocks. ``data`` holds whole blocks; shape (len(data) / 65536, 2)."""
    digest = xxhash.xxh3_128_digest
    parts = [digest(data[at : at + BLOCK_BYTES], seed) for at in range(0, len(data), BLOCK_BYTES)]
    return np.frombuffer(b"".join(parts), "<u8").reshape(-1, 2)


def zero_hash(seed: int) -> HashArray:
    """Return the hash of a block of zeros; shape (1, 2)."""
    return hash_blocks(memoryview(ZERO_BLOCK), seed)


class Digest:
    """The order-independent check over all data blocks of a disk: add what is there, subtract what is replaced."""

    __slots__ = ("first", "second")

    def __init__(self, first: int = 0, second: int = 0) -> None:
        self.first = first
        self.second = second

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest written as 32 hex digits."""
        return cls(int(text[:16], 16), int(text[16:], 16))

    def __str__(self) -> str:
        return f"{self.first:016x}{self.second:016x}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and (self.first, self.second) == (other.first, other.second)

    def __repr__(self) -> str:
        return f"Digest({self})"

    def __hash__(self) -> int:
        return hash((self.first, self.second))

    def add(self, keys: KeyArray, hashes: HashArray) -> None:
        """Count data blocks in: their keys (the disk's number is ignored) and hashes."""
        first, second = _sums(keys, hashes)
        self.first = (self.first + first) & _MASK
        self.second = (self.second + second) & _MASK

    def subtract(self, keys: KeyArray, hashes: HashArray) -> None:
        """Take data blocks out that were counted before."""
        first, second = _sums(keys, hashes)
        self.first = (self.first - first) & _MASK
        self.second = (self.second - second) & _MASK

    def combine(self, added: Digest, removed: Digest) -> None:
        """Count in what ``added`` counted, and out what ``removed`` did."""
        self.first = (self.first + added.first - removed.first) & _MASK
        self.second = (self.second + added.second - removed.second) & _MASK


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX1
    value = (value ^ (value >> np.uint64(27))) * _MIX2
    return value ^ (value >> np.uint64(31))


def _sums(keys: KeyArray, hashes: HashArray) -> tuple[int, int]:
    blocks = keys & np.uint64((1 << BLOCK_BITS) - 1)
    first = _mix(hashes[:, 0] + _mix(blocks + _ONE))
    second = _mix(hashes[:, 1] ^ _mix(blocks + _GOLDEN))
    return int(first.sum(dtype=np.uint64)), int(second.sum(dtype=np.uint64))
