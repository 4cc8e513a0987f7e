"""Block devices that count what is read and remember what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class MemoryDevice:
    """A writable device in memory that remembers its writes and how much was read."""

    content: bytearray
    sector_size: int = 512
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    read_bytes: int = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def read_at(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.content)
        self.read_bytes += length
        return bytes(self.content[offset : offset + length])

    def write_at(self, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= len(self.content)
        self.writes.append((offset, bytes(data)))
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass


class FileDevice:
    """A sparse file as a device that is only read, and counts it."""

    sector_size = 512

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size
        self.read_bytes = 0

    def read_at(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        self.read_bytes += length
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
