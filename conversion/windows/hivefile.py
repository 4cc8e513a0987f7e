"""Hives as files of the guest: read whole with their logs, or, where one is large, only the pages that are needed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import DamagedError, UnsupportedError
from conversion.filesystems.filesystem import FileSystem
from conversion.windows.hivelog import LARGEST_LOG_BYTES, Recovery, recover

LARGEST_SYSTEM_BYTES: Final = 256 << 20
PAGE_BYTES: Final = 64 << 10
MOST_PAGES: Final = 512  # 32 MiB kept, after which the oldest goes


class HiveFile:
    """The bytes of a file by its extents on ``device``, as ``Hive`` takes them (SOFTWARE: 60 to 200 MiB)."""

    def __init__(self, device: BlockDevice, extents: Sequence[tuple[int, int]]) -> None:
        self._device = device
        self._extents = tuple(extents)
        self._begins = [0, *accumulate(length for _, length in self._extents)]
        self._pages: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Return the file's length, bytes."""
        return self._begins[-1]

    def __getitem__(self, part: slice) -> bytes:
        """Return a part of the file."""
        start, end, _ = part.indices(len(self))
        if start >= end:
            return b""
        first, last = start // PAGE_BYTES, (end - 1) // PAGE_BYTES
        content = b"".join(self._page(number) for number in range(first, last + 1))
        return content[start - first * PAGE_BYTES : end - first * PAGE_BYTES]

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            while len(self._pages) >= MOST_PAGES:
                del self._pages[next(iter(self._pages))]
            start = number * PAGE_BYTES
            page = self._pages[number] = self._read(start, min(start + PAGE_BYTES, len(self)))
        return page

    def _read(self, start: int, end: int) -> bytes:
        parts: list[bytes] = []
        while start < end:
            index = bisect_right(self._begins, start) - 1
            offset, length = self._extents[index]
            within = start - self._begins[index]
            taken = min(length - within, end - start)
            parts.append(self._device.read_at(offset + within, taken))
            start += taken
        return b"".join(parts)


def read_recovered(filesystem: FileSystem, path: str) -> Recovery | None:
    """Return the hive at ``path`` with the logs beside it applied, None where there is no such file.

    Raises DamagedError where it is damaged, or dirty without a log that fits.
    """
    content = filesystem.read_file(path, largest_bytes=LARGEST_SYSTEM_BYTES)
    if content is None:
        return None
    return recover(content, read_logs(filesystem, path), subject=path)


def read_logs(filesystem: FileSystem, path: str) -> list[bytes]:
    """Return the logs beside a hive. A log that cannot be read is left out: it may not be needed."""
    logs: list[bytes] = []
    for suffix in (".LOG1", ".LOG2", ".LOG"):
        with suppress(DamagedError, UnsupportedError):
            log = filesystem.read_file(path + suffix, largest_bytes=LARGEST_LOG_BYTES)
            if log:
                logs.append(log)
    return logs
