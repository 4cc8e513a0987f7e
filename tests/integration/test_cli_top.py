"""godwit top, and what health and status tell of agents, as they are typed."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fcntl import ioctl
from pathlib import Path

import pytest

from cli.main import run
from cli.output import Output
from replica import catalog
from replica.daemon import statusfile
from replica.health.publishing import Publisher, Watched
from replica.host import this_host
from replica.stores.address import open_store
from tests.support.engine import random_blocks

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GODWIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    assert godwit("init", str(tmp_path / "store"))[0] == 0
    return tmp_path


def godwit(*arguments: str, terminal: bool = False) -> tuple[int, str, str]:
    stdout, stderr = Terminal() if terminal else io.StringIO(), io.StringIO()
    code = run(arguments, Output(stdout=stdout, stderr=stderr))
    return code, stdout.getvalue(), stderr.getvalue()


def protect(folder: Path, name: str) -> None:
    disk = folder / f"{len(list(folder.glob('*.raw')))}.raw"
    disk.write_bytes(random_blocks(len(name), 2))
    assert godwit("protect", name, "--disk", str(disk))[0] == 0
    assert godwit("replicate", name)[0] == 0


def publish(folder: Path, *names: str, **more: object) -> None:
    """Write a digest, as the agent of this machine would."""
    host = this_host(folder / "state")
    store = open_store(str(folder / "store"))
    watched = [Watched(catalog.find(store, "default", name), "waiting", **more) for name in names]  # type: ignore[arg-type]
    assert Publisher(host, "default").publish(store, watched).waiting == 0


def say(folder: Path, *, age: timedelta = timedelta(0), state: str = "running") -> None:
    """Write the status file of an agent."""
    now = datetime.now(UTC)
    vms = {
        "web": {
            "state": "running",
            "failures": 0,
            "next_at": None,
            "progress": {"since": now, "phase": "replicating", "done_bytes": 1, "total_bytes": 4},
        },
        "db": {
            "state": "retrying",
            "failures": 2,
            "next_at": now + timedelta(minutes=5),
            "error": {"message": "the disk is gone", "hint": None},
        },
    }
    told = {
        "state": state,
        "process": 1,
        "host_name": "here",
        "store": str(folder / "store"),
        "tenant": "default",
        "written_at": now - age,
        "vms": vms,
    }
    statusfile.write(folder / "state", told)


def test_health_tells_digests_by_default_and_looks_with_fresh(environment: Path) -> None:
    protect(environment, "web")
    protect(environment, "db")
    publish(environment, "web")
    told = json.loads(godwit("health", "--json")[1])
    assert (told["digests"], told["looked_at"]) == (1, 1)
    as_of = {one["name"]: one["as_of"] for one in told["vms"]}
    assert as_of["web"] is not None and as_of["db"] is None
    told = json.loads(godwit("health", "--fresh", "--json")[1])
    assert (told["digests"], told["looked_at"]) == (0, 2)
    assert json.loads(godwit("health", "web", "--json")[1])["as_of"] is None
    [digest] = (environment / "store/tenants/default/fleet/digests").iterdir()
    digest.write_bytes(b"broken")
    code, out, err = godwit("health")
    assert code == 0 and "web" in out and "no digest" in err


def test_an_agent_s_error_is_a_reason(environment: Path) -> None:
    protect(environment, "web")
    publish(environment, "web", failures=3, error="the disk is gone", hint="bring it back")
    code, out, _ = godwit("health")
    assert code == 3 and "agent-failing" in out and "the disk is gone (bring it back)" in out


def test_one_frame_holds_every_vm_and_what_the_agent_does(environment: Path) -> None:
    protect(environment, "web")
    protect(environment, "db")
    publish(environment, "web", "db")
    say(environment)
    code, out, _ = godwit("top", "--once")
    assert code == 0
    assert re.search(r"2 VMs: 0 critical, 0 warning, 2 normal; 0 ready, 2 unproven, 0 not ready", out)
    assert re.search(r"RPO: .* at most \(\w+\), 0 late; 1 digest, up to ", out)
    assert re.search(r"^web +normal .* running *$", out, re.MULTILINE)
    assert re.search(r"^db +normal .* retrying +\dm.* the disk is gone$", out, re.MULTILINE)
    assert "agent here: running" in out and "web (replicating 25 %" in out
    assert "last error: db (2 in a row): the disk is gone" in out
    told = json.loads(godwit("top", "--json")[1])
    assert told["health"] == {"normal": 2, "warning": 0, "critical": 0}
    assert told["agent"]["heard_of"] is True and len(told["agent"]["vms"]) == 2


@pytest.mark.parametrize(
    "sorting, first",
    [("health", "web"), ("name", "db"), ("rpo", "web"), ("late", "web"), ("churn", "db"), ("next", "db")],
)
def test_what_is_asked_for_comes_first(environment: Path, sorting: str, first: str) -> None:
    protect(environment, "db")
    disk = environment / "new.raw"
    disk.write_bytes(random_blocks(3, 2))
    assert godwit("protect", "web", "--disk", str(disk))[0] == 0  # and never replicated
    publish(environment, "db", "web")
    say(environment)
    _, out, _ = godwit("top", "--once", "--sort", sorting)
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("web ", "db "))]
    assert rows[0] == first and len(rows) == 2


@pytest.mark.parametrize("columns", [80, 120])
def test_a_frame_on_a_terminal_keeps_within_its_width(
    environment: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    protect(environment, "a machine with a rather long name, as they are given in some places")
    protect(environment, "web")
    publish(environment, "web", failures=9, error="a message that is much too long " * 9)
    code, out, _ = godwit("top", "--once", terminal=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    assert code == 0 and max(len(line) for line in shown.splitlines()) <= columns
    assert "web" in shown and "a machine with" in shown and "a message that" in shown


def test_without_vms_and_without_an_agent_there_is_a_frame_too() -> None:
    code, out, _ = godwit("top", "--once")
    assert code == 0 and "0 VMs" in out and "no agent of this store has run on this machine" in out


def test_status_tells_what_the_agent_of_this_machine_does(environment: Path) -> None:
    protect(environment, "web")
    protect(environment, "db")
    assert json.loads(godwit("status", "--json")[1])["agent"] is None
    assert "agent" not in godwit("status")[2]
    say(environment)
    assert "agent on this machine: running, seen" in godwit("status")[2]
    assert "1 retrying, 1 running" in godwit("status")[2]
    _, out, _ = godwit("status", "db")
    assert re.search(
        r"^agent here: +running, seen .*; retrying, next turn in .* last failure \(2 in a row\)", out, re.M
    )
    assert json.loads(godwit("status", "web", "--json")[1])["agent"]["vm"]["state"] == "running"
    say(environment, age=timedelta(hours=1), state="stopped")
    assert "not running: last heard of 1 h ago, it was stopped" in godwit("status", "web")[1]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    yield ours, theirs
    for one in (ours, theirs):
        os.close(one)


def _read_until(descriptor: int, wanted: bytes) -> bytes:
    found = b""
    while wanted not in found:
        ready, _, _ = select.select([descriptor], [], [], LIMIT_SECONDS)
        assert ready, found[-2000:]
        found += os.read(descriptor, 65536)
    return found


def test_it_runs_until_ctrl_c_and_leaves_without_a_word(environment: Path, terminal: tuple[int, int]) -> None:
    protect(environment, "web")
    ours, theirs = terminal
    # Whoever runs tests in the background may have them ignore Ctrl-C, and what they start with them.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "top", "--interval", "1s"]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
    ) as process:
        try:
            _read_until(ours, b"no agent of this store")
            protect(environment, "db")
            shown = _read_until(ours, b"2 VMs")
            assert b"Traceback" not in shown
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            # What is still drawn has to be taken, or the process waits for that.
            deadline = time.monotonic() + LIMIT_SECONDS
            while process.poll() is None:
                assert time.monotonic() < deadline, "it goes on"
                if select.select([ours], [], [], 0.05)[0]:
                    os.read(ours, 65536)
            assert (process.returncode, process.stderr.read()) == (0, b"")
        finally:
            process.kill()
