"""A partition as the Windows part of a conversion sees it: where it lies, what the GPT says of it, its file system."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from conversion.device import Slice
from conversion.errors import ConversionError
from conversion.filesystems.filesystem import Entry, FileSystem

ESP: Final = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
MSR: Final = uuid.UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae")
BASIC_DATA: Final = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
RECOVERY: Final = uuid.UUID("de94bba4-06d1-4d40-a16a-bfd50179d6ac")
LDM_METADATA: Final = uuid.UUID("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3")
LDM_DATA: Final = uuid.UUID("af9b60a0-1431-4f62-bc68-3311714a69ad")
STORAGE_SPACES: Final = uuid.UUID("e75caf8f-f680-4cee-afa3-b001e56efc2d")


@dataclass(frozen=True, slots=True)
class Volume:
    """One partition. ``number`` is its place in the partition table, from 1; ``device`` its bytes on the disk."""

    number: int
    device: Slice
    type_guid: uuid.UUID
    partition_guid: uuid.UUID
    filesystem: FileSystem | None

    @property
    def title(self) -> str:
        """Its name in findings."""
        return f"partition {self.number}"

    def has(self, path: str) -> bool:
        """Return whether a file of that name stands in its folder; not where the folder cannot be read."""
        return self.size_of(path) is not None

    def size_of(self, path: str) -> int | None:
        """Return a file's size in bytes; None where there is no such file or its folder cannot be read."""
        folder, _, name = path.rpartition("/")
        entries: tuple[Entry, ...] | None = None
        if self.filesystem is not None:
            with suppress(ConversionError):
                entries = self.filesystem.list_folder(folder)
        return next(
            (one.size for one in entries or () if one.kind == "file" and one.name.lower() == name.lower()), None
        )
