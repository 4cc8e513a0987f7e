"""The VHDX files of folders as families: which is whose parent, and what stands above a disk.

Each file is opened once, for its identifiers and its parent's; no payload is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vhdx.chain import candidate_paths, parent_linkages, parent_paths
from vhdx.errors import DiskError
from vhdx.image import VhdxImage
from vhdx.osfile import OS_FILES, Files
from vhdx.relink import disks_in


@dataclass(frozen=True, slots=True)
class Member:
    """A VHDX file: what its children must name it by, and what it names its parent by, nothing for one without."""

    path: Path
    data_write_guid: UUID
    linkages: tuple[UUID, ...]
    candidates: tuple[Path, ...]  # where the parent may be, best first, links resolved

    @property
    def has_parent(self) -> bool:
        """Whether it is a differencing disk."""
        return bool(self.linkages)

    @property
    def key(self) -> Path:
        """What the same file has in common under all its names."""
        return _resolved(self.path)


class Family:
    """The VHDX files of some folders. Files that cannot be read belong to none."""

    def __init__(self, members: Sequence[Member]) -> None:
        """``members`` as ``read_family`` finds them."""
        self.members = {member.key: member for member in members}
        self._children: dict[Path, list[Member]] = {}
        for member in members:
            parent = self.parent_of(member)
            if parent is not None:
                self._children.setdefault(parent.key, []).append(member)

    def member(self, path: Path) -> Member | None:
        """Return the file at ``path``, None where it is none of the family."""
        return self.members.get(_resolved(path))

    def parent_of(self, member: Member) -> Member | None:
        """Return the file that the member has for its parent, None where there is none that is as it was."""
        for candidate in member.candidates:
            found = self.members.get(candidate)
            if found is not None and found.data_write_guid in member.linkages:
                return found
        return None

    def children_of(self, path: Path) -> tuple[Path, ...]:
        """Return the disks that need the file at ``path`` as it is now: those whose parent it is."""
        return tuple(child.path for child in self._children.get(_resolved(path), ()))

    def above(self, path: Path) -> tuple[Path, ...]:
        """Return the newest disks above ``path``: the ends of all chains that lead down to it, itself left out."""
        found: list[Path] = []
        seen = {_resolved(path)}
        waiting = [*self.children_of(path)]
        while waiting:
            one = waiting.pop(0)
            if _resolved(one) in seen:  # a loop of parents, which nobody can read
                continue
            seen.add(_resolved(one))
            children = self.children_of(one)
            waiting += children
            if not children:
                found.append(one)
        return tuple(found)

    def newest(self) -> Iterator[Path]:
        """Yield the disks that nothing stands above."""
        for member in self.members.values():
            if not self.children_of(member.path):
                yield member.path


def read_family(folders: Sequence[Path | str], *, paths: Sequence[Path] = (), files: Files = OS_FILES) -> Family:
    """Look at every VHDX file of ``folders``, not of those beneath them, and at ``paths``, whatever they are called.

    Raises OsError for a folder that cannot be listed.
    """
    every = [Path(folder).absolute() for folder in folders]
    allowed = list(dict.fromkeys(_resolved(folder) for folder in every))
    members: dict[Path, Member] = {}
    for path in (*disks_in(every), *paths):
        member = _member(path, allowed, files)
        if member is not None:
            members.setdefault(member.key, member)
    return Family(list(members.values()))


def _member(path: Path, allowed: Sequence[Path], files: Files) -> Member | None:
    try:
        image = VhdxImage.open(path, files=files)
        image.close()
        if not image.geometry.has_parent:
            return Member(path, image.data_write_guid, (), ())
        folder = path.absolute().parent
        found = candidate_paths(parent_paths(image), child_folder=folder, allowed=[_resolved(folder), *allowed])
        candidates = tuple(dict.fromkeys(_resolved(one) for one in found))
        return Member(path, image.data_write_guid, parent_linkages(image), candidates)
    except DiskError:
        return None


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()
