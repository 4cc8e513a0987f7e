"""A block device with its changes kept apart: reads fall through to the disk below, which is never written.

A conversion touches a few MiB, so the changes stay in memory, by sector. Each write is remembered with the reason that
was given for it: the plan that a person reads is made from that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import ConversionError

LARGEST_CHANGES_BYTES: Final = 64 << 20  # far above any conversion; a runaway writer ends here


@dataclass(frozen=True, slots=True)
class Change:
    """What was written for one reason. ``extents`` are (offset, length), bytes, sorted, apart from each other."""

    what: str  # the thing that changes: "master boot record", "/boot/BCD on partition 1"
    why: str
    extents: tuple[tuple[int, int], ...]

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        extents = [{"offset": offset, "length": length} for offset, length in self.extents]
        return {"what": self.what, "why": self.why, "extents": extents}


class Overlay:
    """A writable device over ``below``. What is written lives here; ``below`` must not change meanwhile."""

    def __init__(self, below: BlockDevice) -> None:
        self._below = below
        self._sector = below.sector_size
        self._written: dict[int, bytes] = {}  # sector number → its content
        self._before: dict[int, bytes] = {}  # of the same sectors, what stands below: a plan outlives the open disk
        self._reason_of: dict[int, int] = {}  # sector number → index of the reason for its last write
        self._reasons: list[tuple[str, str, str]] = [("", "the disk", "")]  # component, what, why
        self._reason = 0
        self._component = ""

    @property
    def below(self) -> BlockDevice:
        """The disk that stays as it is."""
        return self._below

    @property
    def size(self) -> int:
        """Length, bytes."""
        return self._below.size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._sector

    @contextmanager
    def because(self, what: str, why: str) -> Iterator[None]:
        """Note the reason for the writes made inside."""
        before = self._reason
        reason = (self._component, what, why)
        if reason in self._reasons:
            self._reason = self._reasons.index(reason)
        else:
            self._reasons.append(reason)
            self._reason = len(self._reasons) - 1
        try:
            yield
        finally:
            self._reason = before

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Note that the writes made inside are of that component: ``written`` tells them apart from others."""
        before, self._component = self._component, name
        try:
            with self.because(name, ""):
                yield
        finally:
            self._component = before

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, as written here or else below."""
        self._check(offset, length)
        first, end = offset // self._sector, -(-(offset + length) // self._sector)
        if len(self._written) < end - first:
            touched = [number for number in self._written if first <= number < end]
        else:
            touched = [number for number in range(first, end) if number in self._written]
        if not touched:
            return self._below.read_at(offset, length)
        last = min(end * self._sector, self.size)
        content = bytearray(self._below.read_at(first * self._sector, last - first * self._sector))
        for number in touched:
            at = (number - first) * self._sector
            content[at : at + self._sector] = self._written[number]
        start = offset - first * self._sector
        return bytes(content[start : start + length])

    def write_at(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``. Raises ConversionError beyond ``LARGEST_CHANGES_BYTES`` in all."""
        self._check(offset, len(data))
        if not data:
            return
        self._remember(offset // self._sector, (offset + len(data) - 1) // self._sector + 1)
        done = 0
        while done < len(data):
            number, within = divmod(offset + done, self._sector)
            piece = data[done : done + self._sector - within]
            before = self._written.get(number, self._before[number])
            self._written[number] = before[:within] + piece + before[within + len(piece) :]
            self._reason_of[number] = self._reason
            done = (number + 1) * self._sector - offset
        if len(self._written) * self._sector > LARGEST_CHANGES_BYTES:
            raise ConversionError(f"a conversion would change more than {LARGEST_CHANGES_BYTES >> 20} MiB of the disk")

    def flush(self) -> None:
        """Do nothing: what is written here is kept in memory."""

    def written(self, component: str | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, data) of what differs from the disk below, ascending, neighbours joined.

        With ``component`` only what it wrote last.
        """
        start, parts = 0, list[bytes]()
        for number in self._changed():
            if component is not None and self._reasons[self._reason_of[number]][0] != component:
                continue
            if parts and number * self._sector != start + len(parts) * self._sector:
                yield start, b"".join(parts)
                parts = []
            if not parts:
                start = number * self._sector
            parts.append(self._written[number])
        if parts:
            yield start, b"".join(parts)

    def changes(self) -> tuple[Change, ...]:
        """Return what differs from the disk below, by the reason of the last write, in the order of the reasons."""
        extents: dict[int, list[tuple[int, int]]] = {}
        for number in self._changed():
            runs = extents.setdefault(self._reason_of[number], [])
            offset, length = number * self._sector, len(self._written[number])
            if runs and sum(runs[-1]) == offset:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((offset, length))
        return tuple(Change(*self._reasons[index][1:], tuple(extents[index])) for index in sorted(extents))

    def _remember(self, first: int, end: int) -> None:
        """Keep what stands below in the sectors [first, end), those that are not kept yet."""
        if all(number in self._before for number in range(first, end)):
            return
        start = first * self._sector
        content = self._below.read_at(start, min(end * self._sector, self.size) - start)
        for number in range(first, end):
            at = (number - first) * self._sector
            self._before.setdefault(number, content[at : at + self._sector])

    def before(self, offset: int, length: int) -> bytes:
        """Return what stands below in whole sectors that were written to. Raises KeyError for others."""
        numbers = range(offset // self._sector, (offset + length) // self._sector)
        return b"".join(self._before[number] for number in numbers)

    def _changed(self) -> list[int]:
        return [number for number in sorted(self._written) if self._written[number] != self._before[number]]

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} reach outside a device of {self.size} bytes")
