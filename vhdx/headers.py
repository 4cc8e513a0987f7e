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

from vhdx.image import HeaderChoice
from vhdx.osfile import File
from vhdx.structures import HEADER_OFFSETS, ZERO_GUID, Header

GuidFactory: TypeAlias = Callable[[], UUID]
OnUpdate: TypeAlias = Callable[[HeaderChoice], None]


class HeaderPair:
    """Both headers of a file that is open for writing. ``on_update`` is told of each that comes into force."""

    def __init__(
        self, file: File, choice: HeaderChoice, new_guid: GuidFactory, on_update: OnUpdate | None = None
    ) -> None:
        self._file = file
        self._new_guid = new_guid
        self._on_update = on_update
        self._file_guid_is_new = False
        self._data_guid_is_new = False
        self.choice = choice

    @property
    def current(self) -> Header:
        """The header in force."""
        return self.choice.header

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
            slot = 1 - self.choice.slot
            self._file.pwrite(HEADER_OFFSETS[slot], header.encode())
            self._file.fsync()
            self.choice = HeaderChoice(header, slot, (None, None))
            if self._on_update is not None:
                self._on_update(self.choice)
