"""The BAT: its arithmetic against counting by hand, and entries by page and range against a plain array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhdx import bat as bat_module
from vhdx.bat import Bat, Geometry
from vhdx.errors import CorruptDiskError
from vhdx.osfile import open_file
from vhdx.structures import MIB, TIB

SIZES = st.sampled_from([1, 2, 4, 32, 256]).map(lambda mib: mib * MIB)


def counted(geometry: Geometry) -> list[tuple[str, int]]:
    """Write the table down entry by entry: ratio payload entries, then a bitmap entry."""
    entries: list[tuple[str, int]] = []
    ratio = 2**23 * geometry.sector_size // geometry.block_size
    blocks = (geometry.virtual_size + geometry.block_size - 1) // geometry.block_size
    for block in range(blocks):
        entries.append(("payload", block))
        if (block + 1) % ratio == 0:
            entries.append(("bitmap", block // ratio))
    if geometry.has_parent:
        while entries and entries[-1][0] != "bitmap":
            block = len(entries)
            entries.append(
                ("bitmap", (blocks - 1) // ratio) if (len(entries) + 1) % (ratio + 1) == 0 else ("none", block)
            )
    elif entries and entries[-1][0] == "bitmap":
        entries.pop()
    return entries


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40000), SIZES, st.sampled_from([512, 4096]), st.booleans())
def test_geometry_agrees_with_counting(blocks: int, block_size: int, sector_size: int, has_parent: bool) -> None:
    geometry = Geometry(blocks * block_size, block_size, sector_size, has_parent)
    entries = counted(geometry)
    assert geometry.entry_count == len(entries)
    for index, (kind, number) in enumerate(entries):
        if kind == "payload":
            assert geometry.payload_index(number) == index
        elif kind == "bitmap":
            assert geometry.bitmap_index(number) == index


def test_the_largest_disk_has_the_table_that_the_specification_computes() -> None:
    geometry = Geometry(64 * TIB, MIB, 512, has_parent=True)
    assert geometry.chunk_ratio == 4096
    assert geometry.entry_count == 16384 * 4097


@pytest.fixture
def bat(tmp_path: Path) -> tuple[Bat, np.ndarray]:
    geometry = Geometry(32768 * 8 * MIB, 8 * MIB, 512, has_parent=True)  # 32768 blocks, 64 chunks of 512
    entries = np.random.default_rng(1).integers(0, 2**63, geometry.entry_count, dtype=np.uint64)
    path = tmp_path / "bat"
    path.write_bytes(b"\0" * MIB + entries.astype("<u8").tobytes().ljust(MIB, b"\0"))
    return Bat(open_file(path), geometry, MIB), entries


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_ranges_and_changes_agree_with_an_array(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    geometry = Geometry(32768 * 8 * MIB, 8 * MIB, 512, has_parent=True)
    path = tmp_path_factory.getbasetemp() / "bat-property"
    entries = np.random.default_rng(2).integers(0, 2**63, geometry.entry_count, dtype=np.uint64)
    if not path.exists():
        path.write_bytes(entries.astype("<u8").tobytes().ljust(MIB, b"\0"))
    table = Bat(open_file(path), geometry, 0)
    for _ in range(data.draw(st.integers(0, 5))):
        index, value = data.draw(st.integers(0, len(entries) - 1)), data.draw(st.integers(0, 2**64 - 1))
        table.set_entry(index, value)
        entries[index] = value
        assert table.entry(index) == value
        offset, sector = table.sector(index)
        first = offset // 8
        assert sector == entries[first : first + 512].astype("<u8").tobytes().ljust(4096, b"\0")
    first = data.draw(st.integers(0, geometry.block_count - 1))
    last = data.draw(st.integers(first, geometry.block_count))
    wanted = [int(entries[geometry.payload_index(block)]) for block in range(first, last)]
    assert table.payload_entries(first, last).tolist() == wanted
    assert table.payload_states(first, last).tolist() == [entry & 7 for entry in wanted]
    start, end = geometry.payload_index(first), geometry.payload_index(last)
    assert table.get_range(start, end).tolist() == entries[start:end].tolist()


def test_changed_pages_outlive_the_cache_until_released(
    bat: tuple[Bat, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bat_module, "MAX_CLEAN_PAGES", 1)
    table, entries = bat
    table.set_entry(3, 42)
    table.entry(9000), table.entry(17000), table.entry(25000)
    assert table.entry(3) == 42
    table.release()
    table.entry(9000), table.entry(17000)
    assert table.entry(3) == int(entries[3])


def test_a_file_that_ends_inside_the_table_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"\0" * 70000)
    table = Bat(open_file(path), Geometry(8192 * 4 * MIB, MIB, 512, has_parent=False), 0)
    assert table.entry(0) == 0
    with pytest.raises(CorruptDiskError, match="ends inside the block allocation table"):
        table.entry(8192)
    with pytest.raises(CorruptDiskError, match="ends inside"):
        table.get_range(0, 30000)
