"""Device elements of a boot store: which partition, file or search they mean, decoded and encoded where they stand.

An element begins with the GUID of an object with more options, then a device: type, flags, length (these three and a
padding included), and what the type needs. A device inside a file (a recovery image in a ramdisk) is nested in it.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

DEVICE_HEADER: Final = struct.Struct("<IIII")  # type, flags, length, padding
PARTITION: Final = struct.Struct("<16sII16s16s")  # partition, kind of parent, table, disk, padding
FILE_HEADER: Final = struct.Struct("<III")  # version, length of the file's name with its device, kind of name
assert DEVICE_HEADER.size == 16
assert PARTITION.size == 56

_OPTIONS_BYTES: Final = 16
_PARTITION_DEVICE_BYTES: Final = DEVICE_HEADER.size + PARTITION.size  # 0x48
_NESTED_AT: Final = 0x38 - _OPTIONS_BYTES  # where a file's header stands in its device
_KIND_PATH: Final = 5  # of a file's name: a path on a device
_PARENT_DISK: Final = 0
_TABLE_GPT, _TABLE_MBR = 0, 1
_LOCATE_BY_ELEMENT, _LOCATE_BY_PATH = 0, 1
_LOCATE_HEAD_BYTES: Final = 12  # how to search, element to search by, offset of the parent
_DEEPEST: Final = 4
NO_GUID: Final = uuid.UUID(int=0)


class DeviceKind(IntEnum):
    """The types of devices that occur in real stores."""

    FILE = 0
    BOOT = 5
    PARTITION = 6
    LOCATE = 8


@dataclass(frozen=True, slots=True)
class PartitionDevice:
    """A partition of a disk, by GUIDs or by signature and offset. ``at`` is where it stands in its element."""

    at: int  # bytes, of the device's own header
    is_gpt: bool
    partition_guid: uuid.UUID = NO_GUID
    disk_guid: uuid.UUID = NO_GUID
    signature: int = 0
    offset_bytes: int = 0

    @classmethod
    def mbr(cls, at: int, signature: int, offset_bytes: int) -> PartitionDevice:
        """Return a partition under an MBR."""
        return cls(at, False, signature=signature, offset_bytes=offset_bytes)

    @classmethod
    def gpt(cls, at: int, disk_guid: uuid.UUID, partition_guid: uuid.UUID) -> PartitionDevice:
        """Return a partition under a GPT."""
        return cls(at, True, partition_guid, disk_guid)

    def encode_into(self, element: bytearray) -> None:
        """Write it over the partition that stands at ``at``."""
        if self.is_gpt:
            partition, table, disk = self.partition_guid.bytes_le, _TABLE_GPT, self.disk_guid.bytes_le
        else:
            partition, table = struct.pack("<QQ", self.offset_bytes, 0), _TABLE_MBR
            disk = struct.pack("<I12x", self.signature)
        start = self.at + DEVICE_HEADER.size
        element[start : start + PARTITION.size] = PARTITION.pack(partition, _PARENT_DISK, table, disk, bytes(16))

    def __str__(self) -> str:
        """Render as a person reads it."""
        if self.is_gpt:
            return f"partition {self.partition_guid} of disk {self.disk_guid}"
        return f"partition at byte {self.offset_bytes} of disk {self.signature:08x}"


@dataclass(frozen=True, slots=True)
class DevicePath:
    """A path inside a device. ``at`` is where its letters begin in the element, UTF-16."""

    at: int
    text: str


@dataclass(frozen=True, slots=True)
class Devices:
    """What a device element names. ``unknown`` are the types of devices that were not understood."""

    partitions: tuple[PartitionDevice, ...]
    paths: tuple[DevicePath, ...]
    unknown: tuple[int, ...]


def encode_partition(device: PartitionDevice, *, options: uuid.UUID = NO_GUID) -> bytes:
    """Return the 88 bytes of an element that names a partition."""
    element = bytearray(options.bytes_le + DEVICE_HEADER.pack(DeviceKind.PARTITION, 0, _PARTITION_DEVICE_BYTES, 0))
    element += bytes(PARTITION.size)
    PartitionDevice(
        _OPTIONS_BYTES, device.is_gpt, device.partition_guid, device.disk_guid, device.signature, device.offset_bytes
    ).encode_into(element)
    return bytes(element)


def devices_in(element: bytes) -> Devices:
    """Return what a device element names. Never raises: what is not understood is listed as unknown."""
    partitions: list[PartitionDevice] = []
    paths: list[DevicePath] = []
    unknown: list[int] = []
    at = _OPTIONS_BYTES
    for _ in range(_DEEPEST):
        if at + DEVICE_HEADER.size > len(element):
            unknown.append(-1)
            break
        kind, _, length, _ = DEVICE_HEADER.unpack_from(element, at)
        if length < DEVICE_HEADER.size or at + length > len(element):
            unknown.append(kind)
            break
        nested: int | None = None
        if kind == DeviceKind.PARTITION:
            partition = _partition(element, at, length)
            (partitions if partition else unknown).append(partition or kind)  # type: ignore[arg-type]
        elif kind == DeviceKind.LOCATE:
            path = _locate_path(element, at, length)
            paths += [path] if path else []
        elif kind == DeviceKind.FILE:
            nested = _nested(element, at, length)
            if nested is None:
                unknown.append(kind)
        elif kind != DeviceKind.BOOT:
            unknown.append(kind)
        if nested is None:
            break
        at = nested
    else:
        unknown.append(DeviceKind.FILE)
    return Devices(tuple(partitions), tuple(paths), tuple(unknown))


def _partition(element: bytes, at: int, length: int) -> PartitionDevice | None:
    if length < _PARTITION_DEVICE_BYTES:
        return None
    partition, parent, table, disk, _ = PARTITION.unpack_from(element, at + DEVICE_HEADER.size)
    if parent != _PARENT_DISK or table not in {_TABLE_GPT, _TABLE_MBR}:
        return None
    if table == _TABLE_GPT:
        return PartitionDevice.gpt(at, uuid.UUID(bytes_le=disk), uuid.UUID(bytes_le=partition))
    return PartitionDevice.mbr(at, int.from_bytes(disk[:4], "little"), int.from_bytes(partition[:8], "little"))


def _nested(element: bytes, at: int, length: int) -> int | None:
    """Return where the device stands that a file or a ramdisk image lies on."""
    start = at + _NESTED_AT
    if start + FILE_HEADER.size + DEVICE_HEADER.size > at + length:
        return None
    _, _, kind = FILE_HEADER.unpack_from(element, start)
    return start + FILE_HEADER.size if kind == _KIND_PATH else None


def _locate_path(element: bytes, at: int, length: int) -> DevicePath | None:
    """Return the path that is searched for, None where an element of the same object is searched by."""
    start = at + DEVICE_HEADER.size
    if start + _LOCATE_HEAD_BYTES > at + length:
        return None
    if struct.unpack_from("<I", element, start)[0] != _LOCATE_BY_PATH:
        return None
    begin = start + _LOCATE_HEAD_BYTES
    stored = element[begin : begin + (at + length - begin) // 2 * 2]
    return DevicePath(begin, stored.decode("utf-16-le", "replace").split("\0", 1)[0])
