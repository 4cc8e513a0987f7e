"""Metadata sectors that were changed in memory and are not in the file yet, laid over the file for its readers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vhdx.osfile import File

SECTOR: Final = 4096


class PendingSectors:
    """A file read through its pending sectors, of 4 KiB each. It satisfies ``replay.ReadableFile``.

    Few sectors are pending at any time (the writer commits before there are many), so a read looks at each.
    """

    def __init__(self, file: File) -> None:
        self.file = file
        self._sectors: dict[int, bytearray] = {}  # by offset in the file

    def __len__(self) -> int:
        return len(self._sectors)

    @property
    def path(self) -> Path:
        """The path of the file underneath."""
        return self.file.path

    def size(self) -> int:
        """Return the file's present length, bytes."""
        return self.file.size()

    def pread(self, offset: int, length: int) -> bytes:
        """Return the bytes from ``offset``; fewer only where the file ends."""
        if not self._sectors:
            return self.file.pread(offset, length)
        buffer = bytearray(max(0, min(length, self.size() - offset)))
        return bytes(buffer[: self.pread_into(offset, memoryview(buffer))])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only where the file ends."""
        filled = self.file.pread_into(offset, buffer)
        for start, sector in self._sectors.items():
            first, last = max(offset, start), min(offset + filled, start + SECTOR)
            if first < last:
                buffer[first - offset : last - offset] = sector[first - start : last - start]
        return filled

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges that may hold data: the file's own, or everything while sectors are pending."""
        if not self._sectors:
            yield from self.file.data_extents(start, end)
        elif start < min(end, self.size()):
            yield start, min(end, self.size())

    def change(self, offset: int, data: bytes | memoryview) -> None:
        """Put ``data`` over the file's bytes at ``offset``, in memory."""
        position = 0
        while position < len(data):
            within = (offset + position) % SECTOR
            count = min(SECTOR - within, len(data) - position)
            self.sector(offset + position - within)[within : within + count] = data[position : position + count]
            position += count

    def sector(self, offset: int) -> bytearray:
        """Return the sector at ``offset``, to be changed in place; it is pending from now on."""
        sector = self._sectors.get(offset)
        if sector is None:
            sector = self._sectors[offset] = bytearray(self.file.pread(offset, SECTOR).ljust(SECTOR, b"\0"))
        return sector

    def contents(self) -> list[tuple[int, bytes]]:
        """Return offset and content of every pending sector, ascending."""
        return [(offset, bytes(sector)) for offset, sector in sorted(self._sectors.items())]

    def clear(self) -> None:
        """Forget the sectors: they are in the file now."""
        self._sectors.clear()

    def set_bits(self, offset: int, first: int, last: int, *, value: bool = True) -> None:
        """Set the bits [first, last) of the bitmap that begins at ``offset`` of the file; bit 0 is the lowest."""
        while first < last:
            byte, bit = divmod(first, 8)
            if bit == 0 and last - first >= 8:
                count = min((last - first) // 8, SECTOR - (offset + byte) % SECTOR)
                self.change(offset + byte, (b"\xff" if value else b"\0") * count)
                first += 8 * count
                continue
            width = min(8 - bit, last - first)
            mask = ((1 << width) - 1) << bit
            place = offset + byte
            sector = self.sector(place - place % SECTOR)
            old = sector[place % SECTOR]
            sector[place % SECTOR] = old | mask if value else old & ~mask
            first += width
