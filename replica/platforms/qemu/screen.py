"""The picture on a machine's screen as PNG, whatever QEMU was built with."""

from __future__ import annotations

import re
import struct
import zlib
from typing import Final

from replica.errors import PlatformError

LARGEST_PICTURE_BYTES: Final = 64 << 20
PNG: Final = b"\x89PNG\r\n\x1a\n"

_PPM = re.compile(rb"P6\s+(\d{1,6})\s+(\d{1,6})\s+255\s")
_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlace
assert _HEADER.size == 13


def png_of(picture: bytes) -> bytes:
    """Return a PNG as it is, and a PPM (P6, eight bits a colour) made into one. Raises PlatformError."""
    if picture.startswith(PNG):
        return picture
    head = _PPM.match(picture)
    if head is None:
        raise PlatformError("QEMU's picture of the screen is of an unknown format")
    width, height = int(head[1]), int(head[2])
    row = 3 * width
    pixels = memoryview(picture)[head.end() :]
    if not 0 < row * height <= LARGEST_PICTURE_BYTES or len(pixels) < row * height:
        raise PlatformError("QEMU's picture of the screen is cut off")
    # Each row begins with the number of its filter: none.
    rows = b"".join(b"\0" + bytes(pixels[at : at + row]) for at in range(0, row * height, row))
    header = _HEADER.pack(width, height, 8, 2, 0, 0, 0)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 6)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
