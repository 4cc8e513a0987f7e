"""The agent as it is run: two VMs, signals, kill -9, another agent, a store that goes away. It waits for events."""

from __future__ import annotations

import json
import os
import queue
import random
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from replica import catalog, history, lease, protection, verify
from replica.catalog import ProtectedVm
from replica.host import SystemClock, this_host
from replica.stores.address import open_store
from replica.stores.store import Store
from tests.support.engine import BLOCK, make_host, random_blocks, restore_disk
from tests.support.servers import S3Server

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120  # after which a test fails rather than hangs
COMMAND = [sys.executable, "-c", "from cli.main import main; main()"]
MIB = 1 << 20
DISK_BYTES = 48 * MIB


@dataclass
class Running:
    """A godwit process, and the lines it writes."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first event from here on that is wanted."""
        while True:
            line = self.lines.get(timeout=LIMIT_SECONDS)
            assert line is not None, self.events
            self.events.append(json.loads(line))
            if wanted(self.events[-1]):
                return self.events[-1]

    def event(self, name: str, vm: str | None = None) -> dict[str, Any]:
        return self.until(lambda one: one["event"] == name and vm in (None, one.get("vm")))

    def rest(self) -> list[dict[str, Any]]:
        """Return what comes until it ends."""
        begun = len(self.events)
        while (line := self.lines.get(timeout=LIMIT_SECONDS)) is not None:
            self.events.append(json.loads(line))
        return self.events[begun:]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_SECONDS)


@dataclass
class Place:
    """A store, a folder of disks, and machines with state folders of their own."""

    folder: Path
    address: str
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = open_store(self.address, create=True)
        catalog.init_store(self.store, make_host(clock=SystemClock()))  # type: ignore[arg-type]

    def protect(self, name: str, data: bytes, seconds: int = 1) -> ProtectedVm:
        path = self.folder / f"{name}.img"
        path.write_bytes(data)
        host = this_host(self.folder / "protecting")
        found, _ = protection.protect(self.store, host, tenant="default", name=name, disks=[path])
        catalog.update_settings(self.store, host, found, interval_seconds=seconds)
        return found

    @contextmanager
    def agent(self, *arguments: str, state: str = "state", agent: str = "") -> Iterator[Running]:
        config = self.folder / f"{state}.toml"
        config.write_text(f"[agent]\n{agent}")
        environment = {name: text for name, text in os.environ.items() if not name.startswith("GODWIT_")}
        environment |= {
            "GODWIT_STORE": self.address,
            "GODWIT_STATE": str(self.folder / state),
            "GODWIT_CONFIG": str(config),
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
        }
        with subprocess.Popen(
            [*COMMAND, *(arguments or ("run",))],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield Running(process)
            finally:
                process.kill()

    def points(self, found: ProtectedVm) -> list[int]:
        return [one.point for one in history.points(self.store, found.keys) if not isinstance(one, Exception)]

    def assert_whole(self, found: ProtectedVm, data: bytes) -> None:
        host = this_host(self.folder / "checking")
        assert not verify.verify(self.store, host, found, full=True).damaged
        assert restore_disk(self.store, host, found, catalog.newest_point(self.store, found)) == data


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, str(tmp_path / "store"))


def _two_vms(place: Place) -> None:
    data = {name: random_blocks(number, 30) for number, name in enumerate(("web 1", "db"))}
    found = {name: place.protect(name, one) for name, one in data.items()}
    with place.agent() as agent:
        for name in data:
            assert agent.event("cycle.done", name)["point"] >= 1
        data["db"] = b"changed" + data["db"][7:]
        with (place.folder / "db.img").open("r+b") as file:
            file.write(b"changed")
        agent.until(lambda one: one["event"] == "cycle.done" and one["vm"] == "db" and one["changed_blocks"] == 1)
        agent.event("cycle.done", "web 1")
        assert agent.stop() == 0
        assert agent.rest()[-1]["event"] == "agent.stopped"
    for name, one in data.items():
        place.assert_whole(found[name], one)
        assert not lease.read(place.store, found[name].keys)[0].held
    status = json.loads((place.folder / "state" / "agent.json").read_bytes())
    assert status["state"] == "stopped"
    assert status["vms"]["db"]["last"]["point"] == place.points(found["db"])[-1]


def test_two_vms_are_replicated_at_their_intervals_to_a_folder(place: Place) -> None:
    _two_vms(place)


@pytest.mark.server
@pytest.mark.xdist_group("seaweedfs")
def test_two_vms_are_replicated_at_their_intervals_to_an_s3_server(tmp_path: Path, seaweedfs: S3Server) -> None:
    _two_vms(Place(tmp_path, seaweedfs.url(f"agent/{secrets.token_hex(6)}")))


def _limited(place: Place) -> tuple[ProtectedVm, bytes]:
    data = random.Random(1).randbytes(DISK_BYTES)
    return place.protect("large", data), data


def _until_segments(place: Place, found: ProtectedVm) -> None:
    waited = threading.Event()
    for _ in range(LIMIT_SECONDS * 20):
        if next(place.store.list(found.keys.segments), None) is not None:
            return
        waited.wait(0.05)
    pytest.fail("nothing was stored")


@pytest.mark.parametrize("way", ["term", "kill", "twice"])
def test_an_initial_replication_that_is_cut_off_is_taken_up_by_the_next_start(place: Place, way: str) -> None:
    found, data = _limited(place)
    with place.agent(agent='bandwidth = "4MiB/s"\ngrace = "0s"\n') as agent:
        agent.event("cycle.started")
        _until_segments(place, found)
        if way == "kill":
            agent.process.kill()
            agent.process.wait(LIMIT_SECONDS)
        elif way == "twice":
            agent.process.send_signal(signal.SIGTERM)
            agent.process.send_signal(signal.SIGINT)
            assert agent.process.wait(LIMIT_SECONDS) in (0, 130)
        else:
            assert agent.stop() == 0
            names = [one["event"] for one in agent.rest()]
            assert names[-4:] == ["agent.stopping", "agent.abandoning", "cycle.abandoned", "agent.stopped"]
            state = lease.read(place.store, found.keys)[0]
            assert (state.held, state.leftovers) == (False, True)
    assert place.points(found) == []
    with place.agent() as agent:  # the same machine: no term has to run out
        done = agent.event("cycle.done", "large")
        assert agent.stop() == 0
    assert done["stored_bytes"] < DISK_BYTES, "what was stored before is used"
    place.assert_whole(found, data)


def test_within_its_grace_a_cycle_is_finished(place: Place) -> None:
    found, data = _limited(place)
    with place.agent(agent='bandwidth = "4MiB/s"\ngrace = "5m"\n') as agent:
        agent.event("cycle.started")
        _until_segments(place, found)
        assert agent.stop() == 0
        assert [one["event"] for one in agent.rest()][-3:] == ["agent.stopping", "cycle.done", "agent.stopped"]
    place.assert_whole(found, data)


def test_another_agent_holds_a_vm_and_the_others_go_on(place: Place) -> None:
    taken, free = place.protect("taken", random_blocks(1, 5)), place.protect("free", random_blocks(2, 5))
    other = make_host(place.folder / "other", name="host-b", clock=SystemClock())  # type: ignore[arg-type]
    with lease.holding(place.store, taken.keys, other), place.agent() as agent:
        for _ in range(4):
            agent.event("cycle.done", "free")
        busy = [one for one in agent.events if one["event"] == "cycle.busy"]
        assert [one["vm"] for one in busy] == ["taken"]
        assert "host-b is at work on this VM" in busy[0]["message"]
        assert agent.stop() == 0
    assert len(place.points(free)) >= 4
    assert place.points(taken) == []


def test_a_store_that_goes_away_and_comes_back(place: Place) -> None:
    found = place.protect("web", random_blocks(1, 5))
    with place.agent(agent='patience = "1s"\n') as agent:
        agent.event("cycle.done")
        Path(place.address).rename(place.folder / "away")
        failed = agent.until(lambda one: one["event"] in ("cycle.failed", "vm.stopped"))
        assert (failed["event"], failed["retry_in_seconds"]) == ("cycle.failed", 60)
        assert agent.process.poll() is None
        (place.folder / "away").rename(place.address)
        agent.process.send_signal(signal.SIGHUP)
        agent.event("config.reloaded")
        agent.event("cycle.done")
        assert agent.stop() == 0
    assert len(place.points(found)) >= 2


def test_a_second_agent_of_one_state_folder_is_refused(place: Place) -> None:
    place.protect("web", random_blocks(1, 5))
    with place.agent() as agent:
        agent.event("agent.started")
        with place.agent() as second:
            assert second.process.wait(LIMIT_SECONDS) == 11
        assert agent.stop() == 0


def test_once_and_watch(place: Place) -> None:
    found, other = place.protect("web", random_blocks(1, 5)), place.protect("db", random_blocks(2, 5))
    with place.agent("run", "--once") as agent:
        assert agent.process.wait(LIMIT_SECONDS) == 0
    assert (place.points(found), place.points(other)) == ([1], [1])
    with place.agent("replicate", "web", "--watch") as agent:
        agent.event("cycle.done", "web")
        agent.event("cycle.done", "web")
        assert agent.stop() == 0
    assert len(place.points(found)) >= 3
    assert place.points(other) == [1]
    assert not (place.folder / "state" / "agent.json").exists()


def test_a_wrong_address_or_configuration_is_told_at_once(place: Place) -> None:
    with place.agent("run", "--store", str(place.folder / "nothing")) as agent:
        assert agent.process.wait(LIMIT_SECONDS) == 10
    with place.agent(agent='bandwidth = "fast"\n') as agent:
        assert agent.process.wait(LIMIT_SECONDS) == 13


def test_retention_verification_and_garbage_are_seen_to(place: Place) -> None:
    found = place.protect("web", random_blocks(1, 5) + bytes(BLOCK))
    host = this_host(place.folder / "protecting")
    catalog.update_settings(place.store, host, found, retention="last:2")
    with place.agent(agent='prune = "2s"\ngc = "2s"\nverify = "100%"\nmetrics = "127.0.0.1:0"\n') as agent:
        agent.until(lambda one: one["event"] == "prune.done" and one["removed"] > 0)
        agent.event("gc.done")
        assert agent.stop() == 0
        assert not [one for one in agent.events if one["level"] == "error"]
    assert len(place.points(found)) <= 10
