"""Edits of a registry hive in memory, in place where possible: values set, added and deleted, keys deleted.

A hive that stands on NTFS is overwritten where it lies, so its file must not grow. New cells come from the hive's
free cells, then from a bin added in the room that Windows leaves at the end of the file; where neither suffices, the
edit is refused. Times are not touched, so that the same edits of the same hive give the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from conversion.errors import NoSpaceError
from conversion.windows.hive import (
    BASE_BLOCK_BYTES,
    BIN_HEADER_BYTES,
    BIN_UNIT_BYTES,
    CHECKSUM_OFFSET,
    I32,
    INLINE,
    NOWHERE,
    U32,
    VALUE_CELL,
    Hive,
    Key,
    Value,
    checksum,
    list_head,
    segment_cells,
)

LARGEST_DATA_BYTES: Final = 16344  # above it a value is kept in pieces, which nothing here needs to write
_SUBKEYS, _SUBKEY_LIST = 20, 28  # offsets in a key's cell
_VALUES, _VALUE_LIST = 36, 40
_LARGEST_VALUE_NAME, _LARGEST_VALUE_DATA = 60, 64
_SECURITY_NEXT, _SECURITY_PREVIOUS, _SECURITY_USERS = 4, 8, 12  # offsets in a security cell


class HiveEditor:
    """A copy of a hive, with edits. ``hive`` reads it as edited so far.

    Raises what ``Hive`` raises, and NoSpaceError where an edit needs more room than the file has.
    """

    def __init__(self, content: bytes, *, subject: str = "registry hive") -> None:
        self._original = content
        self._content = bytearray(content)
        self.hive = Hive(self._content, subject=subject)
        self._largest_free: dict[int, int] = {}  # bin → size of its largest free cell, as far as it was looked for

    def finish(self, *, above_sequence: int = 0) -> bytes:
        """Return the hive, of the length it came with: clean, its sequence numbers above the old and the one given.

        Windows applies no log to a clean hive, and none of an older sequence number to any, so that logs which lie
        beside the hive need not be touched. A clean hive without edits is returned as it came.
        """
        if self._content == self._original and not self.hive.base_block.is_dirty:
            return self._original
        base = self.hive.base_block
        sequence = max(base.primary_sequence, base.secondary_sequence, above_sequence) % 0xFFFFFFFF + 1
        seal(self._content, sequence)
        return bytes(self._content)

    def set_value(self, key: Key, name: str, kind: int, data: bytes) -> None:
        """Set a value of ``key``, adding it where there is none of that name."""
        if len(data) > LARGEST_DATA_BYTES:
            raise NoSpaceError(f"a value of {len(data)} bytes is not written", subject=self.hive.subject)
        value = key.value(name)
        if value is None:
            self._add_value(key, name, kind, data)
        elif (value.kind, value.data) != (kind, data):
            self._replace(value, kind, data)
            self._raise_to(key.cell, _LARGEST_VALUE_DATA, len(data))

    def delete_value(self, key: Key, name: str) -> bool:
        """Delete a value of ``key``; return whether there was one."""
        value = key.value(name)
        if value is None:
            return False
        cells = list(key.value_cells())
        cells.remove(value.cell)
        node = key.node
        if cells:
            self._put(node.value_list, 0, struct.pack(f"<{len(cells)}I", *cells))
        else:
            self._free(node.value_list)
            self._put(key.cell, _VALUE_LIST, U32.pack(NOWHERE))
        self._put(key.cell, _VALUES, U32.pack(len(cells)))
        self._free_data(value.cell)
        self._free(value.cell)
        return True

    def delete_key(self, parent: Key, name: str) -> bool:
        """Delete the key ``name`` below ``parent`` and all below it; return whether there was one."""
        key = parent.key(name)
        if key is None:
            return False
        below: list[Key] = []
        pending, seen = [key], {parent.cell}
        while pending:
            current = pending.pop()
            if current.cell in seen:
                raise self.hive.damaged(f"the keys below {name!r} go round in a circle")
            seen.add(current.cell)
            below.append(current)
            pending += current.keys()
        self._unlist(parent, key.cell)
        for current in reversed(below):
            self._free_key(current)
        return True

    # Values

    def _add_value(self, key: Key, name: str, kind: int, data: bytes) -> None:
        latin = all(ord(letter) < 256 for letter in name)
        stored = name.encode("latin-1" if latin else "utf-16-le")
        cells = key.value_cells()
        value = self._allocate(VALUE_CELL.size + len(stored))
        self._put(value, 0, VALUE_CELL.pack(b"vk", len(stored), INLINE, 0, kind, int(latin), 0) + stored)
        self._store(value, data)
        listed = struct.pack(f"<{len(cells) + 1}I", *cells, value)
        at = key.node.value_list
        if not cells or self.hive.room(at) < len(listed):
            moved = self._allocate(len(listed))
            if cells:
                self._free(at)
            at = moved
        self._put(at, 0, listed)
        self._put(key.cell, _VALUES, struct.pack("<II", len(cells) + 1, at))
        self._raise_to(key.cell, _LARGEST_VALUE_NAME, 2 * len(name))
        self._raise_to(key.cell, _LARGEST_VALUE_DATA, len(data))

    def _replace(self, value: Value, kind: int, data: bytes) -> None:
        length, at = struct.unpack_from("<II", self.hive.piece(value.cell, 12), 4)
        self._put(value.cell, 12, U32.pack(kind))
        in_a_cell = not length & INLINE and length > 0
        in_pieces = in_a_cell and length > LARGEST_DATA_BYTES and self.hive.piece(at, 2) == b"db"
        if in_a_cell and not in_pieces and len(data) > 4 and len(data) <= self.hive.room(at):
            self._put(at, 0, data)  # a shorter one keeps the cell, so that the longer one finds its place again
            self._put(value.cell, 4, U32.pack(len(data)))
            return
        self._free_data(value.cell)
        self._store(value.cell, data)

    def _store(self, value: int, data: bytes) -> None:
        if len(data) <= 4:
            self._put(value, 4, U32.pack(INLINE | len(data)) + data.ljust(4, b"\0"))
            return
        at = self._allocate(len(data))
        self._put(at, 0, data)
        self._put(value, 4, struct.pack("<II", len(data), at))

    def _free_data(self, value: int) -> None:
        length, at = struct.unpack_from("<II", self.hive.piece(value, 12), 4)
        self._put(value, 4, struct.pack("<II", INLINE, 0))
        if length & INLINE or not length:
            return
        if length > LARGEST_DATA_BYTES and self.hive.piece(at, 2) == b"db":
            for segment in segment_cells(self.hive, at, length):
                self._free(segment)
            self._free(struct.unpack_from("<I", self.hive.piece(at, 8), 4)[0])
        self._free(at)

    def _raise_to(self, cell: int, offset: int, least: int) -> None:
        now = U32.unpack(self.hive.piece(cell, offset + 4)[offset:])[0]
        if now < least:
            self._put(cell, offset, U32.pack(least))

    # Keys

    def _free_key(self, key: Key) -> None:
        node = key.node
        leaves = key.leaves()
        for value in key.value_cells():
            self._free_data(value)
            self._free(value)
        if node.values:
            self._free(node.value_list)
        for leaf in leaves:
            self._free(leaf)
        if leaves and leaves != (node.subkey_list,):
            self._free(node.subkey_list)
        if node.class_bytes and node.class_name != NOWHERE:
            self._free(node.class_name)
        if node.security != NOWHERE:
            self._leave_security(node.security)
        self._free(key.cell)

    def _leave_security(self, cell: int) -> None:
        head = self.hive.piece(cell, 20)
        if head[:2] != b"sk":
            raise self.hive.damaged(f"the cell at {cell:#x} is not a security descriptor")
        following, previous, users = struct.unpack_from("<III", head, 4)
        if users > 1:
            self._put(cell, _SECURITY_USERS, U32.pack(users - 1))
            return
        self._put(previous, _SECURITY_NEXT, U32.pack(following))
        self._put(following, _SECURITY_PREVIOUS, U32.pack(previous))
        self._free(cell)

    def _unlist(self, parent: Key, child: int) -> None:
        """Take ``child`` out of the lists of ``parent``."""
        node, leaves = parent.node, parent.leaves()
        self._put(parent.cell, _SUBKEYS, U32.pack(node.subkeys - 1))
        for leaf in leaves:
            left = self._drop(leaf, child)
            if left is None:
                continue
            if left == 0:
                self._free(leaf)
                if leaf == node.subkey_list:
                    self._put(parent.cell, _SUBKEY_LIST, U32.pack(NOWHERE))
                elif self._drop(node.subkey_list, leaf) == 0:
                    self._free(node.subkey_list)
                    self._put(parent.cell, _SUBKEY_LIST, U32.pack(NOWHERE))
            return

    def _drop(self, listed: int, element: int) -> int | None:
        """Take ``element`` out of one list; return how many are left, None where it is not in there."""
        signature, count = list_head(self.hive, listed)
        each = 4 if signature in {b"li", b"ri"} else 8
        content = self.hive.piece(listed, 4 + each * count)
        entries = [content[at : at + each] for at in range(4, len(content), each)]
        kept = [entry for entry in entries if U32.unpack_from(entry)[0] != element]
        if len(kept) == len(entries):
            return None
        self._put(listed, 0, struct.pack("<2sH", signature, len(kept)) + b"".join(kept))
        return len(kept)

    # Cells

    def _put(self, cell: int, offset: int, data: bytes) -> None:
        if offset + len(data) > self.hive.room(cell):
            raise self.hive.damaged(f"the cell at {cell:#x} is too short for {len(data)} bytes at {offset}")
        start = BASE_BLOCK_BYTES + cell + 4 + offset
        self._content[start : start + len(data)] = data

    def _resize(self, cell: int, size: int) -> None:
        struct.pack_into("<i", self._content, BASE_BLOCK_BYTES + cell, size)

    def _bins(self) -> Iterator[tuple[int, int]]:
        """Yield where each bin begins and ends."""
        at, end = 0, self.hive.bins_bytes
        while at < end:
            signature, offset, size = struct.unpack("<4sII", self.hive.raw(at, 12))
            if signature != b"hbin" or offset != at or size % BIN_UNIT_BYTES or not 0 < size <= end - at:
                raise self.hive.damaged(f"the bin at {at:#x} contradicts itself")
            yield at, at + size
            at += size

    def _cells(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the cells of one bin with their sizes, negative where in use."""
        at = start + BIN_HEADER_BYTES
        while at < end:
            size = I32.unpack_from(self._content, BASE_BLOCK_BYTES + at)[0]
            if not size or size % 8 or abs(size) > end - at:
                raise self.hive.damaged(f"the cell at {at:#x} has an impossible size ({size})")
            yield at, size
            at += abs(size)

    def _allocate(self, length: int) -> int:
        """Return a new cell with room for ``length`` bytes, zeroed."""
        needed = -(-(length + 4) // 8) * 8
        for start, end in self._bins():
            if start not in self._largest_free:
                self._largest_free[start] = max((size for _, size in self._cells(start, end)), default=0)
            if self._largest_free[start] >= needed:
                cell, size = next(found for found in self._cells(start, end) if found[1] >= needed)
                del self._largest_free[start]
                return self._take(cell, size, needed)
        return self._take(*self._add_bin(needed), needed)

    def _take(self, cell: int, size: int, needed: int) -> int:
        if size > needed:
            self._resize(cell + needed, size - needed)
        self._resize(cell, -needed)
        self._put(cell, 0, bytes(needed - 4))
        return cell

    def _add_bin(self, needed: int) -> tuple[int, int]:
        """Add a bin in the room after the last one; return its one free cell and that cell's size."""
        at = self.hive.bins_bytes
        size = -(-(needed + BIN_HEADER_BYTES) // BIN_UNIT_BYTES) * BIN_UNIT_BYTES
        start = BASE_BLOCK_BYTES + at
        if start + size > len(self._content):
            raise NoSpaceError(
                f"no room for {needed} bytes more, and the file of {len(self._content)} bytes must not grow",
                subject=self.hive.subject,
                hint="start Windows once and shut it down: it then makes room in its registry",
            )
        self._content[start : start + size] = struct.pack("<4sII", b"hbin", at, size).ljust(size, b"\0")
        struct.pack_into("<I", self._content, 40, at + size)
        self._resize(at + BIN_HEADER_BYTES, size - BIN_HEADER_BYTES)
        return at + BIN_HEADER_BYTES, size - BIN_HEADER_BYTES

    def _free(self, cell: int) -> None:
        """Give a cell back, joined with free neighbours in its bin."""
        size = self.hive.room(cell) + 4
        start, end = next((start, end) for start, end in self._bins() if start <= cell < end)
        self._largest_free.pop(start, None)
        before: tuple[int, int] | None = None
        for at, length in self._cells(start, end):
            if at == cell:
                break
            before = (at, length)
        else:
            raise self.hive.damaged(f"no cell of its bin begins at {cell:#x}")
        after = cell + size
        if after < end:
            following = struct.unpack_from("<i", self._content, BASE_BLOCK_BYTES + after)[0]
            if 0 < following <= end - after:
                size += following
        if before is not None and before[1] > 0:
            cell, size = before[0], before[1] + size
        self._resize(cell, size)


def seal(content: bytearray, sequence: int) -> None:
    """Make the base block that ``content`` begins with clean, with both sequence numbers ``sequence``."""
    struct.pack_into("<II", content, 4, sequence, sequence)
    struct.pack_into("<I", content, CHECKSUM_OFFSET, checksum(content[:512]))
