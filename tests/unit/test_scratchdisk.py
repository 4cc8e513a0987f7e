"""A writable disk over one that is not: reads as a copy that was written to, and the disk below stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.scratchdisk import GRANULE_BYTES, ScratchDisk
from vhdx.errors import OutOfRangeError
from vhdx.raw import RawDisk

SIZE = 5 * GRANULE_BYTES + 512


def _below(folder: Path) -> RawDisk:
    path = folder / "below.raw"
    if not path.exists():
        path.write_bytes(b"".join(bytes([number % 251]) * 512 for number in range(2 * GRANULE_BYTES // 512)))
        with path.open("r+b") as file:
            file.truncate(SIZE)
    return RawDisk.open(path)


@settings(max_examples=60, deadline=None)
@given(
    writes=st.lists(
        st.tuples(st.booleans(), st.integers(0, SIZE - 1), st.integers(1, 3 * GRANULE_BYTES), st.integers(1, 255)),
        max_size=8,
    )
)
def test_it_reads_as_a_copy_that_was_written_to(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[bool, int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("scratch")
    with _below(folder) as below, ScratchDisk(below, folder) as disk:
        model = bytearray(below.read_at(0, SIZE))
        original = bytes(model)
        for trims, offset, length, fill in writes:
            length = min(length, SIZE - offset)
            data = bytes(length) if trims else bytes([fill]) * length
            if trims:
                disk.trim(offset, length)
            else:
                disk.write_at(offset, data)
            model[offset : offset + length] = data
        assert disk.read_at(0, SIZE) == bytes(model)
        held = np.zeros(SIZE, bool)
        for extents in disk.allocated():
            for start, end in extents.tolist():
                held[start:end] = True
        assert not np.any(np.frombuffer(bytes(model), np.uint8)[~held])
        assert below.read_at(0, SIZE) == original
    assert [path.name for path in folder.iterdir()] == ["below.raw"]


def test_ranges_outside_are_refused(tmp_path: Path) -> None:
    with _below(tmp_path) as below, ScratchDisk(below, tmp_path) as disk:
        for offset, length in ((-1, 2), (SIZE - 1, 2)):
            with pytest.raises(OutOfRangeError):
                disk.read_at(offset, length)
            with pytest.raises(OutOfRangeError):
                disk.write_at(offset, bytes(length))
