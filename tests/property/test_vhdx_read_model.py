"""Reading and mapping VHDX chains against a naive model: for every sector, who has it and what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.vhdx_builder import Block, ImageBuilder, parent_of
from vhdx import maps
from vhdx.chain import open_vhdx
from vhdx.disk import Extents
from vhdx.structures import MIB, PayloadState
from vhdx.vhdx import VhdxDisk

CLEAR, ZERO, DATA = 0, 1, 2
BASE_STATES = [PayloadState.NOT_PRESENT, PayloadState.UNDEFINED, PayloadState.ZERO, PayloadState.UNMAPPED]


class Link:
    """One file of a chain: what it was built from, and per sector of its disk what it says.

    No dataclass: those are printed field by field when an example fails, which here is megabytes.
    """

    def __init__(self, builder: ImageBuilder, kinds: np.ndarray, content: np.ndarray) -> None:
        self.builder = builder
        self.kinds = kinds
        self.content = content  # bytes of the disk, meaningful where kinds is DATA

    def __repr__(self) -> str:
        states = {number: block.state.name for number, block in self.builder.blocks.items()}
        return f"Link({self.builder.size}, {self.builder.block_size}, {self.builder.sector_size}, {states})"


@st.composite
def sector_patterns(draw: st.DrawFn, count: int) -> np.ndarray:
    kind = draw(st.sampled_from(["alternating", "random", "runs", "none", "all"]))
    if kind == "alternating":
        return np.arange(count) % 2 == draw(st.integers(0, 1))
    if kind == "random":
        return np.random.default_rng(draw(st.integers(0, 99))).random(count) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    flags = np.full(count, kind == "all")
    if kind == "runs":
        for _ in range(draw(st.integers(1, 5))):
            start = draw(st.integers(0, count - 1))
            flags[start : start + draw(st.integers(1, count))] ^= True
    return flags


@st.composite
def links(draw: st.DrawFn, sector_size: int, has_parent: bool, number: int) -> Link:
    block_size = draw(st.sampled_from([MIB, 2 * MIB]))
    # A wide integer strategy is fond of small numbers: most disks would have one block.
    size = draw(st.sampled_from(range(1, 7))) * MIB - draw(st.sampled_from([0, 0, 1, 100, 200])) * sector_size
    builder = ImageBuilder(size, block_size, sector_size, data_write_guid=UUID(int=number + 1))
    if has_parent:
        builder.parent_values = parent_of(UUID(int=number), f".\\link{number - 1}.vhdx")
    per_block = block_size // sector_size
    block_count = -(-size // block_size)
    kinds = np.zeros(block_count * per_block, dtype=np.uint8)
    content = np.zeros(block_count * block_size, dtype=np.uint8)
    states = [*BASE_STATES, PayloadState.FULLY_PRESENT, PayloadState.FULLY_PRESENT]
    if has_parent:
        states += [PayloadState.PARTIALLY_PRESENT] * 3
    for block in range(block_count):
        state = draw(st.sampled_from(states))
        area, sectors = (
            slice(block * block_size, (block + 1) * block_size),
            slice(block * per_block, (block + 1) * per_block),
        )
        if state in (PayloadState.NOT_PRESENT, *BASE_STATES):
            kinds[sectors] = CLEAR if state == PayloadState.NOT_PRESENT else ZERO
            builder.blocks[block] = Block(state)
            continue
        content[area] = np.random.default_rng(number * 100 + block).integers(1, 255, block_size, dtype=np.uint8)
        flags = np.ones(per_block, dtype=bool)
        if state == PayloadState.PARTIALLY_PRESENT:
            flags = draw(sector_patterns(per_block))
        kinds[sectors] = np.where(flags, DATA, CLEAR)
        own = flags.tolist() if state == PayloadState.PARTIALLY_PRESENT else ()
        builder.blocks[block] = Block(state, content[area].tobytes(), own)
    return Link(builder, kinds[: size // sector_size], content[:size])


@st.composite
def chains(draw: st.DrawFn) -> list[Link]:
    """Return a chain, base first."""
    sector_size = draw(st.sampled_from([512, 4096]))
    return [draw(links(sector_size, number > 0, number)) for number in range(draw(st.sampled_from([1, 2, 2, 3, 3])))]


def expected(chain: list[Link]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of the last link's disk, and whether each of its sectors is anybody's data."""
    sector_size = chain[0].builder.sector_size
    content, allocated = np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=bool)
    for link in chain:
        count = len(link.kinds)
        below = np.zeros(count * sector_size, dtype=np.uint8)
        below[: len(content)] = content[: len(below)]
        below_allocated = np.zeros(count, dtype=bool)
        below_allocated[: len(allocated)] = allocated[:count]
        by_byte = np.repeat(link.kinds, sector_size)
        content = np.where(by_byte == DATA, link.content, np.where(by_byte == ZERO, np.uint8(0), below))
        allocated = np.where(link.kinds == CLEAR, below_allocated, link.kinds == DATA)
    return content, allocated


def sectors_of(windows: Iterable[Extents], size: int, sector_size: int) -> np.ndarray:
    """Return which sectors the extents cover, after seeing that they keep their contract."""
    flags = np.zeros(size // sector_size, dtype=bool)
    reached = 0
    for extents in windows:
        assert len(extents) and extents.dtype == np.int64
        assert (extents[:, 0] < extents[:, 1]).all()
        assert (extents[1:, 0] > extents[:-1, 1]).all()
        assert extents[0, 0] >= reached
        reached = int(extents[-1, 1])
        for start, end in extents.tolist():
            assert start % sector_size == end % sector_size == 0
            flags[start // sector_size : end // sector_size] = True
    return flags


def opened(folder: Path, chain: list[Link]) -> VhdxDisk:
    for number, link in enumerate(chain):
        link.builder.write(folder / f"link{number}.vhdx")
    return open_vhdx(folder / f"link{len(chain) - 1}.vhdx")


# Examples are megabytes of files: shrinking one takes minutes, and its printed blocks say enough.
@settings(
    deadline=None,
    max_examples=150,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(chain=chains(), data=st.data())
def test_a_chain_reads_and_maps_as_the_model_says(
    tmp_path_factory: pytest.TempPathFactory, chain: list[Link], data: st.DataObject
) -> None:
    with opened(tmp_path_factory.mktemp("chain"), chain) as disk, pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(maps, "WINDOW_UNITS", data.draw(st.integers(1, 3)))
            patch.setattr(maps, "WINDOW_SECTORS", data.draw(st.sampled_from([1, 4096, 8192])))
        content, allocated = expected(chain)
        size, sector_size = disk.size, disk.sector_size
        assert disk.read_at(0, size) == content.tobytes()
        for _ in range(5):
            start = data.draw(st.integers(0, size))
            end = data.draw(st.integers(start, min(size, start + 70000)))
            assert disk.read_at(start, end - start) == content[start:end].tobytes()
        assert (sectors_of(disk.allocated(), size, sector_size) == allocated).all()
        top = chain[-1].kinds
        changed = top != CLEAR if len(chain) > 1 else top == DATA
        assert (sectors_of(disk.changed(), size, sector_size) == changed).all()
        assert (sectors_of(disk.stored(), size, sector_size) == (top == DATA)).all()
        if len(chain) > 1:
            since = np.zeros(len(top), dtype=bool)
            for link in chain[1:]:
                count = min(len(top), len(link.kinds))
                since[:count] |= link.kinds[:count] != CLEAR
            base = disk.chain[-1]
            found = sectors_of(disk.changed_since(base), size, sector_size)
            assert (found == sectors_of(disk.changed_since(base.path), size, sector_size)).all()
            assert found[since].all()
            before = np.frombuffer(base.read_at(0, min(size, base.size)), dtype=np.uint8).reshape(-1, sector_size)
            after = content[: before.size].reshape(-1, sector_size)
            assert found[: len(before)][(before != after).any(axis=1)].all()
            if all(link.builder.size >= base.size for link in chain):
                assert (found == since).all()
        for _ in range(6):
            low = data.draw(st.sampled_from(range(0, size, MIB // 2))) // sector_size + data.draw(st.integers(0, 3))
            low = min(low, size // sector_size)
            high = data.draw(st.integers(low, size // sector_size))
            part = sectors_of(disk.allocated(low * sector_size, high * sector_size), size, sector_size)
            assert (part[low:high] == allocated[low:high]).all()
            assert not part[:low].any() and not part[high:].any()


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_chunks_and_their_bitmaps_are_kept_apart(tmp_path: Path, sector_size: int) -> None:
    ratio = 8 * MIB * sector_size // MIB
    spots = (0, ratio - 1, ratio, 2 * ratio - 1, 2 * ratio)
    size = (2 * ratio + 1) * MIB
    per_block = MIB // sector_size
    ImageBuilder(size, 32 * MIB, sector_size, data_write_guid=UUID(int=1)).write(tmp_path / "base.vhdx")
    child = ImageBuilder(size, MIB, sector_size, parent_values=parent_of(UUID(int=1), "base.vhdx"))
    for spot in spots:
        flags = [index % 5 == spot % 5 for index in range(per_block)]
        child.blocks[spot] = Block(PayloadState.PARTIALLY_PRESENT, bytes([spot % 250 + 1]) * MIB, flags)
    with open_vhdx(child.write(tmp_path / "child.vhdx")) as disk:
        wanted = []
        for spot in spots:
            data = disk.read_at(spot * MIB, MIB)
            for index in range(per_block):
                own = index % 5 == spot % 5
                assert data[index * sector_size] == (spot % 250 + 1 if own else 0)
                if own:
                    start = spot * MIB + index * sector_size
                    wanted.append((start, start + sector_size))
        found = [tuple(extent) for extents in disk.allocated() for extent in extents.tolist()]
        assert found == wanted
        across = disk.read_at((ratio - 1) * MIB, 2 * MIB)
        assert across == disk.read_at((ratio - 1) * MIB, MIB) + disk.read_at(ratio * MIB, MIB)
