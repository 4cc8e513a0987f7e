"""What the way back to a GUID partition table needs, as a value and as a checksummed JSON document.

Saved are the bytes before the first partition, of every place that a conversion writes and of both copies of the table,
the table itself, the layout, and what was written: undone by them, an unchanged disk is the old one by the byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from conversion.device import BlockDevice
from conversion.errors import DamagedError
from conversion.gpt import Gpt, decode_gpt
from conversion.gpt_copies import GptCopies
from conversion.layout import SECTOR_BYTES, ExtendedPartition, Layout, LayoutEntry, UnmappedPartition
from conversion.mbr import BOOT_CODE_BYTES, Mbr, read_mbr
from conversion.partition_types import System

FORMAT: Final = 1
LARGEST_PREFIX_SECTORS: Final = 8192  # as much before the first partition is kept; partitions begin at 2048 at most
LARGEST_SAVED_BYTES: Final = 64 << 20  # three times the largest table, the prefix and a core
LARGEST_PARTITIONS: Final = 4096
BACKUP_SECTORS: Final = 33


@dataclass(frozen=True, slots=True)
class SavedTable:
    """A disk's start and end as they were, and what was made of them.

    ``original`` are (offset, data), ascending, apart from each other, whole sectors; the first one begins at 0.
    ``boot_code`` is what was written to the first 440 bytes, ``core_digest`` the SHA-256 of the boot core.
    """

    system: System
    sectors: int  # of the disk
    gpt: Gpt
    layout: Layout
    boot_code: bytes
    core_bytes: int
    core_digest: str
    original: tuple[tuple[int, bytes], ...]

    @property
    def original_record(self) -> bytes:
        """The first sector as it was: as a rule the protective master boot record."""
        return self.original[0][1][:SECTOR_BYTES]

    @property
    def written_record(self) -> bytes:
        """The first sector as the conversion wrote it."""
        return self.layout.master_record(self.boot_code)

    def written_mbr(self) -> Mbr:
        """Return the master boot record with its logical partitions, as the conversion wrote them."""
        return _parse_written(self.layout, self.boot_code, self.sectors)

    def document(self) -> dict[str, object]:
        """Return the JSON form, with its checksum."""
        document: dict[str, object] = {
            "format": FORMAT,
            "system": self.system,
            "sectors": self.sectors,
            "sector_bytes": SECTOR_BYTES,
            "gpt": {
                "from_backup": self.gpt.from_backup,
                "header_lba": self.gpt.header.own_lba,
                "header": _pack(self.gpt.header.encode(self.gpt.entries)),
                "entries": _pack(self.gpt.entries),
            },
            "layout": self.layout.document(),
            "boot_code": _pack(self.boot_code),
            "core_bytes": self.core_bytes,
            "core_sha256": self.core_digest,
            "original": [{"offset": offset, **_pack(data)} for offset, data in self.original],
        }
        return {**document, "sha256": _checksum(document)}


def save_table(
    device: BlockDevice, copies: GptCopies, layout: Layout, *, system: System, boot_code: bytes, core: bytes
) -> SavedTable:
    """Read what the way back needs from a device that is not converted yet.

    ``boot_code`` (at most 440 bytes) and ``core`` are what will be written. Raises ValueError where the layout and the
    core cannot belong to this device.
    """
    gpt = copies.table
    end = copies.sectors
    if len(core) > layout.core_sectors * SECTOR_BYTES or layout.disk_guid != gpt.disk_guid:
        raise ValueError("the layout was made for another disk or another boot core")
    first = min((one.first_lba for one in gpt.partitions), default=LARGEST_PREFIX_SECTORS)
    places = [(0, max(2, min(first, LARGEST_PREFIX_SECTORS))), (end - BACKUP_SECTORS, end)]
    for header in (gpt.primary_header(), gpt.backup_header(), gpt.with_end(end).backup_header()):
        places += [(header.entries_lba, header.entries_end_lba), (header.own_lba, header.own_lba + 1)]
    places.append((layout.core_lba, layout.core_lba + layout.core_sectors))
    places += [(one.ebr_lba, one.ebr_lba + 1) for one in layout.entries if one.ebr_lba is not None]
    original = tuple(
        (lba * SECTOR_BYTES, device.read_at(lba * SECTOR_BYTES, (stop - lba) * SECTOR_BYTES))
        for lba, stop in _joined(places, end)
    )
    padded = boot_code.ljust(BOOT_CODE_BYTES, b"\0")
    return SavedTable(system, end, gpt, layout, padded, len(core), hashlib.sha256(core).hexdigest(), original)


def decode_saved_table(document: object) -> SavedTable:
    """Return the saved table of a JSON document.

    Raises DamagedError where its checksum is wrong or its parts contradict each other: nothing of it is believed then.
    """
    try:
        return _decode(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, zlib.error, RecursionError) as error:
        raise _damaged(f"it is not well formed ({type(error).__name__}: {str(error)[:200]})") from error


def _decode(document: object) -> SavedTable:
    if not isinstance(document, dict):
        raise _damaged("it is no object")
    fields: dict[str, Any] = dict(document)
    checksum = fields.pop("sha256", None)
    if fields.get("format") != FORMAT or fields.get("sector_bytes") != SECTOR_BYTES:
        raise _damaged(f"its format is {str(fields.get('format'))[:20]}, this program knows {FORMAT}")
    if checksum != _checksum(fields):
        raise _damaged("its checksum is wrong")
    system = fields["system"]
    if system not in {"windows", "linux"}:
        raise _damaged("it is of no known system")
    sectors = _whole(fields["sectors"], 1 << 50)
    gpt = _decode_table(fields["gpt"])
    layout = _decode_layout(fields["layout"], sectors)
    boot_code = _unpack(fields["boot_code"], BOOT_CODE_BYTES)
    core_bytes = _whole(fields["core_bytes"], layout.core_sectors * SECTOR_BYTES)
    digest = fields["core_sha256"]
    if len(boot_code) != BOOT_CODE_BYTES or not isinstance(digest, str) or len(bytes.fromhex(digest)) != 32:
        raise _damaged("its boot code or the checksum of its core is cut off")
    original = _decode_original(fields["original"], sectors)
    saved = SavedTable(system, sectors, gpt, layout, boot_code, core_bytes, digest, original)
    _check(saved)
    return saved


def _check(saved: SavedTable) -> None:
    """Raise DamagedError where the parts contradict each other."""
    layout, gpt = saved.layout, saved.gpt
    if layout.disk_guid != gpt.disk_guid:
        raise _damaged("its layout is of another disk")
    of_layout = {(one.gpt_number, one.guid, one.first_lba, one.end_lba) for one in layout.entries}
    of_layout |= {(one.gpt_number, one.guid, one.first_lba, one.end_lba) for one in layout.unmapped}
    of_table = {(one.number, one.guid, one.first_lba, one.end_lba) for one in gpt.partitions}
    if of_layout != of_table or len(of_table) != len(layout.entries) + len(layout.unmapped):
        raise _damaged("its layout is not that of its partition table")
    for header in (gpt.primary_header(), gpt.backup_header(), gpt.with_end(saved.sectors).backup_header()):
        if not (
            0 < header.entries_lba <= header.entries_end_lba <= saved.sectors and 0 < header.own_lba < saved.sectors
        ):
            raise _damaged("its partition table does not fit on its disk")
    if layout.entry(layout.boot_partition) is None:
        raise _damaged("the partition to boot from is not in its layout")
    if any(one.active and one.gpt_number != layout.boot_partition for one in layout.entries):
        raise _damaged("its active partition is not the one to boot from")
    expected = {(one.number, one.type, one.first_lba, one.end_lba, one.active) for one in layout.entries}
    written = _parse_written(layout, saved.boot_code, saved.sectors)
    found = {(one.number, one.type, one.first_lba, one.end_lba, one.active) for one in written.holding_data}
    if expected != found:
        raise _damaged("its layout cannot be what was written")


def _parse_written(layout: Layout, boot_code: bytes, sectors: int) -> Mbr:
    """Return what a reader sees of the records that a layout makes. Raises DamagedError where that is nothing."""
    records = dict(layout.extended_records())
    mbr = read_mbr(_Records({0: layout.master_record(boot_code), **records}, sectors))
    if mbr is None:
        raise _damaged("its layout makes no master boot record")
    return mbr


@dataclass(frozen=True, slots=True)
class _Records:
    """A device of zeros but for some sectors."""

    sector_at: Mapping[int, bytes]  # offset → content
    sectors: int

    @property
    def size(self) -> int:
        return self.sectors * SECTOR_BYTES

    @property
    def sector_size(self) -> int:
        return SECTOR_BYTES

    def read_at(self, offset: int, length: int) -> bytes:
        return self.sector_at.get(offset, b"").ljust(length, b"\0")[:length]


def _decode_table(fields: Any) -> Gpt:
    lba, from_backup = _whole(fields["header_lba"], 1 << 50), fields["from_backup"]
    sector = _unpack(fields["header"], SECTOR_BYTES)
    gpt = decode_gpt(sector, _unpack(fields["entries"], LARGEST_SAVED_BYTES), lba)
    if isinstance(gpt, str):
        raise _damaged(f"its partition table cannot be read: {gpt}")
    if len(sector) != SECTOR_BYTES or gpt.from_backup is not from_backup:
        raise _damaged("its partition table is not from where it says")
    return gpt


def _decode_layout(fields: Any, sectors: int) -> Layout:
    if len(fields["entries"]) > LARGEST_PARTITIONS or len(fields["unmapped"]) > LARGEST_PARTITIONS:
        raise _damaged("its layout has too many partitions")
    entries = tuple(_decode_entry(one, sectors) for one in fields["entries"])
    unmapped = tuple(
        UnmappedPartition(
            _whole(one["gpt_number"], LARGEST_PARTITIONS),
            UUID(_text(one["guid"])),
            *_range(one, sectors),
            _text(one["why"]),
        )
        for one in fields["unmapped"]
    )
    extended = fields["extended"]
    numbers = [one.number for one in entries] + ([] if extended is None else [_whole(extended["number"], 4)])
    if len(set(numbers)) != len(numbers) or 0 in numbers:
        raise _damaged("two partitions of its layout have the same number")
    core_lba, core_sectors = _whole(fields["core_lba"], sectors), _whole(fields["core_sectors"], sectors)
    if core_lba < 1 or core_lba + core_sectors > sectors:
        raise _damaged("its boot core lies outside of the disk")
    return Layout(
        UUID(_text(fields["disk_guid"])),
        int(_text(fields["signature"]), 16),
        entries,
        unmapped,
        None if extended is None else ExtendedPartition(_whole(extended["number"], 4), *_range(extended, sectors)),
        _whole(fields["boot_partition"], LARGEST_PARTITIONS),
        core_lba,
        core_sectors,
    )


def _decode_entry(fields: Any, sectors: int) -> LayoutEntry:
    first, end = _range(fields, sectors)
    number, ebr_lba = _whole(fields["number"], 255), fields["ebr_lba"]
    if ebr_lba is not None:
        ebr_lba = _whole(ebr_lba, first - 1)
    if (number > 4) is (ebr_lba is None) or not isinstance(fields["active"], bool):
        raise _damaged("an entry of its layout is neither primary nor logical")
    entry = LayoutEntry(
        _whole(fields["gpt_number"], LARGEST_PARTITIONS),
        UUID(_text(fields["guid"])),
        number,
        int(_text(fields["type"]), 16),
        *(first, end, fields["active"], ebr_lba),
    )
    if fields["kind"] != entry.kind:
        raise _damaged("an entry of its layout is neither primary nor logical")
    return entry


def _decode_original(fields: Any, sectors: int) -> tuple[tuple[int, bytes], ...]:
    original: list[tuple[int, bytes]] = []
    position = total = 0
    for one in fields:
        offset = _whole(one["offset"], sectors * SECTOR_BYTES)
        data = _unpack(one, LARGEST_SAVED_BYTES - total)
        total += len(data)
        if offset < position or offset % SECTOR_BYTES or not data or len(data) % SECTOR_BYTES:
            raise _damaged("its saved bytes are no sectors, or not in order")
        position = offset + len(data)
        original.append((offset, data))
    if not original or original[0][0] != 0 or position > sectors * SECTOR_BYTES:
        raise _damaged("its saved bytes do not begin at the disk's start, or leave it")
    return tuple(original)


def _joined(places: Iterable[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """Return the ranges sorted, inside of [0, end), neighbours joined."""
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(places):
        first, stop = max(first, 0), min(stop, end)
        if first >= stop:
            continue
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((first, stop))
    return joined


def _pack(data: bytes) -> dict[str, object]:
    return {"length": len(data), "zlib": base64.b64encode(zlib.compress(data, 9)).decode("ascii")}


def _unpack(fields: Any, largest_bytes: int) -> bytes:
    length = _whole(fields["length"], largest_bytes)
    inflate = zlib.decompressobj()
    data = inflate.decompress(base64.b64decode(_text(fields["zlib"]), validate=True), length + 1)
    if len(data) != length:
        raise _damaged("saved bytes are cut off")
    return data


def _checksum(document: Mapping[str, object]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _whole(value: object, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ValueError(f"a whole number up to {largest} was expected")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text was expected")
    return value


def _range(fields: Any, sectors: int) -> tuple[int, int]:
    first, end = _whole(fields["first_lba"], sectors), _whole(fields["end_lba"], sectors)
    if first >= end:
        raise ValueError("a range of sectors is empty")
    return first, end


def _damaged(problem: str) -> DamagedError:
    return DamagedError(
        f"the saved partition table cannot be used: {problem}",
        subject="saved partition table",
        hint="use the other copy that was kept; the backup of the table at the disk's end is a third one",
    )
