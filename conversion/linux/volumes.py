"""Finding every volume of a disk: through partitions, mirrors and volume groups, down to the file systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import ConversionError
from conversion.filesystems.filesystem import FileSystem
from conversion.filesystems.probe import Probed, open_filesystem, probe
from conversion.finding import Finding, Severity
from conversion.linux.system import Partition, Volume
from conversion.volumes import LuksHeader, read_luks, read_lvm, read_raid_member

LINUX_KINDS: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "swap", "swsuspend", "jbd"})
_MEMBERS: Final = frozenset({"LVM2_member", "linux_raid_member", "crypto_LUKS"})
MOST_VOLUMES: Final = 512


@dataclass(frozen=True, slots=True)
class Found:
    """All volumes, the encrypted ones with what encrypts them, and what is to be said of them."""

    volumes: tuple[Volume, ...]
    encrypted: tuple[tuple[Volume, LuksHeader], ...]
    findings: tuple[Finding, ...]

    @property
    def is_linux(self) -> bool:
        """Whether anything here is Linux's."""
        return any(volume.probed.kind in LINUX_KINDS | _MEMBERS for volume in self.volumes)


def find_volumes(partitions: Sequence[Partition]) -> Found:
    """Return what the partitions hold. Never raises for what is on them."""
    volumes: list[Volume] = []
    findings: list[Finding] = []
    for partition in partitions:
        subject = f"partition {partition.number}"
        volume = _volume(subject, partition, partition.device)
        volumes.append(volume)
        if volume.probed.kind == "linux_raid_member":
            volumes += _raid(volume, findings)
    members = [volume.device for volume in volumes if volume.probed.kind == "LVM2_member"]
    volumes += _logical(members, findings)
    encrypted = []
    for volume in volumes:
        header = read_luks(volume.device) if volume.probed.kind == "crypto_LUKS" else None
        if header is not None:
            encrypted.append((volume, header))
        findings += _state(volume)
    return Found(tuple(volumes[:MOST_VOLUMES]), tuple(encrypted), tuple(findings))


def _volume(subject: str, partition: Partition | None, device: BlockDevice, mapper_name: str = "") -> Volume:
    probed, file_system, trouble = Probed(None), None, ""
    try:
        probed = probe(device)
        file_system = open_filesystem(device)
    except ConversionError as error:
        trouble = str(error)
    return Volume(subject, partition, device, probed, file_system, mapper_name, trouble)


def _raid(member: Volume, findings: list[Finding]) -> list[Volume]:
    try:
        found = read_raid_member(member.device)
        trouble = found.trouble if found is not None else ""
    except ConversionError as error:
        found, trouble = None, str(error)
    if found is None or found.device is None:
        findings.append(
            Finding(
                "raid-unsupported",
                Severity.WARNING,
                member.subject,
                "This member of a RAID array cannot be read.",
                trouble,
                "Only mirrors (RAID 1) can be looked into; the array itself is left as it is.",
            )
        )
        return []
    return [_volume(f"{member.subject}, array {found.name or found.uuid}", member.partition, found.device)]


def _logical(members: Sequence[BlockDevice], findings: list[Finding]) -> list[Volume]:
    try:
        logical = read_lvm(members)
    except ConversionError as error:
        findings.append(
            Finding(
                "lvm-damaged",
                Severity.WARNING,
                "LVM",
                "The volume groups cannot be read.",
                str(error),
                "Run vgck in the guest.",
            )
        )
        return []
    found = []
    for volume in logical:
        subject = f"logical volume {volume.group}/{volume.name}"
        if volume.device is not None:
            found.append(_volume(subject, None, volume.device, volume.mapper_name))
            continue
        findings.append(
            Finding(
                "lvm-unsupported",
                Severity.WARNING,
                subject,
                "This logical volume cannot be read.",
                volume.trouble,
                "Linear and striped volumes on this one disk can be looked into; if it is none the system starts from, "
                "nothing needs doing.",
            )
        )
    return found


def _state(volume: Volume) -> list[Finding]:
    """Return what is to be said of a volume's own state."""
    found = []
    if volume.trouble:
        found.append(
            Finding(
                "unreadable-file-system",
                Severity.WARNING,
                volume.subject,
                f"There is a file system ({volume.probed.kind}) that cannot be read.",
                volume.trouble,
                "Check it in the guest; if the system does not start from it, nothing needs doing.",
            )
        )
    if volume.probed.kind == "swsuspend":
        found.append(
            Finding(
                "hibernated",
                Severity.REFUSAL,
                volume.subject,
                "The machine is hibernated: its memory would be resumed onto other hardware.",
                "the swap space has the signature of a hibernation image",
                "Start the machine, shut it down, and let a new recovery point be made.",
            )
        )
    dirty = _dirty(volume.file_system)
    if dirty is not None:
        found.append(Finding(dirty[0], dirty[1], volume.subject, dirty[2], dirty[3], dirty[4]))
    return found


def _dirty(file_system: FileSystem | None) -> tuple[str, Severity, str, str, str] | None:
    """Return rule, severity, message, evidence and remedy where a file system was not cleanly unmounted."""
    if file_system is None or file_system.kind in {"vfat", "ntfs"}:
        return None
    try:
        dirty = bool(getattr(file_system, "is_dirty", False))
        trouble = str(getattr(file_system, "journal_trouble", ""))
    except ConversionError as error:
        dirty, trouble = True, error.message
    if trouble:
        return "journal-unreadable", Severity.WARNING, _UNREADABLE, trouble, "Check the file system in the guest."
    if not dirty:
        return None
    replay = getattr(file_system, "replay", None)
    if replay is not None and not replay.fast_commits:
        evidence = f"{replay.transactions} transactions, {len(replay.blocks)} blocks to replay"
        return "journal-replayed", Severity.NOTE, _REPLAYED, evidence, _WAIT
    return "journal-dirty", Severity.NOTE, _DIRTY, "the log holds changes that are not in their places yet", _WAIT


_UNREADABLE: Final = "Its journal cannot be read; what was written last may be missing here and for the boot loader."
_REPLAYED: Final = (
    "It was in use when it was copied. Its journal has been taken into account here, but a boot loader does not do "
    "that: a kernel installed in the last seconds may be missing for it."
)
_DIRTY: Final = (
    "It was in use when it was copied: what was written in the last seconds may be missing here, and for the boot "
    "loader as well."
)
_WAIT: Final = "After installing a kernel, wait for a minute (or run sync) before the machine is failed over."
