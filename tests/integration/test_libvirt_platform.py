"""Recovery machines as domains of a real libvirt, whose QEMU is another user: what survives what, what is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from replica import catalog, cycle, history
from replica.errors import PlatformError, SourceError, StoreError
from replica.failback.departure import Departure
from replica.failover.stopping import stopped
from replica.libvirt.address import LibvirtAddress
from replica.model import Nic, Point, SourceDisk
from replica.platforms import overlay, servant
from replica.platforms.libvirt import LibvirtPlatform
from replica.platforms.libvirt.files import LibvirtFiles
from replica.platforms.libvirt.settings import LibvirtSettings
from replica.platforms.platform import DiskSpec, Power
from replica.platforms.qemu.command import bios_uuid
from tests.support import running_qemu
from tests.support.engine import BLOCK, WORKERS, restore_disk
from tests.support.libvirt_host import LibvirtHost, missing
from tests.support.recovery import SAID, SECTOR, WRITTEN_SECTOR, Recovery, boot_sector, wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
    pytest.mark.skipif(bool(running_qemu.missing()), reason=f"not installed: {running_qemu.missing()}"),
    pytest.mark.xdist_group("libvirt machines"),
]

NAME = "web 1, test"
BITMAP = "godwit-since-1"
MIB = 1 << 20
SIZE = 16 * MIB
NUMBERS = count(1)


@pytest.fixture(scope="module")
def libvirt() -> Iterator[LibvirtHost]:
    with LibvirtHost() as host:
        yield host


@pytest.fixture
def recovery(libvirt: LibvirtHost) -> Iterator[Recovery]:
    folder = libvirt.folder / f"site{next(NUMBERS)}"
    folder.mkdir()
    yield Recovery(folder, disks=2)
    shutil.rmtree(folder)


@pytest.fixture
def platform(libvirt: LibvirtHost, recovery: Recovery) -> Iterator[LibvirtPlatform]:
    found = LibvirtPlatform(recovery.host, settings=LibvirtSettings(libvirt.connect, type="qemu"))
    yield found
    found.delete(NAME)


def started(recovery: Recovery, platform: LibvirtPlatform) -> LibvirtFiles:
    """Define and start the machine, and wait until its boot sector has run."""
    folder = platform.folder(NAME)
    platform.define(recovery.spec(folder, NAME, bitmap=BITMAP))
    assert platform.power(NAME) is Power.OFF
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run")
    return LibvirtFiles(folder)


def bitmaps(libvirt: LibvirtHost) -> dict[str, int]:
    """Return the bytes that the bitmap of each of the running machine's disks says were written, by the disk's file."""
    question = '{"execute": "query-named-block-nodes", "arguments": {"flat": true}}'
    rows = json.loads(libvirt.virsh("qemu-monitor-command", NAME, question))["return"]
    found = {}
    for row in rows:
        for bitmap in row.get("dirty-bitmaps", []) if row["drv"] == "qcow2" else []:
            assert bitmap["name"] == BITMAP and bitmap["persistent"] and bitmap["recording"]
            named = re.search(r"disk-\d\.qcow2", row["file"])  # of a disk that is not whole, amidst what is below
            assert named is not None
            found[named[0]] = int(bitmap["count"])
    return found


def kept_bitmaps(path: Path) -> list[dict[str, object]]:
    """Return the persistent bitmaps of an image."""
    command = ["qemu-img", "info", "-U", "--output=json", str(path)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return list(said["format-specific"]["data"].get("bitmaps", []))


def content(path: Path, tmp_path: Path) -> bytes:
    """Return what a hydrated disk holds."""
    target = tmp_path / "content.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(target)], check=True)
    return target.read_bytes()


def domains(libvirt: LibvirtHost) -> list[str]:
    return [line for line in libvirt.virsh("list", "--all", "--name").splitlines() if line]


# -- from the beginning to the end ------------------------------------------------------------------------------------


def test_a_machine_runs_from_the_store_is_hydrated_and_needs_the_store_no_more(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, tmp_path: Path
) -> None:
    files = started(recovery, platform)
    folder = files.folder.path
    assert platform.power(NAME) is Power.RUNNING
    assert [(d.number, d.hydrated, d.remaining_bytes) for d in platform.disks(NAME)] == [
        (0, False, SIZE),
        (1, False, SIZE),
    ]
    address = str(LibvirtAddress(NAME, "hda", libvirt.connect))
    assert platform.disks(NAME)[0].address == address
    assert servant.is_running(folder)
    wait_until(lambda: bitmaps(libvirt)["disk-0.qcow2"] > 0, "the guest's write is recorded")
    platform.start(NAME)  # again: nothing
    told = platform.identity(NAME)
    assert (told.platform, told.hypervisor_id, told.bios_uuid) == ("libvirt", *[str(bios_uuid(NAME))] * 2)
    assert told.macs == ("52:54:00:12:34:56",)
    picture = platform.screenshot(NAME)
    assert picture is not None and picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    assert not platform.channel(NAME).ping(timeout_seconds=0.1)

    platform.hydrate(NAME)
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")
    platform.hydrate(NAME)  # again: nothing
    wait_until(lambda: not servant.is_running(folder), "the server has ended by itself")
    # What hydration copied is none of the guest's writes.
    assert bitmaps(libvirt) == {"disk-0.qcow2": 65536, "disk-1.qcow2": 0}
    assert libvirt.virsh("checkpoint-list", NAME, "--name").split() == [BITMAP]
    assert platform.power(NAME) is Power.RUNNING

    platform.stop(NAME, force=True)
    assert platform.power(NAME) is Power.OFF
    assert platform.screenshot(NAME) is None
    assert [(d.hydrated, d.remaining_bytes) for d in platform.disks(NAME)] == [(True, 0)] * 2
    assert [one["name"] for one in kept_bitmaps(files.disk(0))] == [BITMAP]
    assert "in-use" not in kept_bitmaps(files.disk(0))[0]["flags"]  # type: ignore[operator]

    (recovery.folder / "store").rename(recovery.folder / "lost")
    before = recovery.sources[0].read_bytes()
    at = WRITTEN_SECTOR * SECTOR
    assert content(files.disk(0), tmp_path) == before[:at] + boot_sector() + before[at + SECTOR :]
    assert content(files.disk(1), tmp_path) == recovery.sources[1].read_bytes()
    files.console.write_bytes(b"")
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run without the store")

    platform.delete(NAME)
    assert platform.power(NAME) is Power.GONE
    assert not folder.exists() and domains(libvirt) == []
    platform.delete(NAME)  # again: nothing


def test_hydration_that_was_cut_off_goes_on_with_the_next_start(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, tmp_path: Path
) -> None:
    """With the server killed meanwhile, and the daemon started anew."""
    settings = LibvirtSettings(libvirt.connect, type="qemu")
    slow = LibvirtPlatform(recovery.host, settings=settings, hydrate_mib_per_second=1)
    files = started(recovery, slow)
    slow.hydrate(NAME)
    assert not all(d.hydrated for d in slow.disks(NAME))
    libvirt.restart()
    slow.stop(NAME, force=True)
    os.kill(int((files.folder.path / servant.PID).read_text()), signal.SIGKILL)
    wait_until(lambda: not servant.is_running(files.folder.path), "the server is gone")
    assert not all(d.hydrated for d in slow.disks(NAME))
    platform.start(NAME)
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")
    platform.stop(NAME, force=True)
    assert content(files.disk(1), tmp_path) == recovery.sources[1].read_bytes()


def test_define_makes_good_what_an_interruption_left(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = platform.folder(NAME)
    spec = recovery.spec(folder, NAME, bitmap=BITMAP)

    def cut_off(path: Path, disk: DiskSpec) -> None:
        if disk.number:
            raise KeyboardInterrupt
        create(path, disk)

    create = overlay.create
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(overlay, "create", cut_off)
        platform.define(spec)
    assert platform.power(NAME) is Power.GONE
    with pytest.raises(PlatformError, match="there is no machine"):
        platform.start(NAME)

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the domain is there by then
        patch.setattr("replica.platforms.folder.MachineFolder.write", refuse)
        platform.define(spec)
    assert domains(libvirt) == [NAME]
    platform.define(replace(spec, isolated=True))
    platform.define(spec)  # another one that never ran: replaced
    platform.define(spec)  # again: nothing
    assert platform.names() == [NAME] and platform.power(NAME) is Power.OFF
    assert libvirt.virsh("checkpoint-list", NAME, "--name").split() == [BITMAP]
    platform.start(NAME)
    with pytest.raises(PlatformError, match="ran already"):
        platform.define(replace(spec, isolated=True))
    platform.stop(NAME, force=True)
    with pytest.raises(PlatformError, match="ran already"):
        platform.define(replace(spec, isolated=True))


def test_what_libvirt_forgot_is_defined_anew_and_what_was_killed_is_off(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform
) -> None:
    files = started(recovery, platform)
    with pytest.raises(PlatformError, match="did not shut down within 1 s") as caught:
        platform.stop(NAME, timeout_seconds=1)
    assert "--force" in str(caught.value.hint)
    libvirt.virsh("suspend", NAME)
    assert platform.power(NAME) is Power.PAUSED
    platform.start(NAME)
    assert platform.power(NAME) is Power.RUNNING
    libvirt.virsh("destroy", NAME)
    libvirt.virsh("undefine", NAME, "--checkpoints-metadata")
    assert platform.power(NAME) is Power.OFF
    files.console.write_bytes(b"")
    platform.start(NAME)
    wait_until(lambda: SAID in platform.console(NAME), "the boot sector has run again")


def test_what_a_machine_needs_is_looked_for_beforehand(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, tmp_path: Path
) -> None:
    spec = recovery.spec(platform.folder(NAME), NAME)
    platform.check_machine(spec)

    def refused(words: str, *, isolated: bool = False, **settings: Any) -> None:
        given = LibvirtSettings.read({"connect": libvirt.connect, "type": "qemu", **settings})
        with pytest.raises(PlatformError, match=words):
            LibvirtPlatform(recovery.host, settings=given).check_machine(replace(spec, isolated=isolated))

    refused("Failed to connect", connect=f"qemu+unix:///session?socket={tmp_path}/nobody")
    refused(r"platforms\.libvirt\.network: .* no network 'nothing'", network="nothing")
    refused(r"platforms\.libvirt\.test_network: .* no network 'nothing'", isolated=True, test_network="nothing")
    refused(r"platforms\.libvirt\.bridge: .* no bridge 'nothing'", bridge="nothing")
    off = tmp_path / "off.xml"
    off.write_text("<network><name>off</name></network>")
    libvirt.virsh("net-define", str(off))
    refused(r"platforms\.libvirt\.network: .* 'off' is not active", network="off")
    from_source = replace(spec.machine, nics=(Nic(None, "vm network"), Nic()))
    spec = replace(spec, machine=from_source)
    known = "libvirt has no network 'nothing'; there is 'off'"
    refused(f"source's network 'vm network': {known}", networks={"vm network": "nothing"})
    refused(f"adapters that were in no network: {known}", networks={"*": "nothing", "vm network": "bridge:lo"})
    refused(r"this host has no bridge 'nothing'; there ", networks={"*": "bridge:nothing"})
    with pytest.raises(PlatformError, match=known):
        platform.check_machine(replace(spec, networks=(None, "nothing")))
    platform.check_machine(replace(spec, networks=(None, "nothing"), isolated=True))
    spec = replace(spec, networks=("off",))
    refused("'off' is the network of tests", test_network="off")
    assert platform.power(NAME) is Power.GONE and domains(libvirt) == []


def test_a_domain_has_the_networks_that_were_named(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform
) -> None:
    spec = recovery.spec(platform.folder(NAME), NAME)
    machine = replace(spec.machine, nics=(Nic(None, "lan"), Nic(None, "dmz"), Nic()))
    platform.define(replace(spec, machine=machine, networks=("recovery", "bridge:br7")))
    found = ElementTree.fromstring(libvirt.virsh("dumpxml", NAME)).iterfind("devices/interface")
    sources = [one.find("source") for one in found]
    assert [None if one is None else dict(one.attrib) for one in sources] == [
        {"network": "recovery"},
        {"bridge": "br7"},
        None,
    ]


def test_a_domain_of_anybody_else_is_left_alone(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, tmp_path: Path
) -> None:
    xml = tmp_path / "other.xml"
    xml.write_text(
        f"<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    )
    libvirt.virsh("define", str(xml))
    with pytest.raises(PlatformError, match="already exists"):
        platform.define(recovery.spec(platform.folder(NAME), NAME))
    platform.delete(NAME)
    assert domains(libvirt) == [NAME]
    libvirt.virsh("undefine", NAME)


def test_what_stands_in_the_way_is_told_in_a_sentence(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, tmp_path: Path
) -> None:
    nowhere = LibvirtSettings(f"qemu+unix:///session?socket={tmp_path}/nobody", type="qemu")
    with pytest.raises(PlatformError, match="Failed to connect") as caught:
        LibvirtPlatform(recovery.host, settings=nowhere).define(recovery.spec(platform.folder(NAME), NAME))
    assert "[platforms.libvirt]" in str(caught.value.hint)
    spec = recovery.spec(platform.folder(NAME), NAME)
    strange = LibvirtPlatform(recovery.host, settings=LibvirtSettings(libvirt.connect, network="nothing", type="qemu"))
    strange.define(spec)
    with pytest.raises(PlatformError, match="nothing") as caught:
        strange.start(NAME)
    assert "[platforms.libvirt]" in str(caught.value.hint)
    servant.end(platform.folder(NAME).path)
    (recovery.folder / "store").rename(recovery.folder / "lost")
    with pytest.raises(PlatformError, match=r"the server of the machine's disks does not start: .*store"):
        platform.start(NAME)
    assert platform.power(NAME) is Power.OFF


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="QEMU must be another user's")
def test_qemu_reaches_its_disks_and_cannot_look_around(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform
) -> None:
    folder = started(recovery, platform).folder.path
    assert folder.stat().st_mode & 0o007 == 0

    def fails(*command: str) -> bool:
        try:
            libvirt.run(*command)
        except subprocess.CalledProcessError:
            return True
        return False

    assert not fails("test", "-w", str(folder / "disk-0.qcow2"))
    assert fails("ls", str(folder))
    assert fails("cat", str(folder / servant.CONFIGURATION))
    assert fails("cat", str(folder / "machine.json"))


# -- the first delta --------------------------------------------------------------------------------------------------


class Reprotected:
    """A VM whose source is the machine from now on; what its guest writes is written by QEMU's monitor."""

    def __init__(self, libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform) -> None:
        self.libvirt = libvirt
        self.recovery = recovery
        started(recovery, platform)
        wait_until(lambda: bitmaps(libvirt)["disk-0.qcow2"] > 0, "the guest's write is recorded")
        self.model = [bytearray(path.read_bytes()) for path in recovery.sources]
        at = WRITTEN_SECTOR * SECTOR
        self.model[0][at : at + SECTOR] = boot_sector()
        sources = tuple(SourceDisk(one.number, str(one.number), one.address) for one in platform.disks(NAME))
        catalog.update_settings(recovery.store, recovery.host, recovery.found, sources=sources)

    def write(self, number: int, offset: int, length: int, value: int) -> None:
        device = f"/machine/peripheral/ide0-0-{number}"
        said = self.libvirt.virsh(
            "qemu-monitor-command", NAME, "--hmp", f'qemu-io -d {device} "write -q -P {value} {offset} {length}"'
        )
        assert "rror" not in said, said
        self.model[number][offset : offset + length] = bytes([value]) * length

    def cycle(self, monkeypatch: pytest.MonkeyPatch, *, point: int = 1) -> Point:
        start = Departure(point, BITMAP, {1: np.array([(8 * MIB + 512, 8 * MIB + 5120)], np.int64)})
        with monkeypatch.context() as patch:
            patch.setattr(cycle._Cycle, "_departure", lambda _: start)
            found = self.recovery
            return cycle.replicate(found.store, found.host, found.found, workers=WORKERS)

    def replicate(self, monkeypatch: pytest.MonkeyPatch, *, point: int = 1) -> Point:
        """Make a point, the departure being that from ``point``, and compare it with what the disks hold."""
        state = [bytes(one) for one in self.model]
        made = self.cycle(monkeypatch, point=point)
        found = self.recovery
        assert [restore_disk(found.store, found.host, found.found, made, number) for number in (0, 1)] == state
        return made


@pytest.fixture
def vm(
    libvirt: LibvirtHost, recovery: Recovery, platform: LibvirtPlatform, monkeypatch: pytest.MonkeyPatch
) -> Reprotected:
    monkeypatch.setattr("replica.libvirt.source.default_scratch_folder", lambda: libvirt.scratch)
    return Reprotected(libvirt, recovery, platform)


def _found_by(point: Point) -> list[str]:
    return [disk.source["found_by"] for disk in point.disks]


def test_the_first_delta_reads_what_was_written_and_converted_whatever_failed_before(
    vm: Reprotected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("no manifest today")

    for attempt in range(2):
        vm.write(1, (2 + attempt) * MIB, 512, attempt + 1)
        with monkeypatch.context() as patch, pytest.raises(StoreError):
            patch.setattr(history, "publish", refuse)
            vm.cycle(monkeypatch)
    vm.write(0, 12 * MIB, 2 * BLOCK, 8)
    first = vm.replicate(monkeypatch)
    # On the first disk what the boot sector wrote, and two blocks; on the second two blocks, and one converted.
    assert (_found_by(first), first.cycle.read_bytes) == (["bitmap"] * 2, 6 * BLOCK)
    assert "started from point 1" in first.disks[0].source["because"]
    names = vm.libvirt.virsh("checkpoint-list", NAME, "--name").split()
    assert len(names) == 1 and names != [BITMAP]
    vm.write(0, MIB, 512, 9)
    second = vm.replicate(monkeypatch)
    assert (_found_by(second), second.cycle.read_bytes) == (["bitmap"] * 2, BLOCK)


@pytest.mark.parametrize("doubt", ["killed", "other point"])
def test_what_is_in_doubt_is_compared_by_hash(
    vm: Reprotected, platform: LibvirtPlatform, monkeypatch: pytest.MonkeyPatch, doubt: str
) -> None:
    if doubt == "killed":
        vm.libvirt.virsh("qemu-monitor-command", NAME, "--hmp", 'qemu-io -d /machine/peripheral/ide0-0-0 "flush"')
        pid = vm.libvirt.pid_of(NAME)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: platform.power(NAME) is Power.OFF, "libvirt has seen that it is gone")
        platform.start(NAME)
    vm.write(1, 4 * MIB, 512, 2)
    point = vm.replicate(monkeypatch, point=2 if doubt == "other point" else 1)
    assert _found_by(point) == ["scan"] * 2
    vm.write(1, 6 * MIB, 512, 4)
    assert vm.replicate(monkeypatch).cycle.read_bytes == BLOCK
    assert BITMAP not in vm.libvirt.virsh("checkpoint-list", NAME, "--name")


# -- shutting down ----------------------------------------------------------------------------------------------------


def test_a_domain_that_was_shut_down_stands_while_its_last_point_is_made(
    vm: Reprotected, platform: LibvirtPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disks recorded is read once more, with processors that never run; then nothing of it runs."""
    vm.replicate(monkeypatch)
    vm.write(0, 9 * MIB, 512, 3)
    platform.stop(NAME, force=True)
    sources = catalog.settings_in_force(vm.recovery.store, vm.recovery.found).sources
    with stopped(sources) as off:
        assert vm.libvirt.virsh("domstate", NAME).strip() == "paused"
        point = vm.replicate(monkeypatch)
        assert (_found_by(point), point.cycle.read_bytes) == (["bitmap"] * 2, BLOCK)
        off.check()
        off.finish()
        assert vm.libvirt.virsh("domstate", NAME).strip() == "shut off"
        off.check()
    with stopped(sources) as off:
        vm.libvirt.virsh("resume", NAME)
        with pytest.raises(SourceError, match="was started again"):
            off.check()
    assert vm.libvirt.virsh("domstate", NAME).strip() == "shut off"


def test_a_domain_that_cannot_stand_is_read_from_its_files(
    vm: Reprotected, platform: LibvirtPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.hydrate(NAME)
    wait_until(lambda: all(d.hydrated for d in platform.disks(NAME)), "the disks are whole")
    platform.stop(NAME, force=True)
    sources = catalog.settings_in_force(vm.recovery.store, vm.recovery.found).sources
    xml = vm.libvirt.virsh("dumpxml", NAME)
    bad = vm.recovery.folder / "bad.xml"
    bad.write_text(
        xml.replace("<serial type=", "<serial type='dev'><source path='/nowhere'/></serial><serial type=", 1)
    )
    vm.libvirt.virsh("define", str(bad))
    with stopped(sources) as off:
        assert vm.libvirt.virsh("domstate", NAME).strip() == "shut off"
        assert _found_by(vm.replicate(monkeypatch)) == ["scan"] * 2
        off.check()
        off.finish()


def test_a_process_that_is_killed_leaves_no_domain_standing(vm: Reprotected, platform: LibvirtPlatform) -> None:
    platform.stop(NAME, force=True)
    address = LibvirtAddress(NAME, "hda", vm.libvirt.connect)
    program = (
        "import sys, time\n"
        "from replica.libvirt.address import LibvirtAddress\n"
        "from replica.libvirt.stopping import stopped_domain\n"
        f"with stopped_domain(LibvirtAddress.parse({str(address)!r}), timeout_seconds=60):\n"
        "    print('stands', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stands\n"
        assert vm.libvirt.virsh("domstate", NAME).strip() == "paused"
        process.kill()
    wait_until(lambda: vm.libvirt.virsh("domstate", NAME).strip() == "shut off", "libvirt has ended it")
