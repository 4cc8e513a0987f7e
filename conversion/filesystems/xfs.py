"""XFS, versions 4 and 5, read as it lies on the disk: its log is not replayed, as GRUB does not replay it either.

Layout: the XFS Algorithms & Data Structures document. Everything is big-endian but the checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import DamagedError, UnsupportedError
from conversion.filesystems.filesystem import Entry, EntryKind
from conversion.filesystems.walk import (
    LARGEST_FOLDER_BYTES,
    LONGEST_LINK_BYTES,
    MOST_ENTRIES,
    Run,
    Source,
    crc32c,
    find,
    kind_of_mode,
    listed,
    overwritable_extents,
    printable,
    read_runs,
    uuid_text,
)
from conversion.filesystems.xfs_log import is_clean

_SUPERBLOCK: Final = struct.Struct(">4sIQ 16x 16s QQ 20x II 4x I H 2x H 2x 12s B x BBB 67x B 7x I 12x I 4x")
assert _SUPERBLOCK.size == 224
_LEAF_OFFSET: Final = 32 << 30  # where a folder's index begins in its own address space
_INCOMPATIBLE: Final = {
    0x1: "ftype", 0x2: "spinodes", 0x4: "meta_uuid", 0x8: "bigtime", 0x10: "needsrepair", 0x20: "nrext64",
    0x40: "exchange", 0x80: "parent", 0x100: "metadir", 0x200: "zoned", 0x400: "zone gaps",
}  # fmt: skip
_READABLE: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100
_META_UUID, _FTYPE_V4, _REALTIME, _MANY_EXTENTS = 0x4, 0x200, 0x1, 0x10
MOST_RUNS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class _Inode:
    number: int
    kind: EntryKind
    size: int
    format: int  # 1 in the inode, 2 extents in the inode, 3 a tree of extents
    extent_count: int
    fork: bytes
    in_place: bool  # whether its data may be overwritten: on the data device and shared with no other file


class XfsFileSystem:
    """One file system over ``device``, which is only read."""

    def __init__(self, device: BlockDevice) -> None:
        """Raises DamagedError where there is no sound superblock, UnsupportedError where a feature is unknown."""
        self._source = Source(device, "the XFS file system")
        self._read_superblock(self._source.read(0, 512))
        self._inode = lru_cache(maxsize=4096)(self._read_inode)
        self._folder = lru_cache(maxsize=256)(self._read_folder)

    @property
    def kind(self) -> str:
        """Always xfs."""
        return "xfs"

    @property
    def uuid(self) -> str:
        """The file system's UUID."""
        return self._uuid

    @property
    def label(self) -> str:
        """The volume's name."""
        return self._label

    @property
    def is_dirty(self) -> bool:
        """Whether the log may hold changes that a mount would replay. Raises DamagedError for no log at all."""
        if not self._log_start or not self._log_blocks:
            return True  # an external log: nothing can be said, so nothing is promised
        offset = self._byte(self._log_start)
        size = self._log_blocks * self._block_size
        return not is_clean(lambda at, length: self._source.read(offset + at, length), size)

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        """Return a file's content, None where there is no such file. Raises DamagedError beyond ``largest_bytes``."""
        inode = self._file(path)
        if inode is None:
            return None
        if inode.size > largest_bytes:
            raise self._source.damaged(f"{path} has {inode.size} bytes, more than {largest_bytes}")
        return self._content(inode)

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries; None where there is no such folder."""
        number = find(self, path)
        if number is None or self._inode(number).kind != "folder":
            return None
        found = self._folder(number).items()
        return listed(self._described(name, child) for name, child in found)

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        """Return where a file's bytes lie; None where they cannot be overwritten in place."""
        inode = self._file(path)
        if inode is None or inode.format == 1 or not inode.in_place:
            return None
        runs = self._runs(inode, most_blocks=-(-inode.size // self._block_size))
        return overwritable_extents(self._on_device(runs), self._block_size, inode.size)

    # -- the tree that paths are looked up in

    def root(self) -> int:
        """Return the root folder's inode number."""
        return self._root

    def kind_of(self, node: int) -> EntryKind:
        """Return what an inode is."""
        return self._inode(node).kind

    def child(self, folder: int, name: bytes) -> int | None:
        """Return the inode number of a name in a folder."""
        return self._folder(folder).get(name)

    def link_target(self, node: int) -> bytes:
        """Return where a symbolic link leads."""
        inode = self._inode(node)
        if inode.size > LONGEST_LINK_BYTES:
            raise self._source.damaged(f"symbolic link {node} has {inode.size} bytes")
        if inode.format == 1 or not self._v5:
            return self._content(inode)
        target = b""
        for run in self._on_device(self._runs(inode, most_blocks=64)):
            for index in range(run.count):
                block = self._source.read(((run.source_block or 0) + index) * self._block_size, self._block_size)
                if block[:4] != b"XSLM":
                    raise self._source.damaged(f"symbolic link {node} does not hold its target")
                target += block[56 : 56 + int.from_bytes(block[8:12], "big")]
        return target[: inode.size]

    # -- the layout

    def _read_superblock(self, sector: bytes) -> None:
        self._root: int
        self._groups: int
        self._group_blocks: int
        self._block_size: int
        self._group_log: int
        (
            magic, self._block_size, _, uuid, self._log_start, self._root, self._group_blocks, self._groups,
            self._log_blocks, version, self._inode_size, label, block_log, inode_log, self._inodes_log,
            self._group_log, folder_log, features2, incompatible,
        ) = _SUPERBLOCK.unpack_from(sector)  # fmt: skip
        if magic != b"XFSB":
            raise self._source.damaged("there is no XFS superblock")
        self._v5 = version & 0xF == 5
        sound = (
            9 <= block_log <= 16
            and self._block_size == 1 << block_log
            and 8 <= inode_log <= 11
            and self._inode_size == 1 << inode_log
            and self._inodes_log == block_log - inode_log
            and 1 <= self._group_log <= 31
            and 0 < self._group_blocks <= 1 << self._group_log
            and folder_log <= 16 - block_log
            and self._groups > 0
        )
        if version & 0xF not in {4, 5} or not sound:
            raise self._source.damaged("the superblock contradicts itself")
        if self._v5:
            sector_size = int.from_bytes(sector[102:104], "big")
            if not 512 <= sector_size <= 32768:
                raise self._source.damaged("the superblock contradicts itself")
            self._verify(self._source.read(0, sector_size), 224, "the superblock")
            if incompatible & ~_READABLE:
                raise UnsupportedError(f"it needs {_names(incompatible & ~_READABLE)}", subject=self._source.subject)
        self._has_kinds = bool(incompatible & 1) if self._v5 else bool(features2 & _FTYPE_V4)
        self._folder_block = self._block_size << folder_log
        self._uuid, self._label = uuid_text(uuid), printable(label)

    def _verify(self, block: bytes, at: int, what: str) -> None:
        total = crc32c(0xFFFFFFFF, block[:at] + bytes(4) + block[at + 4 :]) ^ 0xFFFFFFFF
        if total != int.from_bytes(block[at : at + 4], "little"):
            raise self._source.damaged(f"{what} fails its checksum")

    def _byte(self, block: int) -> int:
        """Return where a file system block lies, bytes: its number holds the group and the block in it."""
        group, within = block >> self._group_log, block & (1 << self._group_log) - 1
        if group >= self._groups or within >= self._group_blocks:
            raise self._source.damaged(f"there is no block {block}")
        return (group * self._group_blocks + within) * self._block_size

    def _read_inode(self, number: int) -> _Inode:
        block, index = number >> self._inodes_log, number & (1 << self._inodes_log) - 1
        body = self._source.read(self._byte(block) + index * self._inode_size, self._inode_size)
        if body[:2] != b"IN" or body[4] not in {1, 2, 3}:
            raise self._source.damaged(f"there is no inode {number}")
        flags2, core = 0, 100
        if body[4] == 3:
            self._verify(body, 100, f"inode {number}")
            flags2, core = int.from_bytes(body[120:128], "big"), 176
            if int.from_bytes(body[152:160], "big") != number:
                raise self._source.damaged(f"inode {number} says that it is another")
        fork_end = core + body[82] * 8 if body[82] else self._inode_size
        count = body[24:32] if flags2 & _MANY_EXTENTS else body[76:80]
        size = int.from_bytes(body[56:64], "big")
        flags = int.from_bytes(body[90:92], "big")
        if size >> 63 or not core <= fork_end <= self._inode_size:
            raise self._source.damaged(f"inode {number} contradicts itself")
        return _Inode(
            number=number,
            kind=kind_of_mode(int.from_bytes(body[2:4], "big")),
            size=size,
            format=body[5],
            extent_count=int.from_bytes(count, "big"),
            fork=body[core:fork_end],
            in_place=not flags & _REALTIME and not flags2 & 0x2,  # 0x2: it may share extents with another (reflink)
        )

    # -- files

    def _file(self, path: str) -> _Inode | None:
        number = find(self, path)
        inode = self._inode(number) if number is not None else None
        return inode if inode is not None and inode.kind == "file" else None

    def _content(self, inode: _Inode) -> bytes:
        if inode.format == 1:
            if inode.size > len(inode.fork):
                raise self._source.damaged(f"inode {inode.number} has no room for what it holds")
            return inode.fork[: inode.size]
        runs = self._on_device(self._runs(inode, most_blocks=-(-inode.size // self._block_size)))
        return read_runs(self._source, runs, self._block_size, inode.size)

    def _on_device(self, runs: Iterator[Run]) -> Iterator[Run]:
        """Translate block numbers, which hold their group, into those that count from the start of the device."""
        for run in runs:
            if run.source_block is None:
                yield run
                continue
            first = self._byte(run.source_block) // self._block_size
            last = self._byte(run.source_block + run.count - 1) // self._block_size
            if last - first != run.count - 1:
                raise self._source.damaged("an extent reaches beyond its allocation group")
            yield Run(run.block, run.count, first)

    def _runs(self, inode: _Inode, *, most_blocks: int) -> Iterator[Run]:
        """Yield a file's extents up to ``most_blocks``, ascending; holes are left out, unwritten ones lack a source."""
        reached = 0
        for number, raw in enumerate(self._extent_records(inode)):
            high, low = struct.unpack(">QQ", raw)
            block, count = high >> 9 & (1 << 54) - 1, low & (1 << 21) - 1
            source = (high & 0x1FF) << 43 | low >> 21
            if block < reached or not count or number > MOST_RUNS:
                raise self._source.damaged(f"the extents of inode {inode.number} overlap or are too many")
            reached = block + count
            if block >= most_blocks:
                return
            yield Run(block, min(count, most_blocks - block), None if high >> 63 else source)

    def _extent_records(self, inode: _Inode) -> Iterator[bytes]:
        if inode.format == 2:
            if inode.extent_count * 16 > len(inode.fork):
                raise self._source.damaged(f"inode {inode.number} has no room for its extents")
            for at in range(0, inode.extent_count * 16, 16):
                yield inode.fork[at : at + 16]
            return
        if inode.format != 3:
            raise self._source.damaged(f"inode {inode.number} holds its data in the unknown way {inode.format}")
        level, count = int.from_bytes(inode.fork[:2], "big"), int.from_bytes(inode.fork[2:4], "big")
        room = (len(inode.fork) - 4) // 16
        if not 0 < count <= room or not 0 < level <= 9:
            raise self._source.damaged(f"the extent tree of inode {inode.number} contradicts itself")
        pending = [(block, level - 1) for block in self._pointers(inode.fork, 4, room, count)]
        for visited in range(MOST_RUNS):
            if not pending:
                return
            block, level = pending.pop()
            data = self._source.read(self._byte(block), self._block_size)
            header = 72 if self._v5 else 24
            room = (self._block_size - header) // 16
            its_level, count = struct.unpack_from(">HH", data, 4)
            if data[:4] != (b"BMA3" if self._v5 else b"BMAP") or its_level != level or count > room:
                raise self._source.damaged(f"the extent tree of inode {inode.number} contradicts itself")
            if self._v5:
                self._verify(data, 64, f"the extent tree of inode {inode.number}")
            if level:
                pending += [(child, level - 1) for child in self._pointers(data, header, room, count)]
            else:
                yield from (data[at : at + 16] for at in range(header, header + count * 16, 16))
            if len(pending) + visited > MOST_RUNS:
                break
        raise self._source.damaged(f"the extent tree of inode {inode.number} is larger than any")

    def _pointers(self, node: bytes, header: int, room: int, count: int) -> list[int]:
        """Return a node's children, last first: the pointers follow all the keys there is room for."""
        return list(struct.unpack_from(f">{count}Q", node, header + room * 8))[::-1]

    # -- folders

    def _read_folder(self, number: int) -> dict[bytes, int]:
        inode = self._inode(number)
        if inode.kind != "folder":
            return {}
        found: dict[bytes, int] = {}
        if inode.format == 1:
            self._short_entries(inode, found)
            return found
        # A folder's size covers the blocks of entries alone; the index that follows at 32 GiB is not needed.
        if inode.size > LARGEST_FOLDER_BYTES:
            raise self._source.damaged(f"folder {number} has {inode.size} bytes")
        content = self._folder_content(inode)
        for at in range(0, len(content), self._folder_block):
            self._block_entries(content[at : at + self._folder_block], number, found)
        return found

    def _folder_content(self, inode: _Inode) -> bytes:
        """Return the blocks of entries; their number follows from the extents, as the size may be one block's only."""
        runs = list(self._on_device(self._runs(inode, most_blocks=_LEAF_OFFSET // self._block_size)))
        end = max((run.block + run.count for run in runs), default=0) * self._block_size
        if end > LARGEST_FOLDER_BYTES:
            raise self._source.damaged(f"folder {inode.number} has {end} bytes")
        return read_runs(self._source, runs, self._block_size, end)

    def _described(self, name: bytes, number: int) -> tuple[bytes, EntryKind, int]:
        """Return an entry. Where the log was not replayed, a new file's inode may not be there: that hides no other."""
        try:
            inode = self._inode(number)
        except DamagedError:
            return name, "other", 0
        return name, inode.kind, inode.size

    def _short_entries(self, inode: _Inode, found: dict[bytes, int]) -> None:
        data = self._content(inode)
        if len(data) < 6:
            raise self._source.damaged(f"folder {inode.number} is too short")
        count, width = data[0] or data[1], 8 if data[1] else 4
        at = 2 + width
        for _ in range(count):
            end = at + 3 + data[at] + self._has_kinds + width if at < len(data) else at
            if not at < end <= len(data):
                raise self._source.damaged(f"the entries of folder {inode.number} contradict themselves")
            found[data[at + 3 : at + 3 + data[at]]] = int.from_bytes(data[end - width : end], "big")
            at = end

    def _block_entries(self, block: bytes, number: int, found: dict[bytes, int]) -> None:
        if not any(block[:64]):
            return  # a hole: folders have them after deletions
        if block[:4] not in ({b"XDB3", b"XDD3"} if self._v5 else {b"XD2B", b"XD2D"}):
            raise self._source.damaged(f"folder {number} holds a block that is none of entries")
        at, end = 16, len(block)
        if self._v5:
            self._verify(block, 4, f"folder {number}")
            at = 64
        if block[:4] in {b"XDB3", b"XD2B"}:
            end -= 8 + 8 * int.from_bytes(block[-8:-4], "big")
            if end < at:
                raise self._source.damaged(f"the entries of folder {number} contradict themselves")
        while at + 12 <= end:
            if block[at : at + 2] == b"\xff\xff":
                length = int.from_bytes(block[at + 2 : at + 4], "big")
            else:
                size = block[at + 8]
                length = (8 + 1 + size + self._has_kinds + 2 + 7) & ~7
                found[block[at + 9 : at + 9 + size]] = int.from_bytes(block[at : at + 8], "big")
            if length < 8 or length & 7 or at + length > end or len(found) > MOST_ENTRIES:
                raise self._source.damaged(f"the entries of folder {number} contradict themselves")
            at += length


def _names(features: int) -> str:
    bits = [1 << bit for bit in range(32) if features >> bit & 1]
    return ", ".join(_INCOMPATIBLE.get(bit, f"the unknown feature {bit:#x}") for bit in bits)
