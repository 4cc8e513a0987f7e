r"""The SYSTEM hive: what Windows must find in it to start from a disk under an MBR, and the way back.

Edited are every control set that ``Select`` names as current, default or last known good (the loader starts the
default one, and a person at the boot menu may choose the last known good), and ``MountedDevices``, by which the mount
manager gives letters. Every edit is listed with what stood there, and only what still stands as it was written is
taken back: the guest has lived since, and its hive is never replaced by an old one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from conversion.errors import DamagedError
from conversion.finding import Finding, Severity
from conversion.identity import DiskIdentity
from conversion.windows.hive import REG_BINARY, REG_DWORD, U32, Hive, Key
from conversion.windows.hiveedit import HiveEditor
from conversion.windows.mountrecord import mbr_record, to_gpt, to_mbr

# For a disk on IDE, as a Generation 1 machine offers it, and on Hyper-V's own bus beside it.
BOOT_DRIVERS: Final = ("atapi", "intelide", "pciide", "storvsc", "vmbus", "storflt")
IDE_DRIVERS: Final = frozenset({"atapi", "intelide"})  # without them, there is no disk on IDE
MOUNTED_DEVICES: Final = "MountedDevices"
_CONTROL_SETS: Final = ("Current", "Default", "LastKnownGood")  # values of Select
_BOOT_START: Final = U32.pack(0)
_NO_LETTER: Final = "#"  # a record of this name, with a GUID: the volume has a name but no letter


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A value's type and bytes."""

    kind: int
    data: bytes

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"type": self.kind, "data": self.data.hex()}


@dataclass(frozen=True, slots=True)
class HiveEdit:
    """One value that was changed. ``before`` is None where it was added, ``after`` where it was deleted."""

    key: str
    name: str
    before: StoredValue | None
    after: StoredValue | None
    why: str

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "key": self.key,
            "name": self.name,
            "before": self.before.document() if self.before else None,
            "after": self.after.document() if self.after else None,
            "why": self.why,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> HiveEdit:
        """Read the JSON form. Raises DamagedError where it is none."""
        try:
            key, name, why = document["key"], document["name"], document["why"]
            stored = [
                StoredValue(int(each["type"]), bytes.fromhex(each["data"])) if each is not None else None
                for each in (document["before"], document["after"])
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"the list of registry edits is damaged: {error!r}") from error
        if not all(isinstance(text, str) for text in (key, name, why)):
            raise DamagedError("the list of registry edits is damaged: a name is no text")
        return cls(key, name, stored[0], stored[1], why)


@dataclass(frozen=True, slots=True)
class HiveConversion:
    """An edited hive. ``content`` has the length of the hive that it was made from."""

    content: bytes
    edits: tuple[HiveEdit, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class DriverState:
    """How a driver stands in one control set. ``override`` wins over ``start``; 0 starts with the loader."""

    control_set: str
    name: str
    start: int | None  # None: not installed
    override: int | None  # StartOverride\0

    @property
    def starts_at_boot(self) -> bool:
        """Whether the loader starts it."""
        return self.start == 0 and self.override in {None, 0}


def control_sets(hive: Hive) -> tuple[str, ...]:
    """Return the control sets that Windows may start, the current one first. Raises DamagedError without any."""
    select = hive.root.key("Select")
    numbers = [select.number(name) for name in _CONTROL_SETS] if select else []
    names = dict.fromkeys(f"ControlSet{number:03d}" for number in numbers if number)
    found = tuple(name for name in names if hive.root.key(name) is not None)
    if not found:
        raise hive.damaged("Select names no control set: this is no SYSTEM hive")
    return found


def driver_states(hive: Hive, names: Iterable[str] = BOOT_DRIVERS) -> tuple[DriverState, ...]:
    """Return how the drivers stand in every control set that Windows may start."""
    states: list[DriverState] = []
    for control_set in control_sets(hive):
        for name in names:
            service = hive.key(f"{control_set}\\Services\\{name}")
            override = service.key("StartOverride") if service else None
            states.append(
                DriverState(
                    control_set,
                    name,
                    service.number("Start") if service else None,
                    override.number("0") if override else None,
                )
            )
    return tuple(states)


def convert_system_to_bios(
    content: bytes,
    identity: DiskIdentity,
    *,
    letterless: Collection[UUID] = (),
    driver_files: Collection[str] | None = None,
    above_sequence: int = 0,
    subject: str = "SYSTEM hive",
) -> HiveConversion:
    r"""Return the SYSTEM hive ``content`` (clean) with what a start under the MBR of ``identity`` needs.

    ``letterless`` are the partitions that Windows gives no letter under the GPT (ESP, recovery), by GUID: without a
    record that says so, it would give them one under the MBR.
    ``driver_files`` are the names in \Windows\System32\drivers: a driver whose file is missing is left as it is, as a
    missing file of a driver that starts at boot stops Windows. None: not checked.

    Raises DamagedError where the hive is damaged or is no SYSTEM hive, NoSpaceError where its file has no room.
    """
    edits = _Edits(content, subject)
    _start_drivers(edits, driver_files)
    mounted = edits.hive.root.key(MOUNTED_DEVICES)
    if mounted is not None:
        for value in list(mounted.values()):
            record = to_mbr(value.data, identity) if value.kind == REG_BINARY else None
            if record is not None:
                edits.set(
                    mounted, MOUNTED_DEVICES, value.name, record, "under an MBR a volume goes by signature and offset"
                )
        _withhold_letters(edits, mounted, identity, letterless)
    return edits.finish(above_sequence)


def convert_system_to_uefi(
    content: bytes,
    identity: DiskIdentity,
    edits: Iterable[HiveEdit],
    *,
    above_sequence: int = 0,
    subject: str = "SYSTEM hive",
) -> HiveConversion:
    """Return the SYSTEM hive ``content`` (clean) as it stands now, for a start under the GPT of ``identity``.

    ``edits`` are those of the way out. What it added is deleted and what it changed is set back where it still stands
    as written; the records of volumes are mapped as they are now, those that Windows made meanwhile included.
    """
    taken = _Edits(content, subject)
    for edit in edits:
        if edit.key != MOUNTED_DEVICES or edit.before is None:
            _take_back(taken, edit)
    mounted = taken.hive.root.key(MOUNTED_DEVICES)
    for value in list(mounted.values()) if mounted is not None else []:
        record = to_gpt(value.data, identity) if value.kind == REG_BINARY else None
        if mounted is not None and record is not None:
            taken.set(mounted, MOUNTED_DEVICES, value.name, record, "under a GPT a volume goes by its GUID")
    return taken.finish(above_sequence)


def _start_drivers(edits: _Edits, driver_files: Collection[str] | None) -> None:
    for control_set in control_sets(edits.hive):
        for name in BOOT_DRIVERS:
            path = f"{control_set}\\Services\\{name}"
            service = edits.hive.key(path)
            if service is None:
                if name in IDE_DRIVERS:
                    edits.find("driver-missing", f"{name} is not installed", f"no key {path}")
                continue
            image = service.text("ImagePath").replace("/", "\\").rpartition("\\")[2].lower() or f"{name}.sys"
            if driver_files is not None and image not in driver_files:
                edits.find("driver-missing", f"{name} has no file", rf"no \Windows\System32\drivers\{image}")
                continue
            why = "the disk of a Generation 1 machine is reached through it"
            edits.set(service, path, "Start", _BOOT_START, why, kind=REG_DWORD)
            override = service.key("StartOverride")
            if override is not None and override.value("0") is not None:
                why = "the override keeps the driver from starting, whatever Start says"
                edits.set(override, f"{path}\\StartOverride", "0", _BOOT_START, why, kind=REG_DWORD)


def _withhold_letters(edits: _Edits, mounted: Key, identity: DiskIdentity, letterless: Collection[UUID]) -> None:
    """Keep Windows from giving a letter to what has none under GPT, unless a person gave it one."""
    known = {value.data for value in mounted.values()}
    for partition in identity.partitions:
        record = mbr_record(identity, partition)
        if partition.guid in letterless and record not in known:
            name = f"{_NO_LETTER}{{{partition.guid}}}"
            edits.set(mounted, MOUNTED_DEVICES, name, record, "a partition that had no letter gets none under the MBR")


def _take_back(edits: _Edits, edit: HiveEdit) -> None:
    key = edits.hive.key(edit.key)
    value = key.value(edit.name) if key else None
    if (
        key is None
        or value is None
        or edit.after is None
        or (value.kind, value.data) != (edit.after.kind, edit.after.data)
    ):
        return
    why = "it still stands as the conversion wrote it"
    if edit.before is None:
        edits.delete(key, edit.key, edit.name, why)
    else:
        edits.set(key, edit.key, edit.name, edit.before.data, why, kind=edit.before.kind)


class _Edits:
    """A hive under edits, with the list of them."""

    def __init__(self, content: bytes, subject: str) -> None:
        self._editor = HiveEditor(content, subject=subject)
        self._edits: list[HiveEdit] = []
        self._findings: dict[tuple[str, str], Finding] = {}
        self._subject = subject

    @property
    def hive(self) -> Hive:
        """The hive as edited so far."""
        return self._editor.hive

    def set(self, key: Key, path: str, name: str, data: bytes, why: str, *, kind: int = REG_BINARY) -> None:
        """Set a value, if it is another."""
        value = key.value(name)
        before = StoredValue(value.kind, value.data) if value else None
        after = StoredValue(kind, data)
        if before != after:
            self._editor.set_value(key, name, kind, data)
            self._edits.append(HiveEdit(path, value.name if value else name, before, after, why))

    def delete(self, key: Key, path: str, name: str, why: str) -> None:
        """Delete a value."""
        value = key.value(name)
        if value is not None and self._editor.delete_value(key, name):
            self._edits.append(HiveEdit(path, value.name, StoredValue(value.kind, value.data), None, why))

    def find(self, rule: str, what: str, evidence: str) -> None:
        """Note a finding about a driver, once."""
        message = f"The driver {what}, so that Windows may not reach a disk on IDE."
        remedy = (
            "check that the machine starts in a test failover; install the driver while Generation 2 if it does not"
        )
        self._findings[rule, what] = Finding(rule, Severity.WARNING, self._subject, message, evidence, remedy)

    def finish(self, above_sequence: int) -> HiveConversion:
        """Return the hive and what was done to it."""
        content = self._editor.finish(above_sequence=above_sequence)
        return HiveConversion(content, tuple(self._edits), tuple(self._findings.values()))
