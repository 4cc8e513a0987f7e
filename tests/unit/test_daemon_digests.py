"""The agent and its digests: once a minute beside all else, and what it knows of a VM goes into them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from replica import catalog
from replica.daemon import localagent, statusfile
from replica.daemon.agent import Agent, Purpose
from replica.daemon.bandwidth import Bucket
from replica.daemon.mailbox import Word
from replica.daemon.site import Site
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Result, Task, Unit, Verdict, perform
from replica.errors import StoreUnavailableError
from replica.health import journal
from replica.health.gathering import Gatherer
from replica.health.observation import Event, EventKind
from replica.health.publishing import Publisher, Watched
from replica.vault import Vault
from replica.workers import Workers
from tests.support.engine import WORKERS, Lab, make_lab, random_blocks
from tests.support.simulated_agent import Simulation, done, fleet

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


@dataclass
class Digests(Simulation):
    """An agent that writes digests."""

    def agent(self, *, once: bool = False, care: bool = False, status_folder: Path | None = None) -> Agent:
        bucket = Bucket(self.terms.limits, self.clock)
        self.site = Site(self.host, Vault(lambda: None), Workers(), self.terms, bucket, drill=lambda *_: {})
        return Agent(
            self.site,
            Purpose("memory:none", "default", once=once, care=care, status_folder=status_folder, digests=True),
            tell=self.events.append,
            mailbox=self,
            perform=self.perform,
            reload=lambda: self.terms,
        )


def test_digests_are_written_once_a_minute_beside_long_work() -> None:
    sim = Digests(fleet("ab"), AgentTerms(concurrency=1, verify=None, gc_seconds=3600), act=_slow)
    sim.run(7200, care=True)
    begins = sim.begins(Task.DIGEST)
    assert 110 <= len(begins) <= 120
    assert sim.begins(Task.GC), "which took an hour"
    [first, *_] = [unit for _, unit in sim.begun if unit.task is Task.DIGEST]
    assert [one.found.vm.name for one in first.watched] == ["a", "b"]


def _slow(unit: Unit) -> tuple[float, Result]:
    return (3000.0 if unit.task is Task.GC else 1.0), done()


def test_an_agent_without_digests_begins_none() -> None:
    sim = Simulation(fleet("a"))
    sim.run(600)
    assert not sim.begins(Task.DIGEST)


def test_that_digests_cannot_be_written_is_told_once_and_tried_again() -> None:
    def act(unit: Unit) -> tuple[float, Result]:
        if unit.task is Task.DIGEST and sim.seconds < 600:
            return 1.0, Result(Verdict.RETRY, error=StoreUnavailableError("no answer"))
        return 1.0, done()

    sim = Digests(fleet("a"), act=act)
    sim.run(3600)
    [told] = sim.told("digest.failed")
    assert told.fields["message"] == "no answer" and told.fields["retry_in_seconds"] == 60
    assert 40 < len(sim.begins(Task.DIGEST)) < 60, "in the rhythm of what fails, and then each minute"


def test_what_fails_puts_the_vm_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    doubted: list[str] = []
    monkeypatch.setattr(Publisher, "note_doubt", lambda _, vm_id: doubted.append(vm_id))

    def act(unit: Unit) -> tuple[float, Result]:
        if unit.task is Task.CYCLE and unit.found is not None and unit.found.vm.name == "b":
            return 1.0, Result(Verdict.RETRY, error=StoreUnavailableError("no answer"))
        return 1.0, Result(fields={"removed": 0}) if unit.task is Task.PRUNE else done()

    sim = Digests(fleet("ab"), AgentTerms(verify=None, gc_seconds=None, retain=False), act=act)
    sim.run(1800, care=True)
    assert set(doubted) == {sim.fleet["b"].found.keys.vm_id}
    [*_, last] = [unit for _, unit in sim.begun if unit.task is Task.DIGEST]
    assert [(one.state, one.failures > 0, one.error) for one in last.watched] == [
        ("waiting", False, None),
        ("retrying", True, "no answer"),
    ]


# --- with a real store


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path / "lab", [random_blocks(1, 8)])


def site_of(lab: Lab) -> Site:
    terms = AgentTerms()
    made = Site(
        lab.host,
        Vault(lambda: None),
        WORKERS,
        terms,
        Bucket(terms.limits, lab.host.clock),
        open_store=lambda *_: lab.store,
    )
    made.publisher = Publisher(lab.host, "default")
    return made


def unit_of(lab: Lab, task: Task, **more: Any) -> Unit:
    return Unit(task, "memory:x", "default", lab.found, 1, **more)


def publish(lab: Lab, site: Site) -> Result:
    return perform(replace(unit_of(lab, Task.DIGEST, watched=(Watched(lab.found, "waiting"),)), found=None), site)


def test_a_cycle_of_the_agent_is_in_its_next_digest_without_a_look(lab: Lab) -> None:
    site = site_of(lab)
    assert publish(lab, site).fields == {"written": 1, "looked_at": 1, "waiting": 0}
    assert perform(unit_of(lab, Task.CYCLE), site).verdict is Verdict.DONE
    assert publish(lab, site).fields == {"written": 1, "looked_at": 0, "waiting": 0}
    [seen] = Gatherer(lab.store, lab.host, "default").gather().seen
    assert seen.as_of is not None and [one.point for one in seen.samples] == [1]


def test_a_verification_of_the_agent_needs_no_mark_and_one_by_hand_does(lab: Lab) -> None:
    site = site_of(lab)
    perform(unit_of(lab, Task.CYCLE), site)
    publish(lab, site)
    lab.host.clock.advance(1)  # type: ignore[attr-defined]
    assert perform(unit_of(lab, Task.VERIFY), site).verdict is Verdict.DONE
    assert Gatherer(lab.store, lab.host, "default").gather().direct == 0
    assert site.publisher is not None
    site.publisher.note_doubt(lab.found.keys.vm_id)  # as the agent does
    publish(lab, site)
    [seen] = Gatherer(lab.store, lab.host, "default").gather().seen
    assert seen.as_of is not None and seen.last_verify is not None
    lab.host.clock.advance(1)  # type: ignore[attr-defined]
    by_hand = Event(EventKind.VERIFY, lab.host.clock.now(), "partial")
    journal.record_event(lab.store, lab.host, lab.found.keys, by_hand)
    assert Gatherer(lab.store, lab.host, "default").gather().direct == 1


def test_gc_deletes_marks_that_are_known(lab: Lab) -> None:
    site = site_of(lab)
    catalog.update_settings(lab.store, lab.host, lab.found, interval_seconds=60)
    publish(lab, site)
    assert [info.key for info in lab.store.list("tenants/default/fleet/changes/")]
    assert perform(unit_of(lab, Task.GC, names=("web 1",)), site).verdict is Verdict.DONE
    assert not [info.key for info in lab.store.list("tenants/default/fleet/changes/")]


# --- what other commands of the machine read of it


def test_how_far_a_cycle_is_stands_in_the_status_file(tmp_path: Path) -> None:
    sim = Digests(fleet("a"), act=lambda _: (100.0, done()))
    agent = sim.agent(status_folder=tmp_path)
    began = sim.clock.now()

    def look() -> None:
        with sim.site.told_of("a") as progress:
            progress(5, 10, "replicating")
            statusfile.write(tmp_path, agent.status())
        told = localagent.read(tmp_path, "memory:none", "default")
        assert told is not None
        found.append(told)

    found: list[localagent.LocalAgent] = []
    sim.at(320, lambda: sim.put(Word.STOP))
    original = sim.perform

    def perform_and_look(unit: Unit, site: Site, finished: Any) -> None:
        original(unit, site, finished)
        if unit.task is Task.CYCLE:
            look()

    agent._perform = perform_and_look
    agent.run()
    vm = found[0].vms["a"]
    assert vm.state == "running" and vm.progress is not None
    assert (vm.progress.done_bytes, vm.progress.total_bytes, vm.progress.phase) == (5, 10, "replicating")
    assert "running (replicating 50 %)" in localagent.sentence(found[0], found[0].written_at, "a")
    last = localagent.read(tmp_path, "memory:none", "default")
    assert last is not None and last.state == "stopped" and last.vms["a"].progress is None
    assert last.written_at > began


def document(**more: object) -> dict[str, object]:
    vm = {
        "vm_id": "0" * 32,
        "state": "retrying",
        "failures": 3,
        "missed": 1,
        "next_at": NOW + timedelta(minutes=4),
        "last": {"at": NOW - timedelta(minutes=2), "stored_bytes": 3 << 20, "point": 7},
        "error": {"error": "StoreFullError", "message": "no room", "hint": "make some"},
    }
    return {
        "state": "running",
        "process": 7,
        "host_name": "host-a",
        "store": "file:///s",
        "tenant": "default",
        "started_at": NOW,
        "written_at": NOW,
        "vms": {"web": vm, "db": {"state": "waiting", "next_at": NOW}},
        **more,
    }


def test_the_agent_of_this_machine_is_told_in_a_sentence(tmp_path: Path) -> None:
    statusfile.write(tmp_path, document())
    told = localagent.read(tmp_path, "file:///s", "default")
    assert told is not None
    soon, late = NOW + timedelta(seconds=10), NOW + timedelta(minutes=10)
    assert localagent.sentence(told, soon) == "running, seen 10 s ago; 1 retrying, 1 waiting"
    assert localagent.sentence(told, soon, "web") == (
        "running, seen 10 s ago; retrying, next turn in 3 min 50 s, last failure (3 in a row): no room"
    )
    assert localagent.sentence(told, soon, "db").endswith("waiting, next turn now")
    assert "does not look after this VM" in localagent.sentence(told, soon, "mail")
    assert localagent.sentence(told, late) == "not running: last heard of 10 min ago, it did not say that it ends"
    assert told.stored_bytes_per_second(soon) == (3 << 20) / 300
    assert told.stored_bytes_per_second(late) == 0
    assert localagent.document(told, soon)["vms"] == 2
    assert localagent.document(told, soon, "web")["vm"].error == "no room"
    assert localagent.read(tmp_path, "file:///other", "default") is None
    assert localagent.read(tmp_path / "none", "file:///s", "default") is None
    assert localagent.read(None, "file:///s", "default") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"vms": 7},
        {"vms": {"web": 7}},
        {"vms": {"web": {"state": 7, "failures": "x", "next_at": "0001-01-01T00:00:00+23:59", "error": "x"}}},
        {"vms": {"web": {"state": "running", "progress": {"total_bytes": -1, "since": 7}, "last": [1]}}},
        {"process": 1 << 99, "host_name": None, "state": None},
    ],
)
def test_a_status_file_is_believed_with_care(tmp_path: Path, wrong: dict[str, object]) -> None:
    statusfile.write(tmp_path, document(**wrong))
    told = localagent.read(tmp_path, "file:///s", "default")
    assert told is not None
    for name in (None, "web"):
        assert localagent.sentence(told, NOW, name)
    text = json.dumps({"format": 1, **document(written_at="now")}, default=str)
    (tmp_path / statusfile.FILE_NAME).write_text(text)
    assert localagent.read(tmp_path, "file:///s", "default") is None
