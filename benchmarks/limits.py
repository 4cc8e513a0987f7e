"""What this machine can do at all, measured in the same run: reading, hashing, compressing, unpacking, writing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from benchmarks.image import BLOCK, MIB

THREADS = 2
CHUNK = 4 * MIB


def _threaded(path: Path, work: Callable[[memoryview], object]) -> None:
    """Run ``work`` over the file in pieces, two threads, each with a buffer of its own."""
    local = threading.local()
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size

    def piece(offset: int) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(CHUNK))
        length = os.preadv(descriptor, [local.buffer], offset)
        work(local.buffer[:length])

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(piece, range(0, size, CHUNK)):
                pass
    finally:
        os.close(descriptor)


def read(path: Path) -> None:
    """Read the cached file."""
    _threaded(path, lambda data: None)


def read_and_hash(path: Path) -> None:
    """Read the cached file and hash each 64 KiB of it."""
    _threaded(path, lambda data: [xxhash.xxh3_128_digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)])


def hash_memory(data: memoryview) -> None:
    """Hash what is in memory, in one call on one thread."""
    xxhash.xxh3_128_digest(data)


def nonzero_part(path: Path) -> bytes:
    """Return the image's blocks that are not zero, one after the other."""
    blocks = np.fromfile(path, np.uint64).reshape(-1, BLOCK // 8)
    return blocks[blocks.any(axis=1)].tobytes()


def _segments(count: int) -> bytes:
    table = np.empty((count, 2), "<u8")
    table[:, 0] = np.arange(count) * BLOCK
    table[:, 1] = BLOCK
    return table.tobytes()


def compress(data: memoryview, level: int = 1) -> None:
    """Compress into 64 KiB frames by zstandard's own two threads, everything at once."""
    packed = zstandard.BufferWithSegments(data, _segments(len(data) // BLOCK))
    zstandard.ZstdCompressor(level=level).multi_compress_to_buffer(packed, threads=THREADS)


def compress_in_tasks(data: memoryview, level: int = 1) -> None:
    """Compress into 64 KiB frames, 4 MiB a task, on two Python threads: the same work with warm caches."""

    def task(offset: int) -> None:
        piece = data[offset : offset + CHUNK]
        packed = zstandard.BufferWithSegments(piece, _segments(len(piece) // BLOCK))
        zstandard.ZstdCompressor(level=level).multi_compress_to_buffer(packed)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(task, range(0, len(data), CHUNK)):
            pass


def unpack_and_write(frames: list[tuple[bytes, bytes, int]], target: Path, size: int) -> None:
    """Unpack frames with two threads and write each block where it belongs into a new sparse file; flush it."""
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def task(batch: tuple[bytes, bytes, int]) -> None:
        data, places, start = batch
        count = len(places) // 16
        sizes = np.full(count, BLOCK, "<u8").tobytes()
        packed = zstandard.BufferWithSegments(data, places)
        blocks = zstandard.ZstdDecompressor().multi_decompress_to_buffer(packed, decompressed_sizes=sizes)
        for at in range(count):
            os.pwrite(descriptor, memoryview(blocks[at]), start + at * BLOCK)

    try:
        os.ftruncate(descriptor, size)
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(task, frames):
                pass
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def batches(data: memoryview) -> list[tuple[bytes, bytes, int]]:
    """Return the data as compressed batches of 4 MiB with the place of each frame, for ``unpack_and_write``."""
    compressor = zstandard.ZstdCompressor(level=1)
    made = []
    for start in range(0, len(data), CHUNK):
        frames = [
            compressor.compress(data[at : at + BLOCK]) for at in range(start, min(start + CHUNK, len(data)), BLOCK)
        ]
        lengths = np.array([len(frame) for frame in frames], "<u8")
        places = np.stack((np.cumsum(lengths) - lengths, lengths), axis=1)
        made.append((b"".join(frames), places.astype("<u8").tobytes(), start))
    return made


def write(target: Path, size: int) -> None:
    """Write a file of that size and flush it."""
    block = os.urandom(CHUNK)
    with target.open("wb") as file:
        for _ in range(0, size, CHUNK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
