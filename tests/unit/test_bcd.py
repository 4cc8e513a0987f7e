"""Boot stores: the conversion element by element over real ones, and what is left alone."""

from __future__ import annotations

import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest
from regipy.registry import RegistryHive

from conversion.errors import ConversionError, DamagedError
from conversion.identity import DiskIdentity, PartitionIdentity
from conversion.windows.bcd import BOOT_MANAGER, BcdElement, BcdObject, BootStore, bios_path, convert_bcd_to_bios
from conversion.windows.bcddevice import PartitionDevice, devices_in, encode_partition
from conversion.windows.hive import Hive
from tests.support import windows_disk
from tests.support.hive_builder import build_hive, tree
from tests.unit.test_hive_edit import check_cells

needs_samples = pytest.mark.skipif(not windows_disk.SAMPLES.is_dir(), reason=windows_disk.NO_SAMPLES)


def partition(guid: uuid.UUID, offset_bytes: int) -> PartitionIdentity:
    return PartitionIdentity(1, guid, 1, offset_bytes, 2048)


SIGNATURE = 0xDDBA6BBB
DISK = windows_disk.DISK_GUID
WINDOWS, ESP, RECOVERY = windows_disk.STORED_WINDOWS_GUID, windows_disk.ESP_GUID, windows_disk.RECOVERY_GUID
OFFSETS = {ESP: 1 << 20, WINDOWS: 117 << 20, RECOVERY: 5 << 40}
IDENTITY = DiskIdentity(DISK, SIGNATURE, tuple(partition(guid, at) for guid, at in OFFSETS.items()))
LOCATE_DISK = uuid.UUID("20ac3077-f7cd-4c47-95d5-53fbf8b752b5")
LOCATE_ESP = uuid.UUID("85c434af-7860-49b3-85c3-b70316081b7b")

WINLOAD = "{733b62e5-f608-11eb-825c-c112f60133ab}"
RESUME = "{733b62e4-f608-11eb-825c-c112f60133ab}"
RECOVERY_LOADER = "{733b62e6-f608-11eb-825c-c112f60133ab}"
RECOVERY_OPTIONS = "{733b62e7-f608-11eb-825c-c112f60133ab}"
MEMORY_TEST = "{b2721d73-1db4-4c62-bf78-c548a880142d}"
FIRMWARE = {
    "{a5a30fa2-3d06-4e9f-b5f4-a01df9d1fcba}",
    *(f"{{733b62{end}-f608-11eb-825c-c112f60133ab}}" for end in ("de", "e2", "e3")),
}


def device(guid: uuid.UUID) -> bytes:
    """Return the 88 bytes as Windows itself writes them into a store for a BIOS."""
    head = bytes(16) + struct.pack("<IIII", 6, 0, 0x48, 0)
    return head + struct.pack("<QQIIIIQ", OFFSETS[guid], 0, 0, 1, SIGNATURE, 0, 0) + bytes(16)


def text(value: str) -> bytes:
    return f"{value}\0".encode("utf-16-le")


def objects(content: bytes) -> dict[str, BcdObject]:
    return BootStore(content).objects


def flat(content: bytes) -> dict[tuple[str, str], bytes]:
    return {
        (name, number): element.data
        for name, each in objects(content).items()
        for number, element in each.elements.items()
    }


@needs_samples
def test_the_sample_is_converted_element_by_element() -> None:
    before = windows_disk.sample("BCD")
    done = convert_bcd_to_bios(before, IDENTITY)

    wanted = {place: data for place, data in flat(before).items() if place[0] not in FIRMWARE}
    for name in (WINLOAD, RESUME):
        wanted[name, "11000001"] = wanted[name, "21000001"] = device(WINDOWS)
        del wanted[name, "16000060"]
    wanted[WINLOAD, "12000002"] = text(r"\Windows\system32\winload.exe")
    wanted[RESUME, "12000002"] = text(r"\Windows\system32\winresume.exe")
    wanted[RECOVERY_LOADER, "12000002"] = text(r"\windows\system32\winload.exe")
    image = bytearray(wanted[RECOVERY_LOADER, "11000001"])
    image[0x44:0x8C] = device(RECOVERY)[16:]
    wanted[RECOVERY_LOADER, "11000001"] = wanted[RECOVERY_LOADER, "21000001"] = bytes(image)
    wanted[RECOVERY_OPTIONS, "31000003"] = device(RECOVERY)
    wanted[BOOT_MANAGER, "11000001"] = wanted[MEMORY_TEST, "11000001"] = device(ESP)
    del wanted[BOOT_MANAGER, "12000002"]
    wanted[MEMORY_TEST, "12000002"] = text(r"\boot\memtest.exe")

    assert flat(done.content) == wanted
    kinds = {name: each.kind for name, each in objects(before).items() if name not in FIRMWARE}
    assert {name: each.kind for name, each in objects(done.content).items()} == kinds
    assert all(value.name != "FirmwareVariable" for _, key in Hive(done.content).walk() for value in key.values())
    assert done.findings == ()
    assert len(done.content) == len(before)
    check_cells(done.content)


@needs_samples
def test_every_edit_is_listed_with_its_reason() -> None:
    done = convert_bcd_to_bios(windows_disk.sample("BCD"), IDENTITY)
    listed = {(change.object_id, change.element): change for change in done.changes}
    assert len(listed) == len(done.changes) == 21
    assert all(change.why for change in done.changes)
    assert {change.object_id for change in done.changes if "type" in change.before} == FIRMWARE
    change = listed[WINLOAD, "21000001"].document()
    assert change["before"] == f"partition {WINDOWS} of disk {DISK}"
    assert change["after"] == f"partition at byte {117 << 20} of disk ddba6bbb"


@needs_samples
def test_elements_that_search_are_left_as_they_are() -> None:
    before = windows_disk.sample("BCD-efi-locate")
    identity = DiskIdentity(LOCATE_DISK, SIGNATURE, (partition(LOCATE_ESP, OFFSETS[ESP]),))
    done = convert_bcd_to_bios(before, identity)
    loader = "{d65367c7-3fb7-11ec-8288-eab76d76405a}"
    wanted = {place: data for place, data in flat(before).items() if place[0] not in FIRMWARE}
    wanted[loader, "12000002"] = text(r"\Windows\system32\winload.exe")
    wanted[BOOT_MANAGER, "11000001"] = device(ESP)
    del wanted[BOOT_MANAGER, "12000002"]
    assert flat(done.content) == wanted
    assert done.findings == ()
    check_cells(done.content)


@needs_samples
def test_a_store_that_windows_made_for_a_bios_stays_as_it_is() -> None:
    content = windows_disk.sample("BCD-bios")
    done = convert_bcd_to_bios(content, IDENTITY)
    assert done.content == content
    assert done.changes == done.findings == ()
    # The form that is written here is the form that Windows writes there.
    stored = objects(content)["{1b67bffc-e290-11eb-8ffa-f459a0d9b879}"].elements["11000001"].data
    assert stored == encode_partition(PartitionDevice.mbr(0, SIGNATURE, 1 << 20))
    assert stored == device(ESP)


@needs_samples
def test_the_same_store_gives_the_same_bytes_and_a_converted_one_stays() -> None:
    content = windows_disk.sample("BCD")
    once = convert_bcd_to_bios(content, IDENTITY)
    assert convert_bcd_to_bios(content, IDENTITY) == once
    twice = convert_bcd_to_bios(once.content, IDENTITY)
    assert twice.content == once.content
    assert twice.changes == ()


@needs_samples
@pytest.mark.parametrize("name", ["BCD", "BCD-efi-locate"])
def test_a_converted_store_is_read_by_hivex_and_regipy_as_by_us(name: str, tmp_path: Path) -> None:
    if shutil.which("hivexregedit") is None:
        pytest.skip("hivexregedit is not installed (Debian: libwin-hivex-perl)")
    done = convert_bcd_to_bios(windows_disk.sample(name), IDENTITY)
    (tmp_path / "BCD").write_bytes(done.content)
    exported = subprocess.run(
        ["hivexregedit", "--export", tmp_path / "BCD", "\\Objects"], capture_output=True, check=True
    ).stdout.decode()
    theirs: dict[tuple[str, str], bytes] = {}
    place = ("", "")
    for line in exported.splitlines():
        if line.startswith("["):
            parts = line.strip("[]").split("\\")
            place = (parts[2].lower(), parts[4]) if len(parts) == 5 else ("", "")
        elif line.startswith('"Element"=hex'):
            theirs[place] = bytes.fromhex(line.partition(":")[2].replace(",", ""))
    assert theirs == flat(done.content)
    hive = RegistryHive(str(tmp_path / "BCD"))
    names = {key.name for key in hive.get_key("\\Objects").iter_subkeys()}
    assert names == set(objects(done.content))


@needs_samples
def test_a_partition_without_a_place_keeps_its_element_with_a_finding() -> None:
    identity = DiskIdentity(DISK, SIGNATURE, tuple(place for place in IDENTITY.partitions if place.guid != RECOVERY))
    before = windows_disk.sample("BCD")
    done = convert_bcd_to_bios(before, identity)
    assert {(finding.rule, finding.subject.split()[-1]) for finding in done.findings} == {
        ("bcd-unmapped-partition", RECOVERY_LOADER),
        ("bcd-unmapped-partition", RECOVERY_OPTIONS),
    }
    assert flat(done.content)[RECOVERY_OPTIONS, "31000003"] == flat(before)[RECOVERY_OPTIONS, "31000003"]


def test_another_disk_of_the_same_partition_is_another_partition() -> None:
    other = encode_partition(PartitionDevice.gpt(0, uuid.UUID(int=5), ESP))
    store = build_hive(tree({r"Objects\{a}\Elements\11000001": {"Element": (3, other)}}))
    done = convert_bcd_to_bios(store, IDENTITY)
    assert [finding.rule for finding in done.findings] == ["bcd-unmapped-partition"]
    assert done.content == store


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (r"\Windows\System32\WinLoad.efi", r"\Windows\System32\WinLoad.exe"),
        (r"\WINDOWS\SYSTEM32\WINLOAD.EFI", r"\WINDOWS\SYSTEM32\WINLOAD.EXE"),
        (r"\windows\system32\winresume.efi", r"\windows\system32\winresume.exe"),
        (r"\EFI\Microsoft\Boot\memtest.efi", r"\boot\memtest.exe"),
        ("winload.efi", "winload.exe"),
        (r"\EFI\grub\grubx64.efi", r"\EFI\grub\grubx64.efi"),
        (r"\winload.efi\folder", r"\winload.efi\folder"),
        ("", ""),
    ],
)
def test_programs_are_replaced_by_those_for_a_bios(path: str, wanted: str) -> None:
    assert bios_path(path) == wanted


def test_an_object_without_description_is_converted_and_a_foreign_program_is_told() -> None:
    bare = {"Element": (1, text(r"\EFI\grub\grubx64.efi"))}
    store = build_hive(tree({r"Objects\{a}\Elements\12000002": bare, r"Objects\{b}": {}}))
    done = convert_bcd_to_bios(store, IDENTITY)
    assert [finding.rule for finding in done.findings] == ["bcd-foreign-path"]
    assert objects(done.content)["{a}"].kind is None


def test_lists_lose_what_was_deleted_and_empty_ones_go() -> None:
    firmware, kept = "{00000000-0000-0000-0000-00000000000f}", "{00000000-0000-0000-0000-000000000001}"

    def listed(*names: str) -> tuple[int, bytes]:
        return 7, "".join(f"{name}\0" for name in [*names, ""]).encode("utf-16-le")

    elements = rf"Objects\{BOOT_MANAGER}\Elements"
    store = build_hive(
        tree(
            {
                rf"Objects\{firmware}\Description": {"Type": 0x101FFFFF},
                rf"{elements}\24000001": {"Element": listed(kept, firmware.upper())},
                rf"{elements}\24000002": {"Element": listed(firmware)},
                rf"{elements}\24000010": {"Element": listed(kept)},
            }
        )
    )
    done = convert_bcd_to_bios(store, IDENTITY)
    manager = objects(done.content)[BOOT_MANAGER].elements
    assert manager == {number: BcdElement(number, *listed(kept)) for number in ("24000001", "24000010")}
    assert firmware not in objects(done.content)


def locate(path: str) -> bytes:
    stored = text(path)
    body = struct.pack("<III", 1, 0, 0) + stored
    return bytes(16) + struct.pack("<IIII", 8, 0, 16 + len(body), 0) + body


def test_a_path_that_is_searched_for_is_replaced_in_place() -> None:
    store = build_hive(tree({r"Objects\{a}\Elements\21000001": {"Element": (3, locate(r"\Windows\winload.efi"))}}))
    done = convert_bcd_to_bios(store, IDENTITY)
    assert flat(done.content)["{a}", "21000001"] == locate(r"\Windows\winload.exe")


@pytest.mark.parametrize(
    "element",
    [
        b"",
        bytes(20),
        bytes(16) + struct.pack("<IIII", 6, 0, 0x48, 0),  # ends before the partition
        bytes(16) + struct.pack("<IIII", 6, 0, 0x20, 0) + bytes(16),  # too short to name one
        bytes(16) + struct.pack("<IIII", 6, 0, 0x48, 0) + bytes(16) + struct.pack("<II", 3, 0) + bytes(32),  # in a file
        bytes(16) + struct.pack("<IIII", 6, 0, 0x48, 0) + bytes(16) + struct.pack("<II", 0, 2) + bytes(32),  # no table
        bytes(16) + struct.pack("<IIII", 7, 0, 0x48, 0) + bytes(56),  # the hypervisor's bus
        bytes(16) + struct.pack("<IIII", 0, 0, 0x20, 0) + bytes(16),  # a file without a name
        bytes(16) + struct.pack("<IIII", 0, 0, 0xFFFFFFFF, 0) + bytes(200),
    ],
)
def test_devices_that_are_not_understood_are_kept_with_a_finding(element: bytes) -> None:
    assert devices_in(element).unknown
    store = build_hive(tree({r"Objects\{a}\Elements\11000001": {"Element": (3, element)}}))
    done = convert_bcd_to_bios(store, IDENTITY)
    assert [finding.rule for finding in done.findings] == ["bcd-unknown-device"]
    assert done.content == store


def test_nested_devices_end_at_a_depth() -> None:
    nested = b""
    for _ in range(9):
        head = struct.pack("<IIII", 0, 0, 0x28 + 12 + len(nested) + 16, 0).ljust(0x28, b"\0")
        nested = head + struct.pack("<III", 1, 12 + len(nested), 5) + nested.ljust(16, b"\0")
    found = devices_in(bytes(16) + nested + bytes(64))
    assert found.unknown
    assert not found.partitions


def test_a_hive_that_is_no_store_is_refused() -> None:
    with pytest.raises(DamagedError, match="no boot store"):
        convert_bcd_to_bios(build_hive(tree({"Something": {}})), IDENTITY)


def test_the_only_loader_is_the_default_where_none_is_named() -> None:
    loader = {r"Objects\{a}\Description": {"Type": 0x10200003}, r"Objects\{b}\Description": {"Type": 0x10200004}}
    found = BootStore(build_hive(tree(loader))).default_loader
    assert found is not None
    assert found.object_id == "{a}"
    two = {**loader, r"Objects\{c}\Description": {"Type": 0x10200003}}
    assert BootStore(build_hive(tree(two))).default_loader is None


@needs_samples
def test_flipped_stores_end_in_an_error_of_ours_or_are_converted() -> None:
    whole = windows_disk.sample("BCD-efi-locate")
    for at in range(4096, len(whole), 61):
        content = bytearray(whole)
        content[at] ^= 0xFF
        try:
            done = convert_bcd_to_bios(bytes(content), IDENTITY)
        except ConversionError:
            continue
        assert len(done.content) == len(whole)
