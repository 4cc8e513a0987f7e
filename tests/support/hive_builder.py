"""Registry hives made for tests, by a writer of its own: the product's reader is checked against it and hivexsh."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

NOWHERE = 0xFFFFFFFF
REG_SZ, REG_BINARY, REG_DWORD = 1, 3, 4
_ADMINISTRATORS = bytes.fromhex("01020000000000052000000020020000")


@dataclass
class Key:
    """A key: its values by name, as (type, bytes), text or a number, and the keys below."""

    values: Mapping[str, tuple[int, bytes] | str | int] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)


def tree(paths: Mapping[str, Mapping[str, tuple[int, bytes] | str | int]]) -> Key:
    r"""Return the root of a hive with these keys (``A\B``) and values."""
    root = Key({}, {})
    for path, values in paths.items():
        key = root
        for name in filter(None, path.split("\\")):
            key = key.keys.setdefault(name, Key({}, {}))  # type: ignore[attr-defined]
        key.values = {**key.values, **values}
    return root


def build_hive(
    root: Key,
    *,
    minor: int = 5,
    sequences: tuple[int, int] = (1, 1),
    spare_bytes: int = 0,
    file_bytes: int = 0,
    leaf: bytes = b"lh",
    split: int = 0,
) -> bytes:
    """Return a hive. ``spare_bytes`` of free cell in its bin at least, ``file_bytes`` of file at least.

    ``leaf`` is the kind of key lists; with ``split``, lists of more keys are cut into lists of that many.
    """
    return _Builder(leaf, split).build(root, minor, sequences, spare_bytes, file_bytes)


def checksum(block: bytes) -> int:
    value = 0
    for (word,) in struct.iter_unpack("<I", block[:508]):
        value ^= word
    return {0: 1, 0xFFFFFFFF: 0xFFFFFFFE}.get(value, value)


def base_block(
    sequences: tuple[int, int], bins_bytes: int, *, root: int = 32, minor: int = 5, kind: int = 0, written: int = 0
) -> bytes:
    block = struct.pack("<4sIIQIIIIIII", b"regf", *sequences, written, 1, minor, kind, 1, root, bins_bytes, 1)
    block = block.ljust(508, b"\0")
    return (block + struct.pack("<I", checksum(block))).ljust(4096, b"\0")


class _Builder:
    def __init__(self, leaf: bytes, split: int) -> None:
        self._cells = bytearray(b"\0" * 32)
        self._leaf = leaf
        self._split = split
        self._security = 0
        self._users = 0

    def build(self, root: Key, minor: int, sequences: tuple[int, int], spare: int, file_bytes: int) -> bytes:
        at = self._reserve(76 + len("ROOT"))
        descriptor = bytes.fromhex("0100008014000000240000000000000000000000") + _ADMINISTRATORS * 2
        self._security = self._cell(bytes(20) + descriptor)
        self._key(at, root, "ROOT", NOWHERE, 0x2C)
        head = struct.pack("<2sHIIII", b"sk", 0, self._security, self._security, self._users, len(descriptor))
        self._put(self._security, head)
        used = len(self._cells)
        bins = -(-(used + max(spare, 8)) // 4096) * 4096
        self._cells += struct.pack("<i", bins - used).ljust(bins - used, b"\0")
        self._cells[:32] = struct.pack("<4sII", b"hbin", 0, bins).ljust(32, b"\0")
        hive = base_block(sequences, bins, root=at, minor=minor) + bytes(self._cells)
        return hive.ljust(file_bytes, b"\0")

    def _reserve(self, length: int) -> int:
        at, size = len(self._cells), -(-(length + 4) // 8) * 8
        self._cells += struct.pack("<i", -size).ljust(size, b"\0")
        return at

    def _put(self, cell: int, data: bytes) -> None:
        self._cells[cell + 4 : cell + 4 + len(data)] = data

    def _cell(self, data: bytes) -> int:
        at = self._reserve(len(data))
        self._put(at, data)
        return at

    def _key(self, at: int, key: Key, name: str, parent: int, flags: int = 0x20) -> None:
        self._users += 1
        values = [self._value(each, value) for each, value in key.values.items()]
        value_list = self._cell(struct.pack(f"<{len(values)}I", *values)) if values else NOWHERE
        names = sorted(key.keys, key=str.upper)
        children = [self._reserve(76 + len(each)) for each in names]
        key_list = self._key_list(names, children) if names else NOWHERE
        for child, each in zip(children, names, strict=True):
            self._key(child, key.keys[each], each, at)
        stored = name.encode("latin-1")
        fields = (b"nk", flags, 0, 0, parent, len(names), 0, key_list, NOWHERE, len(values), value_list)
        longest = (
            max([2 * len(each) for each in names], default=0),
            0,
            max([2 * len(each) for each in key.values], default=0),
            max([len(_stored(each)[1]) for each in key.values.values()], default=0),
            0,
        )
        packed = struct.pack("<2sHQIIIIIIII", *fields) + struct.pack("<II", self._security, NOWHERE)
        self._put(at, packed + struct.pack("<5IHH", *longest, len(stored), 0) + stored)

    def _key_list(self, names: list[str], cells: list[int]) -> int:
        if not self._split or len(names) <= self._split:
            return self._leaf_cell(names, cells)
        parts = [
            self._leaf_cell(names[at : at + self._split], cells[at : at + self._split])
            for at in range(0, len(names), self._split)
        ]
        return self._cell(struct.pack(f"<2sH{len(parts)}I", b"ri", len(parts), *parts))

    def _leaf_cell(self, names: list[str], cells: list[int]) -> int:
        body = b""
        for name, cell in zip(names, cells, strict=True):
            value = 0
            for letter in name.upper():
                value = (value * 37 + ord(letter)) & 0xFFFFFFFF
            hint = {b"lh": struct.pack("<I", value), b"lf": name.encode("latin-1")[:4].ljust(4, b"\0")}
            body += struct.pack("<I", cell) + hint.get(self._leaf, b"")
        return self._cell(struct.pack("<2sH", self._leaf, len(names)) + body)

    def _value(self, name: str, value: tuple[int, bytes] | str | int) -> int:
        kind, data = _stored(value)
        stored = name.encode("latin-1")
        if len(data) <= 4:
            length, at = 0x80000000 | len(data), struct.unpack("<I", data.ljust(4, b"\0"))[0]
        else:
            length, at = len(data), self._data(data)
        return self._cell(struct.pack("<2sHIIIHH", b"vk", len(stored), length, at, kind, 1, 0) + stored)

    def _data(self, data: bytes) -> int:
        if len(data) <= 16344:
            return self._cell(data)
        pieces = [self._cell(data[at : at + 16344] + bytes(4)) for at in range(0, len(data), 16344)]
        listed = self._cell(struct.pack(f"<{len(pieces)}I", *pieces))
        return self._cell(struct.pack("<2sHI", b"db", len(pieces), listed))


def _stored(value: tuple[int, bytes] | str | int) -> tuple[int, bytes]:
    if isinstance(value, int):
        return REG_DWORD, struct.pack("<I", value)
    if isinstance(value, str):
        return REG_SZ, f"{value}\0".encode("utf-16-le")
    return value
