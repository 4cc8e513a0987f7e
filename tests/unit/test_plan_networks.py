"""Networks of machines as plans map them, and programs that plans have run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from replica.failover.failover import Order, failover
from replica.failover.identity import Identifies
from replica.model import FailoverKind, Machine, Nic
from replica.plans import program
from replica.plans.networks import MappedPlatform, mapped
from replica.platforms.folder import MachineFolder
from replica.platforms.platform import MachineSpec
from tests.support.failover import make_site
from tests.support.recovery import wait_until


def test_a_machine_is_made_in_the_networks_that_the_plan_says(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    means = mapped(site.means(), {"lan": "recovery", "*": "quarantine"})
    platform = means.open_platform("qemu")
    assert isinstance(platform, MappedPlatform) and isinstance(platform, Identifies)
    nics = (Nic("52:54:00:00:00:01", "lan"), Nic(None, "dmz"), Nic())
    spec = MachineSpec("m", "web", Machine(1, nics=nics), ())
    platform.define(spec)
    made = site.hypervisor.machines["m"].spec
    assert made.networks == ("recovery", "quarantine", "quarantine")
    assert made.machine == spec.machine  # what it was in at home is kept
    assert platform.mapped(replace(spec, machine=Machine(1))).networks == ()
    only = mapped(site.means(), {"lan": "recovery"}).open_platform("qemu")
    only.define(replace(spec, name="n"))
    assert site.hypervisor.machines["n"].spec.networks == ("recovery", None, None)  # as the platform's settings say
    assert mapped(site.means(), {}).open_platform("qemu").name == "qemu"


def test_a_machine_is_read_as_it_was_written_with_its_networks(tmp_path: Path) -> None:
    folder = MachineFolder(tmp_path, "m")
    for networks in ((), ("lan", None)):
        spec = MachineSpec("m", "web", Machine(1, nics=(Nic(None, "dmz"), Nic())), (), networks=networks)
        folder.write(spec)
        assert folder.read() == spec
    told = json.loads(folder.description.read_bytes())
    del told["networks"]  # as before there were any
    folder.description.write_text(json.dumps(told))
    assert folder.read() == replace(spec, networks=())


def test_a_failover_goes_through_it(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    done = failover(mapped(site.means(), {"*": "recovery"}), Order(FailoverKind.UNPLANNED))
    assert site.hypervisor.running == [done.machine.name]
    assert site.settings.change is not None
    assert site.settings.change.identities[0].hypervisor_id == f"id-of-{done.machine.name}"  # the platform was asked


def test_what_opens_a_store_is_kept_from_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in program.SECRETS:
        monkeypatch.setenv(name, "secret")
    script = "import os; print(sorted(one for one in os.environ if one.startswith('GODWIT_')), os.environ['GODWIT_VM'])"
    ran = program.run([sys.executable, "-c", script], {"GODWIT_VM": "web"}, 60)
    assert (ran.begun, ran.status) == (True, 0)
    assert "web" in ran.said and "PASSPHRASE" not in ran.said and "KEY" not in ran.said


def test_only_the_end_of_what_a_program_says_is_kept() -> None:
    ran = program.run([sys.executable, "-c", "print('x' * 100000 + 'end')"], {}, 60)
    assert ran.said.endswith("xend") and len(ran.said) <= program.KEPT_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_program_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    kept = tmp_path / "pid"
    ran = program.run(["sh", "-c", f"sleep 600 & echo $! > {kept}.new; mv {kept}.new {kept}; wait"], {}, 5)
    assert (ran.begun, ran.status) == (True, None)
    state = Path(f"/proc/{kept.read_text().strip()}/stat")

    def is_gone() -> bool:
        try:
            return state.read_text().rpartition(")")[2].split()[0] == "Z"  # nobody may be there to fetch its status
        except OSError:
            return True

    wait_until(is_gone, "what the program had started was ended")


def test_what_cannot_be_run_was_not_begun(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for name in (str(tmp_path / "none"), str(tmp_path / "text"), "nul\0"):
        ran = program.run([name], {}, 60)
        assert not ran.begun and "cannot be run" in ran.said
