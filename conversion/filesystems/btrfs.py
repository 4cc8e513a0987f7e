"""btrfs on one device, read-only: its trees, subvolumes, folders and files, compressed ones too.

Layout: btrfs.readthedocs.io, "On-disk format". Metadata checksums are verified, with the other copy as the way out.
Paths begin at the topmost subvolume (id 5), as GRUB's do; ``subvolume`` gives a view that begins elsewhere, as a mount.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from conversion.device import BlockDevice
from conversion.errors import DamagedError
from conversion.filesystems.btrfs_extent import FileExtent, content_of, decode_extent
from conversion.filesystems.btrfs_tree import Item, TreeReader
from conversion.filesystems.filesystem import Entry, EntryKind
from conversion.filesystems.walk import (
    LONGEST_LINK_BYTES,
    MOST_ENTRIES,
    Run,
    crc32c,
    find,
    kind_of_mode,
    listed,
    overwritable_extents,
)

TOP_SUBVOLUME: Final = 5
_INODE_ITEM, _DIR_ITEM, _DIR_INDEX, _EXTENT_DATA, _ROOT_ITEM, _ROOT_BACKREF = 1, 84, 96, 108, 132, 144
_NO_CHECKSUM: Final = 1
_TOP_INODE: Final = 256  # of every subvolume
_INODE_REF: Final = 12
_INODE: Final = struct.Struct("<16x Q 28x I 8x Q")  # size, mode, flags
_DIR: Final = struct.Struct("<QBQ Q HHB")  # location's key, transaction, size of data, of the name, kind
assert _INODE.size == 72 and _DIR.size == 30
MOST_SUBVOLUMES: Final = 100_000
MOST_EXTENTS: Final = 1 << 16


class Node(NamedTuple):
    """Where a file is: its subvolume's id and its inode number there."""

    subvolume: int
    inode: int


class _Inode(NamedTuple):
    kind: EntryKind
    size: int
    flags: int


class Subvolume(NamedTuple):
    """``path`` begins at the topmost subvolume and has no slash in front; it is empty for the topmost itself."""

    id: int
    path: str


class BtrfsFileSystem:
    """One file system over ``device``, which is only read."""

    def __init__(self, device: BlockDevice, *, subvolume_id: int = TOP_SUBVOLUME) -> None:
        """Raises DamagedError where there is no sound file system, UnsupportedError where a feature is unknown."""
        self._trees = TreeReader(device)
        self._start = subvolume_id
        self._device = device
        self._tree_of = lru_cache(maxsize=256)(self._read_root)
        self._inode = lru_cache(maxsize=4096)(self._read_inode)

    @property
    def kind(self) -> str:
        """Always btrfs."""
        return "btrfs"

    @property
    def uuid(self) -> str:
        """The file system's UUID."""
        return self._trees.uuid

    @property
    def label(self) -> str:
        """The volume's label."""
        return self._trees.label

    @property
    def is_dirty(self) -> bool:
        """Whether there is a log tree, of files synchronised since the last commit, that a mount would replay."""
        return self._trees.log_root != 0

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        """Return a file's content, None where there is no such file. Raises DamagedError beyond ``largest_bytes``."""
        node = find(self, path)
        if node is None or self._inode(node).kind != "file":
            return None
        size = self._inode(node).size
        if size > largest_bytes:
            raise self._trees.damaged(f"{path} has {size} bytes, more than {largest_bytes}")
        return self._content(node, size)

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries, subvolumes among them; None where there is no such folder."""
        node = find(self, path)
        if node is None or self._inode(node).kind != "folder":
            return None
        found: list[tuple[bytes, EntryKind, int]] = []
        for item in self._trees.items(self._tree_of(node.subvolume), node.inode, _DIR_INDEX):
            for name, child in self._entries(item, node):
                inode = self._inode(child) if child is not None else _Inode("other", 0, 0)
                found.append((name, inode.kind, inode.size))
            if len(found) > MOST_ENTRIES:
                raise self._trees.damaged(f"{path} has more than {MOST_ENTRIES} entries")
        return listed(found)

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        """Return where a file's bytes lie; None where they cannot be overwritten in place: nearly always.

        Data have checksums, but in files marked not to be copied on write.
        """
        node = find(self, path)
        if node is None or self._inode(node).kind != "file" or not self._inode(node).flags & _NO_CHECKSUM:
            return None
        runs = []
        for extent in self._file_extents(node):
            place = self._trees.only_place(extent.source + extent.skipped_bytes, extent.length)
            if extent.inline or extent.compression or extent.source == 0 or extent.is_hole or place is None:
                return None
            runs.append(Run(extent.start, extent.length, place))
        return overwritable_extents(runs, 1, self._inode(node).size)

    def subvolumes(self) -> tuple[Subvolume, ...]:
        """Return all subvolumes, the topmost first, by id."""
        parents: dict[int, tuple[int, bytes]] = {}
        for item in self._trees.items_of_kind(self._trees.root_tree, _ROOT_BACKREF):
            folder, size = struct.unpack_from("<Q8xH", item.data) if len(item.data) >= 18 else (0, 0)
            within = self._path_inside(Node(item.offset, folder))
            parents[item.objectid] = (item.offset, within + item.data[18 : 18 + size])
            if len(parents) > MOST_SUBVOLUMES:
                raise self._trees.damaged(f"it has more than {MOST_SUBVOLUMES} subvolumes")
        found = [Subvolume(TOP_SUBVOLUME, "")]
        for number in sorted(parents):
            parts, at = list[bytes](), number
            while at in parents and len(parts) < 64:
                parts.append(parents[at][1])
                at = parents[at][0]
            if at == TOP_SUBVOLUME:
                found.append(Subvolume(number, b"/".join(parts[::-1]).decode("utf-8", "surrogateescape")))
        return tuple(found)

    def default_subvolume_id(self) -> int:
        """Return which subvolume a mount without options shows."""
        for item in self._trees.items(self._trees.root_tree, self._trees.root_folder, _DIR_ITEM):
            for name, child in self._entries(item, Node(0, 0)):
                if name == b"default" and child is not None:
                    return child.subvolume
        return TOP_SUBVOLUME

    def subvolume(self, which: int | str) -> BtrfsFileSystem | None:
        """Return a view whose paths begin at a subvolume, by id or by path; None where there is none."""
        if isinstance(which, str):
            node = find(self, which)
            if node is None or node.inode != _TOP_INODE:
                return None
            which = node.subvolume
        try:
            self._tree_of(which)
        except DamagedError:
            return None
        return BtrfsFileSystem(self._device, subvolume_id=which)

    # -- the tree that paths are looked up in

    def root(self) -> Node:
        """Return the folder at which paths begin."""
        return Node(self._start, _TOP_INODE)

    def kind_of(self, node: Node) -> EntryKind:
        """Return what an inode is."""
        return self._inode(node).kind

    def child(self, folder: Node, name: bytes) -> Node | None:
        """Return what a name is in a folder: items are found by the name's hash."""
        hashed = crc32c(0xFFFFFFFE, name)
        item = self._trees.item(self._tree_of(folder.subvolume), (folder.inode, _DIR_ITEM, hashed))
        return next((child for its, child in self._entries(item, folder) if its == name), None) if item else None

    def link_target(self, node: Node) -> bytes:
        """Return where a symbolic link leads."""
        size = self._inode(node).size
        if size > LONGEST_LINK_BYTES:
            raise self._trees.damaged(f"symbolic link {node.inode} has {size} bytes")
        return self._content(node, size)

    # -- files and folders

    def _read_root(self, subvolume: int) -> int:
        """Return where a subvolume's tree begins: the newest root item there is for it."""
        newest = max(self._trees.items(self._trees.root_tree, subvolume, _ROOT_ITEM), default=None)
        if newest is None or len(newest.data) < 239:
            raise self._trees.damaged(f"there is no subvolume {subvolume}")
        return int.from_bytes(newest.data[176:184], "little")

    def _read_inode(self, node: Node) -> _Inode:
        item = self._trees.item(self._tree_of(node.subvolume), (node.inode, _INODE_ITEM, 0))
        if item is None or len(item.data) < 160:
            raise self._trees.damaged(f"there is no inode {node.inode} in subvolume {node.subvolume}")
        size, mode, flags = _INODE.unpack_from(item.data)
        return _Inode(kind_of_mode(mode), size, flags)

    def _entries(self, item: Item, folder: Node) -> Iterator[tuple[bytes, Node | None]]:
        """Yield the names in a folder item; several share one where their hashes are equal."""
        data, at = item.data, 0
        while at + _DIR.size <= len(data):
            objectid, kind, _, _, data_size, name_size, _ = _DIR.unpack_from(data, at)
            name = data[at + _DIR.size : at + _DIR.size + name_size]
            at += _DIR.size + name_size + data_size
            if at > len(data):
                raise self._trees.damaged(f"the entries of folder {folder.inode} contradict themselves")
            if kind == _ROOT_ITEM:
                yield name, self._existing(objectid)
            else:
                yield name, Node(folder.subvolume, objectid)

    def _existing(self, subvolume: int) -> Node | None:
        """Return a subvolume's topmost folder; None for the empty place that a snapshot keeps of a nested one."""
        exists = next(iter(self._trees.items(self._trees.root_tree, subvolume, _ROOT_ITEM)), None)
        return Node(subvolume, _TOP_INODE) if exists else None

    def _file_extents(self, node: Node) -> Iterator[FileExtent]:
        reached = 0
        items = self._trees.items(self._tree_of(node.subvolume), node.inode, _EXTENT_DATA)
        for number, item in enumerate(items):
            extent = decode_extent(item.offset, item.data, self._trees)
            if extent.start < reached or number > MOST_EXTENTS:
                raise self._trees.damaged(f"the extents of inode {node.inode} overlap or are too many")
            reached = extent.start + extent.length
            yield extent

    def _content(self, node: Node, size: int) -> bytes:
        content = bytearray(size)
        for extent in self._file_extents(node):
            if extent.start >= size:
                break
            piece = content_of(extent, self._trees, most_bytes=size - extent.start)
            content[extent.start : extent.start + len(piece)] = piece
        return bytes(content)

    def _path_inside(self, node: Node) -> bytes:
        """Return a folder's path inside its subvolume with a slash behind; empty for the topmost one."""
        names: list[bytes] = []
        while node.inode != _TOP_INODE and len(names) < 256:
            item = next(iter(self._trees.items(self._tree_of(node.subvolume), node.inode, _INODE_REF)), None)
            if item is None or len(item.data) < 10:
                break
            size = int.from_bytes(item.data[8:10], "little")
            names.append(item.data[10 : 10 + size])
            node = Node(node.subvolume, item.offset)
        return b"".join(name + b"/" for name in reversed(names))
