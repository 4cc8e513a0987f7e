"""Checking a BAT: every entry's state and place, and that no two things claim one place in the file.

Whole arrays, a window of entries at a time. Who claims which MiB of the file is one byte for each MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vhdx.bat import Bat, Entries
from vhdx.replay import ReadableFile
from vhdx.structures import (
    BAT_ENTRY_SIZE,
    BAT_OFFSET_SHIFT,
    BAT_RESERVED_MASK,
    BAT_STATE_MASK,
    MIB,
    SECTOR_BITMAP_BLOCK_SIZE,
    BitmapState,
    PayloadState,
)

WINDOW_BLOCKS = 1 << 18
CLAIM_SLOTS = 1 << 20  # MiB of file that one numpy call claims
SHOWN = 64  # offenders of one window that are named; the others are counted

Report: TypeAlias = Callable[[str, Iterable[tuple[str, int]], int], None]
"""Takes a rule, (message, offset) pairs, and how many offenders there are."""


class Claims:
    """Which MiB of the file belongs to whom: one byte each, an index into names; 0 is nobody."""

    def __init__(self, size_mib: int) -> None:
        self._owner = np.zeros(size_mib, dtype=np.uint8)
        self._names = ["nothing", "a payload block", "a sector bitmap"]
        self.size_mib = size_mib

    PAYLOAD = 1
    BITMAP = 2

    def claim(self, name: str, start: int, end: int) -> None:
        """Give bytes [start, end) of the file to something that has only one place."""
        if len(self._names) < 256:  # a table of more regions than that shares the last name
            self._names.append(name)
        self._owner[start // MIB : -(-end // MIB)] = len(self._names) - 1

    def claim_all(self, starts_mib: npt.NDArray[np.int64], length_mib: int, owner: int) -> Iterator[tuple[int, str]]:
        """Give ``length_mib`` from each start to ``owner``; yield the index of each that meets another, and whom."""
        step = max(1, CLAIM_SLOTS // length_mib)
        order = np.argsort(starts_mib, kind="stable")
        ordered = starts_mib[order]
        own_name = self._names[owner]
        told = np.zeros(len(ordered), dtype=bool)
        told[1:] = np.diff(ordered) < length_mib
        for index in np.flatnonzero(told).tolist():
            yield int(order[index]), own_name
        for first in range(0, len(ordered), step):
            slots = (ordered[first : first + step, None] + np.arange(length_mib)).ravel()
            owners = self._owner[slots]
            met = np.flatnonzero(owners)
            positions, at = np.unique(met // length_mib, return_index=True)
            for position, place in zip((positions + first).tolist(), met[at].tolist(), strict=True):
                if not told[position]:
                    yield int(order[position]), self._names[int(owners[place])]
            self._owner[slots] = owner

    def unclaimed(self) -> int:
        """Return how many MiB of the file belong to nobody."""
        return self.size_mib - int(np.count_nonzero(self._owner))


def check_bat(bat: Bat, view: ReadableFile, claims: Claims, report: Report, warn: Report) -> None:
    """Check every entry: ``report`` takes errors. Raises CorruptDiskError where the table itself cannot be read."""
    checker = _Checker(bat, view.size(), claims, report, warn)
    checker.check_bitmaps()
    for first in range(0, bat.geometry.block_count, WINDOW_BLOCKS):
        checker.check_payload(first, min(first + WINDOW_BLOCKS, bat.geometry.block_count))


class _Checker:
    def __init__(self, bat: Bat, file_size: int, claims: Claims, report: Report, warn: Report) -> None:
        self._bat = bat
        self._geometry = bat.geometry
        self._file_size = file_size
        self._claims = claims
        self._report = report
        self._warn = warn
        self._bitmap_present = np.zeros(bat.geometry.chunk_count, dtype=bool)

    def check_bitmaps(self) -> None:
        """Check the entries of sector bitmap blocks, and remember which are present."""
        geometry, has_parent = self._geometry, self._geometry.has_parent
        indices = np.arange(geometry.chunk_count, dtype=np.int64) * (geometry.chunk_ratio + 1) + geometry.chunk_ratio
        indices = indices[indices < geometry.entry_count]
        entries = np.fromiter((self._bat.entry(int(index)) for index in indices), dtype=np.uint64, count=len(indices))
        states = (entries & np.uint64(BAT_STATE_MASK)).astype(np.uint8)
        allowed = [BitmapState.NOT_PRESENT, BitmapState.PRESENT] if has_parent else [BitmapState.NOT_PRESENT]
        chunks = np.flatnonzero(~np.isin(states, allowed))
        self._tell(
            "bitmap-state",
            chunks,
            self._bitmap_place,
            lambda chunk: f"the sector bitmap of chunk {chunk} has state {states[chunk]}, which this disk cannot have",
        )
        present = np.flatnonzero(states == BitmapState.PRESENT) if has_parent else np.empty(0, dtype=np.int64)
        self._bitmap_present[present] = True
        self._check_reserved(entries, np.arange(len(entries)), self._bitmap_place, "sector bitmap of chunk")
        self._check_places(
            entries, present, SECTOR_BITMAP_BLOCK_SIZE, Claims.BITMAP, self._bitmap_place, "sector bitmap of chunk"
        )

    def check_payload(self, first: int, last: int) -> None:
        """Check the entries of payload blocks [first, last)."""
        entries = self._bat.payload_entries(first, last)
        if not entries.any():
            return
        states = (entries & np.uint64(BAT_STATE_MASK)).astype(np.uint8)
        bad = (states == 4) | (states == 5)
        partial = states == PayloadState.PARTIALLY_PRESENT
        if not self._geometry.has_parent:
            bad |= partial

        def place(position: int) -> int:
            return self._bat.offset + self._geometry.payload_index(first + position) * BAT_ENTRY_SIZE

        self._tell(
            "block-state",
            np.flatnonzero(bad),
            place,
            lambda position: (
                f"payload block {first + position} has state {states[position]}, which this disk cannot have"
            ),
        )
        if self._geometry.has_parent:
            positions = np.flatnonzero(partial)
            lacking = positions[~self._bitmap_present[(positions + first) // self._geometry.chunk_ratio]]
            self._tell(
                "bitmap-missing",
                lacking,
                place,
                lambda position: (
                    f"payload block {first + position} is partially present, and its chunk has no sector bitmap"
                ),
            )
        self._check_reserved(entries, np.arange(first, last), place, "payload block")
        placed = np.flatnonzero((states == PayloadState.ZERO) & (entries >> np.uint64(BAT_OFFSET_SHIFT) != 0))
        if len(placed):
            messages = (
                (f"payload block {first + position} is zero and names a place: Hyper-V refuses it", place(position))
                for position in placed[:SHOWN].tolist()
            )
            self._warn("zero-placed", messages, len(placed))
        present = np.flatnonzero((states == PayloadState.FULLY_PRESENT) | partial)
        if last == self._geometry.block_count and self._last_is_cut(int(entries[-1])) and len(entries) - 1 in present:
            message = (
                f"the file ends inside payload block {last - 1}, behind the last byte of the disk",
                place(len(entries) - 1),
            )
            self._warn("block-cut", [message], 1)
            rest_mib = -(-self._file_size // MIB) - (int(entries[-1]) >> BAT_OFFSET_SHIFT)
            self._claim(entries, present[-1:], rest_mib, Claims.PAYLOAD, place, "payload block", first)
            present = present[:-1]
        self._check_places(entries, present, self._geometry.block_size, Claims.PAYLOAD, place, "payload block", first)

    def _last_is_cut(self, entry: int) -> bool:
        """Whether the file ends inside the disk's last block, which stands where ``entry`` says, but holds its bytes.

        QEMU makes fixed disks so.
        """
        geometry = self._geometry
        start = entry >> BAT_OFFSET_SHIFT << BAT_OFFSET_SHIFT
        used = geometry.virtual_size - (geometry.block_count - 1) * geometry.block_size
        return start >= MIB and start + used <= self._file_size < start + geometry.block_size

    def _check_reserved(
        self, entries: Entries, numbers: npt.NDArray[np.int64], place: Callable[[int], int], name: str
    ) -> None:
        found = np.flatnonzero(entries & np.uint64(BAT_RESERVED_MASK))
        self._tell(
            "bat-reserved",
            found,
            place,
            lambda position: f"the entry of {name} {numbers[position]} has reserved bits set",
        )

    def _check_places(
        self,
        entries: Entries,
        present: npt.NDArray[np.int64],
        length: int,
        owner: int,
        place: Callable[[int], int],
        name: str,
        first: int = 0,
    ) -> None:
        """Check where the present blocks stand: after the headers, inside the file, and nobody else's place."""
        starts = (entries[present] >> np.uint64(BAT_OFFSET_SHIFT)).astype(np.int64)
        length_mib = length // MIB
        low = starts < 1
        self._tell(
            "block-offset",
            present[low],
            place,
            lambda position: f"{name} {first + position} is present and has no place in the file",
        )
        past = starts + length_mib > self._file_size // MIB
        self._tell(
            "block-past-end",
            present[past],
            place,
            lambda position: f"{name} {first + position} reaches past the end of the file",
        )
        inside = ~low & (starts + length_mib <= self._claims.size_mib)
        self._claim(entries, present[inside], length_mib, owner, place, name, first)

    def _claim(
        self,
        entries: Entries,
        present: npt.NDArray[np.int64],
        length_mib: int,
        owner: int,
        place: Callable[[int], int],
        name: str,
        first: int,
    ) -> None:
        """Give the present blocks their places, and report those that somebody has already."""
        starts = (entries[present] >> np.uint64(BAT_OFFSET_SHIFT)).astype(np.int64)
        counted = 0
        named: list[tuple[str, int]] = []
        for index, other in self._claims.claim_all(starts, length_mib, owner):
            counted += 1
            if len(named) < SHOWN:
                position = int(present[index])
                named.append((f"{name} {first + position} overlaps {other}", place(position)))
        if counted:
            self._report("overlap", named, counted)

    def _tell(
        self,
        rule: str,
        positions: npt.NDArray[np.int64],
        place: Callable[[int], int],
        message: Callable[[int], str],
    ) -> None:
        if len(positions):
            shown = [(message(position), place(position)) for position in positions[:SHOWN].tolist()]
            self._report(rule, shown, len(positions))

    def _bitmap_place(self, chunk: int) -> int:
        return self._bat.offset + self._geometry.bitmap_index(chunk) * BAT_ENTRY_SIZE
