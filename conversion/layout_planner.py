"""Planning how the partitions of a GUID partition table fit under a master boot record: pure, no device is touched.

Four entries are enough for most disks once what means nothing to a BIOS is left out. Where they are not, what a guest
runs without is left out too, and else an extended partition takes the neighbours behind a gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from conversion.errors import RefusedError
from conversion.finding import Finding, Severity
from conversion.free_sectors import FreeSectors
from conversion.gpt import Gpt, GptPartition
from conversion.layout import SECTOR_BYTES, ExtendedPartition, Layout, LayoutEntry, UnmappedPartition
from conversion.mbr import LARGEST_SECTORS
from conversion.partition_types import (
    DISPENSABLE,
    DYNAMIC_DISK,
    MICROSOFT_RESERVED,
    NEVER_MAPPED,
    System,
    fallback_type,
    mbr_type,
)

LARGEST_FIXED_VHD_SECTORS: Final = 0xFF000000  # 2040 GiB
LARGEST_LOGICAL_PARTITIONS: Final = 56  # sfdisk reads 60 partitions in all
_ALIGNMENT_SECTORS: Final = 2048


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """A layout and what to know of it, or no layout and the refusals that say why."""

    layout: Layout | None
    findings: tuple[Finding, ...]

    def require(self) -> Layout:
        """Return the layout. Raises RefusedError, naming every reason, where there is none."""
        if self.layout is not None:
            return self.layout
        refusals = [one for one in self.findings if one.severity is Severity.REFUSAL]
        raise RefusedError(
            " ".join(f"{one.message} ({one.evidence})" for one in refusals),
            subject=refusals[0].subject,
            hint="; ".join(one.remedy for one in refusals),
        )


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Which partitions become primary and which logical, and where the boot records and the core go."""

    primaries: tuple[GptPartition, ...]
    logicals: tuple[GptPartition, ...]
    ebr_lbas: tuple[int, ...]
    core_lba: int


def plan_layout(
    gpt: Gpt,
    *,
    sectors: int,
    sector_size: int,
    system: System,
    boot_partition: int,
    core_sectors: int,
    may_leave: Collection[int] = frozenset(),
    taken_signatures: Collection[int] = frozenset(),
    largest_sectors: int | None = None,
) -> PlannedLayout:
    """Plan the layout of a disk of ``sectors`` sectors under a master boot record.

    ``boot_partition`` is the GPT number of the partition that holds the BIOS boot files: it is active, and never left
    out. ``may_leave`` are the numbers of partitions that the guest runs without; recovery and swap partitions are
    such in any case. ``largest_sectors`` is the size that the target can take, for instance
    ``LARGEST_FIXED_VHD_SECTORS``. The same input gives the same layout, always.
    """
    refusals = [
        *_refuse_disk(gpt, sectors, sector_size, largest_sectors),
        *_refuse_partitions(gpt, sectors, boot_partition),
    ]
    if refusals:
        return PlannedLayout(None, tuple(refusals))
    candidates = sorted((one for one in gpt.partitions if one.type_guid not in NEVER_MAPPED), key=_by_place)
    optional = [
        one
        for one in candidates
        if one.number != boot_partition and (one.type_guid in DISPENSABLE or one.number in may_leave)
    ]
    free = _free_sectors(gpt, sectors)
    if not free.places(core_sectors):
        return PlannedLayout(None, (_no_room_for_core(free, core_sectors),))
    left_out = _to_leave_out(candidates, optional)
    tries = [left_out] if len(candidates) - len(left_out) <= 4 else [[], optional] if optional else [[]]
    for left in tries:
        mapped = [one for one in candidates if one not in left]
        arrangement = _arrange(mapped, free, boot_partition, core_sectors)
        if arrangement is not None:
            layout = _compose(gpt, arrangement, left, system, boot_partition, core_sectors, taken_signatures)
            return PlannedLayout(layout, tuple(_notes(layout, gpt, sectors, system, boot_partition)))
    return PlannedLayout(None, (_too_many(candidates, free),))


def derive_signature(disk_guid: UUID, taken: Collection[int] = frozenset()) -> int:
    """Return the disk signature for a GUID: the same for the same one, never 0 and never one that is taken."""
    counter = 0
    while True:
        digest = hashlib.sha256(b"MBR signature" + disk_guid.bytes_le + counter.to_bytes(8, "little")).digest()
        signature = int.from_bytes(digest[:4], "little")
        if signature != 0 and signature not in taken:
            return signature
        counter += 1


def _by_place(partition: GptPartition) -> int:
    return partition.first_lba


def _table_ranges(gpt: Gpt, sectors: int) -> list[tuple[int, int]]:
    """Return where both copies lie, and the end of the disk, where the backup comes to lie on the way back."""
    primary, backup = gpt.primary_header(), gpt.backup_header()
    moved = gpt.with_end(sectors).backup_header()
    ranges = [(0, 2)]
    for header in (primary, backup, moved):
        ranges.append((header.entries_lba, header.entries_end_lba))
        ranges.append((header.own_lba, header.own_lba + 1))
    return ranges


def _free_sectors(gpt: Gpt, sectors: int) -> FreeSectors:
    used = [(one.first_lba, one.end_lba) for one in gpt.partitions if one.type_guid not in NEVER_MAPPED]
    return FreeSectors.between([*_table_ranges(gpt, sectors), *used], min(sectors, LARGEST_SECTORS))


def _to_leave_out(candidates: list[GptPartition], optional: list[GptPartition]) -> list[GptPartition]:
    """Return as many optional partitions as are too many for four entries: recovery and swap, then the last ones."""
    surplus = max(len(candidates) - 4, 0)
    wanted = sorted(optional, key=lambda one: (one.type_guid not in DISPENSABLE, -one.first_lba))
    return wanted[:surplus]


def _arrange(
    mapped: list[GptPartition], free: FreeSectors, boot_partition: int, core_sectors: int
) -> _Arrangement | None:
    """Return the best arrangement: four primaries, or the fewest logical partitions with the boot partition primary.

    The core goes to the first gap with room, which is the one right behind the table wherever that is possible.
    """
    count = len(mapped)
    if count <= 4:
        return _Arrangement(tuple(mapped), (), (), free.places(core_sectors)[0])
    if count - 3 > LARGEST_LOGICAL_PARTITIONS:
        return None
    runs = [(first, end) for first in range(count) for end in range(first + 1, count + 1) if end - first >= count - 3]
    boot = next(index for index, one in enumerate(mapped) if one.number == boot_partition)
    runs.sort(key=lambda run: (run[0] <= boot < run[1], run[1] - run[0], -run[0]))
    for core_lba in free.places(core_sectors):
        left = free.without(core_lba, core_lba + core_sectors)
        for first, end in runs:
            ebr_lbas = _place_records(mapped[first - 1].end_lba if first else 0, mapped[first:end], left)
            if ebr_lbas is not None:
                return _Arrangement((*mapped[:first], *mapped[end:]), tuple(mapped[first:end]), ebr_lbas, core_lba)
    return None


def _place_records(lowest_lba: int, logicals: list[GptPartition], free: FreeSectors) -> tuple[int, ...] | None:
    """Return the sectors of the boot records, ascending, each below its partition and all from ``lowest_lba`` on.

    A partition's record goes to the nearest gap below it, 1 MiB below the gap's end where there is as much.
    """
    gaps = [[max(first, lowest_lba), end] for first, end in free.ranges if end <= logicals[-1].first_lba]
    gaps = [[max(first, end - _ALIGNMENT_SECTORS), end] for first, end in gaps if first < end]
    taken = []
    for one in logicals:
        gap = next((gap for gap in reversed(gaps) if gap[1] <= one.first_lba and gap[0] < gap[1]), None)
        if gap is None:
            return None
        taken.append(gap[0])
        gap[0] += 1
    return tuple(sorted(taken))


def _compose(
    gpt: Gpt,
    arrangement: _Arrangement,
    left_out: list[GptPartition],
    system: System,
    boot_partition: int,
    core_sectors: int,
    taken_signatures: Collection[int],
) -> Layout:
    numbers = _number_primaries(arrangement.primaries)
    places: list[tuple[GptPartition, int, int | None]] = [
        (one, numbers[one.number], None) for one in arrangement.primaries
    ]
    places += [
        (one, 5 + index, ebr_lba)
        for index, (one, ebr_lba) in enumerate(zip(arrangement.logicals, arrangement.ebr_lbas, strict=True))
    ]
    entries = []
    for one, number, ebr_lba in places:
        kind = mbr_type(one.type_guid, system)
        kind = fallback_type(system) if kind is None else kind
        active = one.number == boot_partition and ebr_lba is None
        entries.append(LayoutEntry(one.number, one.guid, number, kind, one.first_lba, one.end_lba, active, ebr_lba))
    extended = None
    if arrangement.logicals:
        slot = max({1, 2, 3, 4} - set(numbers.values()))
        extended = ExtendedPartition(slot, arrangement.ebr_lbas[0], arrangement.logicals[-1].end_lba)
    return Layout(
        gpt.disk_guid,
        derive_signature(gpt.disk_guid, taken_signatures),
        tuple(sorted(entries, key=lambda one: one.number)),
        tuple(_unmapped(one, left_out) for one in gpt.partitions if one.type_guid in NEVER_MAPPED or one in left_out),
        extended,
        boot_partition,
        arrangement.core_lba,
        core_sectors,
    )


def _number_primaries(primaries: tuple[GptPartition, ...]) -> dict[int, int]:
    """Return GPT number → slot: a number up to 4 is kept, as fstab may have it; the others take what is free."""
    kept = {one.number: one.number for one in primaries if one.number <= 4}
    open_slots = [slot for slot in (1, 2, 3, 4) if slot not in kept]
    others = [one.number for one in primaries if one.number > 4]
    return kept | dict(zip(others, open_slots, strict=False))


def _unmapped(partition: GptPartition, left_out: list[GptPartition]) -> UnmappedPartition:
    if partition in left_out:
        why = "four entries are too few, and the guest runs without it"
    elif partition.type_guid == MICROSOFT_RESERVED:
        why = "Windows keeps a reserved partition on GPT disks alone"
    else:
        why = "it serves GRUB on GPT disks alone"
    return UnmappedPartition(partition.number, partition.guid, partition.first_lba, partition.end_lba, why)


def _refuse_disk(gpt: Gpt, sectors: int, sector_size: int, largest_sectors: int | None) -> list[Finding]:
    found = []
    if sector_size != SECTOR_BYTES:
        found.append(
            _refusal(
                "4k-sectors",
                "disk",
                "A BIOS boots from disks with sectors of 512 bytes only.",
                f"the logical sector size is {sector_size} bytes",
                "copy the disk to one with 512-byte logical sectors; it cannot be converted as it is",
            )
        )
    if largest_sectors is not None and sectors > largest_sectors:
        found.append(
            _refusal(
                "disk-too-large",
                "disk",
                "The disk is larger than the target format can be.",
                f"{sectors} sectors of {sector_size} bytes; the target takes {largest_sectors}",
                "shrink the disk, or recover to a platform that takes another format",
            )
        )
    ranges = _table_ranges(gpt, sectors)
    if sector_size == SECTOR_BYTES and any(end > sectors or first < 0 for first, end in ranges):
        found.append(
            _refusal(
                "gpt-inconsistent",
                "partition table",
                "The copies of the partition table do not fit on the disk.",
                f"they lie at sectors {ranges[1:]}, the disk has {sectors}",
                "repair the table in the guest (sgdisk -e), then replicate again",
            )
        )
    return found


def _refuse_partitions(gpt: Gpt, sectors: int, boot_partition: int) -> list[Finding]:
    found = []
    for one in gpt.partitions:
        subject = f"partition {one.number}"
        if one.type_guid in DYNAMIC_DISK:
            found.append(
                _refusal(
                    "dynamic-disk",
                    subject,
                    "The disk is a dynamic disk (LDM): its volumes are described outside of the partition table.",
                    f"the type of {subject} is {one.type_guid}",
                    "convert the disk to a basic one in Windows, then replicate again",
                )
            )
        if not 0 < one.first_lba < one.end_lba <= sectors:
            found.append(
                _refusal(
                    "gpt-inconsistent",
                    subject,
                    "A partition is empty or leaves the disk.",
                    f"it takes the sectors from {one.first_lba} to before {one.end_lba}, the disk has {sectors}",
                    "repair the table in the guest (sgdisk -v tells more), then replicate again",
                )
            )
        elif one.type_guid not in NEVER_MAPPED and one.end_lba > LARGEST_SECTORS - 1:
            found.append(
                _refusal(
                    "partition-beyond-2tib",
                    subject,
                    "A partition reaches beyond 2 TiB, which a master boot record cannot describe.",
                    f"it ends before sector {one.end_lba}, the limit is {LARGEST_SECTORS - 1}",
                    "shrink the partition below 2 TiB, or move its data to another disk",
                )
            )
    found += _refuse_overlaps(gpt)
    boot = gpt.partition(boot_partition)
    if boot is None or boot.type_guid in NEVER_MAPPED:
        found.append(
            _refusal(
                "boot-partition-missing",
                f"partition {boot_partition}",
                "The partition to boot from is not in the table.",
                f"the table has the partitions {[one.number for one in gpt.partitions]}",
                "name another partition to boot from",
            )
        )
    return found


def _refuse_overlaps(gpt: Gpt) -> list[Finding]:
    # Tables are compared with partitions too: entries that reach into one would be overwritten on the way back.
    placed = [(one.first_lba, one.end_lba, f"partition {one.number}") for one in gpt.partitions]
    primary, backup = gpt.primary_header(), gpt.backup_header()
    for header, name in ((primary, "the primary table"), (backup, "the backup table")):
        placed.append((header.entries_lba, header.entries_end_lba, name))
        placed.append((header.own_lba, header.own_lba + 1, f"the header of {name}"))
    placed.append((0, 1, "the master boot record"))
    placed.sort()
    found = []
    reach, owner = 0, "the disk's start"
    for first, end, name in placed:
        if first < min(reach, end):
            found.append(
                _refusal(
                    "gpt-inconsistent",
                    name,
                    f"It overlaps {owner}.",
                    f"{owner} ends before sector {reach}, {name} begins at sector {first}",
                    "repair the table in the guest (sgdisk -v tells more), then replicate again",
                )
            )
        if end > reach:
            reach, owner = end, name
    return found


def _no_room_for_core(free: FreeSectors, core_sectors: int) -> Finding:
    largest = max((end - first for first, end in free.ranges), default=0)
    return _refusal(
        "no-room-for-core",
        "disk",
        "There is no room for the boot core between the partitions.",
        f"it needs {core_sectors} sectors in one piece, the largest gap has {largest}",
        "shrink a partition by 1 MiB or more in the guest, then replicate again",
    )


def _too_many(candidates: list[GptPartition], free: FreeSectors) -> Finding:
    gaps = sum(1 for first, end in free.ranges if end > first)
    return _refusal(
        "too-many-partitions",
        "partition table",
        "The disk has more partitions than four entries hold, and no gap in front of them for the records of an "
        "extended partition.",
        f"{len(candidates)} partitions to map, {gaps} gaps, at most {LARGEST_LOGICAL_PARTITIONS} logical partitions",
        "remove or shrink a partition, or name partitions that may be left out",
    )


def _notes(layout: Layout, gpt: Gpt, sectors: int, system: System, boot_partition: int) -> list[Finding]:
    found = []
    boot = layout.entry(boot_partition)
    if boot is not None and boot.kind == "logical":
        message = "The partition to boot from becomes a logical one, so none is active; some BIOSes want one."
        evidence = f"partition {boot_partition} becomes number {boot.number}"
        found.append(
            _told("boot-partition-logical", Severity.WARNING, f"partition {boot_partition}", message, evidence)
        )
    if sectors > LARGEST_SECTORS:
        message = "The disk is larger than 2 TiB: as Generation 1 it can use no more than 2 TiB."
        found.append(_told("disk-beyond-2tib", Severity.WARNING, "disk", message, f"it has {sectors} sectors"))
    for one in layout.unmapped:
        message = f"The partition does not appear in Generation 1: {one.why}. It comes back in Generation 2."
        evidence = f"sectors {one.first_lba} to before {one.end_lba}"
        found.append(_told("partition-unmapped", Severity.NOTE, f"partition {one.gpt_number}", message, evidence))
    if layout.extended is not None and len(layout.entries) > 0:
        message = "The disk gets an extended partition; Linux and GRUB take it, Windows was not seen to boot from one."
        numbers = [one.gpt_number for one in layout.entries if one.kind == "logical"]
        severity = Severity.WARNING if system == "windows" else Severity.NOTE
        found.append(_told("extended-partition", severity, "partition table", message, f"partitions {numbers}"))
    for entry in layout.entries:
        partition = gpt.partition(entry.gpt_number)
        if partition is not None and mbr_type(partition.type_guid, system) is None:
            message = f"The partition's type is not known; it gets type 0x{entry.type:02x} in Generation 1."
            evidence = f"its type is {partition.type_guid}"
            found.append(
                _told("partition-type-unknown", Severity.NOTE, f"partition {partition.number}", message, evidence)
            )
    return found


def _refusal(rule: str, subject: str, message: str, evidence: str, remedy: str) -> Finding:
    return Finding(rule, Severity.REFUSAL, subject, message, evidence, remedy)


def _told(rule: str, severity: Severity, subject: str, message: str, evidence: str) -> Finding:
    return Finding(rule, severity, subject, message, evidence, "")
