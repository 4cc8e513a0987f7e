"""replica/garbage.py and replica/condemned.py: what is garbage, when it goes, and what stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from replica import condemned, garbage, history, lease, manifest, packer, prune, record, retention, verify
from replica.errors import FormatVersionError, IntegrityError
from replica.garbage import Amount, Collection
from replica.host import Host
from replica.lease import TERM
from replica.mapstore import MapStore
from replica.maptable import MapWriter, SegmentTable
from replica.model import MapPartRef, MapRef, Point
from replica.stores.store import ObjectInfo, Store
from tests.support.engine import WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, RecordingStore

HOUR = 3600.0


@pytest.fixture(autouse=True)
def _merge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 2)
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 2)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 2)


def make_pruned(folder: Path, *, store: Store | None = None, name: str = "web 1") -> Lab:
    """Return a VM of four points of wholly different content, all but the last pruned."""
    lab = make_lab(folder, [random_blocks(1, 6)], store=store, name=name, host=make_host(folder / "state", name=name))
    for turn in range(4):
        lab.write(random_blocks(10 * turn + len(name), 6))
        lab.replicate()
    prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
    return lab


def clock(lab: Lab) -> FakeClock:
    assert isinstance(lab.host.clock, FakeClock)
    return lab.host.clock


def collect(
    lab: Lab, *, store: Store | None = None, host: Host | None = None, grace: float = HOUR, dry_run: bool = False
) -> Collection:
    chosen = store or lab.store
    references = garbage.survey(chosen, lab.found.keys.tenant, workers=WORKERS)
    return garbage.collect(
        chosen,
        host or lab.host,
        lab.found,
        references,
        grace=timedelta(seconds=grace),
        dry_run=dry_run,
        workers=WORKERS,
    )


def stored(lab: Lab) -> dict[str, int]:
    keys = lab.found.keys
    return {info.key: info.size for prefix in (keys.maps, keys.segments) for info in lab.store.list(prefix)}


def replaced(store: Store, key: str, data: bytes) -> None:
    store.delete(key)
    store.create(key, data)


def test_what_only_pruned_points_needed_goes_after_the_grace_period(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    before = stored(lab)
    first = collect(lab)
    assert (first.deleted, first.condemned) == (Amount(), first.waiting)
    clock(lab).advance(HOUR - 1)
    again = collect(lab)
    assert (again.deleted, again.condemned, again.waiting) == (Amount(), Amount(), first.waiting)
    assert stored(lab) == before
    clock(lab).advance(1)
    done = collect(lab)
    after = stored(lab)
    assert done.deleted == Amount(len(before) - len(after), sum(before.values()) - sum(after.values()))
    assert done.deleted == first.condemned
    assert done.waiting == Amount()
    lab.assert_restores(4)
    points = list(history.points(lab.store, lab.found.keys))
    assert len(after) == 3 + sum(len(one.parts) for p in points if isinstance(p, Point) for one in p.maps)


def test_a_run_that_finds_nothing_writes_nothing(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 3)])
    for _ in range(2):
        recording = RecordingStore(lab.store)
        assert collect(lab, store=recording) == Collection(Amount(), Amount(), Amount())
        assert recording.writes == ()
        lab.replicate()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    recording = RecordingStore(lab.store)
    planned = collect(lab, store=recording, dry_run=True)
    assert recording.writes == ()
    assert collect(lab) == planned
    clock(lab).advance(HOUR)
    planned = collect(lab, dry_run=True)
    assert planned.deleted.objects > 0
    assert collect(lab) == planned


def test_what_lies_beyond_the_newest_point_is_left_for_the_next_cycle(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    beyond = [lab.found.keys.prefix + f"{kind}/{5:020}/{9:010}-{0:06}" for kind in ("segments", "maps")]
    for key in beyond:
        lab.store.create(key, b"of a cycle at work")
    collect(lab, grace=0)
    collect(lab, grace=0)
    assert set(beyond) <= stored(lab).keys()
    lab.patch(0, random_blocks(99, 1))
    lab.replicate()
    collect(lab, grace=0)
    collect(lab, grace=0)
    assert not set(beyond) & stored(lab).keys()
    lab.assert_restores(4, 5)


def test_only_segments_and_maps_are_ever_deleted(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    foreign = [lab.found.keys.segments + "notes.txt", lab.found.keys.maps + f"{1:020}/readme"]
    for key in foreign:
        lab.store.create(key, b"not Godwit's")
    collect(lab)
    clock(lab).advance(HOUR)
    recording = RecordingStore(lab.store)
    collect(lab, store=recording)
    deleted = {request.key for request in recording.writes if request.kind == "delete"}
    keys = lab.found.keys
    assert deleted
    assert all(key.startswith((keys.maps, keys.segments, keys.condemned)) for key in deleted)
    assert not deleted & set(foreign)


@pytest.mark.parametrize("which", ["manifest", "newest manifest", "map", "missing map", "later format"])
def test_what_cannot_be_understood_stops_it_before_anything_is_deleted(tmp_path: Path, which: str) -> None:
    lab = make_pruned(tmp_path)
    collect(lab)
    clock(lab).advance(HOUR)
    lab.patch(0, random_blocks(98, 1))
    point = lab.replicate()
    keys = lab.found.keys
    key = keys.manifest(5 if which == "newest manifest" else 4)
    if "map" in which:
        key = keys.map_part(point.maps[0].parts[0].part)
    data = lab.store.get(key)
    if which == "missing map":
        lab.store.delete(key)
    elif which == "later format":
        replaced(lab.store, key, data.replace(b'"format":1', b'"format":2'))
    else:
        replaced(lab.store, key, data[:-1] + bytes([data[-1] ^ 1]))
    before = stored(lab)
    recording = RecordingStore(lab.store)
    with pytest.raises(IntegrityError, match="nothing was deleted") as caught:
        collect(lab, store=recording)
    assert caught.value.key == key
    assert caught.value.exit_code == 12
    assert recording.writes == ()
    assert stored(lab) == before


def test_damage_of_another_vm_of_the_tenant_stops_it_and_is_named(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path / "one")
    other = make_pruned(tmp_path / "two", store=lab.store, name="db")
    replaced(lab.store, other.found.keys.manifest(4), b"{}")
    with pytest.raises(IntegrityError, match="what db needs cannot be known"):
        collect(lab)


def test_what_a_point_of_another_vm_refers_to_stays(tmp_path: Path) -> None:
    """A VM that was seeded from this one: its map refers to a segment of this one's first point, which is pruned."""
    lab = make_lab(tmp_path / "one", [random_blocks(1, 6)])
    first = lab.replicate()
    other = make_lab(
        tmp_path / "two", [random_blocks(2, 2)], store=lab.store, name="clone", host=make_host(name="host-b")
    )
    own = other.replicate()
    publish_seeded(lab, other, first, own)
    for turn in range(3):
        lab.write(random_blocks(10 * turn + 5, 6))
        lab.replicate()
    prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
    collect(lab)
    clock(lab).advance(HOUR)
    done = collect(lab)
    assert done.deleted.objects > 0
    report = verify.verify(lab.store, lab.host, other.found, workers=WORKERS)
    assert [verdict.restores for verdict in report.verdicts] == [True, True]


def publish_seeded(lab: Lab, other: Lab, seed: Point, own: Point) -> None:
    """Publish a point of ``other`` whose first block is the first of ``seed``."""
    keys, store = other.found.keys, lab.store
    source = MapStore(store, lab.found.keys, None).fetch(seed.maps[0].parts[0])
    table = SegmentTable()
    entries = source.entries_between(0, 1, table)
    writer = MapWriter(keys.vm_id, own.point + 1, own.epoch)
    made = [*writer.append(entries, table), *writer.finish()][0]
    store.create(keys.map_part(made.part), made.data)
    ref = MapPartRef(made.part, made.entries, made.first_key, made.last_key, len(made.data), made.checksum)
    point = replace(own, point=own.point + 1, previous=own.point, maps=(MapRef(0, (ref,)),))
    store.create(keys.manifest(point.point), manifest.encode(point))


def test_a_survey_that_lags_catches_up_under_the_lease(tmp_path: Path) -> None:
    """Between survey and deletion a manifest comes back that needs what is due, as when pruning found it pinned."""
    lab = make_lab(tmp_path, [random_blocks(1, 6)])
    for turn in range(4):
        lab.write(random_blocks(10 * turn, 6))
        lab.replicate()
    keys = lab.found.keys
    data = lab.store.get(keys.manifest(2))
    prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
    collect(lab)
    clock(lab).advance(HOUR)
    references = garbage.survey(lab.store, keys.tenant, workers=WORKERS)
    lab.store.create(keys.manifest(2), data)
    garbage.collect(lab.store, lab.host, lab.found, references, workers=WORKERS)
    lab.assert_restores(2, 4)


def test_a_listing_that_lacks_the_newest_manifest_condemns_nothing_of_it(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 6)])
    store = FaultyStore(lab.store, [Fault(FaultKind.STALE_LIST, ("list",), "*/manifests/*")])
    lab.replicate()
    store._last_created = lab.found.keys.manifest(1)
    assert collect(lab, store=store).condemned == Amount()
    assert store.fired > 0


def test_a_point_that_is_published_while_it_reads_is_none_of_its_business(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 6)])
    lab.replicate()

    class Racing(RecordingStore):
        def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
            found = list(super().list(prefix, start_after=start_after))
            if prefix == lab.found.keys.manifests and 2 not in lab.published:
                lab.write(random_blocks(60, 6))
                lab.replicate()
            return iter(found)

    assert collect(lab, store=Racing(lab.store)) == Collection(Amount(), Amount(), Amount())
    assert 2 in lab.published


def test_another_agent_at_work_is_left_alone_and_named(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    first = collect(lab)
    clock(lab).advance(HOUR)
    other = make_host(name="host-b", clock=clock(lab))
    held = lease.acquire(lab.store, lab.found.keys, other, sole_on_host=True)
    done = collect(lab)
    assert done.busy is not None
    assert "host-b" in done.busy
    assert (done.deleted, done.waiting) == (Amount(), first.waiting)
    held.release()
    assert collect(lab).deleted == first.waiting


def test_the_lease_is_given_back_between_batches_once_it_was_held_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "BATCH_OBJECTS", 2)
    lab = make_pruned(tmp_path)
    collect(lab)
    clock(lab).advance(HOUR)

    class Slow(RecordingStore):
        def delete(self, key: str) -> None:
            clock(lab).advance(garbage.HOLD_SECONDS)
            super().delete(key)

    store = Slow(lab.store)
    before = lease.read(lab.store, lab.found.keys)[0].epoch
    done = collect(lab, store=store)
    batches = -(-done.deleted.objects // 2)
    assert batches > 3
    assert lease.read(lab.store, lab.found.keys)[0].epoch == before + batches + 1
    assert not lease.read(lab.store, lab.found.keys)[0].held


def test_collecting_notes_a_lease_that_was_not_released_with_a_fence(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    collect(lab)
    lease.acquire(lab.store, lab.found.keys, lab.host, sole_on_host=True)
    clock(lab).advance(HOUR + TERM.total_seconds())
    collect(lab, host=make_host(name="host-b", clock=clock(lab)))
    assert not isinstance(history.read(lab.store, lab.found.keys, 5), Point)
    assert lease.read(lab.store, lab.found.keys)[0].leftovers
    assert lab.replicate().point == 6


def test_two_collectors_that_met_delete_each_object_once(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    references = garbage.survey(lab.store, lab.found.keys.tenant, workers=WORKERS)
    sizes = dict(garbage._unreferenced(lab.store, lab.found.keys, references))
    condemned.write(lab.store, lab.host, lab.found.keys, sizes)
    condemned.write(lab.store, lab.host, lab.found.keys, sizes)
    clock(lab).advance(HOUR)
    done = collect(lab)
    assert (done.deleted, done.waiting) == (Amount(len(sizes), sum(sizes.values())), Amount())
    assert list(lab.store.list(lab.found.keys.condemned)) == []


def _bad_checksum(data: bytes) -> bytes:
    return data.replace(b"segments/", b"segmenTs/", 1)


def _of_a_manifest(data: bytes) -> bytes:
    body = {"number": 1, "condemned_at": "2020-01-01T00:00:00Z", "objects": [{"key": "vm.json", "size_bytes": 1}]}
    return record.encode("condemned", body)


def _of_another_number(data: bytes) -> bytes:
    return record.encode("condemned", {"number": 2, "condemned_at": "2020-01-01T00:00:00Z", "objects": []})


def _far_ahead(data: bytes) -> bytes:
    return record.encode("condemned", {"number": 1, "condemned_at": "2040-01-01T00:00:00Z", "objects": []})


@pytest.mark.parametrize("damage", [_bad_checksum, _of_a_manifest, _of_another_number, _far_ahead])
def test_a_list_that_cannot_be_trusted_deletes_nothing_and_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    lab = make_pruned(tmp_path)
    first = collect(lab)
    clock(lab).advance(HOUR)
    key = lab.found.keys.condemned_list(1)
    replaced(lab.store, key, damage(lab.store.get(key)))
    before = stored(lab)
    again = collect(lab)
    assert (again.condemned, again.deleted) == (first.condemned, Amount())
    assert stored(lab) == before
    assert [info.key for info in lab.store.list(lab.found.keys.condemned)] == [lab.found.keys.condemned_list(2)]
    clock(lab).advance(HOUR)
    assert collect(lab).deleted == first.condemned
    lab.store.head(lab.found.keys.vm)


def test_a_list_of_a_later_format_is_not_touched(tmp_path: Path) -> None:
    lab = make_pruned(tmp_path)
    collect(lab)
    key = lab.found.keys.condemned_list(1)
    later = lab.store.get(key).replace(b'"format":1', b'"format":2').replace(b'"checksum":"', b'"checksum":"of-all-')
    replaced(lab.store, key, later)
    with pytest.raises(FormatVersionError, match="format 2"):
        collect(lab)


def test_long_lists_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condemned, "LIST_OBJECTS", 3)
    lab = make_pruned(tmp_path)
    first = collect(lab)
    lists = list(condemned.read_all(lab.store, lab.found.keys, clock(lab).now()))
    assert [len(one.sizes) for one in lists[:-1]] == [3] * (len(lists) - 1)
    assert sum(len(one.sizes) for one in lists) == first.condemned.objects
    clock(lab).advance(HOUR)
    assert collect(lab).deleted == first.condemned


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_a_clock_that_jumps_an_hour_costs_no_point(tmp_path: Path, jump: float) -> None:
    lab = make_pruned(tmp_path)
    collect(lab)
    clock(lab).jump(jump)
    collect(lab)
    clock(lab).advance(2 * HOUR)
    collect(lab)
    lab.assert_restores(4)
    assert collect(lab).waiting == Amount()


def test_points_that_are_pruned_while_it_reads_are_no_damage(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 6)])
    for turn in range(4):
        lab.write(random_blocks(10 * turn, 6))
        lab.replicate()
    keys = lab.found.keys
    doomed = history.point(lab.store, keys, 1).maps[0].parts[0].part

    class Racing(RecordingStore):
        def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
            if key == keys.map_part(doomed):
                prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
                lab.store.delete(key)
            return super().get(key, start=start, length=length)

    collect(lab, store=Racing(lab.store))
    assert [one.point for one in history.points(lab.store, keys) if isinstance(one, Point)] == [4]


def test_a_point_whose_map_is_lost_stops_it_until_that_point_is_removed(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 6)])
    points = []
    for turn in range(4):
        lab.write(random_blocks(10 * turn + 1, 6))
        points.append(lab.replicate())
    parts = {point.point: {part for one in point.maps for part in one.parts} for point in points}
    lost = min(set().union(*parts.values()) - parts[points[-1].point], key=lambda part: part.part)
    hit = frozenset(number for number, own in parts.items() if lost in own)
    assert 0 < len(hit) < len(points)
    lab.store.delete(lab.found.keys.map_part(lost.part))
    with pytest.raises(IntegrityError, match="nothing was deleted") as raised:
        collect(lab)
    assert "godwit prune web 1 --point P" in str(raised.value.hint)
    prune.prune(lab.store, lab.host, lab.found, points=hit)
    collect(lab)
    clock(lab).advance(HOUR)
    assert collect(lab).deleted.objects
    lab.assert_restores(*(parts.keys() - hit))
