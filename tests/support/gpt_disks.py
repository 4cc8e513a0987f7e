"""Disks with a GUID partition table for tests: sparse in memory, and as files for sfdisk and sgdisk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from conversion.gpt import Gpt, GptHeader, GptPartition, decode_entries
from conversion.gpt_copies import read_copies, write_gpt
from conversion.layout import Layout, write_places, write_switch
from conversion.layout_planner import plan_layout
from conversion.partition_types import System
from conversion.saved_table import SavedTable, save_table

DISK = UUID("11111111-2222-3333-4444-555555555555")
BOOT_CODE = bytes(range(1, 200))
CHUNK = 4096


class SparseDisk:
    """A disk in memory that keeps what is not zero, and the order of what was written since the last flush."""

    def __init__(self, size: int, sector_size: int = 512) -> None:
        self.size = size
        self.sector_size = sector_size
        self.chunks: dict[int, bytes] = {}
        self.log: list[tuple[int, bytes] | None] = []  # None is a flush

    def copy(self) -> SparseDisk:
        other = SparseDisk(self.size, self.sector_size)
        other.chunks = dict(self.chunks)
        return other

    def content(self) -> dict[int, bytes]:
        return {at: data for at, data in self.chunks.items() if data.strip(b"\0")}

    def read_at(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, (offset, length, self.size)
        first, end = offset // CHUNK, -(-(offset + length) // CHUNK)
        joined = b"".join(self.chunks.get(at, bytes(CHUNK)) for at in range(first, end))
        return joined[offset - first * CHUNK :][:length]

    def write_at(self, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= self.size, (offset, len(data), self.size)
        self.log.append((offset, bytes(data)))
        if not data:
            return
        first, end = offset // CHUNK, -(-(offset + len(data)) // CHUNK)
        joined = bytearray(b"".join(self.chunks.get(at, bytes(CHUNK)) for at in range(first, end)))
        joined[offset - first * CHUNK : offset - first * CHUNK + len(data)] = data
        for at in range(first, end):
            self.chunks[at] = bytes(joined[(at - first) * CHUNK : (at - first + 1) * CHUNK])

    def flush(self) -> None:
        self.log.append(None)

    def to_file(self, path: Path) -> Path:
        with path.open("wb") as file:
            file.truncate(self.size)
            for at, data in sorted(self.content().items()):
                file.seek(at * CHUNK)
                file.write(data[: self.size - at * CHUNK])
        return path

    @classmethod
    def from_file(cls, path: Path) -> SparseDisk:
        disk = cls(path.stat().st_size)
        with path.open("rb") as file:
            position = 0
            while position < disk.size:
                try:
                    start = os.lseek(file.fileno(), position, os.SEEK_DATA)
                except OSError:  # nothing but a hole up to the end
                    break
                position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                first = start // CHUNK
                file.seek(first * CHUNK)
                data = file.read(position - first * CHUNK)
                for at in range(-(-len(data) // CHUNK)):
                    disk.chunks[first + at] = data[at * CHUNK : (at + 1) * CHUNK].ljust(CHUNK, b"\0")
        return disk


def make_table(
    partitions: Sequence[tuple[int, UUID, int, int]],
    *,
    sectors: int,
    entry_count: int = 128,
    entry_size: int = 128,
    first_usable_lba: int | None = None,
) -> Gpt:
    """Return a table of (number, type, first LBA, end LBA)."""
    header = GptHeader(0x10000, 92, 0, 1, sectors - 1, 0, 0, DISK, 2, entry_count, entry_size, bytes(512 - 92))
    usable = header.entries_end_lba if first_usable_lba is None else first_usable_lba
    header = replace(header, first_usable_lba=usable, last_usable_lba=sectors - 2 - header.entries_sectors)
    entries = bytes(entry_count * entry_size)
    table = Gpt(DISK, decode_entries(entries, entry_size), False, header, entries)
    for number, kind, first, end in partitions:
        guid = UUID(int=(0xABCDEF << 96) + number)
        table = table.with_entry(GptPartition(number, kind, guid, first, end, number % 16 << 60, f"Teil {number} ü"))
    return table


def make_disk(table: Gpt, sectors: int) -> SparseDisk:
    """Return a disk with the table, and something in the first sector of every partition."""
    disk = SparseDisk(sectors * 512)
    write_gpt(disk, table, boot_code=b"\x90old code")
    for one in table.partitions:
        disk.write_at(one.first_lba * 512, f"partition {one.number}".encode())
        disk.write_at(one.end_lba * 512 - 8, b"the end.")
    disk.log.clear()
    return disk


def convert(
    disk: SparseDisk, *, boot: int, system: System = "linux", core: bytes = b"core" * 1000
) -> tuple[Layout, SavedTable]:
    """Plan and write the layout of a disk, and return it and what the way back needs."""
    copies = read_copies(disk)
    assert copies is not None
    layout = plan_layout(
        copies.table,
        sectors=copies.sectors,
        sector_size=disk.sector_size,
        system=system,
        boot_partition=boot,
        core_sectors=-(-len(core) // 512),
    ).require()
    saved = save_table(disk, copies, layout, system=system, boot_code=BOOT_CODE, core=core)
    write_places(disk, layout, core=core)
    write_switch(disk, layout, boot_code=BOOT_CODE)
    return layout, saved


def run(*command: str, script: str | None = None) -> str:
    """Run a program and return what it printed; it must succeed."""
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr
