"""Parents: where a locator says they are, whether they may be opened, and whether they are the right ones.

Paths are tried in the order relative_path, absolute_win32_path, volume_path. A locator was written on Windows and is
not to be trusted: whatever it says, only files inside the allowed folders are opened, links resolved first. A drive or
volume means nothing here, so the end of such a path is looked for inside the allowed folders, the longest end first.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from uuid import UUID

from vhdx.errors import CorruptDiskError, DiskError, OsError, ParentError, UnsupportedDiskError
from vhdx.image import Recover, VhdxImage, naming
from vhdx.osfile import OS_FILES, Files
from vhdx.structures import VHDX_PARENT_LOCATOR, ZERO_GUID, ParentLocator
from vhdx.vhdx import VhdxDisk

MAX_CHAIN_LENGTH = 64  # files; Hyper-V allows 50 checkpoints
MAX_PATH_PARTS = 64
PATH_KEYS = ("relative_path", "absolute_win32_path", "volume_path")
ABSENT = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL))
LINKAGE_KEYS = ("parent_linkage", "parent_linkage2")


def open_vhdx(
    path: Path | str,
    *,
    writable: bool = False,
    allowed_folders: Sequence[Path | str] = (),
    files: Files = OS_FILES,
    recover: Recover | None = None,
    with_parents: bool = True,
) -> VhdxDisk:
    """Open a VHDX and the chain of its parents, which are opened for reading only.

    Parents must lie in the image's own folder or, at any depth, in one of ``allowed_folders``. One that is not found
    there is no error yet: ``parent_error`` of the link above says so, and reading raises it where the parent is
    needed. ``with_parents`` False does not look for any. A ``writable`` disk has no writer yet: set ``writer``.

    Raises ParentError where a parent was found and cannot be used: changed since, of another sector size, not a
    VHDX, part of a loop, or below a chain of more than ``MAX_CHAIN_LENGTH`` files; and as ``VhdxImage.open`` does.
    """
    path = Path(path)
    image = VhdxImage.open(path, writable=writable, files=files, recover=recover)
    disk = VhdxDisk(image)
    try:
        if with_parents:
            folders = [_resolved(folder) for folder in (path.absolute().parent, *allowed_folders)]
            _open_parents(disk, [folder for folder in folders if folder is not None], files)
    except BaseException:
        disk.close()
        raise
    return disk


def parent_linkages(image: VhdxImage) -> tuple[UUID, ...]:
    """Return the data write GUIDs that the parent of ``image`` may have. Raises CorruptDiskError."""
    locator = _locator(image)
    linkages: list[UUID] = []
    with naming(image.path):
        for key in LINKAGE_KEYS:
            value = locator.get(key)
            if value is None:
                continue
            try:
                linkage = UUID(value.strip("\0 "))
            except ValueError:
                raise CorruptDiskError(f"the parent locator's {key} is no GUID: {value[:64]!r}") from None
            if linkage != ZERO_GUID:  # Windows writes a zero parent_linkage2 where it has none
                linkages.append(linkage)
        if not linkages:
            raise CorruptDiskError("the parent locator has no parent_linkage")
    return tuple(linkages)


def parent_paths(image: VhdxImage) -> dict[str, str]:
    """Return the paths that the locator of ``image`` gives for its parent, by key, in the order they are tried."""
    locator = _locator(image)
    values = {key: locator.get(key) for key in PATH_KEYS}
    return {key: value.rstrip("\0") for key, value in values.items() if value is not None}


def candidate_paths(paths: dict[str, str], *, child_folder: Path, allowed: Sequence[Path]) -> Iterator[Path]:
    """Yield where the parent may be, best first. Nothing is opened, and nothing is checked against ``allowed``."""
    for key, value in paths.items():
        if not value or "\0" in value:
            continue
        windows = PureWindowsPath(value)
        parts = [part for part in windows.parts if part != windows.anchor]
        if not parts or len(parts) > MAX_PATH_PARTS:
            continue
        if key == "relative_path" and not windows.anchor:
            yield child_folder.joinpath(*parts)
            continue
        here = Path(value)
        if here.is_absolute():  # a Windows path on Windows; elsewhere, a path that a program like this one wrote
            yield here
        for first in range(len(parts)):
            if ".." not in parts[first:]:
                yield from (folder.joinpath(*parts[first:]) for folder in dict.fromkeys((child_folder, *allowed)))


def _open_parents(disk: VhdxDisk, allowed: Sequence[Path], files: Files) -> None:
    """Open the parents of ``disk`` one after the other, down to the last or the first that is not found."""
    seen = [_resolved(disk.path) or disk.path.absolute()]
    child = disk
    while child.image.geometry.has_parent:
        if len(seen) >= MAX_CHAIN_LENGTH:
            raise ParentError(f"the chain has more than {MAX_CHAIN_LENGTH} files", path=str(disk.path))
        parent = _open_parent(child, seen, allowed, files)
        if parent is None:
            return
        child.parent = child = parent


def _open_parent(child: VhdxDisk, seen: list[Path], allowed: Sequence[Path], files: Files) -> VhdxDisk | None:
    """Return the parent of ``child``, None where it is missing (and ``child`` says so). Adds its path to ``seen``."""
    image = child.image
    linkages, paths = parent_linkages(image), parent_paths(image)
    refused: list[Path] = []
    changed: ParentError | None = None
    child_folder = seen[-1].parent
    for candidate in candidate_paths(paths, child_folder=child_folder, allowed=allowed):
        target = _resolved(candidate)
        if target is None:
            continue
        if not any(target.is_relative_to(folder) for folder in allowed):
            refused.append(target)
            continue
        if target in seen:
            names = " -> ".join(str(path) for path in [*seen[seen.index(target) :], target])
            raise ParentError(f"the chain of parents is a loop: {names}", path=str(image.path))
        parent = _open_image(image, target, files)
        if parent is None:
            continue
        try:
            if parent.data_write_guid in linkages:
                _check_sizes(image, parent)
                seen.append(target)
                return VhdxDisk(parent)
        except BaseException:
            parent.close()
            raise
        # Another file may have the parent's name in a folder that is tried before the right one: go on looking.
        parent.close()
        changed = changed or _changed(image, parent, linkages)
    if changed is not None:
        raise changed
    child.parent_error = _missing(image, paths, refused)
    return None


def _open_image(child: VhdxImage, target: Path, files: Files) -> VhdxImage | None:
    """Open a parent for reading; None where there is no such file."""
    if is_special(target):
        return None
    try:
        return VhdxImage.open(target, files=files)
    except OsError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in ABSENT:
            return None
        raise _unusable(child, error) from error
    except DiskError as error:
        raise _unusable(child, error) from error


def _unusable(child: VhdxImage, error: DiskError) -> ParentError:
    hint = error.hint or "restore the parent from a copy"
    return ParentError(f"its parent cannot be opened: {error}", path=str(child.path), hint=hint)


def _check_sizes(child: VhdxImage, parent: VhdxImage) -> None:
    ours, theirs = child.geometry.sector_size, parent.geometry.sector_size
    if ours != theirs:
        raise ParentError(
            f"its sectors have {ours} bytes, those of its parent {parent.path} {theirs}", path=str(child.path)
        )


def _changed(child: VhdxImage, parent: VhdxImage, linkages: tuple[UUID, ...]) -> ParentError:
    wanted = " or ".join(f"{{{guid}}}" for guid in linkages)
    return ParentError(
        f"its parent {parent.path} has changed since the child was made: "
        f"the child wants {wanted}, the parent is {{{parent.data_write_guid}}}",
        path=str(child.path),
        hint="bring back the parent as it was, or the child's data cannot be told",
    )


def _missing(child: VhdxImage, paths: dict[str, str], refused: list[Path]) -> ParentError:
    # repr shows control characters for what they are; doubled backslashes would only hide the path.
    named = ", ".join(f"{key} {value!r}" for key, value in paths.items()).replace("\\\\", "\\") or "no path at all"
    if refused:
        where = ", ".join(str(path) for path in dict.fromkeys(refused))
        return ParentError(
            f"its parent lies outside the allowed folders ({where}); its locator gives {named}",
            path=str(child.path),
            hint="allow the parent's folder, or put the parent beside the child",
        )
    return ParentError(
        f"its parent is missing; its locator gives {named}",
        path=str(child.path),
        hint="put the parent beside the child, or allow the folder that it lies in",
    )


def _locator(image: VhdxImage) -> ParentLocator:
    locator = image.metadata.parent_locator
    if locator is None:
        raise ParentError("the disk has no parent", path=str(image.path))
    if locator.locator_type != VHDX_PARENT_LOCATOR:
        raise UnsupportedDiskError(
            f"the parent locator is of the unknown type {{{locator.locator_type}}}", path=str(image.path)
        )
    return locator


def _resolved(path: Path | str) -> Path | None:
    """Return the real path, links followed as far as it exists; None where there can be no such file."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError):
        return None


def is_special(path: Path) -> bool:
    """Tell whether the path names something that must not even be opened: a pipe would block, a device would act."""
    try:
        return path.exists() and not path.is_file()
    except (OSError, ValueError):
        return True
