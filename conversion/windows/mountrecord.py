"""The mount manager's records: how Windows names a volume in ``MountedDevices``, under a GPT and under an MBR."""

from __future__ import annotations

import struct
import uuid
from typing import Final

from conversion.identity import DiskIdentity, PartitionIdentity

GPT_MARK: Final = b"DMIO:ID:"  # and the partition's GUID
MBR_RECORD: Final = struct.Struct("<IQ")  # signature of the disk, offset of the partition in bytes
assert MBR_RECORD.size == 12
_GUID_BYTES: Final = 16


def mbr_record(identity: DiskIdentity, partition: PartitionIdentity) -> bytes:
    """Return the record of a partition under the MBR."""
    return MBR_RECORD.pack(identity.signature, partition.offset_bytes)


def gpt_record(partition: PartitionIdentity) -> bytes:
    """Return the record of a partition under the GPT."""
    return GPT_MARK + partition.guid.bytes_le


def to_mbr(record: bytes, identity: DiskIdentity) -> bytes | None:
    """Return the record under the MBR for one under the GPT; None where it is no such, or of another partition."""
    if len(record) != len(GPT_MARK) + _GUID_BYTES or not record.startswith(GPT_MARK):
        return None
    partition = identity.by_guid(uuid.UUID(bytes_le=record[len(GPT_MARK) :]))
    return mbr_record(identity, partition) if partition else None


def to_gpt(record: bytes, identity: DiskIdentity) -> bytes | None:
    """Return the record under the GPT for one under the MBR; None where it is no such, or of another partition."""
    if len(record) != MBR_RECORD.size:
        return None
    signature, offset_bytes = MBR_RECORD.unpack(record)
    partition = identity.by_offset(offset_bytes) if signature == identity.signature else None
    return gpt_record(partition) if partition else None
