"""The trees of btrfs: the superblock, from logical addresses to places on the device, and items by their keys."""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import xxhash

from conversion.device import BlockDevice
from conversion.errors import DamagedError, UnsupportedError
from conversion.filesystems.walk import Source, crc32c, digest, printable, uuid_text

SUPERBLOCK_OFFSETS: Final = (64 << 10, 64 << 20, 256 << 30)
SUPERBLOCK_SIZE: Final = 4096
MAGIC: Final = b"_BHRfS_M"
_KEY: Final = struct.Struct("<QBQ")
_HEADER: Final = struct.Struct("<32s 16s Q 24x QQ IB")  # checksum, id, address, generation, owner, items, level
_CHUNK: Final = struct.Struct("<Q 8x QQ 12x HH")  # length, stripe length, kind, stripes, sub-stripes
_STRIPE: Final = struct.Struct("<QQ 16x")  # device, offset
assert _KEY.size == 17 and _HEADER.size == 101 and _CHUNK.size == 48 and _STRIPE.size == 32
_CHUNK_ITEM: Final = 228
_CHUNK_TREE_OBJECT: Final = 256
_STRIPED: Final = {0x8: "RAID0", 0x40: "RAID10", 0x80: "RAID5", 0x100: "RAID6"}
_INCOMPATIBLE: Final = {
    0x1: "mixed_backref", 0x2: "default_subvol", 0x4: "mixed_groups", 0x8: "compress_lzo", 0x10: "compress_zstd",
    0x20: "big_metadata", 0x40: "extended_iref", 0x80: "raid56", 0x100: "skinny_metadata", 0x200: "no_holes",
    0x400: "metadata_uuid", 0x800: "raid1c34", 0x1000: "zoned", 0x2000: "extent_tree_v2", 0x4000: "raid_stripe_tree",
    0x10000: "simple_quota",
}  # fmt: skip
_READABLE: Final = 0xFFF | 0x10000
_METADATA_UUID: Final = 0x400
MOST_CHUNKS: Final = 1 << 17
MOST_DEPTH: Final = 8
MOST_ITEMS: Final = 2_000_000

Key: TypeAlias = tuple[int, int, int]  # object, kind, offset: compared in this order


class Item(NamedTuple):
    """An item of a tree, with its key taken apart."""

    objectid: int
    kind: int
    offset: int
    data: bytes


class _Chunk(NamedTuple):
    start: int  # logical
    length: int
    kind: int
    places: tuple[int, ...]  # offsets on this device
    copies: int


class _Node(NamedTuple):
    level: int
    keys: list[Key]
    children: list[int]  # addresses, above level 0
    items: list[bytes]  # at level 0


class TreeReader:
    """Reads items and bytes by logical address. Everything is bounded, every node verified."""

    def __init__(self, device: BlockDevice) -> None:
        """Raises DamagedError where there is no sound superblock, UnsupportedError where a feature is unknown."""
        self._source = Source(device, "the btrfs file system")
        self._read_superblock(self._newest_superblock())
        self._nodes = lru_cache(maxsize=512)(self._read_node)
        self._chunks = sorted(self._system_chunks())
        self._starts = [chunk.start for chunk in self._chunks]
        known = {chunk.start: chunk for chunk in self._chunks}
        for item in self.items(self._chunk_tree, _CHUNK_TREE_OBJECT, _CHUNK_ITEM):
            known[item.offset] = self._chunk(item.offset, item.data)
            if len(known) > MOST_CHUNKS:
                raise self.damaged(f"it has more than {MOST_CHUNKS} chunks")
        self._chunks = [known[start] for start in sorted(known)]
        self._starts = sorted(known)

    def damaged(self, message: str) -> DamagedError:
        """Return the error that says so of this file system."""
        return self._source.damaged(message)

    # -- items

    def item(self, tree: int, key: Key) -> Item | None:
        """Return the item with this very key."""
        found = next(self._from(tree, key), None)
        return found if found is not None and found[:3] == key else None

    def items(self, tree: int, objectid: int, kind: int) -> Iterator[Item]:
        """Yield an object's items of one kind, by offset."""
        for item in self._from(tree, (objectid, kind, 0)):
            if item[:2] != (objectid, kind):
                return
            yield item

    def items_of_kind(self, tree: int, kind: int) -> Iterator[Item]:
        """Yield all items of one kind."""
        return (item for item in self._from(tree, (0, 0, 0)) if item.kind == kind)

    def _from(self, tree: int, key: Key) -> Iterator[Item]:
        """Yield the items from ``key`` on, in order. Each step goes down from the node above: no recursion."""
        path = [(self._nodes(tree, -1), -1)]
        for number in range(MOST_ITEMS):
            while path[-1][0].level:
                node, _ = path.pop()
                index = max(0, bisect_right(node.keys, key) - 1) if number == 0 else 0
                path.append((node, index))
                path.append((self._nodes(node.children[index], node.level - 1), -1))
            node, index = path.pop()
            index = bisect_left(node.keys, key) if index < 0 and number == 0 else index + 1
            if index < len(node.items):
                yield Item(*node.keys[index], node.items[index])
                path.append((node, index))
                continue
            if not self._advance(path):
                return
        raise self.damaged(f"a tree has more than {MOST_ITEMS} items where a few are looked for")

    def _advance(self, path: list[tuple[_Node, int]]) -> bool:
        """Go on to the next leaf: up to where there is a next child, then to that one."""
        while path:
            node, index = path.pop()
            if index + 1 < len(node.children):
                path.append((node, index + 1))
                path.append((self._nodes(node.children[index + 1], node.level - 1), -1))
                return True
        return False

    # -- nodes

    def _read_node(self, address: int, level: int) -> _Node:
        """Return a node, from whichever copy is sound. ``level`` -1 is any."""
        trouble = self.damaged(f"there is no metadata at {address}")
        for place in self._places(address, self._node_size):
            raw = self._source.read(place, self._node_size)
            try:
                return self._decode_node(raw, address, level)
            except DamagedError as error:
                trouble = error
        raise trouble

    def _decode_node(self, raw: bytes, address: int, level: int) -> _Node:
        _, fsid, its_address, _, _, count, its_level = _HEADER.unpack_from(raw)
        if raw[: self._sum_size] != self._sum(raw[32:]):
            raise self.damaged(f"the metadata at {address} fail their checksum")
        wrong_place = its_address != address or fsid != self._metadata_id
        if wrong_place or its_level > MOST_DEPTH or level not in {-1, its_level}:
            raise self.damaged(f"the metadata at {address} belong elsewhere")
        width = 25 if its_level == 0 else 33
        if _HEADER.size + count * width > len(raw) or (its_level and not count):
            raise self.damaged(f"the metadata at {address} contradict themselves")
        ats = range(_HEADER.size, _HEADER.size + count * width, width)
        keys = [_KEY.unpack_from(raw, at) for at in ats]
        if keys != sorted(keys):
            raise self.damaged(f"the metadata at {address} are not in order")
        if its_level:
            return _Node(its_level, keys, [int.from_bytes(raw[at + 17 : at + 25], "little") for at in ats], [])
        items = []
        for at in ats:
            offset, size = struct.unpack_from("<II", raw, at + 17)
            if _HEADER.size + offset + size > len(raw):
                raise self.damaged(f"the metadata at {address} contradict themselves")
            items.append(raw[_HEADER.size + offset : _HEADER.size + offset + size])
        return _Node(0, keys, [], items)

    def _sum(self, data: bytes) -> bytes:
        if self._sum_kind == 0:
            return (crc32c(0xFFFFFFFF, data) ^ 0xFFFFFFFF).to_bytes(4, "little")
        if self._sum_kind == 1:
            return xxhash.xxh64_intdigest(data).to_bytes(8, "little")
        return digest("sha256" if self._sum_kind == 2 else "blake2", data)

    # -- addresses

    def read(self, address: int, length: int) -> bytes:
        """Return bytes by logical address, from the first copy there is. Raises DamagedError where there is none."""
        places = self._places(address, length)
        if not places:
            raise self.damaged(f"the data at {address} are on another device")
        return self._source.read(places[0], length)

    def only_place(self, address: int, length: int) -> int | None:
        """Return the offset on the device of bytes that have one copy; None where there are more."""
        chunk = self._chunk_of(address, length)
        return chunk.places[0] + address - chunk.start if chunk.copies == 1 and chunk.places else None

    def _places(self, address: int, length: int) -> tuple[int, ...]:
        chunk = self._chunk_of(address, length)
        return tuple(place + address - chunk.start for place in chunk.places)

    def _chunk_of(self, address: int, length: int) -> _Chunk:
        index = bisect_right(self._starts, address) - 1
        chunk = self._chunks[index] if index >= 0 else None
        if chunk is None or address + length > chunk.start + chunk.length:
            raise self.damaged(f"no chunk holds {length} bytes at {address}")
        for bit, name in _STRIPED.items():
            if chunk.kind & bit and chunk.copies > 1:
                raise UnsupportedError(f"it is striped over several devices ({name})", subject=self._source.subject)
        return chunk

    def _chunk(self, start: int, data: bytes) -> _Chunk:
        if len(data) < _CHUNK.size:
            raise self.damaged(f"the chunk at {start} is too short")
        length, _, kind, stripes, _ = _CHUNK.unpack_from(data)
        if not length or not stripes or len(data) < _CHUNK.size + stripes * _STRIPE.size:
            raise self.damaged(f"the chunk at {start} contradicts itself")
        ats = range(_CHUNK.size, _CHUNK.size + stripes * _STRIPE.size, _STRIPE.size)
        all_places = [_STRIPE.unpack_from(data, at) for at in ats]
        here = tuple(offset for device, offset in all_places if device == self._device_id)
        return _Chunk(start, length, kind, here, stripes)

    def _system_chunks(self) -> Iterator[_Chunk]:
        """Yield the chunks of the superblock: those that hold the tree of all chunks."""
        array, at = self._system_array, 0
        while at + _KEY.size + _CHUNK.size <= len(array):
            _, kind, start = _KEY.unpack_from(array, at)
            at += _KEY.size
            stripes = int.from_bytes(array[at + 44 : at + 46], "little")
            if kind != _CHUNK_ITEM:
                raise self.damaged("the superblock's chunks contradict themselves")
            yield self._chunk(start, array[at : at + _CHUNK.size + stripes * _STRIPE.size])
            at += _CHUNK.size + stripes * _STRIPE.size

    # -- the superblock

    def _newest_superblock(self) -> bytes:
        """Return the superblock; a later copy only where the first is damaged, as btrfs rescue would."""
        trouble = self.damaged("there is no btrfs superblock")
        for offset in SUPERBLOCK_OFFSETS:
            if offset + SUPERBLOCK_SIZE > self._source.device.size:
                break
            raw = self._source.read(offset, SUPERBLOCK_SIZE)
            if raw[0x40:0x48] != MAGIC or int.from_bytes(raw[0x30:0x38], "little") != offset:
                continue
            self._sum_kind = int.from_bytes(raw[0xC4:0xC6], "little")
            if self._sum_kind > 3:
                raise UnsupportedError(f"its checksums are of the unknown kind {self._sum_kind}", subject="btrfs")
            self._sum_size = (4, 8, 32, 32)[self._sum_kind]
            if raw[: self._sum_size] == self._sum(raw[32:]):
                return raw
            trouble = self.damaged("the superblock fails its checksum")
        raise trouble

    def _read_superblock(self, raw: bytes) -> None:
        def u64(at: int) -> int:
            return int.from_bytes(raw[at : at + 8], "little")

        incompatible = u64(0xBC)
        if incompatible & ~_READABLE:
            bits = [1 << bit for bit in range(64) if (incompatible & ~_READABLE) >> bit & 1]
            names = ", ".join(_INCOMPATIBLE.get(bit, f"the unknown feature {bit:#x}") for bit in bits)
            raise UnsupportedError(f"it needs {names}", subject=self._source.subject)
        self.root_tree, self._chunk_tree, self.log_root = u64(0x50), u64(0x58), u64(0x60)
        self.root_folder = u64(0x80)
        self._device_id = u64(0xC9)
        self.sector_size = int.from_bytes(raw[0x90:0x94], "little")
        self._node_size = int.from_bytes(raw[0x94:0x98], "little")
        array_size = int.from_bytes(raw[0xA0:0xA4], "little")
        sizes = {1 << bit for bit in range(9, 17)}
        if self._node_size not in sizes or self.sector_size not in sizes or array_size > 2048:
            raise self.damaged("the superblock contradicts itself")
        self._system_array = raw[0x32B : 0x32B + array_size]
        fsid = raw[0x20:0x30]
        self._metadata_id = raw[0x23B:0x24B] if incompatible & _METADATA_UUID else fsid
        self.uuid, self.label = uuid_text(fsid), printable(raw[0x12B:0x22B])
