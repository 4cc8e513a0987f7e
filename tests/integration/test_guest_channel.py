"""The channel into a guest, over a stand-in for the QEMU guest agent and, where it is installed, the agent itself."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replica.errors import PlatformError, UsageError
from replica.guest import LARGEST_FILE_BYTES, Guest, choose_machine
from replica.model import FailoverKind, RecoveryMachine, State
from replica.platforms.channel import PIECE_BYTES, AgentChannel
from tests.support.guest_agent import FakeAgent
from tests.support.recovery import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the agent is reached by a socket in the file system")

QEMU_GA = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin:/sbin:/bin")
SECONDS = 60.0


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    found = FakeAgent(tmp_path / "agent")
    yield found
    found.close()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[str]:
    """The QEMU guest agent, with this machine as its guest."""
    if QEMU_GA is None:
        pytest.skip("qemu-ga is not installed")
    path = tmp_path / "agent"
    state = tmp_path / "agent-state"
    state.mkdir()
    command = [QEMU_GA, "-m", "unix-listen", "-p", str(path), "-t", str(state), "-f", str(tmp_path / "agent.pid")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_until(path.exists, "the agent listens")
        yield str(path)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(params=["stand-in", "qemu-ga"])
def channel(request: pytest.FixtureRequest) -> AgentChannel:
    if request.param == "qemu-ga":
        return AgentChannel(request.getfixturevalue("real"))
    return AgentChannel(request.getfixturevalue("agent").path)


def test_programs_are_run_and_tell_what_they_said(channel: AgentChannel) -> None:
    assert channel.ping(timeout_seconds=SECONDS)
    said = channel.execute(["/bin/sh", "-c", "echo out; echo err >&2; exit 7"], timeout_seconds=SECONDS)
    assert said == (7, b"out\n", b"err\n")
    assert channel.execute(["/bin/true"], timeout_seconds=SECONDS) == (0, b"", b"")
    assert channel.execute(["/bin/sh", "-c", "kill -9 $$"], timeout_seconds=SECONDS)[0] == 128 + 9
    with pytest.raises(PlatformError):
        channel.execute(["/no/such/program"], timeout_seconds=SECONDS)


def test_a_program_that_does_not_end_is_told_of(channel: AgentChannel) -> None:
    with pytest.raises(PlatformError, match="did not end in the guest"):
        channel.execute(["/bin/sleep", "5"], timeout_seconds=0.5)


def test_files_go_in_and_out(channel: AgentChannel, tmp_path: Path) -> None:
    path = str(tmp_path / "in the guest")
    for content in (b"", b"short", bytes(range(256)) * (PIECE_BYTES // 256) + b"and more"):
        channel.write_file(path, content, timeout_seconds=SECONDS)
        assert Path(path).read_bytes() == content
        assert channel.read_file(path, timeout_seconds=SECONDS) == content
    with pytest.raises(PlatformError, match="holds more than 100 bytes"):
        channel.read_file(path, timeout_seconds=SECONDS, largest_bytes=100)
    with pytest.raises(PlatformError):
        channel.read_file(str(tmp_path / "nothing"), timeout_seconds=SECONDS)


def test_a_guest_without_an_agent_is_told_of(tmp_path: Path, agent: FakeAgent) -> None:
    gone = AgentChannel(str(tmp_path / "nobody"))
    assert not gone.ping(timeout_seconds=0.2)
    assert not gone.shut_down(timeout_seconds=0.2)
    with pytest.raises(PlatformError, match="the guest does not answer") as caught:
        gone.execute(["true"], timeout_seconds=0.2)
    assert "guest agent" in str(caught.value.hint)
    agent.silent = True
    assert not AgentChannel(agent.path).ping(timeout_seconds=0.2)


def test_a_ping_waits_for_a_guest_that_comes_up(tmp_path: Path) -> None:
    path = tmp_path / "late"
    with socket.socket(socket.AF_UNIX) as listener:  # a socket of which nothing answers yet, as QEMU's
        listener.bind(str(path))
        assert not AgentChannel(str(path)).ping(timeout_seconds=0.2)
    path.unlink()
    late = FakeAgent(path)
    try:
        assert AgentChannel(str(path)).ping(timeout_seconds=SECONDS)
    finally:
        late.close()


def test_shutting_down_takes_no_answer_for_granted(agent: FakeAgent) -> None:
    assert AgentChannel(agent.path).shut_down(timeout_seconds=SECONDS)
    wait_until(lambda: agent.asked[-1] == "guest-shutdown", "the guest was asked")


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("guest-exec", {}),
        ("guest-exec", 5),
        ("guest-exec-status", {"exited": "yes"}),
        ("guest-exec-status", {"exited": True}),
        ("guest-exec-status", {"exited": True, "exitcode": 0, "out-data": "%%"}),
        ("guest-exec-status", {"exited": True, "exitcode": 0, "out-data": 5}),
    ],
)
def test_a_guest_that_lies_is_told_in_a_sentence(agent: FakeAgent, command: str, answer: object) -> None:
    agent.alters[command] = answer
    with pytest.raises(PlatformError, match="in an unknown way"):
        AgentChannel(agent.path).execute(["/bin/true"], timeout_seconds=SECONDS)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("guest-file-open", "one"),
        ("guest-file-read", {"count": 1, "buf-b64": "\u00e9", "eof": True}),
        ("guest-file-read", {"count": 0, "buf-b64": "", "eof": False}),
        ("guest-file-read", []),
        ("guest-file-write", {"count": 0}),
        ("guest-file-write", {"count": 1 << 40}),
    ],
)
def test_files_of_a_guest_that_lies(agent: FakeAgent, tmp_path: Path, command: str, answer: object) -> None:
    agent.alters[command] = answer
    path = str(tmp_path / "file")
    Path(path).write_bytes(b"x")
    with pytest.raises(PlatformError):
        AgentChannel(agent.path).read_file(path, timeout_seconds=SECONDS)
        AgentChannel(agent.path).write_file(path, b"content", timeout_seconds=SECONDS)


def test_copying_says_which_side_is_the_guests(agent: FakeAgent, tmp_path: Path) -> None:
    guest = Guest("m", AgentChannel(agent.path))
    inside = tmp_path / "guest"
    inside.mkdir()
    here = tmp_path / "here.txt"
    here.write_bytes(b"content")
    assert guest.copy(str(here), f"guest:{inside}/there.txt", timeout_seconds=SECONDS) == 7
    assert guest.copy(str(here), f"guest:{inside}/", timeout_seconds=SECONDS) == 7
    assert sorted(path.name for path in inside.iterdir()) == ["here.txt", "there.txt"]
    back = tmp_path / "back"
    back.mkdir()
    assert guest.copy(f"guest:{inside}/there.txt", str(back), timeout_seconds=SECONDS) == 7
    assert (back / "there.txt").read_bytes() == b"content"
    for source, target in (("a", "b"), ("guest:a", "guest:b")):
        with pytest.raises(UsageError, match="one of the two"):
            guest.copy(source, target, timeout_seconds=SECONDS)
    with pytest.raises(UsageError, match="cannot read"):
        guest.copy(str(tmp_path / "nothing"), "guest:/x", timeout_seconds=SECONDS)
    with pytest.raises(UsageError, match="cannot write"):
        guest.copy(f"guest:{inside}/there.txt", str(tmp_path / "no" / "folder"), timeout_seconds=SECONDS)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(LARGEST_FILE_BYTES + 1)
    with pytest.raises(UsageError, match="holds more than"):
        guest.copy(str(large), "guest:/x", timeout_seconds=SECONDS)


def machine(name: str) -> RecoveryMachine:
    """Return a recovery machine of that name."""
    when = datetime(2026, 1, 1, tzinfo=UTC)
    return RecoveryMachine(name, "qemu", FailoverKind.TEST, 1, 1, True, "host", "host", when)


def test_the_machine_is_the_one_there_is_or_the_one_named() -> None:
    with pytest.raises(UsageError, match="no recovery machine"):
        choose_machine("web", State(), None)
    one = State(beside=(machine("a"),))
    assert choose_machine("web", one, None).name == "a"
    several = State(beside=(machine("a"), machine("b")))
    with pytest.raises(UsageError, match="several"):
        choose_machine("web", several, None)
    assert choose_machine("web", several, "b").name == "b"
    with pytest.raises(UsageError, match="no recovery machine 'c'"):
        choose_machine("web", several, "c")
    assert choose_machine("web", State(machine=machine("m"), beside=(machine("a"),)), None).name == "m"
