"""Finding and opening the parent of a differencing VHD, within the folders that the user allows.

An image is data from anywhere: the path in it is a wish, not an order. Only files in the first child's own folder,
below it, or in the folders that were named are ever opened; links are followed before that is decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vhdx.chain import MAX_CHAIN_LENGTH, candidate_paths
from vhdx.errors import CorruptDiskError, DiskError, ParentError
from vhdx.osfile import File, translated
from vhdx.vhd_layout import Layout, Problem
from vhdx.vhd_structures import Header, ParentLocator

if TYPE_CHECKING:
    from vhdx.vhd import OpenChain, VhdDisk

RELATIVE: Final = b"W2ru"
ABSOLUTE: Final = b"W2ku"
MAX_PATH_BYTES: Final = 64 << 10  # Windows' own limit
PATH_KEYS: Final = {"relative": "relative_path", "absolute": "absolute_win32_path", "name": "parent_name"}
TIMESTAMP_SLACK_SECONDS: Final = 2  # FAT keeps even seconds
HINT: Final = "put the parent beside the image, or allow its folder"


@dataclass(frozen=True, slots=True)
class Reference:
    """A path to the parent as the child has it: ``kind`` is ``relative``, ``absolute`` or ``name``."""

    kind: str
    path: str


def read_references(file: File, header: Header) -> list[Reference]:
    """Return the paths to the parent in the order in which they are tried. Raises CorruptDiskError, OsError."""
    found: list[Reference] = []
    for code, kind in ((RELATIVE, "relative"), (ABSOLUTE, "absolute")):
        paths = (_read_locator(file, locator) for locator in header.locators if locator.code == code)
        found.extend(Reference(kind, path) for path in paths if path)
    if header.parent_name:
        found.append(Reference("name", header.parent_name))
    return found


def _read_locator(file: File, locator: ParentLocator) -> str:
    length, offset = locator.length, locator.offset
    if length > MAX_PATH_BYTES or length % 2 or offset + length > file.size():
        raise CorruptDiskError(
            f"a parent locator of {length} bytes at {offset:#x} does not fit", path=str(file.path), offset=offset
        )
    return file.pread(offset, length).decode("utf-16-le", "replace").rstrip("\0")


def open_parent(file: File, layout: Layout, chain: OpenChain) -> VhdDisk:
    """Open the parent of the image in ``file``, which is the last of ``chain.children``.

    Every path that the child has is tried, relative ones first; the first file whose identifier is the one that the
    child was made on is the parent. Raises ParentError where there is none, CorruptDiskError, OsError.
    """
    assert layout.header is not None
    references = read_references(file, layout.header)
    wanted = layout.header.parent_identifier
    path = str(file.path)
    reasons: list[str] = []
    for candidate in _existing_files(references, chain):
        if not any(candidate.is_relative_to(root) for root in chain.roots):
            reasons.append(f"{candidate} is outside the allowed folders")
            continue
        if candidate in chain.children:
            loop = " -> ".join(map(str, (*chain.children, candidate)))
            raise ParentError(f"the chain of parents is a loop: {loop}", path=path)
        if len(chain.children) >= MAX_CHAIN_LENGTH:
            raise ParentError(f"the chain has more than {MAX_CHAIN_LENGTH} files", path=path)
        try:
            parent = chain.open(candidate)
        except DiskError as error:
            reasons.append(f"the parent cannot be opened: {error}")
            continue
        found = parent.footer.identifier
        if found == wanted:
            return parent
        reasons.append(f"{candidate} is another disk: its identifier is {found}, the child was made on {wanted}")
        parent.close()
    name = references[0].path if references else "not named"
    raise ParentError("; ".join(reasons) or f"its parent, {name}, is missing", path=path, hint=HINT)


def _existing_files(references: Sequence[Reference], chain: OpenChain) -> Iterator[Path]:
    """Yield the files that the references may mean on this system, links resolved and each once."""
    paths = {PATH_KEYS[reference.kind]: reference.path for reference in reversed(references)}
    ordered = {key: paths[key] for key in PATH_KEYS.values() if key in paths}
    seen = set()
    for path in candidate_paths(ordered, child_folder=chain.children[-1].parent, allowed=chain.roots):
        try:
            target = path.resolve()
            exists = target.is_file()
        except (OSError, RuntimeError, ValueError):  # no permission, a loop of links, a null byte
            continue
        if exists and target not in seen:
            seen.add(target)
            yield target


def resolved(path: Path | str) -> Path:
    """Return the real path, links followed as far as it exists."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError):
        return Path(path).absolute()


def timestamp_problem(layout: Layout, parent: VhdDisk) -> Problem | None:
    """Return a warning where the parent's time is not the one that the child noted.

    The identifier decides, not this: the time noted is mostly that of the parent's file, and a plain copy changes it.
    """
    assert layout.header is not None
    noted = layout.header.parent_modified
    with translated(parent.path, "ask for the time"):
        modified = datetime.fromtimestamp(parent.path.stat().st_mtime, UTC)
    near = (
        abs((moment - noted).total_seconds()) <= TIMESTAMP_SLACK_SECONDS for moment in (modified, parent.footer.created)
    )
    if any(near):
        return None
    return Problem(
        f"the parent was last written at {modified:%Y-%m-%d %H:%M:%S} UTC, the child was made on its state of "
        f"{noted:%Y-%m-%d %H:%M:%S} UTC: it may have changed since",
        layout.footer.data_offset + 56,
        "warning",
    )
