"""Finding and opening the parent of a differencing VHD, within the folders that the user allows.

An image is data from anywhere: the path in it is a wish, not an order. Only files in the first child's own folder,
below it, or in the folders that were named are ever opened; links are followed before that is decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Final

from vhdx.errors import CorruptDiskError, DiskError, ParentError
from vhdx.osfile import File, translated
from vhdx.vhd_layout import Layout, Problem
from vhdx.vhd_structures import Header, ParentLocator

if TYPE_CHECKING:
    from vhdx.vhd import OpenChain, VhdDisk

RELATIVE: Final = b"W2ru"
ABSOLUTE: Final = b"W2ku"
MAX_PATH_BYTES: Final = 64 << 10  # Windows' own limit
MAX_DEPTH: Final = 256
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


def open_parent(file: File, layout: Layout, chain: OpenChain) -> VhdDisk | DiskError:
    """Open the parent, or return the error that says why that cannot be done.

    Every path that the child has is tried, relative ones first; the first file whose identifier is the one that the
    child was made on is the parent.
    """
    assert layout.header is not None
    try:
        references = read_references(file, layout.header)
        return _open_first(file, layout.header, references, chain)
    except DiskError as error:
        return error


def _open_first(file: File, header: Header, references: Sequence[Reference], chain: OpenChain) -> VhdDisk:
    path = str(file.path)
    reasons: list[str] = []
    for candidate in _candidates(file.path, references, chain.roots):
        if not _is_within(candidate, chain.roots):
            reasons.append(f"{candidate} is outside the allowed folders")
            continue
        if candidate in chain.ancestors:
            loop = " → ".join([*map(str, chain.ancestors), str(candidate)])
            raise ParentError(f"the chain of parents is a loop: {loop}", path=path)
        if len(chain.ancestors) >= MAX_DEPTH:
            raise ParentError(f"the chain is deeper than {MAX_DEPTH} images", path=path)
        try:
            parent = chain.open(candidate)
        except DiskError as error:
            reasons.append(f"the parent cannot be opened: {error}")
            continue
        if parent.footer.identifier == header.parent_identifier:
            return parent
        reasons.append(
            f"{candidate} is another disk: it has the identifier {parent.footer.identifier}, "
            f"the child was made on {header.parent_identifier}"
        )
        parent.close()
    wanted = references[0].path if references else "without a name"
    raise ParentError("; ".join(reasons) or f"the parent, {wanted}, was not found", path=path, hint=HINT)


def _candidates(child: Path, references: Sequence[Reference], roots: Sequence[Path]) -> Iterator[Path]:
    """Yield the existing files, links resolved and each once, that the references may mean on this system."""
    seen = set()
    for path in _paths(child, references, roots):
        with translated(child, "look for the parent"):
            try:
                resolved = path.resolve()
                exists = resolved.is_file()
            except (RuntimeError, ValueError):  # a loop of links, a null byte
                continue
        if exists and resolved not in seen:
            seen.add(resolved)
            yield resolved


def _paths(child: Path, references: Sequence[Reference], roots: Sequence[Path]) -> Iterator[Path]:
    folder = child.resolve().parent
    for reference in references:
        windows = PureWindowsPath(reference.path)
        if Path(reference.path).is_absolute():
            yield Path(reference.path)
        elif not windows.drive and not windows.root:
            yield folder / windows.as_posix()
    # A path of another machine, or of Windows on a system without drives: its last part may still be found.
    for reference in references:
        if name := PureWindowsPath(reference.path).name:
            for root in (folder, *roots):
                yield root / name


def _is_within(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


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
