"""virsh and freezing by it, against a stand-in for the program: time-outs, refusals, and a guest that always thaws."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replica.libvirt.freeze import domain_quiesced, thaw
from replica.libvirt.virsh import Virsh, VirshError, VirshRefusedError, VirshTimeoutError

UUID = "6f8a3c1e-0f0e-4a7b-9a63-0123456789ab"

# A domain whose state is files in a folder. "slow" makes a freeze hang, and take place all the same.
STAND_IN = """#!/bin/sh
cd "$(dirname "$0")"
while [ "$1" = --connect ]; do shift 2; done
echo "$*" >> asked
case "$1" in
domfsfreeze)
    if [ -e refuse ]; then echo "error: Unable to freeze filesystems" >&2; echo "error: not today" >&2; exit 1; fi
    if [ -e frozen ]; then echo "error: already frozen" >&2; exit 1; fi
    if [ -e slow ]; then touch frozen; exec sleep 600; fi
    if [ -e none ]; then echo "Froze 0 filesystem(s)"; exit 0; fi
    touch frozen; echo "Froze 2 filesystem(s)" ;;
domfsthaw)
    if [ -e busy ]; then rm busy; echo "error: cannot acquire state change lock" >&2; exit 1; fi
    touch thawed
    if [ -e frozen ]; then rm frozen; echo "Thawed 2 filesystem(s)"; else echo "Thawed 0 filesystem(s)"; fi ;;
show) cat "$3" ;;
hang) exec sleep 600 ;;
esac
"""


class Stub:
    """The stand-in's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "virsh"
        program.write_text(STAND_IN)
        program.chmod(0o755)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def put(self, name: str) -> None:
        (self.folder / name).touch()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not self.has(name):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Stub(tmp_path)


def test_files_are_handed_over_without_names(stub: Stub) -> None:
    assert Virsh("qemu:///x").ask("show", files={"--file": "<ä/>"}) == "<ä/>"
    assert (stub.folder / "asked").read_text().startswith("show --file /dev/fd/")


def test_refusals_silence_and_absence_are_told(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.put("refuse")
    with pytest.raises(VirshRefusedError, match="refuses domfsfreeze: Unable to freeze filesystems; not today"):
        Virsh().ask("domfsfreeze")
    with pytest.raises(VirshTimeoutError, match="did not answer to hang"):
        Virsh(timeout_seconds=0.2).ask("hang")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VirshError, match="not installed"):
        Virsh().ask("list")


def test_the_guest_is_frozen_within_and_thawed_after(stub: Stub) -> None:
    with domain_quiesced(Virsh("qemu:///x"), UUID) as state:
        assert stub.has("frozen")
    assert (stub.has("frozen"), state.held, state.why_not) == (False, True, None)


def test_an_error_within_thaws(stub: Stub) -> None:
    with pytest.raises(KeyError), domain_quiesced(Virsh(), UUID):
        raise KeyError
    assert not stub.has("frozen")


def test_a_moment_that_takes_too_long_is_ended(stub: Stub) -> None:
    with domain_quiesced(Virsh(), UUID, seconds=0.3) as state:
        stub.wait_for("thawed")
    assert not state.held
    assert state.why_not is not None
    assert "too long" in state.why_not or "did not answer" in state.why_not  # the latter on a machine under load


def test_a_freeze_that_hangs_is_given_up_and_thawed_all_the_same(stub: Stub) -> None:
    stub.put("slow")
    stub.put("busy")  # as long as libvirt waits for the agent, it takes no other question to it
    with domain_quiesced(Virsh(), UUID, seconds=1) as state:
        pass
    assert not state.held
    assert "did not answer to domfsfreeze" in str(state.why_not)
    assert stub.has("thawed")
    assert not stub.has("frozen")


def test_a_guest_that_refuses_or_has_nothing_to_freeze_is_told(stub: Stub) -> None:
    stub.put("refuse")
    with domain_quiesced(Virsh(), UUID) as state:
        pass
    assert "not today" in str(state.why_not)
    (stub.folder / "refuse").unlink()
    stub.put("none")
    with domain_quiesced(Virsh(), UUID) as state:
        pass
    assert (state.held, state.why_not) == (False, "the guest froze no file system")


def test_a_guest_that_a_killed_helper_left_frozen_is_thawed_first(stub: Stub) -> None:
    stub.put("frozen")
    with domain_quiesced(Virsh(), UUID) as state:
        assert stub.has("frozen")
    assert (stub.has("frozen"), state.held) == (False, True)


def test_a_guest_that_thawed_by_itself_was_not_held(stub: Stub) -> None:
    with domain_quiesced(Virsh(), UUID) as state:
        (stub.folder / "frozen").unlink()
    assert (state.held, state.why_not) == (False, "the guest did not stay frozen")


def test_thawing_that_never_succeeds_is_given_up(stub: Stub) -> None:
    stub.put("busy")
    assert thaw(Virsh(), UUID, seconds=0) is None
    assert thaw(Virsh(), UUID, seconds=0) == 0


def test_a_guest_is_thawed_where_the_one_that_froze_it_is_killed(stub: Stub) -> None:
    program = (
        "import time\nfrom replica.libvirt.freeze import domain_quiesced\nfrom replica.libvirt.virsh import Virsh\n"
        f"with domain_quiesced(Virsh(), {UUID!r}):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    assert stub.has("frozen")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    stub.wait_for("thawed")
