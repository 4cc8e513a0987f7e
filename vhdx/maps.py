"""The allocation map and the change map of a chain, from BATs and sector bitmaps alone: payload is never read.

Both work on kinds: for each unit of the disk and each link of the chain, whether the link is clear there (its parent
shows through), zero, data, or partial. Units are the smallest block size of the chain; partial ones are looked at
again, sector by sector. Everything is whole numpy arrays, window by window: a window has at most ``WINDOW_UNITS``
units and its partial ones at most ``WINDOW_SECTORS`` sectors, which bounds the memory whatever the disk's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vhdx.disk import Extents
from vhdx.errors import CorruptDiskError
from vhdx.extents import clipped, merged, runs_of
from vhdx.image import VhdxImage
from vhdx.structures import BAT_ENTRY_SIZE, PayloadState

WINDOW_UNITS = 1 << 20
WINDOW_SECTORS = 1 << 22

Kinds: TypeAlias = npt.NDArray[np.uint8]
CLEAR, ZERO, DATA, PARTIAL, INVALID = range(5)
_Combine: TypeAlias = Callable[[list[Kinds]], Kinds]


def _kinds_by_state(*, has_parent: bool) -> Kinds:
    kinds = np.full(8, INVALID, dtype=np.uint8)
    kinds[PayloadState.NOT_PRESENT] = CLEAR
    kinds[[PayloadState.UNDEFINED, PayloadState.ZERO, PayloadState.UNMAPPED]] = ZERO if has_parent else CLEAR
    kinds[PayloadState.FULLY_PRESENT] = DATA
    if has_parent:
        kinds[PayloadState.PARTIALLY_PRESENT] = PARTIAL
    return kinds


_BASE_KINDS = _kinds_by_state(has_parent=False)
_CHILD_KINDS = _kinds_by_state(has_parent=True)


def allocated_extents(chain: Sequence[VhdxImage], start: int, end: int) -> Iterator[Extents]:
    """Yield what may hold data within [start, end) of a chain's first image, ascending; the rest reads as zeros.

    ``chain`` goes from the child to the last parent that is to be counted. Raises CorruptDiskError, OsError.
    """
    return _extents(chain, _top_data, start, end, shadow=end)


def changed_extents(chain: Sequence[VhdxImage], start: int, end: int, *, ancestor_size: int = 0) -> Iterator[Extents]:
    """Yield what any of ``chain``'s images says anything of within [start, end), ascending.

    That is where the first may differ from the parent of the last, of ``ancestor_size`` bytes: where a link between
    them is smaller than that, what the ancestor has past the link's end is gone. Raises CorruptDiskError, OsError.
    """
    return _extents(chain, _any_opaque, start, end, shadow=ancestor_size)


def _top_data(links: list[Kinds]) -> Kinds:
    """Return the kind that the first link that is not clear has: what a reader of the chain meets.

    Below a partial unit its parent may matter; partial stays partial, and is resolved by sector.
    """
    result = links[0]
    for kinds in links[1:]:
        result = np.where(result == CLEAR, kinds, result)
    return result


def _any_opaque(links: list[Kinds]) -> Kinds:
    """Return DATA where any link is data or zero, else PARTIAL where any is partial, else CLEAR."""
    result = _opaque(links[0])
    for kinds in links[1:]:
        other = _opaque(kinds)
        result = np.where((result == DATA) | (other == CLEAR), result, other)
    return result


def _opaque(kinds: Kinds) -> Kinds:
    return np.where(kinds == ZERO, np.uint8(DATA), kinds)


def _extents(chain: Sequence[VhdxImage], combine: _Combine, start: int, end: int, *, shadow: int) -> Iterator[Extents]:
    """Yield the combined extents. A parent is zero, not clear, from its end to ``shadow``: it hides its own parents."""
    if start >= end or not chain:
        return
    unit = min(image.geometry.block_size for image in chain)
    sectors_per_unit = unit // chain[0].geometry.sector_size
    partial_limit = max(1, WINDOW_SECTORS // sectors_per_unit)
    for first in range(start // unit, -(-end // unit), WINDOW_UNITS):
        last = min(-(-end // unit), first + WINDOW_UNITS)
        shadows = [0, *(shadow for _ in chain[1:])]  # past the end of the first link there is no disk
        links = [_unit_kinds(image, unit, first, last, over) for image, over in zip(chain, shadows, strict=True)]
        kinds = combine(
            [links[0]]
            + [_edged(link, image, unit, first, shadow) for link, image in zip(links[1:], chain[1:], strict=True)]
        )
        partial = np.flatnonzero(kinds == PARTIAL)
        # Cut the window where its partial units would take more sectors than are looked at together.
        cuts = [0, *(int(partial[index]) for index in range(partial_limit, len(partial), partial_limit)), last - first]
        for low, high in pairwise(cuts):
            parts = [(runs_of(kinds[low:high] == DATA) + (first + low)) * unit]
            inside = partial[np.searchsorted(partial, low) : np.searchsorted(partial, high)]
            if len(inside):
                parts.append(
                    _sector_extents(chain, [link[inside] for link in links], combine, unit, inside + first, shadows)
                )
            extents = clipped(merged(parts), start, end)
            if len(extents):
                yield extents


def _unit_kinds(image: VhdxImage, unit: int, first: int, last: int, shadow: int) -> Kinds:
    """Return the kinds of units [first, last): past the image's end ZERO up to ``shadow``, CLEAR from there."""
    geometry = image.geometry
    per_block = geometry.block_size // unit
    first_block, last_block = first // per_block, min(-(-last // per_block), geometry.block_count)
    kinds = np.zeros(last - first, dtype=np.uint8)
    kinds[max(0, -(-geometry.virtual_size // unit) - first) : max(0, -(-shadow // unit) - first)] = ZERO
    if first_block >= last_block:
        return kinds
    states = image.bat.payload_states(first_block, last_block)
    if states.any():
        by_block = (_CHILD_KINDS if geometry.has_parent else _BASE_KINDS)[states]
        if by_block.max() == INVALID:
            _refuse(image, first_block + int(np.argmax(by_block == INVALID)))
        repeated = np.repeat(by_block, per_block) if per_block > 1 else by_block
        # The last block may reach past the image's end by whole units, which are nobody's.
        within = min(last, -(-geometry.virtual_size // unit)) - first
        found = repeated[first - first_block * per_block :][: max(0, within)]
        kinds[: len(found)] = found
    return kinds


def _edged(kinds: Kinds, image: VhdxImage, unit: int, first: int, shadow: int) -> Kinds:
    """Return the kinds of a parent with the unit that its end cuts made partial: only sectors tell what it holds."""
    edge, cut = divmod(image.geometry.virtual_size, unit)
    if not cut or not first <= edge < first + len(kinds):
        return kinds
    if kinds[edge - first] != CLEAR or image.geometry.virtual_size < shadow:
        kinds = kinds.copy()
        kinds[edge - first] = PARTIAL
    return kinds


def _refuse(image: VhdxImage, block: int) -> None:
    index = image.geometry.payload_index(block)
    raise CorruptDiskError(
        f"payload block {block} has a state that this disk cannot have",
        path=str(image.path),
        offset=image.bat_region.offset + index * BAT_ENTRY_SIZE,
    )


def _sector_extents(
    chain: Sequence[VhdxImage],
    links: list[Kinds],
    combine: _Combine,
    unit: int,
    units: npt.NDArray[np.int64],
    shadows: Sequence[int],
) -> Extents:
    """Return the data extents of ``units``, whose kinds by link are ``links``, sector by sector: all units at once."""
    sector_size = chain[0].geometry.sector_size
    per_unit = unit // sector_size
    by_sector = []
    for image, kinds, shadow in zip(chain, links, shadows, strict=True):
        sectors = np.repeat(kinds, per_unit).reshape(-1, per_unit)
        partial = np.flatnonzero(kinds == PARTIAL)
        if len(partial):
            bits = _bits(image, units[partial], per_unit)
            sectors[partial] = np.where(bits, np.uint8(DATA), np.uint8(CLEAR))
        last_unit, edge = divmod(image.geometry.virtual_size // sector_size, per_unit)
        if edge:
            sectors[units == last_unit, edge:] = ZERO if image.geometry.virtual_size < shadow else CLEAR
        by_sector.append(sectors)
    # A column of no data after each unit keeps the runs of units apart that do not lie beside each other.
    flags = np.zeros((len(units), per_unit + 1), dtype=np.bool_)
    flags[:, :per_unit] = combine(by_sector) == DATA
    runs = runs_of(flags.ravel())
    rows = runs[:, 0] // (per_unit + 1)
    moved = (runs + (units[rows] * per_unit - rows * (per_unit + 1))[:, np.newaxis]) * sector_size
    # Where a unit ends with data and the next one begins with it, the two runs are one extent.
    apart = np.flatnonzero(moved[1:, 0] != moved[:-1, 1])
    starts = moved[np.concatenate(([0], apart + 1)), 0] if len(moved) else moved[:, 0]
    ends = moved[np.concatenate((apart, [len(moved) - 1])), 1] if len(moved) else moved[:, 1]
    extents: Extents = np.stack((starts, ends), axis=1)
    return extents


def _bits(image: VhdxImage, units: npt.NDArray[np.int64], per_unit: int) -> npt.NDArray[np.uint8]:
    """Return the sector bitmap's bits of units of ``per_unit`` sectors, a multiple of 8: a row for each unit."""
    geometry = image.geometry
    per_chunk = geometry.chunk_ratio * geometry.sectors_per_block
    parts = []
    edges = np.flatnonzero(np.diff(units) != 1) + 1
    for group in np.split(units, edges):  # neighbours are read together
        first, last = int(group[0]) * per_unit, (int(group[-1]) + 1) * per_unit
        for chunk in range(first // per_chunk, -(-last // per_chunk)):
            low = max(first, chunk * per_chunk) - chunk * per_chunk
            high = min(last, (chunk + 1) * per_chunk) - chunk * per_chunk
            parts.append(image.read_bitmap(chunk, low // 8, high // 8))
    return np.unpackbits(np.frombuffer(b"".join(parts), dtype=np.uint8), bitorder="little").reshape(-1, per_unit)
