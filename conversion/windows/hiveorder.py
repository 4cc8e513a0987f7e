"""The order in which the sectors of a registry hive are written, so that Windows can read it if that is cut off.

A hive's first sector tells by two sequence numbers whether the hive is whole or dirty: Windows mends a dirty one from
the logs beside it, which no conversion touches. So a first sector that says dirty is written before all else of the
hive, one that says whole after all else. Cut off in between, in whatever sectors, the hive is the one of before: as it
was if that was whole, and where the logs lead if it was dirty, but for values that are the new ones already.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, TypeAlias

Ranges: TypeAlias = list[tuple[int, bytes]]  # (offset on the disk, data)

SECTOR_BYTES: Final = 512
_MAGIC: Final = b"regf"
_HEAD: Final = struct.Struct("<4sII")
assert _HEAD.size == 12


def in_phases(ranges: Iterable[tuple[int, bytes]]) -> list[Ranges]:
    """Return the ranges in groups, each of which is to be durable before the next: dirty heads, the rest, whole heads.

    Ranges are whole sectors. Groups that are empty are left out.
    """
    dirty, rest, whole = Ranges(), Ranges(), Ranges()
    for offset, data in ranges:
        done = 0
        for at in _heads(data):
            if at > done:
                rest.append((offset + done, data[done:at]))
            sector = data[at : at + SECTOR_BYTES]
            _, first, second = _HEAD.unpack_from(sector)
            (whole if first == second else dirty).append((offset + at, sector))
            done = at + SECTOR_BYTES
        if done < len(data):
            rest.append((offset + done, data[done:]))
    return [group for group in (dirty, rest, whole) if group]


def _heads(data: bytes) -> list[int]:
    """Return where in whole sectors a hive's first one may be; another file's that looks alike does no harm."""
    found, at = list[int](), data.find(_MAGIC)
    while at >= 0:
        if at % SECTOR_BYTES == 0 and at + SECTOR_BYTES <= len(data):
            found.append(at)
        at = data.find(_MAGIC, at + 1)
    return found
