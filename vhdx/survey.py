"""The chains of differencing disks, link by link: sizes, ages, who uses them, what else stands on them, what is broken.

No payload is read, and nothing is locked or changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vhdx.chain import MAX_CHAIN_LENGTH, open_vhdx
from vhdx.describe import file_sizes
from vhdx.errors import DiskError, FormatUnknownError, OsError, ParentError
from vhdx.family import Family, Member, read_family
from vhdx.formats import detect_format
from vhdx.inuse import user_of
from vhdx.merge import merge_has_begun
from vhdx.osfile import OS_FILES, Files, translated
from vhdx.vhdx import VhdxDisk
from vhdx.windows import length_of


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One file of a chain. Sizes are bytes; ``depth`` counts from 0, the file that has no parent."""

    path: Path
    depth: int
    virtual_size: int
    file_size: int
    storage_size: int | None  # what the file takes on its file system, None where that is not told
    stored_size: int  # of the disk, what this very file holds
    modified_at: datetime
    created_at: datetime | None  # None where the file system does not tell
    used_by: str | None  # who has it open, as far as can be seen from here
    branches: tuple[Path, ...]  # other disks whose parent it is
    merge_begun: bool  # into its parent, and cut off


@dataclass(frozen=True, slots=True)
class Broken:
    """Why a chain does not go on to a file without a parent; ``path`` is the file whose parent cannot be used."""

    path: Path
    error: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class Chain:
    """The files that a disk reads from, the newest first.

    ``above`` are the newest disks that stand on the first file: then it is not what a machine writes to.
    ``left_over`` are files of merges that were cut off when all was done but removing them.
    """

    path: Path
    links: tuple[ChainLink, ...]
    above: tuple[Path, ...]
    left_over: tuple[Path, ...]
    broken: Broken | None

    @property
    def checkpoints(self) -> int:
        """How many files stand above the first one made."""
        return max(0, len(self.links) - 1) if self.broken is None else len(self.links)


def survey_chain(path: Path | str, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES) -> Chain:
    """Return the chain of the VHDX at ``path``. Raises DiskError where that very file cannot be read."""
    path = Path(path)
    require_vhdx(path, files=files)
    return _survey(path, None, allowed_folders, files)


def survey_folder(folder: Path | str, *, files: Files = OS_FILES) -> tuple[Chain, ...]:
    """Return a chain for each VHDX of the folder that nothing stands on, in the order of their names.

    Raises OsError where the folder cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OsError("this is no folder", path=str(folder), hint="check that the path is written right")
    family = read_family([folder], files=files)
    return tuple(_survey(path, family, (), files) for path in sorted(family.newest()))


def require_vhdx(path: Path, *, files: Files = OS_FILES) -> None:
    """Raise FormatUnknownError unless the file is a VHDX, whatever it is called; DiskError where it is damaged."""
    known = detect_format(path, files=files)
    if known != "vhdx":
        raise FormatUnknownError(
            f"this is {known}, and no VHDX or AVHDX: it has no checkpoints that can be told here", path=str(path)
        )


def chain_folders(paths: Sequence[Path], allowed_folders: Sequence[Path | str]) -> list[Path]:
    """Return the folders in which relatives of the files are looked for."""
    return list(dict.fromkeys([*(path.absolute().parent for path in paths), *map(Path, allowed_folders)]))


def _survey(path: Path, family: Family | None, allowed_folders: Sequence[Path | str], files: Files) -> Chain:
    try:
        with open_vhdx(path, allowed_folders=allowed_folders, files=files) as disk:
            paths = [link.path for link in disk.chain]
            missing = disk.chain[-1].parent_error
            family = family or read_family(chain_folders(paths, allowed_folders), paths=paths, files=files)
            broken = None if missing is None else Broken(paths[-1], missing.message, missing.hint)
            links = tuple(_link(link, place, len(paths), paths, family) for place, link in enumerate(disk.chain))
    except ParentError as error:
        family = family or read_family(chain_folders([path], allowed_folders), paths=[path], files=files)
        paths = _as_far_as_told(path, family)
        links = tuple(_alone(one, place, paths, family, files) for place, one in enumerate(paths))
        broken = Broken(Path(error.path) if error.path else path, error.message, error.hint)
    left = {one for link in links for one in link.branches if _is_left_over(one, allowed_folders, files)}
    return Chain(path, links, family.above(path), tuple(sorted(left)), broken)


def _as_far_as_told(path: Path, family: Family) -> list[Path]:
    """Return the file and its parents, as far as each is what its child was made on."""
    paths = [path]
    member: Member | None = family.member(path)
    while member is not None and len(paths) < MAX_CHAIN_LENGTH:
        member = family.parent_of(member)
        if member is None or any(member.path == one for one in paths):
            break
        paths.append(member.path)
    return paths


def _alone(path: Path, place: int, paths: Sequence[Path], family: Family, files: Files) -> ChainLink:
    with open_vhdx(path, files=files, with_parents=False) as disk:
        return _link(disk, place, len(paths), paths, family)


def _link(disk: VhdxDisk, place: int, count: int, paths: Sequence[Path], family: Family) -> ChainLink:
    file_size, storage_size = file_sizes(disk.path)
    with translated(disk.path, "ask for the file's times"):
        status = disk.path.stat()
    born = getattr(status, "st_birthtime", None)
    others = {one.resolve() for one in paths}
    return ChainLink(
        path=disk.path,
        depth=count - 1 - place,
        virtual_size=disk.size,
        file_size=file_size,
        storage_size=storage_size,
        stored_size=length_of(disk.stored()),
        modified_at=_moment(status.st_mtime),
        created_at=None if born is None else _moment(born),
        used_by=user_of(disk.path),
        branches=tuple(one for one in family.children_of(disk.path) if place and one.resolve() not in others),
        merge_begun=merge_has_begun(disk),
    )


def _moment(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):  # a time that no calendar has
        return datetime.fromtimestamp(0, UTC)


def _is_left_over(path: Path, allowed_folders: Sequence[Path | str], files: Files) -> bool:
    try:
        with open_vhdx(path, allowed_folders=allowed_folders, files=files) as disk:
            return merge_has_begun(disk)
    except DiskError:
        return False
