"""A written conversion looked at again: is everything where the plan put it, and does it lead to the system?"""

from __future__ import annotations

from dataclasses import replace

from conversion.device import BlockDevice
from conversion.errors import ConversionError, DamagedError
from conversion.finding import Finding, Severity
from conversion.gpt_copies import read_copies
from conversion.inspection import Inspection, inspect, windows_volumes
from conversion.layout import SECTOR_BYTES, Layout
from conversion.manifest import Component, Manifest
from conversion.mbr import read_mbr
from conversion.plan import ESP, GUEST, SWITCH, Plan
from conversion.saved_table import SavedTable, decode_saved_table
from conversion.windows.verify import verify_windows
from conversion.windows.volume import Volume


def verify(device: BlockDevice, plan: Plan, manifest: Manifest) -> tuple[Finding, ...]:
    """Return what is wrong with ``device``, on which ``plan`` was written; nothing where all is well.

    Every byte of the plan is compared, and then the disk is inspected as if nothing were known of it.
    """
    overlay = plan.require()
    wrong = [
        _wrong(f"bytes {offset} to {offset + len(data)}", "was not written as planned", "read back")
        for offset, data in overlay.written()
        if device.read_at(offset, len(data)) != data
    ]
    if wrong:
        return tuple(wrong[:20])
    try:
        found = inspect(device)
        return _verify_bios(device, found, plan, manifest) if plan.generation == 1 else _verify_uefi(found, manifest)
    except ConversionError as error:
        return (_wrong(error.subject or "disk", error.message, "inspected again"),)


def _verify_bios(device: BlockDevice, found: Inspection, plan: Plan, manifest: Manifest) -> tuple[Finding, ...]:
    saved = _saved(manifest)
    wrong: list[Finding] = []
    live = read_mbr(device)
    if found.generation != 1 or live is None or live != saved.written_mbr():
        wrong.append(_wrong("master boot record", "is not the one that was written", "sector 0 and its chain"))
    active = [one for one in saved.written_mbr().partitions if one.active]
    # A logical partition cannot be active: where the one to boot from had to become that, none is.
    if len(active) > 1 or (not active and all(one.ebr_lba is None for one in saved.layout.entries)):
        wrong.append(_wrong("master boot record", "has not exactly one active partition", "its entries"))
    if found.system != manifest.system:
        wrong.append(_wrong("disk", f"holds {found.system_name} instead of a {manifest.system} system", "inspected"))
    copies = read_copies(device)
    before = plan.inspection.copies
    if (
        copies is None
        or before is None
        or copies.table.entries != saved.gpt.entries
        or (copies.primary.good, copies.backup.good) != (before.primary.good, before.backup.good)
    ):
        wrong.append(_wrong("partition table", "no longer sleeps beneath the master boot record", "both copies"))
    if manifest.system == "windows" and not wrong:
        wrong += _verify_windows(found, manifest, saved.layout)
    return tuple(wrong)


def _verify_windows(found: Inspection, manifest: Manifest, layout: Layout) -> tuple[Finding, ...]:
    volumes = windows_volumes(found.partitions)
    esp = _volume_of(volumes, manifest.component(ESP), layout)
    windows = _volume_of(volumes, manifest.component(GUEST), layout)
    if esp is None or windows is None:
        return (_wrong("disk", "has not every partition that was written to", "the master boot record"),)
    return verify_windows(esp, windows, layout.identity())


def _volume_of(volumes: list[Volume], component: Component | None, layout: Layout) -> Volume | None:
    """Return the volume that a component was written to, with the GUID that only the old table has for it."""
    entry = layout.entry(int(component.document["partition"])) if component is not None else None
    if entry is None:
        return None
    start = entry.first_lba * SECTOR_BYTES
    return next((replace(one, partition_guid=entry.guid) for one in volumes if one.device.start == start), None)


def _verify_uefi(found: Inspection, manifest: Manifest) -> tuple[Finding, ...]:
    wrong: list[Finding] = []
    copies = found.copies
    if found.generation != 2 or copies is None or not (copies.primary.good and copies.backup.good):
        wrong.append(_wrong("partition table", "is not whole in both its copies", "sectors 1 and the last"))
    if found.esp is None:
        wrong.append(_wrong("disk", "has no EFI system partition", "the partition table"))
    if found.system != manifest.system:
        wrong.append(_wrong("disk", f"holds {found.system_name} instead of a {manifest.system} system", "inspected"))
    return tuple(wrong)


def _saved(manifest: Manifest) -> SavedTable:
    switch = manifest.component(SWITCH)
    if switch is None:
        raise DamagedError("it says nothing of the partition table", subject="the conversion manifest")
    return decode_saved_table(switch.document)


def _wrong(subject: str, what: str, evidence: str) -> Finding:
    remedy = "convert anew, and report it if it comes back"
    return Finding("verify", Severity.REFUSAL, subject, f"It {what}.", evidence, remedy)
