"""Adopting a VM that came back under another id: its disks are told by what is in them, and its history goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from replica import protection
from replica.errors import StandingError
from replica.failover import ledger
from replica.failover.means import Means
from replica.failover.transitions import Command
from replica.model import DiskRecord, Identity, Point, Settings, SourceDisk
from replica.source import change_source, is_live, looked_at
from replica.view import PointView
from vhdx.disk import Disk
from vhdx.vhdx import VhdxDisk


@dataclass(frozen=True, slots=True)
class AdoptedDisk:
    """A disk that was recognised: which one it is, and by what."""

    source: SourceDisk
    was: str  # its address before
    because: str


@dataclass(frozen=True, slots=True)
class Adoption:
    """What was adopted."""

    settings: Settings
    disks: tuple[AdoptedDisk, ...]


def adopt(means: Means, disks: Sequence[Path | str], identity: Identity, *, dry_run: bool = False) -> Adoption:
    """Let the VM be replicated from these disks from now on, all of which must be its own; nothing is copied anew.

    A disk is known by its address, its chain of files, its virtual disk id, the id of its partition table, or where
    the VM's BIOS UUID is one that it had before, by its size alone. ``identity`` goes into the ledger. Raises
    StandingError, UsageError where a disk is not recognised, DiskError, SourceError.
    """
    with means.turn(Command.ADOPT) as turn:
        newest = turn.newest
        known = turn.settings.sources
        if len(disks) != len(known):
            raise StandingError(
                f"{means.name} has {len(known)} disks, and {len(disks)} were named",
                hint="name all of them; 'godwit protect --update' adds and removes disks",
            )
        with turn.kept():
            is_known = bool(identity.bios_uuid) and identity.bios_uuid.lower() in _uuids(means)
            found = _Recogniser(means, known, newest, by_size=is_known).all(disks)
        sources = tuple(one.source for one in found)
        change_source(sources)
        if dry_run:
            return Adoption(turn.settings, found)
        settings = turn.put(replace(turn.settings, sources=sources), Command.ADOPT, (identity,))
        return Adoption(settings, found)


def _uuids(means: Means) -> frozenset[str]:
    """Return the BIOS UUIDs that the VM ever had."""
    return frozenset(
        one.bios_uuid.lower()
        for version in ledger.versions(means.store, means.found)
        for one in (version.change.identities if version.change is not None else ())
        if one.bios_uuid
    )


class _Recogniser:
    """Tells which known disk a disk is."""

    def __init__(self, means: Means, known: Sequence[SourceDisk], newest: Point | None, *, by_size: bool) -> None:
        self._means = means
        self._known = list(known)
        self._newest = newest
        self._records = {} if newest is None else {one.number: one for one in newest.disks}
        self._by_size = by_size
        self._by_chain = protection.lineage(known, newest, means.open_disk)

    def all(self, disks: Iterable[Path | str]) -> tuple[AdoptedDisk, ...]:
        """Return which disk each is, no two the same. Raises StandingError where one is not recognised."""
        found = [self._one(one) for one in disks]
        numbers = [one.source.number for one in found]
        if len(set(numbers)) != len(numbers):
            raise StandingError("two of the disks are the same disk of the VM", hint="name each disk once")
        return tuple(sorted(found, key=lambda one: [source.number for source in self._known].index(one.source.number)))

    def _one(self, given: Path | str) -> AdoptedDisk:
        path = str(given if isinstance(given, str) and is_live(given) else Path(given).absolute())
        for source in self._known:
            if source.path == path:
                return AdoptedDisk(source, source.path, "it is at the place where it was")
        if not is_live(path):
            source_by_chain = self._by_chain(Path(path))
            if source_by_chain is not None:
                return self._adopted(source_by_chain, path, "a file of its chain was replicated before")
        with looked_at(path, self._means.open_disk) as disk:
            return self._by_content(disk, path)

    def _by_content(self, disk: Disk, path: str) -> AdoptedDisk:
        tests: list[tuple[Callable[[DiskRecord], bool], str]] = []
        if isinstance(disk, VhdxDisk):
            own = str(disk.image.metadata.disk_id)
            tests.append(
                (lambda record: record.source.get("virtual_disk_id") == own, "its virtual disk id is the same")
            )
        table = _table_id(disk)
        if table is not None:
            tests.append((lambda record: self._table_id_of(record) == table, "its partition table has the same id"))
        if self._by_size:
            tests.append(
                (lambda record: record.size == disk.size, "the VM's BIOS UUID is known, and its size is the same")
            )
        for test, because in tests:
            found = [one for one in self._known if one.number in self._records and test(self._records[one.number])]
            if len(found) == 1:
                return self._adopted(found[0], path, because)
        raise StandingError(
            f"{path} cannot be told to be a disk of {self._means.name}",
            hint="is it another VM's? --bios-uuid names what the VM had before; 'godwit protect' begins anew",
        )

    def _adopted(self, source: SourceDisk, path: str, because: str) -> AdoptedDisk:
        return AdoptedDisk(replace(source, path=path), source.path, because)

    def _table_id_of(self, record: DiskRecord) -> bytes | None:
        assert self._newest is not None, "it has the record"
        with PointView(
            self._means.store, self._means.host, self._means.found, self._newest, record, workers=self._means.workers
        ) as view:
            return _table_id(view)


def _table_id(disk: Disk) -> bytes | None:
    """Return what tells a disk's partition table from every other: the GUID of a GPT, or the signature of an MBR."""
    sector = disk.sector_size
    if disk.size < 2 * sector:
        return None
    head = disk.read_at(0, 2 * sector)
    if head[sector : sector + 8] == b"EFI PART":
        return head[sector + 56 : sector + 72]
    signature = head[440:444]
    return signature if head[510:512] == b"\x55\xaa" and any(signature) else None
