"""The values that describe a Linux system: its volumes, kernels, boot configurations and file system table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from uuid import UUID

from conversion.device import BlockDevice
from conversion.filesystems.filesystem import FileSystem
from conversion.filesystems.probe import Probed
from conversion.finding import Finding

# How a device is named: PARTUUID and PARTLABEL change with the partition table. "auto": by nothing at all.
NamedBy: TypeAlias = Literal["uuid", "label", "partuuid", "partlabel", "mapper", "device", "auto", "other"]
Architecture: TypeAlias = Literal["x86_64", "i386", "aarch64", "other", "unknown"]
EntrySource: TypeAlias = Literal["grub", "bls", "uki"]


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the disk. ``device`` is its bytes, ``name`` the GPT's name for it."""

    number: int
    device: BlockDevice
    type_guid: UUID | None = None
    guid: UUID | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Volume:
    """Something with a file system, or that could have one: a partition, a logical volume, a mirror's data."""

    subject: str  # "partition 2", "logical volume vg/root": for people
    partition: Partition | None  # None for a logical volume
    device: BlockDevice
    probed: Probed
    file_system: FileSystem | None
    mapper_name: str = ""  # of a logical volume, below /dev/mapper
    trouble: str = ""  # why there is no file system, where there should be one

    @property
    def uuid(self) -> str:
        """As GRUB's ``search --fs-uuid`` wants it."""
        return self.file_system.uuid if self.file_system is not None else self.probed.uuid


@dataclass(frozen=True, slots=True)
class Distribution:
    """What os-release says."""

    id: str
    version_id: str
    pretty_name: str


@dataclass(frozen=True, slots=True)
class DeviceName:
    """How a kernel command line or fstab names a device."""

    by: NamedBy
    value: str  # without the tag: the UUID, the label, the path; empty for "auto"
    text: str  # as it is written


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image on a file system. Paths begin at the file system's root (btrfs: the topmost subvolume)."""

    version: str
    image: str
    initrd: str | None
    volume: Volume


@dataclass(frozen=True, slots=True)
class BootEntry:
    """A way to start. ``volume`` holds kernel and initrds, None where that could not be told.

    ``command_line`` has its variables replaced as far as they are known. Of a unified kernel image, ``kernel`` is the
    image itself and ``initrds`` is empty.
    """

    source: EntrySource
    config: str  # the file that holds it, for people
    title: str
    kernel: str
    initrds: tuple[str, ...]
    command_line: str
    root: DeviceName
    root_subvolume: str | None
    volume: Volume | None
    version: str = ""


@dataclass(frozen=True, slots=True)
class GrubConfig:
    """A full grub.cfg: ``folder``/``file`` on ``volume``. ``environment`` is grubenv's content beside it."""

    volume: Volume
    folder: str
    file: str
    uses_bls: bool  # it has ``blscfg``
    environment: tuple[tuple[str, str], ...]
    entries: tuple[BootEntry, ...]


@dataclass(frozen=True, slots=True)
class GrubStub:
    """A grub.cfg on the ESP that only leads to the full one: where it looks, None where it does not say."""

    volume: Volume
    path: str
    file_system_uuid: str | None
    prefix: str | None


@dataclass(frozen=True, slots=True)
class SystemdBoot:
    """systemd-boot on the ESP. ``timeout`` and ``default`` are as loader.conf has them."""

    volume: Volume
    timeout: str | None
    default: str | None


@dataclass(frozen=True, slots=True)
class EntriesFolder:
    """A folder of Boot Loader Specification entries, and those that were read from it."""

    volume: Volume
    folder: str
    entries: tuple[BootEntry, ...]


@dataclass(frozen=True, slots=True)
class UnifiedKernel:
    """A unified kernel image. Sections are (offset, length) in the file, bytes; None where it has no such section."""

    volume: Volume
    path: str
    version: str
    pretty_name: str
    command_line: str
    linux: tuple[int, int] | None
    initrd: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class FstabEntry:
    """A line of /etc/fstab; ``line`` counts from 1."""

    line: int
    source: DeviceName
    target: str
    kind: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement in place: ``new`` has as many bytes as ``old``, which is at ``offset`` in the file.

    ``places`` are (device, offset, length) where these bytes lie, in order; the devices are those of partitions.
    """

    volume: Volume
    path: str
    line: int
    offset: int
    old: bytes
    new: bytes
    places: tuple[tuple[BlockDevice, int, int], ...]
    why: str


@dataclass(frozen=True, slots=True)
class LinuxSystem:
    """All that is known. Empty and None fields say that there is none, ``findings`` why that matters."""

    volumes: tuple[Volume, ...]
    distribution: Distribution | None = None
    architecture: Architecture = "unknown"
    root: Volume | None = None
    root_path: str = ""  # of the root on its volume: "" or a btrfs subvolume, such as "/@"
    root_file_system: FileSystem | None = None  # whose paths begin at the root
    kernels: tuple[Kernel, ...] = ()
    grub: tuple[GrubConfig, ...] = ()
    grub_stubs: tuple[GrubStub, ...] = ()
    systemd_boot: SystemdBoot | None = None
    entries_folders: tuple[EntriesFolder, ...] = ()
    unified_kernels: tuple[UnifiedKernel, ...] = ()
    fstab: tuple[FstabEntry, ...] = ()
    edits: tuple[Edit, ...] = ()
    findings: tuple[Finding, ...] = field(default=())

    @property
    def entries(self) -> tuple[BootEntry, ...]:
        """All ways to start, those of grub.cfg first, then Boot Loader Specification entries, then unified kernels."""
        found = [entry for config in self.grub for entry in config.entries]
        found += [entry for folder in self.entries_folders for entry in folder.entries]
        return (*found, *(unified_entry(unified) for unified in self.unified_kernels))

    @property
    def root_argument(self) -> str | None:
        """A root= that outlives a change of the partition table; None where the root is not known."""
        if self.root is None:
            return None
        if self.root.mapper_name:
            return f"root=/dev/mapper/{self.root.mapper_name}"
        return f"root=UUID={self.root.uuid}" if self.root.uuid else None


def unified_entry(unified: UnifiedKernel) -> BootEntry:
    """Return the way to start that a unified kernel image is."""
    from conversion.linux.commandline import root_of, subvolume_of  # noqa: PLC0415 - they are made of these values

    return BootEntry(
        source="uki",
        config=unified.path,
        title=unified.pretty_name or unified.path.rpartition("/")[2],
        kernel=unified.path,
        initrds=(),
        command_line=unified.command_line,
        root=root_of(unified.command_line),
        root_subvolume=subvolume_of(unified.command_line),
        volume=unified.volume,
        version=unified.version,
    )
