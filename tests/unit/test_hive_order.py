"""In which order the sectors of a hive are written: a head that says dirty first, one that says whole last."""

from __future__ import annotations

import struct

import pytest

from conversion.windows.hiveorder import in_phases

SECTOR = 512
OTHER = b"hbin".ljust(SECTOR, b"\1")


def head(first: int, second: int) -> bytes:
    return struct.pack("<4sII", b"regf", first, second).ljust(SECTOR, b"\2")


WHOLE, DIRTY = head(7, 7), head(8, 7)


@pytest.mark.parametrize(
    ("ranges", "phases"),
    [
        ([], []),
        ([(0, OTHER)], [[(0, OTHER)]]),
        ([(0, WHOLE + OTHER)], [[(SECTOR, OTHER)], [(0, WHOLE)]]),
        ([(0, DIRTY + OTHER)], [[(0, DIRTY)], [(SECTOR, OTHER)]]),
        (
            [(0, OTHER + WHOLE + OTHER), (9 * SECTOR, DIRTY)],
            [[(9 * SECTOR, DIRTY)], [(0, OTHER), (2 * SECTOR, OTHER)], [(SECTOR, WHOLE)]],
        ),
        ([(0, OTHER[:-4] + b"regf" + OTHER)], [[(0, OTHER[:-4] + b"regf" + OTHER)]]),  # within a sector: text
        ([(0, b"regf")], [[(0, b"regf")]]),  # no whole sector
    ],
)
def test_phases(ranges: list[tuple[int, bytes]], phases: list[list[tuple[int, bytes]]]) -> None:
    assert in_phases(iter(ranges)) == phases
