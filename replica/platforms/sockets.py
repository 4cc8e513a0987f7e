"""Where a machine's sockets lie: in its folder, or, where systems would find that name too long, in a short one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from replica.errors import PlatformError
from replica.nbd.server import LONGEST_SOCKET_NAME_BYTES

LONGEST_NAME: Final = 12  # of a socket in its folder


def socket_path(folder: Path, name: str) -> Path:
    """Return the place of the socket of that name of the machine in ``folder``: always the same."""
    return _place(folder) / name


def make_place(folder: Path) -> None:
    """Make sure that sockets can be made, and that nobody else can. Raises PlatformError."""
    place = _place(folder)
    if place == folder:
        return
    try:
        for path in (place.parent, place):
            path.mkdir(mode=0o700, exist_ok=True)
            about = path.lstat()
            # Others may write where this lies: what they have put there is not ours to use.
            if about.st_uid != _user() or about.st_mode & 0o077 or path.is_symlink():
                raise PlatformError(
                    "this is to hold sockets, and belongs to others, or is open to them",
                    path=str(path),
                    hint="remove it, or choose a shorter state folder with GODWIT_STATE",
                )
    except OSError as error:
        raise PlatformError(f"cannot make a place for sockets: {error.strerror}", path=str(place)) from error


def remove_place(folder: Path) -> None:
    """Remove the sockets' own folder, where they have one. Raises OSError."""
    place = _place(folder)
    if place != folder and place.exists():
        shutil.rmtree(place)


def _place(folder: Path) -> Path:
    if len(os.fsencode(folder)) + 1 + LONGEST_NAME <= LONGEST_SOCKET_NAME_BYTES:
        return folder
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"godwit-{_user()}" / digest


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0
