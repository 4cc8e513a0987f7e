"""The two headers of an open VHDX, and their updates: one is always valid, whatever a crash cuts off.

Headers cannot go through the log, since they say where it is [MS-VHDX 2.2.2.1]. An update writes the one that is not
in force, with the next sequence number, and flushes; then the same again for the other, so that losing one header
later never brings back an old state (an old log GUID above all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias
from uuid import UUID

from vhdx.errors import CorruptDiskError
from vhdx.osfile import File
from vhdx.structures import HEADER_OFFSETS, HEADER_SIZE, ZERO_GUID, Header

GuidFactory: TypeAlias = Callable[[], UUID]


class HeaderPair:
    """Both headers of a file that is open for writing; ``current`` is the one in force."""

    def __init__(self, file: File, new_guid: GuidFactory) -> None:
        self._file = file
        self._new_guid = new_guid
        self._slot, self.current = _in_force(file)
        self._file_guid_is_new = False
        self._data_guid_is_new = False

    def begin_change(self) -> None:
        """Give the file a new FileWriteGuid. Needed before its first change after an open, replay included."""
        if not self._file_guid_is_new:
            self._update(replace(self.current, file_write_guid=self._new_guid()))
            self._file_guid_is_new = True

    def begin_data_change(self) -> None:
        """Give it a new DataWriteGuid too. Needed before the first change that a guest or a child disk can see."""
        if not self._data_guid_is_new:
            self.set_data_write_guid(self._new_guid())

    def set_data_write_guid(self, guid: UUID) -> None:
        """Make ``guid`` the DataWriteGuid, for the changes that follow in this session."""
        changed = replace(self.current, data_write_guid=guid)
        if not self._file_guid_is_new:
            changed = replace(changed, file_write_guid=self._new_guid())
        self._update(changed)
        self._file_guid_is_new = self._data_guid_is_new = True

    def set_log_guid(self, guid: UUID) -> None:
        """Say that the log of ``guid`` is to be replayed; ZERO_GUID says that there is nothing to replay."""
        if guid != self.current.log_guid:
            self._update(replace(self.current, log_guid=guid))

    @property
    def log_is_empty(self) -> bool:
        """Whether nothing is to be replayed."""
        return self.current.log_guid == ZERO_GUID

    def _update(self, header: Header) -> None:
        for _ in HEADER_OFFSETS:
            header = replace(header, sequence_number=self.current.sequence_number + 1)
            self._slot = 1 - self._slot
            self._file.pwrite(HEADER_OFFSETS[self._slot], header.encode())
            self._file.fsync()
            self.current = header


def _in_force(file: File) -> tuple[int, Header]:
    """Return the number of the header in force, and the header."""
    best: tuple[int, Header] | None = None
    trouble: CorruptDiskError | None = None
    for slot, offset in enumerate(HEADER_OFFSETS):
        try:
            header = Header.decode(file.pread(offset, HEADER_SIZE), offset=offset)
        except CorruptDiskError as error:
            trouble = error
            continue
        if best is None or header.sequence_number > best[1].sequence_number:
            best = slot, header
    if best is None:
        raise CorruptDiskError("neither header is valid", path=str(file.path)) from trouble
    return best
