"""Segments: immutable objects that pack the frames of many blocks (docs/format.md, 4)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from replica.block import BLOCK_BYTES, HashArray, KeyArray
from replica.errors import IntegrityError
from replica.keys import PartId
from replica.record import FORMAT, SUITE_NONE, check_version

MAGIC: Final = b"GWSEGMNT"
END_MAGIC: Final = b"GWSEGEND"
CODEC_RAW: Final = 0
CODEC_ZSTD: Final = 1
LARGEST_FRAME_BYTES: Final = BLOCK_BYTES

_HEADER = struct.Struct("<8sHBxI16sQII8x")
_TRAILER = struct.Struct("<QI4x16s16s")
_CHECK = struct.Struct("<Q")
HEADER_BYTES: Final = _HEADER.size + _CHECK.size
TRAILER_BYTES: Final = _TRAILER.size + _CHECK.size + len(END_MAGIC)
INDEX_ROW: Final = np.dtype(
    [("key", "<u8"), ("offset", "<u4"), ("length", "<u4"), ("codec", "u1"), ("reserved", "V7"), ("hash", "<u8", (2,))]
)
assert HEADER_BYTES == 64
assert TRAILER_BYTES == 64
assert INDEX_ROW.itemsize == 40


@dataclass(frozen=True, slots=True)
class Frames:
    """Blocks ready to be stored: columns of n, and the n frames."""

    keys: KeyArray
    hashes: HashArray
    lengths: npt.NDArray[np.uint32]
    codecs: npt.NDArray[np.uint8]
    payload: list[Any]  # buffers


def encode_header(magic: bytes, vm_id: str, part: PartId) -> bytes:
    """Return the 64-byte header that segments and map parts share."""
    header = _HEADER.pack(
        magic, FORMAT, SUITE_NONE, BLOCK_BYTES, bytes.fromhex(vm_id), part.point, part.epoch, part.ordinal
    )
    return header + _CHECK.pack(xxhash.xxh3_64_intdigest(header))


def decode_header(magic: bytes, data: bytes | memoryview, *, key: str, vm_id: str, part: PartId) -> None:
    """Check that the header is whole, of a known version, and of the object that it should be.

    Raises IntegrityError or FormatVersionError naming ``key``.
    """
    if len(data) < HEADER_BYTES:
        raise IntegrityError(f"the object ends after {len(data)} bytes, inside its header", key=key)
    found_magic, version, suite, block_bytes, found_vm, point, epoch, ordinal = _HEADER.unpack_from(data)
    if found_magic != magic:
        raise IntegrityError("the object does not begin with its magic: it is damaged or not Godwit's", key=key)
    # Before the version is looked at: a later format has its header's checksum in the same place.
    if _CHECK.unpack_from(data, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(data[: _HEADER.size]):
        raise IntegrityError("the header's checksum does not match", key=key)
    check_version(version, suite, key=key)
    if block_bytes != BLOCK_BYTES:
        raise IntegrityError(f"the object has blocks of {block_bytes} bytes, {BLOCK_BYTES} were expected", key=key)
    if (found_vm.hex(), PartId(point, epoch, ordinal)) != (vm_id, part):
        raise IntegrityError("the object is another one than its key says: objects were mixed up", key=key)


def seal_trailer(trailer: bytes, end_magic: bytes) -> bytes:
    """Return the trailer's fields with their checksum and the closing magic."""
    return trailer + _CHECK.pack(xxhash.xxh3_64_intdigest(trailer)) + end_magic


def open_trailer(data: bytes | memoryview, end_magic: bytes, *, key: str) -> bytes:
    """Return the fields of the 64 trailer bytes, checked. Raises IntegrityError."""
    if len(data) != TRAILER_BYTES or bytes(data[-8:]) != end_magic:
        raise IntegrityError("the object does not end with its trailer: it is cut short or damaged", key=key)
    fields = bytes(data[: -8 - _CHECK.size])
    if _CHECK.unpack_from(data, len(fields))[0] != xxhash.xxh3_64_intdigest(fields):
        raise IntegrityError("the trailer's checksum does not match", key=key)
    return fields


class SegmentWriter:
    """Builds one segment: frames are collected as they are, and brought together once, when it is sealed."""

    __slots__ = ("_parts", "_rows", "frames", "part", "size")

    def __init__(self, vm_id: str, part: PartId) -> None:
        self.part = part
        self.size = HEADER_BYTES  # bytes so far, without index and trailer
        self._parts: list[Any] = [encode_header(MAGIC, vm_id, part)]
        self._rows: list[npt.NDArray[np.void]] = []
        self.frames = 0

    @property
    def sealed_size(self) -> int:
        """Bytes that the object will have if it is sealed now. Not to be asked for afterwards."""
        return self.size + self.frames * INDEX_ROW.itemsize + TRAILER_BYTES

    def append(self, frames: Frames) -> npt.NDArray[np.uint32]:
        """Add the frames; return the offset of each in the object."""
        ends = np.cumsum(frames.lengths, dtype=np.uint64)
        offsets = (ends - frames.lengths + np.uint64(self.size)).astype(np.uint32)
        rows = np.zeros(len(offsets), INDEX_ROW)
        rows["key"], rows["offset"], rows["length"] = frames.keys, offsets, frames.lengths
        rows["codec"], rows["hash"] = frames.codecs, frames.hashes
        self._rows.append(rows)
        self._parts += frames.payload
        self.size += int(frames.lengths.sum())
        self.frames += len(rows)
        return offsets

    def seal(self) -> bytes:
        """Return the finished object; the writer is not used again."""
        index = np.concatenate(self._rows).tobytes() if self._rows else b""
        checksum = xxhash.xxh3_128()
        for part in (*self._parts, index):
            checksum.update(part)
        trailer = _TRAILER.pack(
            self.size, len(index) // INDEX_ROW.itemsize, xxhash.xxh3_128_digest(index), checksum.digest()
        )
        return b"".join([*self._parts, index, seal_trailer(trailer, END_MAGIC)])


@dataclass(frozen=True, slots=True)
class SegmentTrailer:
    """Where the index is, and the checks over it and over everything."""

    index_offset: int
    count: int
    index_checksum: bytes
    checksum: bytes


def decode_trailer(data: bytes | memoryview, *, key: str, size: int) -> SegmentTrailer:
    """Decode the last 64 bytes of a segment of ``size`` bytes. Raises IntegrityError."""
    trailer = SegmentTrailer(*_TRAILER.unpack(open_trailer(data, END_MAGIC, key=key)))
    if trailer.index_offset < HEADER_BYTES or (
        trailer.index_offset + trailer.count * INDEX_ROW.itemsize + TRAILER_BYTES != size
    ):
        raise IntegrityError(f"the trailer does not fit the object's {size} bytes", key=key)
    return trailer


def decode_index(data: bytes | memoryview, trailer: SegmentTrailer, *, key: str) -> npt.NDArray[np.void]:
    """Decode the index: a structured array of ``INDEX_ROW``, every frame within the object. Raises IntegrityError."""
    if len(data) != trailer.count * INDEX_ROW.itemsize or xxhash.xxh3_128_digest(data) != trailer.index_checksum:
        raise IntegrityError("the index's checksum does not match", key=key)
    rows = np.frombuffer(data, INDEX_ROW)
    ends = rows["offset"].astype(np.int64) + rows["length"]
    if len(rows) and (
        int(rows["offset"].min()) < HEADER_BYTES
        or int(ends.max()) > trailer.index_offset
        or int(rows["length"].max()) > LARGEST_FRAME_BYTES
        or int(rows["codec"].max()) > CODEC_ZSTD
    ):
        raise IntegrityError("the index names frames outside the object", key=key)
    return rows


def decode_segment(data: bytes, *, key: str, vm_id: str, part: PartId) -> npt.NDArray[np.void]:
    """Check a whole segment, every byte of it, and return its index. Raises IntegrityError or FormatVersionError."""
    decode_header(MAGIC, data, key=key, vm_id=vm_id, part=part)
    view = memoryview(data)
    trailer = decode_trailer(view[-TRAILER_BYTES:], key=key, size=len(data))
    if xxhash.xxh3_128_digest(view[:-TRAILER_BYTES]) != trailer.checksum:
        raise IntegrityError("the object's checksum does not match its content: it is damaged", key=key)
    return decode_index(view[trailer.index_offset : -TRAILER_BYTES], trailer, key=key)


class FrameCompressor:
    """Compresses batches of blocks. One for each thread."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)

    def compress(self, data: memoryview, picked: npt.NDArray[np.intp], keys: KeyArray, hashes: HashArray) -> Frames:
        """Return frames of the blocks at positions ``picked`` (ascending) of ``data``; keys and hashes are theirs.

        The whole batch is compressed in one call that holds no interpreter lock.
        """
        segments = np.empty((len(picked), 2), "<u8")
        segments[:, 0] = picked * BLOCK_BYTES
        segments[:, 1] = BLOCK_BYTES
        packed = self._zstd.multi_compress_to_buffer(zstandard.BufferWithSegments(data, segments.tobytes()))
        parts: list[Any] = [packed[at] for at in range(len(picked))]
        lengths = np.fromiter(map(len, parts), np.uint32, len(picked))
        codecs = np.full(len(picked), CODEC_ZSTD, np.uint8)
        for at in np.flatnonzero(lengths >= BLOCK_BYTES):
            start = int(picked[at]) * BLOCK_BYTES
            parts[at] = bytes(data[start : start + BLOCK_BYTES])  # the buffer is used again
            lengths[at], codecs[at] = BLOCK_BYTES, CODEC_RAW
        return Frames(keys, hashes, lengths, codecs, parts)
