"""Addresses, machines, ledgers, changes and files of Hyper-V hosts: what is read of them, and what is refused."""

from __future__ import annotations

import base64
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.errors import SourceError, UsageError
from replica.hyperv import changes, files, machine
from replica.hyperv.address import HypervAddress, Take, parse_host, parse_map
from replica.hyperv.changes import changed_since
from replica.hyperv.files import HostFiles, SessionFile, open_chain
from replica.hyperv.ledger import Ledger
from replica.hyperv.protecting import find_vm
from replica.hyperv.session import Answer, HypervError
from replica.model import Nic
from replica.protection import MachineWishes, name_of
from replica.source import is_live
from tests.support.fake_hyperv import FakeHost, FakeVm
from vhdx.create import create_disk
from vhdx.errors import DiskError, ReadOnlyError
from vhdx.writer import open_writable

BLOCK = 65536
MIB = 1 << 20
VM = "0a1b2c3d-0000-4000-8000-00000000000f"


# -- addresses --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.sampled_from(list(Take)), st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1))))
@settings(max_examples=50, deadline=None)
def test_an_address_survives_being_written(name: str, take: Take, maps: list[tuple[str, str]]) -> None:
    clean = tuple(
        (there.replace("=", "").replace("\0", "") or "x", here.replace("\0", "") or "y") for there, here in maps
    )
    address = HypervAddress(VM, "scsi-0-1", "https://hv1:5986", name, take, clean)
    assert HypervAddress.parse(str(address)) == address
    assert is_live(str(address))
    assert name_of(str(address)) == "scsi-0-1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hyperv:",
        "hyperv:web#scsi-0-0",
        f"hyperv:{VM}",
        f"hyperv:{VM}#vda",
        f"hyperv:{VM}#scsi-0-0-0",
        f"hyperv:{VM}?take=never#scsi-0-0",
        f"hyperv:{VM}?map=x#scsi-0-0",
        f"hyperv:{VM}?{'&'.join(['map=a%3Db'] * 200)}#scsi-0-0?",
        f"libvirt:{VM}#scsi-0-0",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        HypervAddress.parse(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("hv1", "https://hv1:5986"),
        ("hv1:15986", "https://hv1:15986"),
        ("HTTP://hv1.example/", "http://hv1.example:5985"),
        ("https://[fe80::1]:5986", "https://[fe80::1]:5986"),
    ],
)
def test_hosts_are_urls(text: str, url: str) -> None:
    assert parse_host(text) == url


@pytest.mark.parametrize(
    "text", ["", "a b", "ftp://hv1", "hv1:port", "hv1:70000", "hv1/wsman", "https://hv1?x=1", "https://user:geheim@hv1"]
)
def test_hosts_that_are_none_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_host(text)
    assert "geheim" not in f"{raised.value} {raised.value.hint}"


def test_maps_are_pairs() -> None:
    assert parse_map("C:\\VMs=/mnt/a=b") == ("C:\\VMs", "/mnt/a=b")
    for text in ("C:\\VMs", "=/mnt", "C:\\VMs="):
        with pytest.raises(UsageError):
            parse_map(text)


# -- machines ---------------------------------------------------------------------------------------------------------


def make(folder: Path, name: str = "web 1", **about: Any) -> tuple[FakeHost, FakeVm]:
    fake = FakeHost(folder)
    vm = fake.add_vm(name, **about)
    vm.add_disk("os", 4 * MIB)
    vm.add_disk("data", 4 * MIB)
    return fake, vm


def test_a_machine_is_described_as_it_is(tmp_path: Path) -> None:
    adapters = [
        {"mac": "00155D010203", "dynamic": False, "network": "LAN"},
        {"mac": "000000000000", "dynamic": True, "network": ""},
        {"mac": "00-15-5D-0A-0B-0C", "dynamic": True, "network": None},
    ]
    fake, vm = make(tmp_path, dynamic=True, startup=1 << 30, assigned=6 << 30, cpus=8, adapters=adapters)
    found = find_vm("WEB 1", host="hv1", wishes=MachineWishes(cpus=2), connect=fake.connect)
    assert found.machine == MachineWishes(
        generation=2,
        cpus=2,
        memory_bytes=6 << 30,
        nics=(Nic("00:15:5d:01:02:03", "LAN"), Nic(None, None), Nic("00:15:5d:0a:0b:0c", None)),
        secure_boot=True,
    )
    addresses = [HypervAddress.parse(one) for one in found.disks]
    assert [one.disk for one in addresses] == ["scsi-0-1", "scsi-0-0"]  # as the firmware tries them
    assert {one.vm for one in addresses} == {vm.guid}
    assert found.buses == dict.fromkeys(found.disks, "scsi")


def test_generation_1_boots_from_ide(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    vm = fake.add_vm("old", generation=1, startup=512 << 20)
    vm.add_disk("data", 4 * MIB, location=0)
    vm.add_disk("os", 4 * MIB, controller="IDE", location=0)
    found = find_vm("old", wishes=MachineWishes(), connect=fake.connect)
    assert [HypervAddress.parse(one).disk for one in found.disks] == ["ide-0-0", "scsi-0-0"]
    assert found.machine.memory_bytes == 512 << 20
    assert not found.machine.secure_boot
    assert HypervAddress.parse(found.disks[0]).host is None


def test_disks_that_hyperv_makes_no_checkpoint_of_are_left_out(tmp_path: Path) -> None:
    fake, vm = make(tmp_path)
    vm.disks[0].physical = True
    found = find_vm("web 1", wishes=MachineWishes(), connect=fake.connect)
    assert found.left_out == ("scsi-0-0",)
    with pytest.raises(SourceError, match="physical"):
        find_vm("web 1", positions=("scsi-0-0",), wishes=MachineWishes(), connect=fake.connect)
    vm.disks[0].physical, vm.disks[0].shared = False, True
    vm.disks[1].files = ["C:\\VMs\\old.vhd"]
    with pytest.raises(UsageError, match="no disk that can be protected"):
        find_vm("web 1", wishes=MachineWishes(), connect=fake.connect)


@pytest.mark.parametrize(
    "name",
    [
        "it's",
        "$(Remove-Item C:\\)",
        '"; Stop-VM *; "',
        "web*",
        "[a-z]",
        "`n",
        "ü\u202e\U0001f600",
        "' OR '1'='1",
        "-Name",
    ],
)
def test_a_hostile_name_finds_its_vm_and_no_other(tmp_path: Path, name: str) -> None:
    fake, _ = make(tmp_path)
    hostile = fake.add_vm(name)
    hostile.add_disk("os", 4 * MIB)
    found = find_vm(name, wishes=MachineWishes(), connect=fake.connect)
    address = HypervAddress.parse(found.disks[0])
    assert (address.vm, address.name) == (hostile.guid, name)
    assert len(found.disks) == 1


def test_vms_are_one_or_an_error(tmp_path: Path) -> None:
    fake, vm = make(tmp_path)
    with pytest.raises(SourceError, match="no VM of that name"):
        find_vm("other", wishes=MachineWishes(), connect=fake.connect)
    fake.add_vm("Web 1").add_disk("x", 4 * MIB)
    with pytest.raises(UsageError, match="several") as raised:
        find_vm("web 1", wishes=MachineWishes(), connect=fake.connect)
    assert vm.guid in (raised.value.hint or "").lower()
    assert len(find_vm(vm.guid, wishes=MachineWishes(), connect=fake.connect).disks) == 2


@pytest.mark.parametrize(("version", "tracked"), [("9.0", True), ("6.2", True), ("5.0", False), ("10.0", True)])
def test_versions_are_numbers(version: str, tracked: bool) -> None:
    assert machine.is_tracked(version) is tracked
    for wrong in ("", "9", "9.x", "²." + version, "9" * 99 + ".0"):
        assert not machine.is_tracked(wrong)


@pytest.mark.parametrize(
    "drive",
    [
        {"controller": "NVMe", "number": 0, "location": 0},
        {"controller": "SCSI", "number": -1, "location": 0},
        {"controller": "SCSI", "number": 0, "location": 1 << 40},
        {"controller": "SCSI", "number": "0", "location": 0},
    ],
)
def test_places_that_cannot_be_are_refused(drive: dict[str, Any]) -> None:
    with pytest.raises(HypervError):
        machine.drives_of(Answer({"drives": [drive]}, "test"))


def test_two_disks_at_one_place_are_refused() -> None:
    drive = {"controller": "SCSI", "number": 0, "location": 0, "id": "x", "path": "C:\\a.vhdx"}
    with pytest.raises(HypervError, match="one place"):
        machine.drives_of(Answer({"drives": [drive, drive]}, "test"))


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_a_ledger_says_what_is_ours() -> None:
    text = "taking\ta\nsnapshot\ta\tS1\nconverting\ta\tS1\nreference\ta\tR1\r\ngone\tS1\nsnapshot\tb\tS2\nsnap"
    found = Ledger.parse(text)
    assert (found.snapshots, found.references) == ({"S2": "b"}, {"R1": "a"})
    again = Ledger.parse(found.text())
    assert (again.snapshots, again.references) == (found.snapshots, found.references)


@given(st.lists(st.sampled_from(["\t", "\n", "\r", "snapshot", "reference", "gone", "x", "é\0"]), max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_ledger_is_read(words: list[str]) -> None:
    found = Ledger.parse("".join(words))
    assert all(found.snapshots) and all(found.references.values())


# -- changes ----------------------------------------------------------------------------------------------------------


class Told:
    """Answers that are made up."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def run(self, script: str, parameters: Any, *, timeout_seconds: float) -> str:
        import json  # noqa: PLC0415 - only here

        given = {name: value(parameters) if callable(value) else value for name, value in self.fields.items()}
        return json.dumps({"godwit": 1, **given})

    def close(self) -> None: ...


def packed(*numbers: int) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}Q", *numbers)).decode()


def test_ranges_in_any_order_are_put_in_order() -> None:
    told = Told(
        processed=lambda given: given["Length"], starts=packed(9 * BLOCK, 5, 2 * BLOCK), lengths=packed(1, 1, BLOCK + 1)
    )
    found = changed_since(told, "C:\\x.vhdx", "rct", 16 * BLOCK)
    assert found.tolist() == [[0, BLOCK], [2 * BLOCK, 4 * BLOCK], [9 * BLOCK, 10 * BLOCK]]


@pytest.mark.parametrize(
    "fields",
    [
        {"processed": "0"},
        {"processed": ""},
        {"processed": "-1"},
        {"processed": str(1 << 70)},
        {"starts": packed(1, 2), "lengths": packed(1)},
        {"starts": packed(1 << 63), "lengths": packed(1)},
        {"starts": packed(1), "lengths": packed((1 << 64) - 1)},
        {"starts": "###"},
        {"starts": base64.b64encode(b"1234567").decode()},
        {"starts": None, "lengths": packed(1)},
    ],
)
def test_changes_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    usual = {"processed": lambda given: given["Length"], "starts": packed(), "lengths": packed()}
    with pytest.raises(HypervError):
        changed_since(Told(**(usual | fields)), "C:\\x.vhdx", "rct", 16 * BLOCK)


def test_pieces_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MOST_QUESTIONS", 10)
    with pytest.raises(HypervError, match="without end"):
        changed_since(Told(processed="1", starts="", lengths=""), "C:\\x.vhdx", "rct", 16 * BLOCK)


def test_more_ranges_than_fit_are_told_more_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MOST_RANGES", 64)
    starts = [n * 2 * BLOCK for n in range(1000)]
    told = Told(processed=lambda given: given["Length"], starts=packed(*starts), lengths=packed(*[1] * 1000))
    found = changed_since(told, "C:\\x.vhdx", "rct", 4000 * BLOCK)
    assert len(found) <= 64
    for start in starts:
        assert np.any((found[:, 0] <= start) & (start < found[:, 1]))
    assert int(found[-1, 1]) < 3000 * BLOCK  # and no more than that


# -- files ------------------------------------------------------------------------------------------------------------


def test_mapped_folders_are_the_longest_that_fit_and_are_not_left(tmp_path: Path) -> None:
    maps = [("C:\\", str(tmp_path)), ("c:\\vms\\fast", "/fast"), ("D:\\VMs\\", "/d"), ("\\\\sofs\\share", "/s")]
    host = HostFiles(Told(), maps, here=False)
    assert host.mapped("C:\\x\\a.vhdx") == tmp_path / "x" / "a.vhdx"
    assert host.mapped("C:\\VMs\\Fast\\a.vhdx") == Path("/fast/a.vhdx")
    assert host.mapped("C:/VMs/Fast/a.vhdx") == Path("/fast/a.vhdx")
    assert host.mapped("C:\\VMs\\Faster\\a.vhdx") == tmp_path / "VMs" / "Faster" / "a.vhdx"
    assert host.mapped("D:\\VMs\\..\\a.vhdx") is None
    assert host.mapped("D:\\VMs\\a\\..\\b.vhdx") == Path("/d/b.vhdx")
    assert host.mapped("\\\\sofs\\share\\x.vhdx") == Path("/s/x.vhdx")
    assert host.mapped("E:\\x.vhdx") is None


def test_a_file_through_the_session_reads_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_READ_BYTES", 1000)
    monkeypatch.setattr(files, "CACHE_PAGES", 2)
    fake = FakeHost(tmp_path)
    data = random.Random(1).randbytes(12_345)
    fake.here("C:\\a.bin").parent.mkdir(parents=True)
    fake.here("C:\\a.bin").write_bytes(data)
    file = SessionFile(fake.connect(None), "C:\\a.bin")
    assert file.size() == len(data)
    drawn = random.Random(2)
    for _ in range(100):
        offset, length = drawn.randrange(13_000), drawn.randrange(4000)
        assert file.pread(offset, length) == data[offset : offset + length]
        buffer = bytearray(length)
        assert file.pread_into(offset, memoryview(buffer)) == len(data[offset : offset + length])
        assert bytes(buffer).rstrip(b"\0") == data[offset : offset + length].rstrip(b"\0")
    assert list(file.data_extents(10, 99_999)) == [(10, 12_345)]
    assert str(file.path) == "C:\\a.bin"
    for refused in (lambda: file.pwrite(0, b"x"), lambda: file.truncate(0), file.fsync, lambda: file.punch_hole(0, 1)):
        with pytest.raises(ReadOnlyError):
            refused()
    file.close()
    fake.here("C:\\a.bin").write_bytes(data[:5000])
    with pytest.raises(HypervError, match="of"):
        file.pread(0, len(data))
    with pytest.raises(HypervError):
        SessionFile(fake.connect(None), "C:\\none.bin")


def chain(fake: FakeHost, *paths: str) -> None:
    for number, path in enumerate(paths):
        here = fake.here(path)
        here.parent.mkdir(parents=True, exist_ok=True)
        if number == 0:
            create_disk(here, size=4 * MIB, block_size=MIB)
        else:
            create_disk(here, parent=fake.here(paths[number - 1]))
        with open_writable(here, allowed_folders=[fake.folder]) as disk:
            disk.write_at(number * BLOCK, bytes([number + 1]) * BLOCK)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_chain_is_followed_to_other_folders(tmp_path: Path, mapped: bool) -> None:
    fake = FakeHost(tmp_path)
    chain(fake, "C:\\Templates\\base.vhdx", "C:\\VMs\\web\\os.vhdx", "C:\\VMs\\web\\os_1.avhdx")
    host = HostFiles(fake.connect(None), [("C:\\", str(fake.here("C:")))] if mapped else [], here=False)
    with open_chain(host, "C:\\VMs\\web\\os_1.avhdx") as disk:
        assert len(disk.chain) == 3
        assert disk.read_at(0, 3 * BLOCK) == b"\1" * BLOCK + b"\2" * BLOCK + b"\3" * BLOCK


def test_a_parent_that_is_gone_or_another_is_told(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    chain(fake, "C:\\VMs\\base.vhdx", "C:\\VMs\\os.avhdx")
    host = HostFiles(fake.connect(None), [], here=False)
    with open_writable(fake.here("C:\\VMs\\base.vhdx")) as disk:
        disk.write_at(0, b"changed")
    with pytest.raises(DiskError, match="has changed since"):
        open_chain(host, "C:\\VMs\\os.avhdx")
    fake.here("C:\\VMs\\base.vhdx").unlink()
    with pytest.raises(DiskError, match="nicht gefunden"):
        open_chain(host, "C:\\VMs\\os.avhdx")
