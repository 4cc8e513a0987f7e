"""Protecting a VM: its disks are looked at and numbered, its machine is described, contradictions are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conversion.gpt import EFI_SYSTEM
from replica import catalog, protection
from replica.errors import GodwitError, UsageError
from replica.host import Host
from replica.model import Machine, Nic, SourceDisk
from replica.protection import MachineWishes, describe, number_disks
from replica.stores.memory import MemoryStore
from tests.support.engine import BLOCK, make_host
from tests.unit.test_gpt import LINUX, make_gpt_disk
from vhdx.errors import DiskError


@pytest.fixture
def host() -> Host:
    return make_host()


@pytest.fixture
def store(host: Host) -> MemoryStore:
    made = MemoryStore("protection")
    catalog.init_store(made, host)
    return made


def disk(path: Path, data: bytes = bytes(BLOCK)) -> Path:
    path.write_bytes(data)
    return path


def protect(
    store: MemoryStore, host: Host, *disks: Path, wishes: MachineWishes | None = None
) -> tuple[catalog.ProtectedVm, Machine, tuple[SourceDisk, ...]]:
    found, settings = protection.protect(
        store, host, tenant="default", name="web", disks=disks, wishes=wishes or MachineWishes()
    )
    return found, settings.machine, settings.sources


def test_disks_are_numbered_in_the_order_given_and_named_after_their_files(
    store: MemoryStore, host: Host, tmp_path: Path
) -> None:
    paths = [disk(tmp_path / name) for name in ("os.img", "data.raw")]
    _, _, sources = protect(store, host, *paths)
    assert [(one.number, one.name, one.path) for one in sources] == [
        (0, "os", str(paths[0])),
        (1, "data", str(paths[1])),
    ]


def test_the_generation_is_that_of_the_boot_disk(store: MemoryStore, host: Host, tmp_path: Path) -> None:
    efi = disk(tmp_path / "efi.img", make_gpt_disk([(EFI_SYSTEM, 40, 50)]))
    bios = disk(tmp_path / "bios.img", make_gpt_disk([(LINUX, 40, 50)]))
    assert protect(store, host, efi, bios)[1].firmware == "uefi"
    store = MemoryStore()
    catalog.init_store(store, host)
    assert protect(store, host, bios, efi)[1].firmware == "bios"
    store = MemoryStore()
    catalog.init_store(store, host)
    assert protect(store, host, bios, wishes=MachineWishes(generation=2))[1].generation == 2


def test_two_disks_of_one_file_name_get_names_that_differ(store: MemoryStore, host: Host, tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    _, _, sources = protect(store, host, *(disk(tmp_path / folder / "disk.img") for folder in ("a", "b", "c")))
    assert len({one.name for one in sources}) == 3


def test_names_stay_apart_whatever_the_files_are_called(tmp_path: Path) -> None:
    paths = [tmp_path / "a-2.img", tmp_path / "b" / "a.img", tmp_path / "c" / "a.img"]
    assert len({one.name for one in number_disks((), paths, next_number=0)}) == 3


def test_a_known_disk_keeps_its_number_and_a_new_one_gets_a_fresh_one(
    store: MemoryStore, host: Host, tmp_path: Path
) -> None:
    first, second, third = (disk(tmp_path / f"{name}.img") for name in ("first", "second", "third"))
    found, _, _ = protect(store, host, first, second)
    after = protection.update(store, host, found, disks=[second, third])
    assert [(one.number, one.path) for one in after.sources] == [(1, str(second)), (2, str(third))]
    back = protection.update(store, host, found, disks=[third, first])
    assert [(one.number, one.path) for one in back.sources] == [(2, str(third)), (3, str(first))]


def test_an_update_without_disks_leaves_them_and_looks_at_none(store: MemoryStore, host: Host, tmp_path: Path) -> None:
    path = disk(tmp_path / "os.img")
    found, _, sources = protect(store, host, path)
    path.unlink()
    after = protection.update(store, host, found, wishes=MachineWishes(cpus=7), interval_seconds=60)
    assert (after.sources, after.machine.cpus, after.interval_seconds) == (sources, 7, 60)


@pytest.mark.parametrize("interval, level", [(9, 1), (0, 1), (-5, 1), (300, 20), (300, -8), (300, 100)])
def test_wrong_numbers_are_refused(store: MemoryStore, host: Host, tmp_path: Path, interval: int, level: int) -> None:
    path = disk(tmp_path / "os.img")
    with pytest.raises(UsageError):
        protection.protect(
            store,
            host,
            tenant="default",
            name="web",
            disks=[path],
            interval_seconds=interval,
            compression_level=level,
        )
    found, _, _ = protect(store, host, path)
    if interval:
        with pytest.raises(UsageError):
            protection.update(store, host, found, interval_seconds=interval, compression_level=level)


def test_contradictions_are_refused_and_nothing_is_written(store: MemoryStore, host: Host, tmp_path: Path) -> None:
    good = disk(tmp_path / "os.img")
    before = list(store.list(""))
    bad: list[tuple[list[Path], MachineWishes]] = [
        ([], MachineWishes()),
        ([good, good], MachineWishes()),
        ([good, tmp_path / "." / "os.img"], MachineWishes()),
        ([good], MachineWishes(generation=1, secure_boot=True)),
        ([tmp_path / "missing.img"], MachineWishes()),
        ([tmp_path], MachineWishes()),
        ([disk(tmp_path / "odd.img", b"x" * 513)], MachineWishes()),
        ([disk(tmp_path / "empty.img", b"")], MachineWishes()),
        ([disk(tmp_path / "broken.vhdx", b"vhdxfile" + bytes(1 << 20))], MachineWishes()),
        ([Path(os.fsdecode(b"/tmp/bad\xff.img"))], MachineWishes()),
    ]
    for disks, wishes in bad:
        with pytest.raises((GodwitError, DiskError)):
            protect(store, host, *disks, wishes=wishes)
    assert list(store.list("")) == before


def test_a_path_that_is_no_unicode_is_a_usage_error(store: MemoryStore, host: Host, tmp_path: Path) -> None:
    path = disk(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.img")))
    with pytest.raises(UsageError, match="Unicode"):
        protect(store, host, path)


def test_wishes_change_what_they_name_and_nothing_else() -> None:
    machine = Machine(2, 4, 1 << 30, (Nic("00:15:5d:00:00:01"),), True)
    assert describe(machine, MachineWishes()) == machine
    assert describe(machine, MachineWishes(secure_boot=False, nics=())) == Machine(2, 4, 1 << 30)
    assert describe(machine, MachineWishes(cpus=1, memory_bytes=5)).memory_bytes == 5
    with pytest.raises(UsageError, match="Generation 2"):
        describe(machine, MachineWishes(generation=1))
