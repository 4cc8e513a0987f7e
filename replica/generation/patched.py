"""A disk with other bytes laid over some of its ranges: a recovery point as it starts as the other generation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from conversion.errors import DamagedError, RefusedError
from conversion.manifest import Manifest
from replica.model import Machine
from replica.nbd.service import read_parts
from vhdx.disk import Disk, Extents, ReadableBuffer, WritableBuffer
from vhdx.errors import ReadOnlyError
from vhdx.extents import clipped, merged
from vhdx.raw import check_range


class PatchedDisk:
    """A ``vhdx.disk.Disk`` for reading: ``below``, and over it ``ranges`` of (offset, bytes). Owns ``below``."""

    read_only = True

    def __init__(self, below: Disk, ranges: Iterable[tuple[int, bytes]]) -> None:
        """Lay the ranges over ``below``. Raises ValueError where they overlap, OutOfRangeError beyond the disk."""
        kept = sorted((offset, bytes(content)) for offset, content in ranges if content)
        for offset, content in kept:
            check_range(below.path, below.size, offset, len(content))
        if any(left + len(content) > right for (left, content), (right, _) in pairwise(kept)):
            raise ValueError("ranges overlap")
        self._below = below
        self._starts = [offset for offset, _ in kept]
        self._contents = [memoryview(content) for _, content in kept]
        bounds = [(offset, offset + len(content)) for offset, content in kept]
        self._extents = merged([np.array(bounds, np.int64).reshape(-1, 2)])
        self.path: Path = below.path
        self.format = below.format

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._below.size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._below.sector_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        return b"".join(self.read_parts(offset, length))

    def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``."""
        view = memoryview(buffer).cast("B")
        check_range(self.path, self.size, offset, len(view))
        self._below.read_into(offset, view)
        for start, content in self._over(offset, offset + len(view)):
            view[start - offset : start - offset + len(content)] = content

    def read_parts(self, offset: int, length: int) -> Sequence[memoryview]:
        """Return the bytes of a range in pieces, without copying them where ``below`` can do that."""
        check_range(self.path, self.size, offset, length)
        parts: list[memoryview] = []
        position = offset
        for start, content in self._over(offset, offset + length):
            if position < start:
                parts += read_parts(self._below, position, start - position)
            parts.append(content)
            position = start + len(content)
        if position < offset + length:
            parts += read_parts(self._below, position, offset + length - position)
        return parts

    def allocated(self, start: int = 0, end: int | None = None) -> Iterator[Extents]:
        """Yield the extents that may hold data, as ``Disk`` says: those below, and all ranges."""
        end = self.size if end is None else min(end, self.size)
        position = start
        for extents in self._below.allocated(start, end):
            stop = int(extents[-1, 1])
            yield merged([extents, clipped(self._extents, position, stop)])
            position = stop
        rest = clipped(self._extents, position, end) if position < end else self._extents[:0]
        if len(rest):
            yield rest

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Refuse: it is for reading."""
        raise ReadOnlyError("a recovery point is not written to", path=str(self.path))

    def trim(self, offset: int, length: int) -> None:
        """Refuse: it is for reading."""
        raise ReadOnlyError("a recovery point is not written to", path=str(self.path))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the disk below. Safe to repeat."""
        self._below.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _over(self, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) of the ranges' parts in [start, end), ascending."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while index < len(self._starts) and self._starts[index] < end:
            first, content = self._starts[index], self._contents[index]
            low, high = max(start, first), min(end, first + len(content))
            if low < high:
                yield low, content[low - first : high - first]
            index += 1


@dataclass(frozen=True, slots=True)
class Conversion:
    """How the disks of a machine of Generation 2 start as Generation 1: the OS disk is ``disk``, by its number.

    None of both where nothing has to be converted: the machine starts from a BIOS as it is.
    """

    disk: int | None = None
    manifest: Manifest | None = None

    def applied(self, number: int, below: Disk) -> Disk:
        """Return the disk of that number as it is to be seen. Raises DamagedError where the manifest is another's."""
        if self.manifest is None or number != self.disk:
            return below
        return patched(below, self.manifest)


def patched(below: Disk, manifest: Manifest) -> PatchedDisk:
    """Return ``below`` with what the conversion wrote over it. Raises DamagedError where it is of another disk."""
    if (manifest.size, manifest.sector_size) != (below.size, below.sector_size):
        raise DamagedError(
            f"the conversion manifest is of a disk of {manifest.size} bytes, and this one has {below.size}",
            subject=str(below.path),
        )
    ranges = [(one.offset, one.after) for component in manifest.components for one in component.ranges]
    try:
        return PatchedDisk(below, ranges)
    except ValueError as error:
        raise DamagedError(f"the conversion manifest contradicts itself: {error}", subject=str(below.path)) from error


def plan_conversion(
    disks: Iterable[tuple[int, Disk]], machine: Machine, *, discard_hibernation: bool = False
) -> Conversion:
    """Find the OS disk among ``disks`` (number, disk) of a machine, and plan its conversion to Generation 1.

    The OS disk is the first one that has an EFI system partition. Only some MiB of each are read. Raises RefusedError
    with every reason, or where there is no OS disk; ToolError where GRUB is missing; and what the disks raise.
    """
    # The planner takes longer to import than a server that was given a plan has to start a machine.
    from conversion.tobios import plan_bios  # noqa: PLC0415
    from replica.generation.image import as_device  # noqa: PLC0415

    if machine.generation == 1:
        return Conversion()
    for number, disk in disks:
        plan = plan_bios(as_device(disk), discard_hibernation=discard_hibernation)
        found = plan.inspection
        if found.generation == 1 and found.system is not None:
            return Conversion()  # of a machine that was converted before, described as it once was
        if found.generation == 2 and found.esp is not None:
            plan.require()
            return Conversion(number, plan.require_manifest())
    raise RefusedError(
        "no disk has an EFI system partition: there is no system that a BIOS could be made to start",
        hint="start it as it is, with --generation 2",
    )
