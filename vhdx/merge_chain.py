"""Merging a disk's older checkpoint files into the disk, so that the newest stays and reads the same.

Checkpoints are the AVHDX files that stand on each other at the chain's end; the disk is the file beneath them. It may
have a parent itself, as a clone has its template: that one, and what else there is beneath, is not the checkpoints'.

It is a sequence of merges of one file into its parent (``vhdx.merge``), the oldest first: so each file's data are
written once, each leaves a chain that is whole and one file shorter, and whatever is cut off is finished by asking
for the same again. While it goes on, every file of the chain is locked: no machine can be started on any of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vhdx.chain import open_vhdx
from vhdx.describe import file_sizes
from vhdx.errors import DiskError, OsError, ParentError
from vhdx.family import Family, read_family
from vhdx.merge import merge_has_begun, merge_into_parent
from vhdx.osfile import OS_FILES, File, Files, translated
from vhdx.progress import Progress, silent
from vhdx.structures import MIB, PayloadState
from vhdx.survey import chain_folders, require_vhdx
from vhdx.vhdx import VhdxDisk
from vhdx.windows import length_of

AUTOMATIC: Final = ".avhdx"  # the ending of the files that Hyper-V makes at checkpoints; others are made on purpose
WINDOW_BLOCKS: Final = 1 << 16
PRESENT: Final = (PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT)
TABLES_BYTES: Final = 16 << 20  # room for what a merge may change beside payload: tables, bitmaps, a longer BAT
GROWS_BY_BLOCKS: Final = os.name == "nt"  # elsewhere a file that is made longer takes room where it is written to


@dataclass(frozen=True, slots=True)
class ChainMerge:
    """What is to be done to a chain. Files are listed in the order in which they are merged, each into its parent.

    ``finished`` are merges that were cut off, which come first; ``merged`` then go into ``target``, the disk that the
    checkpoints are of; ``kept`` stay above it, the newest first. ``data_bytes`` are written at most, ``growth_bytes``
    is the room that it takes at its worst.
    """

    path: Path
    finished: tuple[Path, ...]
    merged: tuple[Path, ...]
    target: Path
    kept: tuple[Path, ...]
    data_bytes: int
    growth_bytes: int
    freed_bytes: int  # what the merged files take

    @property
    def steps(self) -> tuple[Path, ...]:
        """All files that go, in order."""
        return self.finished + self.merged

    @property
    def files(self) -> tuple[Path, ...]:
        """All files from the newest down to the target, as they are now."""
        return (*self.kept, *reversed(self.merged), *self.finished, self.target)


def plan_chain_merge(
    path: Path | str,
    *,
    keep: int = 1,
    modified_before: float | None = None,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
) -> ChainMerge:
    """Say what merging would do so that ``keep`` checkpoint files stay, one at the least: the newest is never merged.

    ``modified_before``, seconds since 1970: only files that were last written to before are merged, up to the oldest
    that was not. Merges that were cut off are finished in any case.
    Raises ParentError where the chain is broken, where ``path`` is not the newest, where a file that would change is
    the parent of another disk too, and as ``open_vhdx`` does.
    """
    path = Path(path)
    if keep < 1:
        raise ParentError(
            "the newest file of a chain is not merged: machines know the disk by its name",
            path=str(path),
            hint="keep 1 at the least; 'godwit disk merge' merges it all the same, and the machine must then be told",
        )
    require_vhdx(path, files=files)
    with open_vhdx(path, allowed_folders=allowed_folders, files=files) as disk:
        chain = disk.chain
        missing = chain[-1].parent_error
        if missing is not None:
            raise missing
        paths = [link.path for link in chain]
        family = read_family(chain_folders(paths, allowed_folders), paths=paths, files=files)
        _refuse_above(path, family)
        automatic = list(takewhile(lambda link: link.path.suffix.lower() == AUTOMATIC, chain[:-1]))
        target = chain[len(automatic)]
        if automatic and merge_has_begun(disk):
            raise ParentError(
                "a merge of this file into its parent was begun and cut off",
                path=str(path),
                hint=f"finish it: godwit disk merge {path}",
            )
        begun = [link.path for link in automatic[1:] if merge_has_begun(link)]
        ours = paths[: len(automatic) + 1]
        left_over = _left_over(ours, family, allowed_folders, files)
        staying = [link for link in automatic if link.path not in begun]
        merged = list(reversed(staying[keep:]))
        if modified_before is not None:
            merged = _older(merged, modified_before)
        finished = (*left_over, *reversed(begun))
        if merged:
            _refuse_branches([*merged, target], paths, left_over, family)
            _refuse_smaller(target, merged)
        kept = tuple(link.path for link in staying if link not in merged)
        sources = [link for link in reversed(automatic) if link in merged or link.path in begun]
        taken = [_taken(link.path) for link in sources]
        return ChainMerge(
            path=path,
            finished=finished,
            merged=tuple(link.path for link in merged),
            target=target.path,
            kept=kept,
            data_bytes=sum(length_of(link.stored()) for link in sources),
            growth_bytes=_growth(target, sources, taken) if sources else 0,
            freed_bytes=sum(taken) + sum(_taken(one) for one in left_over),
        )


def merge_chain(
    plan: ChainMerge,
    *,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
    progress: Progress = silent,
) -> None:
    """Do what ``plan`` says. The caller has the chain: ``held``'s files are to be given.

    Cut off, it is finished by planning anew and merging that. Raises as ``merge_into_parent`` does.
    """
    folders = chain_folders(plan.files, allowed_folders)
    for one in plan.steps:
        merge_into_parent(one, allowed_folders=folders, files=files, progress=progress)


# --- what stands in the way


def _refuse_above(path: Path, family: Family) -> None:
    above = family.above(path)
    if above:
        names = ", ".join(str(one) for one in above)
        raise ParentError(
            f"this is not the newest file of its chain: {len(above)} stand above it: {names}"
            if len(above) > 1
            else f"this is not the newest file of its chain: {names} stands above it",
            path=str(path),
            hint="name the newest" if len(above) == 1 else "name the one that the machine runs on",
        )


def _refuse_branches(
    changing: Sequence[VhdxDisk], chain: Sequence[Path], left_over: Sequence[Path], family: Family
) -> None:
    known = {one.resolve() for one in (*chain, *left_over)}
    for link in changing:
        others = [str(one) for one in family.children_of(link.path) if one.resolve() not in known]
        if others:
            raise ParentError(
                f"other disks stand on it too, and need it as it is: {', '.join(others)}",
                path=str(link.path),
                hint="this is a tree of checkpoints: delete the other branches in the hypervisor first, or remove "
                "those files if nobody needs them",
            )


def _refuse_smaller(target: VhdxDisk, merged: Sequence[VhdxDisk]) -> None:
    size = target.size
    for link in merged:
        if link.size < size:
            raise ParentError(
                f"it has {link.size} bytes, and what it would be merged into {size}: nothing says what is past its end",
                path=str(link.path),
                hint="convert the newest file, parents included, into a new one: godwit disk convert",
            )
        size = link.size


def _left_over(
    chain: Sequence[Path], family: Family, allowed_folders: Sequence[Path | str], files: Files
) -> tuple[Path, ...]:
    """Return the files beside the chain whose merge into one of it was cut off after the chain had let go of them."""
    known = {one.resolve() for one in chain}
    folders = chain_folders(chain, allowed_folders)
    found = []
    for one in dict.fromkeys(child for link in chain[1:] for child in family.children_of(link)):
        if one.resolve() not in known and not family.children_of(one):
            try:
                with open_vhdx(one, allowed_folders=folders, files=files) as disk:
                    begun = merge_has_begun(disk)
            except DiskError:  # it counts as a branch then
                continue
            if begun:
                found.append(one)
    return tuple(found)


def _older(links: Sequence[VhdxDisk], modified_before: float) -> list[VhdxDisk]:
    older = []
    for link in links:
        with translated(link.path, "ask for the file's times"):
            if link.path.stat().st_mtime >= modified_before:
                break
        older.append(link)
    return older


# --- room


def _taken(path: Path) -> int:
    file_size, storage_size = file_sizes(path)
    return file_size if storage_size is None else storage_size


def _growth(target: VhdxDisk, sources: Sequence[VhdxDisk], taken: Sequence[int]) -> int:
    """Return the most room that is needed at any time, bytes: each source is removed once it was merged."""
    block_size = target.image.geometry.block_size
    new_blocks = _new_blocks(target, sources)
    file_size, storage_size = file_sizes(target.path)
    is_sparse = storage_size is not None and storage_size < file_size
    tables = TABLES_BYTES
    if target.image.geometry.has_parent:  # it may need a sector bitmap, 1 MiB, for each chunk of 2^23 sectors
        tables += -(-target.size // (target.sector_size << 23)) * MIB
    peak = total = 0
    for source, blocks, freed in zip(sources, new_blocks, taken, strict=True):
        grown = blocks * block_size
        if not GROWS_BY_BLOCKS:
            data = length_of(source.stored())
            grown = data if is_sparse else min(grown, data)
        total += grown + tables
        peak = max(peak, total)
        total -= freed if _device(source.path) == _device(target.path) else 0
    return max(0, peak)


def _device(path: Path) -> int:
    with translated(path, "ask for the file's device"):
        return path.stat().st_dev


def _new_blocks(target: VhdxDisk, sources: Sequence[VhdxDisk]) -> list[int]:
    """Return how many blocks of the target each source is the first to write to, that have no place yet."""
    geometry = target.image.geometry
    counts = [0] * len(sources)
    block_count = -(-max(source.size for source in sources) // geometry.block_size)
    for first in range(0, block_count, WINDOW_BLOCKS):
        last = min(block_count, first + WINDOW_BLOCKS)
        has_place = np.zeros(last - first, dtype=np.bool_)
        inside = min(last, geometry.block_count)
        if first < inside:
            has_place[: inside - first] = np.isin(target.image.bat.payload_states(first, inside), PRESENT)
        for number, source in enumerate(sources):
            new = _touched(source, first, last, geometry.block_size) & ~has_place
            counts[number] += int(np.count_nonzero(new))
            has_place |= new
    return counts


def _touched(source: VhdxDisk, first: int, last: int, block_size: int) -> npt.NDArray[np.bool_]:
    """Return which of the blocks ``first`` to ``last`` the source holds data of."""
    edges = np.zeros(last - first + 1, dtype=np.int64)
    start, end = first * block_size, min(last * block_size, source.size)
    for window in source.stored(start, end) if start < end else ():
        np.add.at(edges, window[:, 0] // block_size - first, 1)
        np.add.at(edges, -(-window[:, 1] // block_size) - first, -1)
    return np.cumsum(edges)[:-1] > 0


# --- locks


class HeldFiles:
    """Files of which some are locked from outside: opened again here, they are not locked once more."""

    def __init__(self, files: Files, held: dict[Path, File]) -> None:
        """``held`` by their real paths."""
        self._files = files
        self._held = held

    def open(self, path: Path, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
        """Open as ``open_file`` does."""
        lock = lock and path.resolve() not in self._held
        return self._files.open(path, writable=writable, create=create, lock=lock)

    def replace(self, source: Path, target: Path) -> None:
        """Rename as ``replace_file`` does."""
        self._files.replace(source, target)

    def link_exclusive(self, temporary: Path, target: Path) -> bool:
        """Name as ``link_exclusive`` does."""
        return self._files.link_exclusive(temporary, target)

    def remove(self, path: Path) -> None:
        """Remove the file's name; its lock goes with it."""
        held = self._held.pop(path.resolve(), None)
        if held is not None:
            held.close()  # Windows removes no file that is open
        self._files.remove(path)


@contextlib.contextmanager
def held(paths: Sequence[Path], *, files: Files = OS_FILES) -> Iterator[HeldFiles]:
    """Lock all files against writers and running machines while the context lasts, and return how to open them.

    Raises DiskBusyError where somebody has one of them, OsError where one may not be written to.
    """
    locked: dict[Path, File] = {}
    try:
        for path in dict.fromkeys(path.resolve() for path in paths):
            locked[path] = files.open(path, writable=True)
        yield HeldFiles(files, locked)
    finally:
        for file in locked.values():
            with contextlib.suppress(OsError):
                file.close()
