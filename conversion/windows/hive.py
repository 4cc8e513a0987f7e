"""A registry hive (regf) as read: its base block, its cells, its keys and values.

The format is Maxim Suhanov's "Windows registry file format specification". A hive is a base block of 4096 bytes and
bins, which are cut into cells; a cell is named by its offset from the first bin. Everything read from a hive is
checked against the hive's bounds, and what is walked is bounded by the hive's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy

from conversion.errors import DamagedError, UnsupportedError

BASE_BLOCK_BYTES: Final = 4096
BIN_HEADER_BYTES: Final = 32
BIN_UNIT_BYTES: Final = 4096
LARGEST_HIVE_BYTES: Final = 512 << 20  # a SYSTEM hive has 10 to 40 MiB, Windows itself stops at 2 GiB
DEEPEST_KEY: Final = 512  # the registry's own limit
NOWHERE: Final = 0xFFFFFFFF
INLINE: Final = 0x80000000  # in a value's length: the data stand in the value's own cell

REG_SZ: Final = 1
REG_BINARY: Final = 3
REG_DWORD: Final = 4

# signature, primary and secondary sequence numbers, time written, versions, file type, format, root cell, size of bins
BASE_BLOCK: Final = struct.Struct("<4sIIQIIIIII")
KEY_CELL: Final = struct.Struct("<2sHQIIIIIIIIIIIIIIIHH")
VALUE_CELL: Final = struct.Struct("<2sHIIIHH")
U16: Final = struct.Struct("<H")
U32: Final = struct.Struct("<I")
I32: Final = struct.Struct("<i")
assert BASE_BLOCK.size == 44
assert KEY_CELL.size == 76
assert VALUE_CELL.size == 20

CHECKSUM_OFFSET: Final = 508
_NAME_IS_LATIN: Final = {b"nk": 0x20, b"vk": 0x01}
_SEGMENT_BYTES: Final = 16344  # of a value kept in pieces ("db")


def checksum(base_block: bytes | bytearray | memoryview) -> int:
    """Return the XOR of the 127 words before the checksum, never all zeros or all ones."""
    words = numpy.frombuffer(base_block, dtype="<u4", count=CHECKSUM_OFFSET // 4)
    value = int(numpy.bitwise_xor.reduce(words))
    return {0: 1, 0xFFFFFFFF: 0xFFFFFFFE}.get(value, value)


@dataclass(frozen=True, slots=True)
class BaseBlock:
    """The first sector of a hive or of one of its logs."""

    primary_sequence: int
    secondary_sequence: int
    written: int  # FILETIME; 0 as of Windows 8.1
    minor_version: int
    file_type: int  # 0 hive, 1 and 2 log of the old format, 6 of the new
    root: int
    bins_bytes: int
    intact: bool  # the checksum holds

    @classmethod
    def decode(cls, content: bytes | bytearray | memoryview, *, subject: str) -> BaseBlock:
        """Read the first 512 bytes. Raises DamagedError where there is no base block, UnsupportedError by version."""
        view = memoryview(content)
        if len(view) < 512:
            raise DamagedError(f"a hive of {len(view)} bytes has no base block", subject=subject)
        signature, primary, secondary, written, major, minor, kind, form, root, bins = BASE_BLOCK.unpack_from(view)
        if signature != b"regf":
            raise DamagedError(f"begins with {signature!r}, where a hive begins with 'regf'", subject=subject)
        intact = U32.unpack_from(view, CHECKSUM_OFFSET)[0] == checksum(view)
        if intact and (major != 1 or minor not in {3, 4, 5, 6} or form != 1):
            raise UnsupportedError(
                f"a hive of version {major}.{minor}, form {form}; known are 1.3 to 1.6", subject=subject
            )
        return cls(primary, secondary, written, minor, kind, root, bins, intact)

    @property
    def is_dirty(self) -> bool:
        """Whether a write to the hive did not end, so that its logs are needed."""
        return not self.intact or self.primary_sequence != self.secondary_sequence


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a key. ``cell`` is the offset of its cell, ``data`` its bytes as stored."""

    cell: int
    name: str
    kind: int
    data: bytes

    def number(self) -> int | None:
        """Return a DWORD's number, None where the value is none."""
        return U32.unpack(self.data)[0] if self.kind == REG_DWORD and len(self.data) == 4 else None

    def text(self) -> str:
        """Return a string's text up to its first zero."""
        whole = self.data[: len(self.data) // 2 * 2].decode("utf-16-le", "replace")
        return whole.split("\0", 1)[0]


class Pages(Protocol):
    """A file of which only what is asked for is read."""

    def __len__(self) -> int:
        """Return its length, bytes."""

    def __getitem__(self, part: slice) -> bytes:
        """Return a part, by a slice without a step."""


class Hive:
    """A hive's keys. ``content`` may be a bytearray that an editor changes meanwhile: nothing is cached.

    Raises DamagedError where the base block or a cell contradicts itself, UnsupportedError for unknown versions.
    A dirty hive is read as it stands: recover it first where that matters.
    """

    def __init__(self, content: bytes | bytearray | Pages, *, subject: str = "registry hive") -> None:
        if len(content) > LARGEST_HIVE_BYTES:
            raise UnsupportedError(f"a hive of {len(content)} bytes is too large", subject=subject)
        self.subject = subject
        self.content = content
        base = self.base_block
        if not base.intact:
            raise DamagedError("the checksum of the base block is wrong", subject=subject)
        if base.bins_bytes % BIN_UNIT_BYTES or not 0 < base.bins_bytes <= len(content) - BASE_BLOCK_BYTES:
            raise self.damaged(f"bins of {base.bins_bytes} bytes in a file of {len(content)}")
        if self.raw(0, 4) != b"hbin":
            raise self.damaged("the first bin has no 'hbin'")

    @property
    def base_block(self) -> BaseBlock:
        """The base block as it is now."""
        return BaseBlock.decode(self.content[:512], subject=self.subject)

    @property
    def bins_bytes(self) -> int:
        """Length of all bins together."""
        return int(U32.unpack(self.content[40:44])[0])

    @property
    def root(self) -> Key:
        """The root key."""
        return Key(self, int(U32.unpack(self.content[36:40])[0]))

    def key(self, path: str) -> Key | None:
        r"""Return the key at ``path``, names parted by ``\``, compared without case; None where there is none."""
        found: Key | None = self.root
        for name in filter(None, path.split("\\")):
            found = found.key(name) if found else None
        return found

    def walk(self) -> Iterator[tuple[str, Key]]:
        r"""Yield every key with its path (the root has ``""``), parents first. Raises DamagedError for loops."""
        seen: set[int] = set()
        pending = [("", self.root, 0)]
        while pending:
            path, key, depth = pending.pop()
            if key.cell in seen or depth > DEEPEST_KEY:
                raise self.damaged(f"the keys below {path!r} go round in a circle")
            seen.add(key.cell)
            yield path, key
            below = [(f"{path}\\{child.name}" if path else child.name, child) for child in key.keys()]  # noqa: SIM118
            pending += [(name, child, depth + 1) for name, child in reversed(below)]

    def damaged(self, what: str) -> DamagedError:
        """Return the error to raise for ``what`` is wrong."""
        return DamagedError(what, subject=self.subject, hint="restore the hive from a point at which Windows was well")

    def raw(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset`` from the first bin. Raises DamagedError outside the bins."""
        if offset < 0 or length < 0 or offset + length > self.bins_bytes:
            raise self.damaged(f"{length} bytes at {offset:#x} lie outside the bins")
        return bytes(self.content[BASE_BLOCK_BYTES + offset : BASE_BLOCK_BYTES + offset + length])

    def room(self, cell: int) -> int:
        """Return how many bytes a cell in use holds. Raises DamagedError where there is no such cell."""
        if cell % 8 or cell < BIN_HEADER_BYTES:
            raise self.damaged(f"no cell can begin at {cell:#x}")
        size = -I32.unpack(self.raw(cell, 4))[0]
        if size < 8 or size % 8 or cell + size > self.bins_bytes:
            raise self.damaged(f"the cell at {cell:#x} is not in use, or has an impossible size ({-size})")
        return int(size) - 4

    def cell(self, cell: int) -> bytes:
        """Return what a cell in use holds."""
        return self.raw(cell + 4, self.room(cell))

    def piece(self, cell: int, length: int) -> bytes:
        """Return the first ``length`` bytes that a cell in use holds."""
        if length > self.room(cell):
            raise self.damaged(f"the cell at {cell:#x} is shorter than the {length} bytes it should hold")
        return self.raw(cell + 4, length)

    def numbers(self, cell: int, count: int) -> tuple[int, ...]:
        """Return the first ``count`` 32-bit numbers that a cell in use holds."""
        return struct.unpack(f"<{count}I", self.piece(cell, 4 * count))

    def name(self, signature: bytes, content: bytes, flags: int, start: int, length: int) -> str:
        """Return a key's or a value's name out of its cell."""
        if start + length > len(content):
            raise self.damaged(f"a name of {length} bytes in a cell of {len(content)}")
        stored = content[start : start + length]
        if flags & _NAME_IS_LATIN[signature]:
            return stored.decode("latin-1")
        return stored[: length // 2 * 2].decode("utf-16-le", "backslashreplace")


@dataclass(frozen=True, slots=True)
class KeyNode:
    """A key's cell, decoded."""

    flags: int
    parent: int
    subkeys: int
    subkey_list: int
    values: int
    value_list: int
    security: int
    class_name: int
    class_bytes: int
    name: str


class Key:
    """A key of a hive, by its cell."""

    __slots__ = ("cell", "hive")

    def __init__(self, hive: Hive, cell: int) -> None:
        self.hive = hive
        self.cell = cell

    @property
    def node(self) -> KeyNode:
        """The key's cell, decoded."""
        content = self.hive.cell(self.cell)
        if len(content) < KEY_CELL.size or content[:2] != b"nk":
            raise self.hive.damaged(f"the cell at {self.cell:#x} is not a key")
        fields = KEY_CELL.unpack_from(content)
        name = self.hive.name(b"nk", content, fields[1], KEY_CELL.size, fields[18])
        subkeys, values = fields[5], fields[9]
        if max(subkeys, values) * 8 > self.hive.bins_bytes:  # the smallest cell has 8 bytes
            raise self.hive.damaged(f"the key {name!r} counts more than the hive can hold")
        return KeyNode(
            flags=fields[1],
            parent=fields[4],
            subkeys=subkeys,
            subkey_list=fields[7],
            values=values,
            value_list=fields[10],
            security=fields[11],
            class_name=fields[12],
            class_bytes=fields[19],
            name=name,
        )

    @property
    def name(self) -> str:
        """Its name."""
        return self.node.name

    def keys(self) -> Iterator[Key]:
        """Yield the keys below, in the order stored."""
        node = self.node
        if not node.subkeys:
            return
        left = node.subkeys
        for leaf in self.leaves():
            for cell in leaf_keys(self.hive, leaf):
                left -= 1
                if left < 0:
                    raise self.hive.damaged(f"the key {node.name!r} lists more keys than the {node.subkeys} it counts")
                yield Key(self.hive, cell)
        if left:
            raise self.hive.damaged(f"the key {node.name!r} lists {left} keys less than the {node.subkeys} it counts")

    def leaves(self) -> tuple[int, ...]:
        """Return the cells of the lists that name the keys below."""
        node = self.node
        if not node.subkeys:
            return ()
        signature, count = list_head(self.hive, node.subkey_list)
        if signature != b"ri":
            return (node.subkey_list,)
        return self.hive.numbers(node.subkey_list, count + 1)[1:]

    def key(self, name: str) -> Key | None:
        """Return the key ``name`` below, compared without case."""
        wanted = name.upper()
        return next((key for key in self.keys() if key.name.upper() == wanted), None)

    def values(self) -> Iterator[Value]:
        """Yield the values, in the order stored."""
        for cell in self.value_cells():
            yield self._value(cell)

    def value(self, name: str) -> Value | None:
        """Return the value ``name``, compared without case; the default value has the name ``""``."""
        wanted = name.upper()
        return next((value for value in self.values() if value.name.upper() == wanted), None)

    def number(self, name: str) -> int | None:
        """Return a DWORD, None where there is none of that name."""
        value = self.value(name)
        return value.number() if value else None

    def text(self, name: str) -> str:
        """Return a string, empty where there is none of that name."""
        value = self.value(name)
        return value.text() if value else ""

    def value_cells(self) -> tuple[int, ...]:
        """Return the cells of the values."""
        node = self.node
        return self.hive.numbers(node.value_list, node.values) if node.values else ()

    def _value(self, cell: int) -> Value:
        content = self.hive.cell(cell)
        if len(content) < VALUE_CELL.size or content[:2] != b"vk":
            raise self.hive.damaged(f"the cell at {cell:#x} is not a value")
        _, name_bytes, length, at, kind, flags, _ = VALUE_CELL.unpack_from(content)
        name = self.hive.name(b"vk", content, flags, VALUE_CELL.size, name_bytes)
        return Value(cell, name, kind, self._data(length, at))

    def _data(self, length: int, at: int) -> bytes:
        if length & INLINE:
            if length & ~INLINE > 4:
                raise self.hive.damaged(f"{length & ~INLINE} bytes of data inside a value's own cell")
            return U32.pack(at)[: length & ~INLINE]
        if not length:
            return b""
        if length > self.hive.bins_bytes:
            raise self.hive.damaged(f"a value of {length} bytes in a hive of {self.hive.bins_bytes}")
        if length > _SEGMENT_BYTES and self.hive.piece(at, 2) == b"db":
            return self._segments(length, at)
        return self.hive.piece(at, length)

    def _segments(self, length: int, at: int) -> bytes:
        cells = segment_cells(self.hive, at, length)
        sizes = [_SEGMENT_BYTES] * (len(cells) - 1) + [length - _SEGMENT_BYTES * (len(cells) - 1)]
        return b"".join(self.hive.piece(cell, size) for cell, size in zip(cells, sizes, strict=True))


def segment_cells(hive: Hive, at: int, length: int) -> tuple[int, ...]:
    """Return the cells that hold a value of ``length`` bytes kept in pieces, whose head is the cell ``at``."""
    head = hive.piece(at, 8)
    count, listed = struct.unpack_from("<HI", head, 2)
    if count != -(-length // _SEGMENT_BYTES):
        raise hive.damaged(f"a value of {length} bytes in {count} pieces")
    return hive.numbers(listed, count)


def list_head(hive: Hive, cell: int) -> tuple[bytes, int]:
    """Return a subkey list's signature and count. Raises DamagedError where the cell is no list or too short."""
    signature, count = struct.unpack("<2sH", hive.piece(cell, 4))
    each = {b"li": 4, b"lf": 8, b"lh": 8, b"ri": 4}.get(signature)
    if each is None or 4 + each * count > hive.room(cell):
        raise hive.damaged(f"the cell at {cell:#x} is not a list of keys")
    return signature, count


def leaf_keys(hive: Hive, leaf: int) -> tuple[int, ...]:
    """Return the cells of the keys that one list names."""
    signature, count = list_head(hive, leaf)
    if signature == b"ri":
        raise hive.damaged(f"the list at {leaf:#x} points to a list of lists")
    if signature == b"li":
        return hive.numbers(leaf, count + 1)[1:]
    return hive.numbers(leaf, 2 * count + 1)[1::2]
