"""The verdict on a machine's disks: inspecting them, within bounds, for whether they can start as Generation 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import ConversionError
from conversion.finding import RULES_VERSION, Finding, Severity
from conversion.inspection import Inspection, inspect
from replica.block import BLOCK_BYTES
from replica.errors import GodwitError
from replica.generation.convertibility import (
    MOST_DISKS,
    MOST_FINDINGS,
    MOST_RANGES,
    Convertibility,
    Inspected,
    Ranges,
    Verdict,
    short,
)
from replica.generation.image import as_device
from vhdx.disk import Disk
from vhdx.errors import DiskError

MOST_SECONDS: Final = 10.0
MOST_BYTES: Final = 512 << 20
MOST_READS: Final = 20_000
MOST_KEPT_BLOCKS: Final = 128
_NO_ESP: Final = Finding(
    "no-esp",
    Severity.REFUSAL,
    "disks",
    "No disk of the machine has an EFI system partition: there is no system that a BIOS could be made to start.",
    "the partition tables",
    "protect the disk that the machine starts from, or start it as it is, with --generation 2",
)


class TooMuchError(Exception):
    """An inspection has used up what it may; it never leaves this module."""


def judged(
    disks: Iterable[tuple[int, Disk]],
    *,
    generation: int,
    now: datetime,
    monotonic: Callable[[], float],
    most_seconds: float = MOST_SECONDS,
) -> Convertibility:
    """Inspect the disks (number, disk) of a machine in their order, until one is found that it starts from.

    Takes some MiB of reads as a rule, ``most_seconds`` and ``MOST_BYTES`` at most: between two reads it gives up.
    Never raises but for what is no Exception: whatever goes wrong is the verdict ``unknown``, with its reason.
    """
    begun = monotonic()
    looked: list[_Watched] = []
    try:
        said = _look(disks, generation, looked, _Allowance(begun + most_seconds, monotonic))
    except (ConversionError, DiskError, GodwitError, TooMuchError) as error:
        said = _Said(Verdict.UNKNOWN, because=str(error))
    except Exception as error:  # a cycle must not end because of what a guest wrote into its file systems
        said = _Said(Verdict.UNKNOWN, because=f"the inspection failed: {type(error).__name__}: {error}")
    found = said.found
    return Convertibility(
        verdict=said.verdict,
        judged_at=now,
        system=short(found.system_name) if found is not None and found.system is not None else "",
        disk=looked[-1].number if found is not None else None,
        because=short(said.because),
        findings=_kept(said.findings),
        rules=RULES_VERSION,
        generation=generation,
        seconds=max(0.0, monotonic() - begun),
        pending=said.verdict is Verdict.UNKNOWN,
        inspected=_inspected(looked),
    )


@dataclass(frozen=True, slots=True)
class _Said:
    """What there is to say, and the disk that says it, inspected."""

    verdict: Verdict
    found: Inspection | None = None
    findings: tuple[Finding, ...] = ()
    because: str = ""


def _look(disks: Iterable[tuple[int, Disk]], generation: int, looked: list[_Watched], allowance: _Allowance) -> _Said:
    """Inspect disk by disk, noting in ``looked`` what was read."""
    if generation == 1:
        return _Said(Verdict.NOT_NEEDED)
    for number, disk in disks:
        if len(looked) == MOST_DISKS:
            return _Said(Verdict.UNKNOWN, because=f"none of the first {MOST_DISKS} disks starts by UEFI")
        looked.append(_Watched(number, as_device(disk), allowance))
        found = inspect(looked[-1])
        if found.generation == 1 and found.system is not None:
            return _Said(Verdict.NOT_NEEDED, found)  # converted before, and described as it once was
        if found.generation == 2 and found.esp is not None:
            verdict = Verdict.CONVERTIBLE if found.is_convertible else Verdict.REFUSED
            return _Said(verdict, found, found.findings)
    return _Said(Verdict.REFUSED, findings=(_NO_ESP,))


class _Allowance:
    """What an inspection may still use."""

    def __init__(self, until: float, monotonic: Callable[[], float]) -> None:
        self._until = until
        self._monotonic = monotonic
        self._bytes = MOST_BYTES
        self._reads = MOST_READS

    def take(self, length: int) -> None:
        """Raise TooMuchError where this read is one too many."""
        self._bytes -= length
        self._reads -= 1
        if self._bytes < 0 or self._reads < 0:
            raise TooMuchError("the inspection would read more than it may")
        if self._monotonic() > self._until:
            raise TooMuchError("the inspection took too long")


class _Watched:
    """A disk whose reads are counted, and remembered by block.

    What is smaller than a block is taken out of whole ones, some of which are kept: an inspection reads many small
    things that lie close together, and behind some disks is a network.
    """

    def __init__(self, number: int, device: BlockDevice, allowance: _Allowance) -> None:
        self.number = number
        self.size = device.size
        self.sector_size = device.sector_size
        self._device = device
        self._allowance = allowance
        self._read = set[int]()
        self._kept = dict[int, bytes]()  # the oldest first

    def read_at(self, offset: int, length: int) -> bytes:
        """Read, and remember it."""
        first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        if length >= BLOCK_BYTES or offset < 0 or length <= 0 or offset + length > self.size:
            self._allowance.take(max(0, length))
            data = self._device.read_at(offset, length)
            self._read.update(range(first, end))
            return data
        start = offset - first * BLOCK_BYTES
        return b"".join(map(self._block, range(first, end)))[start : start + length]

    def _block(self, block: int) -> bytes:
        data = self._kept.pop(block, None)
        if data is None:
            length = min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)
            self._allowance.take(length)
            data = self._device.read_at(block * BLOCK_BYTES, length)
            self._read.add(block)
            if len(self._kept) >= MOST_KEPT_BLOCKS:
                del self._kept[next(iter(self._kept))]
        self._kept[block] = data
        return data

    def ranges(self) -> list[tuple[int, int]]:
        """Return what was read, as ranges of blocks."""
        found: list[tuple[int, int]] = []
        for block in sorted(self._read):
            if found and found[-1][1] == block:
                found[-1] = (found[-1][0], block + 1)
            else:
                found.append((block, block + 1))
        return found


def _inspected(looked: list[_Watched]) -> tuple[Inspected, ...]:
    each = MOST_RANGES // max(1, len(looked))
    return tuple(Inspected(one.number, one.size, coarsened(one.ranges(), each)) for one in looked)


def coarsened(ranges: list[tuple[int, int]], most: int) -> Ranges:
    """Return at most ``most`` ranges that hold all of ``ranges``: those with the least between them become one."""
    if len(ranges) <= most:
        return tuple(ranges)
    gaps = sorted(range(1, len(ranges)), key=lambda index: ranges[index][0] - ranges[index - 1][1], reverse=True)
    cuts = sorted(gaps[: most - 1])
    return tuple(
        (ranges[first][0], ranges[end - 1][1]) for first, end in zip([0, *cuts], [*cuts, len(ranges)], strict=True)
    )


def _kept(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    grave = [one for one in findings if one.severity is not Severity.NOTE]
    grave.sort(key=lambda one: one.severity is not Severity.REFUSAL)
    return tuple(
        Finding(one.rule, one.severity, *map(short, (one.subject, one.message, one.evidence, one.remedy)))
        for one in grave[:MOST_FINDINGS]
    )
