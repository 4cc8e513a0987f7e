"""The picture on a machine's screen as PNG, whatever QEMU was built with."""

from __future__ import annotations

import struct
import zlib
from typing import Final

from replica.errors import PlatformError

LARGEST_PICTURE_BYTES: Final = 64 << 20
PNG: Final = b"\x89PNG\r\n\x1a\n"

_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlace
assert _HEADER.size == 13


def png_of(picture: bytes) -> bytes:
    """Return a PNG as it is, and a PPM (P6, eight bits a colour) made into one. Raises PlatformError."""
    if picture.startswith(PNG):
        return picture
    fields = picture[:64].split(maxsplit=4)
    if len(fields) < 4 or fields[0] != b"P6" or not all(one.isdigit() for one in fields[1:4]) or fields[3] != b"255":
        raise PlatformError("QEMU's picture of the screen is of an unknown format")
    width, height = int(fields[1]), int(fields[2])
    row = 3 * width
    if not 0 < row * height <= LARGEST_PICTURE_BYTES or len(picture) < row * height:
        raise PlatformError("QEMU's picture of the screen is cut off")
    pixels = memoryview(picture)[len(picture) - row * height :]
    # Each row begins with the number of its filter: none.
    rows = b"".join(b"\0" + bytes(pixels[at : at + row]) for at in range(0, row * height, row))
    header = _HEADER.pack(width, height, 8, 2, 0, 0, 0)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 6)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
