"""The way back to a GUID partition table: what the guest made of its master boot record meanwhile, and what follows.

An unchanged record brings back the old bytes. A changed one patches the saved table, entry by entry. What cannot be
told apart from a mistake stops the way back, with the reason. ``reconcile`` only reads; ``restore`` writes what it
planned, and again the first sector is the switch: both copies of the table before it, after it the places that the
conversion used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

from conversion.device import BlockDevice, WritableDevice
from conversion.errors import DamagedError, RefusedError
from conversion.finding import Finding, Severity
from conversion.gpt import EFI_SYSTEM, Gpt, GptPartition
from conversion.gpt_copies import encode_table
from conversion.identity import DiskIdentity, PartitionIdentity
from conversion.layout import SECTOR_BYTES, LayoutEntry
from conversion.mbr import (
    BOOT_CODE_BYTES,
    DYNAMIC_DISK,
    LARGEST_SECTORS,
    PROTECTIVE,
    Mbr,
    MbrPartition,
    decode_record,
    protective_mbr,
    read_mbr,
)
from conversion.partition_types import gpt_type
from conversion.saved_table import SavedTable

_PROTECTIVE_LENGTH_AT: Final = 12  # of an entry, bytes


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What the way back writes, or the refusals that say why there is none (``table`` is None then).

    ``verbatim``: nothing changed, the old bytes come back. ``identity`` names what both tables have, the record's side
    as the guest has it now. ``sentences`` tell a person what is restored and patched.
    """

    table: Gpt | None
    verbatim: bool
    before_switch: tuple[tuple[int, bytes], ...]  # (offset, data): both copies of the table
    record: bytes  # the first sector: the switch
    after_switch: tuple[tuple[int, bytes], ...]  # (offset, data): the places that the conversion used
    identity: DiskIdentity
    sentences: tuple[str, ...]
    findings: tuple[Finding, ...]

    def require(self) -> Reconciliation:
        """Return itself. Raises RefusedError, naming every reason, where there is no way back."""
        refusals = [one for one in self.findings if one.severity is Severity.REFUSAL]
        if not refusals:
            return self
        raise RefusedError(
            " ".join(f"{one.message} ({one.evidence})" for one in refusals),
            subject=refusals[0].subject,
            hint="; ".join(one.remedy for one in refusals),
        )


@dataclass(slots=True)
class _Comparison:
    """The live partitions sorted by what happened to them, and what was found on the way."""

    kept: list[tuple[LayoutEntry, MbrPartition]] = field(default_factory=list)
    removed: list[LayoutEntry] = field(default_factory=list)
    added: list[MbrPartition] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


def reconcile(device: BlockDevice, saved: SavedTable, *, new_guid: Callable[[], UUID]) -> Reconciliation:
    """Compare the device's table with the one that was written, and plan the way back. Nothing is written.

    ``new_guid`` gives the GUID of a partition that the guest added.
    """
    sectors = device.size // SECTOR_BYTES
    if device.sector_size != SECTOR_BYTES:
        evidence = f"the logical sector size is {device.sector_size} bytes, it was {SECTOR_BYTES}"
        return _stopped(saved, [_stop("sector-size-changed", "disk", "The disk has other sectors now.", evidence)])
    if sectors > 0 and device.read_at(0, SECTOR_BYTES) == saved.original_record:
        return _again(saved, device)
    try:
        live = read_mbr(device)
    except DamagedError as error:
        return _stopped(saved, [_stop("mbr-damaged", "master boot record", error.message + ".", "read from the disk")])
    if live is None:
        message = "The disk has no master boot record any more."
        return _stopped(saved, [_stop("mbr-missing", "disk", message, "sector 0 does not hold one")])
    return _reconcile_tables(saved, live, sectors, device, new_guid)


def restore(device: WritableDevice, reconciliation: Reconciliation) -> None:
    """Write the way back: the copies of the table, flush, the first sector alone, flush, then the places, flush.

    Raises RefusedError where it was refused; nothing is written then.
    """
    reconciliation.require()
    for offset, data in reconciliation.before_switch:
        device.write_at(offset, data)
    device.flush()
    device.write_at(0, reconciliation.record)
    device.flush()
    for offset, data in reconciliation.after_switch:
        device.write_at(offset, data)
    device.flush()


def _reconcile_tables(
    saved: SavedTable, live: Mbr, sectors: int, device: BlockDevice, new_guid: Callable[[], UUID]
) -> Reconciliation:
    found = _compare(saved, live, sectors)
    table = saved.gpt
    if sectors != saved.sectors:
        table = table.with_end(sectors)
        change = "grew" if sectors > saved.sectors else "shrank"
        found.sentences.append(
            f"The disk {change} from {saved.sectors} to {sectors} sectors: the backup of the table moves to its end."
        )
        found.findings += _check_end(table, sectors)
    if not _refused(found.findings):
        table, added = _patch(table, found, saved, new_guid)
        if table.entries != saved.gpt.entries:
            table = _with_limits(table, sectors)
        found.findings += _check_room(table, sectors)
    if _refused(found.findings):
        return _stopped(saved, found.findings)
    found.findings += _check_core(saved, live, device)
    if live.signature != saved.layout.signature:
        evidence = f"{live.signature:08x}, it was {saved.layout.signature:08x}"
        found.findings.append(_warn("signature-changed", "disk", "The guest changed the disk signature.", evidence))
    identity = _identity(saved, live, found.kept, added)
    occupied = [(one.first_lba, one.end_lba) for one in live.holding_data]
    verbatim = sectors == saved.sectors and table.entries == saved.gpt.entries and table.header == saved.gpt.header
    if verbatim:
        found.sentences.insert(0, "The partition table is as it was written: the old one comes back by the byte.")
        return _verbatim(saved, sectors, identity, occupied, found)
    found.sentences.insert(0, "The saved partition table comes back with what the guest changed.")
    tables = encode_table(table)
    skip = [(offset // SECTOR_BYTES, (offset + len(data)) // SECTOR_BYTES) for offset, data in tables]
    skip += [(0, 1), *_ends(saved), *occupied]
    return Reconciliation(
        table,
        False,
        tables,
        _guarding_record(saved, sectors, found.sentences),
        tuple(_outside(saved.original, skip, sectors)),
        identity,
        tuple(found.sentences),
        tuple(found.findings),
    )


def _compare(saved: SavedTable, live: Mbr, sectors: int) -> _Comparison:
    found = _Comparison()
    partitions = sorted(live.holding_data, key=lambda one: (one.first_lba, one.end_lba))
    found.findings += _check_live(partitions, sectors)
    written = {one.first_lba: one for one in saved.layout.entries}
    seen: set[int] = set()
    for one in partitions:
        entry = written.get(one.first_lba)
        if entry is None:
            found.added.append(one)
        elif one.first_lba not in seen:
            seen.add(one.first_lba)
            found.kept.append((entry, one))
    found.removed = [one for one in saved.layout.entries if one.first_lba not in seen]
    found.findings += _check_moved(found)
    found.findings += _check_unmapped(saved, partitions)
    found.findings += _check_removed(saved, found.removed)
    found.findings += _check_places(saved, partitions)
    return found


def _check_live(partitions: list[MbrPartition], sectors: int) -> list[Finding]:
    found = []
    reach, owner = 1, "the master boot record"
    for one in partitions:
        subject = f"partition {one.number}"
        if one.type in {DYNAMIC_DISK, PROTECTIVE}:
            what = "a dynamic disk" if one.type == DYNAMIC_DISK else "guarded by another GUID partition table"
            found.append(_stop(f"type-{one.type:02x}", subject, f"The disk became {what}.", f"type 0x{one.type:02x}"))
        if one.end_lba > sectors:
            evidence = f"{subject} ends before sector {one.end_lba}, the disk has {sectors}"
            found.append(_stop("partition-leaves-disk", subject, "A partition leaves the disk.", evidence))
        if one.first_lba < reach:
            evidence = f"{owner} ends before sector {reach}, {subject} begins at sector {one.first_lba}"
            found.append(_stop("partitions-overlap", subject, f"It overlaps {owner}.", evidence))
        if one.end_lba > reach:
            reach, owner = one.end_lba, subject
    return found


def _check_moved(found: _Comparison) -> list[Finding]:
    """Refuse a partition that is gone while a new one overlaps it or is as long: it may have been moved."""
    moved = []
    for gone in found.removed:
        for new in found.added:
            overlaps = new.first_lba < gone.end_lba and gone.first_lba < new.end_lba
            if overlaps or new.sectors == gone.sectors:
                evidence = f"it began at sector {gone.first_lba}; partition {new.number} begins at {new.first_lba}"
                message = "The partition was moved, or another one took its place."
                moved.append(_stop("partition-moved", f"partition {gone.gpt_number}", message, evidence))
    return moved


def _check_unmapped(saved: SavedTable, partitions: list[MbrPartition]) -> list[Finding]:
    found = []
    for hidden in saved.layout.unmapped:
        for one in partitions:
            if one.first_lba < hidden.end_lba and hidden.first_lba < one.end_lba:
                message = f"It lies over partition {hidden.gpt_number}, which Generation 1 does not show."
                evidence = f"partition {hidden.gpt_number} takes sectors {hidden.first_lba} to before {hidden.end_lba}"
                found.append(_stop("overlaps-unmapped", f"partition {one.number}", message, evidence))
    return found


def _check_removed(saved: SavedTable, removed: list[LayoutEntry]) -> list[Finding]:
    found = []
    for one in removed:
        partition = saved.gpt.partition(one.gpt_number)
        is_esp = partition is not None and partition.type_guid == EFI_SYSTEM
        if is_esp or one.gpt_number == saved.layout.boot_partition:
            message = "The partition that the machine starts from was removed."
            evidence = f"it began at sector {one.first_lba}"
            found.append(_stop("boot-partition-removed", f"partition {one.gpt_number}", message, evidence))
    return found


def _check_places(saved: SavedTable, partitions: list[MbrPartition]) -> list[Finding]:
    layout = saved.layout
    header = saved.gpt.primary_header()
    places = [
        (layout.core_lba, layout.core_lba + layout.core_sectors, "the boot core", "core-removed"),
        (1, 2, "the saved partition table", "overlaps-gpt"),
        (header.entries_lba, header.entries_end_lba, "the saved partition table", "overlaps-gpt"),
    ]
    found = []
    for first, end, what, rule in places:
        for one in partitions:
            if one.first_lba < end and first < one.end_lba:
                evidence = f"{what} is in sectors {first} to before {end}, it begins at sector {one.first_lba}"
                found.append(_stop(rule, f"partition {one.number}", f"It lies over {what}.", evidence))
    return found


def _check_end(table: Gpt, sectors: int) -> list[Finding]:
    """Refuse a disk that became too small for its own partitions, mapped or not."""
    last = max((one.end_lba for one in table.partitions), default=0)
    if last <= table.header.last_usable_lba + 1:
        return []
    evidence = f"the last one ends before sector {last}, the disk has {sectors} sectors"
    return [_stop("disk-too-small", "disk", "The disk is too small for its partitions and their table.", evidence)]


def _check_room(table: Gpt, sectors: int) -> list[Finding]:
    """Refuse partitions that leave no room for a copy of the table."""
    header = table.backup_header()
    copies = [(1, 2), *((one.entries_lba, one.entries_end_lba) for one in (table.primary_header(), header))]
    copies.append((header.own_lba, header.own_lba + 1))
    found = []
    for one in table.partitions:
        if any(one.first_lba < end and first < one.end_lba for first, end in copies):
            evidence = f"it takes sectors {one.first_lba} to before {one.end_lba} of {sectors}"
            message = "The partition leaves no room for the partition table, which takes 33 sectors at the disk's end."
            finding = _stop("no-room-for-gpt", f"partition {one.number}", message, evidence)
            found.append(replace(finding, remedy="grow the disk by 1 MiB, or shrink the partition in the guest"))
    return found


def _check_core(saved: SavedTable, live: Mbr, device: BlockDevice) -> list[Finding]:
    """Warn where the guest has another boot loader now. It is not needed on the way back."""
    offset = saved.layout.core_lba * SECTOR_BYTES
    core = device.read_at(offset, saved.core_bytes) if offset + saved.core_bytes <= device.size else b""
    if live.boot_code == saved.boot_code and hashlib.sha256(core).hexdigest() == saved.core_digest:
        return []
    evidence = "the boot code or the boot core is not what was written"
    return [_warn("boot-loader-changed", "disk", "The guest installed another boot loader; it is dropped.", evidence)]


def _patch(
    table: Gpt, found: _Comparison, saved: SavedTable, new_guid: Callable[[], UUID]
) -> tuple[Gpt, list[tuple[GptPartition, MbrPartition]]]:
    """Return the table with what the guest changed, and the partitions that it added."""
    for gone in found.removed:
        table = table.without_entry(gone.gpt_number)
        found.sentences.append(f"Partition {gone.gpt_number} was removed: its entry is dropped.")
    for entry, live in found.kept:
        before = table.partition(entry.gpt_number)
        assert before is not None
        after = replace(before, end_lba=live.end_lba, type_guid=_type_after(before, entry, live, saved))
        if after == before:
            continue
        if after.end_lba != before.end_lba:
            change = "grew" if after.end_lba > before.end_lba else "shrank"
            found.sentences.append(
                f"Partition {before.number} {change} from {before.sectors} to {after.sectors} sectors; its GUID stays."
            )
        if after.type_guid != before.type_guid:
            found.sentences.append(f"Partition {before.number} has another type now: {after.type_guid}.")
        table = table.with_entry(after)
    added = []
    for live in found.added:
        taken = {one.number for one in table.partitions}
        # An entry that the guest's table left empty is not given to a new partition while another one is free.
        never = {one.number for one in saved.gpt.partitions}
        numbers = range(1, table.header.entry_count + 1)
        number = next((one for one in numbers if one not in taken | never), None)
        number = number or next((one for one in numbers if one not in taken), None)
        if number is None:
            message = "The partition table has no entry left for it."
            evidence = f"{table.header.entry_count} entries"
            found.findings.append(_stop("no-entry-left", f"partition {live.number}", message, evidence))
            break
        guid = new_guid()
        one = GptPartition(
            number, gpt_type(live.type, saved.system), guid, live.first_lba, live.end_lba, attributes=0, name=""
        )
        table = table.with_entry(one)
        added.append((one, live))
        found.sentences.append(f"Partition {live.number} was added: it becomes partition {number}, GUID {guid}.")
    return table, added


def _with_limits(table: Gpt, sectors: int) -> Gpt:
    """Return a changed table with its backup at the disk's end and its usable sectors stretched to its partitions."""
    if table.primary_header().other_lba != sectors - 1:
        table = table.with_end(sectors)
    header = table.header
    first = min((one.first_lba for one in table.partitions), default=header.first_usable_lba)
    last = max((one.end_lba - 1 for one in table.partitions), default=header.last_usable_lba)
    return replace(
        table,
        header=replace(
            header,
            first_usable_lba=min(header.first_usable_lba, first),
            last_usable_lba=max(header.last_usable_lba, last),
        ),
    )


def _type_after(before: GptPartition, entry: LayoutEntry, live: MbrPartition, saved: SavedTable) -> UUID:
    """Return the GPT type: as it was, but where the guest changed the MBR type to one that means another."""
    same = gpt_type(live.type, saved.system) == gpt_type(entry.type, saved.system)
    if live.type == entry.type or same or before.type_guid == EFI_SYSTEM:
        return before.type_guid
    return gpt_type(live.type, saved.system)


def _identity(
    saved: SavedTable,
    live: Mbr,
    kept: Iterable[tuple[LayoutEntry, MbrPartition]],
    added: Iterable[tuple[GptPartition, MbrPartition]],
) -> DiskIdentity:
    named = [(entry.gpt_number, entry.guid, one) for entry, one in kept]
    named += [(partition.number, partition.guid, one) for partition, one in added]
    partitions = tuple(
        PartitionIdentity(number, guid, one.number, one.first_lba * SECTOR_BYTES, one.sectors)
        for number, guid, one in sorted(named, key=lambda item: item[0])
    )
    return DiskIdentity(saved.gpt.disk_guid, live.signature, partitions)


def _again(saved: SavedTable, device: BlockDevice) -> Reconciliation:
    """Plan the old bytes once more where the first sector is the old one: an undo that was interrupted.

    Only where the table below is the old one too: else the disk went back with a change, or lived on since.
    """
    sectors = device.size // SECTOR_BYTES
    found = _Comparison(sentences=["The disk has its old first sector already: the rest of the old bytes follows."])
    again = _verbatim(saved, sectors, saved.layout.identity(), [], found)
    if sectors == saved.sectors and all(device.read_at(at, len(data)) == data for at, data in again.before_switch):
        return again
    message = "The disk has a GUID partition table in force already, and not the one that was saved."
    evidence = "sector 0 is as it was before the conversion, the table or the disk's size is not"
    return _stopped(saved, [_stop("already-gpt", "disk", message, evidence)])


def _verbatim(
    saved: SavedTable, sectors: int, identity: DiskIdentity, occupied: list[tuple[int, int]], found: _Comparison
) -> Reconciliation:
    header = saved.gpt.primary_header()
    tables = [(1, 2), (header.entries_lba, header.entries_end_lba), *_ends(saved)]
    before = tuple(_inside(saved.original, tables))
    after = tuple(_outside(saved.original, [(0, 1), *tables, *occupied], sectors))
    return Reconciliation(
        saved.gpt, True, before, saved.original_record, after, identity, tuple(found.sentences), tuple(found.findings)
    )


def _guarding_record(saved: SavedTable, sectors: int, sentences: list[str]) -> bytes:
    """Return the first sector of a changed table: the old one, its protective entry stretched over the disk.

    A hybrid record also repeats partitions of the table; it would be wrong now, so a plain protective one replaces it.
    """
    record = saved.original_record
    decoded = decode_record(record)
    used = [] if decoded is None else [one for one in decoded[3] if one.used]
    if decoded is None or [one.type for one in used] != [PROTECTIVE]:
        sentences.append("The first sector becomes a protective master boot record: the old one was none, or a hybrid.")
        return protective_mbr(sectors, boot_code=record[:BOOT_CODE_BYTES])
    if used[0].sectors != min(saved.sectors - 1, LARGEST_SECTORS - 1):
        return record  # Windows writes the largest length whatever the disk's
    at = 446 + 16 * decoded[3].index(used[0])
    length = min(sectors - 1, LARGEST_SECTORS - 1).to_bytes(4, "little")
    fresh = protective_mbr(sectors)[446 + 5 : 446 + 8]  # the last sector as cylinder, head and sector
    entry = record[at : at + 5] + fresh + record[at + 8 : at + _PROTECTIVE_LENGTH_AT] + length
    return record[:at] + entry + record[at + 16 :] if sectors != saved.sectors else record


def _ends(saved: SavedTable) -> list[tuple[int, int]]:
    """Return where the old backup lies, and the last sectors of the old disk."""
    header = saved.gpt.backup_header()
    size = header.entries_sectors + 1
    ranges = [(header.entries_lba, header.entries_end_lba), (header.own_lba, header.own_lba + 1)]
    return [*ranges, (saved.sectors - max(size, 33), saved.sectors)]


def _inside(extents: Iterable[tuple[int, bytes]], ranges: Iterable[tuple[int, int]]) -> Iterable[tuple[int, bytes]]:
    """Yield what of the (offset, data) lies inside of the ranges of sectors."""
    for offset, data in extents:
        first, end = offset // SECTOR_BYTES, (offset + len(data)) // SECTOR_BYTES
        position = first
        for start, stop in sorted(ranges):
            start, stop = max(start, position), min(stop, end)
            if start < stop:
                yield start * SECTOR_BYTES, data[(start - first) * SECTOR_BYTES : (stop - first) * SECTOR_BYTES]
                position = stop


def _outside(
    extents: Iterable[tuple[int, bytes]], ranges: Iterable[tuple[int, int]], sectors: int
) -> Iterable[tuple[int, bytes]]:
    """Yield what of the (offset, data) lies outside of the ranges of sectors, up to the disk's end."""
    free, position = [], 0
    for start, stop in sorted(ranges):
        if start > position:
            free.append((position, min(start, sectors)))
        position = max(position, stop)
    free.append((position, sectors))
    yield from _inside(extents, [one for one in free if one[0] < one[1]])


def _stopped(saved: SavedTable, findings: list[Finding]) -> Reconciliation:
    return Reconciliation(None, False, (), b"", (), saved.layout.identity(), (), tuple(findings))


def _refused(findings: list[Finding]) -> bool:
    return any(one.severity is Severity.REFUSAL for one in findings)


def _stop(rule: str, subject: str, message: str, evidence: str) -> Finding:
    remedy = "undo the change in the guest, or copy the data to the old disk and leave this one"
    return Finding(rule, Severity.REFUSAL, subject, message, evidence, remedy)


def _warn(rule: str, subject: str, message: str, evidence: str) -> Finding:
    return Finding(rule, Severity.WARNING, subject, message, evidence, "")
