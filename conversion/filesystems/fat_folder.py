"""The 32-byte slots of a FAT folder: long names, their 8.3 aliases, and what a slot says of a file.

Layout: Microsoft's FAT specification (fatgen103). A long name lies, last piece first, in the slots before the one that
holds the 8.3 alias; a checksum over the alias ties them together.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from conversion.errors import ConversionError
from conversion.filesystems.fat_boot import SLOT_BYTES

ATTRIBUTE_LABEL: Final = 0x08
ATTRIBUTE_FOLDER: Final = 0x10
ATTRIBUTE_ARCHIVE: Final = 0x20
MOST_SLOTS: Final = 65536
DELETED: Final = 0xE5

# alias, attributes, case, made (tenths, time, date), accessed, cluster high, changed (time, date), cluster low, size
_SHORT: Final = struct.Struct("<11sBBBHHHHHHHI")
_LONG: Final = struct.Struct("<B10sBBB12s2s4s")
assert _SHORT.size == SLOT_BYTES
assert _LONG.size == SLOT_BYTES

_LONG_ATTRIBUTES: Final = 0x0F
_LAST_PIECE: Final = 0x40
_UNITS_PER_PIECE: Final = 13
_MOST_PIECES: Final = 20
_CODE_PAGE: Final = "cp437"
_LOWER_BASE: Final = 0x08
_LOWER_EXTENSION: Final = 0x10

_BAD_IN_LONG: Final = re.compile(r'["*/:<>?\\|\x00-\x1f\x7f]')
_BAD_IN_ALIAS: Final = re.compile(r"[^A-Z0-9!#$%&'()\-@^_`{}~]")
_PLAIN_ALIAS: Final = re.compile(r"[A-Z0-9!#$%&'()\-@^_`{}~]{1,8}(\.[A-Z0-9!#$%&'()\-@^_`{}~]{1,3})?")


@dataclass(frozen=True, slots=True)
class Slot:
    """A file, folder or label as its slots describe it. ``first_slot`` is where its long name begins."""

    name: str
    alias: str  # "BOOTMG~1.EXE"; the name itself where there is no long one
    attributes: int
    cluster: int
    size: int
    first_slot: int
    last_slot: int  # the one with the alias

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return bool(self.attributes & ATTRIBUTE_FOLDER)

    @property
    def is_label(self) -> bool:
        """Whether it is the volume's label and no file at all."""
        return bool(self.attributes & ATTRIBUTE_LABEL)

    def is_called(self, name: str) -> bool:
        """Return whether ``name`` names it, without case, by its long name or its alias."""
        folded = fold(name)
        return folded in {fold(self.name), fold(self.alias)}


def fold(name: str) -> str:
    """Return ``name`` in the case that FAT compares in: letter by letter, none becoming ASCII that was not."""
    return name.upper() if name.isascii() else "".join(map(_fold_letter, name))


def decode_folder(content: bytes, *, wide_clusters: bool) -> list[Slot]:
    """Return what the slots of a folder describe, in their order, up to the end mark.

    ``wide_clusters`` says whether slots hold 32 bits of cluster number (FAT32) or 16. Pieces of long names without a
    matching alias are passed over, as every FAT driver does.
    """
    found: list[Slot] = []
    pieces: list[tuple[int, int, bytes]] = []  # ordinal, checksum, 13 units; as they lie
    for index in range(len(content) // SLOT_BYTES):
        raw = content[index * SLOT_BYTES : (index + 1) * SLOT_BYTES]
        if raw[0] == 0:
            break
        if raw[0] == DELETED:
            pieces = []
        elif raw[11] & 0x3F == _LONG_ATTRIBUTES:
            ordinal, one, _, _, checksum, two, _, three = _LONG.unpack(raw)
            if ordinal & _LAST_PIECE:
                pieces = []
            pieces.append((ordinal, checksum, one + two + three))
        else:
            found.append(_decode_slot(raw, index, pieces, wide_clusters))
            pieces = []
    return found


def free_slots(content: bytes, count: int) -> int:
    """Return the index of the first of ``count`` free slots in a row; it may reach past the end of the folder."""
    slots = len(content) // SLOT_BYTES
    row = 0
    for index in range(slots):
        first = content[index * SLOT_BYTES]
        if first == 0:
            return index - row
        row = row + 1 if first == DELETED else 0
        if row == count:
            return index + 1 - count
    return slots - row


def encode_name(name: str, alias: bytes) -> bytes:
    """Return the slots of a long name; none where the alias says it all."""
    if name.encode("utf-8") == _text_of(alias).encode("utf-8"):
        return b""
    units = name.encode("utf-16-le")
    if len(units) % (2 * _UNITS_PER_PIECE):
        units += b"\0\0"
        units += b"\xff" * (-len(units) % (2 * _UNITS_PER_PIECE))
    checksum = _checksum(alias)
    pieces = [units[at : at + 2 * _UNITS_PER_PIECE] for at in range(0, len(units), 2 * _UNITS_PER_PIECE)]
    slots = [
        _LONG.pack(ordinal, piece[:10], _LONG_ATTRIBUTES, 0, checksum, piece[10:22], b"\0\0", piece[22:])
        for ordinal, piece in enumerate(pieces, 1)
    ]
    slots[-1] = bytes([slots[-1][0] | _LAST_PIECE]) + slots[-1][1:]
    return b"".join(reversed(slots))


def encode_slot(alias: bytes, attributes: int, cluster: int, size: int, stamp: datetime) -> bytes:
    """Return the slot that holds an alias of 11 bytes."""
    time, date = _encode_stamp(stamp)
    high, low = cluster >> 16, cluster & 0xFFFF
    return _SHORT.pack(alias, attributes, 0, 0, time, date, date, high, time, date, low, size)


def change_slot(raw: bytes, cluster: int, size: int, stamp: datetime) -> bytes:
    """Return a file's slot with other content: first cluster, size, time of the change, archive bit."""
    alias, attributes, case, tenths, made_time, made_date, _, _, _, _, _, _ = _SHORT.unpack(raw)
    time, date = _encode_stamp(stamp)
    high, low = cluster >> 16, cluster & 0xFFFF
    attributes |= ATTRIBUTE_ARCHIVE
    return _SHORT.pack(alias, attributes, case, tenths, made_time, made_date, date, high, time, date, low, size)


def check_name(name: str) -> None:
    """Raise ConversionError where FAT cannot hold a file of this name."""
    try:
        units = len(name.encode("utf-16-le")) // 2
    except UnicodeEncodeError:
        raise ConversionError(f"{name!r} is no name: it holds half of a surrogate pair") from None
    if not 1 <= units <= 255 or _BAD_IN_LONG.search(name) or name[-1] in ". ":
        raise ConversionError(f"FAT cannot hold a file named {name!r}")


def make_alias(name: str, taken: Collection[str]) -> bytes:
    """Return an 8.3 alias for ``name``, 11 bytes, that is none of ``taken`` (folded names and aliases).

    The name itself where it is a plain one in any case, or else a numbered one, the first that is free.
    """
    folded = fold(name)
    if _PLAIN_ALIAS.fullmatch(folded) and folded not in taken:
        base, _, extension = folded.partition(".")
        return f"{base:<8}{extension:<3}".encode("ascii")
    base, dot, extension = folded.lstrip(". ").replace(" ", "").rpartition(".")
    if not dot:
        base, extension = extension, ""
    base = _BAD_IN_ALIAS.sub("_", base.replace(".", ""))
    extension = _BAD_IN_ALIAS.sub("_", extension)[:3]
    for number in range(1, MOST_SLOTS + 2):
        tail = f"~{number}"
        stem = base[: 8 - len(tail)] + tail
        if (f"{stem}.{extension}" if extension else stem) not in taken:
            return f"{stem:<8}{extension:<3}".encode("ascii")
    raise ConversionError(f"no 8.3 alias for {name!r} is left in its folder")


def taken_names(slots: Iterable[Slot]) -> set[str]:
    """Return every name and alias of a folder, folded."""
    return {fold(name) for slot in slots if not slot.is_label for name in (slot.name, slot.alias)}


def _decode_slot(raw: bytes, index: int, pieces: list[tuple[int, int, bytes]], wide_clusters: bool) -> Slot:
    alias, attributes, case, _, _, _, _, high, _, _, low, size = _SHORT.unpack(raw)
    if attributes & ATTRIBUTE_LABEL:
        text = _decode_alias_text(alias).rstrip(" \0")
        return Slot(text, text, attributes, 0, 0, index, index)
    cluster = low | high << 16 if wide_clusters else low
    long_name = _join_pieces(pieces, _checksum(alias))
    first = index - len(pieces) if long_name else index
    name = long_name or _text_of(alias, case)
    return Slot(name, _text_of(alias), attributes, cluster, size, first, index)


def _join_pieces(pieces: list[tuple[int, int, bytes]], checksum: int) -> str:
    """Return the long name that the pieces make, empty where they are not in order or belong to another alias."""
    count = len(pieces)
    if not 1 <= count <= _MOST_PIECES:
        return ""
    expected = [count | _LAST_PIECE, *range(count - 1, 0, -1)]
    if [piece[0] for piece in pieces] != expected or any(piece[1] != checksum for piece in pieces):
        return ""
    units = b"".join(piece[2] for piece in reversed(pieces))
    return units.decode("utf-16-le", "replace").partition("\0")[0]


def _text_of(alias: bytes, case: int = 0) -> str:
    """Return an alias as it is shown: ``base.extension``, in the case that Windows NT keeps beside it."""
    text = _decode_alias_text(alias)
    base, extension = text[:8].rstrip(" "), text[8:].rstrip(" ")
    base = base.lower() if case & _LOWER_BASE else base
    extension = extension.lower() if case & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def _decode_alias_text(alias: bytes) -> str:
    if alias[0] == 0x05:  # stands for E5, which would mean a deleted slot
        alias = b"\xe5" + alias[1:]
    return alias.decode(_CODE_PAGE)


def _fold_letter(letter: str) -> str:
    upper = letter.upper()
    return upper if len(upper) == 1 and upper.isascii() == letter.isascii() else letter


def _checksum(alias: bytes) -> int:
    total = 0
    for byte in alias:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total


def _encode_stamp(stamp: datetime) -> tuple[int, int]:
    """Return a moment as FAT's time (two seconds' steps) and date."""
    if not 1980 <= stamp.year <= 2107:
        raise ValueError(f"FAT holds the years 1980 to 2107, not {stamp.year}")
    time = stamp.hour << 11 | stamp.minute << 5 | stamp.second // 2
    return time, (stamp.year - 1980) << 9 | stamp.month << 5 | stamp.day
