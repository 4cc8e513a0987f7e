"""ext2, ext3 and ext4, read as they would be after a mount had replayed the journal.

Layout: the kernel's Documentation/filesystems/ext4. Checksums are verified where the file system has them.
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
from conversion.filesystems.jbd2 import Journal, Replay
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

SUPERBLOCK_OFFSET: Final = 1024
SUPERBLOCK_SIZE: Final = 1024
_INODE: Final = struct.Struct("<H 2x I 24x I 4x 60s I 4x I")  # mode, size, flags, map, generation, size's high half
_EXTENT_HEADER: Final = struct.Struct("<HHHHI")
_EXTENT: Final = struct.Struct("<IHHI")  # block, count, start's high half, start
_EXTENT_INDEX: Final = struct.Struct("<IIHH")  # block, leaf, leaf's high half, unused
assert _INODE.size == 112 and _EXTENT_HEADER.size == _EXTENT.size == _EXTENT_INDEX.size == 12

_ROOT_INODE: Final = 2
_COMPRESSED, _ENCRYPTED, _INDEXED, _EXTENTS, _VERITY, _INLINE = 0x4, 0x800, 0x1000, 0x80000, 0x100000, 0x10000000
_INCOMPATIBLE: Final = {
    0x1: "compression", 0x2: "filetype", 0x4: "recover", 0x10: "meta_bg", 0x40: "extents", 0x80: "64bit", 0x100: "mmp",
    0x200: "flex_bg", 0x400: "ea_inode", 0x1000: "dirdata", 0x2000: "metadata_csum_seed", 0x4000: "large_dir",
    0x8000: "inline_data", 0x10000: "encrypt", 0x20000: "casefold",
}  # fmt: skip
_UNREADABLE: Final = 0x1 | 0x8 | 0x1000 | ~sum(_INCOMPATIBLE)
_HAS_JOURNAL, _SPARSE_SUPER, _METADATA_CSUM = 0x4, 0x1, 0x400
_FILETYPE, _RECOVER, _META_BG, _64BIT, _CSUM_SEED = 0x2, 0x4, 0x10, 0x80, 0x2000
MOST_RUNS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class _Inode:
    number: int
    kind: EntryKind
    size: int
    flags: int
    map: bytes  # the 60 bytes of i_block
    body: bytes  # the whole inode
    seed: int  # of the checksums of its blocks


class ExtFileSystem:
    """One file system over ``device``, which is only read."""

    def __init__(self, device: BlockDevice) -> None:
        """Raises DamagedError where there is no sound superblock, UnsupportedError where a feature is unknown."""
        self._source = Source(device, "the ext file system")
        sb = self._source.read(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE)
        self._read_superblock(sb)
        self.replay: Replay = Replay(dirty=False)
        self.journal_trouble: str = ""  # why the journal could not be read, where it should have been
        self._journal: Journal | None = None
        self._inode = lru_cache(maxsize=4096)(self._read_inode)
        self._folder = lru_cache(maxsize=256)(self._read_folder)
        try:
            self._open_journal(sb)
        except DamagedError as error:
            self.journal_trouble = error.message
        if self.replay.blocks:
            # The superblock itself may be among the changed blocks; what it says of the layout does not change.
            self._inode.cache_clear()

    @property
    def kind(self) -> str:
        """ext2, ext3 or ext4, told apart as blkid does."""
        return self._kind

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
        """Whether the journal has to be replayed, as in every copy of a mounted file system."""
        return self.replay.dirty or bool(self.journal_trouble)

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        """Return a file's content, None where there is no such file. Raises DamagedError beyond ``largest_bytes``."""
        inode = self._file(path)
        if inode is None:
            return None
        if inode.size > largest_bytes:
            raise self._source.damaged(f"{path} has {inode.size} bytes, more than {largest_bytes}")
        if inode.flags & (_ENCRYPTED | _COMPRESSED):
            raise UnsupportedError("the file is encrypted or compressed by ext4", subject=path)
        return self._content(inode)

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries; None where there is no such folder."""
        number = find(self, path)
        if number is None or self._inode(number).kind != "folder":
            return None
        return listed(self._described(name, child) for name, child in self._folder(number).items())

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        """Return where a file's bytes lie; None where they cannot be overwritten in place."""
        inode = self._file(path)
        if inode is None or inode.flags & (_ENCRYPTED | _COMPRESSED | _VERITY | _INLINE):
            return None
        runs = list(self._runs(inode, most_blocks=-(-inode.size // self._block_size)))
        journalled = self.replay.blocks
        for run in runs:
            first = run.source_block
            if first is not None and any(first <= block < first + run.count for block in journalled):
                return None  # the guest's next mount would replay the old content over what is written now
        return overwritable_extents(runs, self._block_size, inode.size)

    # -- the tree that paths are looked up in

    def root(self) -> int:
        """Return the root folder's inode number."""
        return _ROOT_INODE

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
        if inode.size < len(inode.map) and not inode.flags & (_EXTENTS | _INLINE):
            return inode.map[: inode.size]
        return b"" if inode.flags & _ENCRYPTED else self._content(inode)

    # -- the layout

    def _read_superblock(self, sb: bytes) -> None:
        def u32(at: int) -> int:
            return int.from_bytes(sb[at : at + 4], "little")

        def u16(at: int) -> int:
            return int.from_bytes(sb[at : at + 2], "little")

        if u16(0x38) != 0xEF53:
            raise self._source.damaged("there is no ext superblock")
        compatible, self._incompatible, self._read_only = u32(0x5C), u32(0x60), u32(0x64)
        self._has_checksums = bool(self._read_only & _METADATA_CSUM)
        if self._has_checksums and crc32c(0xFFFFFFFF, sb[:0x3FC]) != u32(0x3FC):
            raise self._source.damaged("the superblock fails its checksum")
        if self._incompatible & _UNREADABLE:
            raise UnsupportedError(f"it needs {_names(self._incompatible & _UNREADABLE)}", subject=self._source.subject)
        if u32(0x18) > 6:
            raise self._source.damaged(f"its blocks would have 2^{10 + u32(0x18)} bytes")
        self._block_size = 1024 << u32(0x18)
        self._blocks = u32(0x4) | (u32(0x150) << 32 if self._incompatible & _64BIT else 0)
        self._inodes, self._first_block = u32(0x0), u32(0x14)
        self._per_group, self._inodes_per_group = u32(0x20), u32(0x28)
        self._inode_size = u16(0x58) if u32(0x4C) >= 1 else 128
        wide = bool(self._incompatible & _64BIT)
        self._descriptor_size = u16(0xFE) if wide else 32
        self._first_meta_group = u32(0x104)
        sizes_are_sound = (
            128 <= self._inode_size <= self._block_size
            and self._inode_size & (self._inode_size - 1) == 0
            and (not wide or self._descriptor_size in {64, 128, 256, 512, 1024})
        )
        if not sizes_are_sound or not self._per_group or not self._inodes_per_group or self._first_block > 1:
            raise self._source.damaged("the superblock contradicts itself")
        self._uuid, self._label = uuid_text(sb[0x68:0x78]), printable(sb[0x78:0x88])
        self._seed = u32(0x270) if self._incompatible & _CSUM_SEED else crc32c(0xFFFFFFFF, sb[0x68:0x78])
        self._kind = _kind(compatible, self._incompatible, self._read_only)

    def _open_journal(self, sb: bytes) -> None:
        number = int.from_bytes(sb[0xE0:0xE4], "little")
        if not int.from_bytes(sb[0x5C:0x60], "little") & _HAS_JOURNAL or not self._incompatible & _RECOVER:
            return
        if not number:
            raise DamagedError("the journal is on another device")
        inode = self._read_inode(number)
        count = inode.size // self._block_size
        runs = list(self._runs(inode, most_blocks=count))

        def read_block(block: int) -> bytes:
            for run in runs:
                if run.block <= block < run.block + run.count and run.source_block is not None:
                    return self._source.read(
                        (run.source_block + block - run.block) * self._block_size, self._block_size
                    )
            raise self._source.damaged(f"the journal has no block {block}")

        self._journal = Journal(read_block, self._block_size, count)
        self.replay = self._journal.replay()

    def _block(self, number: int) -> bytes:
        """Return a block as it is after the replay."""
        copy = self.replay.blocks.get(number)
        if copy is not None and self._journal is not None:
            return self._journal.content(copy)
        return self._source.read(number * self._block_size, self._block_size)

    def _descriptor(self, group: int) -> bytes:
        per_block = self._block_size // self._descriptor_size
        block, within = divmod(group, per_block)
        if self._incompatible & _META_BG and block >= self._first_meta_group:
            first = block * per_block
            at = first * self._per_group + self._first_block + self._has_superblock(first)
        else:
            at = SUPERBLOCK_OFFSET // self._block_size + 1 + block
        raw = self._block(at)[within * self._descriptor_size :][: self._descriptor_size]
        if self._has_checksums:
            covered = raw[:0x1E] + bytes(2) + raw[0x20:]
            total = crc32c(crc32c(self._seed, struct.pack("<I", group)), covered) & 0xFFFF
            if total != int.from_bytes(raw[0x1E:0x20], "little"):
                raise self._source.damaged(f"the descriptor of group {group} fails its checksum")
        return raw

    def _has_superblock(self, group: int) -> bool:
        if group <= 1 or not self._read_only & _SPARSE_SUPER:
            return True
        return any(group == base**power for base in (3, 5, 7) for power in range(1, 21))

    def _read_inode(self, number: int) -> _Inode:
        if not 0 < number <= self._inodes:
            raise self._source.damaged(f"there is no inode {number}")
        group, index = divmod(number - 1, self._inodes_per_group)
        descriptor = self._descriptor(group)
        table = int.from_bytes(descriptor[8:12], "little")
        if len(descriptor) >= 64:
            table |= int.from_bytes(descriptor[0x28:0x2C], "little") << 32
        block, within = divmod(index * self._inode_size, self._block_size)
        body = self._block(table + block)[within : within + self._inode_size]
        mode, low, flags, block_map, generation, high = _INODE.unpack_from(body)
        seed = crc32c(crc32c(self._seed, struct.pack("<I", number)), struct.pack("<I", generation))
        if self._has_checksums:
            self._verify_inode(number, body, seed)
        kind = kind_of_mode(mode)
        size = low | (high << 32 if kind in {"file", "folder"} else 0)
        return _Inode(number, kind, size, flags, block_map, body, seed)

    def _verify_inode(self, number: int, body: bytes, seed: int) -> None:
        wanted, blank = int.from_bytes(body[0x7C:0x7E], "little"), bytearray(body)
        blank[0x7C:0x7E] = bytes(2)
        mask = 0xFFFF
        if len(body) > 128 and int.from_bytes(body[0x80:0x82], "little") >= 4:
            wanted |= int.from_bytes(body[0x82:0x84], "little") << 16
            blank[0x82:0x84] = bytes(2)
            mask = 0xFFFFFFFF
        if crc32c(seed, blank) & mask != wanted:
            raise self._source.damaged(f"inode {number} fails its checksum")

    # -- files

    def _file(self, path: str) -> _Inode | None:
        number = find(self, path)
        inode = self._inode(number) if number is not None else None
        return inode if inode is not None and inode.kind == "file" else None

    def _content(self, inode: _Inode) -> bytes:
        if inode.flags & _INLINE:
            return self._inline(inode)[: inode.size].ljust(inode.size, b"\0")
        runs = list(self._runs(inode, most_blocks=-(-inode.size // self._block_size)))
        if not self.replay.blocks:
            return read_runs(self._source, runs, self._block_size, inode.size)
        content = bytearray(read_runs(self._source, runs, self._block_size, inode.size))
        for run in runs:
            for index in range(run.count) if run.source_block is not None else ():
                start = (run.block + index) * self._block_size
                if start < inode.size and (run.source_block or 0) + index in self.replay.blocks:
                    data = self._block((run.source_block or 0) + index)
                    content[start : start + self._block_size] = data[: inode.size - start]
        return bytes(content)

    def _inline(self, inode: _Inode) -> bytes:
        """Return the 60 bytes in the block map and what the attribute system.data holds after the inode's fields."""
        body = inode.body
        first = 128 + int.from_bytes(body[0x80:0x82], "little") + 4 if len(body) > 130 else len(body)
        if int.from_bytes(body[first - 4 : first], "little") != 0xEA020000:
            return inode.map
        at = first
        while at + 16 <= len(body) and body[at : at + 4] != bytes(4):
            name_size, name_space, value_at, value_inode, value_size = struct.unpack_from("<BBHII", body, at)
            if name_space == 7 and body[at + 16 : at + 16 + name_size] == b"data" and not value_inode:
                return inode.map + body[first + value_at :][:value_size]
            at += (16 + name_size + 3) & ~3
        return inode.map

    def _runs(self, inode: _Inode, *, most_blocks: int) -> Iterator[Run]:
        """Yield a file's blocks up to ``most_blocks``, ascending; holes are left out."""
        if inode.size == 0:
            return
        found = self._extent_runs(inode) if inode.flags & _EXTENTS else self._mapped_runs(inode, most_blocks)
        reached = 0
        for count, run in enumerate(found):
            if count > MOST_RUNS or run.block < reached:
                raise self._source.damaged(f"the pieces of inode {inode.number} overlap or are more than {MOST_RUNS}")
            reached = run.block + run.count
            if run.block < most_blocks:
                yield Run(run.block, min(run.count, most_blocks - run.block), run.source_block)

    def _extent_runs(self, inode: _Inode) -> Iterator[Run]:
        nodes: list[tuple[bytes, int]] = [(inode.map, -1)]
        visited = 0
        while nodes:
            node, depth = nodes.pop()
            magic, entries, room, its_depth, _ = _EXTENT_HEADER.unpack_from(node)
            visited += 1
            fits = entries <= room <= len(node) // 12 - 1 and its_depth <= 5
            if magic != 0xF30A or not fits or depth not in {-1, its_depth} or visited > MOST_RUNS:
                raise self._source.damaged(f"the extent tree of inode {inode.number} contradicts itself")
            below = []
            for at in range(12, 12 * entries + 12, 12):
                if its_depth == 0:
                    block, count, high, low = _EXTENT.unpack_from(node, at)
                    start = low | high << 32
                    yield Run(block, count, start) if count <= 0x8000 else Run(block, count - 0x8000, None)
                else:
                    _, low, high, _ = _EXTENT_INDEX.unpack_from(node, at)
                    below.append((low | high << 32, its_depth - 1))
            if len(nodes) + len(below) > MOST_RUNS:
                raise self._source.damaged(f"the extent tree of inode {inode.number} is larger than any")
            nodes += [(self._extent_block(inode, block), depth) for block, depth in reversed(below)]

    def _extent_block(self, inode: _Inode, number: int) -> bytes:
        block = self._block(number)
        room = int.from_bytes(block[4:6], "little")
        end = 12 + 12 * room
        if self._has_checksums and (
            end + 4 > len(block) or crc32c(inode.seed, block[:end]) != int.from_bytes(block[end : end + 4], "little")
        ):
            raise self._source.damaged(f"block {number}, of an extent tree, fails its checksum")
        return block[: len(block) // 12 * 12]

    def _mapped_runs(self, inode: _Inode, most_blocks: int) -> Iterator[Run]:
        per_block = self._block_size // 4
        pointers = struct.unpack("<15I", inode.map)
        reached = 0
        for pointer in pointers[:12]:
            if pointer:
                yield Run(reached, 1, pointer)
            reached += 1
        for level, pointer in enumerate(pointers[12:], start=1):
            if reached >= most_blocks:
                return
            yield from self._indirect_runs(pointer, level, reached, most_blocks)
            reached += per_block**level

    def _indirect_runs(self, pointer: int, level: int, first: int, most_blocks: int) -> Iterator[Run]:
        if not pointer or first >= most_blocks:
            return
        per_block = self._block_size // 4
        below = struct.unpack(f"<{per_block}I", self._block(pointer))
        if level > 1:
            for index, child in enumerate(below):
                yield from self._indirect_runs(child, level - 1, first + index * per_block ** (level - 1), most_blocks)
            return
        index = 0
        while index < min(per_block, most_blocks - first):
            count = 1
            while index + count < per_block and below[index] and below[index + count] == below[index] + count:
                count += 1
            if below[index]:
                yield Run(first + index, count, below[index])
            index += count

    # -- folders

    def _read_folder(self, number: int) -> dict[bytes, int]:
        inode = self._inode(number)
        if inode.kind != "folder":
            return {}
        if inode.size > LARGEST_FOLDER_BYTES:
            raise self._source.damaged(f"folder {number} has {inode.size} bytes")
        found: dict[bytes, int] = {}
        if inode.flags & _INLINE:
            data = self._inline(inode)
            self._entries(data[4:60], found)
            self._entries(data[60 : inode.size], found)
            return found
        content = self._content(inode)
        for at in range(0, len(content), self._block_size):
            block = content[at : at + self._block_size]
            if not self._is_index(inode, at, block):
                self._verify_folder_block(inode, block)
            self._entries(block, found)
        return found

    def _is_index(self, inode: _Inode, at: int, block: bytes) -> bool:
        """Return whether a block is one of a hash tree: its end may still look like that of a block of entries."""
        spans_all = block[:4] == bytes(4) and self._entry_length(int.from_bytes(block[4:6], "little")) == len(block)
        return bool(inode.flags & _INDEXED) and (at == 0 or spans_all)

    def _verify_folder_block(self, inode: _Inode, block: bytes) -> None:
        tail = block[-12:]
        is_tail = len(tail) == 12 and tail[:8] == b"\0\0\0\0\x0c\0\0\xde"
        if self._has_checksums and is_tail and crc32c(inode.seed, block[:-12]) != int.from_bytes(tail[8:], "little"):
            raise self._source.damaged(f"folder {inode.number} fails its checksum")

    def _entries(self, block: bytes, found: dict[bytes, int]) -> None:
        at = 0
        while at + 8 <= len(block):
            child, length, name_size = struct.unpack_from("<IHH", block, at)
            if self._incompatible & _FILETYPE:
                name_size &= 0xFF
            length = self._entry_length(length)
            if length < 8 or at + length > len(block) or (child and name_size + 8 > length):
                raise self._source.damaged("a folder's entries contradict themselves")
            if child:
                found.setdefault(block[at + 8 : at + 8 + name_size], child)
            if len(found) > MOST_ENTRIES:
                raise self._source.damaged(f"a folder has more than {MOST_ENTRIES} entries")
            at += length

    def _entry_length(self, length: int) -> int:
        """Return an entry's length, which 64 KiB blocks do not fit in 16 bits."""
        if self._block_size < 65536:
            return length
        return self._block_size if length in {0, 65535} else (length & 65532) | (length & 3) << 16

    def _described(self, name: bytes, number: int) -> tuple[bytes, EntryKind, int]:
        inode = self._inode(number)
        return name, inode.kind, inode.size


def _names(features: int) -> str:
    bits = [1 << bit for bit in range(32) if features >> bit & 1]
    return ", ".join(_INCOMPATIBLE.get(bit, f"the unknown feature {bit:#x}") for bit in bits)


def _kind(compatible: int, incompatible: int, read_only: int) -> str:
    of_ext3 = {"incompatible": 0x2 | 0x4 | 0x10, "read_only": 0x1 | 0x2 | 0x4}
    if incompatible & ~of_ext3["incompatible"] or read_only & ~of_ext3["read_only"]:
        return "ext4"
    return "ext3" if compatible & _HAS_JOURNAL else "ext2"
