"""What an inspection finds on a Windows disk: each rule has a disk that breaks it."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping

import pytest

from conversion.device import Slice
from conversion.errors import DamagedError
from conversion.filesystems import ntfs
from conversion.filesystems.filesystem import Entry
from conversion.finding import Finding, Severity
from conversion.windows import inspect as inspection
from conversion.windows.bcddevice import PartitionDevice, encode_partition
from conversion.windows.hive import Hive
from conversion.windows.hivefile import HiveFile
from conversion.windows.inspect import WindowsSystem, find_esp, inspect_windows, is_windows
from conversion.windows.program import Architecture, architecture_of, version_of
from conversion.windows.volume import BASIC_DATA, ESP, LDM_DATA, MSR, RECOVERY, STORAGE_SPACES, Volume
from tests.support.gpt_disks import SparseDisk
from tests.support.hive_builder import base_block, build_hive, tree
from tests.support.windows_disk import program, software_hive

DISK, ESP_GUID, WINDOWS_GUID, OTHER_GUID = (uuid.UUID(int=number << 96) for number in (1, 2, 3, 4))
MIB = 1 << 20
LOADER = "{00000000-0000-0000-0000-000000000001}"
MANAGER = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}"

Values = dict[str, dict[str, tuple[int, bytes] | str | int]]


class Files:
    """A file system of a dictionary. ``extents`` are what is asked for of the hives."""

    def __init__(
        self,
        kind: str,
        files: Mapping[str, bytes],
        *,
        free_bytes: int | None = None,
        extents: bool = True,
        room: int = 0,
    ) -> None:
        self.kind, self.uuid, self.label, self.free_bytes = kind, "", "", free_bytes
        self.files = dict(files)
        self._extents, self._room = extents, room

    def read_file(self, path: str, *, largest_bytes: int = 16 << 20) -> bytes | None:
        found = self.files.get(path)
        if found is not None and len(found) > largest_bytes:
            raise DamagedError("too large", subject=path)
        return found

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        found = [
            Entry(name.rpartition("/")[2], "file", len(data))
            for name, data in self.files.items()
            if name.rpartition("/")[0] == path
        ]
        return tuple(found) or None

    def extents(self, path: str) -> tuple[tuple[int, int], ...] | None:
        found = self.files.get(path)
        return None if found is None or not self._extents else ((0, self._room or len(found)),)


def store(
    guid: uuid.UUID = WINDOWS_GUID, *, path: str = r"\Windows\system32\winload.efi", disk: uuid.UUID = DISK
) -> bytes:
    device = (3, encode_partition(PartitionDevice.gpt(0, disk, guid)))
    elements = rf"Objects\{LOADER}\Elements"
    return build_hive(
        tree(
            {
                rf"Objects\{MANAGER}\Elements\23000003": {"Element": LOADER},
                rf"Objects\{LOADER}\Description": {"Type": 0x10200003},
                rf"{elements}\11000001": {"Element": device},
                rf"{elements}\21000001": {"Element": device},
                rf"{elements}\12000002": {"Element": path},
            }
        )
    )


def system(more: Values | None = None) -> bytes:
    services: Values = {
        rf"ControlSet001\Services\{name}": {"Start": 0}
        for name in ("atapi", "intelide", "pciide", "storvsc", "vmbus", "storflt")
    }
    return build_hive(tree({"Select": {"Current": 1, "Default": 1}, "MountedDevices": {}, **services, **(more or {})}))


def esp_files() -> dict[str, bytes]:
    return {"/EFI/Microsoft/Boot/BCD": store()}


def windows_files() -> dict[str, bytes]:
    return {
        "/Windows/System32/config/SYSTEM": system(),
        "/Windows/System32/config/SOFTWARE": b"",
        "/Windows/System32/winload.efi": program(),
        "/Windows/System32/winload.exe": program(),
        "/Windows/Boot/PCAT/bootmgr": b"bootmgr" * 1000,
    }


def volume(number: int, kind: uuid.UUID, guid: uuid.UUID, filesystem: Files | None, head: bytes = b"") -> Volume:
    disk = SparseDisk(MIB)
    disk.write_at(0, head)
    return Volume(number, Slice(disk, 0, MIB), kind, guid, filesystem)


def volumes(esp: Files | None = None, windows: Files | None = None) -> list[Volume]:
    return [
        volume(1, ESP, ESP_GUID, esp or Files("vfat", esp_files(), free_bytes=MIB)),
        volume(2, MSR, uuid.UUID(int=7), None),
        volume(3, BASIC_DATA, WINDOWS_GUID, windows or Files("ntfs", windows_files())),
    ]


def inspect(given: list[Volume]) -> WindowsSystem:
    return inspect_windows(given, disk_guid=DISK)


def refusals(found: WindowsSystem) -> dict[str, Finding]:
    return {each.rule: each for each in found.findings if each.severity is Severity.REFUSAL}


def test_a_sound_windows_is_convertible() -> None:
    found = inspect(volumes())
    assert found.is_convertible
    assert refusals(found) == {}
    assert found.windows is not None
    assert found.esp is not None
    assert (found.windows.number, found.esp.number) == (3, 1)
    assert found.architecture is Architecture.X64
    assert found.version.build == "10.0.19041.1"  # of the loader: there is no SOFTWARE hive to read
    assert found.letterless == {ESP_GUID}
    assert found.system_hive is not None
    assert not found.is_hive_dirty
    assert all(state.starts_at_boot for state in found.drivers)
    assert [each.rule for each in found.findings] == ["secure-state-lost"]


def test_the_version_is_read_from_the_pages_of_the_software_hive_that_it_is_on() -> None:
    disk = SparseDisk(16 * MIB)
    content = software_hive().ljust(6 * MIB, b"\0")
    disk.write_at(MIB, content[:5000])
    disk.write_at(3 * MIB, content[5000 : 4 * MIB + 5000])
    file = HiveFile(disk, [(MIB, 5000), (3 * MIB, len(content) - 5000)])
    assert len(file) == len(content)
    assert file[4990:5010] == content[4990:5010]
    assert file[-3:] == content[-3:]
    assert file[7:7] == b""
    key = Hive(file).key(r"microsoft\windows nt\currentversion")
    assert key is not None
    assert key.text("ProductName") == "Windows Server 2019 Standard"


REFUSED: dict[str, tuple[Files | None, Files | None]] = {
    "no-boot-store": (Files("vfat", {"/EFI/BOOT/BOOTX64.EFI": b""}), None),
    "boot-store-damaged": (Files("vfat", {"/EFI/Microsoft/Boot/BCD": b"regf" * 2000}), None),
    "esp-not-fat": (Files("ntfs", esp_files()), None),
    "esp-full": (Files("vfat", esp_files(), free_bytes=40 << 10), None),
    "boot-store-unresolved": (Files("vfat", {"/EFI/Microsoft/Boot/BCD": store(OTHER_GUID)}), None),
    "foreign-loader": (Files("vfat", {"/EFI/Microsoft/Boot/BCD": store(path=r"\EFI\grub\grubx64.efi")}), None),
    "missing-bootmgr": (None, Files("ntfs", {k: v for k, v in windows_files().items() if "PCAT" not in k})),
    "missing-winload": (None, Files("ntfs", {k: v for k, v in windows_files().items() if not k.endswith(".exe")})),
    "arm64": (None, Files("ntfs", windows_files() | {"/Windows/System32/winload.efi": program(0xAA64)})),
    "no-windows": (None, Files("ntfs", {"/pagefile.sys": b""})),
    "hive-damaged": (None, Files("ntfs", windows_files() | {"/Windows/System32/config/SYSTEM": b"\0" * 8192})),
    "hive-not-in-place": (None, Files("ntfs", windows_files(), extents=False)),
    "hive-grown": (None, Files("ntfs", windows_files(), room=4096)),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_each_rule_refuses_with_evidence_and_a_remedy(rule: str) -> None:
    found = inspect(volumes(*REFUSED[rule]))
    assert list(refusals(found)) == [rule]
    assert not found.is_convertible
    finding = refusals(found)[rule]
    assert finding.message.endswith(".")
    assert finding.evidence
    assert finding.remedy
    assert finding.subject


def test_a_dirty_hive_without_logs_is_refused_and_told_what_to_do() -> None:
    content = bytearray(system())
    content[:4096] = base_block((2, 1), len(content) - 4096)
    found = inspect(volumes(None, Files("ntfs", windows_files() | {"/Windows/System32/config/SYSTEM": bytes(content)})))
    assert list(refusals(found)) == ["hive-damaged"]
    assert "application-consistent" in refusals(found)["hive-damaged"].remedy


@pytest.mark.parametrize(
    ("rule", "kind", "head"),
    [
        ("dynamic-disk", LDM_DATA, b""),
        ("storage-space", STORAGE_SPACES, b""),
        ("bitlocker", BASIC_DATA, b"\xeb\x58\x90-FVE-FS-"),
    ],
)
def test_partitions_of_a_kind_that_cannot_follow_are_refused(rule: str, kind: uuid.UUID, head: bytes) -> None:
    given = [*volumes(), volume(4, kind, OTHER_GUID, None, head)]
    assert list(refusals(inspect(given))) == [rule]
    assert refusals(inspect(given))[rule].subject == "partition 4"


def test_an_encrypted_windows_is_known_for_windows_and_for_encrypted() -> None:
    given = [
        volume(1, ESP, ESP_GUID, Files("vfat", {})),
        volume(2, BASIC_DATA, WINDOWS_GUID, None, b"\xeb\x58\x90-FVE-FS-"),
    ]
    assert is_windows(given)
    assert {"bitlocker", "no-windows"} <= set(refusals(inspect(given)))


def test_a_disk_without_esp_is_refused_and_one_with_two_gives_that_with_the_store() -> None:
    assert "no-esp" in refusals(inspect(volumes()[1:]))
    other = volume(9, ESP, OTHER_GUID, Files("vfat", {"/EFI/debian/grubx64.efi": b""}))
    chosen = find_esp([other, *volumes()])
    assert chosen is not None
    assert chosen.number == 1
    assert find_esp([other]) is other


@pytest.mark.parametrize("discard", [False, True])
def test_a_hibernated_windows_is_refused_unless_its_state_is_to_be_discarded(
    discard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The volume itself is told hibernated by NTFS's own tests; here it is what follows from it.
    monkeypatch.setattr(inspection, "NtfsFileSystem", Files)
    monkeypatch.setattr(inspection, "is_hibernated", lambda filesystem: filesystem.kind == "ntfs")
    found = inspect_windows(volumes(), disk_guid=DISK, discard_hibernation=discard)
    assert found.is_hibernated
    assert found.is_convertible == discard
    assert next(each for each in found.findings if each.rule == "hibernated").remedy
    assert ntfs.is_hibernated is not inspection.is_hibernated


def test_of_several_windows_the_started_one_is_taken() -> None:
    other = volume(4, BASIC_DATA, OTHER_GUID, Files("ntfs", windows_files()))
    given = [other, *volumes()]
    found = inspect(given)
    assert found.windows is not None
    assert found.windows.number == 3
    assert "several-windows" in [each.rule for each in found.findings]
    assert found.is_convertible


def test_drivers_that_are_off_or_missing_are_told() -> None:
    more: Values = {
        r"ControlSet001\Services\storvsc\StartOverride": {"0": 3},
        r"ControlSet001\Services\atapi": {"Start": 3},
    }
    hive = build_hive(tree({"Select": {"Current": 1}, r"ControlSet001\Services\storvsc": {"Start": 0}, **more}))
    found = inspect(volumes(None, Files("ntfs", windows_files() | {"/Windows/System32/config/SYSTEM": hive})))
    told = {(each.rule, each.severity) for each in found.findings if each.rule.startswith("driver")}
    assert told == {("driver-off", Severity.NOTE), ("driver-missing", Severity.WARNING)}
    assert sum(each.rule == "driver-off" for each in found.findings) == 2
    assert found.is_convertible


def test_what_generation_1_lacks_is_a_warning_where_it_is_in_use() -> None:
    more: Values = {
        r"ControlSet001\Control\SecureBoot\State": {"UEFISecureBootEnabled": 1},
        r"ControlSet001\Control\Lsa": {"LsaCfgFlags": 2},
    }
    found = inspect(volumes(None, Files("ntfs", windows_files() | {"/Windows/System32/config/SYSTEM": system(more)})))
    finding = next(each for each in found.findings if each.rule == "secure-state-lost")
    assert finding.severity is Severity.WARNING
    assert "Credential Guard" in finding.evidence
    assert "Secure Boot" in finding.evidence


class Damaged(Files):
    """A file system whose folders cannot be read."""

    def list_folder(self, path: str) -> tuple[Entry, ...] | None:
        raise DamagedError("the folder is damaged", subject=path)


def test_a_damaged_file_system_is_a_finding_and_no_error() -> None:
    found = inspect(volumes(None, Damaged("ntfs", windows_files())))
    assert list(refusals(found)) == ["no-windows"]
    told = next(each for each in found.findings if each.rule == "file-system-damaged")
    assert (told.subject, told.severity) == ("partition 3", Severity.WARNING)
    assert "the folder is damaged" in told.evidence
    assert list(refusals(inspect(volumes(Damaged("vfat", esp_files()))))) == ["file-system-damaged"]


def test_a_linux_disk_is_no_windows() -> None:
    assert not is_windows([volume(1, ESP, ESP_GUID, Files("vfat", {"/EFI/debian/grubx64.efi": b""}))])
    assert is_windows(volumes())
    assert is_windows([volume(1, RECOVERY, OTHER_GUID, None), volume(2, MSR, uuid.UUID(int=7), None)])


@pytest.mark.parametrize("content", [b"", b"MZ", b"MZ".ljust(64, b"\xff"), b"\0" * 200, program()[:66]])
def test_what_is_no_program_has_no_architecture(content: bytes) -> None:
    assert architecture_of(content) is Architecture.UNKNOWN
    assert version_of(content) == ""


def test_programs_tell_their_machine_and_version() -> None:
    assert [architecture_of(program(machine)) for machine in (0x8664, 0x14C, 0xAA64, 1)] == [
        Architecture.X64,
        Architecture.X86,
        Architecture.ARM64,
        Architecture.UNKNOWN,
    ]
    assert version_of(program(build=22621)) == "10.0.22621.1"
    assert version_of(struct.pack("<I", 0xFEEF04BD)) == ""
