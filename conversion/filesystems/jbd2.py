"""The journal of ext3 and ext4 (jbd2): which blocks a mount would replay, found without writing any of them.

A copy taken of a running machine has a dirty journal as a rule: the newest directory entries and inodes may be there
alone. Only the descriptor, revoke and commit blocks are read here; a journalled block itself is read, and its checksum
verified, when somebody wants it. Layout: the kernel's Documentation/filesystems/ext4/journal.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from conversion.errors import DamagedError
from conversion.filesystems.walk import crc32c

MAGIC: Final = 0xC03B3998
_HEADER: Final = struct.Struct(">III")  # magic, kind of block, sequence
_SUPERBLOCK: Final = struct.Struct(">12x IIIII I III 16s")  # after the header, through the UUID
_TAG: Final = struct.Struct(">IHHI")  # block, checksum, flags, block's high half
_TAG3: Final = struct.Struct(">IIII")  # block, flags, block's high half, checksum
assert _HEADER.size == 12 and _SUPERBLOCK.size == 64 and _TAG.size == 12 and _TAG3.size == 16

_DESCRIPTOR, _COMMIT, _SUPER_V1, _SUPER_V2, _REVOKE = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_REVOKES, _WIDE, _ASYNC_COMMIT, _CHECKSUM_V2, _CHECKSUM_V3, _FAST_COMMIT = 1, 2, 4, 8, 16, 32
_KNOWN: Final = _REVOKES | _WIDE | _ASYNC_COMMIT | _CHECKSUM_V2 | _CHECKSUM_V3 | _FAST_COMMIT
LARGEST_BLOCKS: Final = 10_240_000  # the format's own limit (JBD2_MAX_JOURNAL_BLOCKS is below it)
MOST_REPLAYED: Final = 2_000_000  # blocks; a journal of 8 GiB in blocks of 4 KiB


@dataclass(frozen=True, slots=True)
class _Copy:
    """Where the journal holds the newest content of a block."""

    journal_block: int
    escaped: bool  # its first four bytes were the magic number and are zeros in the journal
    sequence: int
    checksum: int | None


@dataclass(slots=True)
class Replay:
    """What a mount would write. ``blocks`` is by file system block; nothing is in it where the journal is clean."""

    dirty: bool
    transactions: int = 0
    fast_commits: bool = False  # there may be newer changes in the fast commit area, which is not replayed
    blocks: dict[int, _Copy] = field(default_factory=dict)


class Journal:
    """``read_block`` reads a journal block by its number in the journal; it raises DamagedError."""

    def __init__(self, read_block: Callable[[int], bytes], block_size: int, block_count: int) -> None:
        """Raises DamagedError where there is no journal of this block size."""
        self._read = read_block
        self._size = block_size
        first = read_block(0)
        magic, kind, _ = _HEADER.unpack_from(first)
        size, self._end, self._first, self._sequence, self._start, *_, incompat, _, uuid = _SUPERBLOCK.unpack_from(
            first
        )
        if magic != MAGIC or kind not in {_SUPER_V1, _SUPER_V2} or size != block_size:
            raise DamagedError("the journal does not begin with its superblock")
        self._features = incompat if kind == _SUPER_V2 else 0
        if self._features & ~_KNOWN:
            raise DamagedError(f"the journal has unknown features {self._features & ~_KNOWN:#x}")
        self._seed = crc32c(0xFFFFFFFF, uuid)
        self._has_checksums = bool(self._features & (_CHECKSUM_V2 | _CHECKSUM_V3))
        if self._has_checksums and _sum_without(first[:1024], 0xFC, 0xFFFFFFFF) != _u32(first, 0xFC):
            raise DamagedError("the journal's superblock fails its checksum")
        if self._features & _FAST_COMMIT:
            self._end -= _u32(first, 0x54) or 256
        if not 0 < self._first < self._end <= min(block_count, LARGEST_BLOCKS) or not 0 <= self._start < self._end:
            raise DamagedError("the journal's superblock contradicts its size")

    def replay(self) -> Replay:
        """Return what is to be replayed. An unfinished transaction at the end is none, as for the kernel."""
        found = Replay(dirty=self._start != 0, fast_commits=self._start != 0 and bool(self._features & _FAST_COMMIT))
        revoked: dict[int, int] = {}  # block → sequence of the last transaction that revoked it
        transactions = list(self._transactions(revoked)) if found.dirty else []
        for sequence, copies in transactions:
            for block, copy in copies.items():
                last = revoked.get(block)
                if last is None or _signed(last - sequence) < 0:
                    found.blocks[block] = copy
        found.transactions = len(transactions)
        return found

    def content(self, copy: _Copy) -> bytes:
        """Return a journalled block. Raises DamagedError where it fails its checksum."""
        data = self._read(copy.journal_block)
        if copy.checksum is not None:
            total = crc32c(crc32c(self._seed, struct.pack(">I", copy.sequence)), data)
            wide = bool(self._features & _CHECKSUM_V3)
            if copy.checksum != (total if wide else total & 0xFFFF):
                raise DamagedError(f"block {copy.journal_block} of the journal fails its checksum")
        return struct.pack(">I", MAGIC) + data[4:] if copy.escaped else data

    def _transactions(self, revoked: dict[int, int]) -> Iterator[tuple[int, dict[int, _Copy]]]:
        at, sequence, left, total = self._start, self._sequence, self._end - self._first, 0
        copies: dict[int, _Copy] = {}
        revokes: list[int] = []
        while left > 0:
            block = self._read(at)
            magic, kind, its_sequence = _HEADER.unpack_from(block)
            if magic != MAGIC or its_sequence != sequence or not self._is_whole(block, kind):
                return
            at, left = self._after(at), left - 1
            if kind == _DESCRIPTOR:
                for number, escaped, checksum in self._tags(block):
                    copies[number] = _Copy(at, escaped, sequence, checksum)
                    at, left, total = self._after(at), left - 1, total + 1
                    if total > MOST_REPLAYED:
                        raise DamagedError("the journal holds more blocks than any")
            elif kind == _REVOKE:
                revokes += self._revoked(block)
            elif kind == _COMMIT:
                revoked.update(dict.fromkeys(revokes, sequence))
                yield sequence, copies
                copies, revokes, sequence = {}, [], (sequence + 1) & 0xFFFFFFFF
            else:
                return

    def _after(self, at: int) -> int:
        return at + 1 if at + 1 < self._end else self._first

    def _is_whole(self, block: bytes, kind: int) -> bool:
        if not self._has_checksums:
            return True
        if kind == _COMMIT:
            return _sum_without(block, 16, self._seed) == _u32(block, 16)
        return _sum_without(block, self._size - 4, self._seed) == _u32(block, self._size - 4)

    def _tags(self, block: bytes) -> Iterator[tuple[int, bool, int | None]]:
        wide, v3, v2 = (bool(self._features & bit) for bit in (_WIDE, _CHECKSUM_V3, _CHECKSUM_V2))
        length = _TAG3.size if v3 else _TAG.size + 2 * v2 - 4 * (not wide)
        at, end = _HEADER.size, self._size - 4 * self._has_checksums
        while at + length <= end:
            if v3:
                low, flags, high, checksum = _TAG3.unpack_from(block, at)
            else:
                low, checksum, flags, high = _TAG.unpack_from(block, at) if wide else (*_narrow(block, at), 0)
            yield low | (high << 32 if wide else 0), bool(flags & _ESCAPED), checksum if self._has_checksums else None
            at += length + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                return

    def _revoked(self, block: bytes) -> list[int]:
        end = min(_u32(block, 12), self._size - 4 * self._has_checksums)
        width = 8 if self._features & _WIDE else 4
        return [int.from_bytes(block[at : at + width], "big") for at in range(16, end - width + 1, width)]


def _narrow(block: bytes, at: int) -> tuple[int, int, int]:
    low, checksum, flags = struct.unpack_from(">IHH", block, at)
    return low, checksum, flags


def _sum_without(block: bytes, at: int, seed: int) -> int:
    return crc32c(seed, block[:at] + bytes(4) + block[at + 4 :])


def _u32(block: bytes, at: int) -> int:
    return int.from_bytes(block[at : at + 4], "big")


def _signed(difference: int) -> int:
    """Return a difference of sequence numbers, which wrap, as a signed number."""
    difference &= 0xFFFFFFFF
    return difference - (1 << 32) if difference >> 31 else difference
