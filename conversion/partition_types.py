"""Which partition type of a master boot record stands for which type of a GUID partition table, both ways."""

from __future__ import annotations

from typing import Final, Literal
from uuid import UUID

from conversion.gpt import EFI_SYSTEM

System = Literal["windows", "linux"]

MICROSOFT_RESERVED: Final = UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae")
BASIC_DATA: Final = UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
WINDOWS_RECOVERY: Final = UUID("de94bba4-06d1-4d40-a16a-bfd50179d6ac")
DYNAMIC_METADATA: Final = UUID("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3")
DYNAMIC_DATA: Final = UUID("af9b60a0-1431-4f62-bc68-3311714a69ad")
LINUX_DATA: Final = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
LINUX_ROOT_X64: Final = UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
LINUX_ROOT_X86: Final = UUID("44479540-f297-41b2-9af7-d131d5f0458a")
LINUX_XBOOTLDR: Final = UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172")
LINUX_USR_X64: Final = UUID("8484680c-9521-48c6-9c11-b0720656f69e")
LINUX_HOME: Final = UUID("933ac7e1-2eb4-4f13-b844-0e14e2aef915")
LINUX_SERVER_DATA: Final = UUID("3b8f8425-20e0-4f3b-907f-1a25a76f98e8")
LINUX_VAR: Final = UUID("4d21b016-b534-45c2-a9fb-5c16e091fd2d")
LINUX_TMP: Final = UUID("7ec6f557-3bc5-4aca-b293-16ef5df639d1")
LINUX_LUKS: Final = UUID("ca7d7ccb-63ed-4c53-861c-1742536059cc")
LINUX_LVM: Final = UUID("e6d6d379-f507-44c2-a23c-238f2a3df928")
LINUX_RAID: Final = UUID("a19d880f-05fc-4d3b-a006-743f0f84911e")
LINUX_SWAP: Final = UUID("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f")
BIOS_BOOT: Final = UUID("21686148-6449-6e6f-744e-656564454649")

# What means nothing to a BIOS guest: their sectors are free for a boot core and for boot records.
NEVER_MAPPED: Final = frozenset((MICROSOFT_RESERVED, BIOS_BOOT))
# What a guest runs without where four partitions are too few.
DISPENSABLE: Final = frozenset((WINDOWS_RECOVERY, LINUX_SWAP))
DYNAMIC_DISK: Final = frozenset((DYNAMIC_METADATA, DYNAMIC_DATA))

_TYPE_OF: Final = {
    BASIC_DATA: 0x07,
    WINDOWS_RECOVERY: 0x27,
    LINUX_DATA: 0x83,
    LINUX_ROOT_X64: 0x83,
    LINUX_ROOT_X86: 0x83,
    LINUX_XBOOTLDR: 0x83,
    LINUX_USR_X64: 0x83,
    LINUX_HOME: 0x83,
    LINUX_SERVER_DATA: 0x83,
    LINUX_VAR: 0x83,
    LINUX_TMP: 0x83,
    LINUX_LUKS: 0x83,
    LINUX_LVM: 0x8E,
    LINUX_RAID: 0xFD,
    LINUX_SWAP: 0x82,
}
_GUID_OF: Final = {
    **dict.fromkeys((0x01, 0x04, 0x06, 0x07, 0x0B, 0x0C, 0x0E), BASIC_DATA),
    0x27: WINDOWS_RECOVERY,
    0x82: LINUX_SWAP,
    0x83: LINUX_DATA,
    0x8E: LINUX_LVM,
    0xEF: EFI_SYSTEM,
    0xFD: LINUX_RAID,
}


def mbr_type(type_guid: UUID, system: System) -> int | None:
    """Return the type of the MBR entry that stands for a GPT partition, None where none is agreed on.

    Windows would hide an EFI system partition of type 0xEF, and its boot files are there: it is FAT32 with LBA.
    """
    if type_guid == EFI_SYSTEM:
        return 0x0C if system == "windows" else 0xEF
    return _TYPE_OF.get(type_guid)


def fallback_type(system: System) -> int:
    """Return the type of the MBR entry for a partition of a GPT type that nothing is agreed on for."""
    return 0x07 if system == "windows" else 0x83


def gpt_type(kind: int, system: System) -> UUID:
    """Return the GPT type for a partition that the guest made with an MBR type, data of its system where unknown."""
    return _GUID_OF.get(kind, BASIC_DATA if system == "windows" else LINUX_DATA)
