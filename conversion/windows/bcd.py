r"""The boot store (BCD) of a Windows that starts from UEFI, rewritten for the BIOS Boot Manager.

A store is a registry hive: ``Objects\{guid}\Description`` has an object's type, ``Objects\{guid}\Elements\XXXXXXXX``
its elements. The edits are in place: no element becomes longer, objects and elements are only deleted, and the same
store gives the same bytes. Each is listed, so that a plan can show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from conversion.finding import Finding, Severity
from conversion.identity import DiskIdentity, PartitionIdentity
from conversion.windows.bcddevice import DeviceKind, PartitionDevice, devices_in
from conversion.windows.hive import REG_BINARY, REG_SZ, Hive, Key, Value
from conversion.windows.hiveedit import HiveEditor

BOOT_MANAGER: Final = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}"
FIRMWARE_TYPES: Final = frozenset({0x10100001, 0x101FFFFF})  # the firmware's boot manager, and its boot entries
LOADER_TYPE: Final = 0x10200003

DEVICE: Final = "11000001"
OS_DEVICE: Final = "21000001"
RAMDISK_DEVICE: Final = "31000003"
PATH: Final = "12000002"
DEFAULT: Final = "23000003"
ISOLATED_CONTEXT: Final = "16000060"
OBJECT_LISTS: Final = frozenset({"24000001", "24000002", "24000010"})  # display order, boot sequence, tools
_FORMAT_DEVICE: Final = "1"  # the second digit of an element's number says how its data are stored
_FORMAT_STRING: Final = "2"
_REG_MULTI_SZ: Final = 7

_LOADERS: Final = {"winload.efi": "winload.exe", "winresume.efi": "winresume.exe"}
_MEMORY_TEST: Final = "memtest.efi"


@dataclass(frozen=True, slots=True)
class BcdChange:
    """One edit of a boot store. ``element`` is empty where the whole object is meant."""

    object_id: str
    element: str
    before: str  # as a person reads it
    after: str  # empty: deleted
    why: str

    def document(self) -> dict[str, str]:
        """Return the JSON form."""
        return {
            "object": self.object_id,
            "element": self.element,
            "before": self.before,
            "after": self.after,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class BcdConversion:
    """A converted store. ``content`` has the length of the store that it was made from."""

    content: bytes
    changes: tuple[BcdChange, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class BcdElement:
    """An element of an object."""

    number: str  # eight hexadecimal digits
    kind: int  # the registry's type
    data: bytes

    @property
    def is_device(self) -> bool:
        """Whether it names a device."""
        return self.number[1:2] == _FORMAT_DEVICE and self.kind == REG_BINARY


@dataclass(frozen=True, slots=True)
class BcdObject:
    """An object of a boot store. ``kind`` is None for one without a description, which occur."""

    object_id: str  # "{guid}", in lower case
    kind: int | None
    elements: Mapping[str, BcdElement]

    def text(self, number: str) -> str:
        """Return a string element, empty where there is none."""
        element = self.elements.get(number)
        return Value(0, "", element.kind, element.data).text() if element and element.kind == REG_SZ else ""


class BootStore:
    """The objects of a boot store. Raises DamagedError where the hive is damaged or is no boot store."""

    def __init__(self, content: bytes, *, subject: str = "BCD") -> None:
        hive = Hive(content, subject=subject)
        self.objects: dict[str, BcdObject] = {}
        for key in _objects(hive).keys():  # noqa: SIM118
            found = _object(key)
            self.objects[found.object_id] = found

    @property
    def default_loader(self) -> BcdObject | None:
        """The loader that the Boot Manager starts by itself; where it names none, the only one there is."""
        manager = self.objects.get(BOOT_MANAGER)
        named = self.objects.get(manager.text(DEFAULT).lower()) if manager else None
        if named is not None:
            return named
        loaders = [each for each in self.objects.values() if each.kind == LOADER_TYPE]
        return loaders[0] if len(loaders) == 1 else None

    def devices(self) -> Iterator[tuple[BcdObject, BcdElement, PartitionDevice]]:
        """Yield every partition that an element names, nested ones too."""
        for each in self.objects.values():
            for element in each.elements.values():
                if element.is_device:
                    for device in devices_in(element.data).partitions:
                        yield each, element, device


def convert_bcd_to_bios(content: bytes, identity: DiskIdentity, *, subject: str = "BCD") -> BcdConversion:
    """Return the store ``content`` (clean, of a UEFI machine) as the BIOS Boot Manager needs it.

    ``identity`` tells which partitions have which place under the MBR; a partition that it does not name keeps its
    element, with a finding. Raises DamagedError where the hive is damaged or is no boot store.
    """
    return _Conversion(content, identity, subject).run()


def _objects(hive: Hive) -> Key:
    found = hive.root.key("Objects")
    if found is None:
        raise hive.damaged("no key Objects: this is no boot store")
    return found


def _object(key: Key) -> BcdObject:
    description = key.key("Description")
    elements: dict[str, BcdElement] = {}
    listed = key.key("Elements")
    for child in listed.keys() if listed else ():
        value = child.value("Element")
        if value is not None:
            number = child.name.lower()
            elements[number] = BcdElement(number, value.kind, value.data)
    return BcdObject(key.name.lower(), description.number("Type") if description else None, elements)


class _Conversion:
    """The rewriting of one store, object by object."""

    def __init__(self, content: bytes, identity: DiskIdentity, subject: str) -> None:
        self._editor = HiveEditor(content, subject=subject)
        self._hive = self._editor.hive
        self._identity = identity
        self._subject = subject
        self._changes: list[BcdChange] = []
        self._findings: list[Finding] = []

    def run(self) -> BcdConversion:
        objects = _objects(self._hive)
        names = [key.name for key in objects.keys()]  # noqa: SIM118
        dropped = {name.lower() for name in names if self._drop_firmware_object(objects, name)}
        for name in names:
            key = objects.key(name) if name.lower() not in dropped else None
            if key is not None:
                self._convert_object(key, dropped)
        return BcdConversion(self._editor.finish(), tuple(self._changes), tuple(self._findings))

    def _drop_firmware_object(self, objects: Key, name: str) -> bool:
        key = objects.key(name)
        each = _object(key) if key else None
        if each is None or each.kind not in FIRMWARE_TYPES:
            return False
        self._editor.delete_key(objects, name)
        why = "a BIOS has no boot entries: this object mirrors one of the firmware's variables"
        self._note(name, "", f"object of type {each.kind:#x}", "", why)
        return True

    def _convert_object(self, key: Key, dropped: set[str]) -> None:
        name = key.name
        description = key.key("Description")
        if description is not None and self._editor.delete_value(description, "FirmwareVariable"):
            self._note(name, "", "FirmwareVariable", "", "a BIOS has no variables")
        elements = key.key("Elements")
        if elements is None:
            return
        for number in [child.name for child in elements.keys()]:  # noqa: SIM118
            child = elements.key(number)
            value = child.value("Element") if child else None
            if child is not None and value is not None:
                self._convert_element(name, elements, child, value, dropped)

    def _convert_element(self, name: str, elements: Key, key: Key, value: Value, dropped: set[str]) -> None:
        number = key.name.lower()
        if number == ISOLATED_CONTEXT:
            self._delete(name, elements, number, value.data.hex(), "it is for loaders started by UEFI")
        elif number == PATH and name.lower() == BOOT_MANAGER:
            self._delete(name, elements, number, value.text(), "the BIOS Boot Manager is found by its place")
        elif number in OBJECT_LISTS and value.kind == _REG_MULTI_SZ:
            self._convert_list(name, elements, key, value, dropped)
        elif number[1:2] == _FORMAT_DEVICE and value.kind == REG_BINARY:
            self._convert_device(name, key, value)
        elif number[1:2] == _FORMAT_STRING and value.kind == REG_SZ:
            self._convert_path(name, key, value)

    def _convert_path(self, name: str, key: Key, value: Value) -> None:
        before = value.text()
        after = bios_path(before)
        if after != before:
            self._editor.set_value(key, "Element", REG_SZ, f"{after}\0".encode("utf-16-le"))
            self._note(name, key.name, before, after, "the program for BIOS stands beside the one for UEFI")
        elif key.name.lower() == PATH and before.lower().endswith(".efi"):
            self._find(
                "bcd-foreign-path", name, f"starts {before}, which a BIOS cannot", f"element {PATH} is {before!r}"
            )

    def _convert_list(self, name: str, elements: Key, key: Key, value: Value, dropped: set[str]) -> None:
        listed = [each for each in value.data.decode("utf-16-le", "replace").split("\0") if each]
        kept = [each for each in listed if each.lower() not in dropped]
        if kept == listed:
            return
        why = "what it named was deleted"
        if not kept:
            self._delete(name, elements, key.name, " ".join(listed), why)
            return
        self._editor.set_value(
            key, "Element", _REG_MULTI_SZ, "".join(f"{each}\0" for each in [*kept, ""]).encode("utf-16-le")
        )
        self._note(name, key.name, " ".join(listed), " ".join(kept), why)

    def _convert_device(self, name: str, key: Key, value: Value) -> None:
        found = devices_in(value.data)
        data = bytearray(value.data)
        for device in found.partitions:
            place = self._place(device)
            if place is not None:
                after = PartitionDevice.mbr(device.at, self._identity.signature, place.offset_bytes)
                after.encode_into(data)
                self._note(name, key.name, str(device), str(after), "a BIOS names partitions by signature and offset")
            elif device.is_gpt:
                self._find(
                    "bcd-unmapped-partition",
                    name,
                    f"names {device}, which has no place under the MBR",
                    f"element {key.name}",
                )
        for path in found.paths:
            after_path = bios_path(path.text)
            if after_path != path.text and len(after_path) == len(path.text):
                data[path.at : path.at + 2 * len(after_path)] = after_path.encode("utf-16-le")
                self._note(name, key.name, path.text, after_path, "the program for BIOS stands beside the one for UEFI")
        for kind in found.unknown:
            label = kind.name.lower() if isinstance(kind, DeviceKind) else f"type {kind}"
            self._find(
                "bcd-unknown-device",
                name,
                f"names a device of a kind that is left as it is ({label})",
                f"element {key.name}",
            )
        if data != value.data:
            self._editor.set_value(key, "Element", REG_BINARY, bytes(data))

    def _place(self, device: PartitionDevice) -> PartitionIdentity | None:
        known = device.is_gpt and device.disk_guid == self._identity.disk_guid
        return self._identity.by_guid(device.partition_guid) if known else None

    def _delete(self, name: str, elements: Key, number: str, before: str, why: str) -> None:
        self._editor.delete_key(elements, number)
        self._note(name, number, before, "", why)

    def _note(self, name: str, element: str, before: str, after: str, why: str) -> None:
        self._changes.append(BcdChange(name.lower(), element.lower(), before, after, why))

    def _find(self, rule: str, name: str, message: str, evidence: str) -> None:
        subject = f"{self._subject} {name}"
        remedy = "this boot entry will not start as Generation 1; remove it with bcdedit if it is not needed"
        self._findings.append(Finding(rule, Severity.WARNING, subject, f"The boot entry {message}.", evidence, remedy))


def bios_path(path: str) -> str:
    r"""Return where the BIOS program stands for the UEFI program at ``path``; any other path unchanged.

    The case of a name is kept: ``WinLoad.EFI`` becomes ``WinLoad.exe``.
    """
    folder, parted, name = path.rpartition("\\")
    if name.lower() == _MEMORY_TEST:
        return r"\boot\memtest.exe"
    if name.lower() in _LOADERS:
        return f"{folder}{parted}{name[:-3]}{'EXE' if name.isupper() else 'exe'}"
    return path
