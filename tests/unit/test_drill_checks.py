"""Checks as they are written down: what is understood, and every mistake by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from replica import configuration
from replica.drills import checks
from replica.drills.checks import ANSWERS, PICTURE, Check, Kind, Terms
from replica.errors import ConfigurationError

WRITTEN = """
timeout = "20m"
platform = "qemu"
generation = 1
evidence = "/var/lib/evidence"

[[check]]
kind = "console"
match = "^READY"
timeout = "2m"

[[check]]
name = "web server"
kind = "service"
service = "nginx"
vms = ["web"]

[[check]]
kind = "command"
command = ["/usr/bin/psql", "-c", "select 1"]
status = 2
match = "one"
retry = true
required = false

[[check]]
kind = "file"
path = "/etc/motd"
sha256 = "ABCDEF0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF0123456789"

[[check]]
kind = "tcp"
port = 443

[[check]]
kind = "screenshot"
"""
TERMS = Terms(
    (
        Check(Kind.CONSOLE, "console ^READY", timeout_seconds=120.0, match="^READY"),
        Check(Kind.SERVICE, "web server", service="nginx", vms=("web",)),
        Check(
            Kind.COMMAND,
            "command /usr/bin/psql -c select 1",
            required=False,
            command=("/usr/bin/psql", "-c", "select 1"),
            status=2,
            match="one",
            retry=True,
        ),
        Check(Kind.FILE, "file /etc/motd", path="/etc/motd", sha256="abcdef0123456789" * 4),
        Check(Kind.TCP, "tcp 443", port=443),
        Check(Kind.SCREENSHOT, "screenshot", required=False),
    ),
    timeout_seconds=1200.0,
    platform="qemu",
    generation=1,
    evidence=Path("/var/lib/evidence"),
)


def test_a_file_of_checks_is_toml_or_json(tmp_path: Path) -> None:
    (tmp_path / "checks.toml").write_text(WRITTEN)
    assert checks.load(tmp_path / "checks.toml") == TERMS
    (tmp_path / "checks.json").write_text(json.dumps(configuration.tomllib.loads(WRITTEN)))
    assert checks.load(tmp_path / "checks.json") == TERMS


def test_the_configuration_holds_the_same(tmp_path: Path) -> None:
    file = tmp_path / "godwit.toml"
    drill = WRITTEN.replace("[[check]]", "[[drill.check]]")
    file.write_text(f'store = "file:///s"\n[drill]\n{drill}')
    assert configuration.load(environment={}, file=file).drill == TERMS
    file.write_text('[drill]\ntimeout = "never"\nnonsense = 1\n[[drill.check]]\nkind = "magic"\n')
    with pytest.raises(ConfigurationError) as caught:
        configuration.load(environment={}, file=file)
    for named in ("drill: timeout", "'nonsense'", "drill.check 1: kind"):
        assert named in str(caught.value)


def test_whether_the_guest_answers_is_always_checked() -> None:
    assert Terms().checks_of("web") == (ANSWERS, PICTURE)
    service = TERMS.checks[1]
    assert Terms((service,)).checks_of("web") == (ANSWERS, service)
    assert Terms((service,)).checks_of("db") == (ANSWERS,)
    assert TERMS.checks_of("web") == TERMS.checks
    assert TERMS.checks_of("db") == (TERMS.checks[0], *TERMS.checks[2:])


@pytest.mark.parametrize(
    ("check", "mistake"),
    [
        ({}, "kind is missing"),
        ("agent", "should be a table"),
        ({"kind": ["agent"]}, "kind"),
        ({"kind": "service"}, "needs service"),
        ({"kind": "service", "service": ""}, "service: should be text"),
        ({"kind": "service", "service": "a\0b"}, "service: should be text"),
        ({"kind": "command", "command": "ls"}, "command: should be a list"),
        ({"kind": "command", "command": []}, "command: should be a list"),
        ({"kind": "command", "command": ["ls"], "status": True}, "status: should be a whole number"),
        ({"kind": "console", "match": "("}, "no regular expression"),
        ({"kind": "console", "match": "(" * 1500}, "no regular expression"),
        ({"kind": "file", "path": "/a", "sha256": "zz"}, "sha256"),
        ({"kind": "file", "path": "/a"}, "needs sha256"),
        ({"kind": "tcp", "port": 70000}, "port"),
        ({"kind": "agent", "timeout": "0s"}, "timeout"),
        ({"kind": "agent", "timeout": 5}, "timeout"),
        ({"kind": "agent", "required": "yes"}, "required"),
        ({"kind": "agent", "path": "/a"}, "'path' is nothing that can be set here"),
    ],
)
def test_mistakes_are_named(check: object, mistake: str) -> None:
    _, mistakes = checks.read({"check": [{"kind": "agent"}, check]})
    assert any(mistake in one and "drill.check 2" in one for one in mistakes), mistakes


@pytest.mark.parametrize("values", [None, [], "x", {"check": {}}, {"check": [{}] * 500}, {"generation": 3}])
def test_what_is_no_table_of_checks_is_told(values: object) -> None:
    assert checks.read(values)[1]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    bad = {"a.toml": b"[", "b.json": b"{", "c.json": b"[" * 100_000, "d.toml": b"\xff", "e.toml": b"#" * (2 << 20)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigurationError) as caught:
            checks.load(tmp_path / name)
        assert caught.value.path == os.fspath(tmp_path / name)
    with pytest.raises(ConfigurationError):
        checks.load(tmp_path / "none.toml")
