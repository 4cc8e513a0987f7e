"""Blocks that were read lately: in memory, and beyond that in a nameless file; both bounded, the oldest go first."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import xxhash

from replica.block import BLOCK_BYTES

MEMORY_BYTES: Final = 256 << 20


class _Slot(NamedTuple):
    place: int
    checksum: int


class BlockCache:
    """Blocks by key. Threads may use it at once.

    What leaves memory goes to the file, and what leaves the file is forgotten. The file has no name, so that it ends
    with the process; a block read back from it is checked, and one that went bad there is taken for forgotten.
    """

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = 0, folder: Path | None = None) -> None:
        """Hold at most so many bytes of blocks in memory and in a file in ``folder`` (the system's own by default)."""
        self._most_blocks = max(1, memory_bytes // BLOCK_BYTES)
        self._most_slots = disk_bytes // BLOCK_BYTES
        self._folder = folder
        self._blocks: OrderedDict[int, Any] = OrderedDict()
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._free: list[int] = []
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def get(self, key: int) -> Any | None:
        """Return the block, a buffer of 65,536 bytes, or None."""
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
                return block
            return self._take_back(key) if key in self._slots else None

    def holds(self, key: int) -> bool:
        """Whether the block is here; it does not become a younger one by that."""
        with self._lock:
            return key in self._blocks or key in self._slots

    def put(self, key: int, block: Any) -> None:
        """Keep the block, a buffer that nobody writes to any more."""
        with self._lock:
            self._put(key, block)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._blocks.clear()
            self._slots.clear()
            if self._file is not None:
                self._file.close()

    def _put(self, key: int, block: Any) -> None:
        self._blocks[key] = block
        self._blocks.move_to_end(key)
        while len(self._blocks) > self._most_blocks:
            oldest, content = self._blocks.popitem(last=False)
            if self._most_slots:
                self._spill(oldest, content)

    def _spill(self, key: int, block: Any) -> None:
        if len(self._slots) < self._most_slots:
            place = self._free.pop() if self._free else len(self._slots)
        else:
            _, (place, _) = self._slots.popitem(last=False)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - as long as we live
            self._file.seek(place * BLOCK_BYTES)
            view = memoryview(block).cast("B")
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError:  # a full disk only makes the cache smaller
            self._free.append(place)
            self._most_slots = len(self._slots)
            return
        self._slots[key] = _Slot(place, xxhash.xxh3_64_intdigest(block))

    def _take_back(self, key: int) -> bytes | None:
        """Move a block from the file into memory: a block is in one of them only, and takes room once."""
        assert self._file is not None
        slot = self._slots.pop(key)
        self._free.append(slot.place)
        try:
            self._file.seek(slot.place * BLOCK_BYTES)
            block = self._file.read(BLOCK_BYTES)
        except OSError:
            return None
        if len(block) != BLOCK_BYTES or xxhash.xxh3_64_intdigest(block) != slot.checksum:
            return None
        self._put(key, block)
        return block
