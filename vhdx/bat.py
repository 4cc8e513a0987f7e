"""The block allocation table: where each payload block and sector bitmap block stands in the file [MS-VHDX 2.5].

The table interleaves two kinds of entries: after every ``chunk ratio`` payload entries stands the entry of the sector
bitmap block that describes their sectors. ``Geometry`` is that arithmetic; ``Bat`` reads entries by page and range.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vhdx.errors import CorruptDiskError
from vhdx.replay import ReadableFile
from vhdx.structures import BAT_ENTRY_SIZE, BAT_STATE_MASK, SECTORS_PER_BITMAP

Entries: TypeAlias = npt.NDArray[np.uint64]  # raw BAT entries as they stand in the file
States: TypeAlias = npt.NDArray[np.uint8]  # their lowest three bits

ENTRY_DTYPE = np.dtype("<u8")
PAGE_ENTRIES = 8192  # 64 KiB; regions are aligned to 1 MiB, so no page leaves its region
PAGE_SIZE = PAGE_ENTRIES * BAT_ENTRY_SIZE
MAX_CLEAN_PAGES = 128  # 8 MiB of cache
LOG_SECTOR_SIZE = 4096
_SECTOR_ENTRIES = LOG_SECTOR_SIZE // BAT_ENTRY_SIZE


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a virtual disk, bytes, and the BAT arithmetic that follows from them."""

    virtual_size: int
    block_size: int
    sector_size: int
    has_parent: bool

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks that one sector bitmap block describes."""
        return SECTORS_PER_BITMAP * self.sector_size // self.block_size

    @property
    def block_count(self) -> int:
        """Payload blocks of the disk, the last one perhaps reaching past its end."""
        return -(-self.virtual_size // self.block_size)

    @property
    def chunk_count(self) -> int:
        """Chunks of the disk, which is sector bitmap blocks in a differencing disk."""
        return -(-self.block_count // self.chunk_ratio)

    @property
    def entry_count(self) -> int:
        """BAT entries. Only a differencing disk has the bitmap entry after a last chunk that is not full."""
        if self.has_parent:
            return self.chunk_count * (self.chunk_ratio + 1)
        return self.block_count + max(0, self.block_count - 1) // self.chunk_ratio

    @property
    def sectors_per_block(self) -> int:
        """Logical sectors in a payload block: as many bits of its sector bitmap."""
        return self.block_size // self.sector_size

    def payload_index(self, block: int) -> int:
        """Return the index of the BAT entry of a payload block."""
        return block + block // self.chunk_ratio

    def bitmap_index(self, chunk: int) -> int:
        """Return the index of the BAT entry of the chunk's sector bitmap block."""
        return chunk * (self.chunk_ratio + 1) + self.chunk_ratio

    def bitmap_place(self, block: int) -> tuple[int, int]:
        """Return the chunk of a payload block, and the byte in the chunk's bitmap where the block's bits begin."""
        chunk, position = divmod(block, self.chunk_ratio)
        return chunk, position * self.sectors_per_block // 8


class Bat:
    """The entries of one BAT region, read by page and kept in a bounded cache; several threads may read.

    Pages that ``set_entry`` changed stay until ``release``, so that a writer may put them in the file when it likes.
    """

    def __init__(self, file: ReadableFile, geometry: Geometry, offset: int) -> None:
        self._file = file
        self.geometry = geometry
        self.offset = offset  # of the region in the file
        self._pages: OrderedDict[int, Entries] = OrderedDict()
        self._changed: dict[int, Entries] = {}
        self._lock = threading.Lock()

    def entry(self, index: int) -> int:
        """Return one entry."""
        return int(self._page(index // PAGE_ENTRIES)[index % PAGE_ENTRIES])

    def payload_entry(self, block: int) -> int:
        """Return the entry of a payload block."""
        return self.entry(self.geometry.payload_index(block))

    def bitmap_entry(self, chunk: int) -> int:
        """Return the entry of a chunk's sector bitmap block."""
        return self.entry(self.geometry.bitmap_index(chunk))

    def set_entry(self, index: int, entry: int) -> None:
        """Change an entry in memory only. The page stays there until ``release``."""
        number = index // PAGE_ENTRIES
        page = self._page(number)
        page[index % PAGE_ENTRIES] = entry
        with self._lock:
            self._changed[number] = page

    def release(self) -> None:
        """Forget which pages were changed: their entries stand in the file now, or may be read from it again."""
        with self._lock:
            self._changed.clear()

    def sector(self, index: int) -> tuple[int, bytes]:
        """Return the 4 KiB sector that holds an entry: its offset in the file, and its present content."""
        first = index - index % _SECTOR_ENTRIES
        position = first % PAGE_ENTRIES
        page = self._page(first // PAGE_ENTRIES)
        return self.offset + first * BAT_ENTRY_SIZE, page[position : position + _SECTOR_ENTRIES].tobytes()

    def get_range(self, start: int, end: int) -> Entries:
        """Return a copy of the raw entries with indices in [start, end), payload and bitmap ones alike."""
        first, last = start // PAGE_ENTRIES, max(start, end - 1) // PAGE_ENTRIES
        if last - first < 2:
            parts = [self._page(number) for number in range(first, last + 1)]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return joined[start - first * PAGE_ENTRIES : end - first * PAGE_ENTRIES].copy()
        entries = self._read(start, end)
        with self._lock:
            changed = [(number, page) for number, page in self._changed.items() if first <= number <= last]
        for number, page in changed:
            page_start = number * PAGE_ENTRIES
            low, high = max(start, page_start), min(end, page_start + PAGE_ENTRIES)
            entries[low - start : high - start] = page[low - page_start : high - page_start]
        return entries

    def payload_entries(self, first: int, last: int) -> Entries:
        """Return the raw entries of the payload blocks in [first, last), bitmap entries left out."""
        ratio = self.geometry.chunk_ratio
        start = self.geometry.payload_index(first)
        entries = self.get_range(start, self.geometry.payload_index(last - 1) + 1 if last > first else start)
        lead = ratio - first % ratio  # payload entries before the first bitmap entry
        if len(entries) <= lead:
            return entries
        keep = np.ones(len(entries), dtype=bool)
        keep[lead :: ratio + 1] = False
        return entries[keep]

    def payload_states(self, first: int, last: int) -> States:
        """Return the states of the payload blocks in [first, last), 0 to 7, one byte each."""
        ratio = self.geometry.chunk_ratio
        start = self.geometry.payload_index(first)
        entries = self.get_range(start, self.geometry.payload_index(last - 1) + 1 if last > first else start)
        # The lowest byte of each entry is all that is looked at: an eighth of the memory traffic.
        states: States = entries.view(np.uint8)[::BAT_ENTRY_SIZE] & np.uint8(BAT_STATE_MASK)
        lead = ratio - first % ratio
        if len(states) > lead:
            states = np.delete(states, np.s_[lead :: ratio + 1])
        return states

    def _page(self, number: int) -> Entries:
        with self._lock:
            page = self._changed.get(number)
            if page is None:
                page = self._pages.get(number)
                if page is not None:
                    self._pages.move_to_end(number)
        if page is not None:
            return page
        # Read outside the lock: other threads go on. Two that miss the same page keep the first one's copy.
        fresh = self._read(number * PAGE_ENTRIES, (number + 1) * PAGE_ENTRIES)
        with self._lock:
            page = self._changed.get(number)
            if page is None:
                page = self._pages.setdefault(number, fresh)
                while len(self._pages) > MAX_CLEAN_PAGES:
                    self._pages.popitem(last=False)
        return page

    def _read(self, start: int, end: int) -> Entries:
        entries: Entries = np.empty(end - start, dtype=ENTRY_DTYPE)
        offset = self.offset + start * BAT_ENTRY_SIZE
        filled = self._file.pread_into(offset, entries.data.cast("B"))
        if filled != entries.nbytes:
            raise CorruptDiskError(
                f"the file ends inside the block allocation table, {entries.nbytes - filled} bytes short",
                path=str(self._file.path),
                offset=offset + filled,
            )
        return entries
