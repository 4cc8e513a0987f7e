"""Units of work on a store in memory: what they do, and that giving up at any request leaves nothing half done."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from replica import catalog, garbage, history, lease
from replica.daemon import endpoint
from replica.daemon.around import AroundStore
from replica.daemon.bandwidth import Bucket
from replica.daemon.events import LEVELS
from replica.daemon.here import Here
from replica.daemon.site import Site
from replica.daemon.stopping import AbandonedError, StoppableStore, Stopper, Where
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Facts, Task, Unit, Verdict, perform
from replica.errors import IntegrityError, StoreUnavailableError
from replica.health import journal
from replica.health.observation import EventKind
from replica.plans.sweeping import KEPT
from replica.sampling import Budget
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData, Store
from replica.vault import Vault
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore
from tests.unit.test_plan_sweeping import Runs

CHECKOUT = Path(__file__).parents[2]


class Counting(AroundStore):
    """Does something before a chosen request."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.requests = itertools.count()
        self.at: int | None = None
        self.then: Callable[[], None] = lambda: None
        self.reached = False

    def before(self, kind: str, key: str, data: ObjectData = b"") -> None:
        if next(self.requests) == self.at:
            self.reached = True
            self.then()


def site_of(lab: Lab, store: Store, terms: AgentTerms | None = None, **more: Any) -> Site:
    chosen = terms or AgentTerms()
    bucket = Bucket(chosen.limits, lab.host.clock)
    return Site(lab.host, Vault(lambda: None), WORKERS, chosen, bucket, open_store=lambda *_: store, **more)


def unit_of(lab: Lab, task: Task, **more: Any) -> Unit:
    return Unit(task, "memory:x", "default", lab.found, 1, **more)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path / "lab", [random_blocks(1, 40)])


def test_a_cycle_makes_a_point_and_tells_of_settings_that_changed(lab: Lab) -> None:
    site = site_of(lab, lab.store)
    done = perform(unit_of(lab, Task.CYCLE), site)
    assert (done.verdict, done.fields["point"], done.facts) == (Verdict.DONE, 1, None)
    assert done.before is None
    catalog.update_settings(lab.store, lab.host, lab.found, interval_seconds=77)
    made = lab.host.clock.now()
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(60)
    done = perform(unit_of(lab, Task.CYCLE), site)
    assert done.facts is not None and done.before == made
    assert (done.facts.settings_version, done.facts.interval_seconds) == (2, 77)


def test_a_point_that_was_rewritten_does_not_tell_when_a_cycle_was_made(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.replicate()
    begin = history.begin

    def rewritten(*arguments: Any) -> Any:
        found = begin(*arguments)
        assert found is not None
        return replace(found, repeats=1)

    monkeypatch.setattr(history, "begin", rewritten)
    done = perform(unit_of(lab, Task.CYCLE), site_of(lab, lab.store))
    assert (done.verdict, done.before) == (Verdict.DONE, None)


def test_a_vm_whose_records_are_damaged_is_no_vm_that_cannot_be_reached(lab: Lab, tmp_path: Path) -> None:
    other = make_lab(tmp_path / "other", [bytes(BLOCK)], store=lab.store, host=make_host(name="host-b"), name="other")
    lab.store.delete(other.found.keys.lease)
    lab.store.create(other.found.keys.lease, b"damaged")
    found = perform(Unit(Task.REFRESH, "memory:x", "default"), site_of(lab, lab.store)).listing
    assert found is not None and found.unreachable == {}
    assert isinstance(found.facts["other"], IntegrityError)


def test_a_cycle_given_up_at_any_request_publishes_nothing_or_all_and_gives_the_lease_back(tmp_path: Path) -> None:
    outcomes = set()
    for at in itertools.count():
        lab = make_lab(tmp_path / str(at), [random_blocks(1, 40)], store=MemoryStore(f"{at}"))
        store = Counting(lab.store)
        site = site_of(lab, store)
        store.at, store.then = at, site.cycles.abandon
        result = perform(unit_of(lab, Task.CYCLE), site)
        outcomes.add(result.verdict)
        state, _ = lease.read(lab.store, lab.found.keys)
        assert not state.held, at
        points = [one.point for one in history.points(lab.store, lab.found.keys) if not isinstance(one, Exception)]
        assert len(points) <= 1
        assert points or result.verdict is Verdict.ABANDONED
        lab.replicate()
        lab.assert_restores()
        if not store.reached:
            break
    assert outcomes == {Verdict.DONE, Verdict.ABANDONED}
    assert at >= 7


def test_pruning_that_is_given_up_ends_its_batch_and_leaves_all_listed_points_whole(tmp_path: Path) -> None:
    for at in itertools.count():
        lab = make_lab(tmp_path / str(at), [random_blocks(1, 6)], store=MemoryStore(f"p{at}"))
        for number in range(4):
            lab.patch(BLOCK * number, b"change")
            lab.replicate()
        catalog.update_settings(lab.store, lab.host, lab.found, retention="last:1")
        store = Counting(lab.store)
        site = site_of(lab, store)
        store.at, store.then = at, site.care.abandon
        result = perform(unit_of(lab, Task.PRUNE), site)
        assert result.verdict in (Verdict.DONE, Verdict.ABANDONED)
        assert not lease.read(lab.store, lab.found.keys)[0].held, at
        listed = [one.point for one in history.points(lab.store, lab.found.keys) if not isinstance(one, Exception)]
        assert listed in ([1, 2, 3, 4], [4])
        lab.assert_restores(*listed)
        assert len(journal.remembered(lab.store, lab.found.keys, 100)) in ((3,) if listed == [4] else (0, 3))
        if not store.reached:
            assert listed == [4]
            break


def test_the_word_ends_waits_and_refuses_all_but_giving_a_lease_back() -> None:
    stopper = Stopper()
    inner = MemoryStore("stop")
    inner.create("a", b"1")
    strict = StoppableStore(inner, stopper)
    lax = StoppableStore(inner, stopper, Where.BETWEEN_BATCHES)
    stopper.sleep(0)
    stopper.progress(1, 2, "reading")
    listing = strict.list("")
    stopper.abandon()
    for call in (
        lambda: strict.get("a"),
        lambda: strict.head("a"),
        lambda: strict.create("b", b""),
        lambda: strict.delete("a"),
        lambda: list(strict.list("")),
        lambda: next(listing),
        lambda: strict.replace("a", b"2", tag="x"),
        lambda: lax.replace("a", b"2", tag="x"),
        lambda: stopper.sleep(3600),
        lambda: stopper.progress(2, 2, "reading"),
    ):
        with pytest.raises(AbandonedError):
            call()
    assert lax.get("a") == b"1"


def test_verification_reads_its_share_and_is_noted_for_health(lab: Lab) -> None:
    site = site_of(lab, lab.store, AgentTerms(verify=Budget(share=1.0)))
    assert perform(unit_of(lab, Task.VERIFY), site).fields == {"points": 0}
    lab.replicate()
    done = perform(unit_of(lab, Task.VERIFY), site)
    assert (done.event, done.fields["damaged_points"]) == (None, [])
    key = next(info.key for info in lab.store.list(lab.found.keys.segments))
    lab.store.delete(key)
    assert isinstance(lab.host.clock, FakeClock)
    lab.host.clock.advance(86400)
    done = perform(unit_of(lab, Task.VERIFY), site)
    assert (done.event, done.fields["damaged_points"]) == ("verify.damage", [1])
    told = journal.event_keys(lab.store, lab.found.keys)
    assert [(one.kind, one.result) for one in told][-1:] == [(EventKind.VERIFY, "damaged")]


def test_garbage_is_collected_for_the_agent_s_own_vms(lab: Lab) -> None:
    clock = lab.host.clock
    assert isinstance(clock, FakeClock)
    site = site_of(lab, lab.store)
    for number in range(12):  # so many that maps are merged, and the first segments are in none any more
        lab.write(random_blocks(number, 40))
        lab.replicate()
    catalog.update_settings(lab.store, lab.host, lab.found, retention="last:1")
    assert perform(unit_of(lab, Task.PRUNE), site).fields["removed"] == 11
    runs = Runs(lab.store, clock)
    assert [runs.run("shop"), runs.run("shop")] == [1, 2]
    unit = Unit(Task.GC, "memory:x", "default", names=("web 1",))
    assert perform(unit, site).fields["deleted_objects"] == 0
    clock.advance((garbage.GRACE + timedelta(seconds=1)).total_seconds())
    assert int(str(perform(unit, site).fields["deleted_objects"])) > 0
    assert site.collecting is None
    lab.assert_restores(12)
    clock.advance(KEPT.total_seconds())
    perform(unit, site)
    assert runs.left("shop") == ([2], [2])


def test_a_refresh_finds_vms_looks_at_those_not_known_and_says_whose_disks_are_not_here(
    lab: Lab, tmp_path: Path
) -> None:
    other = make_lab(tmp_path / "other", [bytes(BLOCK)], store=lab.store, host=make_host(name="host-b"), name="gone")
    other.paths[0].unlink()
    site = site_of(lab, lab.store)
    unit = Unit(Task.REFRESH, "memory:x", "default")
    found = perform(unit, site).listing
    assert found is not None
    assert found.names == {"web 1", "gone"}
    assert found.missing == {"gone": str(other.paths[0])}
    gone = found.facts["gone"]
    assert isinstance(gone, Facts)
    again = perform(Unit(Task.REFRESH, "memory:x", "default", names=("web 1", "gone"), elsewhere=(gone,)), site).listing
    assert again is not None and again.facts == {}
    other.paths[0].write_bytes(bytes(BLOCK))
    again = perform(Unit(Task.REFRESH, "memory:x", "default", names=("web 1", "gone"), elsewhere=(gone,)), site).listing
    assert again is not None and again.facts == {"gone": gone}
    chosen = perform(Unit(Task.REFRESH, "memory:x", "default", patterns=("w*",)), site).listing
    assert chosen is not None and chosen.names == {"web 1"}


def test_a_refresh_while_the_store_is_away_tells_nothing_of_the_vms(lab: Lab) -> None:
    def away() -> None:
        raise StoreUnavailableError("away")

    for at in range(4):
        store = Counting(lab.store)
        store.at, store.then = at, away
        result = perform(Unit(Task.REFRESH, "memory:x", "default"), site_of(lab, store))
        assert (result.verdict, result.listing) == (Verdict.RETRY, None)


def test_a_refresh_that_cannot_read_one_vm_finds_the_others(lab: Lab, tmp_path: Path) -> None:
    other = make_lab(tmp_path / "other", [bytes(BLOCK)], store=lab.store, host=make_host(name="host-b"), name="other")
    away = FaultyStore(lab.store, [Fault(FaultKind.ERROR, pattern=f"*/{other.found.keys.vm_id}/*")])
    found = perform(Unit(Task.REFRESH, "memory:x", "default"), site_of(lab, away)).listing
    assert found is not None
    assert (set(found.facts), set(found.unreachable)) == ({"web 1"}, {"other"})
    known = Unit(Task.REFRESH, "memory:x", "default", names=("web 1",))
    again = perform(known, site_of(lab, away)).listing
    assert again is not None and (set(again.facts), set(again.unreachable)) == (set(), {"other"})


def test_another_agent_s_lease_and_the_own_collection_are_told_apart(lab: Lab) -> None:
    site = site_of(lab, lab.store)
    with lease.holding(lab.store, lab.found.keys, make_host(name="host-b")):
        result = perform(unit_of(lab, Task.CYCLE), site)
        assert (result.verdict, result.own) == (Verdict.BUSY, False)
        site.collecting = lab.found.keys.vm_id
        assert perform(unit_of(lab, Task.CYCLE), site).own


def test_whatever_goes_wrong_is_a_result() -> None:
    def explode(*_: object) -> Store:
        raise ZeroDivisionError

    host = make_host()
    terms = AgentTerms()
    site = Site(host, Vault(lambda: None), WORKERS, terms, Bucket(terms.limits, host.clock), open_store=explode)
    result = perform(Unit(Task.REFRESH, "memory:x", "default"), site)
    assert (result.verdict, type(result.error)) == (Verdict.RETRY, ZeroDivisionError)


def test_metrics_are_those_of_health(lab: Lab) -> None:
    lab.replicate()
    text = perform(Unit(Task.METRICS, "memory:x", "default", names=("web 1",)), site_of(lab, lab.store)).text
    assert text is not None and 'vm="web 1"' in text


def test_disks_that_are_here(tmp_path: Path) -> None:
    (tmp_path / "a.img").touch()
    here = Here()
    assert here.missing([str(tmp_path / "a.img")]) is None
    assert here.missing([str(tmp_path / "a.img"), str(tmp_path / "b.img")]) == str(tmp_path / "b.img")
    for path in ("qmp:/nowhere.sock#node", "qmp:", "libvirt:", "libvirt:x?connect=test%3A%2F%2F%2Fnowhere#vda", "a\0b"):
        assert here.missing([path]) == path
    hyperv = "hyperv:6f0d3c52-8e43-4d5e-9a53-60d170000001{}#scsi-0-0"
    assert here.missing([hyperv.format("?host=https://hv1:5986")]) is None
    assert (here.missing([hyperv.format("")]) is None) == (sys.platform == "win32")


def test_the_endpoint_serves_what_there_is() -> None:
    import urllib.error  # noqa: PLC0415
    import urllib.request  # noqa: PLC0415

    def fetch(port: int, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    pages: endpoint.Pages = {"/metrics": (endpoint.TEXT, lambda: "up 1\n"), "/status": (endpoint.JSON, lambda: None)}
    with endpoint.served(("127.0.0.1", 0), pages) as port:
        assert fetch(port, "/metrics") == (200, "up 1\n")
        assert fetch(port, "/status")[0] == 503
        assert fetch(port, "/etc/passwd")[0] == 404


def test_every_event_is_in_the_document() -> None:
    text = (CHECKOUT / "docs" / "daemon.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z]+\.[a-z]+)`", text.partition("| event |")[2].partition("\n\n")[0]))
    assert listed == set(LEVELS)
    said = {
        name
        for path in (CHECKOUT / "replica" / "daemon").glob("*.py")
        for name in re.findall(r"say\(\s*\"([a-z.]+)\"", path.read_text(encoding="utf-8"))
    }
    assert said <= set(LEVELS)
