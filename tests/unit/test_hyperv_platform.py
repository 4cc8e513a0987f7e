"""The platform of Hyper-V hosts by itself: how machines are made there, found again, reached and removed."""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replica.errors import ConfigurationError, PlatformError
from replica.host import this_host
from replica.hyperv import connect as connecting
from replica.hyperv import stopping
from replica.hyperv.address import HypervAddress
from replica.hyperv.scripts import STOP_FUNCTION, Script
from replica.hyperv.session import SessionError
from replica.model import Machine, Nic
from replica.platforms.hyperv import HypervPlatform, description, screen, scripts, settings, starting
from replica.platforms.platform import DiskSpec, MachineSpec, Power
from tests.support.fake_hyperv import FakeHost, FakeVm
from tests.support.fake_hyperv_cmdlets import shell
from tests.support.powershell import errors_of
from tests.support.powershell_values import PsObject
from vhdx import osfile
from vhdx.create import create_disk
from vhdx.writer import open_writable

MIB = 1 << 20
NAME = "godwit-0123abcd-89ef4567"
EVIL = "it's \"$(Remove-Item C:\\)\" `n '@ \n'@\r\n; made 0; ünï \u2028 <#>"
MACHINE = Machine(1, 2, 64 * MIB, (Nic("52:54:00:12:34:56"), Nic(None)))


class Lab:
    """A host whose folder is reached here, a platform on it, and a disk to make machines of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake = FakeHost(folder / "host")
        self.share = self.fake.here("D:\\Recovery")
        self.share.mkdir(parents=True)
        self.source = folder / "source.vhdx"
        create_disk(self.source, size=4 * MIB, block_size=MIB)
        with open_writable(self.source) as disk:
            disk.write_at(MIB, b"the content")
            disk.flush()
        self.fake.switches.append(PsObject(Name="Production", SwitchType="External", Notes=""))

    def platform(self, **more: Any) -> HypervPlatform:
        table = {
            "host": "hv1",
            "folder": "D:\\Recovery",
            "share": str(self.share),
            "switch": "Production",
            "test_switch": "Tests",
            "guest_user": "Administrator",
            **more,
        }
        given = {settings.PASSWORD: "guest secret"}
        read = settings.read({key: value for key, value in table.items() if value}, given)
        return HypervPlatform(this_host(self.folder / "state"), read, sleep=lambda seconds: None)

    def spec(self, disks: int = 1, **about: Any) -> MachineSpec:
        listed = tuple(DiskSpec(n, 4 * MIB, "scsi", path=self.source, format="vhdx") for n in range(disks))
        machine = replace(MACHINE, **{one: about.pop(one) for one in ("generation", "secure_boot") if one in about})
        return MachineSpec(about.pop("name", NAME), about.pop("vm_name", "web 1"), machine, listed, **about)

    @property
    def vm(self) -> FakeVm:
        (found,) = self.fake.vms
        return found


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    made = Lab(tmp_path)
    monkeypatch.setattr(connecting, "connect", made.fake.connect)
    monkeypatch.setattr(osfile.PosixFile, "fsync", lambda file: None)  # no power fails here
    return made


# -- made -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "at"),
    [
        (1, ["ide-0-0", "ide-0-1", "ide-1-1", "scsi-0-0", "scsi-0-1"]),
        (2, ["scsi-0-0", "scsi-0-1", "scsi-0-2", "scsi-0-3", "scsi-0-4"]),
    ],
)
def test_a_machine_has_its_disks_where_it_starts_from_them(lab: Lab, generation: int, at: list[str]) -> None:
    platform = lab.platform()
    platform.define(lab.spec(5, generation=generation))
    assert [one.position for one in lab.vm.disks] == at
    assert all(bytes(one.content[MIB : MIB + 11]) == b"the content" for one in lab.vm.disks)
    assert [HypervAddress.parse(one.address).disk for one in platform.disks(NAME)] == at
    assert lab.vm.generation == generation and platform.power(NAME) is Power.OFF


def test_more_disks_than_one_controller_takes() -> None:
    places = [str(one) for one in description.places(70, 2)]
    assert (places[63], places[64], len(set(places))) == ("scsi-0-63", "scsi-1-0", 70)
    assert len(description.places(259, 1)) == 259
    for count, generation in ((260, 1), (257, 2)):
        with pytest.raises(PlatformError, match="at most"):
            description.places(count, generation)


def test_a_second_controller_is_added(lab: Lab) -> None:
    made = description.document(lab.spec(66, generation=2), "D:\\Recovery\\x")
    lab.fake.here("D:\\Recovery\\x").mkdir()
    for disk in made["disks"]:
        lab.fake.here(disk["path"]).symlink_to(lab.source)
    text = f"param([string]$Text)\n{STOP_FUNCTION}{scripts.FUNCTIONS}\n"
    shell(lab.fake).run(text + "New-GodwitMachine (ConvertFrom-Json -InputObject $Text)", {"Text": json.dumps(made)})
    assert lab.vm.scsi == 2 and lab.vm.disks[-1].position == "scsi-1-1"


@pytest.mark.parametrize(
    ("system", "template", "wanted"),
    [
        ("linux", "", "MicrosoftUEFICertificateAuthority"),
        ("windows", "", "MicrosoftWindows"),
        (None, "", "MicrosoftWindows"),
        (None, "MicrosoftUEFICertificateAuthority", "MicrosoftUEFICertificateAuthority"),
    ],
)
def test_secure_boot_trusts_who_signed_the_system(lab: Lab, system: Any, template: str, wanted: str) -> None:
    platform = lab.platform(secure_boot_template=template)
    platform.define(lab.spec(generation=2, secure_boot=True, system=system))
    assert lab.vm.secure and lab.vm.settings["template"] == wanted
    platform.delete(NAME)
    platform.define(lab.spec(generation=2, system=system))
    assert not lab.vm.secure


def test_addresses_are_kept_but_not_in_tests(lab: Lab) -> None:
    lab.platform().define(lab.spec())
    assert [(one["mac"], one["network"]) for one in lab.vm.adapters] == [
        ("525400123456", "Production"),
        ("000000000000", "Production"),
    ]
    lab.platform().delete(NAME)
    lab.platform(test_switch="").define(lab.spec(isolated=True))
    assert [(one["dynamic"], one["network"]) for one in lab.vm.adapters] == [(True, "")] * 2


def test_adapters_are_on_the_switches_that_their_networks_are_called(lab: Lab) -> None:
    lab.fake.switches += [PsObject(Name=one, SwitchType="External", Notes="") for one in ("Lan", "Dmz")]
    source = replace(MACHINE, nics=(Nic(None, "vm network"), Nic(None, "dmz"), Nic()))

    def on(told: tuple[str | None, ...] = (), *, isolated: bool = False, **more: Any) -> list[str]:
        platform = lab.platform(**more)
        spec = replace(lab.spec(), machine=source, networks=told, isolated=isolated)
        platform.check_machine(spec)
        platform.define(spec)
        found = [one["network"] for one in lab.vm.adapters]
        platform.delete(NAME)
        return found

    assert on() == ["Production"] * 3
    mapping = {"vm network": "Lan"}
    assert on(networks=mapping) == ["Lan", "Production", "Production"]
    assert on(networks={**mapping, "*": "Dmz"}) == ["Lan", "Dmz", "Dmz"]
    assert on(("Dmz", None, "Lan"), networks=mapping) == ["Dmz", "Production", "Lan"]
    assert on((None, "Lan"), networks=mapping, switch="") == ["Lan", "Lan", ""]
    assert on(("Lan",), networks=mapping, isolated=True) == ["Tests"] * 3


def test_a_switch_that_is_not_there_is_missed_before_anything_is_made(lab: Lab) -> None:
    spec = replace(lab.spec(), networks=("Nothing",))
    for platform, one in ((lab.platform(), spec), (lab.platform(networks={"*": "Nothing"}), lab.spec())):
        for ask in (platform.check_machine, platform.define):
            with pytest.raises(PlatformError, match=r"there is no switch Nothing; there are: \[Production\]"):
                ask(one)
        platform.check_machine(replace(one, isolated=True))
    with pytest.raises(PlatformError, match="'Tests' is the network of tests"):
        lab.platform().check_machine(replace(spec, networks=(None, "Tests")))
    assert lab.fake.vms == [] and list(lab.share.iterdir()) == []


def test_what_anybody_called_a_vm_is_text_and_nothing_else(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec(vm_name=EVIL))
    assert lab.vm.name == NAME
    assert "\n" not in lab.vm.notes and description.noted(lab.vm.notes, NAME) == {0: "ide-0-0"}
    assert platform.disks(NAME)[0].number == 0
    for name in ("..", "a\\b", "a/b", "x'y", "nul", "", "a" * 81, "a;b", " a", "a.", "*", "a[b]", "\u00e4"):
        with pytest.raises(PlatformError):
            platform.power(name)


def test_a_server_of_2016_knows_of_no_automatic_checkpoints(lab: Lab) -> None:
    lab.fake.is_2016 = True
    lab.platform().define(lab.spec())
    assert lab.vm.settings["checkpoint_type"] == "Production"
    assert "automatic_checkpoints_enabled" not in lab.vm.settings


# -- repeated, cut off, in the way ------------------------------------------------------------------------------------


def test_everything_is_safe_to_repeat(lab: Lab) -> None:
    platform = lab.platform()
    assert platform.power(NAME) is Power.GONE
    platform.delete(NAME)
    for _ in range(2):
        platform.define(lab.spec(isolated=True))
    vm = lab.vm
    for _ in range(2):
        platform.start(NAME)
    assert platform.power(NAME) is Power.RUNNING
    vm.disks[0].write(0, b"written by the guest")
    platform.define(lab.spec(isolated=True))  # it runs: it is left as it is
    assert lab.vm is vm and bytes(vm.disks[0].content[:7]) == b"written"
    for _ in range(2):
        platform.stop(NAME)
    for _ in range(2):
        platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE
    assert lab.fake.vms == [] and list(lab.share.iterdir()) == []


def test_a_host_that_ends_anywhere_is_gone_on_with(lab: Lab) -> None:
    platform, number = lab.platform(), 0
    spec = lab.spec(2, generation=2, isolated=True)
    while True:
        number += 1
        lab.fake.done.clear()
        lab.fake.dies_at = number
        try:
            platform.define(spec)
            platform.start(NAME)
            platform.stop(NAME, force=True)
            platform.delete(NAME)
        except PlatformError as error:
            assert "the host is gone" in str(error)
        else:
            break
        lab.fake.dies_at = 0
        platform.define(spec)
        platform.start(NAME)
        assert platform.power(NAME) is Power.RUNNING
        assert len(lab.vm.disks) == 2 and len(lab.vm.adapters) == 2, f"after {number}: {lab.fake.done}"
        platform.delete(NAME)
        assert platform.power(NAME) is Power.GONE
        assert [one.Name for one in lab.fake.switches] == ["Production"]
    assert number > 15


def test_one_that_is_another_is_not_replaced(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    before = lab.vm
    with pytest.raises(PlatformError, match="made as another"):
        platform.define(lab.spec(isolated=True))
    assert lab.vm is before


def test_one_of_its_name_that_is_none_of_ours_is_left_alone(lab: Lab) -> None:
    theirs = lab.fake.add_vm(NAME, off=True, path="C:\\elsewhere\\" + NAME)
    platform = lab.platform()
    with pytest.raises(PlatformError, match="none of ours"):
        platform.define(lab.spec())
    with pytest.raises(PlatformError, match="no machine"):
        platform.start(NAME)
    platform.delete(NAME)
    assert lab.fake.vms == [theirs]


def test_a_copy_with_its_notes_is_not_taken_for_it(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    lab.fake.add_vm("copy", notes=lab.vm.notes)
    with pytest.raises(PlatformError, match="2 machines have the notes"):
        platform.power(NAME)


@pytest.mark.parametrize("name", ["Production", "Tests"])
def test_a_switch_that_was_not_made_for_tests_stays(lab: Lab, name: str) -> None:
    lab.fake.switches.append(PsObject(Name="Tests", SwitchType="Private", Notes="by somebody else"))
    platform = lab.platform()
    platform.define(lab.spec(isolated=True))
    platform.delete(NAME)
    assert name in [one.Name for one in lab.fake.switches]


def test_files_that_hyperv_has_open_are_waited_for_and_told_of(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    lab.fake.busy = 5
    platform.delete(NAME)
    platform.define(lab.spec())
    lab.fake.busy = 1 << 30
    with pytest.raises(PlatformError, match="in use"):
        platform.delete(NAME)
    assert platform.power(NAME) is Power.OFF  # its files are there: it is not gone
    lab.fake.busy = 0
    platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE


# -- on and off -------------------------------------------------------------------------------------------------------


def test_a_guest_that_takes_its_time_is_asked_again(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    platform.start(NAME)
    lab.vm.guest.shuts_down_after = 3
    platform.stop(NAME)
    assert lab.vm.off and lab.fake.names().count("stop the VM") == 3


def test_a_guest_that_does_not_hear_is_named_and_the_plug_pulled(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    platform.start(NAME)
    lab.vm.guest.has_integration = False
    with pytest.raises(PlatformError, match="did not shut down within 0 s: Die Herunterfahrkomponente"):
        platform.stop(NAME, timeout_seconds=0)
    assert platform.power(NAME) is Power.RUNNING
    platform.stop(NAME, force=True)
    assert platform.power(NAME) is Power.OFF


@pytest.mark.parametrize("state", ["Paused", "Saved"])
def test_one_that_is_held_is_paused_and_goes_on(lab: Lab, state: str) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    platform.start(NAME)
    lab.vm.held = state
    assert platform.power(NAME) is Power.PAUSED
    platform.start(NAME)
    assert platform.power(NAME) is Power.RUNNING
    lab.vm.held = state
    platform.stop(NAME, force=True)
    assert platform.power(NAME) is Power.OFF
    platform.start(NAME)
    lab.vm.held = state
    platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE


def test_a_source_is_shut_down_and_watched(lab: Lab) -> None:
    vm = lab.fake.add_vm("web")
    address = str(HypervAddress(vm.guid, "scsi-0-0", "https://hv1:5986", "web"))
    off = stopping.stop(address, 10, lambda seconds: None)
    off.check()
    off.finish()
    assert vm.off
    vm.off = False
    with pytest.raises(Exception, match="started again"):
        off.check()
    vm.guest.shuts_down_after = 0
    with pytest.raises(Exception, match="did not shut down within 0 s"):
        stopping.stop(address, 0, lambda seconds: None)


# -- guests -----------------------------------------------------------------------------------------------------------


def test_the_guest_is_up_when_heart_and_account_say_so(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    channel = platform.channel(NAME)
    assert not channel.ping(timeout_seconds=0)
    platform.start(NAME)
    assert channel.ping(timeout_seconds=0)
    lab.vm.guest.windows = False  # it beats, and has no PowerShell
    assert not channel.ping(timeout_seconds=0)
    assert lab.platform(guest_user="").channel(NAME).ping(timeout_seconds=0)


def test_files_are_read_in_pieces_and_programs_told_from_one_another(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    platform.start(NAME)
    channel, guest = platform.channel(NAME), lab.vm.guest
    content = random.Random(1).randbytes(2 * MIB + 7)
    channel.write_file("C:\\x.bin", content, timeout_seconds=5)
    channel.write_file("C:\\x.bin", content, timeout_seconds=5)  # in the place of one that is there
    assert guest.files == {"C:\\x.bin": content}
    assert channel.read_file("C:\\x.bin", timeout_seconds=5) == content
    assert lab.fake.names().count(scripts.FETCH.name) == 3
    with pytest.raises(PlatformError, match="more than 100 bytes"):
        channel.read_file("C:\\x.bin", timeout_seconds=5, largest_bytes=100)
    guest.files["C:\\empty"] = b""
    assert channel.read_file("C:\\empty", timeout_seconds=5) == b""
    guest.programs = {"good": lambda _: (-1, b"\xff\0", b"e"), "slow": lambda _: None}
    guest.programs["long"] = lambda _: (0, bytes(scripts.MOST_OUTPUT_BYTES + 1), b"")
    assert channel.execute(["good"], timeout_seconds=5) == (-1, b"\xff\0", b"e")
    for program, told in (("slow", "did not end"), ("long", "said more"), ("none", "Datei nicht finden")):
        with pytest.raises(PlatformError, match=told):
            channel.execute([program], timeout_seconds=5)


def linux(guest: Any) -> None:
    guest.windows = False


def other_password(guest: Any) -> None:
    guest.password = "another"


@pytest.mark.parametrize(
    ("spoil", "table", "told"),
    [
        (linux, {}, "PowerShell Direct takes a guest with Windows"),
        (other_password, {}, "an account of it"),
        (other_password, {"guest_user": ""}, "guest_user"),
    ],
    ids=["linux", "password", "account"],
)
def test_what_is_missing_for_a_way_into_the_guest_is_named(
    lab: Lab, spoil: Callable[[Any], None], table: dict[str, Any], told: str
) -> None:
    platform = lab.platform(**table)
    platform.define(lab.spec())
    platform.start(NAME)
    spoil(lab.vm.guest)
    with pytest.raises(PlatformError) as caught:
        platform.channel(NAME).execute(["x"], timeout_seconds=5)
    assert told in str(caught.value.hint)
    assert "guest secret" not in f"{caught.value} {caught.value.hint}"


def test_the_password_is_asked_for_by_a_command() -> None:
    account = settings.GuestAccount("me", ("sh", "-c", "echo ' s3cret '"), {"PATH": "/usr/bin:/bin"})
    assert account.password() == " s3cret "
    for command, told in (("exit 3", "exit code 3"), ("true", "no password")):
        with pytest.raises(PlatformError, match=told):
            replace(account, command=("sh", "-c", command)).password()
    with pytest.raises(PlatformError, match="cannot be run"):
        replace(account, command=("/no/such/program",)).password()
    with pytest.raises(PlatformError, match="is not known"):
        replace(account, command=()).password()
    given = replace(account, environment={settings.PASSWORD: "given"})
    assert given.password() == "given" and "'given'" not in repr(given)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_the_picture_of_the_screen(lab: Lab) -> None:
    platform = lab.platform()
    platform.define(lab.spec())
    assert platform.screenshot(NAME) is None
    platform.start(NAME)
    picture = platform.screenshot(NAME)
    assert picture is not None and picture.startswith(b"\x89PNG")
    assert picture == screen.png_of(base64.b64encode(b"\x00\xf8" + b"\xe0\x07" * (1024 * 768 - 1)).decode())
    small = screen.png_of(base64.b64encode(b"\x1f\x00\xff\xff").decode(), 2, 1)
    start = small.index(b"IDAT") + 4
    assert zlib.decompressobj().decompress(small[start:]) == b"\0\0\0\xff\xff\xff\xff"
    for wrong in ("!", "AAAA"):
        with pytest.raises(PlatformError):
            screen.png_of(wrong)


# -- configuration, and hosts that cannot be reached ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "folder is missing"),
        ({"folder": "relative"}, "folder should be"),
        ({"folder": "\\no\\drive"}, "folder should be"),
        ({"folder": "D:\\x", "host": "hv1"}, "share is missing"),
        ({"folder": "D:\\x", "host": "user:geheim@hv1", "share": "/x"}, "must not hold credentials"),
        ({"folder": "D:\\x", "disk": 1}, "'disk' is not a setting"),
        ({"folder": "D:\\x", "switch": 7}, "switch should be"),
        ({"folder": "D:\\x", "switch": ""}, "switch should be"),
        ({"folder": "D:\\x\n"}, "control characters"),
        ({"folder": "D:\\x", "switch": "a", "test_switch": "a"}, "another than switch"),
        ({"folder": "D:\\x", "networks": "lan"}, "networks should be a table"),
        ({"folder": "D:\\x", "networks": {"lan": 5}}, "networks 'lan' should be a network"),
        ({"folder": "D:\\x", "networks": {"lan": "T"}, "test_switch": "T"}, "networks leads to test_switch"),
        ({"folder": "D:\\x", "secure_boot_template": "x"}, "secure_boot_template should be"),
        ({"folder": "D:\\x", "guest_password_command": [1]}, "should be a command"),
        ({"folder": "D:\\x", "guest_password_command": "a 'b"}, "should be a command"),
    ],
)
def test_wrong_settings_are_named(table: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"platforms.hyperv: .*{told}") as caught:
        settings.read(table)
    assert "geheim" not in str(caught.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        settings.read({"host": "hv1", "x": 1, "switch": 7})
    assert all(one in str(caught.value) for one in ("'x'", "switch", "folder is missing", "share is missing"))


def test_a_machine_that_is_no_host_says_how_to_name_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(PlatformError, match="no Hyper-V host") as caught:
        lab.platform(host="", share="").check()
    assert "[platforms.hyperv]" in str(caught.value.hint) and "--platform files" in str(caught.value.hint)


def test_where_no_host_is_reached_files_are_the_way_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str | None) -> Any:
        raise SessionError("no route", path=url, hint="check it")

    monkeypatch.setattr(connecting, "connect", refuse)
    for call in (lab.platform().check, lambda: lab.platform().define(lab.spec())):
        with pytest.raises(PlatformError, match=r"https://hv1:5986: .*no route") as caught:
            call()
        assert "check it" in str(caught.value.hint) and "--platform files" in str(caught.value.hint)


# -- the script for a host that is not reached ------------------------------------------------------------------------


def run_script(lab: Lab, spec: MachineSpec, **parameters: Any) -> Any:
    text = starting.script(spec)
    text.encode("ascii")
    given = {"PSScriptRoot": "E:\\moved"}
    (found,) = shell(lab.fake).run(text, parameters, given)
    return found


@pytest.fixture
def moved(lab: Lab) -> Lab:
    lab.fake.here("E:\\moved").mkdir(parents=True)
    for number in range(2):
        lab.fake.here(f"E:\\moved\\disk-{number}.vhdx").write_bytes(lab.source.read_bytes())
    return lab


@pytest.mark.parametrize("name", ["web 1", EVIL, "..", "'@", "con"])
@pytest.mark.parametrize("generation", [1, 2])
def test_the_script_makes_and_starts_the_machine(moved: Lab, name: str, generation: int) -> None:
    spec = moved.spec(2, vm_name=name, generation=generation)
    assert errors_of(starting.script(spec)) == []
    run_script(moved, spec, Switch="Production")
    vm = moved.vm
    assert vm.state == "Running" and vm.generation == generation
    assert [one.files[0] for one in vm.disks] == ["E:\\moved\\disk-0.vhdx", "E:\\moved\\disk-1.vhdx"]
    assert vm.adapters[0]["mac"] == "525400123456" and vm.adapters[0]["network"] == "Production"
    vm.off = True
    run_script(moved, spec, Switch="Production")  # again: it is started, and no other made
    assert moved.vm is vm and vm.state == "Running"


def test_the_script_is_what_the_platform_does(moved: Lab) -> None:
    run_script(moved, moved.spec(2, name=NAME), Switch="Production", NoStart=True)
    by_hand = moved.fake.vms.pop()
    moved.platform().define(moved.spec(2, name=NAME))
    both = [(one.cpus, one.startup, one.adapters, [disk.position for disk in one.disks]) for one in (by_hand, moved.vm)]
    assert both[0] == both[1] and by_hand.state == "Off"


def test_the_script_goes_on_where_it_was_cut_off(moved: Lab) -> None:
    spec, number = moved.spec(2, generation=2), 0
    while True:
        number += 1
        moved.fake.done.clear()
        moved.fake.dies_at = number
        try:
            run_script(moved, spec)
        except SessionError:
            moved.fake.dies_at = 0
            run_script(moved, spec)
            assert moved.vm.state == "Running" and len(moved.vm.disks) == 2
            moved.fake.vms.clear()
        else:
            break
    assert number > 8


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"Path": "E:\\nowhere"}, "there is no folder"),
        ({"Switch": "Nothing"}, "there is no switch"),
        ({"Switch": "Production", "isolated": True}, "no private switch"),
        ({"Path": "D:\\Recovery"}, "there is no file"),
    ],
)
def test_the_script_says_what_is_missing(moved: Lab, parameters: dict[str, Any], told: str) -> None:
    spec = moved.spec(2, isolated=bool(parameters.pop("isolated", False)))
    with pytest.raises(Exception, match=told):
        run_script(moved, spec, **parameters)
    assert moved.fake.vms == []


def test_the_script_leaves_a_machine_of_that_name_alone(moved: Lab) -> None:
    theirs = moved.fake.add_vm("web 1", off=True)
    with pytest.raises(Exception, match="none of ours"):
        run_script(moved, moved.spec(2))
    assert moved.fake.vms == [theirs]


@pytest.mark.parametrize("script", scripts.ALL, ids=lambda one: one.name)
def test_scripts_are_powershell_and_run_nothing_that_they_are_given(script: Script) -> None:
    assert errors_of(script.text) == []
    for forbidden in ("Invoke-Expression", "::Create(", "-Filter", "-Query", "Add-Type", "ConvertTo-SecureString"):
        assert forbidden not in script.text
    body = script.text.partition("try {\n")[2]
    for name in script.parameters:
        assert f"${name}" in body, "declared and not used"
    assert '"' not in body.replace('"`n"', ""), "texts that things are put into"
