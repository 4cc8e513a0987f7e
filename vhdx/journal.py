"""The log written: changes of metadata become true as a whole, then are made in place [MS-VHDX 2.3].

What a commit writes, and why in this order:

1. The caller flushes the file. Payload that the change makes visible is then on stable storage, and so is whatever
   the commit before made in place: the log needs to keep no older entry than the one that comes now.
2. The entry is written and flushed. From here on the change is true: a crash replays it.
3. With a first entry, the headers are updated to name the log's GUID. Until then replay ignores the entry, and a
   header never names a log that holds no valid entry, which would make the file corrupt [MS-VHDX 2.3.3].
4. The change is made in place, not flushed.

An entry being written lies behind the one before it and never on it, so a torn entry leaves the older one, which
replays what is in place already. ``close`` flushes and zeroes the log GUID. So it is done, too, where the next entry
would go past the end of the log, and a new log begins at its start: QEMU takes an old entry behind the newest one for
its successor, and refuses the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from vhdx.errors import UnsupportedDiskError
from vhdx.headers import GuidFactory, HeaderPair
from vhdx.log import LOG_SECTOR, MAX_LOG_LENGTH, LogEntry, ReplayPlan, descriptor_sectors
from vhdx.osfile import File
from vhdx.replay import Change
from vhdx.structures import LOG_VERSION, MIB, ZERO_GUID

MAX_ENTRY_SECTORS: Final = 120  # data sectors of an entry: with its head under half of the smallest log, 1 MiB


class Journal:
    """The log of one file that is open for writing. ``headers`` are the file's."""

    def __init__(self, file: File, headers: HeaderPair, new_guid: GuidFactory) -> None:
        self._file = file
        self._headers = headers
        self._new_guid = new_guid
        self._log_offset = headers.current.log_offset
        self._log_length = headers.current.log_length
        self._guid = ZERO_GUID
        self._next_position = 0
        self._next_sequence = 1
        # A longer log than replay takes, or one of another version, must not be given anything to replay.
        if not MIB <= self._log_length <= MAX_LOG_LENGTH or headers.current.log_version != LOG_VERSION:
            raise UnsupportedDiskError(
                f"a log of {self._log_length} bytes and version {headers.current.log_version} cannot be written to",
                path=str(file.path),
                offset=self._log_offset,
            )

    @property
    def active(self) -> bool:
        """Whether the headers name a log that a crash would replay."""
        return self._guid != ZERO_GUID

    def commit(self, writes: Sequence[Change], *, data_is_flushed: bool = False) -> None:
        """Make the writes true as a whole, and in place. At most ``MAX_ENTRY_SECTORS`` sectors of data together.

        ``data_is_flushed`` says that the caller has flushed the file since it last wrote to it.
        """
        if not data_is_flushed:
            self._file.fsync()
        entry = self._entry(writes)
        encoded = entry.encode()
        assert len(encoded) * 2 <= self._log_length
        if self._next_position + len(encoded) > self._log_length:
            self.close()
            entry = self._entry(writes)
            encoded = entry.encode()
        self._file.pwrite(self._log_offset + self._next_position, encoded)
        self._file.fsync()
        if not self.active:
            self._headers.set_log_guid(entry.log_guid)
            self._guid = entry.log_guid
        self._next_position += len(encoded)
        self._next_sequence += 1
        apply_writes(self._file, writes)

    def _entry(self, writes: Sequence[Change]) -> LogEntry:
        """Return the entry of the writes that comes next in the log, of a new log where none is in use."""
        size = self._file.size()
        return LogEntry(
            sequence_number=self._next_sequence,
            log_guid=self._guid if self.active else self._new_guid(),
            tail=self._next_position,
            flushed_file_offset=size // MIB * MIB,
            last_file_offset=-(-max(size, *(write.end for write in writes)) // MIB) * MIB,
            writes=tuple(writes),
        )

    def commit_all(self, writes: Sequence[Change], *, data_is_flushed: bool = False) -> None:
        """Make any number of writes true, each one sector long: in order, by as many entries as that takes."""
        for start in range(0, len(writes), MAX_ENTRY_SECTORS):
            self.commit(writes[start : start + MAX_ENTRY_SECTORS], data_is_flushed=data_is_flushed and start == 0)

    def close(self) -> None:
        """Flush, and say in the headers that there is nothing to replay. The journal may be used again after."""
        self._file.fsync()
        if self.active:
            self._headers.set_log_guid(ZERO_GUID)
            self._guid = ZERO_GUID
            self._next_position = 0


def apply_writes(file: File, writes: Sequence[Change]) -> None:
    """Make the writes in place, neighbouring sectors in one call each. They must not overlap."""
    for offset, data in _joined(writes):
        file.pwrite(offset, data)


def _joined(writes: Sequence[Change]) -> Iterator[tuple[int, bytes]]:
    start, parts, end = 0, list[bytes](), 0
    for write in sorted(writes, key=lambda write: write.start):
        data = bytes(write.end - write.start) if write.data is None else write.data
        if parts and write.start == end:
            parts.append(data)
        else:
            if parts:
                yield start, b"".join(parts)
            start, parts = write.start, [data]
        end = write.end
    if parts:
        yield start, b"".join(parts)


def replay_to_disk(file: File, headers: HeaderPair, plan: ReplayPlan) -> None:
    """Carry a replay plan out: afterwards the file reads the same without its log, which the headers call empty.

    May be cut off at any instant and begun anew: the log stays named until its changes are flushed. The changes
    are idempotent, and the file only ever grows towards the size that the log asks for.
    """
    if headers.log_is_empty:
        return
    headers.begin_change()
    if file.size() < plan.size_after:
        file.truncate(plan.size_after)
    for change in plan.overlay.changes:
        if change.data is None:
            file.punch_hole(change.start, change.end - change.start)
        else:
            file.pwrite(change.start, change.data)
    file.fsync()
    headers.set_log_guid(ZERO_GUID)


def sector_write(offset: int, data: bytes) -> Change:
    """Return the write of one log sector."""
    assert len(data) == LOG_SECTOR
    return Change(offset, offset + LOG_SECTOR, data)


assert (descriptor_sectors(MAX_ENTRY_SECTORS) + MAX_ENTRY_SECTORS) * LOG_SECTOR * 2 <= MIB
