"""Looking for the names of disk files in Hyper-V's configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.checkpoints import records
from replica.checkpoints.records import read_records


def configuration(folder: Path, text: str, *, name: str = "x.vmcx", code: str = "utf-16-le") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"\x01\x02\x03" + text.encode(code) + b"\0\0")
    return path


@pytest.mark.parametrize("written", ["server disk.vhdx", "SERVER DISK.VHDX", "Server Disk.VHDX"])
@pytest.mark.parametrize("separator", ["\\", "/"])
def test_names_are_compared_without_case_at_the_end_of_a_path(tmp_path: Path, written: str, separator: str) -> None:
    disk, other = tmp_path / "disks" / "Server Disk.vhdx", tmp_path / "disks" / "Disk.vhdx"
    found = configuration(tmp_path / "Snapshots", f"D:{separator}{written}")
    told = read_records([disk, other])
    assert told.naming == {disk: (found,)}
    assert (told.configurations, told.unreadable) == ((found,), ())


def test_names_beyond_ascii_are_found(tmp_path: Path) -> None:
    disk = tmp_path / "Größe 1.avhdx"
    found = configuration(tmp_path, "C:\\VMs\\Größe 1.avhdx")
    assert read_records([disk]).naming == {disk: (found,)}


def test_only_the_usual_places_and_folders_that_are_named_are_looked_at(tmp_path: Path) -> None:
    disk = tmp_path / "vms" / "web" / "Virtual Hard Disks" / "a.vhdx"
    disk.parent.mkdir(parents=True)
    near = [
        configuration(disk.parent, "\\a.vhdx"),
        configuration(disk.parent / "Virtual Machines", "\\a.vhdx"),
        configuration(disk.parent.parent, "\\a.vhdx"),
        configuration(disk.parent.parent / "Snapshots", "\\a.vhdx", name="B.VMCX"),
    ]
    far = configuration(tmp_path / "vms" / "configurations" / "deep" / "deeper", "\\a.vhdx")
    configuration(disk.parent, "\\a.vhdx", name="a.vmrs")  # what a machine is doing, and not what it is made of
    assert set(read_records([disk]).naming[disk]) == set(near)
    assert set(read_records([disk], [tmp_path / "vms" / "configurations"]).naming[disk]) == {*near, far}
    assert read_records([tmp_path / "nowhere" / "b.vhdx"], [tmp_path / "nothing"]).configurations == ()


@pytest.mark.parametrize("code", ["utf-8", "utf-16-le"])
def test_of_xml_only_that_of_hyper_v_counts(tmp_path: Path, code: str) -> None:
    disk = tmp_path / "a.vhdx"
    configuration(tmp_path, "<domain>/a.vhdx</domain>", name="libvirt.xml", code=code)
    found = configuration(tmp_path, "<Configuration>C:\\a.vhdx</Configuration>", name="old.xml", code=code)
    told = read_records([disk])
    assert told.naming == {disk: (found,)} and told.configurations == (found,)


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST_BYTES", 100)
    large = configuration(tmp_path, "x" * 100)
    told = read_records([tmp_path / "a.vhdx"])
    assert (told.unreadable, told.configurations, told.naming) == ((large,), (large,), {})
