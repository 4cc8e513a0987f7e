"""FAT12, FAT16 and FAT32, read and written without mounting: what an EFI system partition is.

Writes are ordered so that the volume is whole at every one of them, for whoever reads it next: data, then its chain in
the allocation table, then the folder's slot that makes it a file, then the advice on free space; a removal goes the
other way round. Cut anywhere, every older file reads as before, and at worst some clusters belong to no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

from conversion.device import BlockDevice, WritableDevice
from conversion.errors import ConversionError, DamagedError, NoSpaceError, UnsupportedError
from conversion.filesystems.fat_boot import SLOT_BYTES, Geometry
from conversion.filesystems.fat_folder import (
    ATTRIBUTE_ARCHIVE,
    ATTRIBUTE_FOLDER,
    DELETED,
    MOST_SLOTS,
    Slot,
    change_slot,
    check_name,
    decode_folder,
    encode_name,
    encode_slot,
    free_slots,
    make_alias,
    taken_names,
)
from conversion.filesystems.fat_table import AllocationTable, FreeSpace, Run
from conversion.filesystems.filesystem import Entry

DEFAULT_STAMP: Final = datetime(1980, 1, 1, tzinfo=UTC)  # a constant, so that the same conversion writes the same bytes
_LARGEST_FILE_BYTES: Final = (1 << 32) - 1
_LARGEST_FOLDER_BYTES: Final = MOST_SLOTS * SLOT_BYTES
_MOST_FREED_CLUSTERS: Final = 1 << 18  # of one file; bounds what a removal holds in memory


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder's slots. ``clusters`` is empty for the root of FAT12 and FAT16, which lies outside the clusters."""

    cluster: int  # as another folder's ".." names it: 0 for any root
    clusters: tuple[int, ...]
    content: bytes
    slots: tuple[Slot, ...]

    def find(self, name: str) -> Slot | None:
        return next((slot for slot in self.slots if not slot.is_label and slot.is_called(name)), None)


class FatFileSystem:
    """The FAT volume that fills ``device``: a FileSystem that is also written.

    ``stamp`` is the time that new and changed files bear. Nobody else may write to the device while this is used. The
    dirty bit is set during a change and left as it was found after it.
    """

    def __init__(self, device: BlockDevice, *, stamp: datetime = DEFAULT_STAMP) -> None:
        """Read the boot sector. Raises DamagedError, UnsupportedError."""
        self._device = cast(WritableDevice, device)  # what only reads is refused where it is to be written
        self._stamp = stamp
        self._geometry = Geometry.read(device)
        self._table = AllocationTable(self._device, self._geometry)
        self._space = FreeSpace(self._device, self._geometry)

    @property
    def kind(self) -> str:
        """As blkid says: vfat."""
        return "vfat"

    @property
    def uuid(self) -> str:
        """The volume's serial number as ``XXXX-XXXX``, empty where it has none."""
        serial = self._geometry.serial
        return f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if serial else ""

    @property
    def label(self) -> str:
        """The label in the root folder, empty where it has none. Raises DamagedError."""
        return next((slot.name for slot in self._root().slots if slot.is_label), "")

    @property
    def geometry(self) -> Geometry:
        """Where things lie on the volume."""
        return self._geometry

    @property
    def is_dirty(self) -> bool:
        """Whether the volume says that it was not put away properly."""
        return not self._table.is_clean()

    @property
    def free_bytes(self) -> int | None:
        """What the volume believes to be free, bytes; None where it does not say (FAT12, FAT16)."""
        return None if self._space.count is None else self._space.count * self._geometry.cluster_bytes

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        """Return a file's content, None where there is no such file. Raises DamagedError beyond ``largest_bytes``."""
        slot = self._find_file(path)
        if slot is None:
            return None
        if slot.size > largest_bytes:
            raise DamagedError(f"{slot.size} bytes, where at most {largest_bytes} were expected", subject=path)
        return b"".join(self._device.read_at(offset, length) for offset, length in self._extents_of(slot))

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries without ``.`` and ``..``, sorted by name; None where there is no such folder."""
        folders = self._walk(_parts(path))
        if folders is None:
            return None
        entries = [
            Entry(slot.name, "folder", 0) if slot.is_folder else Entry(slot.name, "file", slot.size)
            for slot in folders[-1].slots
            if not slot.is_label and slot.name not in {".", ".."}
        ]
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        """Return where a file's bytes lie, as (offset, length) on the device, together exactly its size, or None."""
        slot = self._find_file(path)
        return None if slot is None else self._extents_of(slot)

    def make_folder(self, path: str) -> None:
        """Make a folder, and those above it that are missing. One that exists is left as it is.

        Raises ConversionError where a file is in the way or FAT cannot hold the name, NoSpaceError before anything is
        written for the folder that has no room.
        """
        parts = _parts(path)
        folder = self._root()
        for depth, name in enumerate(parts):
            slot = folder.find(name)
            if slot is None:
                check_name(name)
                cluster = self._add(folder, name, ATTRIBUTE_FOLDER, b"")
                folder = self._read_folder(cluster)
            elif slot.is_folder:
                folder = self._read_folder(slot.cluster)
            else:
                raise ConversionError("a file is in the way of a folder", subject="/" + "/".join(parts[: depth + 1]))

    def create_file(self, path: str, data: bytes, *, overwrite: bool = False) -> None:
        """Write a file with the content ``data``; its folder must exist.

        With ``overwrite`` a file that exists is replaced: the new content is written beside the old, then one write
        of one slot turns to it, so there must be room for both. Name, alias and attributes stay. Raises
        ConversionError where the folder is missing, the name is taken (or a folder's) or FAT cannot hold it,
        NoSpaceError before anything is written.
        """
        if len(data) > _LARGEST_FILE_BYTES:
            raise NoSpaceError(f"FAT holds no file of {len(data)} bytes", subject=path)
        folders, name = self._folders_above(path)
        slot = folders[-1].find(name)
        if slot is None:
            check_name(name)
            self._add(folders[-1], name, ATTRIBUTE_ARCHIVE, data)
        elif slot.is_folder:
            raise ConversionError("a folder is in the way of a file", subject=path)
        elif not overwrite:
            raise ConversionError("the file exists already", subject=path)
        else:
            self._replace(folders, slot, data)

    def remove_file(self, path: str) -> None:
        """Remove a file. Raises ConversionError where there is none, DamagedError where its chain is not its own."""
        folders, name = self._folders_above(path)
        slot = folders[-1].find(name)
        if slot is None or slot.is_folder:
            raise ConversionError("there is no such file", subject=path)
        self._remove(folders, slot)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder. Raises ConversionError where there is none, it is the root, or not empty."""
        folders, name = self._folders_above(path)
        slot = folders[-1].find(name)
        if slot is None or not slot.is_folder:
            raise ConversionError("there is no such folder", subject=path)
        if any(inner.name not in {".", ".."} for inner in self._read_folder(slot.cluster).slots):
            raise ConversionError("the folder is not empty", subject=path)
        self._remove(folders, slot)

    def _root(self) -> _Folder:
        geometry = self._geometry
        if geometry.bits == 32:
            return self._read_folder(geometry.root_cluster)
        return self._folder_of(0, (), self._device.read_at(geometry.root_offset, geometry.root_bytes))

    def _read_folder(self, cluster: int) -> _Folder:
        runs = self._table.runs(cluster)
        if sum(count for _, count in runs) * self._geometry.cluster_bytes > _LARGEST_FOLDER_BYTES:
            raise DamagedError(f"the folder at cluster {cluster} is larger than a folder can be", subject="FAT volume")
        content = b"".join(self._device.read_at(*self._extent_of(run)) for run in runs)
        clusters = tuple(cluster for first, count in runs for cluster in range(first, first + count))
        return self._folder_of(0 if cluster == self._geometry.root_cluster else cluster, clusters, content)

    def _folder_of(self, cluster: int, clusters: tuple[int, ...], content: bytes) -> _Folder:
        slots = decode_folder(content, wide_clusters=self._geometry.bits == 32)
        return _Folder(cluster, clusters, content, tuple(slots))

    def _walk(self, parts: list[str]) -> list[_Folder] | None:
        """Return the folders from the root to the one that ``parts`` name, None where one is missing."""
        folders = [self._root()]
        for name in parts:
            slot = folders[-1].find(name)
            if slot is None or not slot.is_folder:
                return None
            folders.append(self._read_folder(slot.cluster))
        return folders

    def _folders_above(self, path: str) -> tuple[list[_Folder], str]:
        parts = _parts(path)
        if not parts:
            raise ConversionError("the root folder is neither made, replaced nor removed", subject=path)
        folders = self._walk(parts[:-1])
        if folders is None:
            raise ConversionError("there is no such folder", subject="/" + "/".join(parts[:-1]))
        return folders, parts[-1]

    def _find_file(self, path: str) -> Slot | None:
        parts = _parts(path)
        folders = self._walk(parts[:-1]) if parts else None
        slot = folders[-1].find(parts[-1]) if folders else None
        return None if slot is None or slot.is_folder else slot

    def _extent_of(self, run: Run) -> tuple[int, int]:
        return self._geometry.cluster_offset(run[0]), run[1] * self._geometry.cluster_bytes

    def _extents_of(self, slot: Slot) -> tuple[tuple[int, int], ...]:
        if slot.size == 0:
            return ()
        wanted = -(-slot.size // self._geometry.cluster_bytes)
        extents = [self._extent_of(run) for run in self._table.runs(slot.cluster, wanted)]
        offset, length = extents[-1]
        extents[-1] = (offset, length - (wanted * self._geometry.cluster_bytes - slot.size))
        return tuple(extents)

    def _add(self, folder: _Folder, name: str, attributes: int, data: bytes) -> int:
        """Write a new file or folder into ``folder``; return its first cluster, 0 where it has none."""
        cluster_bytes = self._geometry.cluster_bytes
        is_folder = bool(attributes & ATTRIBUTE_FOLDER)
        alias = make_alias(name, taken_names(folder.slots))
        long_name = encode_name(name, alias)
        count = len(long_name) // SLOT_BYTES + 1
        first = free_slots(folder.content, count)
        growth = self._growth(folder, first + count)
        wanted = 1 if is_folder else -(-len(data) // cluster_bytes)
        clusters = self._table.find_free(wanted + growth, self._space.start)
        own, more = clusters[:wanted], clusters[wanted:]
        cluster = own[0] if own else 0
        if is_folder:
            data = self._empty_folder(cluster, folder.cluster)
        with self._changing():
            self._write_clusters(own, data)
            self._table.store(self._table.chain(own))
            if more:
                folder = self._extend(folder, more)
            self._device.flush()
            size = 0 if is_folder else len(data)
            self._write_slots(folder, first, long_name + encode_slot(alias, attributes, cluster, size, self._stamp))
            self._device.flush()
            self._space.note(taken=len(clusters), freed=0, last=clusters[-1] if clusters else None)
        return cluster

    def _replace(self, folders: list[_Folder], slot: Slot, data: bytes) -> None:
        freed = self._clusters_of(folders, slot)
        clusters = self._table.find_free(-(-len(data) // self._geometry.cluster_bytes), self._space.start)
        at = slot.last_slot * SLOT_BYTES
        raw = folders[-1].content[at : at + SLOT_BYTES]
        changed = change_slot(raw, clusters[0] if clusters else 0, len(data), self._stamp)
        with self._changing():
            self._write_clusters(clusters, data)
            self._table.store(self._table.chain(clusters))
            self._device.flush()
            self._device.write_at(self._slot_offset(folders[-1], slot.last_slot), changed)
            self._device.flush()
            self._table.store(dict.fromkeys(freed, 0))
            self._space.note(taken=len(clusters), freed=len(freed), last=clusters[-1] if clusters else None)

    def _remove(self, folders: list[_Folder], slot: Slot) -> None:
        freed = self._clusters_of(folders, slot)
        folder = folders[-1]
        raw = bytearray(folder.content[slot.first_slot * SLOT_BYTES : (slot.last_slot + 1) * SLOT_BYTES])
        raw[::SLOT_BYTES] = bytes([DELETED]) * (len(raw) // SLOT_BYTES)
        with self._changing():
            # The alias lies in the last slot and makes it a file; pieces of a long name alone are nothing.
            for index, piece in reversed(self._sectors_of(folder, slot.first_slot, bytes(raw))):
                self._device.write_at(self._slot_offset(folder, index), piece)
            self._device.flush()
            self._table.store(dict.fromkeys(freed, 0))
            self._space.note(taken=0, freed=len(freed), last=None)

    def _clusters_of(self, folders: list[_Folder], slot: Slot) -> list[int]:
        """Return the clusters that are free once ``slot`` is gone, having looked that they are its own."""
        if slot.cluster == 0:
            return []
        runs = self._table.runs(slot.cluster)
        total = sum(count for _, count in runs)
        if total > _MOST_FREED_CLUSTERS:
            raise UnsupportedError(f"a file of {total} clusters is too large to be removed", subject=slot.name)
        clusters = [cluster for first, count in runs for cluster in range(first, first + count)]
        if total * self._geometry.cluster_bytes < slot.size:
            raise DamagedError(f"its {total} clusters do not hold its {slot.size} bytes", subject=slot.name)
        others = {cluster for folder in folders for cluster in folder.clusters}
        others.update(other.cluster for other in folders[-1].slots if other is not slot)
        if not others.isdisjoint(clusters):
            raise DamagedError("its clusters belong to something else as well", subject=slot.name)
        return clusters

    def _growth(self, folder: _Folder, slots: int) -> int:
        """Return how many clusters a folder lacks to hold ``slots``. Raises NoSpaceError where it cannot grow."""
        missing = slots * SLOT_BYTES - len(folder.content)
        if missing <= 0:
            return 0
        if not folder.clusters or slots > MOST_SLOTS:
            raise NoSpaceError(f"a folder has no room for {slots} entries", subject="FAT volume")
        return -(-missing // self._geometry.cluster_bytes)

    def _extend(self, folder: _Folder, clusters: list[int]) -> _Folder:
        """Append empty ``clusters`` to a folder: emptied and chained to each other before the folder leads to them."""
        empty = bytes(len(clusters) * self._geometry.cluster_bytes)
        self._write_clusters(clusters, empty)
        self._table.store(self._table.chain(clusters))
        self._device.flush()
        self._table.store({folder.clusters[-1]: clusters[0]})
        return _Folder(folder.cluster, (*folder.clusters, *clusters), folder.content + empty, folder.slots)

    def _empty_folder(self, cluster: int, parent: int) -> bytes:
        dots = [
            encode_slot(f"{name:<11}".encode("ascii"), ATTRIBUTE_FOLDER, target, 0, self._stamp)
            for name, target in ((".", cluster), ("..", parent))
        ]
        return b"".join(dots).ljust(self._geometry.cluster_bytes, b"\0")

    def _write_clusters(self, clusters: list[int], data: bytes) -> None:
        """Write ``data`` over ``clusters``, neighbours at once, the last sector filled with zeros."""
        cluster_bytes = self._geometry.cluster_bytes
        data += bytes(-len(data) % self._geometry.sector_bytes)
        start = 0
        for index in range(1, len(clusters) + 1):
            if index == len(clusters) or clusters[index] != clusters[index - 1] + 1:
                piece = data[start * cluster_bytes : index * cluster_bytes]
                self._device.write_at(self._geometry.cluster_offset(clusters[start]), piece)
                start = index

    def _write_slots(self, folder: _Folder, first: int, raw: bytes) -> None:
        """Write slots so that a cut between two sectors leaves a folder without the new file, or with it.

        Slots before the end mark go in their order: a long name without its alias is nothing. What lies behind the
        end mark is not looked at, so it goes first and backwards, and the sector that loses the mark last.
        """
        content, count = folder.content, len(raw) // SLOT_BYTES
        slots = len(content) // SLOT_BYTES
        end = next((index for index in range(slots) if content[index * SLOT_BYTES] == 0), slots)
        after = first + count
        if end < after < slots and content[after * SLOT_BYTES]:
            self._device.write_at(self._slot_offset(folder, after), bytes(SLOT_BYTES))  # the new end mark
        pieces = self._sectors_of(folder, first, raw)
        before = [piece for piece in pieces if piece[0] + len(piece[1]) // SLOT_BYTES <= end]
        for index, piece in [*before, *reversed(pieces[len(before) :])]:
            self._device.write_at(self._slot_offset(folder, index), piece)

    def _sectors_of(self, folder: _Folder, first: int, raw: bytes) -> list[tuple[int, bytes]]:
        """Return slots cut at the borders of sectors, as (index of the slot, bytes)."""
        per_sector = self._geometry.sector_bytes // SLOT_BYTES
        pieces: list[tuple[int, bytes]] = []
        index, end = first, first + len(raw) // SLOT_BYTES
        while index < end:
            stop = min(end, index - index % per_sector + per_sector)
            pieces.append((index, raw[(index - first) * SLOT_BYTES : (stop - first) * SLOT_BYTES]))
            index = stop
        return pieces

    def _slot_offset(self, folder: _Folder, index: int) -> int:
        if not folder.clusters:
            return self._geometry.root_offset + index * SLOT_BYTES
        number, within = divmod(index * SLOT_BYTES, self._geometry.cluster_bytes)
        return self._geometry.cluster_offset(folder.clusters[number]) + within

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep the dirty bit set while the volume is being changed; what fails inside leaves it set."""
        if not hasattr(self._device, "write_at"):
            raise ConversionError("the device takes no writes", subject="FAT volume")
        was_clean = self._table.is_clean()
        self._table.set_clean(False)
        yield
        self._device.flush()
        self._table.set_clean(was_clean)
        self._device.flush()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in {"", "."}]
