"""replica/usage.py and replica/rewriting.py: what is needed of segments, which are thin, what a rewriting leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest

from replica import catalog, garbage, history, manifest, protection, prune, retention, rewriting, usage
from replica.blockmap import BlockMap
from replica.errors import IntegrityError, ObjectMissingError, StoreRefusedError
from replica.host import Host
from replica.keys import PartId
from replica.mapstore import MapStore
from replica.maptable import SegmentRef
from replica.model import Point, Standing
from replica.rewriting import Rewriting
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from replica.usage import Terms, Thin, Usage
from tests.support.damage import harm
from tests.support.encryption import encrypted_lab
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash, _Around

BLOCKS = 24
TERMS = Terms(percent=50, least_gain_bytes=1)
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a segment hold eight blocks, a map part few entries, and maps cost nothing."""
    for name, value in (
        ("packer.SEGMENT_FRAMES", 8),
        ("scan.BATCH_BLOCKS", 8),
        ("maptable.PART_ENTRIES", 10),
        ("maptable.PAGE_ENTRIES", 4),
        ("usage.GAIN_PER_MAP_BYTE", 0),
    ):
        monkeypatch.setattr(f"replica.{name}", value)


def noise(seed: int, blocks: int) -> bytes:
    return random.Random(seed).randbytes(blocks * BLOCK)


def thinned(folder: Path, *, encrypted: bool = False) -> Lab:
    """Return a VM of two disks of three segments and one; of the first disk's segments 1, 2 and 5 blocks are needed."""
    disks = [noise(1, BLOCKS), noise(2, 4)]
    lab = encrypted_lab(folder, disks, MemoryStore("lab")) if encrypted else make_lab(folder, disks)
    lab.replicate()
    for blocks in ((0, 1, 2, 8, 9, 10, 11, 12, 16), (3, 4, 5, 17, 18), (6, 13)):
        pass_time(lab, 60)
        for block in blocks:
            lab.patch(block * BLOCK, noise(100 + block, 1) if block % 3 else bytes(BLOCK))
        lab.replicate()
    return lab


def pass_time(lab: Lab, seconds: float) -> None:
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(seconds)


def newest(lab: Lab) -> Point:
    found = history.newest(lab.store, lab.found.keys)
    assert found is not None
    return found


def rewrite(lab: Lab, *, store: Store | None = None, host: Host | None = None, terms: Terms = TERMS) -> Rewriting:
    chosen, where = store or lab.store, host or lab.host
    thin = rewriting.plan(chosen, where, lab.found, terms)
    return rewriting.rewrite(chosen, where, lab.found, thin, workers=WORKERS)


def rewritten(lab: Lab, terms: Terms = TERMS) -> Rewriting:
    """Rewrite, and remember that the new point holds what the newest one held."""
    before = newest(lab)
    done = rewrite(lab, terms=terms)
    if done.point:
        lab.published[done.point] = lab.published[before.point]
    return done


def segments_named(lab: Lab, point: Point) -> set[SegmentRef]:
    maps = MapStore(lab.store, lab.found.keys, None)
    return {one for each in point.maps for part in each.parts for one in maps.fetch(part).segment_refs()}


def needed_naively(lab: Lab, point: Point) -> dict[SegmentRef, int]:
    found = dict.fromkeys(segments_named(lab, point), 0)
    for disk in point.disks:
        first, end = disk.number << 48, (disk.number + 1) << 48
        for window in BlockMap(point.maps, MapStore(lab.store, lab.found.keys, None).fetch).windows(first, end):
            for at in range(len(window.entries)):
                if window.entries.is_data[at]:
                    found[window.table.refs[window.entries.segments[at]]] += int(window.entries.lengths[at]) + 40
    return found


def collect(lab: Lab) -> int:
    """Prune to the newest point, collect twice without grace; return the bytes reclaimed."""
    prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
    reclaimed = 0
    for _ in range(2):
        references = garbage.survey(lab.store, lab.found.keys.tenant, workers=WORKERS)
        reclaimed += garbage.collect(
            lab.store, lab.host, lab.found, references, grace=timedelta(0), workers=WORKERS
        ).deleted.bytes
    return reclaimed


# --- what is thin


def test_usage_is_what_a_naive_count_says(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    point = newest(lab)
    found = usage.of_point(point, MapStore(lab.store, lab.found.keys, None).fetch)
    assert found.needed == needed_naively(lab, point)
    assert found.map_bytes == sum(part.size for one in point.maps for part in one.parts)
    assert 0 < sum(found.needed.values()) < sum(ref.size for ref in found.needed)


def ref(number: int, size: int = 1000, vm_id: str = "") -> SegmentRef:
    return SegmentRef(vm_id or "aa" * 16, PartId(1, 1, number), size)


def test_the_thinnest_are_chosen_first_and_no_more_than_may_be_copied(tmp_path: Path) -> None:
    keys = make_lab(tmp_path, [bytes(BLOCK)]).found.keys
    own = keys.vm_id
    held = Usage({ref(0, vm_id=own): 217, ref(1, vm_id=own): 218, ref(2, vm_id=own): 10, ref(3, vm_id=own): 0}, 0)
    held.needed[ref(4, vm_id="bb" * 16)] = 1
    held.needed[ref(5, vm_id=own)] = 5

    def chosen(most: int = 10_000, gain: int = 1, percent: int = 25, map_bytes: int = 0) -> Thin:
        held.map_bytes = map_bytes
        lent = {ref(5, vm_id=own)}
        return usage.thin(held, keys, Terms(percent, most, gain), lambda one: one in lent)

    def numbers(made: Thin) -> set[int]:
        return {one.part.ordinal for one in made.segments}

    assert numbers(chosen()) == {0, 2, 3}
    assert (chosen().copied_bytes, chosen().total_bytes, chosen().gain_bytes) == (227, 3000, 2773)
    assert numbers(chosen(percent=26)) == {0, 1, 2, 3}
    assert numbers(chosen(percent=0)) == set()
    assert numbers(chosen(most=226)) == {2, 3}
    assert numbers(chosen(gain=2773)) == {0, 2, 3}
    assert chosen(gain=2774) == Thin()


def test_a_run_has_to_be_worth_the_map_that_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "GAIN_PER_MAP_BYTE", 4)
    keys = make_lab(tmp_path, [bytes(BLOCK)]).found.keys
    needed = {ref(0, vm_id=keys.vm_id): 0}
    assert usage.thin(Usage(needed, 250), keys, TERMS, lambda one: False).gain_bytes == 1000
    assert usage.thin(Usage(needed, 251), keys, TERMS, lambda one: False) == Thin()


# --- what a rewriting leaves


@pytest.mark.parametrize("encrypted", [False, True], ids=["in clear", "encrypted"])
def test_a_rewritten_point_holds_the_same_and_the_room_comes_back(tmp_path: Path, encrypted: bool) -> None:
    lab = thinned(tmp_path, encrypted=encrypted)
    before = newest(lab)
    thin = rewriting.plan(lab.store, lab.host, lab.found, TERMS)
    shares = {one: needed_naively(lab, before)[one] / (one.size - 128) for one in segments_named(lab, before)}
    assert thin.segments == {one for one, share in shares.items() if share < 0.5}
    assert len(thin.segments) == 2
    pass_time(lab, 1000)
    done = rewritten(lab)
    after = newest(lab)
    assert (done.point, after.repeats, after.previous) == (after.point, before.point, before.point)
    assert (after.created_at, after.disks, after.machine) == (before.created_at, before.disks, before.machine)
    assert done.copied_bytes == thin.copied_bytes
    assert done.stored_bytes == after.cycle.stored_bytes > done.copied_bytes
    assert done.damaged == ()
    assert not segments_named(lab, after) & thin.segments
    assert len(after.maps) == 1
    lab.assert_restores()
    stored = {info.key: info.size for info in lab.store.list(lab.found.keys.segments)}
    assert thin.copied_bytes == 3 * (BLOCK + 40)
    assert collect(lab) >= thin.total_bytes
    left = {info.key for info in lab.store.list(lab.found.keys.segments)}
    assert {key for key in stored if key not in left} >= {lab.found.keys.segment(one.part) for one in thin.segments}
    lab.assert_restores(after.point)
    assert lab.restore(after.point, 1, host=make_host(name="elsewhere")) == lab.published[before.point][1]


def test_nothing_is_rewritten_twice(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    assert rewritten(lab).point
    recording = RecordingStore(lab.store)
    assert rewrite(lab, store=recording) == Rewriting(Thin())
    assert recording.writes == ()


def test_the_next_cycle_is_a_delta_of_what_was_rewritten(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    done = rewritten(lab)
    lab.patch(20 * BLOCK, random_blocks(999, 1))
    point = lab.replicate()
    assert (point.previous, point.repeats, point.cycle.changed_blocks) == (done.point, 0, 1)
    lab.assert_restores()


def test_a_run_copies_no_more_than_it_may_and_the_next_goes_on(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    whole = rewriting.plan(lab.store, lab.host, lab.found, TERMS)
    little = replace(TERMS, most_bytes=whole.copied_bytes - 1)
    first = rewritten(lab, terms=little)
    assert 0 < first.copied_bytes < whole.copied_bytes
    second = rewritten(lab)
    assert newest(lab).repeats == newest(lab).point - 2
    assert first.copied_bytes + second.copied_bytes >= whole.copied_bytes
    assert not segments_named(lab, newest(lab)) & whole.segments
    lab.assert_restores()


def test_last_counts_what_was_rewritten_once(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    before = newest(lab).point
    after = rewritten(lab).point
    assert after == before + 1
    done = prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:3"))
    assert [one.point for one in done.kept] == [before - 2, before - 1, after]
    lab.assert_restores(*(one.point for one in done.kept))
    again = rewritten(lab, replace(TERMS, percent=90)).point  # of the same content once more, as the rule sees it
    assert again
    done = prune.prune(lab.store, lab.host, lab.found, rule=retention.parse("last:1"))
    assert [one.point for one in done.kept] == [again]


def test_a_manifest_says_what_it_repeats_only_where_it_does(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    cycle = newest(lab)
    rewritten(lab)
    after = newest(lab)
    assert b"repeats" not in manifest.encode(cycle)
    assert manifest.decode(manifest.encode(after), key="k", vm_id=after.vm_id, point=after.point) == after


def test_what_is_damaged_stays_where_it_is(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    point = newest(lab)
    thin = rewriting.plan(lab.store, lab.host, lab.found, TERMS)
    victim = max(thin.segments, key=lambda one: needed_naively(lab, point)[one])
    key = lab.found.keys.segment(victim.part)
    window = next(BlockMap(point.maps, MapStore(lab.store, lab.found.keys, None).fetch).windows(0, 1 << 48))
    mine = window.entries.segments == window.table.refs.index(victim)
    harm(lab.store, key, "flipped", at=int(window.entries.offsets[mine][0]) + 5)
    done = rewrite(lab)
    assert done.damaged == (key,)
    after = newest(lab)
    assert after.point == done.point
    assert segments_named(lab, after) & thin.segments == {victim}
    with pytest.raises(IntegrityError):
        lab.restore(after)
    assert lab.restore(after, 1) == lab.contents()[1]


def test_maps_that_lie_are_not_rewritten(tmp_path: Path) -> None:
    lab = thinned(tmp_path)
    point = newest(lab)
    liar = replace(point, disks=(replace(point.disks[0], data_blocks=3), point.disks[1]))
    thin = rewriting.plan(lab.store, lab.host, lab.found, TERMS)
    lab.store.delete(lab.found.keys.manifest(point.point))
    lab.store.create(lab.found.keys.manifest(point.point), manifest.encode(liar))
    with pytest.raises(IntegrityError, match="other blocks than the newest point's manifest says"):
        rewriting.plan(lab.store, lab.host, lab.found, TERMS)
    with pytest.raises(IntegrityError, match="other blocks than the newest point's manifest says"):
        rewriting.rewrite(lab.store, lab.host, lab.found, thin, workers=WORKERS)
    assert newest(lab).point == point.point


def test_what_a_cycle_left_is_waited_for(tmp_path: Path) -> None:
    """Its segments are numbered for the next point: a rewriting in between would make garbage of them."""
    lab = thinned(tmp_path)
    lab.write(random_blocks(50, BLOCKS))
    store = CrashingStore(lab.store, at=3, mode=CrashMode.AFTER)
    with pytest.raises(SimulatedCrash):
        lab.replicate(store=store)
    done = rewrite(lab)
    assert done.point == 0
    assert done.busy is not None
    assert "cut off" in done.busy
    assert lab.replicate().cycle.reused_blocks > 0
    assert rewritten(lab).point == newest(lab).point
    lab.assert_restores()


@pytest.mark.parametrize("standing", [one for one in Standing if one is not Standing.PROTECTED])
def test_while_a_vm_is_failed_over_no_point_comes_between(
    tmp_path: Path, standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = thinned(tmp_path)
    before = newest(lab)
    settings = catalog.settings_in_force(lab.store, lab.found)
    told = replace(settings, state=replace(settings.state, standing=standing))
    monkeypatch.setattr(catalog, "read_settings", lambda store, keys, version: told)
    done = rewrite(lab)
    assert done.point == 0
    assert done.busy is not None
    assert standing.value in done.busy
    assert newest(lab) == before


def test_credentials_that_may_not_add_leave_everything_as_it_is(tmp_path: Path) -> None:
    class MayNotAdd(_Around):
        def _call(self, kind: str, key: str, sent: int, work: Callable[[], T]) -> T:
            if kind == "create" and "/segments/" in key:
                raise StoreRefusedError("403", key=key)
            return work()

    lab = thinned(tmp_path)
    before = newest(lab)
    done = rewrite(lab, store=MayNotAdd(lab.store))
    assert (done.point, done.busy is None) == (0, False)
    assert newest(lab) == before
    lab.patch(0, random_blocks(7, 1))
    recording = RecordingStore(lab.store)
    lab.replicate(store=recording)
    assert recording.counts["list"] == 0  # nothing was left over


def test_what_a_clone_needs_of_a_template_is_not_copied(tmp_path: Path) -> None:
    lab = thinned(tmp_path / "template")
    path = tmp_path / "clone.img"
    path.write_bytes(lab.contents()[0])
    found, _ = protection.protect(lab.store, lab.host, tenant="default", name="clone", disks=[path], seed_from="web 1")
    clone = Lab(tmp_path, lab.store, lab.host, found, (path,))
    clone.replicate()
    references = garbage.survey(lab.store, "default", workers=WORKERS)
    lent = segments_named(clone, newest(clone))
    assert all(references.is_lent(one) for one in lent if one.vm_id == lab.found.keys.vm_id)
    alone = rewriting.plan(lab.store, lab.host, lab.found, TERMS)
    beside = rewriting.plan(lab.store, lab.host, lab.found, TERMS, is_lent=references.is_lent)
    assert alone.segments & lent
    assert beside.segments == alone.segments - lent
    assert not rewriting.plan(lab.store, lab.host, found, replace(TERMS, percent=90)).segments & lent


# --- disks that are gone


def test_entries_of_a_disk_that_is_gone_go_when_maps_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 3)
    lab = make_lab(tmp_path, [random_blocks(1, 5), random_blocks(2, 6)])
    lab.replicate()
    lab.patch(0, random_blocks(3, 1), number=1)
    with_both = lab.replicate()
    protection.update(lab.store, lab.host, lab.found, disks=[lab.paths[0]])
    lab.paths = lab.paths[:1]
    lab.patch(0, random_blocks(4, 1))
    point = lab.replicate()
    assert len(point.maps) == 1
    entries = sum(one.entries for one in point.maps)
    assert entries == point.disks[0].data_blocks == 5
    assert all(part.last_key < 1 << 48 for one in point.maps for part in one.parts)
    lab.assert_restores()  # the earlier points with both of their disks too
    assert len(with_both.disks) == 2
    first = segments_named(lab, with_both)
    assert first - segments_named(lab, point)


def test_rewriting_frees_the_room_of_a_disk_that_is_gone(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 8), random_blocks(2, 8)])
    lab.replicate()
    protection.update(lab.store, lab.host, lab.found, disks=[lab.paths[0]])
    lab.paths = lab.paths[:1]
    lab.replicate()
    before = {info.key for info in lab.store.list(lab.found.keys.segments)}
    done = rewritten(lab)
    assert done.copied_bytes == 0
    assert done.point == 3
    assert newest(lab).cycle.segments == 0
    collect(lab)
    left = {info.key for info in lab.store.list(lab.found.keys.segments)}
    assert len(before) - len(left) == 1
    lab.assert_restores(3)
    for key in before - left:
        with pytest.raises(ObjectMissingError):
            lab.store.get(key)
