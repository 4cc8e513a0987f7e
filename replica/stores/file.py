"""The store in a folder: one file per object, made whole before it has its name.

Layout of the folder::

    .godwit/marker      tells that the store is really here, and not an empty mount point
    .godwit/lock-00…    taken by whoever compares and then changes an object
    .godwit/tmp/…       objects that are being written; a crash may leave some behind, which are removed after a day
    <key>               the objects, with the key's parts as folders

Why the writes are ordered as they are. An object's bytes are flushed before it gets its name, so that no crash shows
half an object. The name is given by a call that fails where the name is taken, so that two creators cannot both win.
The folder is flushed before the call returns, so that what was reported stays; and each folder that this process uses
for the first time is flushed together with its parents, because another process may have made it without yet having
got to that. A replacement compares the tag and renames under a lock that processes share.

Tags. Up to 64 KiB a tag is a digest of the content, read again each time: two hosts that share the folder over a
network see each other's changes however late file attributes arrive. Larger objects would cost a read of them for each
line of a listing, so theirs is the size and the time of the last change in nanoseconds, which is set here: never twice
the same for one key, whatever the resolution of the file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import xxhash

from replica.errors import (
    NoStoreError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
    UsageError,
)
from replica.stores.key import RESERVED_PART, check_key, check_prefix
from replica.stores.store import ObjectData, ObjectInfo
from vhdx.errors import DiskBusyError, DiskError
from vhdx.osfile import HINTS, OS_FILES, Files, fsync_folder

MARKER_TEXT: Final = b"This folder is an object store of Godwit. This file tells that the store is mounted: keep it.\n"
DIGEST_LIMIT_BYTES: Final = 64 << 10
LOCK_COUNT: Final = 16
LOCK_LIMIT_SECONDS: Final = 30.0
STALE_SECONDS: Final = 24 * 3600
COARSEST_NS: Final = 2_000_000_000  # FAT keeps times to two seconds

_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
_KINDS: Final[tuple[tuple[frozenset[int], type[StoreError]], ...]] = (
    (frozenset({errno.ENOSPC, errno.EDQUOT}), StoreFullError),
    (frozenset({errno.EACCES, errno.EPERM, errno.EROFS}), StoreRefusedError),
    (
        frozenset(
            {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EAGAIN, errno.EBUSY, errno.EMFILE}
        ),
        StoreUnavailableError,
    ),
)


class FileStore:
    """Objects as files below ``root``. Any number of threads and processes may use the folder at once.

    With ``create`` the folder is made a store if it is none yet; without, NoStoreError is raised where the marker
    is missing. ``files`` does the writing, ``clock_ns`` tells the time since the epoch.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        create: bool = False,
        files: Files = OS_FILES,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._root = Path(root).absolute()
        self._reserved = self._root / RESERVED_PART
        self._marker = self._reserved / "marker"
        self._temporaries = self._reserved / "tmp"
        self._files = files
        self._clock_ns = clock_ns
        self._locks = [threading.Lock() for _ in range(LOCK_COUNT)]
        self._folders_lock = threading.Lock()
        self._durable_folders: set[Path] = set()
        self._swept = False
        with self._translated("", "open the store"):
            if create:
                self._prepare()
            if not self._marker.exists():
                raise NoStoreError(
                    "there is no store in this folder",
                    path=str(self._root),
                    hint="mount its file system if it has one of its own, or make a store here with: godwit init",
                )

    @property
    def url(self) -> str:
        """The folder as a ``file://`` URL."""
        return self._root.as_uri()

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes or a range of them; see ``Store.get``."""
        with self._translated(key, "read the object"):
            file = self._files.open(self._path(key))
            try:
                size = file.size()
                begin = max(0, size + start) if start < 0 else min(start, size)
                wanted = size - begin if length is None else min(length, size - begin)
                data = file.pread(begin, wanted)
            finally:
                file.close()
        if len(data) != wanted:
            raise StoreUnavailableError(f"{len(data)} bytes were read instead of {wanted}", key=key)
        return data

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its tag; see ``Store.get_tagged``."""
        path = self._path(key)
        while True:
            with self._translated(key, "read the object"):
                before = path.stat()
            data = self.get(key)
            if len(data) <= DIGEST_LIMIT_BYTES:
                return data, _digest_tag(data)
            with self._translated(key, "read the object"):
                after = path.stat()
            # Between two equal looks at the name it was this file throughout, for a tag never comes back.
            if _stat_tag(before) == _stat_tag(after) and after.st_size == len(data):
                return data, _stat_tag(after)

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag; see ``Store.head``."""
        with self._translated(key, "look at the object"):
            status = self._path(key).stat()
            if not _is_file(status):
                raise ObjectMissingError("no such object", key=key)
        if status.st_size > DIGEST_LIMIT_BYTES:
            return ObjectInfo(key, status.st_size, _stat_tag(status))
        data, tag = self.get_tagged(key)
        return ObjectInfo(key, len(data), tag)

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object if none exists; see ``Store.create``. Two flushes: the file's and its folder's."""
        path = self._path(key)
        with self._translated(key, "create the object"):
            self._refuse_taken(path, key)
            with self._temporary(data) as (temporary, tag):
                for _ in range(8):
                    self._make_folder(path.parent)
                    try:
                        created = self._files.link_exclusive(temporary, path)
                        break
                    except DiskError as error:
                        if _errno(error) not in _GONE or not temporary.exists():
                            raise
                        self._forget_folder(path.parent)  # somebody removed an empty folder
                else:
                    raise StoreUnavailableError("its folder is removed again and again", key=key)
            if not created:
                self._refuse_taken(path, key)
                raise ObjectExistsError("the object exists already", key=key)
        return tag

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object if its tag still is ``tag``; see ``Store.replace``."""
        path = self._path(key)
        with self._translated(key, "replace the object"):
            self._refuse_changed(key, tag)  # before the bytes are written for nothing
            with self._temporary(data) as (temporary, new_tag), self._locked(key):
                self._refuse_changed(key, tag)
                present_ns = path.stat().st_mtime_ns
                if memoryview(data).nbytes <= DIGEST_LIMIT_BYTES or temporary.stat().st_mtime_ns > present_ns:
                    later_tag = new_tag
                else:  # a clock that went back, or a file system that counts in seconds
                    later_tag = _stamp(temporary, present_ns + COARSEST_NS)
                self._files.replace(temporary, path)
        return later_tag

    def delete(self, key: str) -> None:
        """Remove the object if it is there; see ``Store.delete``."""
        path = self._path(key)
        with self._translated(key, "delete the object"), self._locked(key):
            try:
                self._files.remove(path)
            except DiskError as error:
                if _errno(error) not in _GONE and not path.is_dir():
                    raise
            self._check_mounted()

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects in key order; see ``Store.list``. Memory grows with the largest folder, not the store."""
        check_prefix(prefix)
        with self._translated(prefix, "list the objects"):
            self._check_mounted()
        return self._walk(prefix.rpartition("/")[0], prefix, start_after)

    def close(self) -> None:
        """Do nothing: no file stays open between calls."""

    def _path(self, key: str) -> Path:
        return self._root.joinpath(*check_key(key).split("/"))

    def _prepare(self) -> None:
        """Make the folder a store: the marker last, so that it vouches for the rest."""
        if self._marker.exists():
            return
        self._temporaries.mkdir(parents=True, exist_ok=True)
        for number in range(LOCK_COUNT):
            self._lock_path(number).touch()
        with self._temporary(MARKER_TEXT) as (temporary, _):
            self._files.link_exclusive(temporary, self._marker)
        for folder in (self._temporaries, self._reserved, self._root, self._root.parent):
            fsync_folder(folder)

    @contextlib.contextmanager
    def _temporary(self, data: ObjectData) -> Iterator[tuple[Path, str]]:
        """Write ``data`` to a temporary file and flush it; yield its path and tag; remove it if it is still there."""
        self._sweep()
        temporary = self._temporaries / secrets.token_hex(12)
        view = memoryview(data).cast("B")
        try:
            file = self._files.open(temporary, create=True, lock=False)
            try:
                file.pwrite(0, view)
                tag = _stamp(temporary, self._clock_ns()) if len(view) > DIGEST_LIMIT_BYTES else _digest_tag(view)
                file.fsync()
            finally:
                file.close()
            yield temporary, tag
        finally:
            # Removed without a flush: one that comes back after a crash is swept like any other.
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _sweep(self) -> None:
        """Remove, once per process, the temporaries that crashes left more than a day ago."""
        if self._swept:
            return
        self._swept = True
        if self._marker.exists():
            self._temporaries.mkdir(exist_ok=True)  # a copy of the store may lack empty folders
        oldest_ns = self._clock_ns() - STALE_SECONDS * 1_000_000_000
        with contextlib.suppress(OSError), os.scandir(self._temporaries) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime_ns < oldest_ns:
                        Path(entry.path).unlink()

    def _make_folder(self, folder: Path) -> None:
        """Make the folder and its parents where missing; return once they are durable."""
        with self._folders_lock:
            if folder in self._durable_folders:
                return
        self._check_mounted()
        folder.mkdir(parents=True, exist_ok=True)
        while folder != self._root:
            with self._folders_lock:
                known = folder in self._durable_folders
            if not known:
                fsync_folder(folder.parent)
                with self._folders_lock:
                    self._durable_folders.add(folder)
            folder = folder.parent

    def _forget_folder(self, folder: Path) -> None:
        with self._folders_lock:
            self._durable_folders.difference_update([folder, *folder.parents])

    def _lock_path(self, number: int) -> Path:
        return self._reserved / f"lock-{number:02}"

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the key's lock against the other threads and processes; wait for it for a bounded time."""
        number = zlib.crc32(key.encode()) % LOCK_COUNT
        path = self._lock_path(number)
        deadline = time.monotonic() + LOCK_LIMIT_SECONDS
        pause_seconds = 0.0005
        with self._locks[number]:
            if not path.exists():  # a copy of the store may lack empty files
                path.touch()
            while True:
                try:
                    file = self._files.open(path, writable=True, lock=True)
                    break
                except DiskBusyError as error:
                    if time.monotonic() > deadline:
                        raise StoreUnavailableError(
                            f"the lock {path} was held by another process for {LOCK_LIMIT_SECONDS:.0f} seconds",
                            key=key,
                            hint="look for a process that hangs, or a network file system that lost its lock server",
                        ) from error
                time.sleep(pause_seconds)
                pause_seconds = min(pause_seconds * 1.5, 0.02)
            try:
                yield
            finally:
                file.close()

    def _refuse_taken(self, path: Path, key: str) -> None:
        if path.is_dir():
            raise StoreError("a folder of that name holds other objects, and a file store cannot have both", key=key)
        if path.exists():
            raise ObjectExistsError("the object exists already", key=key)

    def _refuse_changed(self, key: str, tag: str) -> None:
        if self.head(key).tag != tag:
            raise ObjectChangedError("the object was changed by another", key=key)

    def _check_mounted(self) -> None:
        if not self._marker.exists():
            raise StoreUnavailableError(
                "the store's folder was here and is gone",
                path=str(self._root),
                hint="mount its file system again; if the store was removed on purpose, make a new one: godwit init",
            )

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Yield the objects below ``folder`` (a key's beginning, without its last slash) that the listing wants."""
        base = f"{folder}/" if folder else ""
        # A folder sorts by its name with the slash: 'a-b' comes before 'a/b', though 'a' comes before 'a-b'.
        names: list[str] = []
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    name = f"{base}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        name += "/"
                        wanted = (name.startswith(prefix) or prefix.startswith(name)) and (
                            name > start_after or start_after.startswith(name)
                        )
                    else:
                        wanted = name.startswith(prefix) and name > start_after and entry.is_file(follow_symlinks=False)
                    if wanted and (base or entry.name != RESERVED_PART) and _is_key(name.removesuffix("/")):
                        names.append(name)
        except (FileNotFoundError, NotADirectoryError):
            with self._translated(folder, "list the objects"):
                self._check_mounted()
            return
        except OSError as error:
            raise self._translation(error, folder, "list the objects") from error
        names.sort()
        for name in names:
            if name.endswith("/"):
                yield from self._walk(name[:-1], prefix, start_after)
            else:
                with contextlib.suppress(ObjectMissingError):  # deleted since
                    yield self.head(name)

    @contextlib.contextmanager
    def _translated(self, key: str, operation: str) -> Iterator[None]:
        """Turn the errors of the operating system into the store's."""
        try:
            yield
        except (OSError, DiskError) as error:
            raise self._translation(error, key, operation) from error

    def _translation(self, error: OSError | DiskError, key: str, operation: str) -> StoreError:
        number = _errno(error)
        if number in _GONE or (number == errno.EISDIR and key):
            try:
                self._check_mounted()
            except StoreUnavailableError as unavailable:
                return unavailable
            except OSError as again:
                return StoreUnavailableError(f"cannot {operation}: {again}", path=str(self._root))
            if key and operation != "create the object":
                return ObjectMissingError("no such object", key=key)
        kind = next((kind for numbers, kind in _KINDS if number in numbers), StoreError)
        # Windows neither renames over nor removes a file that somebody is just reading.
        passing = sys.platform == "win32" and number == errno.EACCES and operation != "open the store"
        if passing or isinstance(error, DiskBusyError):
            kind = StoreUnavailableError
        hint = error.hint if isinstance(error, DiskError) else HINTS.get(number or 0)
        return kind(f"cannot {operation}: {error}", key=key or None, path=str(self._root), hint=hint)


def _errno(error: OSError | DiskError) -> int | None:
    cause = error.__cause__ if isinstance(error, DiskError) else error
    return cause.errno if isinstance(cause, OSError) else None


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except UsageError:
        return False
    return True


def _is_file(status: os.stat_result) -> bool:
    return (status.st_mode & 0o170000) == 0o100000


def _digest_tag(data: ObjectData) -> str:
    return f"{xxhash.xxh3_128_hexdigest(data)}-{memoryview(data).nbytes}"


def _stamp(path: Path, time_ns: int) -> str:
    """Set the time of the file's last change; return the tag that follows from what the file system made of it."""
    os.utime(path, ns=(time_ns, time_ns))
    return _stat_tag(path.stat())


def _stat_tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size}"
