"""Whole Windows disks to Generation 1 and home, with what Windows, and an administrator, did in between."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from conversion import grub
from conversion.filesystems.fat import FatFileSystem
from conversion.inspection import inspect, windows_volumes
from conversion.layout import Layout
from conversion.manifest import Manifest
from conversion.overlay import Overlay
from conversion.plan import Plan
from conversion.tobios import plan_bios
from conversion.touefi import plan_uefi
from conversion.verify import verify
from conversion.windows.bcd import DEVICE, OS_DEVICE, BootStore
from conversion.windows.bcddevice import devices_in
from conversion.windows.convert import write_in_place
from conversion.windows.hive import REG_SZ, Hive
from conversion.windows.hiveedit import HiveEditor
from conversion.windows.hivefile import read_recovered
from conversion.windows.system import driver_states
from conversion.windows.volume import BASIC_DATA, Volume
from tests.support import boot_disks, windows_disk
from tests.support import conversion_disks as disks
from tests.support.gpt_disks import SparseDisk
from tests.support.windows_disk import WINDOWS_GUID, Partition, standard_layout
from tests.unit.test_hive import everything

WHY = windows_disk.missing() or disks.missing()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "all is there")

SYSTEM = "/Windows/System32/config/SYSTEM"
MIB = 1 << 20
DATA = Partition(BASIC_DATA, windows_disk.MSR_GUID, 4, "Data")


@pytest.fixture(autouse=True)
def quick_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grub, "build_core", disks.cached_core)


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> SparseDisk:
    path = tmp_path_factory.mktemp("windows") / "disk.raw"
    windows_disk.build(path)
    return SparseDisk.from_file(path)


def converted(disk: SparseDisk) -> tuple[SparseDisk, Plan, Manifest]:
    """Convert a copy of the disk; return it, the plan, and the manifest as it was kept."""
    out = disk.copy()
    plan = plan_bios(out)
    assert plan.overlay is not None, plan.refusals
    assert plan.written_bytes < 4 * MIB
    manifest = Manifest.decode(plan.require_manifest().encode())
    disks.write_plan(out, plan)
    assert verify(out, plan, manifest) == ()
    return out, plan, manifest


def home(disk: SparseDisk, manifest: Manifest) -> Plan:
    """Convert the disk back, and verify it."""
    plan = plan_uefi(disk, manifest)
    assert plan.overlay is not None, plan.refusals
    disks.write_plan(disk, plan)
    assert verify(disk, plan, manifest) == ()
    return plan


def volumes(disk: SparseDisk) -> tuple[Volume, Volume]:
    """Return the EFI system partition and the Windows volume, under whichever table is in force."""
    found = windows_volumes(inspect(disk).partitions)
    esp = next(one for one in found if one.has("/EFI/Microsoft/Boot/BCD"))
    return esp, next(one for one in found if one.has(SYSTEM))


def hive_of(disk: SparseDisk) -> Hive:
    windows = volumes(disk)[1]
    assert windows.filesystem is not None
    recovered = read_recovered(windows.filesystem, SYSTEM)
    assert recovered is not None
    return Hive(recovered.content)


def fat_of(disk: SparseDisk) -> FatFileSystem:
    filesystem = volumes(disk)[0].filesystem
    assert isinstance(filesystem, FatFileSystem)
    return filesystem


def write_hive(disk: SparseDisk, name: str) -> None:
    """Do what a running Windows does: set a value, and write the hive."""
    windows = volumes(disk)[1]
    assert windows.filesystem is not None
    content = read_recovered(windows.filesystem, SYSTEM)
    extents = windows.filesystem.extents(SYSTEM)
    assert content is not None and extents is not None
    editor = HiveEditor(content.content)
    select = editor.hive.key("Select")
    assert select is not None
    editor.set_value(select, name, REG_SZ, "by the guest\0".encode("utf-16-le"))
    write_in_place(windows.device, extents, editor.finish())


def assert_store_leads_to_windows(disk: SparseDisk, layout: Layout) -> None:
    content = fat_of(disk).read_file("/Boot/BCD")
    assert content is not None
    loader = BootStore(content).default_loader
    place = layout.identity().by_guid(WINDOWS_GUID)
    assert loader is not None and place is not None
    for number in (DEVICE, OS_DEVICE):
        (device,) = devices_in(loader.elements[number].data).partitions
        assert (device.signature, device.offset_bytes) == (layout.signature, place.offset_bytes)
    assert disk.read_at(place.offset_bytes + 3, 4) == b"NTFS"


def test_undone_to_the_byte_and_the_hive_key_by_key(standard: SparseDisk) -> None:
    before = everything(hive_of(standard))
    disk, plan, manifest = converted(standard)
    assert plan.layout is not None
    assert_store_leads_to_windows(disk, plan.layout)
    assert [one.gpt_number for one in plan.layout.unmapped] == [2]  # the reserved partition
    after = everything(hive_of(disk))
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    drivers = {state.name.lower() for state in driver_states(hive_of(disk))}
    for path in changed:
        parts = path.lower().split("\\")
        is_driver = len(parts) >= 3 and parts[1] == "services" and parts[2] in drivers
        assert path == "MountedDevices" or is_driver, path
    assert "MountedDevices" in changed
    assert all(state.starts_at_boot for state in driver_states(hive_of(disk)) if state.start is not None)
    letters = {name: value[1] for name, value in after["MountedDevices"].items()}
    of_disk = [data for data in letters.values() if data[:4] == struct.pack("<I", plan.layout.signature)]
    assert of_disk and all(len(data) == 12 for data in of_disk)
    home(disk, manifest)
    assert disk.content() == standard.content()


def test_what_windows_wrote_to_its_registry_stays(standard: SparseDisk) -> None:
    disk, _, manifest = converted(standard)
    write_hive(disk, "GuestWasHere")
    home(disk, manifest)
    hive = hive_of(disk)
    select = hive.key("Select")
    assert select is not None and select.text("GuestWasHere") == "by the guest"
    before, after = everything(hive_of(standard)), everything(hive)
    del after["Select"]["GuestWasHere"]
    assert after["MountedDevices"] == before["MountedDevices"]
    assert after == before


def test_what_windows_has_in_the_logs_of_its_registry_is_seen(standard: SparseDisk) -> None:
    """The hive stands as it was written, and a log beside it has grown: the old hive must not come back beneath it."""
    disk, _, manifest = converted(standard)
    windows = volumes(disk)[1]
    assert windows.filesystem is not None
    extents = windows.filesystem.extents(SYSTEM + ".LOG2")
    assert extents
    offset, length = extents[-1]
    windows.device.write_at(offset + length - 16, b"what came later.")
    plan = home(disk, manifest)
    assert "files of the system" not in {change.what for change in plan.changes}
    assert hive_of(disk).base_block.is_dirty is False
    assert everything(hive_of(disk))["MountedDevices"] == everything(hive_of(standard))["MountedDevices"]


def test_files_on_the_esp_that_windows_replaced_stay(standard: SparseDisk) -> None:
    disk, _, manifest = converted(standard)
    fat_of(disk).create_file("/bootmgr", b"a newer boot manager", overwrite=True)
    fat_of(disk).create_file("/EFI/Microsoft/Boot/bootmgfw.efi", b"MZ a newer loader", overwrite=True)
    plan = home(disk, manifest)
    assert "esp-file-left" in {one.rule for one in plan.findings}
    fat = fat_of(disk)
    assert fat.read_file("/bootmgr") == b"a newer boot manager"
    assert fat.read_file("/EFI/Microsoft/Boot/bootmgfw.efi") == b"MZ a newer loader"
    assert fat.list_folder("/Boot") is None
    assert fat.read_file("/EFI/BOOT/BOOTX64.EFI") == fat_of(standard).read_file("/EFI/BOOT/BOOTX64.EFI")


def test_a_missing_fallback_is_made(standard: SparseDisk) -> None:
    disk, _, manifest = converted(standard)
    fat_of(disk).remove_file("/EFI/BOOT/BOOTX64.EFI")
    home(disk, manifest)
    assert fat_of(disk).read_file("/EFI/BOOT/BOOTX64.EFI") == fat_of(standard).read_file(
        "/EFI/Microsoft/Boot/bootmgfw.efi"
    )


def test_disk_and_partition_grown_and_one_added(standard: SparseDisk, tmp_path: Path) -> None:
    disk, plan, manifest = converted(standard)
    path = disk.to_file(tmp_path / "disk.raw")
    with path.open("r+b") as file:
        file.truncate(disk.size + 64 * MIB)
    # As the guest's own tools do: the last partition longer, another one behind it.
    boot_disks.run("sfdisk", "--quiet", "--no-reread", "-N", "4", path, stdin=b", 40960\n")
    assert plan.layout is not None
    free = ({1, 2, 3, 4} - {one.number for one in plan.layout.entries}).pop()
    added = f"start={(disk.size + 32 * MIB) // 512}, size=20480, type=7\n"
    boot_disks.run("sfdisk", "--quiet", "--no-reread", "-N", str(free), path, stdin=added.encode())
    grown = SparseDisk.from_file(path)
    back = home(grown, manifest)
    assert "No problems found" in disks.sgdisk_says(grown.to_file(tmp_path / "home.raw"))
    partitions = {one.number: one for one in inspect(grown).partitions}
    assert partitions[4].guid == windows_disk.RECOVERY_GUID and partitions[4].device.size == 40960 * 512
    assert set(partitions) == {1, 2, 3, 4, 5}
    assert partitions[5].device.start == disk.size + 32 * MIB and partitions[5].type_guid == BASIC_DATA
    assert partitions[2].guid == windows_disk.MSR_GUID
    assert any("grew" in sentence for sentence in back.sentences)
    assert everything(hive_of(grown))["MountedDevices"] == everything(hive_of(standard))["MountedDevices"]


def test_a_partition_over_what_is_not_shown_stops(standard: SparseDisk, tmp_path: Path) -> None:
    disk, plan, manifest = converted(standard)
    assert plan.layout is not None
    path = disk.to_file(tmp_path / "disk.raw")
    hidden = plan.layout.unmapped[0]
    free = ({1, 2, 3, 4} - {one.number for one in plan.layout.entries}).pop()
    added = f"start={hidden.first_lba}, size=2048, type=7\n"
    boot_disks.run("sfdisk", "--quiet", "--no-reread", "-N", str(free), path, stdin=added.encode())
    disk = SparseDisk.from_file(path)
    held = disk.content()
    back = plan_uefi(disk, manifest)
    assert back.overlay is None and "overlaps-unmapped" in {one.rule for one in back.refusals}
    assert disk.content() == held


@pytest.mark.parametrize("more", [1, 2, 3])
def test_five_partitions_and_more(tmp_path: Path, more: int) -> None:
    """One too many leaves out the recovery partition; more of them make an extended one in the reserved one's place."""
    layout = list(standard_layout())
    extra = [
        Partition(BASIC_DATA, type(DATA.guid)(int=DATA.guid.int + number + 1), 4, f"Data {number}")
        for number in range(more)
    ]
    windows_disk.build(tmp_path / "disk.raw", [*layout, *extra])
    disk = SparseDisk.from_file(tmp_path / "disk.raw")
    before = disk.content()
    out, plan, manifest = converted(disk)
    assert plan.layout is not None
    assert_store_leads_to_windows(out, plan.layout)
    active = [one.gpt_number for one in plan.layout.entries if one.active]
    assert active == [1]
    seen = disks.sfdisk_partitions(out.to_file(tmp_path / "out.raw"))
    assert seen == sorted((one.first_lba, one.sectors) for one in plan.layout.entries)
    if more == 1:
        assert len(plan.layout.entries) == 4 and plan.layout.extended is None
    elif more == 2:
        assert [one.gpt_number for one in plan.layout.unmapped] == [2, 4] and len(plan.layout.entries) == 4
    else:
        assert plan.layout.extended is not None and len(plan.layout.entries) == 6
    home(out, manifest)
    assert out.content() == before


def test_nothing_is_written_by_planning(standard: SparseDisk) -> None:
    below = standard.copy()
    assert plan_bios(Overlay(below)).overlay is not None
    assert below.content() == standard.content()
    assert below.log == []
