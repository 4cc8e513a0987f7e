"""The log: entries encoded and decoded, the active sequence found, and what replaying it changes [MS-VHDX 2.3].

The log is a ring of 4 KiB sectors. An entry is a header, its descriptors, and one data sector for each data
descriptor; it becomes true as a whole, by its checksum, and is written and flushed before any change that it
describes is made in place. A crash therefore leaves either no valid entry (and nothing changed in place) or an entry
that can be replayed. Each entry names the oldest one still needed (its tail): the active sequence runs from there to
the newest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import numpy as np

from vhdx.errors import CorruptDiskError, UnsupportedDiskError
from vhdx.replay import Change, Overlay
from vhdx.structures import MIB, UINT32, checksum_of, decode_guid, encode_guid, sealed

LOG_SECTOR: Final = 4096
MAX_LOG_LENGTH: Final = 64 * MIB  # Windows and QEMU write 1 MiB; the bound keeps what replay holds in memory small
MAX_WRITES: Final = 1 << 17  # in all entries together; 64 MiB of data sectors are 16 Ki
TOO_LONG_HINT: Final = "let the system that wrote the disk open and close it once, which empties the log"
MAX_FILE_OFFSET: Final = 1 << 48  # four times what the largest disk needs

_ENTRY_HEADER = struct.Struct("<4sIIIQII16sQQ")
_ZERO_DESCRIPTOR = struct.Struct("<4sIQQQ")
_DATA_DESCRIPTOR = struct.Struct("<4s4s8sQQ")
_DESCRIPTOR_SIZE = 32
_DATA_SECTOR_HEAD = struct.Struct("<4sI")
assert _ENTRY_HEADER.size == 64
assert _ZERO_DESCRIPTOR.size == _DATA_DESCRIPTOR.size == _DESCRIPTOR_SIZE
assert _DATA_SECTOR_HEAD.size == 8

_ENTRY_MAGIC = b"loge"
_ZERO_MAGIC = b"zero"
_DATA_MAGIC = b"desc"
_SECTOR_MAGIC = b"data"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the log: ``writes`` are made in order, each a multiple of 4 KiB at a multiple of 4 KiB.

    A data write is 4 KiB long; a longer ``Change`` with data becomes as many descriptors as it has sectors.
    """

    sequence_number: int
    log_guid: UUID
    tail: int  # bytes from the log's start to the oldest entry still needed; this entry's own place if only it is
    flushed_file_offset: int  # the file's length that was on stable storage when the entry was written
    last_file_offset: int  # a length that holds every structure of the file
    writes: tuple[Change, ...]
    position: int = field(default=0, compare=False)  # where it was found: bytes from the log's start
    length: int = field(default=0, compare=False)  # bytes it takes in the log

    def encode(self) -> bytes:
        """Return the entry's sectors, checksum filled in. Raises ValueError for a write that is not aligned."""
        descriptors: list[bytes] = []
        sectors: list[bytes] = []
        for write in self.writes:
            if write.start % LOG_SECTOR or write.end % LOG_SECTOR or write.end <= write.start:
                raise ValueError(f"a log entry cannot describe the range [{write.start}, {write.end})")
            size = write.end - write.start
            if write.data is None:
                descriptors.append(_ZERO_DESCRIPTOR.pack(_ZERO_MAGIC, 0, size, write.start, self.sequence_number))
                continue
            if len(write.data) != size:
                raise ValueError(f"{len(write.data)} bytes cannot fill a range of {size}")
            for start in range(0, size, LOG_SECTOR):
                sector = write.data[start : start + LOG_SECTOR]
                descriptors.append(
                    _DATA_DESCRIPTOR.pack(
                        _DATA_MAGIC, sector[-4:], sector[:8], write.start + start, self.sequence_number
                    )
                )
                head = _DATA_SECTOR_HEAD.pack(_SECTOR_MAGIC, self.sequence_number >> 32)
                sectors.append(head + sector[8:-4] + UINT32.pack(self.sequence_number & 0xFFFFFFFF))
        length = (descriptor_sectors(len(descriptors)) + len(sectors)) * LOG_SECTOR
        header = _ENTRY_HEADER.pack(
            _ENTRY_MAGIC,
            0,
            length,
            self.tail,
            self.sequence_number,
            len(descriptors),
            0,
            encode_guid(self.log_guid),
            self.flushed_file_offset,
            self.last_file_offset,
        )
        front = header + b"".join(descriptors)
        front = front.ljust(descriptor_sectors(len(descriptors)) * LOG_SECTOR, b"\0")
        return sealed(bytearray(front + b"".join(sectors)))


def descriptor_sectors(count: int) -> int:
    """Return the sectors that an entry's header and ``count`` descriptors take."""
    return -(-(_ENTRY_HEADER.size + count * _DESCRIPTOR_SIZE) // LOG_SECTOR)


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What replaying a log does to its file: grow it to ``size_after``, then make ``overlay``'s changes.

    ``entries`` is empty where the log holds nothing to replay. ``torn`` counts entries of this log that are newer
    than the active sequence or not valid: writes that a crash cut off, which changed nothing in place.
    """

    log_guid: UUID
    entries: tuple[LogEntry, ...]
    overlay: Overlay
    size_after: int
    torn: int = 0


def plan_replay(log: bytes, *, log_guid: UUID, file_size: int, log_offset: int) -> ReplayPlan:
    """Return what must be replayed of the ring ``log``, which belongs to the header that names ``log_guid``.

    Raises CorruptDiskError where entries of this log exist but make no valid sequence (more than one write that a
    crash may have cut off), or where the file is shorter than the newest entry says it was on stable storage;
    UnsupportedDiskError for more than ``MAX_WRITES`` changes.
    """
    candidates = _candidates(log, log_guid)
    entries = {}
    room_for_writes = MAX_WRITES
    for position, room in candidates:
        entry = _decode_entry(log, position, room, log_guid, max_writes=room_for_writes)
        if entry is not None:
            entries[position] = entry
            room_for_writes -= len(entry.writes)
    sequence = _active_sequence(entries, len(log))
    if not sequence:
        # The first entry of a fresh log, cut off by a crash, was never acted upon. Anything else tells of damage.
        if entries or len(candidates) > 1:
            raise CorruptDiskError(
                f"the log needs replay, but its {len(candidates)} entries make no valid sequence",
                offset=log_offset,
                hint="the file was damaged after it was written: restore it from a copy",
            )
        return ReplayPlan(log_guid, (), Overlay(), file_size, torn=len(candidates))
    newest = sequence[-1]
    if file_size < newest.flushed_file_offset:
        raise CorruptDiskError(
            f"the file is {file_size} bytes long, but its log says that {newest.flushed_file_offset} were written",
            offset=log_offset + newest.position,
            hint="the file was cut short after it was written: restore it from a copy",
        )
    writes = [write for entry in sequence for write in entry.writes]
    torn = sum(1 for position, _ in candidates if position not in entries)
    overlay = Overlay.of(writes)
    data_end = max((change.end for change in overlay.changes if change.data is not None), default=0)
    size_after = max(file_size, newest.last_file_offset, data_end)
    return ReplayPlan(log_guid, tuple(sequence), overlay, size_after, torn)


def check_log_bounds(*, length: int, offset: int) -> None:
    """Raise UnsupportedDiskError for a log too long to be replayed."""
    if length > MAX_LOG_LENGTH:
        raise UnsupportedDiskError(
            f"the log takes {length} bytes; logs of more than {MAX_LOG_LENGTH} bytes are not replayed",
            offset=offset,
            hint=TOO_LONG_HINT,
        )


def _candidates(log: bytes, log_guid: UUID) -> list[tuple[int, int]]:
    """Return where entries of this log may begin, and the bytes up to the next such place, round the ring.

    No sector of an entry but its first can begin with the entry magic, so an entry that reaches past the next such
    sector is not valid; looking at each then costs no more than one pass over the log, whatever it holds.
    """
    firsts = np.frombuffer(log, dtype="<u4").reshape(-1, LOG_SECTOR // 4)[:, 0]
    found = np.flatnonzero(firsts == UINT32.unpack(_ENTRY_MAGIC)[0])
    if not len(found):
        return []
    positions = found * LOG_SECTOR
    rooms = np.diff(np.append(positions, positions[0] + len(log)))
    guid = encode_guid(log_guid)
    return [
        (int(position), int(room))
        for position, room in zip(positions, rooms, strict=True)
        if log[int(position) + 32 : int(position) + 48] == guid
    ]


def _decode_entry(log: bytes, position: int, room: int, log_guid: UUID, *, max_writes: int) -> LogEntry | None:
    """Return the valid entry at ``position``, None where there is none."""
    fields = _ENTRY_HEADER.unpack_from(log, position)
    _, checksum, length, tail, sequence, count, _, guid, flushed, last = fields
    front_sectors = descriptor_sectors(count)
    if not (0 < length <= room and length % LOG_SECTOR == 0 and front_sectors * LOG_SECTOR <= length):
        return None
    if tail % LOG_SECTOR or tail >= len(log) or sequence == 0 or last > MAX_FILE_OFFSET:
        return None
    data = log[position : position + length]
    if len(data) < length:
        data += log[: length - len(data)]
    if checksum_of(data) != checksum:
        return None
    if count > max_writes:
        raise UnsupportedDiskError(
            f"the log has more than {MAX_WRITES} changes to replay",
            hint=TOO_LONG_HINT,
        )
    writes = _decode_writes(data, count, sequence)
    if writes is None:
        return None
    return LogEntry(sequence, decode_guid(guid), tail, flushed, last, writes, position=position, length=length)


def _decode_writes(data: bytes, count: int, sequence: int) -> tuple[Change, ...] | None:
    """Return the writes of an entry whose checksum holds, None where a descriptor or data sector contradicts it."""
    writes: list[Change] = []
    sector_at = descriptor_sectors(count) * LOG_SECTOR
    low = UINT32.pack(sequence & 0xFFFFFFFF)
    head = _DATA_SECTOR_HEAD.pack(_SECTOR_MAGIC, sequence >> 32)
    for place in range(_ENTRY_HEADER.size, _ENTRY_HEADER.size + count * _DESCRIPTOR_SIZE, _DESCRIPTOR_SIZE):
        magic, _, size, offset, number = _ZERO_DESCRIPTOR.unpack_from(data, place)
        if magic == _DATA_MAGIC:
            size = LOG_SECTOR
        elif magic != _ZERO_MAGIC:
            return None
        if number != sequence or offset % LOG_SECTOR or size % LOG_SECTOR or offset + size > MAX_FILE_OFFSET:
            return None
        content = None
        if magic == _DATA_MAGIC:
            sector = data[sector_at : sector_at + LOG_SECTOR]
            if len(sector) != LOG_SECTOR or sector[:8] != head or sector[-4:] != low:
                return None
            sector_at += LOG_SECTOR
            content = data[place + 8 : place + 16] + sector[8:-4] + data[place + 4 : place + 8]
        if size:
            writes.append(Change(offset, offset + size, content))
    return tuple(writes)


def _active_sequence(entries: dict[int, LogEntry], log_length: int) -> list[LogEntry]:
    """Return the valid sequence that ends with the highest sequence number, oldest entry first; empty if none.

    A sequence is valid when the tail of its newest entry is the place of an entry of the sequence. Following each
    entry to the one after it, every entry has one newest; a tail is in the sequence where it has the same newest.
    """

    def following(entry: LogEntry) -> LogEntry | None:
        candidate = entries.get((entry.position + entry.length) % log_length)
        return candidate if candidate and candidate.sequence_number == entry.sequence_number + 1 else None

    newest_of: dict[int, int] = {}
    for entry in sorted(entries.values(), key=lambda entry: entry.sequence_number, reverse=True):
        after = following(entry)
        newest_of[entry.position] = entry.position if after is None else newest_of[after.position]
    ends = [entry for entry in entries.values() if newest_of[entry.position] == entry.position]
    for newest in sorted(ends, key=lambda entry: entry.sequence_number, reverse=True):
        if newest_of.get(newest.tail) != newest.position:
            continue
        sequence = [entries[newest.tail]]
        while sequence[-1].position != newest.position:
            after = following(sequence[-1])
            assert after is not None
            sequence.append(after)
        return sequence
    return []
