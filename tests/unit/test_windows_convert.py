"""A whole Windows disk converted over an overlay and taken back: files, hive, and what the guest did meanwhile."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from conversion.device import Slice
from conversion.errors import ConversionError, DamagedError, NoSpaceError, RefusedError
from conversion.filesystems.fat import FatFileSystem
from conversion.overlay import Overlay
from conversion.windows.bcd import BootStore
from conversion.windows.convert import (
    WindowsConversion,
    convert_windows,
    forget_hibernation,
    restore_windows,
    write_in_place,
)
from conversion.windows.hive import REG_DWORD, Hive
from conversion.windows.hiveedit import HiveEditor
from conversion.windows.inspect import WindowsSystem, inspect_windows
from conversion.windows.system import driver_states
from conversion.windows.verify import verify_windows
from conversion.windows.volume import Volume
from tests.support import windows_disk
from tests.support.gpt_disks import SparseDisk
from tests.support.windows_disk import DISK_GUID, WindowsDisk
from tests.unit.test_hive import everything

pytestmark = pytest.mark.skipif(bool(windows_disk.missing()), reason=windows_disk.missing() or "all is there")

SYSTEM = "/Windows/System32/config/SYSTEM"
STORE = "/EFI/Microsoft/Boot/BCD"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> WindowsDisk:
    path = tmp_path_factory.mktemp("windows") / "disk.raw"
    layout = list(windows_disk.standard_layout())
    files = dict(layout[2].files or {}) | {"/hiberfil.sys": b"HIBR" + bytes(20000)}
    layout[2] = windows_disk.Partition(layout[2].kind, layout[2].guid, 64, layout[2].name, files)
    return windows_disk.build(path, layout)


class Guest:
    """The disk behind an overlay, with its volumes."""

    def __init__(self, disk: WindowsDisk, device: SparseDisk) -> None:
        self.disk = disk
        self.overlay = Overlay(device)
        self.reopen()

    def reopen(self) -> None:
        self.volumes = self.disk.volumes(self.overlay)
        self.esp, self.windows = self.volumes[0], self.volumes[2]

    def inspect(self) -> WindowsSystem:
        return inspect_windows(self.volumes, disk_guid=DISK_GUID, discard_hibernation=True)

    def convert(self, *, discard: bool = False) -> WindowsConversion:
        found = self.inspect()
        done = convert_windows(
            self.esp,
            self.windows,
            self.disk.identity(),
            overlay=self.overlay,
            letterless=found.letterless,
            system_hive=found.system_hive,
            discard_hibernation=discard,
        )
        self.reopen()
        return done

    def restore(self, done: WindowsConversion) -> WindowsConversion:
        document = json.loads(json.dumps(done.document()))
        back = restore_windows(
            WindowsConversion.from_document(document),
            self.esp,
            self.windows,
            self.disk.identity(),
            overlay=self.overlay,
        )
        self.reopen()
        return back

    def read(self, volume: Volume, path: str) -> bytes:
        assert volume.filesystem is not None
        content = volume.filesystem.read_file(path, largest_bytes=1 << 28)
        assert content is not None, path
        return content

    @property
    def fat(self) -> FatFileSystem:
        assert isinstance(self.esp.filesystem, FatFileSystem)
        return self.esp.filesystem

    def write_hive(self, content: bytes) -> None:
        assert self.windows.filesystem is not None
        extents = self.windows.filesystem.extents(SYSTEM)
        assert extents
        write_in_place(self.windows.device, extents, content)


@pytest.fixture(scope="module")
def device(disk: WindowsDisk) -> SparseDisk:
    return SparseDisk.from_file(disk.path)


@pytest.fixture
def guest(disk: WindowsDisk, device: SparseDisk) -> Guest:
    return Guest(disk, device)


def test_the_disk_is_inspected_as_it_was_made(guest: Guest) -> None:
    found = guest.inspect()
    assert found.is_convertible
    assert str(found.version) == "Windows Server 2019 Standard (build 17763)"
    assert found.is_hive_dirty
    assert found.is_hibernated
    refusing = inspect_windows(guest.volumes, disk_guid=DISK_GUID)
    assert [each.rule for each in refusing.findings if each.severity == "refusal"] == ["hibernated"]


def test_the_converted_disk_has_what_a_bios_needs_and_verifies(guest: Guest) -> None:
    done = guest.convert()
    assert guest.read(guest.esp, "/bootmgr") == windows_disk.windows_files()["/Windows/Boot/PCAT/bootmgr"]
    assert guest.read(guest.esp, "/Boot/Fonts/wgl4_boot.ttf")
    assert guest.read(guest.esp, "/Boot/en-US/bootmgr.exe.mui")
    assert guest.read(guest.esp, STORE) == windows_disk.esp_files()[STORE]
    names = [each.path for each in done.esp.files]
    assert names[:2] == ["/bootmgr", "/Boot/BCD"]
    assert "/Boot/Fonts/chs_boot.ttf" not in names
    assert done.esp.folders == ("/Boot", "/Boot/en-US", "/Boot/Fonts")
    loader = BootStore(guest.read(guest.esp, "/Boot/BCD")).default_loader
    assert loader is not None
    assert loader.text("12000002") == r"\Windows\system32\winload.exe"
    hive = Hive(guest.read(guest.windows, SYSTEM))
    assert not hive.base_block.is_dirty
    assert hive.base_block.primary_sequence == 2131  # above every entry of its logs
    assert all(state.starts_at_boot for state in driver_states(hive))
    assert verify_windows(guest.esp, guest.windows, guest.disk.identity()) == ()
    assert guest.inspect().is_convertible  # the other start still stands


def test_every_change_has_its_reason_and_they_are_few(guest: Guest) -> None:
    guest.convert()
    changes = guest.overlay.changes()
    assert all(change.why for change in changes)
    assert f"{SYSTEM} on partition 3" in [change.what for change in changes]
    assert sum(length for change in changes for _, length in change.extents) < 4 << 20


def test_the_conversion_is_deterministic(guest: Guest, disk: WindowsDisk, device: SparseDisk) -> None:
    other = Guest(disk, device)
    assert other.convert().document() == guest.convert().document()
    assert list(other.overlay.written()) == list(guest.overlay.written())


def test_the_way_back_leaves_files_and_values_as_they_were(guest: Guest) -> None:
    found = guest.inspect().system_hive
    assert found is not None
    files = {path: guest.read(guest.esp, path) for path in windows_disk.esp_files()}
    root = guest.fat.list_folder("/")
    back = guest.restore(guest.convert())
    assert {path: guest.read(guest.esp, path) for path in files} == files
    assert guest.fat.list_folder("/") == root
    assert everything(Hive(guest.read(guest.windows, SYSTEM))) == everything(Hive(found.content))
    assert back.findings == ()
    assert back.esp.files == ()


def test_what_the_guest_changed_stays_and_a_missing_fallback_is_made(guest: Guest) -> None:
    done = guest.convert()
    guest.fat.create_file("/Boot/BCD", b"the guest's own", overwrite=True)
    guest.fat.create_file("/Boot/bootstat.dat", b"made by Windows")
    guest.fat.remove_file("/EFI/BOOT/BOOTX64.EFI")
    editor = HiveEditor(guest.read(guest.windows, SYSTEM))
    key = editor.hive.key(r"ControlSet001\Services\storvsc\StartOverride")
    assert key is not None
    editor.set_value(key, "0", REG_DWORD, b"\x04\0\0\0")
    guest.write_hive(editor.finish())

    back = guest.restore(done)

    assert [each.rule for each in back.findings] == ["esp-file-left"]
    assert guest.read(guest.esp, "/Boot/BCD") == b"the guest's own"
    assert [each.name for each in guest.fat.list_folder("/Boot") or ()] == ["BCD", "bootstat.dat"]
    assert guest.fat.read_file("/bootmgr") is None
    assert guest.read(guest.esp, "/EFI/BOOT/BOOTX64.EFI") == windows_disk.esp_files()["/EFI/BOOT/BOOTX64.EFI"]
    hive = Hive(guest.read(guest.windows, SYSTEM))
    states = {state.name: state.override for state in driver_states(hive)}
    assert states["storvsc"] == 4
    assert states["vmbus"] == 3


def test_a_store_left_by_an_earlier_conversion_is_replaced_and_not_deleted(guest: Guest) -> None:
    guest.fat.make_folder("/Boot")
    guest.fat.create_file("/Boot/BCD", b"of an earlier conversion")
    done = guest.convert()
    assert {each.path: each.replaced for each in done.esp.files}["/Boot/BCD"]
    assert "/Boot" not in done.esp.folders
    assert verify_windows(guest.esp, guest.windows, guest.disk.identity()) == ()
    guest.restore(done)
    assert guest.fat.read_file("/Boot/BCD") is not None


def test_the_way_back_stops_where_nothing_could_start(guest: Guest) -> None:
    done = guest.convert()
    guest.fat.remove_file("/EFI/BOOT/BOOTX64.EFI")
    guest.fat.remove_file("/EFI/Microsoft/Boot/bootmgfw.efi")
    with pytest.raises(RefusedError, match="BOOTX64"):
        guest.restore(done)


def with_little_room(disk: WindowsDisk, device: SparseDisk, room_bytes: int) -> Guest:
    """Return the disk with an EFI system partition that has not more than this free."""
    filled = device.copy()
    fat = FatFileSystem(Slice(filled, *disk.ranges[0]))
    free = fat.free_bytes
    assert free is not None
    fat.create_file("/filler", bytes(free - room_bytes))
    return Guest(disk, filled)


def test_extras_are_left_out_where_the_partition_is_nearly_full(disk: WindowsDisk, device: SparseDisk) -> None:
    guest = with_little_room(disk, device, 1500 << 10)
    done = guest.convert()
    assert [each.path for each in done.esp.files][:2] == ["/bootmgr", "/Boot/BCD"]
    assert {each.rule for each in done.findings} == {"esp-extra-left-out"}


def test_without_room_for_the_boot_manager_it_is_refused(disk: WindowsDisk, device: SparseDisk) -> None:
    guest = with_little_room(disk, device, 100 << 10)
    assert "esp-full" in [each.rule for each in guest.inspect().findings]
    with pytest.raises(NoSpaceError):
        guest.convert()


def test_a_discarded_hibernation_is_found_no_more(guest: Guest) -> None:
    guest.convert(discard=True)
    assert not guest.inspect().is_hibernated
    forget_hibernation(guest.volumes[3], overlay=guest.overlay)  # where there is none, nothing is done


@pytest.mark.parametrize("what", ["bootmgr", "store", "partition", "hive", "driver"])
def test_verification_finds_what_was_not_done(guest: Guest, what: str) -> None:
    guest.convert()
    identity = guest.disk.identity()
    if what == "bootmgr":
        guest.fat.remove_file("/bootmgr")
    elif what == "store":
        guest.fat.create_file("/Boot/BCD", windows_disk.esp_files()[STORE], overwrite=True)
    elif what == "partition":
        identity = guest.disk.identity(signature=5)
    elif what == "hive":
        content = bytearray(guest.read(guest.windows, SYSTEM))
        content[5] ^= 1
        guest.write_hive(bytes(content))
    else:
        editor = HiveEditor(guest.read(guest.windows, SYSTEM))
        for state in driver_states(editor.hive):
            key = editor.hive.key(rf"ControlSet001\Services\{state.name}")
            assert key is not None
            editor.set_value(key, "Start", REG_DWORD, b"\x03\0\0\0")
        guest.write_hive(editor.finish())
    assert verify_windows(guest.esp, guest.windows, identity)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"esp": {}, "system": {"edits": []}},
        {"esp": {"files": [], "folders": []}, "system": {}},
        {"esp": 1, "system": 2},
    ],
)
def test_a_damaged_record_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(DamagedError):
        WindowsConversion.from_document(document)


def test_volumes_that_cannot_be_read_are_refused(guest: Guest) -> None:
    broken = Volume(1, guest.esp.device, guest.esp.type_guid, guest.esp.partition_guid, None)
    for esp, windows in ((broken, guest.windows), (guest.esp, broken), (guest.windows, guest.windows)):
        with pytest.raises(ConversionError):
            convert_windows(esp, windows, guest.disk.identity())


def test_ntfs_3g_reads_the_hive_that_was_written(guest: Guest, tmp_path: Path) -> None:
    guest.convert()
    start, size = guest.disk.ranges[2]
    volume = tmp_path / "volume"
    volume.write_bytes(guest.overlay.read_at(start, size))
    for path, wanted in (
        (f"{SYSTEM}.LOG1", windows_disk.sample("SYSTEM_B.LOG1")),  # the logs stay
        (SYSTEM, guest.read(guest.windows, SYSTEM)),
    ):
        done = subprocess.run(["ntfscat", volume, path.lstrip("/")], capture_output=True, check=True)
        assert done.stdout == wanted
