"""Seeded disk content: the same bytes for the same seed, of a mixture like a server's disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vhdx.osfile import open_file
from vhdx.target import create_target

MIB = 1 << 20
BLOCK = 65536
PIECE = 4096


class Content:
    """Makes MiBs of content: a quarter noise, half text that zstd makes about three times smaller, a quarter zeros."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
        weights = np.linspace(3, 0.1, len(letters))
        words = [
            self._rng.choice(letters, int(self._rng.integers(2, 11)), p=weights / weights.sum()).tobytes() + b" "
            for _ in range(4096)
        ]
        ranks = np.minimum(self._rng.zipf(1.3, 4 * MIB) - 1, len(words) - 1)
        text = b"".join([words[rank] for rank in ranks.tolist()])
        self._pieces = np.frombuffer(text[: len(text) // PIECE * PIECE], np.uint8).reshape(-1, PIECE)

    def noise(self, size: int) -> bytes:
        """Return bytes that nothing compresses."""
        return self._rng.bytes(size)

    def text(self, size: int) -> bytes:
        """Return text, never twice the same 64 KiB."""
        return self._pieces[self._rng.integers(0, len(self._pieces), size // PIECE)].tobytes()

    def mixed(self, number: int) -> bytes | None:
        """Return the MiB of that number in a disk; None for zeros."""
        kind = number % 4
        return None if kind == 3 else self.noise(MIB) if kind == 0 else self.text(MIB)


def make_raw(path: Path, size_mib: int, seed: int) -> None:
    """Make a raw image with zeros written, not left out."""
    content = Content(seed)
    with path.open("wb") as file:
        for number in range(size_mib):
            file.write(content.mixed(number) or bytes(MIB))


def make_vhdx(path: Path, *, virtual_size: int, data_mib: int, seed: int) -> None:
    """Make a dynamic VHDX that holds ``data_mib`` of text and noise in 32 MiB runs spread evenly over the disk."""
    content = Content(seed)
    runs = max(1, data_mib // 32)
    stride = virtual_size // runs // (32 * MIB) * (32 * MIB)
    with create_target(path, "vhdx", virtual_size) as target:
        for number in range(data_mib):
            offset = number // 32 * stride + number % 32 * MIB
            target.write_at(offset, content.noise(MIB) if number % 2 else content.text(MIB))
        target.commit()


def change_blocks(path: Path, share: float, seed: int) -> int:
    """Overwrite that share of a raw image's blocks, chosen at random, with noise; return how many."""
    rng = np.random.default_rng(seed)
    file = open_file(path, writable=True)
    try:
        blocks = file.size() // BLOCK
        chosen = rng.choice(blocks, max(1, int(blocks * share)), replace=False)
        for block in chosen.tolist():
            file.pwrite(block * BLOCK, rng.bytes(BLOCK))
    finally:
        file.close()
    return len(chosen)
