"""A file layer that records every side effect, and rebuilds each state in which a crash could leave the files.

``RecordingFiles`` passes everything on to real files in one folder and writes down each effect: a write, a change of
size, a hole, a flush, and what happens to names. ``crash_points`` then goes through the record and yields, for each
ordinal, the states that a power cut at that instant could leave behind:

- what was flushed is there; of what was written since, in whole sectors as the system's cache held them after the
  write, ``none`` survived, ``all``, all but the last write ``torn`` after some 512-byte sectors, or a seeded choice of
  writes, some of them torn;
- names are durable once their call returned, since every such call flushes the folder; before, they are the old ones.

``RecordingFiles(fail_at=k)`` makes effect k fail instead, with the storage left as it was or (``applied=True``) with
the effect in place, as an error of a dying device may come after the fact.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vhdx.errors import OsError
from vhdx.osfile import OS_FILES, File, ReadableBuffer

PAGE = 4096
SECTOR = 512
ZERO_PAGE = bytes(PAGE)


class SparseBytes:
    """The content of one file: pages that are not all zeros, and a length."""

    def __init__(self, pages: dict[int, bytes] | None = None, size: int = 0) -> None:
        self.pages = pages if pages is not None else {}
        self.size = size

    @classmethod
    def of(cls, path: Path) -> SparseBytes:
        """Read a file."""
        content = cls()
        file = OS_FILES.open(path)
        content.size = file.size()
        for start, end in file.data_extents(0, content.size):
            content.write(start, file.pread(start, end - start))
        content.size = file.size()
        file.close()
        return content

    def copy(self) -> SparseBytes:
        return SparseBytes(dict(self.pages), self.size)

    def write(self, offset: int, data: bytes) -> None:
        self.size = max(self.size, offset + len(data))
        position = 0
        while position < len(data):
            page, within = divmod(offset + position, PAGE)
            piece = data[position : position + PAGE - within]
            old = self.pages.get(page, ZERO_PAGE)
            new = old[:within] + piece + old[within + len(piece) :]
            if new == ZERO_PAGE:
                self.pages.pop(page, None)
            else:
                self.pages[page] = new
            position += len(piece)

    def read(self, offset: int, length: int) -> bytes:
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        content = b"".join(self.pages.get(page, ZERO_PAGE) for page in range(first, last))
        return content[offset - first * PAGE :][: min(length, self.size - offset)]

    def punch(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        for page in [page for page in self.pages if page * PAGE < end and (page + 1) * PAGE > offset]:
            first, last = max(offset, page * PAGE), min(end, (page + 1) * PAGE)
            self.write(first, bytes(last - first))

    def truncate(self, size: int) -> None:
        if size < self.size:
            self.punch(size, self.size - size)
        self.size = size

    def write_to(self, path: Path) -> None:
        """Make a file of it, with holes."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for page, data in sorted(self.pages.items()):
                file.seek(page * PAGE)
                file.write(data[: max(0, self.size - page * PAGE)])


@dataclass(frozen=True, slots=True)
class Effect:
    """One side effect. ``inode`` is the file it falls on, which keeps its number when its name changes."""

    kind: str  # write, truncate, punch, fsync, create, replace, link, remove
    inode: int
    path: Path
    offset: int = 0
    data: bytes = b""
    length: int = 0
    target: Path | None = None

    def apply(self, content: SparseBytes) -> None:
        if self.kind == "write":
            content.write(self.offset, self.data)
        elif self.kind == "truncate":
            content.truncate(self.length)
        elif self.kind == "punch":
            content.punch(self.offset, self.length)

    def torn(self, sectors: int) -> Effect:
        """Return the write cut after ``sectors`` sectors of the file."""
        cut = (self.offset // SECTOR + sectors) * SECTOR - self.offset
        return Effect("write", self.inode, self.path, self.offset, self.data[: max(0, cut)])


class RecordingFile:
    """A file whose effects are recorded on their way to the real one."""

    def __init__(self, files: RecordingFiles, real: File, inode: int) -> None:
        self._files = files
        self._real = real
        self._inode = inode
        self.path = real.path
        self.writable = real.writable
        self.size = real.size
        self.pread = real.pread
        self.pread_into = real.pread_into
        self.data_extents = real.data_extents
        self.close = real.close

    def _effect(self, kind: str, **fields: object) -> Effect:
        return Effect(kind, self._inode, self.path, **fields)  # type: ignore[arg-type]

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        with self._files.effect(self._effect("write", offset=offset, data=bytes(data))):
            self._real.pwrite(offset, data)

    def truncate(self, size: int) -> None:
        with self._files.effect(self._effect("truncate", length=size)):
            self._real.truncate(size)

    def fsync(self) -> None:
        with self._files.effect(self._effect("fsync")):
            pass  # the record decides what is durable; the real storage of a test need not wait

    def punch_hole(self, offset: int, length: int) -> bool:
        with self._files.effect(self._effect("punch", offset=offset, length=length)):
            return self._real.punch_hole(offset, length)


class _Effecting:
    def __init__(self, files: RecordingFiles, effect: Effect) -> None:
        self._files = files
        self._effect = effect
        self._fails = len(files.effects) == files.fail_at

    def __enter__(self) -> None:
        if self._fails and not self._files.applied:
            self._files.fail_at = -1
            raise OsError(f"cannot {self._effect.kind}: injected", path=str(self._effect.path))
        self._files.effects.append(self._effect)

    def __exit__(self, *exc: object) -> None:
        if self._fails and exc[0] is None:
            self._files.fail_at = -1
            raise OsError(f"cannot {self._effect.kind}: injected after the fact", path=str(self._effect.path))


@dataclass
class RecordingFiles:
    """The files of one folder, recorded from now on."""

    folder: Path
    fail_at: int = -1
    applied: bool = False
    effects: list[Effect] = field(default_factory=list)
    marks: list[tuple[int, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self.inodes: dict[Path, int] = {}
        self.base: dict[int, SparseBytes] = {}
        for path in sorted(self.folder.iterdir()):
            if path.is_file():
                inode = next(self._numbers)
                self.inodes[path] = inode
                self.base[inode] = SparseBytes.of(path)
        self.base_names = dict(self.inodes)

    def restore(self) -> None:
        """Put the files of the folder back to what they were when recording began."""
        start = CrashPoint(0, "none", {path: self.base[inode] for path, inode in self.base_names.items()}, ())
        start.write_to(self.folder)

    def effect(self, effect: Effect) -> _Effecting:
        return _Effecting(self, effect)

    def mark(self, value: object) -> None:
        """Note that ``value`` holds from here on (a flush returned, say)."""
        self.marks.append((len(self.effects), value))

    def open(self, path: Path, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
        if create:
            inode = next(self._numbers)
            with self.effect(Effect("create", inode, path)):
                real = OS_FILES.open(path, create=True, lock=lock)
            self.inodes[path] = inode
        else:
            real = OS_FILES.open(path, writable=writable, lock=lock)
        return RecordingFile(self, real, self.inodes[path])

    def replace(self, source: Path, target: Path) -> None:
        with self.effect(Effect("replace", self.inodes[source], source, target=target)):
            source.replace(target)
        self.inodes[target] = self.inodes.pop(source)

    def link_exclusive(self, temporary: Path, target: Path) -> bool:
        if target.exists():
            return False
        with self.effect(Effect("link", self.inodes[temporary], temporary, target=target)):
            OS_FILES.link_exclusive(temporary, target)
        self.inodes[target] = self.inodes.pop(temporary)
        return True

    def remove(self, path: Path) -> None:
        if path.exists():
            with self.effect(Effect("remove", self.inodes.pop(path), path)):
                path.unlink()


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """The files as a crash just before effect ``ordinal`` could leave them, and what had been marked by then."""

    ordinal: int
    mode: str
    files: dict[Path, SparseBytes]
    marks: tuple[object, ...]

    def write_to(self, folder: Path) -> None:
        """Make ``folder`` hold these files and no others."""
        for path in folder.iterdir():
            path.unlink()
        for path, content in self.files.items():
            content.write_to(folder / path.name)

    def __str__(self) -> str:
        return f"crash before effect {self.ordinal} ({self.mode})"


class _Storage:
    """What is durable, and what may or may not be, as the effects go by."""

    def __init__(self, record: RecordingFiles) -> None:
        self.durable = {inode: content.copy() for inode, content in record.base.items()}
        self.cached = {inode: content.copy() for inode, content in record.base.items()}  # as if all had survived
        self.names = dict(record.base_names)
        self.pending: list[Effect] = []

    def take(self, effect: Effect) -> None:
        if effect.kind in ("write", "truncate", "punch"):
            effect.apply(self.cached[effect.inode])
            self.pending.append(self._by_sectors(effect))
        elif effect.kind == "fsync":
            for written in self.pending:
                if written.inode == effect.inode:
                    written.apply(self.durable[effect.inode])
            self.pending = [written for written in self.pending if written.inode != effect.inode]
        elif effect.kind == "create":
            self.durable[effect.inode], self.cached[effect.inode] = SparseBytes(), SparseBytes()
            self.names[effect.path] = effect.inode
        else:
            inode = self.names.pop(effect.path)
            if effect.target is not None:
                self.names[effect.target] = inode

    def _by_sectors(self, effect: Effect) -> Effect:
        """Return the write or hole with its first and last sector completed: storage takes them from the cache."""
        length = effect.length if effect.kind == "punch" else len(effect.data)
        if effect.kind == "truncate" or not length:
            return effect
        start = effect.offset // SECTOR * SECTOR
        end = -(-(effect.offset + length) // SECTOR) * SECTOR
        data = self.cached[effect.inode].read(start, end - start)
        return Effect("write", effect.inode, effect.path, start, data)

    def after(self, survivors: list[Effect]) -> dict[Path, SparseBytes]:
        """Return the named files if of the pending effects just these reached the storage."""
        contents = {inode: self.durable[inode].copy() for inode in self.names.values()}
        for effect in survivors:
            if effect.inode in contents:
                effect.apply(contents[effect.inode])
        return {path: contents[inode] for path, inode in self.names.items()}


def crash_points(record: RecordingFiles, *, seeds: int = 2, start: int = 0) -> Iterator[CrashPoint]:
    """Yield every crash point of the record from effect ``start`` on, ``seeds`` random choices at each among them."""
    storage = _Storage(record)
    for ordinal in range(len(record.effects) + 1):
        if ordinal >= start:
            marks = tuple(value for at, value in record.marks if at <= ordinal)
            for mode, survivors in _choices(storage.pending, ordinal, seeds):
                yield CrashPoint(ordinal, mode, storage.after(survivors), marks)
        if ordinal < len(record.effects):
            storage.take(record.effects[ordinal])


def crash_now(record: RecordingFiles, seed: int) -> CrashPoint:
    """Return one state in which a crash after everything recorded so far could leave the files."""
    storage = _Storage(record)
    for effect in record.effects:
        storage.take(effect)
    choices = list(_choices(storage.pending, seed, seeds=2))
    mode, survivors = choices[seed % len(choices)]
    marks = tuple(value for _, value in record.marks)
    return CrashPoint(len(record.effects), mode, storage.after(survivors), marks)


def _choices(pending: list[Effect], ordinal: int, seeds: int) -> Iterator[tuple[str, list[Effect]]]:
    yield "none", []
    if not pending:
        return
    yield "all", pending
    last = pending[-1]
    chance = random.Random(ordinal)
    if last.kind == "write" and len(last.data) > SECTOR:
        yield "torn", [*pending[:-1], last.torn(chance.randrange(1, len(last.data) // SECTOR + 1))]
    if len(pending) < 2:
        return
    for seed in range(seeds):
        chance = random.Random(f"{ordinal}/{seed}")
        survivors = []
        for effect in pending:
            if chance.random() < 0.5:
                tear = effect.kind == "write" and len(effect.data) > SECTOR and chance.random() < 0.3
                survivors.append(effect.torn(chance.randrange(1, len(effect.data) // SECTOR + 1)) if tear else effect)
        yield f"seed {seed}", survivors


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for the many states of a crash test, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
