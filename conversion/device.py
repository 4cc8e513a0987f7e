"""What partition tables and boot loaders are read from: a block device, whatever holds it."""

from __future__ import annotations

from typing import Protocol


class BlockDevice(Protocol):
    """Bytes by offset. A disk image, an overlay over one and a view of a recovery point all are one."""

    @property
    def size(self) -> int:
        """Length, bytes."""

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
