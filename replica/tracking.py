"""What may have changed in a disk since the newest point: told by VHDX identifiers and chains, or not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from replica.model import DiskRecord
from vhdx.disk import Disk, Extents
from vhdx.errors import DiskError
from vhdx.family import read_family
from vhdx.formats import chain_of
from vhdx.osfile import translated
from vhdx.vhdx import VhdxDisk

SCAN: Final = "scan"
CHAIN: Final = "chain"
FILES: Final = "files"
ABOVE: Final = "above"
MOST_ABOVE: Final = 10


@dataclass(frozen=True, slots=True)
class Found:
    """How the changes of a disk are found. ``kind`` is ``scan`` where all that it holds must be compared.

    ``changed`` yields the extents that may differ from the newest point's, None for ``scan``; ``why`` says why that is.
    """

    kind: str
    why: str
    changed: Callable[[], Iterator[Extents]] | None = None


def identity(disk: Disk) -> dict[str, str]:
    """Return what tells, in a later cycle, whether this very state of the disk is still beneath it.

    ``files`` names the file and its parents, a line each, and for VHDX ``state`` says of each, from the top down:
    identifier, size and time of the last change.
    """
    about = {FILES: "\n".join(str(path.absolute()) for path in chain_of(disk)), "kind": disk.format}
    if not isinstance(disk, VhdxDisk):
        return about
    states = []
    for link in disk.chain:
        with translated(link.path, "ask for the file's times"):
            status = link.path.stat()
        states.append(f"{link.image.data_write_guid}/{status.st_size}/{status.st_mtime_ns}")
    return {**about, "virtual_disk_id": str(disk.image.metadata.disk_id), "state": " ".join(states)}


def above(disk: Disk) -> dict[str, str]:
    """Return under ``above``, a line each, the newest disks of its folder that stand on the file; nothing without any.

    A machine that runs on one of those writes nothing to this file: what is read of it is an earlier state. It may be
    what was wanted, as where a checkpoint is replicated while the machine runs on above it.
    """
    if not isinstance(disk, VhdxDisk):
        return {}
    try:
        found = read_family([disk.path.absolute().parent], paths=[disk.path]).above(disk.path)
    except DiskError:  # a folder that cannot be listed
        return {}
    return {ABOVE: "\n".join(str(path.absolute()) for path in found[:MOST_ABOVE])} if found else {}


def changes_since(disk: Disk, before: DiskRecord | None) -> Found:
    """Tell what may differ from ``before``, the same disk in the newest point (None: it was not there).

    A VHDX gets a new DataWriteGuid with the first write after it was opened, and a checkpoint puts a child above it:
    if the file that was replicated is still in the chain, it and its parents under their identifiers, sizes and times,
    only what stands above it can have changed. Anything else (merged, reverted, replaced, written in place) is
    compared by hash.
    """
    if before is None:
        return Found(SCAN, "the disk is new")
    if not isinstance(disk, VhdxDisk):
        return Found(SCAN, f"{disk.format} files carry no identifier of their state")
    state = before.source.get("state", "")
    for link in disk.chain:
        if identity(link).get("state") == state:
            if disk.size != before.size:
                return Found(SCAN, "the disk's size is another")
            return Found(CHAIN, "the replicated file is in the chain as it was", partial(disk.changed_since, link))
        if state.startswith(f"{link.image.data_write_guid}/"):
            return Found(SCAN, "the replicated file or a parent of it was touched")
    return Found(SCAN, "the replicated file is no longer in the chain, or was written to")
