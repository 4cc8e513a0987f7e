"""The disks of a VM under soak: raw files, or checkpoint chains, that are written to, checkpointed, merged."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.support.engine import BLOCK, random_blocks
from vhdx.create import create_disk
from vhdx.formats import open_disk
from vhdx.merge import merge_into_parent

MIB = 1 << 20
MOST_BLOCKS = 10
DISKS = 2


class SoakDisks:
    """Two disks in a folder. No two changes at one time, however coarse the file system's times are."""

    def __init__(self, draw: random.Random, folder: Path) -> None:
        self.draw = draw
        self.folder = folder
        self._stamp_ns = 1_000_000_000

    @property
    def paths(self) -> list[Path]:
        """The files to be protected now."""
        raise NotImplementedError

    def change(self) -> bool:
        """Change a disk somehow; return whether the files to be protected are others now."""
        raise NotImplementedError

    def _data(self, offset: int, size: int) -> bytes:
        """Return what is to be written at an offset: zeros, or one of few blocks, so that content comes again."""
        if self.draw.random() < 0.3:
            return bytes(min(size - offset, self.draw.randint(1, 4 * BLOCK)))
        data = random_blocks(self.draw.randrange(40), 2)
        return data[: min(size - offset, self.draw.randint(1, 2 * BLOCK))]

    def _stamp(self, path: Path) -> None:
        self._stamp_ns += 1_000_000_000
        os.utime(path, ns=(self._stamp_ns, self._stamp_ns))


class RawDisks(SoakDisks):
    """Raw files, which also are cut and grown."""

    def __init__(self, draw: random.Random, folder: Path) -> None:
        super().__init__(draw, folder)
        self._paths = [folder / f"disk{number}.img" for number in range(DISKS)]
        for path in self._paths:
            path.write_bytes(random_blocks(draw.randrange(1000), draw.randint(1, MOST_BLOCKS)))

    @property
    def paths(self) -> list[Path]:
        return list(self._paths)

    def change(self) -> bool:
        path = self.draw.choice(self._paths)
        size = path.stat().st_size
        with path.open("r+b") as file:
            if self.draw.random() < 0.1:
                file.truncate(512 * self.draw.randint(1, MOST_BLOCKS * BLOCK // 512))
            else:
                offset = self.draw.randrange(size)
                file.seek(offset)
                file.write(self._data(offset, size))
        self._stamp(path)
        return False


class ChainDisks(SoakDisks):
    """VHDX files with children above them, as a hypervisor's checkpoints make and merge them."""

    def __init__(self, draw: random.Random, folder: Path) -> None:
        super().__init__(draw, folder)
        self._chains: list[list[Path]] = []
        self._made = 0
        for number in range(DISKS):
            base = folder / f"base{number}.vhdx"
            create_disk(base, size=MIB, kind="dynamic", block_size=MIB)
            self._chains.append([base])
            self._write(base)

    @property
    def paths(self) -> list[Path]:
        return [chain[-1] for chain in self._chains]

    def change(self) -> bool:
        chain = self.draw.choice(self._chains)
        event = self.draw.random()
        if event < 0.15:
            self._made += 1
            child = self.folder / f"child{self._made}.avhdx"
            create_disk(child, kind="differencing", parent=chain[-1])
            chain.append(child)
            self._stamp(child)
            return True
        if event < 0.25 and len(chain) > 1:
            top = chain.pop()
            merge_into_parent(top)
            self._stamp(chain[-1])
            return True
        self._write(chain[-1])
        return False

    def _write(self, path: Path) -> None:
        with open_disk(path, writable=True) as disk:
            sector = disk.sector_size
            offset = self.draw.randrange(disk.size // sector) * sector
            data = self._data(offset, disk.size)
            disk.write_at(offset, data + bytes(-len(data) % sector))
        self._stamp(path)
