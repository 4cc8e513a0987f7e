"""Digests: what they say is what looking would have said, they cost little, and no old or false one misleads."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash
import zstandard

from replica import catalog, changes, keys, verify
from replica.errors import (
    FormatVersionError,
    GodwitError,
    IntegrityError,
    StoreRefusedError,
    TenantKeyError,
)
from replica.health import digest, gathering, journal, report
from replica.health.assessment import assess
from replica.health.digest import Digest, Opener
from replica.health.gathering import Gatherer
from replica.health.observation import AgentNote, Event, EventKind, Observation, PointSample
from replica.health.observing import observe, observe_named
from replica.health.publishing import HEARTBEAT, LOOK_AGAIN, Publisher, Watched, _Known
from replica.host import Host
from replica.model import Vm
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData, Store
from replica.vault import Vault
from tests.support.encryption import encrypted_lab, sealed
from tests.support.engine import START, Lab, make_host, make_lab, random_blocks
from tests.support.health import HOSTILE_NAMES, NOW, every, healthy
from tests.support.store_doubles import RecordingStore

TENANT = "default"
MINUTE = timedelta(minutes=1)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    yield make_lab(tmp_path, [random_blocks(1, 4)])


def advance(lab: Lab, seconds: float) -> None:
    lab.host.clock.advance(seconds)  # type: ignore[attr-defined]


def watched(*labs: Lab, state: str = "waiting", **more: object) -> list[Watched]:
    return [Watched(one.found, state, **more) for one in labs]  # type: ignore[arg-type]


def publisher(lab: Lab) -> Publisher:
    return Publisher(lab.host, TENANT)


def gather(store: Store, host: Host) -> dict[str, Observation]:
    return {one.name: one for one in Gatherer(store, host, TENANT, rows=range).gather().seen}


def elsewhere(lab: Lab) -> Host:
    return make_host(name="recovery", clock=lab.host.clock)  # type: ignore[arg-type]


def bare(seen: Observation) -> Observation:
    """Return what is told of the VM itself, whoever told it."""
    return replace(seen, as_of=None, agent=None, store_skew_seconds=None, source_skew_seconds=None, free_space=None)


def cycle(lab: Lab, made: Publisher | None = None) -> None:
    """Replicate, as an agent does."""
    lab.patch(0, random.Random(len(lab.published)).randbytes(100))
    point = lab.replicate()
    if made is not None:
        seen = observe(lab.store, lab.host, lab.found)
        made.note_cycle(lab.found.keys.vm_id, point, seen.epoch, seen.settings_version)


def digest_keys(store: Store) -> list[str]:
    return [info.key for info in store.list(keys.digests(TENANT))]


# --- what they say


def test_what_a_digest_says_is_what_looking_would_have_said(lab: Lab) -> None:
    made = publisher(lab)
    for _ in range(3):
        cycle(lab)
        advance(lab, 300)
    verified = verify.verify(lab.store, lab.host, lab.found)
    journal.record_event(lab.store, lab.host, lab.found.keys, journal.verification(verified, lab.host.clock.now()))
    journal.record_event(
        lab.store, lab.host, lab.found.keys, Event(EventKind.DRILL, lab.host.clock.now(), "passed", detail="d" * 200)
    )
    made.publish(lab.store, watched(lab, failures=1, error="no room", hint="make some"))
    for _ in range(2):
        direct = observe_named(lab.store, lab.host, TENANT, "web 1")
        [told] = gather(lab.store, elsewhere(lab)).values()
        assert bare(told) == bare(direct)
        assert told.as_of == lab.host.clock.now() and told.agent is not None
        assert (told.agent.host_name, told.agent.failures, told.agent.error) == (lab.host.host_name, 1, "no room")
        assert told.free_space is not None and direct.free_space is not None
        assert told.free_space.path == direct.free_space.path
        # What is known of a cycle is enough: nothing is looked at for it.
        cycle(lab, made)
        assert made.publish(lab.store, watched(lab, failures=1, error="no room", hint="make some")).looked_at == 0


def test_what_removed_points_were_stays_in_the_digest(lab: Lab) -> None:
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    for _ in range(6):
        cycle(lab, made)
        advance(lab, 300)
    before = gather(lab.store, lab.host)["web 1"]
    assert before.listed == 0, "nothing was written yet"
    for number in (1, 2):
        lab.store.delete(lab.found.keys.manifest(number))
    made.note_doubt(lab.found.keys.vm_id)
    assert made.publish(lab.store, watched(lab)).looked_at == 1
    seen = gather(lab.store, lab.host)["web 1"]
    assert [one.point for one in seen.remembered] == [1, 2]
    assert [one.point for one in seen.samples] == [3, 4, 5, 6]
    assert seen.listed == 4


def test_what_rules_look_at_of_a_point_comes_through_a_digest_that_holds_fewer_points() -> None:
    points = every(5 * MINUTE, 900)
    odd = replace(points[-1], not_followed=True, not_quiesced=True, rewritten=True, is_first=True)
    note = AgentNote("host-a", NOW, "waiting")
    seen = healthy(samples=(*points[:-1], odd), encrypted=False, agent=note)
    written = Digest(TENANT, 0, "ab" * 16, "host-a", NOW, (seen,))
    read, _ = digest.decode(bytes(digest.encode(written, None)), key=written.key, sealer=lambda: None)
    assert read.seen[0].samples[-2:] == (points[-2], odd)
    assert "checkpoint-not-followed" in [one.rule_id for one in assess(replace(read.seen[0], at=NOW)).reasons]


def test_a_digest_holds_as_many_points_as_a_plot_needs() -> None:
    points = every(5 * MINUTE, 900)
    kept = digest.thinned(points, 40)
    assert len(kept) == 40 and kept[0] == points[0] and kept[-10:] == points[-10:]
    ages = [(NOW - one.created_at).total_seconds() for one in kept]
    assert ages == sorted(ages, reverse=True)
    assert all(before / after < 2.5 for before, after in itertools.pairwise(ages[:-10])), "no hole"
    growing: tuple[PointSample, ...] = ()
    for one in points[:700]:  # as an agent thins them: one by one
        growing = digest.thinned((*growing, one), 40)
    assert growing[0] == points[0] and growing[-10:] == points[690:700]
    told = [digest.brief_rows(count) for count in (0, 1, 8, 9, 40)]
    assert told[:3] == [[], [0], [*range(8)]] and all(len(one) <= 8 for one in told)
    assert told[4][0] == 0 and told[4][-4:] == [36, 37, 38, 39]


def test_a_cycle_that_does_not_follow_what_is_known_has_the_vm_looked_at(lab: Lab) -> None:
    made = publisher(lab)
    cycle(lab)
    made.publish(lab.store, watched(lab))
    cycle(lab)  # by another
    cycle(lab, made)
    assert made.publish(lab.store, watched(lab)).looked_at == 1
    assert gather(lab.store, lab.host)["web 1"].listed == 3


class Meanwhile(RecordingStore):
    """A store in which something happens while a lease is read."""

    def __init__(self, inner: Store, happen: Callable[[], object]) -> None:
        super().__init__(inner)
        self.happen = happen

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        found = super().get_tagged(key)
        if key.endswith("/lease.json"):
            self.happen()
        return found


def test_what_happens_while_a_vm_is_looked_at_has_it_looked_at_again(lab: Lab) -> None:
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    made.note_doubt(lab.found.keys.vm_id)
    made.publish(Meanwhile(lab.store, lambda: made.note_doubt(lab.found.keys.vm_id)), watched(lab))
    assert gather(lab.store, lab.host)["web 1"].as_of == lab.host.clock.now()
    assert made.publish(lab.store, watched(lab)).looked_at == 1
    assert made.publish(lab.store, watched(lab)).looked_at == 0


def test_a_vm_is_looked_at_once_a_day_in_any_case(lab: Lab) -> None:
    made = publisher(lab)
    assert made.publish(lab.store, watched(lab)).looked_at == 1
    advance(lab, LOOK_AGAIN.total_seconds())
    assert made.publish(lab.store, watched(lab)).looked_at == 0
    advance(lab, 1)
    assert made.publish(lab.store, watched(lab)).looked_at == 1


# --- when they are written


def test_a_digest_is_written_where_something_changed_or_it_was_not_for_long(lab: Lab) -> None:
    made = publisher(lab)
    assert made.publish(lab.store, watched(lab)).written == 1
    advance(lab, 60)
    assert made.publish(lab.store, watched(lab)).written == 0
    assert made.publish(lab.store, watched(lab, state="retrying")).written == 1
    cycle(lab, made)
    assert made.publish(lab.store, watched(lab, state="retrying")).written == 1
    advance(lab, HEARTBEAT.total_seconds())
    assert made.publish(lab.store, watched(lab, state="retrying")).written == 1


def test_the_room_that_there_is_is_looked_at_in_every_turn(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"percent": 50.0}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=int(free["percent"] * 1000), total=100_000))
    made = publisher(lab)
    sources = tuple(map(str, lab.paths))
    assert made.publish(lab.store, watched(lab, sources=sources)).written == 1
    free["percent"] = 49.9
    assert made.publish(lab.store, watched(lab, sources=sources)).written == 0, "that is nothing new"
    free["percent"] = 5.0
    assert made.publish(lab.store, watched(lab, sources=sources)).written == 1
    [judged] = report.report(lab.store, elsewhere(lab), TENANT).assessments
    assert [one.observed for one in judged.doubts if one.rule_id == "free-space"] == [5.0]


def test_a_turn_costs_little(lab: Lab) -> None:
    made = publisher(lab)
    store = RecordingStore(lab.store)
    made.publish(store, watched(lab))
    store.forget()
    cycle(lab, made)
    made.publish(store, watched(lab))
    assert [(one.kind, one.key.split("/")[3]) for one in store.requests] == [
        ("list", "changes"),
        ("replace", "digests"),
    ]


def test_a_machine_that_starts_again_goes_on_with_its_digests(lab: Lab) -> None:
    cycle(lab)
    publisher(lab).publish(lab.store, watched(lab))
    cycle(lab)
    again = publisher(lab)
    assert again.publish(lab.store, watched(lab)).looked_at == 1, "what it missed"
    assert len(digest_keys(lab.store)) == 1
    assert gather(lab.store, lab.host)["web 1"].listed == 2


def test_what_another_process_of_the_machine_wrote_is_written_over(lab: Lab) -> None:
    one, other = publisher(lab), publisher(lab)
    one.publish(lab.store, watched(lab))
    advance(lab, 1)
    other.publish(lab.store, watched(lab))
    cycle(lab, one)
    assert one.publish(lab.store, watched(lab)).written == 1
    assert gather(lab.store, lab.host)["web 1"].listed == 1
    lab.store.delete(digest_keys(lab.store)[0])
    cycle(lab, one)
    assert one.publish(lab.store, watched(lab)).written == 1


def test_a_vm_that_is_not_watched_any_more_leaves_the_digest(lab: Lab) -> None:
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    assert made.publish(lab.store, []).written == 1
    assert made.publish(lab.store, []).written == 0
    seen = gather(lab.store, lab.host)["web 1"]
    assert seen.as_of is None, "it is looked at directly"


def test_a_vm_whose_name_is_gone_is_none(lab: Lab) -> None:
    publisher(lab).publish(lab.store, watched(lab))
    lab.store.delete(keys.name(TENANT, "web 1"))
    assert gather(lab.store, lab.host) == {}


def test_a_vm_that_cannot_be_read_is_left_to_whoever_looks_directly(lab: Lab) -> None:
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    lab.store.delete(lab.found.keys.lease)
    lab.store.create(lab.found.keys.lease, b"{broken")
    made.note_doubt(lab.found.keys.vm_id)
    done = made.publish(lab.store, watched(lab))
    assert (done.looked_at, done.waiting) == (1, 1)
    assert "lease.json" in (gather(lab.store, lab.host)["web 1"].unread or "")


# --- who is believed


def write(store: Store, host: Host, seen: Sequence[Observation], number: int = 0) -> str:
    """Write a digest of VMs that were made up."""
    told = Digest(TENANT, number, host.host_id, host.host_name, host.clock.now(), tuple(seen))
    store.create(told.key, digest.encode(told, None))
    return told.key


def test_of_two_digests_of_a_vm_the_later_epoch_counts(lab: Lab) -> None:
    cycle(lab)
    seen = replace(observe(lab.store, lab.host, lab.found), as_of=lab.host.clock.now())
    write(lab.store, elsewhere(lab), [replace(seen, epoch=seen.epoch + 1, listed=77)])
    advance(lab, 60)
    write(lab.store, lab.host, [seen])
    assert gather(lab.store, lab.host)["web 1"].listed == 77
    key = write(lab.store, make_host(name="third"), [replace(seen, epoch=seen.epoch + 1, listed=99, samples=())])
    assert gather(lab.store, lab.host)["web 1"].listed == 77, "of the same epoch the one with the newer point"
    lab.store.delete(key)


def test_a_vm_that_was_changed_elsewhere_is_looked_at_directly(lab: Lab) -> None:
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    catalog.update_settings(lab.store, elsewhere(lab), lab.found, interval_seconds=900)
    seen = gather(lab.store, lab.host)["web 1"]
    assert (seen.as_of, seen.interval_seconds) == (None, 900)
    made.publish(lab.store, watched(lab))
    seen = gather(lab.store, lab.host)["web 1"]
    assert (seen.as_of, seen.interval_seconds) == (lab.host.clock.now(), 900)
    advance(lab, 1)
    event = Event(EventKind.DRILL, lab.host.clock.now(), "failed")
    journal.record_event(lab.store, elsewhere(lab), lab.found.keys, event)
    seen = gather(lab.store, lab.host)["web 1"]
    assert seen.as_of is None and seen.last_drill is not None
    made.publish(lab.store, watched(lab))
    seen = gather(lab.store, lab.host)["web 1"]
    assert seen.as_of is not None and seen.last_drill is not None


class Refusing(MemoryStore):
    """A store whose policy knows nothing of marks."""

    def create(self, key: str, data: ObjectData) -> str:
        if "/fleet/" in key:
            raise StoreRefusedError("access denied", key=key)
        return super().create(key, data)


def test_a_mark_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, [random_blocks(1, 2)], store=Refusing("refusing"))
    assert catalog.update_settings(lab.store, lab.host, lab.found, interval_seconds=900).version == 2
    key = journal.record_event(lab.store, lab.host, lab.found.keys, Event(EventKind.DRILL, START, "passed"))
    assert lab.store.head(key) and list(changes.listed(lab.store, TENANT)) == []
    with pytest.raises(StoreRefusedError):
        publisher(lab).publish(lab.store, watched(lab))
    assert gather(lab.store, lab.host)["web 1"].interval_seconds == 900


def test_a_digest_that_was_not_written_for_long_is_named(lab: Lab) -> None:
    cycle(lab)
    publisher(lab).publish(lab.store, watched(lab))
    advance(lab, 3600)
    [judged] = report.report(lab.store, elsewhere(lab), TENANT).assessments
    assert {"agent-silent", "rpo-late"} <= {one.rule_id for one in judged.reasons}
    assert judged.rpo_seconds == 3600, "it is at most that old"
    [judged] = report.report(lab.store, elsewhere(lab), TENANT, fresh=True).assessments
    assert "agent-silent" not in {one.rule_id for one in judged.reasons}
    [judged] = report.report(lab.store, elsewhere(lab), TENANT, ["web 1"]).assessments
    assert judged.seen.as_of is None, "who is asked for by name is looked at"


def test_a_lease_that_was_held_when_the_agent_wrote_is_no_cycle_that_was_cut_off() -> None:
    at = NOW - MINUTE
    seen = healthy(lease_held=True, lease_expires_at=NOW - MINUTE / 2, as_of=at)
    assert "cycle-cut-off" not in {one.rule_id for one in assess(seen).reasons}
    assert "cycle-cut-off" in {one.rule_id for one in assess(replace(seen, as_of=NOW)).reasons}


def test_cycles_that_may_have_been_made_since_do_not_count_as_missed() -> None:
    made = healthy(samples=every(10 * timedelta(seconds=1), 200, newest_age=MINUTE), interval_seconds=10)
    told = assess(replace(made, as_of=NOW - MINUTE))
    assert (assess(made).statistics.misses, told.statistics.misses) == (5, 0)


# --- encrypted VMs


def test_a_digest_of_encrypted_vms_is_sealed(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    lab = encrypted_lab(tmp_path, [random_blocks(1, 2)], inner)
    cycle(lab)
    made = publisher(lab)
    made.publish(lab.store, watched(lab, error="a secret of web 1"))
    [key] = digest_keys(inner)
    data = inner.get(key)
    assert data[:8] == b"GWSEALED" and b"web 1" not in data and b"secret" not in data
    seen = gather(lab.store, elsewhere(lab))["web 1"]
    assert seen.encrypted and seen.as_of is not None and seen.agent is not None and seen.agent.error is not None
    # Without the key the digest tells nothing, and the VM is shown for what it is.
    [judged] = report.report(sealed(inner, None), lab.host, TENANT).assessments
    assert [one.rule_id for one in judged.reasons] == ["key-missing"]
    again = publisher(lab)
    again.publish(lab.store, watched(lab))
    assert len(digest_keys(inner)) == 1


def test_nobody_without_the_key_can_speak_for_an_encrypted_vm(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    lab = encrypted_lab(tmp_path, [random_blocks(1, 2)], inner)
    cycle(lab)
    publisher(lab).publish(lab.store, watched(lab))
    true = gather(lab.store, lab.host)["web 1"]
    forged = replace(true, epoch=2**31, listed=9999)
    key = write(inner, make_host(name="thief"), [forged])
    assert gather(lab.store, lab.host)["web 1"] == true, "what says that it is encrypted belongs where it is sealed"
    inner.delete(key)
    write(inner, make_host(name="thief"), [replace(forged, encrypted=False)])
    assert gather(lab.store, lab.host)["web 1"] == true
    # Moved under another name it does not open.
    [sealed_key] = [one for one in digest_keys(inner) if inner.get(one)[:8] == b"GWSEALED"]
    data = inner.get(sealed_key)
    inner.delete(sealed_key)
    inner.create(keys.digest(TENANT, lab.host.host_id, 5), data)
    gathered = Gatherer(lab.store, lab.host, TENANT).gather()
    assert any("does not open" in one for one in gathered.warnings)


def test_where_encryption_is_required_no_plain_digest_is_believed(lab: Lab) -> None:
    publisher(lab).publish(lab.store, watched(lab))
    store = Vault(lambda: None, require=True).around(lab.store)
    [seen] = Gatherer(store, lab.host, TENANT).gather().seen
    assert seen.as_of is None and "require_encryption" in (seen.unread or "")


def test_encrypted_and_plain_vms_are_told_apart(tmp_path: Path) -> None:
    inner = MemoryStore("mixed")
    lab = encrypted_lab(tmp_path / "a", [random_blocks(1, 2)], inner)
    other = make_lab(tmp_path / "b", [random_blocks(2, 2)], store=lab.store, host=lab.host, name="plain")
    publisher(lab).publish(lab.store, watched(lab, other))
    assert sorted(inner.get(key)[:8] for key in digest_keys(inner)) == [b"GWDIGEST", b"GWSEALED"]
    seen = gather(sealed(inner, None), lab.host)
    assert seen["plain"].as_of is not None and seen["web 1"].key_missing


# --- a fleet, and what it costs


def made_up(count: int, store: MemoryStore) -> list[Observation]:
    """Put the names of so many VMs into a store, and return what there is to tell of them."""
    host = make_host()
    catalog.init_store(store, host)
    one = digest.shortened(healthy(as_of=NOW))
    found = [replace(one, name=f"vm-{number:05}", vm_id=f"{number:032x}") for number in range(count)]
    for one in found:
        store.create(keys.name(TENANT, one.name), b"{}")
    return found


def test_a_fleet_costs_at_most_a_few_objects_for_a_hundred_vms() -> None:
    inner = MemoryStore("fleet")
    told = made_up(300, inner)
    for number, host in enumerate("abc"):
        write(inner, make_host(name=host), told[number * 100 : number * 100 + 100])
    store = RecordingStore(inner)
    made = report.report(store, make_host(), TENANT)
    assert len(made.assessments) == 300 and made.direct == 0
    assert store.counts == {"get": 1 + 3, "list": 3}  # the store's record, digests; names, digests, changes listed
    gatherer = Gatherer(store, make_host(), TENANT)
    gatherer.gather()
    store.forget()
    gatherer.gather()
    assert store.counts == {"get": 1, "list": 3}, "what did not change is not read again"


def test_a_machine_with_many_vms_writes_several_digests(tmp_path: Path) -> None:
    store = MemoryStore("many")
    made = Publisher(make_host(), TENANT)
    known = made_up(230, store)
    for seen in known:
        made._known[seen.vm_id] = publishing_known(seen)
    labs = [Watched(catalog.ProtectedVm(keys.VmKeys(TENANT, one.vm_id), _vm(one)), "waiting") for one in known]
    made._loaded = True
    assert made.publish(store, labs).written == 3
    assert made.publish(store, labs[:150]).written == 2, "nothing changed in the first"
    counts = sorted(len(decoded(store, key).seen) for key in digest_keys(store))
    assert sum(counts) == 150 and max(counts) <= 100


def publishing_known(seen: Observation) -> _Known:
    return _Known(seen, NOW)


def _vm(seen: Observation) -> Vm:
    return Vm(seen.vm_id, seen.name, START, 1)


def decoded(store: Store, key: str) -> Digest:
    return digest.decode(store.get(key), key=key, sealer=Opener(store, TENANT))[0]


# --- sweeping


def test_old_digests_and_known_marks_go(lab: Lab) -> None:
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    write(lab.store, elsewhere(lab), [])
    catalog.update_settings(lab.store, lab.host, lab.found, interval_seconds=900)
    now = lab.host.clock.now()
    assert gathering.sweep(lab.store, TENANT, now) == 0, "the digest does not know of the change yet"
    made.publish(lab.store, watched(lab))
    assert gathering.sweep(lab.store, TENANT, now) == 1
    assert list(changes.listed(lab.store, TENANT)) == []
    advance(lab, 31 * 86400)
    made.publish(lab.store, watched(lab))
    assert gathering.sweep(lab.store, TENANT, lab.host.clock.now()) == 1
    assert [decoded(lab.store, key).host_name for key in digest_keys(lab.store)] == [lab.host.host_name]


def test_what_cannot_be_read_stays_and_so_do_marks_that_it_may_not_know(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    lab = encrypted_lab(tmp_path, [random_blocks(1, 2)], inner)
    publisher(lab).publish(lab.store, watched(lab))
    catalog.update_settings(lab.store, lab.host, lab.found, interval_seconds=900)
    assert gathering.sweep(sealed(inner, None), TENANT, START + timedelta(days=99)) == 0
    assert len(digest_keys(inner)) == 1 and len(list(changes.listed(inner, TENANT))) == 1


# --- damage


def test_a_damaged_digest_is_named_and_its_vms_are_looked_at(lab: Lab) -> None:
    publisher(lab).publish(lab.store, watched(lab))
    [key] = digest_keys(lab.store)
    data = bytearray(lab.store.get(key))
    data[-3] ^= 1
    lab.store.delete(key)
    lab.store.create(key, data)
    gathered = Gatherer(lab.store, lab.host, TENANT).gather()
    assert (gathered.direct, len(gathered.warnings)) == (1, 1) and "checksum" in gathered.warnings[0]
    made = publisher(lab)
    made.publish(lab.store, watched(lab))
    assert Gatherer(lab.store, lab.host, TENANT).gather().direct == 0


def test_every_truncation_and_flip_is_refused() -> None:
    told = Digest(
        TENANT, 3, "ab" * 16, "host", NOW, tuple(replace(healthy(), name=name, as_of=NOW) for name in HOSTILE_NAMES)
    )
    data = bytes(digest.encode(told, None))
    found, is_sealed = digest.decode(data, key=told.key, sealer=lambda: None)
    assert not is_sealed and [bare(one) for one in found.seen] == [bare(digest.shortened(one)) for one in told.seen]
    drawn = random.Random(1)
    for _ in range(60):
        flipped = bytearray(data)
        flipped[drawn.randrange(11) if drawn.random() < 0.3 else drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        if bytes(flipped[11:12]) != data[11:12]:
            continue  # the reserved byte means nothing
        with pytest.raises((IntegrityError, FormatVersionError)):
            digest.decode(bytes(flipped), key=told.key, sealer=lambda: None)
    for length in (0, 7, 8, 31, 32, 40, len(data) - 1):
        with pytest.raises(IntegrityError):
            digest.decode(data[:length], key=told.key, sealer=lambda: None)
    with pytest.raises(IntegrityError, match="mixed up"):
        digest.decode(data, key=keys.digest(TENANT, "ab" * 16, 4), sealer=lambda: None)


HOSTILE: dict[str, list[object]] = {
    "vms": [[], {}, 7, "x" * 3, [7], [{}], [{"vm_id": 3}]],
    "tenant": [None, "", "../x", "UPPER"],
    "number": [-1, 10_000, True, 1.5],
    "host_id": ["", "zz" * 16, 7],
    "written_at": ["", "9999-99-99", 7, "2026-01-01T00:00:00"],
}
HOSTILE_VM: dict[str, list[object]] = {
    "vm_id": ["", "AB" * 16],
    "interval_seconds": [0, -5, "300"],
    "standing": ["flying", 7],
    "points": [{}, [], {"point": [1]}],
    "removed": ["x", [1.5]],
    "drills": [{}, [7], [{}]],
    "verify": [7, {}],
    "changes": [[7], [["x", "y"]], [["2026-01-01T00:00:00Z", 7]]],
    "free_space": [7, {}, {"path": "/", "free_bytes": -1, "total_bytes": 1}],
    "agent": [None, {}, {"state": 7}],
    "skew_seconds": ["x", True],
    "epoch": [-1, 2**32],
    "damaged": [7, ["x"]],
}


def packed(body: object) -> bytes:
    """Return the object that holds ``body``, checksum and all."""
    text = json.dumps(body).encode()
    rest = zstandard.ZstdCompressor().compress(text)
    return digest._HEADER.pack(digest.MAGIC, 1, 0, len(text), xxhash.xxh3_128_digest(rest)) + rest


def test_hostile_content_is_refused_with_one_error() -> None:
    told = Digest(TENANT, 3, "ab" * 16, "host", NOW, (replace(healthy(), as_of=NOW, samples=every(MINUTE, 3)),))
    body = digest._unpack(bytes(digest.encode(told, None)), told.key)
    cases = [{**body, name: value} for name, values in HOSTILE.items() for value in values if value != []]
    cases += [
        {**body, "vms": [{**body["vms"][0], name: value}]} for name, values in HOSTILE_VM.items() for value in values
    ]
    cases += [{**body, "vms": body["vms"] * 101}, {}]
    for case in cases:
        with pytest.raises((IntegrityError, FormatVersionError)):
            digest.decode(packed(case), key=told.key, sealer=lambda: None)
    garbage: object
    for garbage in ([], 7, "x"):
        with pytest.raises(IntegrityError):
            digest.decode(packed(garbage), key=told.key, sealer=lambda: None)
    later = bytearray(packed(body))
    later[8] = 2
    with pytest.raises(FormatVersionError):
        digest.decode(bytes(later), key=told.key, sealer=lambda: None)


def test_a_digest_does_not_unpack_to_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack() -> None:
        pytest.fail("room was made for it")

    monkeypatch.setattr("zstandard.ZstdDecompressor", unpack)
    rest = zstandard.ZstdCompressor().compress(b"[" + b" " * (8 << 20) + b"]")
    data = digest._HEADER.pack(digest.MAGIC, 1, 0, 100, xxhash.xxh3_128_digest(rest)) + rest
    with pytest.raises(IntegrityError):
        digest.decode(data, key=keys.digest(TENANT, "ab" * 16, 0), sealer=lambda: None)


def test_the_key_is_asked_for_once_however_many_digests_there_are(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    encrypted_lab(tmp_path, [random_blocks(1, 2)], inner)
    opener = Opener(sealed(inner, None), TENANT)
    errors: list[GodwitError] = []
    for _ in range(2):
        with pytest.raises(TenantKeyError) as caught:
            opener()
        errors.append(caught.value)
    assert errors[0] is errors[1]


def test_an_agent_s_word_is_in_the_report_s_json() -> None:
    note = AgentNote("host-a", NOW, "retrying", 2, "no room", None, 4, None)
    told = report.document(assess(healthy(as_of=NOW, agent=note)))
    assert told["as_of"] == NOW and told["agent"]["failures"] == 2
    assert report.document(assess(healthy()))["agent"] is None
