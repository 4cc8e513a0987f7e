"""Writing to a dynamic or differencing VHD: new blocks at the end, and tables only after what they lead to.

The format has no log. The order of ``flush`` makes up for it:

1. payload, new blocks and the footer behind them, then a barrier;
2. bitmaps and BAT entries that lead to them, then a barrier.

A crash before 2 leaves blocks that nobody refers to; a crash within 2 leaves each sector either as it was at the last
flush or as it was written since. While the file grows there is no footer at its end: the copy at its start, which is
made sure of first, is what the specification has readers use then.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vhdx.errors import UnsupportedDiskError
from vhdx.osfile import File
from vhdx.vhd_layout import Layout
from vhdx.vhd_structures import FOOTER_SIZE, SECTOR_SIZE, UNUSED_ENTRY

UNFLUSHED_BLOCKS: Final = 4096  # so many blocks' tables wait in memory; then a flush is due


class VhdWriter:
    """The pending table changes of one open disk. ``layout.table`` is the disk's own table and is updated at once."""

    def __init__(self, file: File, layout: Layout) -> None:
        assert layout.header is not None and layout.table is not None
        self._file = file
        self._header = layout.header
        self._table = layout.table
        self._footer = layout.footer.encode()
        self._end = max(layout.content_end, layout.metadata_end)
        self._bitmaps: dict[int, bytes] = {}
        self._entries: set[int] = set()
        self._written = False
        self._sound_footers = not layout.problems

    def allocate(self, block: int, bitmap: npt.NDArray[np.uint8]) -> None:
        """Give ``block`` a place at the end of the file, its payload zeros; the BAT follows with the next flush.

        Raises UnsupportedDiskError where the place is past what a BAT entry can say.
        """
        self._begin()
        place = -(-self._end // SECTOR_SIZE)
        if place >= UNUSED_ENTRY:
            raise UnsupportedDiskError("the file has reached the format's limit of 2 TiB", path=str(self._file.path))
        end = place * SECTOR_SIZE + self._header.bitmap_size + self._header.block_size
        # Shorter first: what lay behind the end, the footer for one, must not show through the new block.
        self._file.truncate(place * SECTOR_SIZE)
        self._file.truncate(end)
        self._end = end
        self._table[block] = place
        self._entries.add(block)
        self.set_bitmap(block, bitmap)

    def set_bitmap(self, block: int, bitmap: npt.NDArray[np.uint8]) -> None:
        """Note that the block's bitmap is now ``bitmap``."""
        self._bitmaps[block] = bitmap.tobytes()
        if len(self._bitmaps) >= UNFLUSHED_BLOCKS:
            self.flush()

    def _begin(self) -> None:
        """Before the first growth: make sure that the copy of the footer at the start is right."""
        if not self._written:
            self._written = True
            if not self._sound_footers:
                self._file.pwrite(0, self._footer)
                self._file.fsync()

    def flush(self) -> None:
        """Bring everything to stable storage in the order that this module's head gives. Raises OsError."""
        if self._written:
            self._file.pwrite(self._end, self._footer)
        self._file.fsync()
        if not self._bitmaps and not self._entries:
            return
        for block, bitmap in self._bitmaps.items():
            self._file.pwrite(int(self._table[block]) * SECTOR_SIZE, bitmap)
        for sector in sorted({block * 4 // SECTOR_SIZE for block in self._entries}):
            first = sector * SECTOR_SIZE // 4
            entries = self._table[first : first + SECTOR_SIZE // 4].astype(">u4")
            self._file.pwrite(self._header.table_offset + first * 4, entries.tobytes())
        self._file.fsync()
        self._bitmaps.clear()
        self._entries.clear()


assert FOOTER_SIZE == SECTOR_SIZE
