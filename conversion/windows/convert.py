r"""A Windows disk made to start from a BIOS, and back: files on the EFI system partition, and the SYSTEM hive in place.

Out: ``\bootmgr`` and what it shows, from the guest's own ``\Windows\Boot\PCAT``; ``\Boot\BCD``, made from the store of
UEFI, which stays as it is; the SYSTEM hive, overwritten where it lies. Back: the files that still are as they were
written are removed, the hive's records are mapped again, and the fallback loader is seen to, since the firmware's boot
entries are gone.

The logs beside the SYSTEM hive are not touched. Windows reads them only for a hive whose two sequence numbers differ,
and then takes no entry below these; the hive is written clean, numbered above every entry in them.

Writes go through the volumes' devices, which lie over an overlay: nothing here is undone when it fails half way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from conversion.device import Slice
from conversion.errors import ConversionError, DamagedError, NoSpaceError, RefusedError
from conversion.filesystems.fat import FatFileSystem
from conversion.filesystems.filesystem import FileSystem
from conversion.finding import Finding, Severity
from conversion.identity import DiskIdentity
from conversion.overlay import Overlay
from conversion.windows.bcd import BOOT_MANAGER as BOOT_MANAGER_OBJECT
from conversion.windows.bcd import BcdChange, BootStore, convert_bcd_to_bios
from conversion.windows.guest import (
    BOOT_FOLDER,
    BOOT_MANAGER,
    BOOT_MANAGER_BIOS,
    BOOT_MANAGER_UEFI,
    BOOT_STORE,
    BOOT_STORE_UEFI,
    DRIVERS_FOLDER,
    FALLBACK_UEFI,
    FONTS,
    HIBERNATION_FILE,
    LANGUAGES_BIOS,
    MEMORY_TEST_BIOS,
    SYSTEM_HIVE,
)
from conversion.windows.hivefile import read_recovered
from conversion.windows.hivelog import Recovery
from conversion.windows.system import HiveConversion, HiveEdit, convert_system_to_bios, convert_system_to_uefi
from conversion.windows.volume import Volume

LARGEST_EXTRAS_BYTES: Final = 2 << 20
ROOM_LEFT_BYTES: Final = 1 << 20  # on the ESP, beside what the start itself needs
_LARGEST_MANAGER_BYTES: Final = 8 << 20  # 400 KiB to 1.5 MiB as of now
_EXTRA_FONTS: Final = ("wgl4_boot.ttf", "segmono_boot.ttf", "segoe_slboot.ttf")  # not those of East Asia, 3 MiB each
_LOCALE: Final = "12000005"
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class AddedFile:
    """A file written to the EFI system partition. ``replaced``: one of that name stood there."""

    path: str
    size: int
    sha256: str
    replaced: bool

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"path": self.path, "size": self.size, "sha256": self.sha256, "replaced": self.replaced}


@dataclass(frozen=True, slots=True)
class EspConversion:
    """What was done to the EFI system partition. ``folders`` were made, the outer ones first."""

    files: tuple[AddedFile, ...]
    folders: tuple[str, ...]
    changes: tuple[BcdChange, ...] = ()  # of the boot store, for a person; not needed on the way back
    findings: tuple[Finding, ...] = ()

    def document(self) -> dict[str, object]:
        """Return the JSON form of what the way back needs."""
        return {"files": [each.document() for each in self.files], "folders": list(self.folders)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> EspConversion:
        """Read the JSON form. Raises DamagedError where it is none."""
        try:
            files = tuple(
                AddedFile(str(each["path"]), int(each["size"]), str(each["sha256"]), bool(each["replaced"]))
                for each in document["files"]
            )
            return cls(files, tuple(str(each) for each in document["folders"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"the list of files on the EFI system partition is damaged: {error!r}") from error


@dataclass(frozen=True, slots=True)
class SystemConversion:
    """What was done to the SYSTEM hive."""

    edits: tuple[HiveEdit, ...]
    findings: tuple[Finding, ...] = ()

    def document(self) -> dict[str, object]:
        """Return the JSON form of what the way back needs."""
        return {"edits": [each.document() for each in self.edits]}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> SystemConversion:
        """Read the JSON form. Raises DamagedError where it is none."""
        listed = document.get("edits")
        if not isinstance(listed, list):
            raise DamagedError("the list of registry edits is damaged: it is missing")
        return cls(tuple(HiveEdit.from_document(each) for each in listed))


@dataclass(frozen=True, slots=True)
class WindowsConversion:
    """A whole conversion of a Windows disk."""

    esp: EspConversion
    system: SystemConversion

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What a person should know of it."""
        return self.esp.findings + self.system.findings

    def document(self) -> dict[str, object]:
        """Return the JSON form of what the way back needs."""
        return {"esp": self.esp.document(), "system": self.system.document()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> WindowsConversion:
        """Read the JSON form. Raises DamagedError where it is none."""
        esp, system = document.get("esp"), document.get("system")
        if not isinstance(esp, Mapping) or not isinstance(system, Mapping):
            raise DamagedError("the record of a Windows conversion is damaged")
        return cls(EspConversion.from_document(esp), SystemConversion.from_document(system))


def convert_windows(
    esp: Volume,
    windows: Volume,
    identity: DiskIdentity,
    *,
    overlay: Overlay | None = None,
    letterless: Collection[UUID] = (),
    system_hive: Recovery | None = None,
    discard_hibernation: bool = False,
) -> WindowsConversion:
    """Write what a start from a BIOS needs; both volumes lie on ``overlay``, which is told the reasons.

    The system was inspected and found convertible; ``letterless`` and
    ``system_hive`` are what the inspection found; the hive saves reading it again.
    Raises RefusedError, NoSpaceError, DamagedError.
    """
    done = WindowsConversion(
        convert_esp(esp, windows, identity, overlay=overlay),
        convert_system(windows, identity, overlay=overlay, letterless=letterless, recovery=system_hive),
    )
    if discard_hibernation:
        forget_hibernation(windows, overlay=overlay)
    return done


def restore_windows(
    done: WindowsConversion, esp: Volume, windows: Volume, identity: DiskIdentity, *, overlay: Overlay | None = None
) -> WindowsConversion:
    """Take a conversion back on a disk on which Windows ran since; ``identity`` is of the tables as they are now.

    Returns what was done: the edits of the hive, the fallback loader where it had to be made. Raises RefusedError,
    NoSpaceError, DamagedError.
    """
    return WindowsConversion(
        restore_esp(done.esp, esp, overlay=overlay), restore_system(done.system, windows, identity, overlay=overlay)
    )


# The EFI system partition


def convert_esp(
    esp: Volume, windows: Volume, identity: DiskIdentity, *, overlay: Overlay | None = None
) -> EspConversion:
    """Write the boot manager for a BIOS, its store, and as much of what it shows as there is room for."""
    fat, guest = _fat(esp), _readable(windows)
    manager = guest.read_file(BOOT_MANAGER_BIOS, largest_bytes=_LARGEST_MANAGER_BYTES)
    recovery = read_recovered(fat, BOOT_STORE_UEFI)
    if not manager or recovery is None:
        missing = BOOT_STORE_UEFI if manager else BOOT_MANAGER_BIOS
        raise RefusedError(f"no {missing}", subject=esp.title if manager else windows.title)
    store = convert_bcd_to_bios(recovery.content, identity, subject=f"{esp.title} {BOOT_STORE}")
    writer = _EspWriter(fat, esp.title, overlay)
    writer.write(BOOT_MANAGER, manager, "the boot manager for a BIOS, the guest's own")
    writer.write(BOOT_STORE, store.content, "the boot store for a BIOS, made from the one for UEFI")
    left_bytes = LARGEST_EXTRAS_BYTES
    findings = list(store.findings)
    for path, data, why in _extras(guest, _locale(recovery.content)):
        free = fat.free_bytes
        if len(data) > left_bytes or (free is not None and free < len(data) + ROOM_LEFT_BYTES):
            findings.append(_no_room_for_extra(esp, path, len(data)))
            continue
        try:
            writer.write(path, data, why)
        except NoSpaceError:
            findings.append(_no_room_for_extra(esp, path, len(data)))
            continue
        left_bytes -= len(data)
    return EspConversion(tuple(writer.files), tuple(writer.folders), store.changes, tuple(findings))


def restore_esp(done: EspConversion, esp: Volume, *, overlay: Overlay | None = None) -> EspConversion:
    """Remove the files that still are as they were written, and see to the fallback loader."""
    fat = _fat(esp)
    findings: list[Finding] = []
    for added in done.files:
        content = fat.read_file(added.path, largest_bytes=LARGEST_EXTRAS_BYTES + _LARGEST_MANAGER_BYTES)
        if content is None:
            continue
        if hashlib.sha256(content).hexdigest() != added.sha256 or added.replaced:
            evidence = "it stood there before the conversion" if added.replaced else "its content is another by now"
            findings.append(_file_left(esp, added.path, evidence))
            continue
        with _because(overlay, f"{added.path} on {esp.title}", "removed: a start from UEFI has no use for it"):
            fat.remove_file(added.path)
    for folder in reversed(done.folders):
        if fat.list_folder(folder) == ():
            with _because(overlay, f"{folder} on {esp.title}", "removed: the conversion made it, and it is empty"):
                fat.remove_folder(folder)
    writer = _EspWriter(fat, esp.title, overlay)
    if fat.read_file(FALLBACK_UEFI, largest_bytes=_LARGEST_MANAGER_BYTES) is None:
        manager = fat.read_file(BOOT_MANAGER_UEFI, largest_bytes=_LARGEST_MANAGER_BYTES)
        if not manager:
            raise RefusedError(
                f"neither {FALLBACK_UEFI} nor {BOOT_MANAGER_UEFI} is there to start from UEFI",
                subject=esp.title,
                hint="rebuild the partition with bcdboot in the guest, then convert back",
            )
        writer.write(FALLBACK_UEFI, manager, "what UEFI starts while its boot entries are missing")
    return EspConversion(tuple(writer.files), tuple(writer.folders), (), tuple(findings))


class _EspWriter:
    """Writes files to the EFI system partition and remembers them, with the folders made for them."""

    def __init__(self, fat: FatFileSystem, title: str, overlay: Overlay | None) -> None:
        self._fat = fat
        self._title = title
        self._overlay = overlay
        self.files: list[AddedFile] = []
        self.folders: list[str] = []

    def write(self, path: str, data: bytes, why: str) -> None:
        """Write a file, unless it stands there already as it should."""
        before = self._fat.extents(path)
        if before is not None and self._fat.read_file(path, largest_bytes=1 << 30) == data:
            return
        with _because(self._overlay, f"{path} on {self._title}", why):
            self._make_folders(path)
            self._fat.create_file(path, data, overwrite=True)
        self.files.append(AddedFile(path, len(data), hashlib.sha256(data).hexdigest(), before is not None))

    def _make_folders(self, path: str) -> None:
        parts = path.split("/")[1:-1]
        for depth in range(len(parts)):
            folder = "/" + "/".join(parts[: depth + 1])
            if self._fat.list_folder(folder) is None:
                self._fat.make_folder(folder)
                self.folders.append(folder)


def _extras(guest: FileSystem, locale: str) -> Iterator[tuple[str, bytes, str]]:
    """Yield what the boot manager shows its menu with, as far as the guest has it and it is small."""
    wanted = [(f"{BOOT_FOLDER}/memtest.exe", MEMORY_TEST_BIOS, "the memory test that the boot store names")]
    for language in dict.fromkeys((locale, "en-US")):
        # A folder's name comes from the store: it must be no path.
        if language and language.replace("-", "").isalnum():
            name = f"{language}/bootmgr.exe.mui"
            why = "the boot manager's messages in the guest's language"
            wanted.append((f"{BOOT_FOLDER}/{name}", f"{LANGUAGES_BIOS}/{name}", why))
    wanted += [(f"{BOOT_FOLDER}/Fonts/{name}", f"{FONTS}/{name}", "a font of the boot menu") for name in _EXTRA_FONTS]
    for target, source, why in wanted:
        try:
            data = guest.read_file(source, largest_bytes=LARGEST_EXTRAS_BYTES)
        except ConversionError:
            continue  # larger, or unreadable: Windows starts without
        if data:
            yield target, data, why


def _locale(store: bytes) -> str:
    manager = BootStore(store).objects.get(BOOT_MANAGER_OBJECT)
    return manager.text(_LOCALE) if manager else ""


def _no_room_for_extra(esp: Volume, path: str, size: int) -> Finding:
    message = f"{path} is left out for want of room; Windows starts without it."
    return Finding("esp-extra-left-out", Severity.NOTE, esp.title, message, f"{size} bytes", "")


def _file_left(esp: Volume, path: str, evidence: str) -> Finding:
    message = f"{path} is left where it is; a start from UEFI does not use it."
    return Finding("esp-file-left", Severity.NOTE, esp.title, message, evidence, "delete it if it is in the way")


# The SYSTEM hive


def convert_system(
    windows: Volume,
    identity: DiskIdentity,
    *,
    overlay: Overlay | None = None,
    letterless: Collection[UUID] = (),
    recovery: Recovery | None = None,
) -> SystemConversion:
    """Edit the SYSTEM hive for a start from a BIOS, in place. Raises NoSpaceError where its file has no room."""
    guest = _readable(windows)
    recovery = recovery or read_recovered(guest, SYSTEM_HIVE)
    if recovery is None:
        raise RefusedError(f"no {SYSTEM_HIVE}", subject=windows.title)
    listed = guest.list_folder(DRIVERS_FOLDER) or ()
    edited = convert_system_to_bios(
        recovery.content,
        identity,
        letterless=letterless,
        driver_files=frozenset(each.name.lower() for each in listed),
        above_sequence=recovery.highest_sequence,
        subject=f"{windows.title} {SYSTEM_HIVE}",
    )
    return _write_hive(windows, edited, "drivers and drive letters for a start from a BIOS", overlay)


def restore_system(
    done: SystemConversion, windows: Volume, identity: DiskIdentity, *, overlay: Overlay | None = None
) -> SystemConversion:
    """Edit the SYSTEM hive as it is now for a start from UEFI, in place."""
    recovery = read_recovered(_readable(windows), SYSTEM_HIVE)
    if recovery is None:
        raise RefusedError(f"no {SYSTEM_HIVE}", subject=windows.title)
    edited = convert_system_to_uefi(
        recovery.content,
        identity,
        done.edits,
        above_sequence=recovery.highest_sequence,
        subject=f"{windows.title} {SYSTEM_HIVE}",
    )
    return _write_hive(windows, edited, "drivers and drive letters for a start from UEFI", overlay)


def forget_hibernation(windows: Volume, *, overlay: Overlay | None = None) -> None:
    """Make Windows start afresh: its sleeping state is lost, as the flag for it says."""
    extents = _readable(windows).extents(HIBERNATION_FILE)
    if extents:
        offset, length = extents[0]
        with _because(overlay, f"{HIBERNATION_FILE} on {windows.title}", "the sleeping state is discarded"):
            windows.device.write_at(offset, bytes(min(length, _PAGE_BYTES)))


def _write_hive(windows: Volume, edited: HiveConversion, why: str, overlay: Overlay | None) -> SystemConversion:
    subject = f"{windows.title} {SYSTEM_HIVE}"
    extents = _readable(windows).extents(SYSTEM_HIVE)
    if not extents:
        raise RefusedError("the hive cannot be written where it lies", subject=subject, hint="undo its compression")
    room = sum(length for _, length in extents)
    if room < len(edited.content):
        raise NoSpaceError(
            f"the hive has {len(edited.content)} bytes with its logs, its file {room}",
            subject=subject,
            hint="take an application-consistent point, or shut Windows down cleanly, and convert that",
        )
    with _because(overlay, f"{SYSTEM_HIVE} on {windows.title}", why):
        write_in_place(windows.device, extents, edited.content)
    return SystemConversion(edited.edits, edited.findings)


def write_in_place(device: Slice, extents: Sequence[tuple[int, int]], content: bytes) -> None:
    """Make the file at ``extents`` begin with ``content``, writing only the pages that differ."""
    at = 0
    for offset, length in extents:
        wanted = content[at : at + length]
        at += length
        if not wanted:
            return
        now = device.read_at(offset, len(wanted))
        if now == wanted:
            continue
        for start in range(0, len(wanted), _PAGE_BYTES):
            page = wanted[start : start + _PAGE_BYTES]
            if now[start : start + _PAGE_BYTES] != page:
                device.write_at(offset + start, page)


def _fat(volume: Volume) -> FatFileSystem:
    if not isinstance(volume.filesystem, FatFileSystem):
        raise RefusedError("the EFI system partition is not FAT, or cannot be read", subject=volume.title)
    return volume.filesystem


def _readable(volume: Volume) -> FileSystem:
    if volume.filesystem is None:
        raise RefusedError("the volume cannot be read", subject=volume.title)
    return volume.filesystem


def _because(overlay: Overlay | None, what: str, why: str) -> AbstractContextManager[None]:
    return overlay.because(what, why) if overlay is not None else nullcontext()
