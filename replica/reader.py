"""Reads the blocks of a recovery point: fetches frames from segments in few requests, unpacks, checks every hash."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from replica.block import BLOCK_BITS, BLOCK_BYTES, Digest
from replica.blockmap import Window
from replica.errors import IntegrityError, ObjectMissingError
from replica.keys import VmKeys
from replica.maptable import Entries, SegmentRef
from replica.segment import CODEC_RAW, CODEC_ZSTD
from replica.stores.store import Store

FETCH_BLOCKS: Final = 64  # at most 4 MiB decompressed
FETCH_GAP_BYTES: Final = 64 << 10  # what is fetched in vain rather than asked for apart
BLOCK_MASK: Final = (1 << BLOCK_BITS) - 1


@dataclass(frozen=True, slots=True)
class Fetch:
    """Frames of one segment that are fetched together, in order of place; ``entries`` are those of the blocks."""

    ref: SegmentRef
    start: int
    length: int
    entries: Entries


@dataclass(frozen=True, slots=True)
class Blocks:
    """Decompressed, checked blocks: their numbers on the disk, and their bytes, each of 65,536."""

    numbers: list[int]
    data: list[Any]  # buffers


def plan_fetches(window: Window) -> Iterator[Fetch]:
    """Yield the fetches that read all data blocks of a window, segment by segment, in order of place."""
    data = window.entries.take(window.entries.is_data)
    if not len(data):
        return
    data = data.take(np.lexsort((data.offsets, data.segments)))
    starts = data.offsets.astype(np.int64)
    ends = starts + data.lengths
    apart = (data.segments[1:] != data.segments[:-1]) | (starts[1:] - ends[:-1] > FETCH_GAP_BYTES)
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(data)]
    for first, last in pairwise(edges):
        for at in range(first, last, FETCH_BLOCKS):
            stop = min(at + FETCH_BLOCKS, last)
            start, end = int(starts[at]), int(ends[at:stop].max())
            yield Fetch(window.table.refs[int(data.segments[at])], start, end - start, data.take(slice(at, stop)))


class BlockReader:
    """Does fetches. Callable from several threads at once."""

    def __init__(self, store: Store, tenant: str, hash_seed: int) -> None:
        self._store = store
        self._tenant = tenant
        self._seed = hash_seed

    def read(self, fetch: Fetch) -> Blocks:
        """Return the blocks of one fetch. Raises IntegrityError naming the segment where anything is not as it was."""
        key = self._key(fetch)
        try:
            data = self._store.get(key, start=fetch.start, length=fetch.length)
        except ObjectMissingError as error:
            raise IntegrityError("a segment that a recovery point needs is missing", key=key) from error
        if len(data) != fetch.length:
            raise IntegrityError(f"the segment ends before byte {fetch.start + fetch.length}: it was cut", key=key)
        return self.unpack(fetch, data)

    def unpack(self, fetch: Fetch, data: bytes) -> Blocks:
        """Return the blocks from the bytes that the fetch names. Raises IntegrityError as ``read`` does."""
        key = self._key(fetch)
        numbers = (fetch.entries.keys & np.uint64(BLOCK_MASK)).tolist()
        buffers = self._decompress(fetch, data, key)
        digest = xxhash.xxh3_128_digest
        found = b"".join([digest(buffer, self._seed) for buffer in buffers])
        wrong = np.flatnonzero(np.any(np.frombuffer(found, "<u8").reshape(-1, 2) != fetch.entries.hashes, axis=1))
        if len(wrong):
            raise self._damaged(fetch, int(wrong[0]), key, "does not have the hash that was taken when it was read")
        return Blocks(numbers, buffers)

    def _key(self, fetch: Fetch) -> str:
        return VmKeys(self._tenant, fetch.ref.vm_id).segment(fetch.ref.part)

    def _decompress(self, fetch: Fetch, data: bytes, key: str) -> list[Any]:
        entries = fetch.entries
        places = np.empty((len(entries), 2), "<u8")
        places[:, 0] = entries.offsets - np.uint32(fetch.start)
        places[:, 1] = entries.lengths
        packed = entries.codecs == CODEC_ZSTD
        buffers: list[Any] = [None] * len(entries)
        view = memoryview(data)
        for at in np.flatnonzero(~packed).tolist():
            if int(entries.lengths[at]) != BLOCK_BYTES or int(entries.codecs[at]) != CODEC_RAW:
                raise self._damaged(fetch, at, key, "is stored in a way that is not known")
            start = int(places[at, 0])
            buffers[at] = view[start : start + BLOCK_BYTES]
        rows = np.flatnonzero(packed)
        if len(rows):
            for at, buffer in zip(rows.tolist(), self._unpack(fetch, data, places[rows], key), strict=True):
                buffers[at] = buffer
        return buffers

    def _unpack(self, fetch: Fetch, data: bytes, places: npt.NDArray[np.uint64], key: str) -> list[Any]:
        sizes = np.full(len(places), BLOCK_BYTES, "<u8")
        try:
            unpacked = zstandard.ZstdDecompressor().multi_decompress_to_buffer(
                zstandard.BufferWithSegments(data, places.tobytes()), decompressed_sizes=sizes.tobytes()
            )
        except (zstandard.ZstdError, ValueError) as error:
            raise IntegrityError(
                f"frames of the segment between bytes {fetch.start} and {fetch.start + fetch.length} "
                f"cannot be decompressed: it is damaged ({error})",
                key=key,
            ) from error
        return [unpacked[at] for at in range(len(places))]

    def _damaged(self, fetch: Fetch, at: int, key: str, what: str) -> IntegrityError:
        block_key = int(fetch.entries.keys[at])
        number = block_key & BLOCK_MASK
        return IntegrityError(
            f"block {number} of disk {block_key >> BLOCK_BITS} (bytes {number * BLOCK_BYTES} to "
            f"{(number + 1) * BLOCK_BYTES}) {what}: the segment is damaged",
            key=key,
        )


def digest_of(window: Window) -> tuple[Digest, int]:
    """Return the digest of a window's data blocks, and how many there are."""
    data = window.entries.take(window.entries.is_data)
    digest = Digest()
    digest.add(data.keys, data.hashes)
    return digest, len(data)
