"""The names that files have on the way home, by which an attempt that was cut off is recognised, and its leftovers.

Of a home disk ``web.vhdx`` of the VM 6f0d…, brought home from point 7: ``.web.vhdx.6f0d….7.failback`` while it is
built, and ``web.before-failback-7.vhdx`` is the second name of the old disk.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from vhdx.osfile import Files, OsFiles, fsync_folder, os_error, translated

_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class HomeFiles(Files, Protocol):
    """A file system that can give a file a second name."""

    def link(self, path: Path, name: Path) -> bool:
        """Give the file at ``path`` the name ``name`` too, durably; False where the file system has no such thing.

        Raises OsError, also where ``name`` exists.
        """


class OsHomeFiles(OsFiles):
    """The operating system's own files."""

    def link(self, path: Path, name: Path) -> bool:
        """Give the file a second name, as ``HomeFiles`` says."""
        try:
            os.link(path, name)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise os_error(error, name, "give the old disk a second name") from error
        fsync_folder(name.parent)
        return True


OS_HOME_FILES: Final = OsHomeFiles()


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one disk on its way home from one point."""

    home: Path
    vm_id: str
    point: int

    @property
    def building(self) -> Path:
        """Where the new disk is made."""
        return self.home.with_name(f".{self.home.name}.{self.vm_id}.{self.point}.failback")

    @property
    def before(self) -> Path:
        """The old disk's second name."""
        return self.home.with_name(f"{self.home.stem}.before-failback-{self.point}{self.home.suffix}")

    def leftovers(self) -> list[Path]:
        """Return the files of this VM's attempts, on whatever point, that are neither home disk nor old disk.

        That is unfinished files, and second names of what still has the home disk's name, but for those of this
        very attempt. Raises OsError.
        """
        unfinished = re.compile(
            rf"\.+{re.escape(self.home.name)}\.{re.escape(self.vm_id)}\.[0-9]+\.failback(\.[0-9a-f]{{16}}\.tmp)*"
        )
        second = re.compile(rf"{re.escape(self.home.stem)}\.before-failback-[0-9]+{re.escape(self.home.suffix)}")
        found = []
        with translated(self.home.parent, "list the folder"):
            for path in sorted(self.home.parent.iterdir()):
                if path in (self.building, self.before):
                    continue
                if unfinished.fullmatch(path.name) or (second.fullmatch(path.name) and same_file(path, self.home)):
                    found.append(path)
        return found


def same_file(one: Path, other: Path) -> bool:
    """Whether two names are of one file. Raises OsError."""
    with translated(one, "look at the file"):
        return one.exists() and other.exists() and one.samefile(other)
