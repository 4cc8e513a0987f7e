"""A Windows disk of Generation 2 for tests: GPT, ESP, MSR, Windows and recovery, with the sample hives and stubs.

No file of Microsoft's is in it but the registry hives of public samples: programs are stubs that only say what machine
they are made for. ``build`` makes the disk once; it is small enough to keep.
"""

from __future__ import annotations

import gzip
import shutil
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conversion.device import BlockDevice, Slice
from conversion.filesystems.fat import FatFileSystem
from conversion.filesystems.filesystem import FileSystem
from conversion.filesystems.ntfs import NtfsFileSystem
from conversion.identity import DiskIdentity, PartitionIdentity
from conversion.windows.volume import BASIC_DATA, ESP, MSR, RECOVERY, Volume
from tests.support import ntfs_images
from tests.support.boot_disks import make_fat, run, sparse_file
from tests.support.debian_guest import PATH
from tests.support.hive_builder import build_hive, tree

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples" / "registry"
NO_SAMPLES = "the samples are not beside the checkout (../shared/samples)"

MIB = 1 << 20
SECTOR = 512
SIGNATURE = 0x60D17002
DISK_GUID = uuid.UUID("0b2394a9-095e-487d-8d48-719ecd4d78ca")  # as the sample store names it
ESP_GUID = uuid.UUID("36be3955-63bf-4068-a6ab-00195cca3a22")
MSR_GUID = uuid.UUID("5b1e2f6c-0d0d-4c5e-9a4e-2f1a8b7c6d5e")
RECOVERY_GUID = uuid.UUID("6cdfcd69-de75-4490-8f99-5a84bf264917")
WINDOWS_GUID = uuid.UUID("09931f21-7faf-44a9-81d8-1e73c14b9eaf")  # as the sample SYSTEM hive names C:
STORED_WINDOWS_GUID = uuid.UUID("8e0f2c38-e4ea-47ba-b7fc-9d8c74dccf0b")  # as the sample store names it

DRIVERS = ("atapi", "intelide", "pciide", "storvsc", "vmbus", "vmstorfl")


def missing() -> str:
    """Why such a disk cannot be made here; empty where it can."""
    if not SAMPLES.is_dir():
        return NO_SAMPLES
    tools = [
        tool for tool in ("sgdisk", "mkfs.vfat", "mmd", "mcopy", "mkntfs") if shutil.which(tool, path=PATH) is None
    ]
    if tools:
        return f"not installed: {', '.join(tools)}"
    return "" if ntfs_images.is_available() else "libntfs-3g is not installed"


def sample(name: str) -> bytes:
    """Return a sample, unpacked."""
    return gzip.decompress((SAMPLES / f"{name}.gz").read_bytes())


def program(machine: int = 0x8664, *, build: int = 19041, extra: bytes = b"") -> bytes:
    """Return a stub that says what machine it is made for, and its version."""
    version = struct.pack("<IIII", 0xFEEF04BD, 0x10000, 10 << 16, build << 16 | 1).ljust(52, b"\0")
    header = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine)
    return (header + version + extra).ljust(4096, b"\x90")


def software_hive() -> bytes:
    """Return a SOFTWARE hive that tells the version."""
    values: Mapping[str, tuple[int, bytes] | str | int] = {
        "ProductName": "Windows Server 2019 Standard",
        "CurrentBuild": "17763",
        "EditionID": "ServerStandard",
    }
    return build_hive(tree({r"Microsoft\Windows NT\CurrentVersion": values}))


def esp_files() -> dict[str, bytes]:
    """Return what the EFI system partition holds: the store of the sample, the loaders of stubs."""
    store = sample("BCD").replace(STORED_WINDOWS_GUID.bytes_le, WINDOWS_GUID.bytes_le)
    loader = program(extra=b"bootmgfw")
    return {
        "/EFI/Microsoft/Boot/BCD": store,
        "/EFI/Microsoft/Boot/bootmgfw.efi": loader,
        "/EFI/BOOT/BOOTX64.EFI": loader,
    }


def windows_files(*, machine: int = 0x8664, bootmgr: bytes = b"bootmgr".ljust(400_000, b"\xf4")) -> dict[str, bytes]:
    """Return what the Windows volume holds: the sample's dirty SYSTEM hive with its logs, and stubs."""
    config, system = "/Windows/System32/config", "/Windows/System32"
    files = {
        f"{config}/SYSTEM": sample("SYSTEM_B"),
        f"{config}/SYSTEM.LOG1": sample("SYSTEM_B.LOG1"),
        f"{config}/SYSTEM.LOG2": sample("SYSTEM_B.LOG2"),
        f"{config}/SOFTWARE": software_hive(),
        f"{system}/winload.efi": program(machine),
        f"{system}/winload.exe": program(machine),
        f"{system}/winresume.exe": program(machine),
        f"{system}/ntoskrnl.exe": program(machine),
        "/Windows/Boot/PCAT/bootmgr": bootmgr,
        "/Windows/Boot/PCAT/memtest.exe": program(0x14C),
        "/Windows/Boot/PCAT/en-US/bootmgr.exe.mui": b"messages" * 9000,
        "/Windows/Boot/Fonts/wgl4_boot.ttf": b"font" * 12000,
        "/Windows/Boot/Fonts/chs_boot.ttf": b"font" * 900_000,
    }
    return files | {f"{system}/drivers/{name}.sys": program() for name in DRIVERS}


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition to make. ``files`` None: no file system."""

    kind: uuid.UUID
    guid: uuid.UUID
    size_mib: int
    name: str
    files: Mapping[str, bytes] | None = None


@dataclass(frozen=True, slots=True)
class WindowsDisk:
    """A disk that was made. Ranges are bytes."""

    path: Path
    partitions: tuple[Partition, ...]
    ranges: tuple[tuple[int, int], ...] = field(default=())

    def volumes(self, device: BlockDevice) -> tuple[Volume, ...]:
        """Return the partitions on ``device``, which holds the disk."""
        volumes: list[Volume] = []
        for number, (partition, (start, size)) in enumerate(zip(self.partitions, self.ranges, strict=True), 1):
            part = Slice(device, start, size)
            filesystem: FileSystem | None = None
            if partition.files is not None:
                filesystem = FatFileSystem(part) if partition.kind == ESP else NtfsFileSystem(part)
            volumes.append(Volume(number, part, partition.kind, partition.guid, filesystem))
        return tuple(volumes)

    def identity(self, *, signature: int = SIGNATURE) -> DiskIdentity:
        """Return the places of the partitions that an MBR keeps."""
        places = [
            (number, partition.guid, start, size)
            for number, (partition, (start, size)) in enumerate(zip(self.partitions, self.ranges, strict=True), 1)
            if partition.kind != MSR
        ]
        partitions = tuple(
            PartitionIdentity(number, guid, mbr_number, start, size // SECTOR)
            for mbr_number, (number, guid, start, size) in enumerate(places, 1)
        )
        return DiskIdentity(DISK_GUID, signature, partitions)


def standard_layout(
    *, esp: Mapping[str, bytes] | None = None, windows: Mapping[str, bytes] | None = None
) -> tuple[Partition, ...]:
    """Return ESP, MSR, Windows and recovery, as Windows' own setup lays them out."""
    return (
        Partition(ESP, ESP_GUID, 100, "EFI system partition", esp_files() if esp is None else esp),
        Partition(MSR, MSR_GUID, 16, "Microsoft reserved partition"),
        Partition(
            BASIC_DATA, WINDOWS_GUID, 64, "Basic data partition", windows_files() if windows is None else windows
        ),
        Partition(RECOVERY, RECOVERY_GUID, 8, "Recovery", {"/Recovery/WindowsRE/Winre.wim": b"image" * 1000}),
    )


def build(path: Path, partitions: Sequence[Partition] | None = None) -> WindowsDisk:
    """Make the disk as the raw image ``path``."""
    made = tuple(partitions) if partitions is not None else standard_layout()
    total_mib = 2 + sum(partition.size_mib for partition in made)
    sparse_file(path, total_mib * MIB)
    options: list[str] = [f"--disk-guid={DISK_GUID}"]
    ranges: list[tuple[int, int]] = []
    start = MIB
    for number, partition in enumerate(made, 1):
        size = partition.size_mib * MIB
        options += [
            f"--new={number}:{start // SECTOR}:{(start + size) // SECTOR - 1}",
            f"--typecode={number}:{partition.kind}",
        ]
        options += [f"--partition-guid={number}:{partition.guid}", f"--change-name={number}:{partition.name}"]
        ranges.append((start, size))
        start += size
    run("sgdisk", "--clear", *options, path)
    for partition, (begin, size) in zip(made, ranges, strict=True):
        if partition.files is None:
            continue
        if partition.kind == ESP:
            make_fat(path, begin // SECTOR, size // SECTOR, dict(partition.files), volume="57494E45")
        else:
            _make_ntfs(path, begin, size, partition.files)
    return WindowsDisk(path, made, tuple(ranges))


def _make_ntfs(disk: Path, start: int, size: int, files: Mapping[str, bytes]) -> None:
    volume = sparse_file(disk.with_suffix(".ntfs"), size)
    run("mkntfs", "-q", "-F", "-f", "-p", str(start // SECTOR), "-H", "255", "-S", "63", volume)
    ntfs_images.fill(volume, files)
    run("dd", f"if={volume}", f"of={disk}", "bs=1M", f"seek={start // MIB}", "conv=notrunc,sparse", "status=none")
    volume.unlink()
