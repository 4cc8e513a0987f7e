"""What an image tells of itself: kind, sizes, identities, log, parents, without reading any payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from uuid import UUID

from vhdx import qcow2
from vhdx.chain import open_vhdx, parent_linkages, parent_paths
from vhdx.errors import DiskError, ParentError
from vhdx.formats import detect_format, open_disk
from vhdx.osfile import OS_FILES, Files, translated
from vhdx.raw import RawDisk
from vhdx.vhd import FixedVhdDisk, SparseVhdDisk, VhdDisk
from vhdx.vhd_parent import read_references
from vhdx.vhd_structures import DiskType, Geometry
from vhdx.vhdx import VhdxDisk
from vhdx.windows import length_of


@dataclass(frozen=True, slots=True)
class LogState:
    """A VHDX's log: ``empty``, or ``replay`` with the entries that a reader applies in memory."""

    state: str
    entries: int
    torn_entries: int  # cut off by a crash; they changed nothing


@dataclass(frozen=True, slots=True)
class ParentPath:
    """One path that a differencing disk has for its parent."""

    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class ParentState:
    """What a differencing disk says of its parent, and what was found. ``error`` is None where it can be used."""

    identifiers: tuple[UUID, ...]  # any of which the parent may have
    paths: tuple[ParentPath, ...]
    file: Path | None
    error: str | None
    hint: str | None


@dataclass(frozen=True, slots=True)
class Link:
    """One file of a chain."""

    path: Path
    kind: str
    virtual_size: int  # bytes
    file_size: int  # bytes
    stored_size: int  # bytes of the disk that this very file holds


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that is known of an image. Sizes are bytes; what a format does not have is None."""

    path: Path
    format: str
    kind: str
    virtual_size: int
    file_size: int
    storage_size: int | None  # what the file takes on its file system, holes left out
    stored_size: int | None  # of the disk, what this very file holds
    allocated_size: int | None  # of the disk, what this file and its parents hold
    block_size: int | None
    sector_size: int | None
    physical_sector_size: int | None
    identifier: UUID | None
    data_write_guid: UUID | None
    file_write_guid: UUID | None
    created: datetime | None
    creator: str | None
    geometry: Geometry | None
    log: LogState | None
    problems: tuple[str, ...]
    parent: ParentState | None
    chain: tuple[Link, ...]


def describe(path: Path | str, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES) -> Description:
    """Describe an image of any format. A parent that cannot be used is part of the description, not an error.

    Raises FormatUnknownError, CorruptDiskError, UnsupportedDiskError, OsError.
    """
    path = Path(path)
    known = detect_format(path, files=files)
    if known == "qcow2":
        return _description(path, known, "standalone", qcow2.virtual_size(path, files=files))
    if known == "vhdx":
        return _describe_vhdx(path, allowed_folders, files)
    with open_disk(path, format=known, allowed_folders=allowed_folders, files=files) as disk:
        if isinstance(disk, SparseVhdDisk):
            return _describe_sparse_vhd(disk)
        assert isinstance(disk, RawDisk)
        stored = length_of(disk.allocated())
        described = _description(path, known, "fixed", disk.size, stored=stored, allocated=stored, sector_size=512)
        return _with_footer(described, disk) if isinstance(disk, FixedVhdDisk) else described


def _description(
    path: Path,
    format: str,  # noqa: A002
    kind: str,
    virtual_size: int,
    *,
    stored: int | None = None,
    allocated: int | None = None,
    sector_size: int | None = None,
) -> Description:
    file_size, storage_size = file_sizes(path)
    return Description(
        path=path,
        format=format,
        kind=kind,
        virtual_size=virtual_size,
        file_size=file_size,
        storage_size=storage_size,
        stored_size=stored,
        allocated_size=allocated,
        block_size=None,
        sector_size=sector_size,
        physical_sector_size=None,
        identifier=None,
        data_write_guid=None,
        file_write_guid=None,
        created=None,
        creator=None,
        geometry=None,
        log=None,
        problems=(),
        parent=None,
        chain=(),
    )


def file_sizes(path: Path) -> tuple[int, int | None]:
    """Return a file's length, and the bytes it takes on its file system where the system tells. Raises OsError."""
    with translated(path, "ask for the size"):
        status = path.stat()
    blocks = getattr(status, "st_blocks", None)
    return status.st_size, None if blocks is None else blocks * 512


# --- VHDX


def _describe_vhdx(path: Path, allowed_folders: Sequence[Path | str], files: Files) -> Description:
    refused: ParentError | None = None
    try:
        disk = open_vhdx(path, allowed_folders=allowed_folders, files=files)
    except ParentError as error:  # a parent is there and must not be used: this file is described all the same
        refused = error
        disk = open_vhdx(path, files=files, with_parents=False)
    with disk:
        image = disk.image
        metadata = image.metadata
        stored = length_of(disk.stored())
        described = _description(path, "vhdx", _vhdx_kind(disk), disk.size, stored=stored, sector_size=disk.sector_size)
        last_error = refused or disk.chain[-1].parent_error
        faults = (*image.header_faults, *image.region_faults)
        return replace(
            described,
            allocated_size=None if last_error else length_of(disk.allocated()),
            block_size=metadata.file_parameters.block_size,
            physical_sector_size=metadata.physical_sector_size,
            identifier=metadata.disk_id,
            data_write_guid=image.header.data_write_guid,
            file_write_guid=image.header.file_write_guid,
            creator=image.creator or None,
            log=_log_state(disk),
            problems=tuple(f"{fault.message} (at offset {fault.offset:#x})" for fault in faults if fault is not None),
            parent=_vhdx_parent(disk, last_error),
            chain=tuple(_vhdx_link(link) for link in disk.chain) if metadata.file_parameters.has_parent else (),
        )


def _vhdx_kind(disk: VhdxDisk) -> str:
    parameters = disk.image.metadata.file_parameters
    if parameters.has_parent:
        return "differencing"
    return "fixed" if parameters.leave_blocks_allocated else "dynamic"


def _log_state(disk: VhdxDisk) -> LogState:
    plan = disk.image.replay
    if plan is None:
        return LogState("empty", 0, 0)
    return LogState("replay" if plan.entries else "empty", len(plan.entries), plan.torn)


def _vhdx_parent(disk: VhdxDisk, error: DiskError | None) -> ParentState | None:
    if not disk.image.geometry.has_parent:
        return None
    try:
        identifiers = parent_linkages(disk.image)
        paths = tuple(ParentPath(kind, path) for kind, path in parent_paths(disk.image).items())
    except DiskError as locator_error:
        return ParentState((), (), None, str(locator_error), locator_error.hint)
    file = disk.parent.path if disk.parent else None
    return ParentState(identifiers, paths, file, _told(error), error.hint if error else None)


def _told(error: DiskError | None) -> str | None:
    return None if error is None else error.message


def _vhdx_link(disk: VhdxDisk) -> Link:
    stored = length_of(disk.stored())
    return Link(disk.path, _vhdx_kind(disk), disk.size, file_sizes(disk.path)[0], stored)


# --- VHD


def _describe_sparse_vhd(disk: SparseVhdDisk) -> Description:
    kind = disk.footer.kind.name.lower()
    links = disk.chain
    last = links[-1]
    error = last.parent_error if isinstance(last, SparseVhdDisk) else None
    described = _description(disk.path, "vhd", kind, disk.size, stored=_vhd_stored(disk), sector_size=disk.sector_size)
    differencing = disk.footer.kind is DiskType.DIFFERENCING
    described = replace(
        described,
        allocated_size=None if error else length_of(disk.allocated()),
        block_size=disk.block_size,
        problems=tuple(problem.message for problem in disk.layout.problems),
        parent=_vhd_parent(disk, error) if differencing else None,
        chain=tuple(_vhd_link(link) for link in links) if differencing else (),
    )
    return _with_footer(described, disk)


def _with_footer(described: Description, disk: VhdDisk) -> Description:
    footer = disk.footer
    return replace(
        described,
        identifier=footer.identifier,
        created=footer.created,
        creator=footer.creator_application.decode("latin-1").strip("\0 "),
        geometry=footer.geometry,
    )


def _vhd_stored(disk: VhdDisk) -> int:
    extents = disk.stored() if isinstance(disk, SparseVhdDisk) else disk.allocated()
    return length_of(extents)


def _vhd_parent(disk: SparseVhdDisk, error: DiskError | None) -> ParentState:
    try:
        references = read_references(disk.file, disk.header)
    except DiskError as locator_error:
        return ParentState((disk.header.parent_identifier,), (), None, str(locator_error), locator_error.hint)
    paths = tuple(ParentPath(reference.kind, reference.path) for reference in references)
    file = disk.parent.path if disk.parent else None
    return ParentState((disk.header.parent_identifier,), paths, file, _told(error), error.hint if error else None)


def _vhd_link(disk: VhdDisk) -> Link:
    kind = disk.footer.kind.name.lower()
    return Link(disk.path, kind, disk.size, file_sizes(disk.path)[0], _vhd_stored(disk))
