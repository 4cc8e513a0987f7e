"""Files as the operating system gives them: positional reads and writes, holes, locks and durable names.

This module, with ``oslock`` beside it, is the one place that knows which calls a system has. Above it, a file is the
``File`` protocol and a file system the ``Files`` protocol; tests put other implementations behind both. Two files are
at hand: ``PosixFile`` (pread, pwrite, SEEK_DATA, hole punching) and ``PortableFile`` (a lock around seek and read;
Windows uses it).

Every OSError becomes a ``vhdx.errors.OsError`` that names the path, with a hint where one is known; the OSError stays
its ``__cause__``, so that a caller can look at ``errno``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeAlias

from vhdx.errors import OsError, OutOfRangeError, ReadOnlyError
from vhdx.oslock import lock_for_writing

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview

ZEROS = memoryview(bytes(1 << 20))  # what zeroing without holes writes, a MiB at a time
LARGEST_CALL_BYTES = 1 << 30  # systems cap one read or write below 2 GiB; longer ones are split here
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
RENAME_NOREPLACE = 0x01
AT_FDCWD = -100

HINTS = {
    errno.ENOSPC: "free some space on that file system, or choose another folder",
    errno.EDQUOT: "raise the quota of that file system, or choose another folder",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the owner, permissions and attributes of the file and of its folder",
    errno.ENOENT: "check that the path is written right and that its file system is mounted",
    errno.EROFS: "the file system is mounted read-only: choose another folder or remount it",
    errno.EEXIST: "remove the file, or choose another name",
    errno.EFBIG: "this file system or a resource limit forbids files that large",
    errno.EIO: "the storage under the file failed: look at the system's log",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def os_error(error: OSError, path: Path | str, operation: str) -> OsError:
    """Return the OsError that tells of ``error``, met during ``operation`` on ``path``."""
    reason = error.strerror or str(error)
    hint = HINTS.get(error.errno) if error.errno is not None else None
    return OsError(f"cannot {operation}: {reason}", path=str(path), hint=hint)


@contextlib.contextmanager
def translated(path: Path | str, operation: str) -> Iterator[None]:
    """Turn an OSError raised inside into an OsError that names ``path`` and ``operation``."""
    try:
        yield
    except OSError as error:
        raise os_error(error, path, operation) from error


class File(Protocol):
    """An open file. Positional calls may come from several threads at once. Offsets and lengths are bytes.

    Every call raises OsError where the system refuses, and a call on a closed file does too.
    """

    @property
    def path(self) -> Path:
        """The path it was opened by."""

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""

    def size(self) -> int:
        """Return the file's present length."""

    def pread(self, offset: int, length: int) -> bytes:
        """Return the ``length`` bytes from ``offset``; fewer only where the file ends."""

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` and return the bytes filled; fewer only where the file ends."""

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        """Write all of ``data`` at ``offset``, growing the file where needed."""

    def truncate(self, size: int) -> None:
        """Set the file's length; a longer file reads as zeros past its old end."""

    def fsync(self) -> None:
        """Return once what was written is on stable storage, the file's length included."""

    def punch_hole(self, offset: int, length: int) -> bool:
        """Make the range read as zeros without changing the file's length.

        Return True where its storage was given back, False where zeros were written.
        """

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield half-open ranges within [start, end), ascending, outside which the file holds nothing but zeros.

        The ranges end with the file. Where the system cannot tell, the whole range is data.
        """

    def close(self) -> None:
        """Let the file and its lock go. Safe to repeat."""


class Files(Protocol):
    """A file system: opens, names and removes files. Raises OsError like ``File``."""

    def open(self, path: Path, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
        """Open as ``open_file`` does."""

    def replace(self, source: Path, target: Path) -> None:
        """Rename as ``replace_file`` does."""

    def link_exclusive(self, temporary: Path, target: Path) -> bool:
        """Name as ``link_exclusive`` does."""

    def remove(self, path: Path) -> None:
        """Remove the file's name; one that does not exist is no error."""


class PortableFile:
    """A file through nothing but seek, read and write: a lock makes the pair positional."""

    def __init__(self, path: Path, *, writable: bool = False, create: bool = False) -> None:
        self._path = path
        self._writable = writable
        self._lock = threading.Lock()
        mode = "xb+" if create else ("rb+" if writable else "rb")
        with translated(path, "create the file" if create else "open the file"):
            self._raw = io.FileIO(path, mode)

    @property
    def path(self) -> Path:
        """The path it was opened by."""
        return self._path

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writable

    @property
    def descriptor(self) -> int:
        """The descriptor, for the lock."""
        return self._raw.fileno()

    def size(self) -> int:
        """Return the file's present length."""
        with self._doing("ask for the size"), self._lock:
            return self._raw.seek(0, os.SEEK_END)

    def pread(self, offset: int, length: int) -> bytes:
        """Return the ``length`` bytes from ``offset``; fewer only where the file ends."""
        _check_range(self._path, offset, length)
        buffer = bytearray(min(length, max(0, self.size() - offset)))
        done = self.pread_into(offset, memoryview(buffer))
        return bytes(memoryview(buffer)[:done])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only where the file ends."""
        view = buffer.cast("B")
        _check_range(self._path, offset, len(view))
        done = 0
        with self._doing("read"), self._lock:
            self._raw.seek(offset)
            while done < len(view):
                count = self._raw.readinto(view[done : done + LARGEST_CALL_BYTES])
                if not count:
                    break
                done += count
        return done

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        """Write all of ``data`` at ``offset``."""
        view = _writing(self, offset, data)
        with self._doing("write"), self._lock:
            self._raw.seek(offset)
            while view:
                view = view[self._raw.write(view[:LARGEST_CALL_BYTES]) or 0 :]

    def truncate(self, size: int) -> None:
        """Set the file's length."""
        _check_writable(self)
        with self._doing("change the file's size"), self._lock:
            self._raw.truncate(size)

    def fsync(self) -> None:
        """Return once what was written is on stable storage."""
        with self._doing("flush"):
            os.fsync(self._raw.fileno())

    def punch_hole(self, offset: int, length: int) -> bool:
        """Zero the range by writing; nothing is given back."""
        _zero_by_writing(self, offset, length)
        return False

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the whole range: seek and read cannot tell a hole."""
        end = min(end, self.size())
        if start < end:
            yield start, end

    def close(self) -> None:
        """Let the file and its lock go. Safe to repeat."""
        with self._doing("close"):
            self._raw.close()

    @contextlib.contextmanager
    def _doing(self, operation: str) -> Iterator[None]:
        try:
            with translated(self._path, operation):
                yield
        except ValueError as error:  # what io says of a closed file
            raise OsError(f"cannot {operation}: the file is closed", path=str(self._path)) from error


if sys.platform != "win32":

    class PosixFile:
        """A file through pread and pwrite, with holes where the file system has them."""

        def __init__(self, path: Path, *, writable: bool = False, create: bool = False) -> None:
            self._path = path
            self._writable = writable
            flags = os.O_RDWR if writable or create else os.O_RDONLY
            if create:
                flags |= os.O_CREAT | os.O_EXCL
            with translated(path, "create the file" if create else "open the file"):
                self._descriptor = os.open(path, flags, 0o666)
                try:
                    if stat.S_ISDIR(os.fstat(self._descriptor).st_mode):
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                except OSError:
                    os.close(self._descriptor)
                    raise

        @property
        def path(self) -> Path:
            """The path it was opened by."""
            return self._path

        @property
        def writable(self) -> bool:
            """Whether it was opened for writing."""
            return self._writable

        @property
        def descriptor(self) -> int:
            """The descriptor. Raises OSError once the file is closed."""
            if self._descriptor < 0:
                raise OSError(errno.EBADF, "the file is closed")
            return self._descriptor

        def size(self) -> int:
            """Return the file's present length; a block device's too."""
            with translated(self._path, "ask for the size"):
                status = os.fstat(self.descriptor)
                if stat.S_ISBLK(status.st_mode):
                    return os.lseek(self.descriptor, 0, os.SEEK_END)
                return status.st_size

        def pread(self, offset: int, length: int) -> bytes:
            """Return the ``length`` bytes from ``offset``; fewer only where the file ends."""
            _check_range(self._path, offset, length)
            with translated(self._path, "read"):
                data = os.pread(self.descriptor, min(length, LARGEST_CALL_BYTES), offset)
                if len(data) == length or not data:
                    return data
                parts = [data]
                done = len(data)
                while done < length:
                    more = os.pread(self.descriptor, min(length - done, LARGEST_CALL_BYTES), offset + done)
                    if not more:
                        break
                    parts.append(more)
                    done += len(more)
            return b"".join(parts)

        def pread_into(self, offset: int, buffer: memoryview) -> int:
            """Fill ``buffer`` from ``offset``; fewer bytes only where the file ends."""
            view = buffer.cast("B")
            _check_range(self._path, offset, len(view))
            done = 0
            with translated(self._path, "read"):
                while done < len(view):
                    count = os.preadv(self.descriptor, [view[done : done + LARGEST_CALL_BYTES]], offset + done)
                    if not count:
                        break
                    done += count
            return done

        def pwrite(self, offset: int, data: ReadableBuffer) -> None:
            """Write all of ``data`` at ``offset``."""
            view = _writing(self, offset, data)
            with translated(self._path, "write"):
                while view:
                    count = os.pwrite(self.descriptor, view[:LARGEST_CALL_BYTES], offset)
                    offset += count
                    view = view[count:]

        def truncate(self, size: int) -> None:
            """Set the file's length."""
            _check_writable(self)
            with translated(self._path, "change the file's size"):
                os.ftruncate(self.descriptor, size)

        def fsync(self) -> None:
            """Return once what was written is on stable storage."""
            with translated(self._path, "flush"):
                os.fsync(self.descriptor)

        def punch_hole(self, offset: int, length: int) -> bool:
            """Give the range's storage back, or write zeros where that cannot be done."""
            _check_writable(self)
            _check_range(self._path, offset, length)
            with translated(self._path, "punch a hole"):
                if length and _fallocate(self.descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
                    return True
            _zero_by_writing(self, offset, length)
            return False

        def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
            """Yield the ranges that the file system says hold data."""
            end = min(end, self.size())
            position = start
            while position < end:
                try:
                    data = os.lseek(self.descriptor, position, os.SEEK_DATA)
                    hole = os.lseek(self.descriptor, data, os.SEEK_HOLE) if data < end else end
                except OSError as error:
                    if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                        return
                    if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ESPIPE):
                        yield position, end
                        return
                    raise os_error(error, self._path, "look for holes") from error
                if data >= end:
                    return
                yield data, min(hole, end)
                position = hole

        def close(self) -> None:
            """Let the file and its lock go. Safe to repeat."""
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                with translated(self._path, "close"):
                    os.close(descriptor)


def _check_range(path: Path, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > 1 << 63:
        raise OutOfRangeError(f"a file has no range of {length} bytes at {offset}", path=str(path))


def _check_writable(file: File) -> None:
    if not file.writable:
        raise ReadOnlyError("the file was opened for reading", path=str(file.path))


def _writing(file: File, offset: int, data: ReadableBuffer) -> memoryview:
    _check_writable(file)
    view = memoryview(data).cast("B")
    _check_range(file.path, offset, len(view))
    return view


def _zero_by_writing(file: File, offset: int, length: int) -> None:
    """Write zeros over the part of the range that the file has; past its end it reads as nothing already."""
    end = min(offset + length, file.size())
    while offset < end:
        piece = ZEROS[: min(len(ZEROS), end - offset)]
        file.pwrite(offset, piece)
        offset += len(piece)


def _c_function(name: str) -> ctypes._NamedFuncPointer | None:
    """Return the C library's function on Linux, None elsewhere or where it has none of that name."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(None, use_errno=True)[name]
    return None


_FALLOCATE = _c_function("fallocate")
_RENAMEAT2 = _c_function("renameat2")


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> bool:
    if _FALLOCATE is None:
        return False
    result = _FALLOCATE(ctypes.c_int(descriptor), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length))
    return int(result) == 0


def _rename_no_replace(source: Path, target: Path) -> bool | None:
    """Rename unless the target exists; None where the system cannot promise that."""
    if _RENAMEAT2 is None:
        return None
    result = _RENAMEAT2(
        ctypes.c_int(AT_FDCWD),
        os.fsencode(source),
        ctypes.c_int(AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(RENAME_NOREPLACE),
    )
    if int(result) == 0:
        return True
    return False if ctypes.get_errno() == errno.EEXIST else None


def open_file(path: Path | str, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
    """Open a file for positional access; with ``create`` a new one, which must not exist yet (and is writable).

    A writable file is locked against other writers, QEMU among them, unless ``lock`` is False; readers take no lock.
    Raises OsError, and DiskBusyError where another program has it.
    """
    path = Path(path)
    writable = writable or create
    file = _new_file(path, writable=writable, create=create)
    if writable and lock:
        try:
            with translated(path, "lock the file"):
                lock_for_writing(file.descriptor, path)
        except BaseException:
            file.close()
            raise
    return file


if sys.platform == "win32":
    _new_file = PortableFile
else:
    _new_file = PosixFile


def fsync_folder(folder: Path | str) -> None:
    """Make the names in ``folder`` durable. Windows has no such call and keeps names in its journal."""
    if sys.platform != "win32":
        with translated(folder, "flush the folder"):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
                    raise
            finally:
                os.close(descriptor)


def replace_file(source: Path | str, target: Path | str) -> None:
    """Rename ``source`` to ``target``, taking the place of what has that name, durably. Both in one file system.

    The content of ``source`` must have been flushed before. On Windows neither file may be open.
    """
    with translated(target, "rename the finished file into place"):
        Path(source).replace(target)
    fsync_folder(Path(target).parent)


def link_exclusive(temporary: Path | str, target: Path | str) -> bool:
    """Give ``temporary`` the name ``target`` if no file has it, atomically and durably; its old name goes.

    Return False where ``target`` exists; ``temporary`` is then left as it was.
    """
    temporary, target = Path(temporary), Path(target)
    try:
        if sys.platform == "win32":
            os.rename(temporary, target)  # noqa: PTH104 - Path.rename says that it may replace
        else:
            os.link(temporary, target)
            temporary.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        # A file system without hard links (FAT, some network ones) may still rename without replacing.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise os_error(error, target, "give the finished file its name") from error
        renamed = _rename_no_replace(temporary, target)
        if renamed is None:
            raise os_error(error, target, "give the finished file its name") from error
        if not renamed:
            return False
    fsync_folder(target.parent)
    return True


def remove_file(path: Path | str) -> None:
    """Remove the file's name, durably; one that does not exist is no error."""
    with translated(path, "remove the file"):
        try:
            Path(path).unlink()
        except FileNotFoundError:
            return
    fsync_folder(Path(path).parent)


class OsFiles:
    """The operating system's own files, as a ``Files``."""

    def open(self, path: Path, *, writable: bool = False, create: bool = False, lock: bool = True) -> File:
        """Open as ``open_file`` does."""
        return open_file(path, writable=writable, create=create, lock=lock)

    def replace(self, source: Path, target: Path) -> None:
        """Rename as ``replace_file`` does."""
        replace_file(source, target)

    def link_exclusive(self, temporary: Path, target: Path) -> bool:
        """Name as ``link_exclusive`` does."""
        return link_exclusive(temporary, target)

    def remove(self, path: Path) -> None:
        """Remove as ``remove_file`` does."""
        remove_file(path)


OS_FILES = OsFiles()
