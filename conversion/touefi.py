"""Planning the way back, Generation 1 to 2: what the guest wrote meanwhile stays, what the conversion wrote goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from uuid import UUID, uuid4

from conversion.device import BlockDevice
from conversion.errors import ConversionError, DamagedError
from conversion.filesystems.fat import FatFileSystem
from conversion.finding import Finding, Severity
from conversion.inspection import Inspection, TablePartition, inspect, opened, windows_volumes
from conversion.linux.fallback import LARGEST_PROGRAM_BYTES, ensure_fallback
from conversion.linux.system import LinuxSystem
from conversion.linux.tablereferences import disk_places
from conversion.manifest import Component, Json, Manifest
from conversion.overlay import Overlay
from conversion.plan import ESP, GUEST, PLACES, SWITCH, TABLE, TO_UEFI_ORDER, Plan
from conversion.reconcile import Reconciliation, reconcile
from conversion.saved_table import decode_saved_table
from conversion.windows.convert import EspConversion, SystemConversion, restore_esp, restore_system
from conversion.windows.hivetrace import trace_of
from conversion.windows.volume import Volume


def plan_uefi(device: BlockDevice, manifest: Manifest, *, new_guid: Callable[[], UUID] = uuid4) -> Plan:
    """Plan the way back of a disk that ``manifest`` was converted by, and that a guest may have run on since.

    What the guest left as it was written goes back byte for byte. A disk on which that cannot be done gives a plan
    that is refused, with the reasons. Raises DamagedError where the manifest contradicts itself, and what the device
    raises.
    """
    switch = manifest.component(SWITCH)
    if switch is None:
        raise DamagedError("it says nothing of the partition table", subject="the conversion manifest")
    saved = decode_saved_table(switch.document)
    overlay = Overlay(device)
    reconciled = reconcile(overlay, saved, new_guid=new_guid)
    if reconciled.table is None:
        before = inspect(device)
        return Plan(2, before, None, TO_UEFI_ORDER, reconciled.findings, reconciled.sentences)
    _restore_table(overlay, reconciled)
    found = inspect(overlay)
    back = _WayBack(overlay, manifest, found, reconciled)
    try:
        back.run()
    except ConversionError as error:
        finding = Finding(
            "way-back", Severity.REFUSAL, error.subject or "disk", error.message, "while planning", error.hint or ""
        )
        return Plan(2, found, None, TO_UEFI_ORDER, (*reconciled.findings, finding), reconciled.sentences)
    return Plan(
        2,
        found,
        overlay,
        TO_UEFI_ORDER,
        (*reconciled.findings, *back.findings),
        (*reconciled.sentences, *back.sentences),
        saved.layout,
    )


def _restore_table(overlay: Overlay, reconciled: Reconciliation) -> None:
    why = "the machine starts by it again"
    with overlay.component(TABLE), overlay.because("GUID partition table", why):
        for offset, data in reconciled.before_switch:
            overlay.write_at(offset, data)
    with overlay.component(SWITCH), overlay.because("protective master boot record", why):
        overlay.write_at(0, reconciled.record)
    with overlay.component(PLACES), overlay.because("places of the boot core and boot records", "as they were before"):
        for offset, data in reconciled.after_switch:
            overlay.write_at(offset, data)


class _WayBack:
    """The files of the guest and of the EFI system partition on their way back; the table in the overlay is the GPT."""

    def __init__(self, overlay: Overlay, manifest: Manifest, found: Inspection, reconciled: Reconciliation) -> None:
        self._overlay = overlay
        self._manifest = manifest
        self._found = found
        self._reconciled = reconciled
        self.findings: list[Finding] = []
        self.sentences: list[str] = []

    def run(self) -> None:
        with self._overlay.component(ESP):
            self._restore_esp(self._manifest.component(ESP))
        with self._overlay.component(GUEST):
            self._restore_guest(self._manifest.component(GUEST))
        if self._manifest.system == "linux":
            with self._overlay.component(ESP):
                self._ensure_fallback()

    def _restore_esp(self, done: Component | None) -> None:
        if done is None or not (done.ranges or done.document):
            return
        if done.stands(self._overlay.below):
            self._put_back(done, "files on the EFI system partition")
        else:
            self._esp_by_content(done.document)

    def _restore_guest(self, done: Component | None) -> None:
        if done is None:
            return
        document = done.document
        if "windows" not in document:
            self._undo_edits(document)
        elif done.stands(self._overlay.below) and trace_of(self._volume(document)) == document.get("trace"):
            self._put_back(done, "files of the system")
        else:
            changed = SystemConversion.from_document(document["windows"])
            volume = self._volume(document)
            restored = restore_system(changed, volume, self._reconciled.identity, overlay=self._overlay)
            self.findings += restored.findings

    def _put_back(self, done: Component, what: str) -> None:
        with self._overlay.because(what, "as they were before the conversion, byte for byte"):
            for one in done.ranges:
                self._overlay.write_at(one.offset, one.before)

    def _esp_by_content(self, document: Json) -> None:
        if "windows" in document:
            done = EspConversion.from_document(document["windows"])
            restored = restore_esp(done, self._volume(document), overlay=self._overlay)
            self.findings += restored.findings
            return
        esp, subject = self._esp()
        for one in document.get("added", ()):
            path, digest = str(one["path"]), str(one["sha256"])
            content = esp.read_file(path, largest_bytes=LARGEST_PROGRAM_BYTES * 2)
            if content is None or hashlib.sha256(content).hexdigest() != digest:
                continue
            with self._overlay.because(f"{path} on {subject}", "removed: a start from UEFI has no use for it"):
                esp.remove_file(path)
        folder = document.get("folder")
        if folder is not None and esp.list_folder(folder) == ():
            with self._overlay.because(f"{folder} on {subject}", "removed: the conversion made it, and it is empty"):
                esp.remove_folder(folder)

    def _undo_edits(self, document: Json) -> None:
        """Undo edits of text by what the files hold now: an editor writes a new file, and leaves the old bytes be."""
        linux = self._found.linux
        for one in document.get("linux", ()):
            path, line = str(one["path"]), int(one["line"])
            if linux is None or not self._undo_edit(linux, path, one):
                self.sentences.append(f"{path}, line {line}, was changed in the guest and stays as it is.")

    def _undo_edit(self, linux: LinuxSystem, path: str, edit: Json) -> bool:
        """Write the old text where the new one still stands in the file, wherever the file lies by now."""
        if linux.root is None or linux.root.file_system is None:
            return False
        old, new, at = bytes.fromhex(edit["old"]), bytes.fromhex(edit["new"]), int(edit["offset"])
        file_system = linux.root.file_system
        content = file_system.read_file(path)
        if content is None or content[at : at + len(new)] != new:
            at = -1 if content is None else content.find(new)
        places = disk_places(linux.root, file_system, path, at, len(new)) if at >= 0 else None
        if places is None:
            return False
        done = 0
        with self._overlay.because(f"{path} on {linux.root.subject}", "as it named the partition before"):
            for device, offset, length in places:
                device.write_at(offset, old[done : done + length])  # type: ignore[attr-defined]
                done += length
        return True

    def _volume(self, document: Json) -> Volume:
        number = document.get("partition")
        for one in windows_volumes(self._found.partitions):
            if one.number == number:
                return one
        raise DamagedError(f"partition {number} is not on the disk", subject="the conversion manifest")

    def _esp(self) -> tuple[FatFileSystem, str]:
        found: TablePartition | None = self._found.esp
        esp = None if found is None else opened(found.device)
        if found is None or not isinstance(esp, FatFileSystem):
            raise DamagedError(
                "there is no EFI system partition that can be read", subject="disk", hint="check it in the guest"
            )
        return esp, f"partition {found.number}"

    def _ensure_fallback(self) -> None:
        esp, subject = self._esp()
        finding = ensure_fallback(esp, subject, self._overlay)
        if finding is not None:
            self.findings.append(finding)
