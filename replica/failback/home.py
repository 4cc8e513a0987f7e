"""Bringing a VM's disks home: built beside the home disks, looked at, swapped in, and one file each afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from conversion.manifest import Manifest
from replica.blockmap import BlockMap, FetchPart
from replica.catalog import ProtectedVm
from replica.errors import UsageError
from replica.failback.building import Fetching, build_copy, build_overlay
from replica.failback.content import ExactView
from replica.failback.counted import CountedStore
from replica.failback.difference import maps_of
from replica.failback.examination import Base, Examined, Touched, examine
from replica.failback.goal import Goal, Way, goal_alone, goal_over, is_goal
from replica.failback.hashing import Hasher
from replica.failback.names import OS_HOME_FILES, HomeFiles, Names, same_file
from replica.failback.ranges import extents_from, intersected
from replica.failback.swap import discard, is_swapped, put_back, refuse_children, refuse_taken, settle, swap
from replica.generation.image import Image
from replica.host import Host
from replica.mapstore import MapStore, map_cache
from replica.model import DiskRecord, Point
from replica.reader import BlockReader
from replica.source import is_live
from replica.stores.store import Store
from replica.view import PointView
from replica.workers import Workers
from vhdx.bulk import file_exists, name_file
from vhdx.convert import ConvertFormat
from vhdx.disk import Disk
from vhdx.errors import OsError
from vhdx.extents import merged
from vhdx.formats import chain_of, detect_format, open_disk
from vhdx.osfile import translated
from vhdx.progress import Progress, silent
from vhdx.vhd import FixedVhdDisk

How = Literal["overlay", "copy", "new", "was-home"]


@dataclass(frozen=True, slots=True)
class HomeDisk:
    """Where a disk goes: onto the file at ``path`` that it came from, or into a new file of the format ``new``."""

    number: int
    path: Path
    new: ConvertFormat | None = None


@dataclass(frozen=True, slots=True)
class DiskAtHome:
    """A disk that came home. ``compared``: all that was there was read; ``kept``: the old disk, where it was kept."""

    number: int
    name: str
    path: Path
    how: How
    size_bytes: int
    differing_bytes: int  # of the home disk from what it was to hold
    written_bytes: int
    overwritten_bytes: int  # of what no point held
    compared: bool
    because: str
    kept: Path | None = None

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "number": self.number,
            "name": self.name,
            "path": str(self.path),
            "how": self.how,
            "size_bytes": self.size_bytes,
            "differing_bytes": self.differing_bytes,
            "written_bytes": self.written_bytes,
            "overwritten_bytes": self.overwritten_bytes,
            "compared": self.compared,
            "because": self.because,
            "kept": None if self.kept is None else str(self.kept),
        }


@dataclass(frozen=True, slots=True)
class Homecoming:
    """What came home. ``left`` are home disks that the newest point no longer has: they stay as they are."""

    point: int
    disks: tuple[DiskAtHome, ...]
    left: tuple[str, ...]
    fetched_bytes: int

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "point": self.point,
            "disks": [one.document() for one in self.disks],
            "left": list(self.left),
            "fetched_bytes": self.fetched_bytes,
            "written_bytes": sum(one.written_bytes for one in self.disks),
        }


def never(touched: Touched) -> bool:
    """Refuse to overwrite what no point holds: the default where nobody was asked."""
    return False


def bring_home(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    base: Point | None,
    newest: Point,
    homes: Sequence[HomeDisk],
    conversions: Mapping[int, Manifest] | None = None,
    may_overwrite: Callable[[Touched], bool] = never,
    keep_old: bool = False,
    check_all: bool = False,
    workers: Workers | None = None,
    progress: Progress = silent,
    files: HomeFiles = OS_HOME_FILES,
) -> Homecoming:
    """Make the home disks hold what ``newest`` does, converted back; of the store only what differs is read.

    ``base`` is the last point that came from the home disks, None where none is kept; ``conversions`` are the
    manifests of the disks that were converted, by number. All disks are built and looked at before the first is
    swapped in. A home disk that does not prove to be as the base point has it is compared whole; what it holds that
    no point does is overwritten if ``may_overwrite`` says so. ``keep_old`` leaves the old disks under their second
    names, ``check_all`` reads all of each finished disk and not only what was written.

    The machine is off at home and the recovery machine stopped: the caller sees to that. Whatever ends this, the file
    under a home disk's name is the old disk or the finished new one, and calling it again finishes. Raises
    HomeTouchedError, UsageError, IntegrityError, StoreError, LeaseHeldError where another process is at it,
    ConversionError, DiskError.
    """
    counted = CountedStore(store)
    with host.exclusive(f"{found.vm.vm_id}-failback"):
        return _Homecoming(
            counted, host, found, base, newest, conversions or {}, may_overwrite, workers or Workers(), progress, files
        ).run(homes, keep_old=keep_old, check_all=check_all)


def forget(host: Host, found: ProtectedVm, newest: Point, homes: Sequence[HomeDisk]) -> None:
    """Remove what attempts that are not gone on with have left beside the home disks, which stay as they are.

    Raises LeaseHeldError, DiskError.
    """
    with host.exclusive(f"{found.vm.vm_id}-failback"):
        for home in homes:
            names = Names(_real(home.path), found.vm.vm_id, newest.point)
            put_back(names, OS_HOME_FILES)
            discard(names, OS_HOME_FILES)


def _real(path: Path) -> Path:
    """Return where the file itself lies: a link to it is not what is to be renamed over."""
    with translated(path, "look for the home disk"):
        return Path(os.path.realpath(path))


@dataclass(frozen=True, slots=True)
class _Built:
    """A disk that is ready to be swapped in, or that is home already."""

    names: Names
    home: DiskAtHome
    fingerprint: tuple[object, ...] = ()


class _Homecoming:
    """Bringing the disks of one VM home."""

    def __init__(
        self,
        store: CountedStore,
        host: Host,
        found: ProtectedVm,
        base: Point | None,
        newest: Point,
        conversions: Mapping[int, Manifest],
        may_overwrite: Callable[[Touched], bool],
        workers: Workers,
        progress: Progress,
        files: HomeFiles,
    ) -> None:
        self._store = store
        self._host = host
        self._found = found
        self._base = base
        self._newest = newest
        self._conversions = conversions
        self._may_overwrite = may_overwrite
        self._workers = workers
        self._progress = progress
        self._files = files

    def run(self, homes: Sequence[HomeDisk], *, keep_old: bool, check_all: bool) -> Homecoming:
        """Build all, swap all, settle all."""
        records = self._records(homes)
        built = [self._built(one, records[one.number], whole=check_all) for one in homes]
        for one in built:
            self._check_unchanged(one)
        for one in built:
            self._swapped(one)
        done = [self._settled(one, keep_old=keep_old) for one in built]
        numbers = {disk.number for disk in self._newest.disks}
        left = () if self._base is None else tuple(one.name for one in self._base.disks if one.number not in numbers)
        return Homecoming(self._newest.point, tuple(done), left, self._store.fetched_bytes)

    def _records(self, homes: Sequence[HomeDisk]) -> dict[int, DiskRecord]:
        """Return the newest point's disks by number, each of which has a place to go. Raises UsageError."""
        records = {disk.number: disk for disk in self._newest.disks}
        numbers = [one.number for one in homes]
        unknown = [number for number in numbers if number not in records]
        missing = [disk for disk in self._newest.disks if disk.number not in numbers]
        if unknown or len(set(numbers)) != len(numbers):
            raise UsageError(
                f"point {self._newest.point} has no disk {unknown[0]}" if unknown else "a disk is named twice",
                hint=f"it has {', '.join(f'{disk.number} ({disk.name})' for disk in self._newest.disks)}",
            )
        if missing:
            raise UsageError(
                f"disk {missing[0].number} ({missing[0].name}) has no place at home: it was added since",
                hint="say where it is to go",
            )
        paths = [_real(one.path) for one in homes if not is_live(str(one.path))]
        if len(set(paths)) != len(paths):
            raise UsageError("two disks would come home to one file")
        return records

    def _built(self, home: HomeDisk, record: DiskRecord, *, whole: bool) -> _Built:
        """Build one disk beside its home disk, and look at it."""
        names = Names(_real(home.path), self._found.vm.vm_id, self._newest.point)
        if home.new is not None:
            return self._built_new(names, record, home.new)
        put_back(names, self._files)
        self._check_home(names.home)
        for path in names.leftovers():
            self._files.remove(path)
        if is_swapped(names, self._files):
            return _Built(names, _at_home(names, record, "was-home", "an earlier attempt put it in place"))
        with self._home(names.home) as (disk, format_), self._view(record) as view:
            overlay = disk.format == "vhdx" and disk.size <= record.size
            if overlay:
                refuse_children(names, self._files)
            fingerprint = _fingerprint(disk)
            way = self._way(record)
            examined = examine(disk, self._base_of(record), way.map, record, self._hasher("comparing"))
            with goal_over(disk, examined, way, view) as goal:
                overwritten = self._overwriting(names, examined, goal, disk)
                if not goal.bytes and disk.size == record.size:
                    self._files.remove(names.building)
                    return _Built(names, _at_home(names, record, "was-home", examined.why, examined))
                if overlay:
                    written = build_overlay(
                        names,
                        goal,
                        self._fetching(),
                        self._hasher("verifying"),
                        self._files,
                        whole=whole,
                        progress=self._progress,
                    )
                else:
                    written = build_copy(
                        names, goal, format_, self._hasher("verifying"), self._files, progress=self._progress
                    )
                done = replace(
                    _at_home(names, record, "overlay" if overlay else "copy", examined.why, examined),
                    differing_bytes=goal.bytes,
                    written_bytes=written,
                    overwritten_bytes=overwritten,
                )
                return _Built(names, done, fingerprint)

    def _built_new(self, names: Names, record: DiskRecord, format_: ConvertFormat) -> _Built:
        """Build a disk where there is none; its file has its name once it is whole."""
        with translated(names.home.parent, "make the folder"):
            names.home.parent.mkdir(parents=True, exist_ok=True)
        for path in names.leftovers():
            self._files.remove(path)
        done = _at_home(names, record, "new", "there was no disk")
        view = PointView(self._store, self._host, self._found, self._newest, record, workers=self._workers)
        with view, goal_alone(self._way(record), view) as goal:
            if names.home.exists():  # an earlier attempt may have made it
                self._files.remove(names.building)
                with Image.find(names.home).opened() as disk:
                    if not is_goal(disk, goal, self._hasher("comparing")):
                        raise file_exists(names.home)
                return _Built(names, replace(done, how="was-home", because="an earlier attempt made it"))
            hasher = self._hasher("verifying")
            written = build_copy(names, goal, format_, hasher, self._files, progress=self._progress)
        return _Built(names, replace(done, written_bytes=written))

    def _check_unchanged(self, built: _Built) -> None:
        """Raise OsError where a disk cannot be put in its place: before the first is."""
        if built.home.how in ("new", "was-home"):
            return
        refuse_taken(built.names)
        with self._home(built.names.home) as (disk, _):
            if _fingerprint(disk) != built.fingerprint:
                raise OsError(
                    "the home disk was written to while it was brought home",
                    path=str(built.names.home),
                    hint="turn the machine off at home, and run failback again",
                )

    def _swapped(self, built: _Built) -> None:
        """Put a built disk in its place."""
        if built.home.how == "new":
            name_file(self._files, built.names.building, built.names.home, overwrite=False)
        elif built.home.how != "was-home":
            swap(built.names, self._files, overlay=built.home.how == "overlay")

    def _settled(self, built: _Built, *, keep_old: bool) -> DiskAtHome:
        """Make one file of the two, unless both are to stay."""
        names, home = built.names, built.home
        if home.how == "new" or not names.before.exists():
            return home
        if home.how == "was-home" and not self._is_ours(built):
            return home
        if keep_old:
            return replace(home, kept=names.before)
        why_not = settle(names, self._files, progress=self._progress)
        return home if not why_not else replace(home, kept=names.before, because=f"{home.because}; {why_not}")

    def _is_ours(self, built: _Built) -> bool:
        """Whether the file with the old disk's second name is what this attempt has left, or an earlier part of it."""
        names = built.names
        return built.home.compared or same_file(names.before, names.home) or is_swapped(names, self._files)

    def _overwriting(self, names: Names, examined: Examined, goal: Goal, home: Disk) -> int:
        """Return how much would be overwritten that no point holds, if that is allowed. Raises HomeTouchedError."""
        record = goal.way.record
        lost = intersected(examined.touched, goal.extents)
        if home.size > record.size:
            past = extents_from([(record.size, home.size)])
            lost = merged([lost, intersected(examined.touched, past)])
        if not len(lost):
            return 0
        touched = Touched(record.number, record.name, str(names.home), lost, examined.why)
        if not self._may_overwrite(touched):
            raise touched.error()
        return touched.bytes

    def _check_home(self, path: Path) -> None:
        """Raise where the home disk is not there, is no file, or is in use."""
        with translated(path, "look for the home disk"):
            mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(
                "a disk comes home into a file, and this is none", path=str(path), hint="restore the point onto it"
            )
        self._files.open(path, writable=True).close()  # refused where a machine has it

    @contextmanager
    def _home(self, path: Path) -> Iterator[tuple[Disk, ConvertFormat]]:
        """Open a home disk for reading, and tell in which format another in its place is to be."""
        known = detect_format(path, files=self._files)
        if known == "qcow2":
            with Image(path, known).opened() as disk:
                yield disk, "qcow2"
            return
        with open_disk(path, format=known, files=self._files) as disk:
            if known == "vhd":
                yield disk, "vhd" if isinstance(disk, FixedVhdDisk) else "vhd-dynamic"
            else:
                yield disk, "vhdx" if known == "vhdx" else "raw"

    def _fetch(self) -> FetchPart:
        return MapStore(self._store, self._found.keys, map_cache(self._host)).fetch

    def _base_of(self, record: DiskRecord) -> Base | None:
        if self._base is None:
            return None
        found = [one for one in self._base.disks if one.number == record.number]
        return Base(found[0], *maps_of(self._base.maps, self._newest.maps, self._fetch())) if found else None

    def _way(self, record: DiskRecord) -> Way:
        return Way(
            record,
            BlockMap(self._newest.maps, self._fetch()),
            self._found.vm.hash_seed,
            f"{self._found.vm.vm_id}/{self._newest.point}",
            self._conversions.get(record.number),
        )

    def _view(self, record: DiskRecord) -> PointView:
        return ExactView(self._store, self._host, self._found, self._newest, record, workers=self._workers)

    def _fetching(self) -> Fetching:
        reader = BlockReader(self._store, self._found.keys.tenant, self._found.vm.hash_seed)
        return Fetching(reader, self._workers.fetches(self._store.url))

    def _hasher(self, phase: str) -> Hasher:
        return Hasher(self._found.vm.hash_seed, self._workers, self._progress, phase)


def _at_home(names: Names, record: DiskRecord, how: How, because: str, examined: Examined | None = None) -> DiskAtHome:
    compared = examined is not None and examined.compared
    return DiskAtHome(record.number, record.name, names.home, how, record.size, 0, 0, 0, compared, because)


def _fingerprint(disk: Disk) -> tuple[object, ...]:
    """Return size, time and place of each file that a disk is made of."""
    marks: list[object] = []
    for path in chain_of(disk):
        with translated(path, "ask for the file's times"):
            status = path.stat()
        marks.append((path, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(marks)
