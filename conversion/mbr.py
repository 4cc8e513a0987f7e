"""Master boot records: boot code, disk signature, four primary partitions, a chain of logical ones.

The layout is the one every BIOS, Windows and Linux (block/partitions/msdos.c) agree on: 440 bytes of code, the disk
signature at 0x1B8, two bytes, four entries at 0x1BE, 55 AA. An extended partition begins with the first extended boot
record (EBR) of a chain: its first entry is a logical partition, counted from that EBR, its second the next EBR, counted
from the extended partition's start. An EBR may lie anywhere below its partition: all of them in one gap is legal.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from conversion.device import BlockDevice
from conversion.errors import DamagedError

BOOT_CODE_BYTES: Final = 440
LARGEST_CHAIN_RECORDS: Final = 100  # where Linux stops too
LARGEST_SECTORS: Final = 1 << 32  # what an entry's 32-bit start can reach
EXTENDED: Final = 0x05
EXTENDED_LBA: Final = 0x0F
EXTENDED_TYPES: Final = frozenset((EXTENDED, EXTENDED_LBA, 0x85))
PROTECTIVE: Final = 0xEE
DYNAMIC_DISK: Final = 0x42

# boot code, disk signature, two bytes that mark a copy-protected disk, four entries, 55 AA
_RECORD: Final = struct.Struct("<440sI2s64s2s")
# status, CHS of the first sector, type, CHS of the last sector, first LBA, sectors
_ENTRY: Final = struct.Struct("<B3sB3sII")
assert _RECORD.size == 512
assert _ENTRY.size == 16
_MAGIC: Final = b"\x55\xaa"
_HEADS: Final = 255
_TRACK_SECTORS: Final = 63
_BEYOND_CHS: Final = b"\xfe\xff\xff"

Kind = Literal["primary", "extended", "logical"]


@dataclass(frozen=True, slots=True)
class MbrEntry:
    """One of the four entries of a record, as stored. An empty one has type 0 or no sectors."""

    type: int
    first_lba: int  # counted from what its record counts from
    sectors: int
    active: bool = False

    @property
    def used(self) -> bool:
        """Whether the entry describes anything."""
        return self.type != 0 and self.sectors != 0


EMPTY: Final = MbrEntry(0, 0, 0)


@dataclass(frozen=True, slots=True)
class MbrPartition:
    """A partition: the sectors [first_lba, end_lba). ``number`` is Linux's: 1 to 4, logical ones from 5."""

    number: int
    kind: Kind
    type: int
    first_lba: int
    end_lba: int
    active: bool
    ebr_lba: int | None = None  # where a logical partition's record lies

    @property
    def sectors(self) -> int:
        """Length, sectors."""
        return self.end_lba - self.first_lba


@dataclass(frozen=True, slots=True)
class Mbr:
    """A record and the chains that hang on it. ``partitions`` are in the order of their numbers, extended ones too."""

    boot_code: bytes  # 440 bytes
    signature: int
    mark: bytes  # the two bytes after the signature
    partitions: tuple[MbrPartition, ...]

    @property
    def is_protective(self) -> bool:
        """Whether it guards a GUID partition table: an entry of type 0xEE is there."""
        return any(one.type == PROTECTIVE for one in self.partitions)

    @property
    def holding_data(self) -> tuple[MbrPartition, ...]:
        """The partitions that are no mere container of others."""
        return tuple(one for one in self.partitions if one.kind != "extended")


def read_mbr(device: BlockDevice) -> Mbr | None:
    """Return the device's master boot record, or None where its first sector is none.

    Raises DamagedError where a chain of logical partitions loops, leaves the disk, overflows or breaks off.
    """
    if device.size < _RECORD.size:
        return None
    decoded = decode_record(device.read_at(0, _RECORD.size))
    if decoded is None:
        return None
    boot_code, signature, mark, entries = decoded
    primaries = [
        MbrPartition(
            number,
            "extended" if entry.type in EXTENDED_TYPES else "primary",
            entry.type,
            entry.first_lba,
            entry.first_lba + entry.sectors,
            entry.active,
        )
        for number, entry in enumerate(entries, 1)
        if entry.used
    ]
    logicals: list[MbrPartition] = []
    visited: set[int] = set()
    for one in primaries:
        if one.kind == "extended":
            _follow(device, one, visited, logicals)
    return Mbr(boot_code, signature, mark, (*primaries, *logicals))


def decode_record(sector: bytes) -> tuple[bytes, int, bytes, tuple[MbrEntry, ...]] | None:
    """Return (boot code, signature, mark, four entries) of a record, None where the bytes are none.

    A volume's boot sector ends in 55 AA too, so a status other than 0x00 and 0x80 rules a record out, as in Linux.
    """
    if len(sector) < _RECORD.size:
        return None
    boot_code, signature, mark, table, magic = _RECORD.unpack_from(sector)
    if magic != _MAGIC:
        return None
    entries = []
    for status, _, kind, _, first, sectors in _ENTRY.iter_unpack(table):
        if status not in {0x00, 0x80}:
            return None
        entries.append(MbrEntry(kind, first, sectors, status == 0x80))
    return boot_code, signature, mark, tuple(entries)


def encode_record(
    entries: Sequence[MbrEntry], *, boot_code: bytes = b"", signature: int = 0, mark: bytes = b"\0\0", base_lba: int = 0
) -> bytes:
    """Return the 512 bytes of a master boot record, or of an EBR that lies at ``base_lba``.

    Raises ValueError for more than four entries, too much code, or numbers beyond 32 bits.
    """
    if len(entries) > 4 or len(boot_code) > BOOT_CODE_BYTES or len(mark) != 2:
        raise ValueError("a record has four entries, 440 bytes of code and a mark of two")
    table = b"".join(_encode_entry(entry, base_lba) for entry in entries)
    if not 0 <= signature < LARGEST_SECTORS:
        raise ValueError("a disk signature has 32 bits")
    return _RECORD.pack(boot_code, signature, mark, table, _MAGIC)


def protective_mbr(sectors: int, *, boot_code: bytes = b"") -> bytes:
    """Return the protective record of a disk of ``sectors`` sectors with a GUID partition table (UEFI, 5.2.3)."""
    return encode_record([MbrEntry(PROTECTIVE, 1, min(sectors - 1, LARGEST_SECTORS - 1))], boot_code=boot_code)


def overrules_gpt(device: BlockDevice) -> bool:
    """Whether a plain master boot record is in force: partitions, none of them protective. A GPT below it is asleep."""
    decoded = decode_record(device.read_at(0, _RECORD.size)) if device.size >= _RECORD.size else None
    if decoded is None:
        return False
    used = [entry for entry in decoded[3] if entry.used]
    return bool(used) and all(entry.type != PROTECTIVE for entry in used)


def _encode_entry(entry: MbrEntry, base_lba: int) -> bytes:
    if not (0 <= entry.first_lba < LARGEST_SECTORS and 0 <= entry.sectors < LARGEST_SECTORS and 0 <= entry.type < 256):
        raise ValueError(f"an entry of 32-bit numbers cannot hold {entry}")
    if not entry.used:
        return bytes(_ENTRY.size)
    first, last = base_lba + entry.first_lba, base_lba + entry.first_lba + entry.sectors - 1
    status = 0x80 if entry.active else 0
    return _ENTRY.pack(status, _chs(first), entry.type, _chs(last), entry.first_lba, entry.sectors)


def _chs(lba: int) -> bytes:
    cylinder, within = divmod(lba, _HEADS * _TRACK_SECTORS)
    if cylinder > 1023:
        return _BEYOND_CHS
    head, sector = divmod(within, _TRACK_SECTORS)
    return bytes((head, (sector + 1) | (cylinder >> 2 & 0xC0), cylinder & 0xFF))


def _follow(device: BlockDevice, extended: MbrPartition, visited: set[int], logicals: list[MbrPartition]) -> None:
    """Append the logical partitions of a chain. ``visited`` are the EBRs of all chains, so that it ends."""
    ebr_lba = extended.first_lba
    while True:
        _check_place(device, ebr_lba, visited)
        visited.add(ebr_lba)
        decoded = decode_record(device.read_at(ebr_lba * device.sector_size, _RECORD.size))
        if decoded is None:
            if ebr_lba == extended.first_lba:
                return  # an extended partition that never held one
            raise DamagedError(
                f"the chain of logical partitions breaks off at sector {ebr_lba}, which is no boot record",
                subject="master boot record",
                hint="repair the partition table with a tool of the guest, then try again",
            )
        # The later two entries are unused by everyone but OS/2; Linux bounds them, we leave them out.
        following = None
        for entry in decoded[3][:2]:
            if not entry.used:
                continue
            if entry.type in EXTENDED_TYPES:
                following = following if following is not None else extended.first_lba + entry.first_lba
                continue
            first = ebr_lba + entry.first_lba
            number = 5 + len(logicals)
            logicals.append(
                MbrPartition(number, "logical", entry.type, first, first + entry.sectors, entry.active, ebr_lba)
            )
        if following is None:
            return
        ebr_lba = following


def _check_place(device: BlockDevice, ebr_lba: int, visited: set[int]) -> None:
    problem = None
    if ebr_lba in visited:
        problem = f"loops: sector {ebr_lba} comes twice"
    elif len(visited) >= LARGEST_CHAIN_RECORDS:
        problem = f"has more than {LARGEST_CHAIN_RECORDS} records"
    elif ebr_lba == 0 or (ebr_lba + 1) * device.sector_size > device.size:
        problem = f"leads to sector {ebr_lba}, outside of the disk"
    if problem is not None:
        raise DamagedError(
            f"the chain of logical partitions {problem}",
            subject="master boot record",
            hint="repair the partition table with a tool of the guest, then try again",
        )
