"""Putting a finished disk in the place of the home disk, by one rename, and making one file of the two afterwards.

The order, and what is under the home disk's name (docs/failover.md, rule 9):

1. The old disk gets a second name: the old disk.
2. An overlay is told that its parent has that name. Still the old disk.
3. The finished disk is renamed to the home disk's name: from here on the new disk.
4. An overlay is merged into the old disk. It reads the same throughout, so: the new disk.
5. The old disk, which reads as the new one by now, is renamed back over the overlay; or, where a whole copy took
   its place, it loses its second name.

A file system without hard links has no second names: there the old disk is renamed, and for the moment until
step 3 no file has the home disk's name. ``put_back`` undoes that.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from replica.failback.names import HomeFiles, Names, same_file
from vhdx.chain import open_vhdx
from vhdx.errors import OsError, ParentError
from vhdx.formats import detect_format
from vhdx.merge import merge_into_parent
from vhdx.progress import Progress, silent
from vhdx.relink import find_children, relink


def put_back(names: Names, files: HomeFiles) -> None:
    """Give the old disk its name again where an attempt was cut off while it had none. Raises OsError."""
    if not names.home.exists() and names.before.exists():
        files.link_exclusive(names.before, names.home)


def is_swapped(names: Names, files: HomeFiles) -> bool:
    """Whether the home disk is an overlay of this very attempt on the old disk. Raises DiskError."""
    if not names.before.exists() or not names.home.exists() or same_file(names.before, names.home):
        return False
    if detect_format(names.home, files=files) != "vhdx":
        return False
    with open_vhdx(names.home, files=files) as disk:
        return disk.parent is not None and same_file(disk.parent.path, names.before)


def refuse_children(names: Names, files: HomeFiles) -> None:
    """Raise ParentError where other disks build on the home disk, which would lose their parent."""
    children = [one.path.name for one in find_children(names.home, files=files) if one.is_current]
    if children:
        raise ParentError(
            f"other disks build on it: {', '.join(children)}",
            path=str(names.home),
            hint="bring the newest of them home, or merge or remove them first",
        )


def refuse_taken(names: Names) -> None:
    """Raise OsError where a file of another has the name that the old disk is to get."""
    if names.before.exists() and not same_file(names.before, names.home):
        raise OsError(
            "there is another file of the name that the old disk is to get",
            path=str(names.before),
            hint="look at what it is, and move it away",
        )


def swap(names: Names, files: HomeFiles, *, overlay: bool) -> None:
    """Give the finished disk the home disk's name (steps 1 to 3). Safe to repeat. Raises DiskError."""
    refuse_taken(names)
    if (
        not names.before.exists()
        and not files.link(names.home, names.before)
        and not files.link_exclusive(names.home, names.before)
    ):
        raise OsError("a file of that name has appeared", path=str(names.before), hint="run failback again")
    if overlay:
        relink(names.building, names.before, files=files)
    _resemble(names.building, names.home)
    files.replace(names.building, names.home)


def _resemble(made: Path, old: Path) -> None:
    """Give the new disk the owner and the mode of the old one, as far as we may: who runs the VM has to open it."""
    with suppress(OSError):
        about = old.stat()
        if sys.platform != "win32":
            os.chown(made, about.st_uid, about.st_gid)
        made.chmod(about.st_mode & 0o777)


def settle(names: Names, files: HomeFiles, *, progress: Progress = silent) -> str:
    """Make one file of home disk and old disk (steps 4 and 5); return why that was not done, or nothing.

    Safe to repeat. Raises DiskError.
    """
    if not names.before.exists():
        return ""
    if not is_swapped(names, files):
        files.remove(names.before)
        return ""
    if find_children(names.home, files=files):
        return "other disks build on it by now"
    merge_into_parent(names.home, keep_child=True, files=files, progress=progress)
    files.replace(names.before, names.home)
    return ""


def discard(names: Names, files: HomeFiles) -> None:
    """Remove what attempts that came to nothing have left beside the home disk; nothing else. Raises DiskError."""
    for path in names.leftovers():
        files.remove(path)
    files.remove(names.building)
    if same_file(names.before, names.home):
        files.remove(names.before)
