"""A converted Windows disk looked at again: does the store for a BIOS name the partition that holds Windows?"""

from __future__ import annotations

from typing import Final

from conversion.errors import ConversionError
from conversion.filesystems.filesystem import FileSystem
from conversion.finding import Finding, Severity
from conversion.identity import DiskIdentity
from conversion.windows.bcd import DEVICE, FIRMWARE_TYPES, OS_DEVICE, PATH, BootStore
from conversion.windows.bcddevice import devices_in
from conversion.windows.guest import BOOT_MANAGER, BOOT_STORE, SYSTEM_HIVE
from conversion.windows.hive import Hive
from conversion.windows.system import driver_states
from conversion.windows.volume import Volume

_LARGEST_STORE_BYTES: Final = 16 << 20
_LARGEST_HIVE_BYTES: Final = 256 << 20


def verify_windows(esp: Volume, windows: Volume, identity: DiskIdentity) -> tuple[Finding, ...]:
    """Return what is wrong with a converted disk, nothing where all is well. Raises no ConversionError."""
    wrong: list[tuple[str, str]] = []
    try:
        wrong += _esp(esp, windows, identity)
        wrong += _system(windows)
    except ConversionError as error:
        wrong.append(("what was written cannot be read", str(error)))
    remedy = "convert anew; if that fails again, recover as Generation 2"
    return tuple(
        Finding(
            "windows-verify",
            Severity.REFUSAL,
            esp.title,
            f"The converted disk is not as it should be: {what}.",
            read,
            remedy,
        )
        for what, read in wrong
    )


def _esp(esp: Volume, windows: Volume, identity: DiskIdentity) -> list[tuple[str, str]]:
    wrong: list[tuple[str, str]] = []
    if esp.filesystem is None or not esp.has(BOOT_MANAGER):
        return [("the boot manager is missing", f"no {BOOT_MANAGER}")]
    content = esp.filesystem.read_file(BOOT_STORE, largest_bytes=_LARGEST_STORE_BYTES)
    if content is None:
        return [("the boot store is missing", f"no {BOOT_STORE}")]
    store = BootStore(content, subject=BOOT_STORE)
    wrong += [
        ("the boot store still has an object of the firmware", each.object_id)
        for each in store.objects.values()
        if each.kind in FIRMWARE_TYPES
    ]
    loader = store.default_loader
    if loader is None:
        return [*wrong, ("the boot store starts nothing", f"{BOOT_STORE} has no default entry")]
    if not loader.text(PATH).lower().endswith(".exe"):
        wrong.append(("the default entry starts no program for a BIOS", loader.text(PATH)))
    place = identity.by_guid(windows.partition_guid)
    for number in (DEVICE, OS_DEVICE):
        element = loader.elements.get(number)
        for device in devices_in(element.data).partitions if element else ():
            if place is None or (device.signature, device.offset_bytes) != (identity.signature, place.offset_bytes):
                wrong.append(("the default entry names another partition", f"element {number} names {device}"))
    return wrong


def _system(windows: Volume) -> list[tuple[str, str]]:
    filesystem: FileSystem | None = windows.filesystem
    content = filesystem.read_file(SYSTEM_HIVE, largest_bytes=_LARGEST_HIVE_BYTES) if filesystem else None
    if content is None:
        return [("the SYSTEM hive is missing", f"no {SYSTEM_HIVE}")]
    hive = Hive(content, subject=SYSTEM_HIVE)
    if hive.base_block.is_dirty:
        return [("the SYSTEM hive is dirty", "its sequence numbers differ")]
    states = driver_states(hive)
    started = {state.name for state in states if state.starts_at_boot}
    installed = {state.name for state in states if state.start is not None}
    if installed and not started:
        return [("no driver for the disk starts with Windows", ", ".join(sorted(installed)))]
    return []
