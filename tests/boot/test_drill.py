"""A drill of a real Generation 2 guest, started as Generation 1: every kind of check, evidence, and nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.host import this_host
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


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    platform = QemuPlatform(this_host(tmp_path / "state"))
    for name in platform.names():
        platform.delete(name)


def godwit(place: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GODWIT_")}
    given = {"GODWIT_STORE": (place / "store").as_uri(), "GODWIT_STATE": str(place / "state")}
    program = str(Path(sys.executable).with_name("godwit"))
    return subprocess.run(
        [program, *map(str, arguments), "--json"], capture_output=True, text=True, check=False, env={**kept, **given}
    )


def test_a_real_guest_passes_its_drill(place: Path, guest_raw: Path) -> None:
    for line in (
        ("init", (place / "store").as_uri()),
        ("protect", "web", "--disk", guest_raw, "--cpus", "1", "--memory", "512M", "--nic", "52:54:00:60:d1:71"),
        ("replicate", "web"),
    ):
        done = godwit(place, *line)
        assert done.returncode == 0, done.stdout + done.stderr
    (place / "checks.json").write_text(json.dumps(CHECKS))
    arguments = ("--checks", place / "checks.json", "--generation", "1", "--evidence", place / "audit")
    done = godwit(place, "drill", "web", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    print([(one["phase"], one["seconds"]) for one in told["phases"]], "RTO", told["rto_seconds"])
    results = {one["name"]: (one["passed"], one["skipped"]) for one in told["checks"]}
    assert results.pop("tcp 22") == (False, True)
    assert results.pop("a service that is not there") == (False, False)
    assert set(results.values()) == {(True, False)}, told["checks"]
    assert Path(told["picture"]).read_bytes().startswith(b"\x89PNG")
    assert QemuPlatform(this_host(place / "state")).names() == []

    verified = godwit(place, "evidence", "verify", told["evidence"], "--key", told["fingerprint"])
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout)["evidence"]["machine"]["converted"] is True
    health = json.loads(godwit(place, "health", "web").stdout)
    assert health["last_drill"]["result"] == "passed"
    assert health["last_drill"]["seconds"] == told["rto_seconds"]
