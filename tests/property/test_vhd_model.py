from __future__ import annotations

import random
import tempfile
from pathlib import Path
from uuid import UUID

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.vhd_files import write_child
from vhdx.errors import DiskError
from vhdx.vhd import SparseVhdDisk, open_vhd
from vhdx.vhd_create import create_dynamic, create_fixed

SIZE = 1 << 20  # a whole MiB, so that fixed disks have it too
SECTOR = 512

writes = st.tuples(st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 40000), st.integers(0, 255))
trims = st.tuples(st.just("trim"), st.integers(0, SIZE - 1), st.integers(1, 100000), st.just(0))
others = st.sampled_from([("flush", 0, 0, 0), ("reopen", 0, 0, 0)])
steps = st.lists(st.one_of(writes, trims, others), max_size=14)


@given(
    kind=st.sampled_from(["fixed", "dynamic", "child"]), block_size=st.sampled_from([4096, 65536, 2 << 20]), steps=steps
)
@settings(max_examples=60, deadline=None)
def test_a_disk_behaves_like_an_array_of_bytes(
    kind: str, block_size: int, steps: list[tuple[str, int, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.vhd"
        model = bytearray(SIZE)
        if kind == "fixed":
            create_fixed(path, SIZE)
        elif kind == "dynamic":
            create_dynamic(path, SIZE, block_size=block_size)
        else:
            model = make_child(path, block_size)
        disk = open_vhd(path, writable=True)
        for step, offset, length, seed in steps:
            length = min(length, SIZE - offset)
            if step == "write":
                data = random.Random(seed).randbytes(length)
                disk.write_at(offset, data)
                model[offset : offset + length] = data
            elif step == "trim":
                disk.trim(offset, length)
                model[offset : offset + length] = bytes(length)
            elif step == "flush":
                disk.flush()
            else:
                disk.close()
                disk = open_vhd(path, writable=True)
            assert disk.read_at(offset, length) == model[offset : offset + length]
        disk.close()
        with open_vhd(path) as reader:
            assert reader.read_at(0, SIZE) == model
            covered = np.zeros(SIZE, dtype=bool)
            for window in reader.allocated():
                assert (window[:, 0] < window[:, 1]).all() and (window[1:, 0] > window[:-1, 1]).all()
                for start, end in window.tolist():
                    covered[start:end] = True
            assert not np.frombuffer(bytes(model), dtype=np.uint8)[~covered].any()


def make_child(path: Path, block_size: int) -> bytearray:
    base = path.with_name("base.vhd")
    create_dynamic(base, SIZE, block_size=65536, identifier=UUID(int=1))
    model = bytearray(SIZE)
    with open_vhd(base, writable=True) as disk:
        for offset in (0, 300_000, 700_001):
            data = random.Random(offset).randbytes(50_000)
            disk.write_at(offset, data)
            model[offset : offset + len(data)] = data
    sectors = {number: random.Random(number).randbytes(SECTOR) for number in (0, 7, 8, 600, 601, 2047)}
    for number, data in sectors.items():
        model[number * SECTOR : (number + 1) * SECTOR] = data
    write_child(path, size=SIZE, parent=UUID(int=1), sectors=sectors, relative="base.vhd", block_size=block_size)
    return model


def sample_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.vhd"
        create_dynamic(path, SIZE, block_size=65536, identifier=UUID(int=5))
        with open_vhd(path, writable=True) as disk:
            disk.write_at(100_000, b"x" * 70_000)
        return path.read_bytes()


SAMPLE = sample_bytes()
METADATA = 1536 + 512


@given(
    flips=st.lists(st.tuples(st.integers(0, METADATA - 1), st.integers(0, 255)), max_size=4),
    tail=st.lists(st.tuples(st.integers(1, 512), st.integers(0, 255)), max_size=2),
    length=st.one_of(st.none(), st.integers(0, len(SAMPLE))),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_gives_our_errors_and_nothing_else(
    flips: list[tuple[int, int]], tail: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(SAMPLE)
    for position, value in flips:
        data[position] ^= value
    for position, value in tail:
        data[-position] ^= value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.vhd"
        path.write_bytes(data[:length])
        for writable in (False, True):
            try:
                with open_vhd(path, writable=writable) as disk:
                    list(disk.allocated())
                    if isinstance(disk, SparseVhdDisk):
                        list(disk.changed())
                    disk.read_at(0, min(disk.size, SIZE))
                    if writable:
                        disk.write_at(0, b"z" * 1000)
            except DiskError as error:
                assert str(error)
