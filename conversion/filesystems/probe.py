"""What a partition holds, by its signatures, in blkid's words; and the reader for it, where there is one."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from conversion.device import BlockDevice
from conversion.errors import ConversionError
from conversion.filesystems.btrfs import BtrfsFileSystem
from conversion.filesystems.ext import ExtFileSystem
from conversion.filesystems.fat import FatFileSystem
from conversion.filesystems.filesystem import FileSystem
from conversion.filesystems.ntfs import NtfsFileSystem
from conversion.filesystems.walk import printable, uuid_text
from conversion.filesystems.xfs import XfsFileSystem

EXT_KINDS: Final = frozenset({"ext2", "ext3", "ext4"})
_HEAD_BYTES: Final = 68 << 10  # up to btrfs's superblock and the largest page's swap signature
_SWAP_PAGES: Final = (4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True, slots=True)
class Probed:
    """What is on a device. ``kind`` is blkid's TYPE, None where nothing is known; UUID and label may be empty.

    ``detail`` tells variants apart: ``hibernated`` for a swap space that holds a machine's memory.
    """

    kind: str | None
    uuid: str = ""
    label: str = ""
    detail: str = ""


def probe(device: BlockDevice) -> Probed:
    """Return what ``device`` holds. Damage beyond the signatures is not looked for; reads about 70 KiB."""
    head = device.read_at(0, min(_HEAD_BYTES, device.size)).ljust(_HEAD_BYTES, b"\0")
    for look in (_luks, _raid, _lvm, _boot_sector, _linux, _swap, _optical):
        found = look(head, device)
        if found is not None:
            return found
    return Probed(None)


def open_filesystem(device: BlockDevice) -> FileSystem | None:
    """Return a reader for the file system on ``device``; None where there is none, or none that can be read here.

    Raises DamagedError or UnsupportedError where there is one of a kind that is read here and it cannot be.
    """
    kind = probe(device).kind
    if kind == "vfat":
        return FatFileSystem(device)
    if kind == "ntfs":
        return NtfsFileSystem(device)
    if kind in EXT_KINDS:
        return ExtFileSystem(device)
    if kind == "xfs":
        return XfsFileSystem(device)
    return BtrfsFileSystem(device) if kind == "btrfs" else None


def _luks(head: bytes, _: BlockDevice) -> Probed | None:
    if head[:6] != b"LUKS\xba\xbe":
        return None
    label = printable(head[0x18:0x48]) if head[6:8] == b"\0\x02" else ""
    return Probed("crypto_LUKS", printable(head[0xA8:0xD0]), label)


def _raid(head: bytes, device: BlockDevice) -> Probed | None:
    for offset, version in ((4096, "1.2"), (0, "1.1")):
        if head[offset : offset + 8] == b"\xfc\x4e\x2b\xa9\1\0\0\0":
            return _raid_member(head[offset : offset + 256], version)
    # Versions 1.0 and 0.90 are at the end, so that the members begin as the array does: to be asked before it.
    if device.size < 128 << 10:
        return None
    end = device.size & ~511
    at = ((end >> 9) - 16 & ~7) << 9
    tail = device.read_at(at, 256)
    if tail[:8] == b"\xfc\x4e\x2b\xa9\1\0\0\0" and int.from_bytes(tail[144:152], "little") == at >> 9:
        return _raid_member(tail, "1.0")
    old = device.read_at((device.size & ~0xFFFF) - 65536, 64)
    if old[:4] == b"\xfc\x4e\x2b\xa9" and old[4:8] == bytes(4):
        words = [old[at : at + 4][::-1].hex() for at in (20, 52, 56, 60)]
        return Probed("linux_raid_member", _dashed("".join(words)), "", "0.90")
    return None


def _raid_member(superblock: bytes, version: str) -> Probed:
    return Probed("linux_raid_member", uuid_text(superblock[16:32]), printable(superblock[32:64]), version)


def _lvm(head: bytes, _: BlockDevice) -> Probed | None:
    for sector in range(4):
        label = head[sector * 512 : sector * 512 + 512]
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            raw = label[32:64].decode("ascii", "replace")
            cuts = (0, 6, 10, 14, 18, 22, 26, 32)
            return Probed("LVM2_member", "-".join(raw[cuts[i] : cuts[i + 1]] for i in range(7)))
    return None


def _boot_sector(head: bytes, _: BlockDevice) -> Probed | None:
    name = head[3:11]
    if name == b"-FVE-FS-" or _BITLOCKER_GUID in {head[0xA0:0xB0], head[0x1A8:0x1B8]}:
        return Probed("BitLocker")
    if name == b"ReFS\0\0\0\0":
        return Probed("ReFS")
    if name == b"EXFAT   ":
        return Probed("exfat", _serial(head, 0x64))
    if name == b"NTFS    ":
        return Probed("ntfs", head[0x48:0x50][::-1].hex().upper())
    return _fat(head) if head[510:512] == b"\x55\xaa" and head[0] in {0xEB, 0xE9} else None


def _fat(head: bytes) -> Probed | None:
    sector, cluster, reserved, copies = struct.unpack_from("<HBHB", head, 0x0B)
    is_fat = sector in {512, 1024, 2048, 4096} and cluster and not cluster & (cluster - 1) and reserved
    if not is_fat or copies not in {1, 2} or head[0x15] < 0xF0:
        return None
    extended = 0x26 if any(head[0x16:0x18]) else 0x42  # FAT32 has no 16-bit length of its tables
    if head[extended] not in {0x28, 0x29}:
        return Probed("vfat")
    label = printable(head[extended + 5 : extended + 16])
    return Probed("vfat", _serial(head, extended + 1), "" if label == "NO NAME" else label)


def _serial(head: bytes, at: int) -> str:
    serial = head[at : at + 4][::-1].hex().upper()
    return f"{serial[:4]}-{serial[4:]}"


_BITLOCKER_GUID: Final = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")  # of BitLocker To Go as well


def _linux(head: bytes, device: BlockDevice) -> Probed | None:
    if head[:4] == b"XFSB":
        return Probed("xfs", uuid_text(head[32:48]), printable(head[108:120]))
    if head[0x10040:0x10048] == b"_BHRfS_M":
        return Probed("btrfs", uuid_text(head[0x10020:0x10030]), printable(head[0x1012B:0x1022B]))
    if head[1024 + 0x38 : 1024 + 0x3A] == b"\x53\xef":
        uuid, label = uuid_text(head[1024 + 0x68 : 1024 + 0x78]), printable(head[1024 + 0x78 : 1024 + 0x88])
        return Probed(_ext_kind(head[1024:2048], device), uuid, label)
    return None


def _ext_kind(superblock: bytes, device: BlockDevice) -> str:
    try:
        return ExtFileSystem(device).kind
    except ConversionError:
        return "jbd" if superblock[0x60] & 0x8 else "ext4"  # 0x8: a journal of its own for another file system


def _swap(head: bytes, _: BlockDevice) -> Probed | None:
    for page in _SWAP_PAGES:
        signature = head[page - 10 : page]
        if signature == b"SWAPSPACE2":
            return Probed("swap", uuid_text(head[1036:1052]), printable(head[1052:1068]))
        if signature[:9] in {b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB000"}:
            return Probed("swsuspend", uuid_text(head[1036:1052]), printable(head[1052:1068]), "hibernated")
    return None


def _optical(head: bytes, _: BlockDevice) -> Probed | None:
    if head[0x8001:0x8006] != b"CD001":
        return None
    return Probed("iso9660", "", printable(head[0x8028:0x8048]))


def _dashed(text: str) -> str:
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
