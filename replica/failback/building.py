"""Building the new disk beside the home disk, and looking at it: nothing here touches the home disk or its name."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from conversion.errors import ConversionError
from replica.block import BLOCK_BYTES, disk_base
from replica.errors import GodwitError, UsageError
from replica.failback.difference import WINDOW_BYTES, Difference, blocks_of, within
from replica.failback.goal import Goal, amiss, check, is_goal
from replica.failback.hashing import Hasher
from replica.failback.names import HomeFiles, Names, same_file
from replica.failback.ranges import subtracted
from replica.generation.image import Image
from replica.pipeline import ordered
from replica.reader import BlockReader, Fetch, plan_fetches
from replica.workers import BATCHES_PER_THREAD
from vhdx.chain import open_vhdx
from vhdx.convert import ConvertFormat, convert_disk
from vhdx.create import create_disk
from vhdx.disk import Disk, Extents, ReadableBuffer
from vhdx.errors import DiskError, OsError
from vhdx.extents import clipped, merged, total_length
from vhdx.osfile import translated
from vhdx.progress import Progress, silent
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable

FLUSH_BYTES: Final = 64 << 20  # what was flushed need not be fetched again


@dataclass(frozen=True, slots=True)
class Fetching:
    """How blocks come from the store: through what, and how many requests at once."""

    reader: BlockReader
    at_once: int


class _Filling:
    """Writes into an open disk, one thread at a time, and flushes now and then."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self._unflushed = 0

    def write_at(self, offset: int, data: ReadableBuffer) -> None:
        """Write ``data`` at ``offset``."""
        with self._lock:
            self._disk.write_at(offset, data)
            self._unflushed += len(data)
            if self._unflushed >= FLUSH_BYTES:
                self._disk.flush()
                self._unflushed = 0


def build_overlay(
    names: Names,
    goal: Goal,
    fetching: Fetching,
    hasher: Hasher,
    files: HomeFiles,
    *,
    whole: bool,
    progress: Progress = silent,
) -> int:
    """Make a differencing disk on the home disk that reads as the goal, under its building name.

    Return the bytes that were written. What an attempt that was cut off has fetched is read and hashed, and not
    fetched again. Raises IntegrityError, ConversionError, StoreError, DiskError; the home disk is as it was, and what
    a store that failed leaves unfinished stays for the next attempt.
    """
    path, folders = names.building, (names.home.parent,)
    todo = _left_to_do(names, goal, hasher, files)
    _require_room(path.parent, (todo or goal.stored).bytes + total_length(goal.laid))
    try:
        if todo is None:
            files.remove(path)
            create_disk(path, kind="differencing", parent=names.home, size=goal.content.size, files=files)
            todo = goal.stored
        with open_writable(path, allowed_folders=folders, files=files) as disk:
            _fill(disk, goal, todo, fetching, progress)
            disk.flush()
    except DiskError:  # no room, most likely: what was begun takes some
        _thrown_away(path, files)
        raise
    try:
        with open_vhdx(path, allowed_folders=folders, files=files) as disk:
            check(disk, goal, hasher, whole=whole)
    except (DiskError, GodwitError, ConversionError):
        _thrown_away(path, files)
        raise
    return todo.bytes + total_length(goal.laid)


def _left_to_do(names: Names, goal: Goal, hasher: Hasher, files: HomeFiles) -> Difference | None:
    """Return what an earlier attempt left to do of its unfinished disk; None where there is none that can be used."""
    if not names.building.exists():
        return None
    try:
        with open_vhdx(names.building, allowed_folders=(names.home.parent,), files=files) as disk:
            if disk.parent is None or disk.size != goal.content.size or not same_file(disk.parent.path, names.home):
                return None
            # What that attempt wrote and is not wanted any more would shine through.
            if not _is_covered(disk, goal):
                return None
            return amiss(disk, goal, hasher)
    except DiskError:
        return None


def _is_covered(disk: VhdxDisk, goal: Goal) -> bool:
    return not len(subtracted(merged(list(disk.changed())), goal.extents))


def _fill(disk: Disk, goal: Goal, todo: Difference, fetching: Fetching, progress: Progress) -> None:
    """Write what is to be done: blocks as the store has them, zeros, and blocks that the way back changes."""
    size = goal.way.record.size
    target = _Filling(disk)
    total, done = total_length(todo.data), 0

    def work(fetch: Fetch) -> int:
        read = fetching.reader.read(fetch)
        for number, data in zip(read.numbers, read.data, strict=True):
            target.write_at(number * BLOCK_BYTES, memoryview(data)[: size - number * BLOCK_BYTES])
        return len(read.numbers) * BLOCK_BYTES

    with ThreadPoolExecutor(fetching.at_once, "bring home") as pool:
        limit = fetching.at_once * BATCHES_PER_THREAD
        with closing(ordered(pool, work, _fetches(goal, todo.data), limit=limit)) as results:
            for count in results:
                done += count
                progress(min(done, total), total, "bringing home")
    for start, end in todo.zeros.tolist():
        disk.trim(start, end - start)
    for start, end in blocks_of(goal.laid):
        disk.write_at(start, goal.content.read_at(start, end - start))


def _fetches(goal: Goal, wanted: Extents) -> Iterator[Fetch]:
    """Yield what fetches the wanted blocks. Raises IntegrityError, StoreError."""
    number, size = goal.way.record.number, goal.way.record.size
    for start in range(0, size, WINDOW_BYTES):
        if len(clipped(wanted, start, start + WINDOW_BYTES)):
            first = disk_base(number) + start // BLOCK_BYTES
            window = goal.way.map.window(first, first + WINDOW_BYTES // BLOCK_BYTES)
            yield from plan_fetches(
                replace(window, entries=window.entries.take(within(window.entries, number, wanted)))
            )


def build_copy(
    names: Names,
    goal: Goal,
    format_: ConvertFormat,
    hasher: Hasher,
    files: HomeFiles,
    *,
    progress: Progress = silent,
) -> int:
    """Make a whole disk of the goal under its building name; return the bytes that were written.

    A whole one of an earlier attempt is used if all of it is as it should be. Raises as ``build_overlay``.
    """
    path = names.building
    written = 0
    if path.exists() and not _is_whole(path, format_, goal, hasher):
        files.remove(path)
    if not path.exists():
        _require_room(path.parent, goal.way.record.data_blocks * BLOCK_BYTES)
        done = convert_disk(goal.content, path, format=format_, progress=progress, files=files)
        written = done.written_bytes
    try:
        with Image(path, format_.partition("-")[0]).opened() as disk:
            check(disk, goal, hasher, whole=True)
    except (DiskError, GodwitError, ConversionError):
        _thrown_away(path, files)
        raise
    return written


def _is_whole(path: Path, format_: ConvertFormat, goal: Goal, hasher: Hasher) -> bool:
    try:
        with Image(path, format_.partition("-")[0]).opened() as disk:
            return is_goal(disk, goal, hasher)
    except DiskError:
        return False


def _require_room(folder: Path, needed_bytes: int) -> None:
    """Raise UsageError where there cannot be room: better said now than after an hour."""
    with translated(folder, "ask for the free space of the folder"):
        free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UsageError(
            f"{needed_bytes} bytes are to be written beside the home disk, and only {free_bytes} are free",
            path=str(folder),
            hint="free some space there, or bring the VM home to new files elsewhere",
        )


def _thrown_away(path: Path, files: HomeFiles) -> None:
    try:
        files.remove(path)
    except OsError:
        return  # what went wrong first is told; the next attempt removes it
