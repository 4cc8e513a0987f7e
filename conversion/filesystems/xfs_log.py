"""The log of XFS, as far as to tell whether a mount would replay it: does it end in an unmount record?"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

SECTOR: Final = 512
_MAGIC: Final = 0xFEEDBABE
_FURTHEST_RECORD_BYTES: Final = 8 * (256 << 10) + 64 * SECTOR  # eight buffers of the largest size may be in flight
_UNMOUNT: Final = 0x20


def is_clean(read: Callable[[int, int], bytes], size_bytes: int) -> bool:
    """Return whether the newest record is that of an unmount. ``read(offset, length)`` reads the log's bytes.

    Each sector of the log begins with the number of the cycle that wrote it (a record's header with the magic number
    and then the cycle), so the newest one is where the cycle falls by one.
    """
    count = size_bytes // SECTOR
    if count < 2:
        return False
    first = _cycle(read(0, SECTOR))
    low, high = 0, count  # sector ``low`` is of the first one's cycle, ``high`` is not or is the end
    while high - low > 1:
        middle = (low + high) // 2
        if _cycle(read(middle * SECTOR, SECTOR)) == first:
            low = middle
        else:
            high = middle
    record = _last_record(read, high % count, count)
    if record is None:
        return not first and high == count  # never written: all zeros
    start, header = record
    operations = int.from_bytes(header[40:44], "big")  # h_num_logops
    length = int.from_bytes(header[12:16], "big")
    # Version 2 records above 32 KiB have more headers, one sector for each 32 KiB.
    header_sectors = max(1, -(-int.from_bytes(header[320:324], "big") // 32768)) if header[11] & 2 else 1
    if operations != 1 or not 0 < length <= 64 * SECTOR or header_sectors > 64:
        return False
    if (start + header_sectors + -(-length // SECTOR)) % count != high % count:
        return False  # something was written after it, or it is not the newest
    body = read((start + header_sectors) % count * SECTOR, SECTOR)
    # The first four bytes of each sector hold the cycle; they belong to the operation's transaction number.
    return bool(body[9] & _UNMOUNT)


def _last_record(read: Callable[[int, int], bytes], head: int, count: int) -> tuple[int, bytes] | None:
    """Return the record header nearest before ``head``, wrapping, with its sector number."""
    sectors = min(count, _FURTHEST_RECORD_BYTES // SECTOR)
    for back in range(1, sectors + 1):
        at = (head - back) % count
        sector = read(at * SECTOR, SECTOR)
        if int.from_bytes(sector[:4], "big") == _MAGIC:
            return at, sector
    return None


def _cycle(sector: bytes) -> int:
    magic, cycle = struct.unpack_from(">II", sector)
    return int(cycle if magic == _MAGIC else magic)
