"""godwit guest exec and copy: what they say and with which exit code, over a guest that is made up."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.output import Output
from replica import catalog, protection
from replica.errors import PlatformError
from replica.guest import Guest
from replica.host import this_host
from replica.stores.address import open_store


class FakeChannel:
    """A guest with one file, and programs that say their arguments."""

    def __init__(self) -> None:
        self.files = {"/etc/motd": b"hello"}
        self.timeout = 0.0

    def ping(self, *, timeout_seconds: float) -> bool:
        return timeout_seconds > 0

    def execute(self, command: Sequence[str], *, timeout_seconds: float) -> tuple[int, bytes, bytes]:
        self.timeout = timeout_seconds
        return int(command[0] == "false"), " ".join(command).encode() + b"\n\xff", b"an error\n"

    def write_file(self, path: str, content: bytes, *, timeout_seconds: float) -> None:
        self.files[path] = content

    def read_file(self, path: str, *, timeout_seconds: float, largest_bytes: int = 64 << 20) -> bytes:
        if path not in self.files:
            raise PlatformError("no such file", path=path)
        return self.files[path]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    address = f"file://{tmp_path / 'store'}"
    store, host = open_store(address, create=True), this_host()
    catalog.init_store(store, host)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    protection.protect(store, host, tenant="default", name="web", disks=[disk])
    return address


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> FakeChannel:
    found = FakeChannel()
    monkeypatch.setattr(Guest, "find", lambda *args, **kwargs: Guest(kwargs.get("machine") or "web-1", found))
    return found


def godwit(*arguments: str) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    code = run(["guest", *arguments], Output(stdout=stdout, stderr=stderr))
    assert "Traceback" not in stderr.getvalue()
    return code, stdout.getvalue(), stderr.getvalue()


def test_a_program_says_what_it_says_and_ends_as_it_ends(url: str, channel: FakeChannel) -> None:
    code, out, err = godwit("exec", "--store", url, "--timeout", "30s", "web", "echo", "-n", "--quiet", "x")
    assert (code, out, err) == (0, "echo -n --quiet x\n\ufffd", "an error\n")
    assert channel.timeout == 30
    assert godwit("exec", "--store", url, "web", "--", "false")[0] == 1
    code, out, _ = godwit("exec", "--store", url, "--json", "--machine", "other", "web", "--", "false", "--json")
    told: dict[str, Any] = json.loads(out)
    assert code == 1
    assert told == {
        "vm": "web",
        "machine": "other",
        "status": 1,
        "output": "false --json\n\ufffd",
        "error_output": "an error\n",
    }


def test_files_are_copied_both_ways(url: str, channel: FakeChannel, tmp_path: Path) -> None:
    code, out, _ = godwit("copy", "--store", url, "web", "guest:/etc/motd", str(tmp_path / "motd"))
    assert (code, out) == (0, f"web-1: copied guest:/etc/motd to {tmp_path / 'motd'} (5 bytes)\n")
    assert (tmp_path / "motd").read_bytes() == b"hello"
    code, out, _ = godwit("copy", "--store", url, "--json", "web", str(tmp_path / "motd"), "guest:/tmp/")
    assert code == 0 and json.loads(out)["size_bytes"] == 5
    assert channel.files["/tmp/motd"] == b"hello"
    assert godwit("copy", "--store", url, "web", "a", "b")[0] == 2
    assert godwit("copy", "--store", url, "web", "guest:/nothing", str(tmp_path / "x"))[0] == 1


def test_a_vm_without_a_recovery_machine_is_told_what_starts_one(url: str) -> None:
    code, _, err = godwit("exec", "--store", url, "web", "true")
    assert code == 2
    assert "no recovery machine" in err and "godwit failover" in err


def test_options_after_the_name_are_not_taken_for_a_program(url: str, channel: FakeChannel) -> None:
    code, _, err = godwit("exec", "--store", url, "web", "--timeout", "5s", "--", "true")
    assert code == 2 and "--timeout comes after NAME" in err
    assert channel.timeout == 0
