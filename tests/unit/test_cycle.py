"""A cycle's order of writes, and what it does to the disks that it reads: nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from replica import mapstore, maptable, packer, scan
from replica.errors import StoreUnavailableError
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData
from tests.support.engine import BLOCK, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore
from vhdx.disk import Disk
from vhdx.formats import open_disk

ORDER = ("lease", "segments", "maps", "manifests", "lease")


def family(key: str) -> str:
    return next(name for name in ("lease", "segments", "maps", "manifests") if name in key)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few blocks and map parts of a few entries, so that a small disk makes many."""
    monkeypatch.setattr(scan, "BATCH_BLOCKS", 8)
    monkeypatch.setattr(packer, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(maptable, "PAGE_ENTRIES", 8)
    monkeypatch.setattr(maptable, "PART_ENTRIES", 16)


class Watching(MemoryStore):
    """A store in memory that notes what was under way, and what had been acknowledged, when each write began."""

    def __init__(self) -> None:
        super().__init__("watching")
        self._watch = threading.Lock()
        self._under_way: list[str] = []
        self.began: list[tuple[str, tuple[str, ...]]] = []

    def create(self, key: str, data: ObjectData) -> str:
        with self._watch:
            self.began.append((key, tuple(self._under_way)))
            self._under_way.append(key)
        if "/segments/" in key:
            threading.Event().wait(0.1)  # long enough for the main thread to run ahead, if it does not wait
        try:
            return super().create(key, data)
        finally:
            with self._watch:
                self._under_way.remove(key)


@pytest.mark.usefixtures("small_segments")
def test_a_cycle_writes_data_then_maps_then_the_manifest_then_the_lease(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 60)], host=make_host())
    for _ in range(3):
        recording = RecordingStore(lab.store)
        lab.replicate(recording)
        writes = [family(request.key) for request in recording.writes]
        steps = [name for at, name in enumerate(writes) if not at or writes[at - 1] != name]
        assert steps == [name for name in ORDER if name in writes or name == "lease"]
        lab.patch(0, random_blocks(len(lab.published) + 5, 40))
    assert writes.count("segments") > 3
    lab.assert_restores()


@pytest.mark.usefixtures("small_segments")
def test_nothing_is_named_before_it_was_acknowledged(tmp_path: Path) -> None:
    store = Watching()
    lab = make_lab(tmp_path, [random_blocks(1, 60)], store=store, host=make_host())
    store.began.clear()
    lab.replicate()
    assert sum("/segments/" in key for key, _ in store.began) > 3
    (manifest_at,) = [at for at, (key, _) in enumerate(store.began) if "/manifests/" in key]
    assert manifest_at == len(store.began) - 1
    assert store.began[manifest_at][1] == ()
    lab.assert_restores()


def test_only_the_lease_is_ever_replaced_and_nothing_is_deleted(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 20)], host=make_host())
    recording = RecordingStore(lab.store)
    for number in range(12):
        lab.patch(number * BLOCK, random_blocks(50 + number, 1))
        lab.replicate(recording)
    assert {request.key for request in recording.writes if request.kind == "replace"} == {lab.found.keys.lease}
    assert recording.counts["delete"] == 0
    created = [request.key for request in recording.writes if request.kind == "create"]
    assert len(created) == len(set(created))
    assert all(request.error is None for request in recording.writes)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("pattern", ["*/segments/*", "*/maps/*"])
def test_no_manifest_names_what_could_not_be_stored(tmp_path: Path, pattern: str) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 60)], host=make_host())
    for skip in (0, 3, 7):  # the first, one among them, the last
        faulty = FaultyStore(lab.store, [Fault(FaultKind.ERROR, ("create",), pattern, skip=skip, limit=1)])
        recording = RecordingStore(faulty)
        if skip:  # other content, so that nothing stored before is of use
            lab.write(random_blocks(skip, 60))
        try:
            lab.replicate(recording)
        except StoreUnavailableError:
            assert not any("/manifests/" in request.key for request in recording.writes)
            assert recording.writes[-1].key == lab.found.keys.lease
        else:
            assert faulty.fired == 0
    lab.replicate()
    lab.assert_restores()


def test_the_source_is_opened_for_reading_and_left_as_it_was(tmp_path: Path) -> None:
    lab: Lab = make_lab(tmp_path, [random_blocks(1, 10), bytes(BLOCK)], host=make_host())
    opened: list[Disk] = []

    class Watcher:
        def __call__(self, path: Path) -> Disk:
            opened.append(open_disk(path))
            return opened[-1]

    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in lab.paths]
    folder = sorted(path.name for path in lab.folder.iterdir())
    lab.replicate(open_disk=Watcher())
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in lab.paths] == before
    assert sorted(path.name for path in lab.folder.iterdir()) == folder
    assert [disk.read_only for disk in opened] == [True, True]


def test_a_cycle_without_changes_stores_nothing(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 10)], host=make_host())
    first = lab.replicate()
    recording = RecordingStore(lab.store)
    second = lab.replicate(recording)
    assert [family(request.key) for request in recording.writes] == ["lease", "manifests", "lease"]
    assert second.maps == first.maps
    assert [disk.digest for disk in second.disks] == [disk.digest for disk in first.disks]


def test_zeros_are_never_stored(tmp_path: Path) -> None:
    data = random_blocks(1, 4)
    lab = make_lab(tmp_path, [bytes(5 * BLOCK) + data + bytes(7 * BLOCK + 512)], host=make_host())
    point = lab.replicate()
    assert point.cycle.changed_blocks == point.disks[0].data_blocks == 4
    assert [one.entries for one in point.maps] == [4]
    lab.patch(5 * BLOCK, bytes(BLOCK))
    recording = RecordingStore(lab.store)
    point = lab.replicate(recording)
    assert not any("/segments/" in request.key for request in recording.writes)
    assert (point.cycle.changed_blocks, point.cycle.zero_blocks, point.disks[0].data_blocks) == (0, 1, 3)
    lab.patch(5 * BLOCK, bytes(BLOCK - 1) + b"x")
    assert lab.replicate().disks[0].data_blocks == 4
    lab.assert_restores()


def test_a_disk_that_shrinks_grows_and_leaves_is_followed(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 10) + b"odd." * 128, random_blocks(2, 3)], host=make_host())
    lab.replicate()
    lab.write(random_blocks(1, 10)[: 6 * BLOCK + 512])
    lab.replicate()
    lab.write(random_blocks(1, 10)[: 6 * BLOCK + 512] + bytes(20 * BLOCK) + random_blocks(3, 2))
    lab.replicate()
    lab.write(bytes(512))
    lab.replicate()
    lab.assert_restores()


def test_a_damaged_cache_costs_a_request_and_nothing_else(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "vm", [random_blocks(1, 10)], host=make_host(tmp_path / "state"))
    lab.replicate()
    cached = [path for path in (tmp_path / "state" / "cache").rglob("*") if path.is_file()]
    assert cached
    assert mapstore.map_cache(lab.host) == tmp_path / "state" / "cache"
    for path in cached:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    lab.patch(0, b"x")
    lab.replicate()
    lab.assert_restores()
