"""Drills of a real Generation 2 guest: one that passes with every kind of check, and five that must fail, and do.

Each leaves its evidence, and nothing else. What needs no guest that is up does not wait for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from replica.errors import LeaseHeldError
from replica.host import this_host
from replica.platforms.folder import MachineFolders
from replica.platforms.qemu import QemuPlatform

pytestmark = [
    pytest.mark.boot,
    pytest.mark.xdist_group("machines"),
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
]

CHECKS = {
    "timeout": "10m",
    "check": [
        {"kind": "console", "match": "^GODWIT-READY firmware=bios journal=1 last=built$", "timeout": "5m"},
        {"kind": "agent", "timeout": "5m"},
        {"kind": "service", "service": "qemu-guest-agent.service", "timeout": "2m"},
        {"kind": "command", "command": ["/bin/cat", "/etc/hostname"], "match": "^godwit-demo$"},
        {"kind": "file", "path": "/var/lib/godwit/journal", "sha256": hashlib.sha256(b"built\n").hexdigest()},
        {"kind": "screenshot", "required": True},
        {"kind": "tcp", "port": 22},
        {
            "name": "a service that is not there",
            "kind": "service",
            "service": "nginx",
            "required": False,
            "timeout": "1s",
        },
    ],
}


SECTOR = 512
LIMIT_SECONDS = 300  # after which a test fails rather than hangs


class Place:
    """A store, a host, and the guest protected with one recovery point. Drills leave it as it was."""

    def __init__(self, folder: Path, guest: Path) -> None:
        self.folder = folder
        self.disk = folder / "guest.raw"
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", guest, self.disk], check=True)
        self.platform = QemuPlatform(this_host(folder / "state"))
        machine = ("--cpus", "1", "--memory", "512M", "--nic", "52:54:00:60:d1:71")
        self.good("init", (folder / "store").as_uri())
        self.good("protect", "web", "--disk", self.disk, *machine)
        self.good("replicate", "web")

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GODWIT_")}
        given = {"GODWIT_STORE": (self.folder / "store").as_uri(), "GODWIT_STATE": str(self.folder / "state")}
        program = str(Path(sys.executable).with_name("godwit"))
        return subprocess.Popen(
            [program, *map(str, arguments), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, **given},
        )

    def run(self, *arguments: str | Path, code: int = 0) -> Any:
        process = self.start(*arguments)
        out, err = process.communicate()
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        return json.loads(out)

    def good(self, *arguments: str | Path) -> Any:
        return self.run(*arguments)

    def begin_drill(
        self, *options: str, timeout: str = "10m", checks: Sequence[Mapping[str, object]]
    ) -> subprocess.Popen[str]:
        (self.folder / "checks.json").write_text(json.dumps({"timeout": timeout, "check": checks}))
        told = ("--checks", self.folder / "checks.json", "--evidence", self.folder / "audit")
        return self.start("drill", "web", *told, *options)

    def failed(self, drill: subprocess.Popen[str], reason: str, *, cleaned: bool = True) -> Any:
        """Return what a drill told that failed for that reason alone; its evidence and the store say the same."""
        out, err = drill.communicate()
        assert drill.returncode == 1, out + err
        told = json.loads(out)
        assert told["verdict"] == "failed" and told["cleaned"] is cleaned
        assert any(reason in one for one in told["reasons"]), told["reasons"]
        verified = self.good("evidence", "verify", told["evidence"], "--key", told["fingerprint"])
        assert verified["evidence"]["verdict"] == "failed"
        assert verified["evidence"]["reasons"] == told["reasons"]
        last = self.good("health", "web")["last_drill"]
        assert last["result"] == "failed" and reason in last["detail"]
        assert bool(self.platform.names()) is not cleaned
        return told

    def wipe_the_system_partition(self) -> None:
        """Make the disk one that no firmware starts from: the partition with the loader holds nothing any more."""
        with self.disk.open("r+b") as file:
            file.seek(2 * SECTOR)
            first_byte = struct.unpack_from("<Q", file.read(128), 32)[0] * SECTOR  # of the first entry of the GPT
            file.seek(first_byte)
            assert file.read(SECTOR)[510:] == b"\x55\xaa"
            file.seek(first_byte)
            file.write(bytes(4 << 20))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, guest_raw: Path) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("drills"), guest_raw)
    yield made
    for name in made.platform.names():
        made.platform.delete(name)


def test_a_real_guest_passes_its_drill(place: Place) -> None:
    (place.folder / "all.json").write_text(json.dumps(CHECKS))
    arguments = ("--checks", place.folder / "all.json", "--generation", "1", "--evidence", place.folder / "audit")
    told = place.good("drill", "web", *arguments)
    print([(one["phase"], one["seconds"]) for one in told["phases"]], "RTO", told["rto_seconds"])
    results = {one["name"]: (one["passed"], one["skipped"]) for one in told["checks"]}
    assert results.pop("tcp 22") == (False, True)
    assert results.pop("a service that is not there") == (False, False)
    assert set(results.values()) == {(True, False)}, told["checks"]
    assert Path(told["picture"]).read_bytes().startswith(b"\x89PNG")
    assert place.platform.names() == []

    verified = place.good("evidence", "verify", told["evidence"], "--key", told["fingerprint"])
    assert verified["evidence"]["machine"]["converted"] is True
    health = place.good("health", "web")
    assert health["last_drill"]["result"] == "passed"
    assert health["last_drill"]["seconds"] == told["rto_seconds"]


# --- those that must fail


def test_a_wrong_service_fails_though_the_guest_is_up(place: Place) -> None:
    checks = [
        {"kind": "agent", "timeout": "5m"},
        {"kind": "service", "service": "qemu-guest-agent.service", "timeout": "2m"},
        {"name": "database", "kind": "service", "service": "postgresql.service", "timeout": "15s"},
    ]
    told = place.failed(place.begin_drill("--generation", "1", "--point", "1", checks=checks), "database: inactive")
    assert [(one["kind"], one["passed"]) for one in told["checks"]] == [
        *(("agent", True), ("service", True), ("service", False))
    ]
    assert told["rto_seconds"] > 0
    assert len(told["reasons"]) == 1


def test_time_that_is_up_fails(place: Place) -> None:
    checks: list[dict[str, Any]] = [{"kind": "agent", "timeout": "5m"}, {"kind": "command", "command": ["/bin/true"]}]
    drill = place.begin_drill("--generation", "1", "--point", "1", timeout="1s", checks=checks)
    told = place.failed(drill, "the guest did not answer")
    assert told["rto_seconds"] is None
    assert [one["passed"] for one in told["checks"]] == [False, False]
    assert told["checks"][1]["observed"].startswith("not made: the time of the drill was up")


def test_a_cleanup_that_fails_fails_the_drill_and_the_next_one_removes_the_machine(place: Place) -> None:
    """Another command holds the machine when it is to be removed; all checks passed, the firmware's first words."""
    checks = [{"kind": "console", "match": "."}, {"kind": "console", "match": "^IT IS HELD$", "timeout": "5m"}]
    drill = place.begin_drill("--generation", "1", "--point", "1", checks=checks)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (names := [name for name in place.platform.names() if place.platform.console(name)]):
        assert time.monotonic() < deadline and drill.poll() is None, drill.communicate()
        time.sleep(0.05)
    with ExitStack() as stack:
        while True:  # the start holds it until the machine runs; the checks do not
            try:
                stack.enter_context(MachineFolders(this_host(place.folder / "state"), "qemu").held(names[0]))
                break
            except LeaseHeldError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with (place.platform.folder(names[0]).path / "console.log").open("ab") as file:
            file.write(b"\nIT IS HELD\n")
        told = place.failed(drill, "cleanup: ", cleaned=False)
    assert all(one["passed"] for one in told["checks"])
    assert "another godwit process" in told["reasons"][0] and len(told["reasons"]) == 1
    left = place.good("status", "web")["other_machines"]
    assert [one["name"] for one in left] == names == [told["machine"]]
    again = place.failed(place.begin_drill("--point", "1", timeout="1s", checks=[{"kind": "agent"}]), "did not answer")
    assert f"{names[0]}, of a drill that was cut off, was removed" in again["notes"]
    assert place.good("status", "web")["other_machines"] == []


def test_a_guest_that_does_not_boot_fails_and_is_pictured(place: Place) -> None:
    place.wipe_the_system_partition()
    point = place.good("replicate", "web")["point"]
    checks: list[dict[str, Any]] = [{"kind": "agent", "timeout": "20s"}, {"kind": "command", "command": ["/bin/true"]}]
    told = place.failed(place.begin_drill("--point", str(point), checks=checks), "its agent did not answer within")
    assert [one["passed"] for one in told["checks"]] == [False, False]
    assert told["checks"][1]["observed"] == "not made: the guest does not answer"
    assert told["generation"] == 2 and told["point"] == point
    assert Path(told["picture"]).read_bytes().startswith(b"\x89PNG")


def test_a_damaged_point_fails_before_anything_is_started(place: Place) -> None:
    with place.disk.open("r+b") as file:
        file.write(b"\0")
        file.seek(-SECTOR, os.SEEK_END)
        file.write(os.urandom(SECTOR))
    point = place.good("replicate", "web")["point"]
    segments = [path for path in (place.folder / "store").rglob("*") if "/segments/" in str(path) and path.is_file()]
    newest = [path for path in segments if f"{point:020}" in str(path)]
    assert newest and len(newest) < len(segments)
    for path in newest:
        path.unlink()
    told = place.failed(place.begin_drill("--point", str(point), checks=[{"kind": "agent"}]), "does not restore")
    assert told["machine"] is None and told["checks"] == []
