"""What a cycle costs in requests and metadata: docs/requests.md says it, and at 10,000 VMs requests are money."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from replica import catalog, cycle, history, protection
from replica.catalog import ProtectedVm
from replica.health import report
from replica.health.publishing import Publisher, Watched
from replica.model import Point
from replica.restore import Nowhere, PointReader
from replica.stores.memory import MemoryStore
from replica.workers import Workers
from tests.support.engine import BLOCK, make_host, random_blocks
from tests.support.store_doubles import RecordingStore

TIB = 1 << 40
METADATA_BYTES = 64 << 10
FLEET = 220  # VMs


class Vm:
    """A VM of one sparse raw disk of 1 TiB, in a store that counts."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk.img"
        with self.path.open("wb") as file:
            file.truncate(TIB)
        self.drawn = random.Random(1)
        self.store = RecordingStore(MemoryStore("budget"))
        self.host = make_host(folder / "state")
        catalog.init_store(self.store, self.host)
        self.found: ProtectedVm
        self.found, _ = protection.protect(self.store, self.host, tenant="default", name="vm", disks=[self.path])

    def change(self, blocks: int) -> None:
        with self.path.open("r+b") as file:
            for number in self.drawn.sample(range(TIB // BLOCK), blocks):
                file.seek(number * BLOCK)
                file.write(random_blocks(number, 1))

    def replicate(self) -> Point:
        self.store.forget()
        return cycle.replicate(self.store, self.host, self.found)

    def reads(self) -> int:
        return sum(request.kind in ("get", "get_tagged", "head", "list") for request in self.store.requests)

    def writes(self, *, data: bool) -> list[int]:
        """Return the sizes of what was written: segments, or everything else."""
        return [one.size for one in self.store.writes if ("/segments/" in one.key) == data]


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Vm:
    made = Vm(tmp_path_factory.mktemp("budget"))
    made.change(1000)
    made.replicate()
    return made


def test_a_cycle_that_changed_a_hundred_blocks_of_a_tebibyte_writes_little_beside_its_data(vm: Vm) -> None:
    vm.change(100)
    point = vm.replicate()
    assert point.cycle.changed_blocks == 100
    assert len(vm.writes(data=True)) == 1
    metadata = vm.writes(data=False)
    assert len(metadata) <= 4
    assert sum(metadata) < METADATA_BYTES


def test_a_cycle_that_changed_nothing_writes_no_map(vm: Vm) -> None:
    vm.replicate()
    assert len(vm.writes(data=True)) == 0
    assert len(vm.writes(data=False)) == 3


def test_no_cycle_lists_anything_nor_reads_what_it_has_read_before(vm: Vm) -> None:
    vm.change(10)
    vm.replicate()
    vm.change(10)
    vm.replicate()
    assert vm.store.counts["list"] == 0
    assert vm.reads() == 3  # lease, settings, newest manifest; the maps come from the cache


def test_most_cycles_write_little_even_where_maps_are_merged(vm: Vm) -> None:
    sizes = []
    for _ in range(20):
        vm.change(100)
        vm.replicate()
        assert len(vm.writes(data=False)) <= 4
        sizes.append(sum(vm.writes(data=False)))
    assert max(sizes) < METADATA_BYTES


def test_what_a_restore_reads_grows_with_the_logarithm_of_the_points(tmp_path: Path) -> None:
    """Objects read beside segments, to restore the newest of n points."""
    made = Vm(tmp_path)
    made.change(50)
    needed = {}
    for number in range(1, 201):
        with made.path.open("r+b") as file:
            file.seek(made.drawn.randrange(1000) * BLOCK)
            file.write(random_blocks(number, 1))
        point = made.replicate()
        if number in (2, 20, 200):
            made.store.forget()
            reader = PointReader(made.store, make_host(), made.found, point, Workers())
            reader.restore(point.disks[0], Nowhere())
            needed[number] = sum("/maps/" in request.key for request in made.store.requests)
            assert needed[number] == sum(len(one.parts) for one in point.maps)
    assert needed[2] <= 2
    assert needed[20] <= 2 * 7 + 1
    assert needed[200] <= 3 * 7 + 1
    assert isinstance(history.newest(made.store, made.found.keys), Point)


def test_the_document_says_the_same() -> None:
    text = (Path(__file__).parents[2] / "docs" / "requests.md").read_text().partition("\n# ")[0]  # of a cycle
    rows = dict(re.findall(r"^\| ([a-z ,]+?) +\| (\d+) ", text, re.MULTILINE))
    assert {name: int(count) for name, count in rows.items()} == {
        "lease, taken": 1,
        "lease, read": 1,
        "settings": 1,
        "newest manifest": 1,
        "map": 1,
        "manifest": 1,
        "lease, released": 1,
    }


def test_a_fleet_costs_a_few_objects_for_a_hundred_vms_to_report_on_and_one_a_minute_to_write(tmp_path: Path) -> None:
    store, host = RecordingStore(MemoryStore("fleet")), make_host(tmp_path / "state")
    catalog.init_store(store, host)
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(BLOCK))
    found = [
        protection.protect(store, host, tenant="default", name=f"vm {number:03}", disks=[path])[0]
        for number in range(FLEET)
    ]
    publisher = Publisher(host, "default")
    watched = [Watched(one, "waiting") for one in found]
    publisher.publish(store, watched)
    store.forget()
    point = cycle.replicate(store, host, found[0])
    publisher.note_cycle(found[0].keys.vm_id, point, 2, 1)
    store.forget()
    publisher.publish(store, watched)
    assert [one.kind for one in store.requests] == ["list", "replace"]

    store.forget()
    made = report.report(store, make_host(name="elsewhere", clock=host.clock), "default")  # type: ignore[arg-type]
    assert len(made.assessments) == FLEET
    assert made.direct == 0
    assert store.counts["get"] <= 1 + -(-FLEET // 100)
    assert store.counts["list"] == 3
    assert sum(store.counts.values()) * 100 / FLEET <= 5
