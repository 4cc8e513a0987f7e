from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replica import catalog, verify
from replica.errors import NoStoreError, StoreUnavailableError, UsageError
from replica.health import journal, observing, report
from replica.health.assessment import Readiness, assess
from replica.health.observation import Event, EventKind, Observation
from replica.health.observing import Depth
from replica.health.rules import Severity
from replica.stores.memory import MemoryStore
from tests.support.encryption import encrypted_lab, sealed
from tests.support.engine import START, Lab, make_host, make_lab, random_blocks


class CountingStore:
    """A store that counts what is asked of it, and refuses to be written to."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return str(self._inner.url)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)  # no vault stands here
        if name == "skew_seconds":
            raise AttributeError(name)  # it tells no time
        assert name not in ("create", "replace", "delete"), "health reads only"
        self.asked[name] += 1
        return getattr(self._inner, name)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = make_lab(tmp_path, [random_blocks(1, 4)])
    yield made


def points(lab: Lab, count: int) -> None:
    for number in range(count):
        lab.patch(0, bytes([number, 1]) * 100)
        lab.replicate()
        lab.host.clock.advance(300)  # type: ignore[attr-defined]


def look(lab: Lab, depth: Depth = observing.BRIEF) -> Observation:
    return observing.observe(lab.store, lab.host, lab.found, depth)


def break_manifest(lab: Lab, number: int) -> None:
    key = lab.found.keys.manifest(number)
    lab.store.delete(key)
    lab.store.create(key, b"{broken")


def test_a_vm_is_told_from_the_store_alone(lab: Lab) -> None:
    points(lab, 3)
    seen = observing.observe(lab.store, make_host(name="elsewhere", clock=lab.host.clock), lab.found)  # type: ignore[arg-type]
    assert (seen.name, seen.listed, seen.interval_seconds, seen.source_host) == ("web 1", 3, 300, "host-a")
    assert [one.point for one in seen.samples] == [1, 2, 3]
    assert seen.samples[0].is_first and not seen.samples[1].is_first
    assert seen.samples[1].changed_bytes == 65536
    judged = assess(seen)
    assert (judged.health, judged.rpo_seconds, judged.statistics.misses) == (Severity.NORMAL, 300.0, 0)


def test_few_requests_however_many_points_there_are(lab: Lab) -> None:
    points(lab, 40)
    store = CountingStore(lab.store)
    found = catalog.find(store, "default", "web 1")  # type: ignore[arg-type]
    observing.observe(store, lab.host, found)  # type: ignore[arg-type]
    # Name, record, lease, settings, eight manifests; manifests and events listed.
    assert store.asked == {"get": 2 + 1 + 8, "get_tagged": 1, "list": 2}


def test_points_are_read_at_both_ends_and_spread_between(lab: Lab) -> None:
    points(lab, 30)
    read = [one.point for one in look(lab).samples]
    assert len(read) == 8
    assert (read[0], read[-3:]) == (1, [28, 29, 30])
    assert [one.point for one in look(lab, Depth(points=100)).samples] == list(range(1, 31))


def test_rpo_is_of_the_newest_point_whose_manifest_can_be_read(lab: Lab) -> None:
    points(lab, 6)
    for number in (4, 5, 6):
        break_manifest(lab, number)
    seen = look(lab)
    assert seen.damaged == {4, 5, 6}
    assert seen.newest_restorable is not None and seen.newest_restorable.point == 3
    assert assess(seen).rpo_seconds == 4 * 300
    assert "newest-damaged" in {one.rule_id for one in assess(seen).reasons}


def test_rpo_leaves_out_what_verification_found_damaged_until_all_was_whole(lab: Lab) -> None:
    points(lab, 3)
    lab.host.clock.advance(1)  # type: ignore[attr-defined]
    [segment] = [info.key for info in lab.store.list(lab.found.keys.segments) if f"/{3:020}/" in info.key]
    data = lab.store.get(segment)
    lab.store.delete(segment)
    assert look(lab).newest_restorable == look(lab).newest  # nobody has looked yet

    def verified(*, full: bool) -> None:
        lab.host.clock.advance(60)  # type: ignore[attr-defined]
        found = verify.verify(lab.store, lab.host, lab.found, full=full)
        journal.record_event(lab.store, lab.host, lab.found.keys, journal.verification(found, lab.host.clock.now()))

    verified(full=False)
    seen = look(lab)
    assert seen.damaged == {3} and seen.newest_restorable is not None and seen.newest_restorable.point == 2
    lab.store.create(segment, data)
    verified(full=False)
    assert look(lab).damaged == {3}, "a look at presence and sizes does not say that what was damaged is whole"
    verified(full=True)
    seen = look(lab)
    assert seen.damaged == frozenset() and seen.last_verify is not None and seen.last_verify.result == "whole"


def test_the_last_drill_is_read_and_a_damaged_event_is_named(lab: Lab) -> None:
    points(lab, 1)
    for minute, result in enumerate(("passed", "failed")):
        at = START.replace(minute=10 + minute)
        key = journal.record_event(lab.store, lab.host, lab.found.keys, Event(EventKind.DRILL, at, result))
    seen = look(lab)
    assert seen.last_drill is not None and seen.last_drill.result == "failed"
    assert len(look(lab, Depth(drills=10)).drills) == 2
    lab.store.delete(key)
    lab.store.create(key, b"{broken")
    seen = look(lab)
    assert seen.drills == () and key in seen.warnings[0]


def test_removed_points_are_asked_for_only_where_wanted(lab: Lab) -> None:
    points(lab, 6)
    everything = look(lab, Depth(points=100)).samples
    journal.remember(lab.store, lab.found.keys, everything[:3])
    for number in (1, 2, 3):
        lab.store.delete(lab.found.keys.manifest(number))
    assert look(lab).remembered == ()
    assert look(lab, Depth(remembered=100)).timeline == everything


def test_a_vm_that_cannot_be_read_is_in_the_report_as_such(lab: Lab) -> None:
    make_lab(lab.folder / "two", [random_blocks(2, 2)], store=lab.store, host=lab.host, name="web 2")
    points(lab, 1)
    key = lab.found.keys.lease
    lab.store.delete(key)
    lab.store.create(key, b"{broken")
    made = report.report(lab.store, lab.host, "default")
    assert [(one.seen.name, [r.rule_id for r in one.reasons]) for one in made.assessments] == [
        ("web 1", ["unreadable"]),
        ("web 2", ["no-point"]),
    ]
    assert key in made.assessments[0].reasons[0].evidence
    assert made.health is Severity.CRITICAL


def test_a_name_that_no_vm_has_is_a_mistake_and_no_reason(lab: Lab) -> None:
    with pytest.raises(UsageError, match="no VM named"):
        report.report(lab.store, lab.host, "default", ["web 9"])


def test_a_store_that_does_not_answer_tells_nothing_of_the_vms(lab: Lab) -> None:
    class Silent(CountingStore):
        def get(self, key: str) -> bytes:
            if "/vms/" in key:
                raise StoreUnavailableError("no answer", key=key)
            return bytes(self._inner.get(key))

    with pytest.raises(StoreUnavailableError):
        report.report(Silent(lab.store), lab.host, "default")  # type: ignore[arg-type]


def test_where_there_is_no_store_that_is_said(lab: Lab) -> None:
    with pytest.raises(NoStoreError):
        report.report(MemoryStore("empty"), lab.host, "default")


def test_a_vm_without_its_key_is_not_called_healthy(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    lab = encrypted_lab(tmp_path, [random_blocks(1, 2)], inner)
    lab.replicate()
    [judged] = report.report(sealed(inner, None), lab.host, "default").assessments
    assert [one.rule_id for one in judged.reasons] == ["key-missing"]
    assert (judged.health, judged.readiness) == (Severity.CRITICAL, Readiness.NOT_READY)
    [judged] = report.report(sealed(inner), lab.host, "default").assessments
    assert (judged.health, judged.seen.encrypted) == (Severity.NORMAL, True)


def test_what_is_written_of_an_encrypted_vm_is_sealed(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    lab = encrypted_lab(tmp_path, [random_blocks(1, 2)], inner)
    lab.replicate()
    event = Event(EventKind.DRILL, START, "passed", "secret-host", detail="a secret")
    key = journal.record_event(lab.store, lab.host, lab.found.keys, event)
    journal.remember(lab.store, lab.found.keys, look(lab).samples)
    [piece] = [info.key for info in inner.list(lab.found.keys.histories)]
    assert b"secret" not in inner.get(key) and b"created_at" not in inner.get(piece)
    assert look(lab).last_drill == event
    assert [one.point for one in journal.remembered(lab.store, lab.found.keys, 9)] == [1]


def test_a_fleet_is_looked_at_with_a_fixed_number_of_requests_for_each_vm(tmp_path: Path) -> None:
    store = MemoryStore("fleet")
    host = make_host(tmp_path)
    labs = [
        make_lab(tmp_path / str(number), [random_blocks(number, 1)], store=store, host=host, name=f"vm {number}")
        for number in range(10)
    ]
    for lab in labs:
        lab.replicate()
    counting = CountingStore(store)
    made = report.report(counting, host, "default", at_once=2)  # type: ignore[arg-type]
    assert [one.seen.name for one in made.assessments] == [f"vm {number}" for number in range(10)]
    # The store's record; names listed; for each VM name, record, lease, settings and its only manifest, and two LISTs.
    # And twice looked for digests, of which there are none.
    assert counting.asked == {"get": 1 + 10 * 4, "get_tagged": 10, "list": 1 + 10 * 2 + 2}


def test_the_search_for_a_point_that_restores_goes_on_past_many_that_do_not(lab: Lab) -> None:
    points(lab, 12)
    event = Event(EventKind.VERIFY, lab.host.clock.now(), "damaged", points=tuple(range(5, 13)))
    journal.record_event(lab.store, lab.host, lab.found.keys, event)
    seen = look(lab, Depth(points=3))
    assert seen.newest_restorable is not None and seen.newest_restorable.point == 4
    assert assess(seen).rpo_seconds == 9 * 300
