r"""What Windows is on a disk, and whether it can start from a BIOS: partitions, boot files, store, hive, drivers.

Every finding bears a rule, what was read, and what an administrator can do. Only refusals keep the disk from being
converted; the verdict is the same at every cycle in which the disk did not change.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from conversion.errors import ConversionError, DamagedError
from conversion.filesystems.filesystem import FileSystem
from conversion.filesystems.ntfs import NtfsFileSystem, is_bitlocker, is_hibernated
from conversion.finding import Finding, Severity
from conversion.windows.bcd import DEVICE, OS_DEVICE, PATH, BootStore, bios_path
from conversion.windows.bcddevice import devices_in
from conversion.windows.guest import (
    BOOT_MANAGER_BIOS,
    BOOT_STORE_UEFI,
    HIBERNATION_FILE,
    LOADER_BIOS,
    LOADER_UEFI,
    SOFTWARE_HIVE,
    SYSTEM_HIVE,
)
from conversion.windows.hive import Hive
from conversion.windows.hivefile import HiveFile, read_recovered
from conversion.windows.hivelog import Recovery
from conversion.windows.program import Architecture, architecture_of, version_of
from conversion.windows.system import DriverState, control_sets, driver_states
from conversion.windows.volume import ESP, LDM_DATA, LDM_METADATA, MSR, RECOVERY, STORAGE_SPACES, Volume

_ROOM_BEYOND_BYTES: Final = 64 << 10  # on the ESP, for folders and rounding
_LARGEST_PROGRAM_BYTES: Final = 32 << 20
_CURRENT_VERSION: Final = r"Microsoft\Windows NT\CurrentVersion"


@dataclass(frozen=True, slots=True)
class WindowsVersion:
    """What the SOFTWARE hive says; the build alone where it cannot be read. Empty where unknown."""

    product: str
    build: str
    edition: str

    def __str__(self) -> str:
        """Render as a person reads it."""
        return f"{self.product or 'Windows'} (build {self.build or 'unknown'})"


@dataclass(frozen=True, slots=True)
class WindowsSystem:
    """An installed Windows as inspected. ``windows`` and ``esp`` are None where there is none that can be read."""

    windows: Volume | None
    esp: Volume | None
    version: WindowsVersion
    architecture: Architecture
    is_hive_dirty: bool
    is_hibernated: bool
    drivers: tuple[DriverState, ...]
    letterless: frozenset[uuid.UUID]  # partitions that Windows gives no letter
    findings: tuple[Finding, ...]
    system_hive: Recovery | None = field(default=None, repr=False, compare=False)  # as read, its logs applied

    @property
    def is_convertible(self) -> bool:
        """Whether no rule refuses it."""
        return all(finding.severity is not Severity.REFUSAL for finding in self.findings)


def is_windows(volumes: Sequence[Volume]) -> bool:
    """Return whether a disk's system is Windows: its partitions, its boot store or its hive say so."""
    return any(
        volume.type_guid in {MSR, LDM_METADATA, LDM_DATA, STORAGE_SPACES}
        or is_bitlocker(volume.device)
        or volume.has(BOOT_STORE_UEFI)
        or volume.has(SYSTEM_HIVE)
        for volume in volumes
    )


def inspect_windows(
    volumes: Sequence[Volume], *, disk_guid: uuid.UUID, discard_hibernation: bool = False
) -> WindowsSystem:
    """Return what Windows the partitions of one disk hold, with every finding. Raises no ConversionError.

    ``discard_hibernation``: a hibernated Windows is not refused, only warned of.
    """
    return _Inspection(volumes, disk_guid, discard_hibernation).run()


def find_esp(volumes: Sequence[Volume]) -> Volume | None:
    """Return the EFI system partition with Windows' boot store; any that can be read where none has one."""
    candidates = [each for each in volumes if each.type_guid == ESP and each.filesystem is not None]
    return next((each for each in candidates if each.has(BOOT_STORE_UEFI)), candidates[0] if candidates else None)


class _Inspection:
    """One pass over a disk's partitions, with the findings so far."""

    def __init__(self, volumes: Sequence[Volume], disk_guid: uuid.UUID, discard_hibernation: bool) -> None:
        self._volumes = volumes
        self._disk_guid = disk_guid
        self._discard_hibernation = discard_hibernation
        self._findings: list[Finding] = []

    def run(self) -> WindowsSystem:
        self._check_partitions()
        esp = find_esp(self._volumes)
        store = self._read_store(esp)
        windows = self._find_windows(store)
        version, architecture = WindowsVersion("", "", ""), Architecture.UNKNOWN
        recovery, is_hibernated, drivers = None, False, tuple[DriverState, ...]()
        if windows is not None and windows.filesystem is not None:
            architecture = self._check_programs(windows, windows.filesystem)
            version = self._read_version(windows, windows.filesystem)
            recovery = self._read_system(windows, windows.filesystem)
            drivers = self._read_drivers(windows, recovery)
            is_hibernated = self._check_hibernation(windows, windows.filesystem)
            if store is not None and esp is not None:
                self._check_store(esp, windows, store)
        self._check_esp(esp, windows)
        return WindowsSystem(
            windows=windows,
            esp=esp,
            version=version,
            architecture=architecture,
            is_hive_dirty=recovery is not None and recovery.was_dirty,
            is_hibernated=is_hibernated,
            drivers=drivers,
            letterless=frozenset(each.partition_guid for each in self._volumes if each.type_guid in {ESP, RECOVERY}),
            findings=tuple(self._findings),
            system_hive=recovery,
        )

    def _add(self, rule: str, severity: Severity, subject: str, message: str, evidence: str, remedy: str = "") -> None:
        self._findings.append(Finding(rule, severity, subject, message, evidence, remedy))

    def _refuse(self, rule: str, subject: str, message: str, evidence: str, remedy: str) -> None:
        self._add(rule, Severity.REFUSAL, subject, message, evidence, remedy)

    # Partitions

    def _check_partitions(self) -> None:
        for volume in self._volumes:
            if volume.type_guid in {LDM_METADATA, LDM_DATA}:
                message = "The disk is dynamic: its volumes are not the partitions of its table."
                remedy = "convert it to a basic disk, or move the volumes to one"
                self._refuse("dynamic-disk", volume.title, message, f"partition type {volume.type_guid}", remedy)
            elif volume.type_guid == STORAGE_SPACES:
                message = "The partition belongs to a storage pool."
                remedy = "move Windows to a basic partition outside Storage Spaces"
                self._refuse("storage-space", volume.title, message, f"partition type {volume.type_guid}", remedy)
            elif is_bitlocker(volume.device):
                message = "The volume is encrypted by BitLocker, whose keys are bound to the UEFI start."
                remedy = "decrypt it (manage-bde -off) and wait until that is done; suspending is not enough"
                self._refuse(
                    "bitlocker", volume.title, message, "BitLocker's mark in the volume's first sector", remedy
                )

            elif volume.filesystem is not None:
                self._check_root(volume, volume.filesystem)

    def _check_root(self, volume: Volume, filesystem: FileSystem) -> None:
        try:
            filesystem.list_folder("/")
        except ConversionError as error:
            message = "The file system is damaged, and what it holds is not looked at."
            remedy = "run chkdsk on the volume in the guest"
            severity = Severity.REFUSAL if volume.type_guid == ESP else Severity.WARNING
            self._add("file-system-damaged", severity, volume.title, message, str(error), remedy)

    def _find_windows(self, store: BootStore | None) -> Volume | None:
        """Return the volume that holds Windows; where several do, the one that the boot store starts."""
        found = [each for each in self._volumes if each.has(SYSTEM_HIVE)]
        if not found:
            message = "No volume that can be read holds a Windows."
            remedy = "check that the disk holds the system, and that no refusal above explains it"
            self._refuse("no-windows", "the disk", message, f"no {SYSTEM_HIVE} on any partition", remedy)
            return None
        started = self._started_partition(store)
        chosen = next((each for each in found if each.partition_guid == started), found[0])
        if len(found) > 1:
            names = ", ".join(each.title for each in found)
            message = f"Several volumes hold a Windows; {chosen.title} is the one that starts."
            self._add("several-windows", Severity.NOTE, "the disk", message, f"{SYSTEM_HIVE} on {names}")
        return chosen

    def _started_partition(self, store: BootStore | None) -> uuid.UUID | None:
        loader = store.default_loader if store else None
        element = loader.elements.get(OS_DEVICE) if loader else None
        for device in devices_in(element.data).partitions if element else ():
            if device.is_gpt and device.disk_guid == self._disk_guid:
                return device.partition_guid
        return None

    # The EFI system partition

    def _read_store(self, esp: Volume | None) -> BootStore | None:
        if esp is None or esp.filesystem is None:
            message = "The disk has no EFI system partition that can be read."
            self._refuse("no-esp", "the disk", message, "no readable partition of the ESP type", "repair the partition")
            return None
        try:
            recovery = read_recovered(esp.filesystem, BOOT_STORE_UEFI)
            if recovery is not None:
                return BootStore(recovery.content, subject=f"{esp.title} {BOOT_STORE_UEFI}")
        except ConversionError as error:
            remedy = error.hint or "rebuild it with bcdboot"
            self._refuse("boot-store-damaged", esp.title, "The boot store cannot be read.", str(error), remedy)
            return None
        message = "The EFI system partition holds no boot store of Windows."
        self._refuse("no-boot-store", esp.title, message, f"no {BOOT_STORE_UEFI}", "rebuild it with bcdboot")
        return None

    def _check_store(self, esp: Volume, windows: Volume, store: BootStore) -> None:
        loader = store.default_loader
        remedy = "rebuild the store with bcdboot, or set the default entry with bcdedit"
        if loader is None:
            message = "The boot store does not say which Windows starts."
            self._refuse("boot-store-unresolved", esp.title, message, f"{BOOT_STORE_UEFI} has no default entry", remedy)
            return
        for number in (DEVICE, OS_DEVICE):
            element = loader.elements.get(number)
            named = devices_in(element.data).partitions if element else ()
            if any(not each.is_gpt or each.partition_guid != windows.partition_guid for each in named):
                message = f"The default boot entry does not start the Windows on {windows.title}."
                evidence = f"{loader.object_id} element {number} names {', '.join(map(str, named))}"
                self._refuse("boot-store-unresolved", esp.title, message, evidence, remedy)
                return
        path = loader.text(PATH)
        if bios_path(path) == path and not path.lower().endswith(".exe"):
            message = "The default boot entry starts a program that has no counterpart for a BIOS."
            self._refuse("foreign-loader", esp.title, message, f"{loader.object_id} starts {path!r}", remedy)

    def _check_esp(self, esp: Volume | None, windows: Volume | None) -> None:
        if esp is None or esp.filesystem is None or windows is None or windows.filesystem is None:
            return
        if esp.filesystem.kind != "vfat":
            message = "The EFI system partition is not FAT, as UEFI wants it."
            self._refuse("esp-not-fat", esp.title, message, f"its file system is {esp.filesystem.kind}", "repair it")
            return
        free = getattr(esp.filesystem, "free_bytes", None)
        needed = _ROOM_BEYOND_BYTES + sum(
            size or 0 for size in (windows.size_of(BOOT_MANAGER_BIOS), esp.size_of(BOOT_STORE_UEFI))
        )
        if isinstance(free, int) and free < needed:
            message = "The EFI system partition has no room for the BIOS boot manager and its store."
            remedy = "delete what does not belong there, such as old firmware updates"
            self._refuse("esp-full", esp.title, message, f"{free} bytes are free, {needed} are needed", remedy)

    # The Windows volume

    def _check_programs(self, windows: Volume, filesystem: FileSystem) -> Architecture:
        for rule, path in (("missing-bootmgr", BOOT_MANAGER_BIOS), ("missing-winload", LOADER_BIOS)):
            if not windows.has(path):
                message = "A file is missing that a start from a BIOS needs."
                remedy = "restore it with sfc /scannow, or DISM /Online /Cleanup-Image /RestoreHealth"
                self._refuse(rule, windows.title, message, f"no {path}", remedy)
        architecture = Architecture.UNKNOWN
        for path in (LOADER_UEFI, LOADER_BIOS):
            program = self._read_quietly(filesystem, path)
            if architecture is Architecture.UNKNOWN and program:
                architecture = architecture_of(program)
        if architecture is Architecture.ARM64:
            message = "This Windows is made for ARM64, which has no Generation 1."
            self._refuse(
                "arm64", windows.title, message, f"{LOADER_UEFI} is made for ARM64", "recover it as Generation 2"
            )
        return architecture

    def _read_quietly(self, filesystem: FileSystem, path: str) -> bytes | None:
        try:
            return filesystem.read_file(path, largest_bytes=_LARGEST_PROGRAM_BYTES)
        except ConversionError:
            return None

    def _read_version(self, windows: Volume, filesystem: FileSystem) -> WindowsVersion:
        try:
            key = None
            extents = filesystem.extents(SOFTWARE_HIVE)
            if extents:
                key = Hive(HiveFile(windows.device, extents), subject=SOFTWARE_HIVE).key(_CURRENT_VERSION)
            if key is not None:
                build = key.text("CurrentBuild") or key.text("CurrentBuildNumber")
                return WindowsVersion(key.text("ProductName"), build, key.text("EditionID"))
        except (ConversionError, ValueError):
            pass  # dirty, as it mostly is, it may contradict itself; its version is only shown
        program = self._read_quietly(filesystem, LOADER_UEFI) or self._read_quietly(filesystem, LOADER_BIOS) or b""
        return WindowsVersion("", version_of(program), "")

    def _read_system(self, windows: Volume, filesystem: FileSystem) -> Recovery | None:
        subject = f"{windows.title} {SYSTEM_HIVE}"
        try:
            recovery = read_recovered(filesystem, SYSTEM_HIVE)
            if recovery is None:
                raise DamagedError("it is listed, but cannot be read", subject=SYSTEM_HIVE)
            control_sets(Hive(recovery.content, subject=SYSTEM_HIVE))
        except ConversionError as error:
            remedy = error.hint or "restore the hive, or convert a recovery point at which Windows was well"
            self._refuse("hive-damaged", subject, "The SYSTEM hive cannot be read.", str(error), remedy)
            return None
        size = sum(length for _, length in filesystem.extents(SYSTEM_HIVE) or ())
        if not size:
            message = "The SYSTEM hive cannot be written where it lies."
            remedy = "if it is compressed or encrypted, undo that (compact /u, cipher /d)"
            self._refuse("hive-not-in-place", subject, message, "its file has no clusters of its own", remedy)
        elif len(recovery.content) > size:
            message = "The SYSTEM hive has grown in its logs beyond its file."
            remedy = "take an application-consistent point, or shut Windows down cleanly"
            evidence = f"the file has {size} bytes, the recovered hive {len(recovery.content)}"
            self._refuse("hive-grown", subject, message, evidence, remedy)
        if recovery.was_dirty:
            message = "The SYSTEM hive was copied in the middle of a write, and its logs complete it."
            self._add("hive-dirty", Severity.NOTE, subject, message, f"{recovery.entries} log entries apply")
        return recovery

    def _read_drivers(self, windows: Volume, recovery: Recovery | None) -> tuple[DriverState, ...]:
        if recovery is None:
            return ()
        hive = Hive(recovery.content, subject=SYSTEM_HIVE)
        try:
            drivers = driver_states(hive)
            self._check_security(windows, hive)
        except ConversionError as error:
            remedy = "restore the hive, or convert a recovery point at which Windows was well"
            self._refuse("hive-damaged", windows.title, "The SYSTEM hive cannot be read.", str(error), remedy)
            return ()
        for state in drivers:
            if state.start is None:
                message = f"The driver {state.name} is not installed."
                evidence = rf"no {state.control_set}\Services\{state.name}"
                remedy = "check in a test failover that the machine starts"
                self._add("driver-missing", Severity.WARNING, windows.title, message, evidence, remedy)
            elif not state.starts_at_boot:
                message = f"The driver {state.name} does not start with Windows; the conversion sees to it."
                evidence = f"Start is {state.start}, StartOverride {state.override}, in {state.control_set}"
                self._add("driver-off", Severity.NOTE, windows.title, message, evidence)
        return drivers

    def _check_security(self, windows: Volume, hive: Hive) -> None:
        """Warn of what exists in Generation 2 alone; whether a virtual TPM is there, the disk does not tell."""
        current = control_sets(hive)[0]
        read = {
            "Secure Boot": (rf"{current}\Control\SecureBoot\State", "UEFISecureBootEnabled"),
            "virtualization-based security": (rf"{current}\Control\DeviceGuard", "EnableVirtualizationBasedSecurity"),
            "Credential Guard": (rf"{current}\Control\Lsa", "LsaCfgFlags"),
        }
        evidence: list[str] = []
        for title, (path, name) in read.items():
            key = hive.key(path)
            number = key.number(name) if key else None
            if number:
                evidence.append(f"{title}: {path}\\{name} is {number}")
        message = "Generation 1 has no Secure Boot, virtual TPM or Credential Guard; what they keep is lost there."
        remedy = "have recovery keys and passwords at hand for what a TPM or Credential Guard protects"
        severity = Severity.WARNING if evidence else Severity.NOTE
        self._add(
            "secure-state-lost", severity, windows.title, message, "; ".join(evidence) or "none is switched on", remedy
        )

    def _check_hibernation(self, windows: Volume, filesystem: FileSystem) -> bool:
        try:
            if not isinstance(filesystem, NtfsFileSystem) or not is_hibernated(filesystem):
                return False
        except ConversionError as error:
            message = "Whether Windows is hibernated cannot be read."
            self._refuse("hibernated", windows.title, message, str(error), "shut Windows down (shutdown /s /f /t 0)")
            return False
        severity = Severity.WARNING if self._discard_hibernation else Severity.REFUSAL
        message = "Windows is hibernated (or was shut down by Fast Startup): its volume is not as it will be on waking."
        if self._discard_hibernation:
            message = "Windows is hibernated; its sleeping state is discarded, and what was not saved in it is lost."
        remedy = "switch Fast Startup off (powercfg /h off) and shut Windows down, or have the hibernation discarded"
        self._add(
            "hibernated", severity, windows.title, message, f"{HIBERNATION_FILE} holds an image to resume", remedy
        )
        return True
