"""Replication of checkpoint chains: what changed is told by the files themselves, and doubted where it should be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from replica import catalog, cycle, protection
from replica.catalog import ProtectedVm
from replica.model import Point
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, make_host, random_blocks, restore_disk
from vhdx.create import create_disk
from vhdx.formats import open_disk
from vhdx.merge import merge_into_parent
from vhdx.resize import resize_disk

MIB = 1 << 20
SIZE = 64 * MIB


class Chain:
    """A VM of one VHDX in a folder, under replication."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.top = folder / "base.vhdx"
        create_disk(self.top, size=SIZE, kind="dynamic", block_size=2 * MIB)
        self.write(3 * MIB, random_blocks(1, 40))
        self.store = MemoryStore("chain")
        self.host = make_host(folder / "state")
        catalog.init_store(self.store, self.host)
        self.vm: ProtectedVm
        self.vm, _ = protection.protect(self.store, self.host, tenant="default", name="vm", disks=[self.top])

    def write(self, offset: int, data: bytes) -> None:
        with open_disk(self.top, writable=True) as disk:
            disk.write_at(offset, data)

    def trim(self, offset: int, length: int) -> None:
        with open_disk(self.top, writable=True) as disk:
            disk.trim(offset, length)

    def checkpoint(self, name: str) -> None:
        """Put a child above the top, as a hypervisor's checkpoint does, and protect the VM by it."""
        child = self.folder / f"{name}.avhdx"
        create_disk(child, kind="differencing", parent=self.top)
        self.top = child
        self.follow()

    def follow(self) -> None:
        protection.update(self.store, self.host, self.vm, disks=[self.top])

    def replicate(self, *, rescan: bool = False) -> Point:
        """Make a point, and check that it restores to what the chain reads as."""
        point = cycle.replicate(self.store, self.host, self.vm, rescan=rescan)
        with open_disk(self.top) as disk:
            assert restore_disk(self.store, self.host, self.vm, point) == disk.read_at(0, disk.size)
        return point


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def _found_by(point: Point) -> str:
    return point.disks[0].source["found_by"]


def test_the_first_point_is_a_scan_and_an_untouched_file_is_not_read_again(chain: Chain) -> None:
    assert _found_by(chain.replicate()) == "scan"
    second = chain.replicate()
    assert (_found_by(second), second.cycle.read_bytes) == ("chain", 0)


def test_a_child_tells_the_delta_without_reading_the_rest(chain: Chain) -> None:
    chain.replicate()
    chain.checkpoint("one")
    chain.write(4 * MIB + 512, b"changed in the child")
    point = chain.replicate()
    assert _found_by(point) == "chain"
    assert (point.cycle.read_bytes, point.cycle.changed_blocks) == (BLOCK, 1)
    assert point.disks[0].number == 0


def test_several_children_between_two_points_are_taken_together(chain: Chain) -> None:
    chain.replicate()
    for number in range(4):
        chain.checkpoint(f"c{number}")
        chain.write((5 + number) * MIB, random_blocks(50 + number, 2))
    point = chain.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == ("chain", 8)


def test_what_a_child_trims_or_zeroes_becomes_zero(chain: Chain) -> None:
    chain.replicate()
    chain.checkpoint("one")
    chain.trim(4 * MIB, 2 * MIB)
    chain.write(3 * MIB, bytes(BLOCK))
    point = chain.replicate()
    assert _found_by(point) == "chain"
    assert point.cycle.zero_blocks == 28 - 3  # blocks 48 to 87 hold data: block 48, and those from 64 on


def test_a_disk_written_in_place_is_compared_by_hash(chain: Chain) -> None:
    chain.replicate()
    chain.write(30 * MIB, random_blocks(9, 1))
    point = chain.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == ("scan", 1)


def test_a_merged_chain_is_compared_by_hash(chain: Chain) -> None:
    chain.replicate()
    chain.checkpoint("one")
    chain.write(9 * MIB, random_blocks(7, 3))
    chain.replicate()
    chain.top = merge_into_parent(chain.top)
    chain.follow()
    point = chain.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == ("scan", 0)


def test_a_reverted_checkpoint_is_compared_by_hash(chain: Chain) -> None:
    chain.replicate()
    base = chain.top
    chain.checkpoint("one")
    chain.write(9 * MIB, random_blocks(7, 3))
    chain.replicate()
    chain.top.unlink()
    chain.top = base
    chain.checkpoint("two")
    chain.write(10 * MIB, random_blocks(8, 1))
    point = chain.replicate()
    assert _found_by(point) == "scan"


def test_a_replaced_file_is_compared_by_hash_even_under_the_same_identifiers(chain: Chain) -> None:
    chain.replicate()
    copy = chain.folder / "copy"
    shutil.copy2(chain.top, copy)
    with open_disk(chain.top) as disk:
        place = disk.image.block_offset(1, disk.image.bat.payload_entry(1))  # type: ignore[union-attr]
    with copy.open("r+b") as file:  # a tool that knows nothing of identifiers
        file.seek(place + MIB)
        file.write(b"touched")
    copy.replace(chain.top)
    point = chain.replicate()
    assert (_found_by(point), point.cycle.changed_blocks) == ("scan", 1)


def test_a_touched_parent_is_doubted(chain: Chain) -> None:
    base = chain.top
    chain.checkpoint("one")
    chain.replicate()
    os.utime(base)
    assert _found_by(chain.replicate()) == "scan"


def test_a_grown_disk_is_compared_by_hash(chain: Chain) -> None:
    chain.replicate()
    resize_disk(chain.top, SIZE + 4 * MIB)
    point = chain.replicate()
    assert (_found_by(point), point.disks[0].size) == ("scan", SIZE + 4 * MIB)


def test_a_rescan_reads_everything(chain: Chain) -> None:
    chain.replicate()
    point = chain.replicate(rescan=True)
    assert _found_by(point) == "scan"
    assert point.cycle.read_bytes > 0


def test_the_delta_of_a_child_costs_the_same_on_a_larger_disk(tmp_path: Path) -> None:
    """As many bytes read, blocks stored and requests made, whether the disk is 64 MiB or 64 GiB."""
    figures = []
    for size in (SIZE, 1024 * SIZE):
        folder = tmp_path / str(size)
        folder.mkdir()
        chain = Chain(folder)
        resize_disk(chain.top, size)
        cycle.replicate(chain.store, chain.host, chain.vm)
        chain.checkpoint("one")
        for place in range(10):
            chain.write(size // 10 // BLOCK * BLOCK * place, random_blocks(place, 1))
        point = cycle.replicate(chain.store, chain.host, chain.vm)
        assert _found_by(point) == "chain"
        figures.append((point.cycle.read_bytes, point.cycle.changed_blocks, point.cycle.stored_bytes))
    assert figures[0] == figures[1]
