"""The chains of a protected VM's disks, and which file of them the newest recovery point was read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replica import catalog
from replica.catalog import ProtectedVm
from replica.errors import SourceError
from replica.history import newest
from replica.model import DiskRecord, SourceDisk
from replica.source import HYPERV, is_live
from replica.stores.store import Store
from replica.tracking import ABOVE, FILES, above, identity
from vhdx.chain import open_vhdx
from vhdx.errors import DiskError
from vhdx.formats import chain_of, detect_format, open_disk
from vhdx.survey import Chain, survey_chain, survey_folder

POWERSHELL: Final = "Get-VMSnapshot -VMName NAME | Remove-VMSnapshot"


@dataclass(frozen=True, slots=True)
class Replicated:
    """The file that a disk's newest point was read from, and whether it and those beneath it are as they were.

    ``file`` is None where it is not in the chain any more: the next point then compares everything by hash.
    """

    point: int
    file: Path | None
    unchanged: bool


@dataclass(frozen=True, slots=True)
class DiskChain:
    """A disk, and its chain; where it has none that can be told, ``error`` says why, and ``hint`` what to do.

    ``number`` and ``name`` are those of a protected disk. ``failed``: its files could not be read.
    """

    path: str
    number: int | None = None
    name: str | None = None
    chain: Chain | None = None
    replicated: Replicated | None = None
    error: str | None = None
    hint: str | None = None
    failed: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether nothing is broken, as far as the chain is told at all."""
        return not self.failed and (self.chain is None or self.chain.broken is None)


def chains_of_vm(store: Store, found: ProtectedVm) -> tuple[DiskChain, ...]:
    """Return the chains of all disks of a protected VM; what cannot be read of one is told in its place."""
    settings = catalog.settings_in_force(store, found)
    point = newest(store, found.keys)
    records = {} if point is None else {disk.number: disk for disk in point.disks}
    chains = []
    for source in settings.sources:
        record = records.get(source.number)
        chains.append(_of_source(source, None if point is None else point.point, record))
    return tuple(chains)


def chains_at(path: Path, *, allowed_folders: Sequence[Path] = ()) -> tuple[DiskChain, ...]:
    """Return the chain of the disk at ``path``; of a folder, those of every disk that nothing stands on.

    Raises DiskError where the file or folder cannot be read.
    """
    if path.is_dir():
        return tuple(DiskChain(str(chain.path), chain=chain) for chain in survey_folder(path))
    return (DiskChain(str(path), chain=survey_chain(path, allowed_folders=allowed_folders)),)


def files_of_vm(store: Store, found: ProtectedVm) -> tuple[Path, ...]:
    """Return the newest files of a VM's VHDX disks. Raises SourceError where a disk is reached in another way."""
    files = []
    for source in catalog.settings_in_force(store, found).sources:
        if is_live(source.path):
            raise SourceError(_told(source.path), path=source.path, hint=_way(source.path))
        if detect_format(Path(source.path)) == "vhdx":
            files.append(Path(source.path))
    if not files:
        raise SourceError("none of its disks is a VHDX", path=found.vm.name, hint="'godwit checkpoints' lists them")
    return tuple(files)


def newer_files(sources: Sequence[SourceDisk]) -> dict[str, tuple[str, ...]]:
    """Return, for each disk file that other disks stand on, the newest of those, by the disk's path.

    A machine that runs on one of those writes nothing to the file that is protected.
    """
    found = {}
    for source in sources:
        if is_live(source.path):
            continue
        try:
            with open_disk(source.path) as disk:
                newer = above(disk).get(ABOVE)
        except DiskError:
            continue
        if newer is not None:
            found[source.path] = tuple(newer.split("\n"))
    return found


def _of_source(source: SourceDisk, point: int | None, record: DiskRecord | None) -> DiskChain:
    if is_live(source.path):
        return DiskChain(source.path, source.number, source.name, error=_told(source.path), hint=_way(source.path))
    path = Path(source.path)
    try:
        known = detect_format(path)
        if known != "vhdx":
            with open_disk(path) as disk:
                files = len(chain_of(disk))
            return DiskChain(
                source.path,
                source.number,
                source.name,
                error=f"{known}, of {files} file{'s' if files > 1 else ''}: chains of VHDX alone are told here",
            )
        chain = survey_chain(path)
        replicated = None if point is None or record is None else _replicated(chain, point, record)
        return DiskChain(source.path, source.number, source.name, chain, replicated)
    except DiskError as error:
        return DiskChain(source.path, source.number, source.name, error=str(error), hint=error.hint, failed=True)


def _replicated(chain: Chain, point: int, record: DiskRecord) -> Replicated:
    first = record.source.get(FILES, "").split("\n")[0]
    for link in chain.links:
        if str(link.path.absolute()) == first:
            return Replicated(point, link.path, _is_as_it_was(link.path, record))
    return Replicated(point, None, unchanged=False)


def _is_as_it_was(path: Path, record: DiskRecord) -> bool:
    try:
        with open_vhdx(path) as disk:
            return identity(disk).get("state") == record.source.get("state")
    except DiskError:
        return False


def _told(path: str) -> str:
    return f"this disk is read through {'Hyper-V' if path.startswith(HYPERV) else 'QEMU'}, which keeps its chain"


def _way(path: str) -> str:
    if path.startswith(HYPERV):
        return (
            f"on the host, '{POWERSHELL}' deletes checkpoints and merges their files; "
            "'godwit checkpoints PATH' lists the files there"
        )
    return "'virsh domblklist' and 'qemu-img info --backing-chain' tell of it"
