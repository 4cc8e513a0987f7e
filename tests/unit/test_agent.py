"""Freezing a guest for a moment: it is thawed however the moment ends, and only a freeze that held counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.agent import quiesced
from tests.support.guest_agent import FakeAgent


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "agent.sock")
    yield made
    made.close()


def test_the_guest_is_frozen_within_and_thawed_after(agent: FakeAgent) -> None:
    with quiesced(agent.path) as state:
        assert agent.frozen
    assert (agent.frozen, state.held, state.why_not) == (False, True, None)


def test_an_error_within_thaws(agent: FakeAgent) -> None:
    with pytest.raises(KeyError), quiesced(agent.path):
        raise KeyError
    assert not agent.frozen


def test_a_guest_that_thawed_by_itself_was_not_held(agent: FakeAgent) -> None:
    with quiesced(agent.path) as state:
        agent.frozen = False
    assert (state.held, state.why_not) == (False, "the guest did not stay frozen")


def test_a_moment_that_takes_too_long_is_ended(agent: FakeAgent) -> None:
    with quiesced(agent.path, seconds=0.3) as state:
        assert agent.thawed_again.wait(20)
    assert not state.held
    assert state.why_not == "the guest was kept frozen for too long"


def test_a_guest_that_refuses_or_is_silent_or_absent_is_told(agent: FakeAgent, tmp_path: Path) -> None:
    agent.refuses.add("guest-fsfreeze-freeze")
    with quiesced(agent.path) as state:
        pass
    assert "not today" in str(state.why_not)
    agent.refuses.clear()
    agent.file_systems = 0
    with quiesced(agent.path) as state:
        pass
    assert (state.held, state.why_not) == (False, "the guest froze no file system")
    agent.silent = True
    with quiesced(agent.path, seconds=0.2) as state:
        pass
    assert "does not answer" in str(state.why_not)
    with quiesced(str(tmp_path / "nothing")) as state:
        pass
    assert "cannot be reached" in str(state.why_not)


def test_a_guest_left_frozen_by_another_is_thawed_first(agent: FakeAgent) -> None:
    agent.frozen = True
    with quiesced(agent.path) as state:
        assert agent.thawed_again.is_set()
        assert agent.frozen
    assert state.held


def test_a_guest_is_thawed_where_the_one_that_froze_it_is_killed(agent: FakeAgent) -> None:
    code = (
        f"import time\nfrom replica.agent import quiesced\nwith quiesced({agent.path!r}, seconds=60):\n time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    assert agent.frozen_once.wait(30)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert agent.thawed_again.wait(30)
    assert not agent.frozen
