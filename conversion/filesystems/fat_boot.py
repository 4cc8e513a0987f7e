"""A FAT volume's boot sector: where its allocation tables, its root folder and its clusters lie.

Layout: the BIOS parameter block of Microsoft's FAT specification (fatgen103), little-endian throughout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import DamagedError, UnsupportedError

BOOT_SECTOR_BYTES: Final = 512  # what is read of it, whatever the sector size
SLOT_BYTES: Final = 32

_COMMON: Final = struct.Struct("<3s8sHBHBHHBHHHII")  # jump … total sectors (32 bits)
_FAT32: Final = struct.Struct("<IHHIHH")  # table sectors, flags, version, root cluster, FSInfo, backup boot sector
assert _COMMON.size == 36
assert _FAT32.size == 16

_MOST_FAT12_CLUSTERS: Final = 4084
_MOST_FAT16_CLUSTERS: Final = 65524
_MOST_FAT32_CLUSTERS: Final = 0x0FFFFFF5
_LARGEST_CLUSTER_BYTES: Final = 256 << 10
_HINT: Final = "check the volume with the guest's own tools (chkdsk, fsck.vfat), then try again"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things lie on the volume. Offsets and lengths are bytes; clusters count from 2."""

    bits: int  # 12, 16 or 32
    sector_bytes: int
    cluster_bytes: int
    cluster_count: int
    tables: tuple[int, ...]  # where each copy of the allocation table that is in use begins; the first is read
    table_bytes: int
    root_offset: int  # of a FAT12 or FAT16 root folder, which has a place of its own; 0 on FAT32
    root_bytes: int
    root_cluster: int  # 0 but on FAT32
    data_offset: int  # of cluster 2
    fsinfo_offset: int  # 0 where there is none
    serial: int

    @property
    def end_cluster(self) -> int:
        """One past the last cluster's number."""
        return self.cluster_count + 2

    def cluster_offset(self, cluster: int) -> int:
        """Return where a cluster begins, bytes."""
        return self.data_offset + (cluster - 2) * self.cluster_bytes

    @classmethod
    def read(cls, device: BlockDevice) -> Geometry:
        """Decode the boot sector of ``device``.

        Raises DamagedError where it is not a FAT volume's or contradicts itself or the device's size, UnsupportedError
        for a FAT32 version this was not written for.
        """
        if device.size < BOOT_SECTOR_BYTES:
            raise _damaged(f"{device.size} bytes are too few for a FAT volume")
        return cls.decode(device.read_at(0, BOOT_SECTOR_BYTES), device.size)

    @classmethod
    def decode(cls, sector: bytes, device_bytes: int) -> Geometry:
        """Decode 512 bytes of boot sector. Raises as ``read``."""
        _check_signature(sector)
        (_, _, sector_bytes, per_cluster, reserved, copies, root_slots, total16, _, table16, _, _, _, total32) = (
            _COMMON.unpack_from(sector)
        )
        _check_sizes(sector_bytes, per_cluster)
        if reserved == 0 or not 1 <= copies <= 4:
            raise _damaged(f"the boot sector says {reserved} reserved sectors and {copies} allocation tables")
        table32, flags, version, root_cluster, fsinfo, _ = _FAT32.unpack_from(sector, _COMMON.size)
        table_sectors = table16 or table32
        root_sectors = -(-root_slots * SLOT_BYTES // sector_bytes)
        data_sector = reserved + copies * table_sectors + root_sectors
        total = total16 or total32
        if table_sectors == 0 or total <= data_sector:
            raise _damaged(f"the boot sector says {total} sectors, of which {data_sector} lie before the data")
        if total * sector_bytes > device_bytes:
            raise _damaged(f"the boot sector says {total * sector_bytes} bytes on a device of {device_bytes}")
        count = (total - data_sector) // per_cluster
        bits = 32 if table16 == 0 else 16 if count > _MOST_FAT12_CLUSTERS else 12
        most = {12: _MOST_FAT12_CLUSTERS, 16: _MOST_FAT16_CLUSTERS, 32: _MOST_FAT32_CLUSTERS}[bits]
        # Linux and Windows use no more clusters than the table has entries for.
        count = min(count, most, table_sectors * sector_bytes * 8 // bits - 2)
        if count < 1:
            raise _damaged("the boot sector leaves no room for a single cluster")
        first, kept = 0, copies
        if bits == 32:
            if version != 0:
                raise UnsupportedError(f"version {version >> 8}.{version & 0xFF} of FAT32 is not known")
            if root_slots or not 2 <= root_cluster < count + 2:
                raise _damaged(f"the boot sector puts the root folder in cluster {root_cluster} of {count}")
            if flags & 0x80:  # one copy is in use, the others are not kept alike
                first, kept = flags & 0x0F, 1
                if first >= copies:
                    raise _damaged(f"the boot sector says that allocation table {first} of {copies} is in use")
        elif root_slots == 0:
            raise _damaged("the boot sector leaves no room for the root folder")
        table_bytes = table_sectors * sector_bytes
        tables = tuple((reserved * sector_bytes) + (first + i) * table_bytes for i in range(kept))
        return cls(
            bits=bits,
            sector_bytes=sector_bytes,
            cluster_bytes=per_cluster * sector_bytes,
            cluster_count=count,
            tables=tables,
            table_bytes=table_bytes,
            root_offset=0 if bits == 32 else (data_sector - root_sectors) * sector_bytes,
            root_bytes=0 if bits == 32 else root_slots * SLOT_BYTES,
            root_cluster=root_cluster if bits == 32 else 0,
            data_offset=data_sector * sector_bytes,
            fsinfo_offset=fsinfo * sector_bytes if bits == 32 and 0 < fsinfo < reserved else 0,
            serial=int.from_bytes(sector[67:71] if bits == 32 else sector[39:43], "little"),
        )


def is_fat(device: BlockDevice) -> bool:
    """Return whether ``device`` begins with the boot sector of a FAT volume."""
    try:
        Geometry.read(device)
    except (DamagedError, UnsupportedError):
        return False
    return True


def _check_signature(sector: bytes) -> None:
    if len(sector) < BOOT_SECTOR_BYTES or sector[510:512] != b"\x55\xaa":
        raise _damaged("the boot sector does not end in 55 AA")
    if sector[0] not in {0xEB, 0xE9} or sector[3:11] in {b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"}:
        raise _damaged("the boot sector is not one of FAT")


def _check_sizes(sector_bytes: int, per_cluster: int) -> None:
    if sector_bytes not in {512, 1024, 2048, 4096}:
        raise _damaged(f"the boot sector says {sector_bytes} bytes to a sector")
    if per_cluster == 0 or per_cluster & (per_cluster - 1):
        raise _damaged(f"the boot sector says {per_cluster} sectors to a cluster, which is no power of two")
    if per_cluster * sector_bytes > _LARGEST_CLUSTER_BYTES:
        raise _damaged(f"the boot sector says {per_cluster * sector_bytes} bytes to a cluster")


def _damaged(message: str) -> DamagedError:
    return DamagedError(message, subject="FAT volume", hint=_HINT)
