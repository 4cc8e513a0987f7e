"""Locks: what is kept while they last, what goes when they have ended, and that they are prolonged in time."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from replica import catalog, garbage, immutability, keys, prune, record, retention, tenantkey
from replica.condemned import read_all
from replica.errors import ConfigurationError, IntegrityError, ObjectLockedError, UsageError
from replica.garbage import Collection
from replica.keys import VmKeys
from replica.locking import Locks, Terms, decode, encode
from replica.stores.memory import MemoryStore
from replica.stores.retry import ResilientStore
from replica.stores.store import Store
from tests.support.encryption import OTHER_SECRET, SECRET, vault_for
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.locking_store import LockingMemoryStore

BLOCKS = 12
DAY = timedelta(days=1)
PERIOD = 8 * DAY
LAST = retention.parse("last:1")


@pytest.fixture(autouse=True)
def _merged_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 3)
    monkeypatch.setattr("replica.packer.SEGMENT_FRAMES", 3)


class Locked:
    """A VM in a store that locks, with a wrapper of each kind before it."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.bare = LockingMemoryStore(self.clock, Terms(PERIOD))
        self.store: Store = ResilientStore(vault_for().around(self.bare))
        self.host = make_host(clock=self.clock)
        catalog.init_store(self.store, self.host, Terms(PERIOD))
        self.lab: Lab = make_lab(folder, [random_blocks(1, BLOCKS)], store=self.store, host=self.host)

    def replicate(self, turn: int) -> None:
        for block in range(BLOCKS - 4):
            self.lab.patch(block * BLOCK, random_blocks(turn * 100 + block, 1))
        self.lab.replicate()

    def advance(self, span: timedelta) -> None:
        self.clock.advance(span.total_seconds())

    def collect(self) -> Collection:
        references = garbage.survey(self.store, "default", workers=WORKERS)
        return garbage.collect(self.store, self.host, self.lab.found, references, grace=timedelta(0), workers=WORKERS)


def test_the_store_s_record_says_for_how_long(tmp_path: Path) -> None:
    store = Locked(tmp_path).store
    assert catalog.read_store(store).terms == Terms(PERIOD)
    assert catalog.init_store(store, make_host(), Terms(DAY))[0].terms == Terms(PERIOD)
    plain = MemoryStore()
    made, _ = catalog.init_store(plain, make_host())
    assert made.terms is None
    assert catalog.read_store(plain).terms is None
    assert b"immutable" not in plain.get(keys.STORE)
    for wrong in (0, -1, 10**12, "8", True):
        with pytest.raises(IntegrityError):
            decode(record.Fields({"immutable_seconds": wrong}, "godwit.json"))
    assert decode(record.Fields(encode(Terms(DAY)), "godwit.json")) == Terms(DAY)
    for span in (timedelta(0), timedelta(days=40_000)):
        with pytest.raises(UsageError):
            Terms(span)


def test_a_store_without_locks_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Object Lock"):
        immutability.prepare(MemoryStore(), DAY)
    lab = make_lab(tmp_path, [random_blocks(1, 2)])
    with pytest.raises(ConfigurationError, match="not immutable"):
        immutability.prolong(lab.store, lab.host, lab.found)
    for found, wanted in ((None, Terms(DAY)), (Terms(PERIOD), Terms(DAY))):
        with pytest.raises(ConfigurationError, match="already is a store"):
            immutability.require_terms(found, wanted)
    immutability.require_terms(Terms(DAY), Terms(DAY))
    immutability.require_terms(Terms(DAY), None)


def test_pruning_and_collecting_wait_for_locks_to_end(tmp_path: Path) -> None:
    site = Locked(tmp_path)
    for turn in range(4):
        site.replicate(turn)
    done = prune.prune(site.store, site.host, site.lab.found, rule=LAST)
    assert (done.removed, done.locked, done.pinned) == ((), (1, 2, 3), ())
    assert [one.point for one in done.kept] == [1, 2, 3, 4]
    site.lab.assert_restores()

    site.advance(PERIOD * 3 / 2)
    done = prune.prune(site.store, site.host, site.lab.found, rule=LAST)
    assert ([one.point for one in done.removed], done.locked) == ([1, 2, 3], ())
    # Somebody locked a part of what is garbage for longer.
    condemned = site.collect().condemned
    assert condemned.objects >= 3
    garbage_keys = {site.lab.found.keys.prefix + key for one in _lists(site) for key in one}
    held = min(garbage_keys)
    size = site.bare.head(held).size
    site.bare.lock(held, "1", site.clock.now() + DAY)
    second = site.collect()
    assert second.locked == garbage.Amount(1, size)
    assert second.deleted == garbage.Amount(condemned.objects - 1, condemned.bytes - size)
    assert second.waiting == second.locked
    assert held in {info.key for info in site.bare.list("tenants/")}
    site.advance(DAY)
    third = site.collect()
    assert (third.deleted.objects, third.waiting.objects, third.locked.objects) == (1, 0, 0)
    assert _lists(site) == []
    site.lab.assert_restores(4)


def _lists(site: Locked) -> list[set[str]]:
    return [set(one.sizes) for one in read_all(site.store, site.lab.found.keys, site.clock.now())]


def test_whatever_a_point_needs_is_locked_for_the_whole_period_if_locks_are_prolonged_in_time(tmp_path: Path) -> None:
    """Points at any moment, locks prolonged every quarter of the period: at no moment less is kept than was said."""
    site = Locked(tmp_path)
    quarter = PERIOD / 4
    requests = []
    for turn in range(16):
        site.lab.patch((turn % BLOCKS) * BLOCK, random_blocks(5000 + turn, 1))
        point = site.lab.replicate()
        for key in _needs(site, point.point):
            assert site.bare.ends[key] >= site.clock.now() + PERIOD, (turn, key)
        if turn % 2:
            done = immutability.prolong(site.store, site.host, site.lab.found, workers=WORKERS)
            assert done.missing == ()
            assert done.locked_until >= site.clock.now() + PERIOD
            requests.append(done.prolonged / done.objects)
        site.advance(quarter / 2)
    assert sum(requests) / len(requests) <= 1
    assert min(requests) < 1  # what is locked for long enough is left alone


def _needs(site: Locked, number: int) -> set[str]:
    found = site.lab.found
    needed = set(immutability._needed(site.store, site.host, found, retention.parse("last:1"), WORKERS))
    assert found.keys.manifest(number) in needed
    assert {keys.STORE, found.keys.vm, keys.name("default", found.vm.name)} <= needed
    assert any("/segments/" in key for key in needed)
    assert any("/maps/" in key for key in needed)
    return needed


def test_only_what_kept_points_need_is_prolonged(tmp_path: Path) -> None:
    site = Locked(tmp_path)
    for turn in range(4):
        site.replicate(turn)
    site.advance(PERIOD)
    before = dict(site.bare.ends)
    dry = immutability.prolong(site.store, site.host, site.lab.found, rule=LAST, dry_run=True, workers=WORKERS)
    assert site.bare.ends == before
    done = immutability.prolong(site.store, site.host, site.lab.found, rule=LAST, workers=WORKERS)
    assert (done.objects, done.prolonged) == (dry.objects, dry.prolonged)
    manifests = site.lab.found.keys.manifest
    assert site.bare.ends[manifests(1)] == before[manifests(1)]
    assert site.bare.ends[manifests(4)] > before[manifests(4)]
    site.advance(PERIOD / 2)
    assert [one.point for one in prune.prune(site.store, site.host, site.lab.found, rule=LAST).removed] == [1, 2, 3]


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    site = Locked(tmp_path)
    site.replicate(1)
    segment = next(info.key for info in site.bare.list(site.lab.found.keys.segments))
    MemoryStore.delete(site.bare, segment)
    done = immutability.prolong(site.store, site.host, site.lab.found, workers=WORKERS)
    assert done.missing == (segment,)


def test_a_rotation_says_that_the_old_secret_still_opens_the_key(tmp_path: Path) -> None:
    site = Locked(tmp_path)
    tenantkey.init(site.store, site.host, "default", SECRET)
    site.advance(DAY)
    with pytest.raises(ObjectLockedError, match="rotate again"):
        tenantkey.rotate(site.store, site.host, "default", SECRET, OTHER_SECRET)
    for secret in (SECRET, OTHER_SECRET):
        assert len(tenantkey.open_master(site.store, "default", secret)) == 32


def test_locks_are_found_behind_other_stores(tmp_path: Path) -> None:
    site = Locked(tmp_path)
    locks = Locks(site.store)
    vm = site.lab.found.keys.vm
    assert locks.first_versions(vm) == {vm: "1"}
    assert locks.locked_until(vm, "1") == site.clock.now() + PERIOD * 3 / 2
    locks.check()
    assert VmKeys("default", "0" * 32).vm not in locks.first_versions("tenants/")
