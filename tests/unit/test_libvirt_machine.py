"""A recovery machine as libvirt is told of it: XML, settings and rights on files; values in, values out."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from replica.errors import ConfigurationError, PlatformError
from replica.libvirt.domain import parse_domain
from replica.libvirt.virsh import Virsh, VirshRefusedError, VirshTimeoutError
from replica.model import Machine, Nic
from replica.monitor import MonitorError, MonitorGoneError
from replica.platforms.folder import MachineFolder
from replica.platforms.libvirt import access, domain
from replica.platforms.libvirt.access import PASS, READ, WRITE, QemuUser
from replica.platforms.libvirt.agent import DomainAgent
from replica.platforms.libvirt.files import LibvirtFiles
from replica.platforms.libvirt.settings import LibvirtSettings
from replica.platforms.platform import DiskSpec, MachineSpec
from replica.platforms.qemu.command import bios_uuid, firmware

FILES = LibvirtFiles(MachineFolder(Path("/state/machines/libvirt/m & co"), "m & co"))
NICS = (Nic("52:54:00:00:00:01"), Nic(None))
NBD = "nbd+unix:///0?socket=/state/nbd%20socket"


def disks(count: int, bus: str = "ide", **more: Any) -> tuple[DiskSpec, ...]:
    return tuple(DiskSpec(number, 1 << 30, bus, url=NBD, **more) for number in range(count))


def spec(*, generation: int = 1, given: tuple[DiskSpec, ...] | None = None, **more: Any) -> MachineSpec:
    machine = Machine(2 if generation == 2 else 1, 3, 512 << 20, more.pop("nics", ()))
    return MachineSpec("m & co", "web <1>\x07", machine, disks(1) if given is None else given, **more)


def made(one: MachineSpec, *, backed: int | None = None, settings: LibvirtSettings | None = None) -> Element:
    count = len(one.disks) if backed is None else backed
    numbers = frozenset(range(count))
    return ElementTree.fromstring(domain.domain_xml(one, FILES, numbers, settings or LibvirtSettings(), "qemu"))


def attributes(root: Element, path: str) -> dict[str, str]:
    found = root.find(path)
    assert found is not None, path
    return dict(found.attrib)


def interfaces(root: Element) -> list[tuple[str | None, dict[str, str], str | None]]:
    """Return type, source and link of each adapter."""
    found = []
    for one in root.iterfind("devices/interface"):
        source, link = one.find("source"), one.find("link")
        found.append(
            (one.get("type"), {} if source is None else source.attrib, None if link is None else link.get("state"))
        )
    return found


# -- the domain -------------------------------------------------------------------------------------------------------


def test_a_machine_of_generation_1_is_what_a_bios_of_a_pc_starts() -> None:
    root = made(spec())
    assert root.attrib == {"type": "qemu"}
    assert (root.findtext("name"), root.findtext("uuid")) == ("m & co", str(bios_uuid("m & co")))
    assert root.findtext("title") == "web <1> "
    assert (root.findtext("vcpu"), root.findtext("memory"), attributes(root, "memory")) == ("3", "512", {"unit": "MiB"})
    assert attributes(root, "os/type")["machine"] == "pc"
    assert root.find("os/loader") is None
    assert root.find("features/acpi") is not None
    assert attributes(root, "devices/disk/target") == {"dev": "hda", "bus": "ide"}
    assert attributes(root, "devices/disk/boot") == {"order": "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux")
def test_a_machine_of_generation_2_has_uefi_with_variables_of_its_own() -> None:
    root = made(spec(generation=2))
    assert attributes(root, "os/type")["machine"] == "q35"
    assert root.findtext("os/loader") == str(firmware()[0])
    assert root.findtext("os/nvram") == str(FILES.variables)
    assert attributes(root, "devices/disk/target") == {"dev": "sda", "bus": "sata"}


def test_it_is_described_to_the_change_source_as_what_it_is() -> None:
    one = spec(given=disks(2, bus="virtio"), nics=NICS)
    found = parse_domain(domain.domain_xml(one, FILES, frozenset({0, 1}), LibvirtSettings(), "kvm"), "m")
    assert (found.machine.generation, found.machine.cpus, found.machine.memory_bytes) == (1, 3, 512 << 20)
    assert found.has_agent
    assert [(disk.target, disk.format, disk.place, disk.writable) for disk in found.disks] == [
        (f"vd{letter}", "qcow2", str(FILES.disk(number)), True) for number, letter in enumerate("ab")
    ]


def test_a_disk_that_is_not_whole_stands_over_the_server_and_waits_for_it() -> None:
    root = made(spec(given=disks(2)), backed=1)
    first, second = root.findall("devices/disk")
    below = "backingStore/source"
    assert attributes(first, below) == {"protocol": "nbd", "name": "0"}
    assert attributes(first, f"{below}/host") == {"transport": "unix", "socket": "/state/nbd socket"}
    assert attributes(first, "backingStore/format") == {"type": "raw"}
    assert first.find("backingStore/backingStore") is not None
    assert attributes(first, "driver")["copy_on_read"] == "on"
    assert attributes(first, "driver")["error_policy"] == attributes(first, "driver")["rerror_policy"] == "stop"
    whole = second.find("backingStore")
    assert whole is not None and not whole.attrib and not len(whole)
    assert "copy_on_read" not in attributes(second, "driver")


def test_files_and_tcp_servers_below() -> None:
    given = (
        DiskSpec(0, 1 << 30, "ide", path=Path("/disks/a.vhd"), format="vhd"),
        DiskSpec(1, 1 << 30, "ide", url="nbd://127.0.0.1:1234/b"),
    )
    first, second = made(spec(given=given)).findall("devices/disk")
    assert attributes(first, "backingStore") == {"type": "file"}
    assert attributes(first, "backingStore/format") == {"type": "vpc"}
    assert attributes(first, "backingStore/source") == {"file": "/disks/a.vhd"}
    assert attributes(second, "backingStore/source/host") == {"name": "127.0.0.1", "port": "1234"}
    with pytest.raises(PlatformError, match="neither as an address nor as a file"):
        made(spec(given=(DiskSpec(0, 1, "ide"),)))


def test_disks_are_named_as_controllers_have_them() -> None:
    def names(generation: int, given: tuple[DiskSpec, ...]) -> list[str]:
        return [one.name for one in domain.targets(spec(generation=generation, given=given)).values()]

    assert names(1, disks(6)) == ["hda", "hdb", "hdc", "hdd", "sda", "sdb"]
    assert names(2, disks(2)) == ["sda", "sdb"]
    assert names(1, disks(2, bus="virtio")) == ["vda", "vdb"]
    large = replace(disks(2)[1], sector_size=4096)
    assert names(1, (disks(1)[0], large)) == ["hda", "vda"]
    blocks = made(spec(given=(large,))).find("devices/disk/blockio")
    assert blocks is not None and blocks.get("logical_block_size") == "4096"
    many = names(1, disks(30, bus="virtio"))
    assert (many[25], many[26], many[27]) == ("vdz", "vdaa", "vdab")
    assert len(set(many)) == 30


def test_adapters_are_where_the_settings_say_and_tests_are_kept_apart() -> None:
    real, test = spec(nics=NICS), spec(nics=NICS, isolated=True)
    assert interfaces(made(real)) == [("user", {}, None)] * 2
    assert interfaces(made(test)) == [("user", {}, "down")] * 2
    network = LibvirtSettings(network="lan")
    assert interfaces(made(real, settings=network)) == [("network", {"network": "lan"}, None)] * 2
    assert interfaces(made(test, settings=network)) == [("user", {}, "down")] * 2
    both = LibvirtSettings(bridge="br0", test_network="shut")
    assert interfaces(made(real, settings=both)) == [("bridge", {"bridge": "br0"}, None)] * 2
    assert interfaces(made(test, settings=both)) == [("network", {"network": "shut"}, None)] * 2
    macs = [one.get("address", "") for one in made(real).iterfind("devices/interface/mac")]
    assert macs[0] == "52:54:00:00:00:01" and re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", macs[1])
    assert macs == [one.get("address") for one in made(test).iterfind("devices/interface/mac")]
    told = domain.described(made(real), "m")
    assert (told.uuid, told.macs) == (bios_uuid("m & co"), tuple(macs))


def test_adapters_are_in_the_networks_that_theirs_are_called() -> None:
    three = (Nic(None, "lan"), Nic(None, "dmz"), Nic())

    def sources(told: tuple[str | None, ...] = (), *, isolated: bool = False, **settings: Any) -> list[str]:
        one = spec(nics=three, networks=told, isolated=isolated)
        found = interfaces(made(one, settings=LibvirtSettings.read(settings)))
        return [" ".join((kind or "", *source.values())) for kind, source, _ in found]

    mapping = {"lan": "recovery", "dmz": "bridge:br7"}
    assert sources(networks=mapping) == ["network recovery", "bridge br7", "user"]
    assert sources(networks=mapping, network="default") == ["network recovery", "bridge br7", "network default"]
    assert sources(networks={"lan": "recovery", "*": "q"}, bridge="br0") == [
        "network recovery",
        "network q",
        "network q",
    ]
    told = ("plan", None, "bridge:br1")
    assert sources(told, networks=mapping, network="default") == ["network plan", "bridge br7", "bridge br1"]
    assert sources(told, bridge="br0") == ["network plan", "bridge br0", "bridge br1"]
    assert sources(told, networks=mapping, isolated=True, test_network="shut") == ["network shut"] * 3
    assert sources(told, networks=mapping, isolated=True) == ["user"] * 3


def test_models_of_adapters_follow_the_system() -> None:
    def model(one: MachineSpec) -> str:
        return attributes(made(one), "devices/interface/model")["type"]

    assert model(spec(nics=NICS)) == "e1000"
    assert model(spec(nics=NICS, system="linux")) == "virtio"
    assert model(spec(nics=NICS, given=disks(1, bus="virtio"))) == "virtio"


def test_what_no_xml_can_hold_is_refused() -> None:
    files = LibvirtFiles(MachineFolder(Path("/state/\x01"), "m"))
    with pytest.raises(PlatformError, match="no XML can"):
        domain.domain_xml(spec(), files, frozenset({0}), LibvirtSettings(), "qemu")


def test_bitmaps_that_the_disks_were_made_with_are_a_checkpoint() -> None:
    given = (*disks(1, bitmap="godwit-since-7"), replace(disks(2)[1], bitmap=None))
    (xml,) = domain.checkpoint_xml(spec(given=given), 1_700_000_000)
    root = ElementTree.fromstring(xml)
    assert (root.findtext("name"), root.findtext("creationTime")) == ("godwit-since-7", "1700000000")
    assert [one.attrib for one in root.iterfind("disks/disk")] == [
        {"name": "hda", "checkpoint": "bitmap", "bitmap": "godwit-since-7"},
        {"name": "hdb", "checkpoint": "no"},
    ]
    assert list(domain.checkpoint_xml(spec(), 0)) == []


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_and_their_defaults() -> None:
    assert LibvirtSettings.read({}) == LibvirtSettings("qemu:///system", None, None, None, None)
    found = LibvirtSettings.read({"connect": "qemu+unix:///session?socket=/a/b", "type": "qemu", "network": "lan"})
    assert (found.socket, found.type, found.network) == ("/a/b", "qemu", "lan")
    assert LibvirtSettings().socket is None


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"conect": "x"}, "'conect' is not a setting"),
        ({"network": 5}, r"platforms\.libvirt\.network: should be text"),
        ({"bridge": ""}, r"platforms\.libvirt\.bridge: should be text"),
        ({"type": "xen"}, r"platforms\.libvirt\.type: should be kvm or qemu, not 'xen'"),
        ({"network": "a", "bridge": "b"}, r"platforms\.libvirt\.bridge: .* leave one"),
        ({"network": "a", "test_network": "a"}, r"platforms\.libvirt\.test_network: "),
        ({"networks": "a"}, r"platforms\.libvirt\.networks: should be a table"),
        ({"networks": {"a": ""}}, r"platforms\.libvirt\.networks: 'a' should be a network"),
        ({"networks": {"a": "t"}, "test_network": "t"}, r"platforms\.libvirt\.networks: leads into"),
        ({"connect": "qemu+ssh://host/system"}, r"platforms\.libvirt\.connect: .* on this host"),
        ({"connect": "xen:///"}, r"platforms\.libvirt\.connect: "),
        ({"connect": "qemu://["}, r"platforms\.libvirt\.connect: "),
    ],
)
def test_mistakes_are_named_with_their_keys(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LibvirtSettings.read(table)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        LibvirtSettings.read({"x": 1, "network": 1, "type": 2})
    assert [word in caught.value.message for word in ("'x'", ".network", ".type")] == [True] * 3


# -- rights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder to which everybody may pass, as to those of tests not everybody may."""
    with tempfile.TemporaryDirectory(prefix="gwa", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(sys.platform != "linux", reason="access control lists of Linux")
def test_a_user_is_let_in_and_nobody_else(open_folder: Path) -> None:
    state, folder = open_folder / "state", open_folder / "state" / "machines" / "m"
    folder.mkdir(parents=True)
    for one in (state, folder.parent, folder):
        one.chmod(0o700)
    disk = folder / "disk"
    disk.touch(0o600)
    user = QemuUser(54321)
    open_folder.chmod(0o700)
    with pytest.raises(PlatformError, match="may not pass through") as caught:
        user.let_in(folder, state)
    assert caught.value.path == str(open_folder) and "GODWIT_STATE" in str(caught.value.hint)
    open_folder.chmod(0o755)
    user.let_in(folder, state)
    user.let_in(folder, state)
    user.grant(disk, READ)
    user.grant(disk, WRITE)
    nobody = 0xFFFFFFFF
    for path, own, allowed in ((state, 7, PASS), (folder, 7, PASS), (disk, READ | WRITE, READ | WRITE)):
        entries = (0x01, own, nobody, 0x02, allowed, 54321, 0x04, 0, nobody, 0x10, allowed, nobody, 0x20, 0, nobody)
        assert os.getxattr(path, access.ATTRIBUTE) == struct.pack("<I" + 5 * "HHI", 2, *entries)


def test_root_and_we_need_no_rights(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    for number in (0, os.geteuid() if sys.platform != "win32" else 0):
        QemuUser(number).grant(path, READ)
        QemuUser(number).let_in(tmp_path, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_rights_of_others_stay_in_the_list() -> None:
    held = access.granted(access.granted(access.of_mode(0o750), 30, READ), 20, PASS)
    assert [(tag, allowed, number) for tag, allowed, number in access._decoded(held)] == [
        (0x01, 7, 0xFFFFFFFF),
        (0x02, PASS, 20),
        (0x02, READ, 30),
        (0x04, 5, 0xFFFFFFFF),
        (0x10, 5, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    assert access.permissions_of(held, 20) == PASS
    assert access.permissions_of(held, 21) == 0
    more = access.granted(held, 20, READ | WRITE)
    assert access.permissions_of(more, 20) == READ | WRITE | PASS
    assert access.permissions_of(more, 30) == READ
    for damaged in (b"", held[:-1], b"\x03" + held[1:]):
        with pytest.raises(PlatformError, match="unknown form"):
            access.granted(damaged, 1, READ)


@pytest.mark.skipif(sys.platform != "linux", reason="users of Linux")
def test_who_qemu_runs_as(tmp_path: Path) -> None:
    def capabilities(*models: str) -> Element:
        return ElementTree.fromstring(f"<capabilities><host>{''.join(models)}</host></capabilities>")

    apparmor = "<secmodel><model>apparmor</model><doi>0</doi></secmodel>"
    dac = "<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+108</baselabel></secmodel>"
    assert QemuUser.of(capabilities(apparmor, dac), None) == QemuUser(64055)
    assert QemuUser.of(capabilities(apparmor), None) == QemuUser(os.geteuid())
    socket = tmp_path / "socket"
    socket.touch()
    assert QemuUser.of(capabilities(), str(socket)) == QemuUser(socket.stat().st_uid)
    with pytest.raises(PlatformError, match="libvirt's socket"):
        QemuUser.of(capabilities(), str(tmp_path / "none"))


# -- the agent --------------------------------------------------------------------------------------------------------


def agent(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> tuple[DomainAgent, list[str]]:
    asked: list[str] = []

    def ask(self: Virsh, command: str, *arguments: str, **options: object) -> str:
        del self, options
        asked.extend((command, *arguments))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(Virsh, "ask", ask)
    return DomainAgent(Virsh("test"), "uuid", timeout_seconds=0.2), asked


def test_the_agent_is_asked_through_libvirt(monkeypatch: pytest.MonkeyPatch) -> None:
    asking, asked = agent(monkeypatch, '{"return": {"pid": 5}}\n')
    assert asking.execute("guest-exec", path="/bin/true", capture_output=True) == {"pid": 5}
    assert asked[:6] == ["qemu-agent-command", "--domain", "uuid", "--timeout", "1", "--cmd"]
    arguments = {"path": "/bin/true", "capture-output": True}
    assert json.loads(asked[6]) == {"execute": "guest-exec", "arguments": arguments}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (VirshRefusedError("libvirt refuses: Guest agent is not responding: not connected"), MonitorGoneError),
        (VirshRefusedError("libvirt refuses: unable to execute QEMU agent command: no such file"), MonitorError),
        (VirshTimeoutError("libvirt did not answer"), MonitorGoneError),
        ("no JSON", MonitorGoneError),
        ("[" * 100_000, MonitorGoneError),
        ("[]", MonitorError),
        ('{"error": {}}', MonitorError),
    ],
)
def test_what_goes_wrong_with_the_agent(
    monkeypatch: pytest.MonkeyPatch, answer: str | Exception, error: type[MonitorError]
) -> None:
    with pytest.raises(MonitorError) as caught:
        agent(monkeypatch, answer)[0].send("guest-ping")
    assert type(caught.value) is error
