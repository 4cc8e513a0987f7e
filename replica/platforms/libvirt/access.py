"""Lets the user that libvirt runs QEMU as reach what it is given, by access control lists, and nothing else of ours.

The system's libvirt runs QEMU as a user of its own. That user gets the right to pass through our folders, to read and
write a machine's disks, variables and console, and to connect to the server of its disks; it can list nothing, and
what else lies in the folder keeps its mode. An owner may do this: it takes no root. The value of the attribute is that
of Linux (include/uapi/linux/posix_acl_xattr.h): a version, then entries of tag, permissions and id, in ascending order.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from xml.etree import ElementTree

from replica.errors import PlatformError

ATTRIBUTE: Final = "system.posix_acl_access"
READ: Final = 4
WRITE: Final = 2
PASS: Final = 1

_VERSION: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")  # tag, permissions, id
assert (_VERSION.size, _ENTRY.size) == (4, 8)
_ACL_VERSION: Final = 2
_OWNER, _USER, _OWNER_GROUP, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID: Final = 0xFFFFFFFF
_LIMITED: Final = (_USER, _OWNER_GROUP, _GROUP)  # by the mask


@dataclass(frozen=True, slots=True)
class QemuUser:
    """Who QEMU runs as."""

    number: int

    @classmethod
    def of(cls, capabilities: ElementTree.Element, socket: str | None) -> Self:
        """Return the user, by what libvirt says of itself: a daemon that does not, runs QEMU as who it is itself.

        ``socket`` is that of the daemon where it is not our own. Raises PlatformError.
        """
        for model in capabilities.iterfind("host/secmodel"):
            if model.findtext("model") == "dac":
                for label in model.iterfind("baselabel"):
                    number = (label.text or "").partition(":")[0].removeprefix("+")
                    if number.isascii() and number.isdigit() and int(number) < _NO_ID:
                        return cls(int(number))
        if socket is None:
            return cls(_ours())
        try:
            return cls(Path(socket).stat().st_uid)
        except OSError as error:
            raise PlatformError(f"cannot look at libvirt's socket: {error.strerror}", path=socket) from error

    @property
    def reaches_all(self) -> bool:
        """Whether that user needs no rights from us: it is us, or root."""
        return self.number in (0, _ours())

    def let_in(self, folder: Path, state_folder: Path) -> None:
        """Let the user pass to ``folder``, through those of ours: from ``state_folder`` on. Raises PlatformError."""
        if self.reaches_all:
            return
        self.require_way(state_folder)
        for one in (folder, *folder.parents):
            if (one == state_folder or state_folder in one.parents) and not self._passes(one):
                self.grant(one, PASS)

    def require_way(self, state_folder: Path) -> None:
        """Return if the user may come as far as ``state_folder``, which need not be there. Raises PlatformError."""
        if self.reaches_all:
            return
        for above in state_folder.parents:
            if not above.exists():
                continue
            if not self._passes(above):
                raise PlatformError(
                    f"QEMU runs as user {self.number} under libvirt, which may not pass through this folder",
                    path=str(above),
                    hint="keep the state where it may, as in GODWIT_STATE=/var/lib/godwit, "
                    f"or say 'setfacl -m u:{self.number}:x {above}'",
                )

    def grant(self, path: Path, permissions: int) -> None:
        """Give the user these permissions on a file or folder of ours, beside those it has. Raises PlatformError."""
        if self.reaches_all:
            return
        try:
            _give(path, granted(_held(path), self.number, permissions))
        except OSError as error:
            hint = None
            if error.errno in (errno.ENOTSUP, errno.ENOSYS):
                hint = "keep the state on a file system with access control lists (GODWIT_STATE), as ext4 and XFS are"
            raise PlatformError(
                f"cannot let user {self.number} in, as which libvirt runs QEMU: {error.strerror}",
                path=str(path),
                hint=hint,
            ) from error

    def _passes(self, folder: Path) -> bool:
        try:
            about = folder.stat()
            if about.st_uid == self.number:
                return bool(about.st_mode & 0o100)
            return bool(about.st_mode & 0o001) or bool(permissions_of(_held(folder), self.number) & PASS)
        except OSError as error:
            raise PlatformError(f"cannot look at the folder: {error.strerror}", path=str(folder)) from error


def granted(held: bytes, user: int, permissions: int) -> bytes:
    """Return an access control list with these permissions for a user beside what is in it."""
    entries = _decoded(held)
    own = next((allowed for tag, allowed, number in entries if (tag, number) == (_USER, user)), 0)
    entries = [one for one in entries if (one[0], one[2]) != (_USER, user) and one[0] != _MASK]
    entries.append((_USER, own | permissions, user))
    mask = 0
    for tag, allowed, _ in entries:
        mask |= allowed if tag in _LIMITED else 0
    return _encoded([*entries, (_MASK, mask, _NO_ID)])


def permissions_of(held: bytes, user: int) -> int:
    """Return what a list allows a user by name."""
    entries = _decoded(held)
    mask = next((allowed for tag, allowed, _ in entries if tag == _MASK), 7)
    return next((allowed & mask for tag, allowed, number in entries if (tag, number) == (_USER, user)), 0)


def of_mode(mode: int) -> bytes:
    """Return the list of a file that has none: its mode."""
    return _encoded(
        [(_OWNER, mode >> 6 & 7, _NO_ID), (_OWNER_GROUP, mode >> 3 & 7, _NO_ID), (_OTHERS, mode & 7, _NO_ID)]
    )


def _ours() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _held(path: Path) -> bytes:
    """Return the list of a file or folder. Raises OSError."""
    if sys.platform == "linux":
        try:
            return os.getxattr(path, ATTRIBUTE)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
    return of_mode(path.stat().st_mode)


def _give(path: Path, held: bytes) -> None:
    """Give a file or folder a list. Raises OSError."""
    if sys.platform == "linux":
        os.setxattr(path, ATTRIBUTE, held)
    else:
        raise OSError(errno.ENOSYS, "this system has no access control lists")


def _decoded(data: bytes) -> list[tuple[int, int, int]]:
    """Return tag, permissions and id of each entry. Raises PlatformError."""
    size = len(data) - _VERSION.size
    if size < 0 or size % _ENTRY.size or _VERSION.unpack_from(data)[0] != _ACL_VERSION:
        raise PlatformError("an access control list is of an unknown form")
    return list(_ENTRY.iter_unpack(data[_VERSION.size :]))


def _encoded(entries: list[tuple[int, int, int]]) -> bytes:
    ordered = sorted(entries, key=lambda one: (one[0], one[2]))
    return _VERSION.pack(_ACL_VERSION) + b"".join(_ENTRY.pack(*one) for one in ordered)
