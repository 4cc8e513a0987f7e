"""What partition tables, file systems and boot loaders are read from and written to: a block device."""

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


class WritableDevice(BlockDevice, Protocol):
    """A block device that takes writes."""

    def write_at(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``; durable after ``flush``."""

    def flush(self) -> None:
        """Return once what was written is durable."""


class Slice:
    """The bytes [start, start + size) of a device, as a device: a partition."""

    def __init__(self, device: WritableDevice | BlockDevice, start: int, size: int) -> None:
        self._device = device
        self._start = start
        self._size = size

    @property
    def start(self) -> int:
        """Where it begins on the device below, bytes."""
        return self._start

    @property
    def size(self) -> int:
        """Length, bytes."""
        return self._size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._device.sector_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Raises ValueError outside the slice."""
        self._check(offset, length)
        return self._device.read_at(self._start + offset, length)

    def write_at(self, offset: int, data: bytes) -> None:
        """Write through to the device below. Raises ValueError outside the slice, TypeError where it is read-only."""
        self._check(offset, len(data))
        self._writable().write_at(self._start + offset, data)

    def flush(self) -> None:
        """Flush the device below."""
        self._writable().flush()

    def _writable(self) -> WritableDevice:
        if not hasattr(self._device, "write_at"):
            raise TypeError("the device below takes no writes")
        return self._device  # type: ignore[return-value]

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"{length} bytes at {offset} reach outside a slice of {self._size} bytes")
