"""Windows programs (PE files): the machine that one is made for, and its version."""

from __future__ import annotations

import struct
from enum import Enum
from typing import Final

_NEW_HEADER_AT: Final = 0x3C
_MACHINE: Final = struct.Struct("<4sH")
_VERSION_INFO: Final = struct.Struct("<IIIIII")
_VERSION_SIGNATURE: Final = b"\xbd\x04\xef\xfe"
assert _MACHINE.size == 6
assert _VERSION_INFO.size == 24


class Architecture(Enum):
    """The processor that a Windows is made for."""

    X64 = "x64"
    X86 = "x86"
    ARM64 = "arm64"
    UNKNOWN = "unknown"


_MACHINES: Final = {0x8664: Architecture.X64, 0x014C: Architecture.X86, 0xAA64: Architecture.ARM64}


def architecture_of(program: bytes) -> Architecture:
    """Return the machine a program is made for; UNKNOWN where it is no program, or for another. Never raises."""
    if len(program) < _NEW_HEADER_AT + 4 or program[:2] != b"MZ":
        return Architecture.UNKNOWN
    at = int.from_bytes(program[_NEW_HEADER_AT : _NEW_HEADER_AT + 4], "little")
    if at + _MACHINE.size > len(program):
        return Architecture.UNKNOWN
    signature, machine = _MACHINE.unpack_from(program, at)
    return _MACHINES.get(machine, Architecture.UNKNOWN) if signature == b"PE\0\0" else Architecture.UNKNOWN


def version_of(program: bytes) -> str:
    """Return a program's version, such as ``10.0.19041.1``; empty where it bears none. Never raises."""
    at = program.find(_VERSION_SIGNATURE)
    if at < 0 or at + _VERSION_INFO.size > len(program):
        return ""
    high, low = _VERSION_INFO.unpack_from(program, at)[2:4]
    return f"{high >> 16}.{high & 0xFFFF}.{low >> 16}.{low & 0xFFFF}"
