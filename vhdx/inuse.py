"""Who has an image open: asked without locking anything, so that to look keeps nobody from starting."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from vhdx.errors import OsError
from vhdx.osfile import PortableFile, translated
from vhdx.oslock import is_used_by_qemu

QEMU: Final = "QEMU"
WRITER: Final = "a writer"
SHARING_VIOLATION: Final = 32  # of Windows: another program lets nobody write to the file
MOST_LOCKS_BYTES: Final = 4 << 20  # of the kernel's table


def user_of(path: Path) -> str | None:
    """Return who has the file in use: QEMU, a program that writes to it; None where nobody is known to.

    What another host has open, through a share, is not seen. Raises OsError where the file cannot be opened.
    """
    return _user_of(path)


if sys.platform == "win32":

    def _user_of(path: Path) -> str | None:
        try:
            PortableFile(path, writable=True).close()
        except OsError as error:
            if getattr(error.__cause__, "winerror", None) == SHARING_VIOLATION:
                return WRITER
            PortableFile(path).close()  # that it may not be written to by us says nothing of others
        return None

else:

    def _user_of(path: Path) -> str | None:
        with translated(path, "open the file"):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if is_used_by_qemu(descriptor):
                    return QEMU
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
        return WRITER if _is_flocked(status) else None

    def _is_flocked(status: os.stat_result) -> bool:
        """Whether Linux's table of locks has an exclusive flock on the file."""
        try:
            with open("/proc/locks", "rb") as file:  # noqa: PTH123 - no file of a disk
                table = file.read(MOST_LOCKS_BYTES).decode("ascii", "replace")
        except OSError:
            return False
        return any(_is_lock_on(line.split(), status) for line in table.splitlines())

    def _is_lock_on(fields: list[str], status: os.stat_result) -> bool:
        """``fields`` are such as ``1: FLOCK ADVISORY WRITE 4711 08:01:1310726 0 EOF``."""
        if len(fields) < 6 or fields[1] != "FLOCK" or fields[3] != "WRITE":
            return False
        major, _, rest = fields[5].partition(":")
        minor, _, inode = rest.partition(":")
        if inode != str(status.st_ino):
            return False
        # Of file systems without a device of their own (btrfs, overlays), the table tells another number than stat.
        device = (os.major(status.st_dev), os.minor(status.st_dev))
        try:
            return device[0] == 0 or device == (int(major, 16), int(minor, 16))
        except ValueError:
            return False
