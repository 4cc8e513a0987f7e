"""Locks on open image files: one writer at a time, and none beside a running machine.

Between programs like this one the lock is flock (a locked byte on Windows). QEMU does not look at that: it marks what
it does with a file by shared locks on certain bytes, and looks for the marks of others. On Linux the same bytes are
taken, so that a disk of a running machine is not changed here, nor one started that is being changed here.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path
from typing import Final

from vhdx.errors import DiskBusyError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCKED_BYTE: Final = 1 << 62  # Windows locks byte ranges and enforces them: one far past any image's end hides no data
QEMU_USES: Final = 100  # QEMU locks this byte plus the number of what it does with a file…
QEMU_FORBIDS: Final = 200  # …and this one plus the number of what nobody else may do meanwhile
QEMU_READ, QEMU_WRITE, QEMU_RESIZE = 0, 1, 3

_FLOCK = struct.Struct("=hh4xqqi4x")  # type, whence, start, length, process: as 64-bit Linux has it
assert _FLOCK.size == 32

_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


def lock_for_writing(descriptor: int, path: Path) -> None:
    """Lock the open file for its one writer, without waiting; the locks end when the file is closed.

    flock and not POSIX record locks: those are lost when the process closes any other descriptor of the file. QEMU's
    bytes are locked by "open file description", which is not. A file system without locks gives none.
    Raises DiskBusyError where another program has the file, OSError.
    """
    try:
        if sys.platform == "win32":
            # Seeking back is not needed: every later call seeks first.
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise DiskBusyError(
                "another writer has the file open", path=str(path), hint="wait until it is done, or stop it"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise
    if not _lock_against_qemu(descriptor):
        raise DiskBusyError(
            "another program, QEMU perhaps, has the image in use",
            path=str(path),
            hint="shut the machine down, or wait until the program is done",
        )


def _lock_against_qemu(descriptor: int) -> bool:
    """Mark the file as QEMU would that writes to it; False where the marks of another program forbid it."""
    if sys.platform == "linux" and sys.maxsize > 1 << 32:
        try:
            for action in (QEMU_READ, QEMU_WRITE, QEMU_RESIZE):
                _mark(descriptor, QEMU_USES + action)
            for action in (QEMU_WRITE, QEMU_RESIZE):
                _mark(descriptor, QEMU_FORBIDS + action)
            # Marked first, looked second: of two that come at once, at least one sees the other.
            for action in (QEMU_WRITE, QEMU_RESIZE):
                if _is_marked(descriptor, QEMU_USES + action) or _is_marked(descriptor, QEMU_FORBIDS + action):
                    return False
            return not _is_marked(descriptor, QEMU_FORBIDS + QEMU_READ)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno not in _NO_LOCKS:
                raise
    return True


def is_used_by_qemu(descriptor: int) -> bool:
    """Whether another program says of the open file, as QEMU does, that it reads or writes it. Nothing is locked."""
    if sys.platform == "linux" and sys.maxsize > 1 << 32:
        try:
            return any(_is_marked(descriptor, first, length=100) for first in (QEMU_USES, QEMU_FORBIDS))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return False


if sys.platform == "linux":

    def _mark(descriptor: int, byte: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))

    def _is_marked(descriptor: int, byte: int, length: int = 1) -> bool:
        """Whether another open file has a lock on any of the bytes: whether they could not be locked for this alone."""
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, length, 0)
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted)
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
