"""The allocation table of a FAT volume: chains of clusters, free clusters, the free-space sector and the dirty bit.

Read through a few windows: an EFI system partition can be gigabytes large and its table megabytes, of which a
conversion needs some sectors. Every copy of the table is written, sector by sector, only where it changes.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from conversion.device import WritableDevice
from conversion.errors import DamagedError, NoSpaceError
from conversion.filesystems.fat_boot import Geometry

Run: TypeAlias = tuple[int, int]  # first cluster, number of clusters that follow each other

MOST_RUNS: Final = 65536  # fragments of one file; 32 MiB in single 512-byte clusters
# Whole entries of 12, 16 and 32 bits, whole sectors of 512 to 4096 bytes, and all of a FAT12 table.
_WINDOW_BYTES: Final = 12288
_WINDOWS: Final = 32

_FSINFO: Final = struct.Struct("<I480sIII12sI")
assert _FSINFO.size == 512
_FSINFO_SIGNATURES: Final = (0x41615252, 0x61417272, 0xAA550000)
_FSINFO_FREE_AT: Final = 488
_UNKNOWN: Final = 0xFFFFFFFF


class AllocationTable:
    """The table of the volume on ``device``. Nobody else may write to it while this is used."""

    def __init__(self, device: WritableDevice, geometry: Geometry) -> None:
        self._device = device
        self._geometry = geometry
        self._bits = geometry.bits
        self._mask = (1 << self._bits) - 1 if self._bits < 32 else 0x0FFFFFFF
        self._per_window = _WINDOW_BYTES * 8 // self._bits
        self._windows: OrderedDict[int, bytearray] = OrderedDict()

    @property
    def end_mark(self) -> int:
        """What the entry of a chain's last cluster is set to."""
        return self._mask

    def is_clean(self) -> bool:
        """Return whether the volume says that it was put away properly. FAT12 cannot say, so always is."""
        return self._bits == 12 or bool(self._entry(1) & self._clean_bit())

    def set_clean(self, clean: bool) -> None:
        """Write the dirty bit, where it differs and FAT has one."""
        if self._bits != 12 and self.is_clean() != clean:
            entry = self._entry(1)
            self.store({1: entry | self._clean_bit() if clean else entry & ~self._clean_bit()})

    def runs(self, first: int, wanted: int | None = None) -> list[Run]:
        """Return the chain from cluster ``first``: ``wanted`` clusters of it, or all.

        Raises DamagedError where it leaves the volume, meets a free or bad cluster, ends early or returns to itself.
        """
        geometry = self._geometry
        if wanted is not None and wanted > geometry.cluster_count:
            raise self._damaged(f"a chain of {wanted} clusters is longer than the volume's {geometry.cluster_count}")
        runs: list[Run] = []
        cluster, total, last = first, 0, self._mask - 7
        while wanted is None or total < wanted:
            if not 2 <= cluster < geometry.end_cluster:
                what = "ends early" if cluster >= last and runs else f"leads to cluster {cluster:#x}"
                raise self._damaged(f"the chain from cluster {first} {what}")
            count, following = self._run_at(cluster)
            total += count
            if runs and sum(runs[-1]) == cluster:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((cluster, count))
            if total > geometry.cluster_count or len(runs) > MOST_RUNS:
                raise self._damaged(f"the chain from cluster {first} returns to itself or is in too many pieces")
            if wanted is None and following >= last:
                break
            cluster = following
        if wanted is not None and total > wanted:
            runs[-1] = (runs[-1][0], runs[-1][1] - (total - wanted))
        self._check_apart(runs, first)
        return runs

    def find_free(self, count: int, start: int) -> list[int]:
        """Return ``count`` free clusters, the first found from cluster ``start`` on, then from the beginning.

        Raises NoSpaceError where there are fewer.
        """
        found: list[int] = []
        for low, high in self._search_ranges(start):
            if len(found) >= count:
                break
            entries = self._entries(low // self._per_window)
            base = low - low % self._per_window
            free = np.flatnonzero(entries[low - base : high - base] == 0)[: count - len(found)]
            found.extend((free + low).tolist())
        if len(found) < count:
            raise NoSpaceError(
                f"{count} clusters of {self._geometry.cluster_bytes} bytes are needed, {len(found)} are free",
                subject="FAT volume",
                hint="free space on this volume in the guest",
            )
        return found

    def store(self, entries: Mapping[int, int]) -> None:
        """Set the entries of clusters, in every copy of the table."""
        by_window: dict[int, list[int]] = {}
        for cluster in sorted(entries):
            by_window.setdefault(cluster // self._per_window, []).append(cluster)
        for copy in range(len(self._geometry.tables)):
            for window, clusters in by_window.items():
                raw = self._window(window)
                touched: set[int] = set()
                for cluster in clusters:
                    touched.update(self._put(raw, cluster % self._per_window, entries[cluster]))
                self._write_sectors(copy, window, raw, sorted(touched))

    def chain(self, clusters: Iterable[int]) -> dict[int, int]:
        """Return the entries that make ``clusters`` a chain, in this order."""
        chained = list(clusters)
        return {**dict(pairwise(chained)), **dict.fromkeys(chained[-1:], self.end_mark)}

    def _clean_bit(self) -> int:
        return 0x8000 if self._bits == 16 else 0x08000000

    def _entry(self, cluster: int) -> int:
        return int(self._entries(cluster // self._per_window)[cluster % self._per_window])

    def _run_at(self, cluster: int) -> tuple[int, int]:
        """Return how many clusters follow each other from ``cluster`` within its window, and what comes then."""
        within = cluster % self._per_window
        entries = self._entries(cluster // self._per_window)[within : within + self._geometry.end_cluster - cluster]
        breaks = np.flatnonzero(entries != np.arange(cluster + 1, cluster + 1 + len(entries)))
        count = int(breaks[0]) + 1 if len(breaks) else len(entries)
        return count, int(entries[count - 1])

    def _search_ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of clusters, each within one window, from ``start`` to the end, then those before it."""
        end = self._geometry.end_cluster
        start = start if 2 <= start < end else 2
        for low, high in ((start, end), (2, start)):
            while low < high:
                stop = min(high, low - low % self._per_window + self._per_window)
                yield low, stop
                low = stop

    def _entries(self, window: int) -> npt.NDArray[np.int64]:
        raw = bytes(self._window(window))
        if self._bits == 16:
            return np.frombuffer(raw, "<u2", len(raw) // 2).astype(np.int64)
        if self._bits == 32:
            return np.frombuffer(raw, "<u4", len(raw) // 4).astype(np.int64) & self._mask
        triples = np.frombuffer(raw + bytes(-len(raw) % 3), np.uint8).astype(np.int64).reshape(-1, 3)
        even = triples[:, 0] | (triples[:, 1] & 0x0F) << 8
        odd = triples[:, 1] >> 4 | triples[:, 2] << 4
        return np.stack((even, odd), axis=1).ravel()

    def _window(self, window: int) -> bytearray:
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        offset = window * _WINDOW_BYTES
        length = min(_WINDOW_BYTES, self._geometry.table_bytes - offset)
        raw = bytearray(self._device.read_at(self._geometry.tables[0] + offset, length))
        self._windows[window] = raw
        if len(self._windows) > _WINDOWS:
            self._windows.popitem(last=False)
        return raw

    def _put(self, raw: bytearray, index: int, value: int) -> tuple[int, int]:
        """Set an entry in a window; return the sectors of the window that its first and last byte are in."""
        at, value = index * self._bits // 8, value & self._mask
        if self._bits == 12:
            pair = int.from_bytes(raw[at : at + 2], "little")
            pair = (pair & 0x000F | value << 4) if index % 2 else (pair & 0xF000 | value)
            raw[at : at + 2] = pair.to_bytes(2, "little")
        elif self._bits == 16:
            raw[at : at + 2] = value.to_bytes(2, "little")
        else:  # the upper four bits are not ours
            kept = int.from_bytes(raw[at : at + 4], "little") & ~self._mask
            raw[at : at + 4] = (kept | value).to_bytes(4, "little")
        sector = self._geometry.sector_bytes
        return at // sector, (at + (3 if self._bits == 32 else 1)) // sector

    def _write_sectors(self, copy: int, window: int, raw: bytearray, sectors: list[int]) -> None:
        sector = self._geometry.sector_bytes
        base = self._geometry.tables[copy] + window * _WINDOW_BYTES
        while sectors:
            length = 1
            while length < len(sectors) and sectors[length] == sectors[0] + length:
                length += 1
            start = sectors[0] * sector
            self._device.write_at(base + start, bytes(raw[start : start + length * sector]))
            sectors = sectors[length:]

    def _check_apart(self, runs: list[Run], first: int) -> None:
        ordered = sorted(runs)
        for (start, count), (following, _) in pairwise(ordered):
            if start + count > following:
                raise self._damaged(f"the chain from cluster {first} returns to itself at cluster {following}")

    @staticmethod
    def _damaged(message: str) -> DamagedError:
        return DamagedError(
            message, subject="FAT volume", hint="check the volume with chkdsk or fsck.vfat in the guest, then try again"
        )


class FreeSpace:
    """What FAT32's FSInfo sector says: advice on how many clusters are free and where to look for one."""

    def __init__(self, device: WritableDevice, geometry: Geometry) -> None:
        self._device = device
        self._geometry = geometry
        self._present = False
        self.count: int | None = None  # free clusters, None where not known
        self.start = 2  # where to look first
        if geometry.fsinfo_offset:
            lead, _, middle, free, following, _, trail = _FSINFO.unpack(
                device.read_at(geometry.fsinfo_offset, _FSINFO.size)
            )
            if (lead, middle, trail) == _FSINFO_SIGNATURES:
                self._present = True
                self.count = free if free <= geometry.cluster_count else None
                self.start = following if 2 <= following < geometry.end_cluster else 2

    def note(self, *, taken: int, freed: int, last: int | None) -> None:
        """Write down that clusters were taken and freed, ``last`` being the one taken last."""
        if last is not None:
            self.start = last
        if self.count is not None:
            left = self.count - taken + freed
            self.count = left if 0 <= left <= self._geometry.cluster_count else None
        if self._present:
            free = _UNKNOWN if self.count is None else self.count
            self._device.write_at(self._geometry.fsinfo_offset + _FSINFO_FREE_AT, struct.pack("<II", free, self.start))
