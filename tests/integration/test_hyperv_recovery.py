"""Recovery machines on a stand-in for a Hyper-V host that executes our PowerShell: the whole circle, tests, guests."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from replica.hyperv import connect as connecting
from replica.hyperv.session import SessionError
from replica.platforms.hyperv import scripts
from tests.support import conversion_disks
from tests.support.engine import BLOCK
from tests.support.fake_hyperv import FakeHost, FakeVm
from tests.support.powershell_values import PsObject
from tests.support.typed import good, run
from vhdx import osfile
from vhdx.create import create_disk
from vhdx.formats import open_disk
from vhdx.writer import open_writable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a server of the disks runs beside")

MIB = 1 << 20
SIZE = 8 * MIB
PASSWORD = "guest secret"


class Site:
    """The VM "web" in VHDX files at home, protected, with a point; and a Hyper-V host whose folder is mounted here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake = FakeHost(folder / "host")
        self.share = self.fake.here("D:\\Recovery")
        self.share.mkdir(parents=True)
        self.fake.switches.append(PsObject(Name="Production", SwitchType="External", Notes=""))
        self.disks = [folder / "home" / f"{name}.vhdx" for name in ("os", "data")]
        for number, path in enumerate(self.disks):
            path.parent.mkdir(exist_ok=True)
            create_disk(path, size=SIZE, block_size=MIB)
            self.write_home(number, BLOCK, 3)
        self.configure()

    def configure(self, **more: str) -> None:
        settings = {
            "host": "hv1.example",
            "folder": "D:\\Recovery",
            "share": str(self.share),
            "switch": "Production",
            "test_switch": "Godwit tests",
            "guest_user": "Administrator",
            **more,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if value]
        (self.folder / "godwit.toml").write_text("\n".join(["[platforms.hyperv]", *lines, ""]))

    def write_home(self, seed: int, offset: int, blocks: int = 1) -> None:
        with open_writable(self.disks[seed % 2]) as disk:
            disk.write_at(offset, random.Random(seed).randbytes(blocks * BLOCK))
            disk.flush()

    def home(self) -> list[bytes]:
        found = []
        for path in self.disks:
            with open_disk(path) as disk:
                found.append(disk.read_at(0, disk.size))
        return found

    @property
    def vm(self) -> FakeVm:
        (found,) = self.fake.vms
        return found

    def there(self) -> list[bytes]:
        return [bytes(one.content) for one in self.vm.disks]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("GODWIT_GUEST_PASSWORD", PASSWORD)
    monkeypatch.setattr(osfile.PosixFile, "fsync", lambda file: None)  # no power fails here
    monkeypatch.chdir(tmp_path)
    made = Site(tmp_path)
    monkeypatch.setattr(connecting, "connect", made.fake.connect)
    good("init", tmp_path / "store")
    generation = ("--generation", "2", "--nic", "00:15:5d:00:00:07", "--cpus", "2", "--memory", "1GiB")
    good("protect", "web", "--disk", made.disks[0], "--disk", made.disks[1], *generation)
    good("replicate", "web")
    return made


def test_the_whole_circle(site: Site) -> None:
    before = site.home()
    done = good("failover", "web", "--unplanned", "--platform", "hyperv", "--yes", "--json").document
    vm = site.vm
    assert vm.state == "Running" and vm.generation == 2
    assert site.there() == before
    assert (vm.cpus, vm.startup, vm.dynamic) == (2, 1 << 30, False)
    assert vm.adapters == [
        {"name": "Network Adapter 1", "mac": "00155D000007", "dynamic": False, "network": "Production"}
    ]
    assert vm.settings["automatic_checkpoints_enabled"] is False
    assert vm.settings["first"] == vm.disks[0].files[0]
    assert vm.notes.startswith(f"Godwit recovery machine {done['machine']['name']}; disks 0=scsi-0-0 1=scsi-0-1;")
    assert vm.notes.endswith("; of web")
    good("commit", "web")
    vm.disks[0].write(5 * BLOCK, b"what the guest wrote" * 10)
    good("reprotect", "web")
    assert f"hyperv:{vm.guid}" in good("status", "web", "--json").out

    first = good("replicate", "web", "--json").document
    assert [one["found_by"] for one in first["disks"]] == ["scan", "scan"]  # nothing recorded from the beginning
    assert first["changed_blocks"] == 1
    vm.disks[1].write(7 * BLOCK, b"and once more" * 10)
    second = good("replicate", "web", "--json").document
    assert [one["found_by"] for one in second["disks"]] == ["rct", "rct"]
    assert second["changed_blocks"] == 1 and second["read_bytes"] <= 2 * BLOCK

    vm.disks[0].write(9 * BLOCK, b"at the last moment" * 10)
    wanted = site.there()
    home = good("failback", "web", "--yes", "--json").document
    assert home["standing"] == "protected"
    assert site.home() == wanted
    assert site.fake.vms == []
    assert list(site.share.iterdir()) == []
    good("replicate", "web")
    assert sum(one["written_bytes"] for one in home["homecoming"]["disks"]) <= 4 * BLOCK


def test_a_test_is_isolated_and_leaves_nothing(site: Site) -> None:
    first = good("failover", "web", "--test", "--platform", "hyperv", "--json").document["machine"]["name"]
    vm = site.vm
    assert [(one.Name, one.SwitchType) for one in site.fake.switches][1:] == [("Godwit tests", "Private")]
    assert [(one["network"], one["dynamic"]) for one in vm.adapters] == [("Godwit tests", True)]
    assert vm.settings["automatic_start_action"] == "Nothing"
    good("replicate", "web")  # from its source, as ever
    second = good("failover", "web", "--test", "--platform", "hyperv", "--json").document["machine"]["name"]
    assert first != second
    good("cleanup", "web", "--test", first, "--yes")
    assert [one.Name for one in site.fake.switches] == ["Production", "Godwit tests"]  # another test is on it
    good("cleanup", "web", "--test", second, "--yes")
    assert [one.Name for one in site.fake.switches] == ["Production"]
    assert site.fake.vms == []
    assert list(site.share.iterdir()) == []


def test_a_planned_failover_and_its_machine_removed(site: Site) -> None:
    site.write_home(4, 20 * BLOCK)
    done = good("failover", "web", "--planned", "--platform", "hyperv", "--yes", "--json").document
    assert done["final_point"] == 2
    assert site.there() == site.home()
    site.fake.busy = 3  # files that Hyper-V has open for a moment
    good("cleanup", "web", "--yes")
    assert site.fake.vms == [] and list(site.share.iterdir()) == []


def test_a_vm_that_is_replicated_from_a_host_is_shut_down_for_a_planned_failover(site: Site) -> None:
    vm = site.fake.add_vm("erp")
    disk = vm.add_disk("os", SIZE)
    disk.write(BLOCK, b"before" * 100)
    mapped = f"C:\\={site.fake.here('C:')}"
    good("protect", "erp", "--hyperv", "erp", "--host", "hv1.example", "--host-path", mapped)
    good("replicate", "erp")
    disk.write(3 * BLOCK, b"after" * 100)
    done = good("failover", "erp", "--planned", "--platform", "files", "--yes", "--json").document
    assert vm.off and vm.recovery_checkpoints() == [] and len(disk.files) == 1
    with open_disk(Path(done["machine"]["disks"][0]["address"])) as restored:
        assert restored.read_at(0, restored.size) == disk.content
    good("cleanup", "erp", "--yes")


@pytest.mark.skipif(bool(conversion_disks.missing()), reason=conversion_disks.missing() or "all is there")
def test_the_circle_through_generation_1(site: Site, tmp_path: Path) -> None:
    places = conversion_disks.plain_places(
        conversion_disks.make_esp(tmp_path, conversion_disks.esp_files()),
        conversion_disks.make_root(tmp_path, conversion_disks.root_files()),
    )
    raw = conversion_disks.make_disk(places, conversion_disks.PLAIN_SECTORS).to_file(tmp_path / "system.raw")
    before = raw.read_bytes()
    good("protect", "sys", "--disk", raw, "--generation", "2")
    good("replicate", "sys")
    good("failover", "sys", "--unplanned", "--platform", "hyperv", "--generation", "1", "--yes")
    vm = site.vm
    assert vm.generation == 1 and [one.position for one in vm.disks] == ["ide-0-0"]
    converted = bytes(vm.disks[0].content)
    assert converted != before and converted[510:512] == b"\x55\xaa" and converted[:440] != before[:440]
    good("commit", "sys")
    free = next(at for at in range(8 * MIB, len(before), BLOCK) if not any(before[at : at + BLOCK]))
    vm.disks[0].write(free, b"the guest was here")
    good("reprotect", "sys")
    done = good("replicate", "sys", "--json").document
    assert done["changed_blocks"] < len(before) // BLOCK // 4
    good("failback", "sys", "--yes")
    wanted = before[:free] + b"the guest was here" + before[free + 18 :]
    assert raw.read_bytes() == wanted
    assert site.fake.vms == []


def test_another_agent_sees_the_machine_and_removes_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    good("failover", "web", "--unplanned", "--platform", "hyperv", "--yes")
    monkeypatch.setenv("GODWIT_STATE", str(site.folder / "another"))
    site.vm.guest.programs["cmd.exe"] = lambda arguments: (0, b"here", b"")
    assert good("guest", "exec", "web", "--", "cmd.exe").out == "here"
    good("commit", "web")
    good("reprotect", "web")
    good("replicate", "web")


def unreachable(site: Site) -> None:
    def refuse(url: str | None) -> object:
        raise SessionError("the host cannot be asked: no route", path=url)

    site.fake.connect = refuse  # type: ignore[assignment]


def no_switch(site: Site) -> None:
    site.fake.switches.clear()


def not_private(site: Site) -> None:
    site.configure(test_switch="Outside")
    site.fake.switches.append(PsObject(Name="Outside", SwitchType="External", Notes=""))


def not_mounted(site: Site) -> None:
    site.configure(share=str(site.folder / "nowhere"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (unreachable, "--platform files"),
        (no_switch, "there is no switch Production"),
        (not_private, "not a private one"),
        (not_mounted, "mount it"),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_what_stands_against_it_is_known_before_the_source_is_touched(
    site: Site, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Site], None], told: str
) -> None:
    spoil(site)
    monkeypatch.setattr(connecting, "connect", site.fake.connect)
    done = run("failover", "web", "--planned", "--platform", "hyperv", "--yes")
    assert done.code == 1 and told in done.err, done.err
    assert good("status", "web", "--json").document["standing"] == "protected"
    assert good("points", "web", "--json").out.count('"point"') == 1


def test_a_plan_puts_a_machine_on_the_switch_that_it_names(site: Site) -> None:
    site.fake.switches += [PsObject(Name=one, SwitchType="External", Notes="") for one in ("Recovery", "Quarantine")]
    with (site.folder / "godwit.toml").open("a") as file:
        file.write('[platforms.hyperv.networks]\n"*" = "Quarantine"\n')

    def plan(networks: str, platform: str = "hyperv") -> Path:
        path = site.folder / "shop.yaml"
        path.write_text(
            f"plan: shop\ndefaults: {{platform: {platform}}}\ngroups:\n"
            f"  - group: front\n    vms:\n      - {{vm: web, networks: {networks}}}\n"
        )
        return path

    there = "there are: [Production] [Recovery] [Quarantine]"
    for command, code in (("validate", 1), ("run --planned --yes", 2), ("run --unplanned --yes", 1)):
        done = run("plan", *command.split(), plan("{'*': Nothing}"))
        assert done.code == code and there in " ".join((done.out + done.err).split()), (command, done.out, done.err)
    assert good("status", "web", "--json").document["standing"] == "protected" and site.fake.vms == []
    assert "networks" not in good("plan", "validate", plan("{'*': Recovery}")).err
    assert "platform files knows one network at most" in good("plan", "validate", plan("{'*': x}", "files")).err
    good("plan", "run", plan("{'*': Recovery}"), "--unplanned", "--yes", "--anew")
    assert [one["network"] for one in site.vm.adapters] == ["Recovery"]
    good("plan", "cleanup", "shop", "--yes")
    good("plan", "run", plan("{lan: Recovery}"), "--unplanned", "--yes")  # of which the VM's adapter is none
    assert [one["network"] for one in site.vm.adapters] == ["Quarantine"]


def test_a_host_without_memory_says_so_and_cleanup_takes_it_back(site: Site) -> None:
    site.fake.memory = 1 << 29
    done = run("failover", "web", "--unplanned", "--platform", "hyperv", "--yes")
    assert done.code == 1 and "Arbeitsspeicher" in done.err and "hv1.example" in done.err
    good("cleanup", "web", "--yes")
    assert site.fake.vms == [] and good("status", "web", "--json").document["standing"] == "protected"


def test_machines_of_others_are_left_alone(site: Site) -> None:
    theirs = site.fake.add_vm("web", notes="Godwit recovery machine of my own", off=True)
    good("failover", "web", "--test", "--platform", "hyperv")
    good("cleanup", "web", "--all", "--yes")
    assert site.fake.vms == [theirs]


# -- guests -----------------------------------------------------------------------------------------------------------


def test_programs_run_in_the_guest_and_files_are_copied(site: Site) -> None:
    good("failover", "web", "--test", "--platform", "hyperv")
    given: list[str] = []

    def tool(arguments: str) -> tuple[int, bytes, bytes]:
        given.append(arguments)
        return 3, b"said\r\n", b"wrong"

    guest = site.vm.guest
    guest.programs["C:\\tool.exe"] = tool
    done = run("guest", "exec", "web", "--", "C:\\tool.exe", "a b", 'say "x"', "$(evil)")
    assert (done.code, done.out) == (3, "said\r\n"), done.err
    assert given == ['"a b" "say \\"x\\"" $(evil)']
    (site.folder / "here.bin").write_bytes(b"content" * 100)
    good("guest", "copy", "web", "here.bin", "guest:C:\\Temp\\there.bin")
    assert guest.files == {"C:\\Temp\\there.bin": b"content" * 100}
    assert [one.name for one in site.share.iterdir() if one.is_file()] == []  # what was copied from is gone
    good("guest", "copy", "web", "guest:C:\\Temp\\there.bin", "back.bin")
    assert (site.folder / "back.bin").read_bytes() == b"content" * 100
    carried = {name for name, parameters in site.fake.asked if PASSWORD in json.dumps(parameters)}
    assert carried == {scripts.EXECUTE.name, scripts.FETCH.name}
    for path in site.folder.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


def test_a_drill_looks_into_the_guest(site: Site) -> None:
    def arm(name: str, number: int) -> None:
        for vm in site.fake.vms:
            vm.guest.programs["hostname"] = lambda arguments: (0, b"web\r\n", b"")

    site.fake.after = arm
    (site.folder / "checks.toml").write_text(
        '[[check]]\nkind = "agent"\n[[check]]\nkind = "command"\ncommand = ["hostname"]\nmatch = "web"\n'
        '[[check]]\nkind = "screenshot"\n'
    )
    done = run("drill", "web", "--platform", "hyperv", "--checks", "checks.toml", "--json")
    assert done.code == 0, done.err + done.out
    assert site.fake.vms == [] and list(site.share.iterdir()) == []
