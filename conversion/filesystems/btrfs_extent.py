"""What the extents of btrfs files hold: inline, plain, or compressed with zlib, LZO or zstd."""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

import zstandard

from conversion.errors import UnsupportedError
from conversion.filesystems.btrfs_tree import TreeReader
from conversion.filesystems.lzo import decompress_lzo

_COMMON: Final = struct.Struct("<8x Q BBH B")  # length when decompressed, compression, encryption, other, kind
_PLACE: Final = struct.Struct("<QQQQ")  # address, length there, offset in what is there, length in the file
assert _COMMON.size == 21 and _PLACE.size == 32
_INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2
_ZLIB, _LZO, _ZSTD = 1, 2, 3
LARGEST_COMPRESSED_BYTES: Final = 128 << 10  # of the data in one compressed extent, by the format
LARGEST_EXTENT_BYTES: Final = 1 << 40


class FileExtent(NamedTuple):
    """``start`` and ``length`` are in the file, ``source`` is a logical address, all bytes."""

    start: int
    length: int
    compression: int
    inline: bytes | None
    source: int
    source_length: int
    skipped_bytes: int
    whole_length: int  # of what is at ``source``, once decompressed
    is_hole: bool


def decode_extent(start: int, data: bytes, trees: TreeReader) -> FileExtent:
    """Decode the item of a file extent. Raises DamagedError, UnsupportedError."""
    if len(data) < _COMMON.size:
        raise trees.damaged("a file extent is too short")
    whole, compression, encryption, other, kind = _COMMON.unpack_from(data)
    if encryption or other or compression > _ZSTD or kind > _PREALLOCATED:
        raise UnsupportedError("a file extent is encoded in an unknown way", subject="btrfs")
    if kind == _INLINE:
        if compression and whole > LARGEST_COMPRESSED_BYTES:
            raise trees.damaged(f"an inline extent would hold {whole} bytes")
        length = whole if compression else len(data) - _COMMON.size
        return FileExtent(start, length, compression, data[_COMMON.size :], 0, 0, 0, whole, False)
    if len(data) < _COMMON.size + _PLACE.size:
        raise trees.damaged("a file extent is too short")
    source, source_length, skipped, length = _PLACE.unpack_from(data, _COMMON.size)
    too_large = max(whole, source_length) > LARGEST_COMPRESSED_BYTES if compression else length > LARGEST_EXTENT_BYTES
    if not length or (source and (too_large or (skipped + length > whole))):
        raise trees.damaged("a file extent contradicts itself")
    hole = source == 0 or kind == _PREALLOCATED
    return FileExtent(start, length, compression, None, source, source_length, skipped, whole, hole)


def content_of(extent: FileExtent, trees: TreeReader, *, most_bytes: int) -> bytes:
    """Return up to ``most_bytes`` of what an extent holds; b"" for a hole. Raises DamagedError."""
    if extent.is_hole:
        return b""
    if extent.inline is not None:
        raw, skipped = extent.inline, 0
    elif extent.compression:
        raw, skipped = trees.read(extent.source, extent.source_length), extent.skipped_bytes
    else:
        return trees.read(extent.source + extent.skipped_bytes, min(extent.length, most_bytes))
    if not extent.compression:
        return raw[:most_bytes]
    whole = _decompress(raw, extent, trees)
    return whole[skipped : skipped + extent.length].ljust(extent.length, b"\0")[:most_bytes]


def _decompress(raw: bytes, extent: FileExtent, trees: TreeReader) -> bytes:
    try:
        if extent.compression == _ZLIB:
            return zlib.decompressobj().decompress(raw, extent.whole_length)
        if extent.compression == _ZSTD:
            # The frame does not tell its length, and the extent may be padded after it.
            decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20)
            return decompressor.stream_reader(raw).read(extent.whole_length)
        return _decompress_lzo(raw, extent.whole_length, trees.sector_size)
    except (zlib.error, zstandard.ZstdError, ValueError) as error:
        raise trees.damaged(f"a compressed extent cannot be decompressed: {error}") from error


def _decompress_lzo(raw: bytes, whole_length: int, sector_size: int) -> bytes:
    """Return what LZO segments hold: a total length, then for each sector its length and data.

    A segment's length never straddles a sector's end: up to three bytes before it are padding.
    """
    total = min(int.from_bytes(raw[:4], "little"), len(raw))
    found, at = b"", 4
    while at + 4 <= total and len(found) < whole_length:
        if sector_size - at % sector_size < 4:
            at += sector_size - at % sector_size
        size = int.from_bytes(raw[at : at + 4], "little")
        at += 4
        if not size or at + size > len(raw):
            raise ValueError("a segment reaches outside of it")
        found += decompress_lzo(raw[at : at + size], sector_size)
        at += size
    return found
