"""Unified kernel images and the machines that images are for: as much of PE, ELF and kernel headers as tells."""

from __future__ import annotations

import struct
from typing import Final

from conversion.linux.files import window
from conversion.linux.osrelease import parse_os_release
from conversion.linux.system import Architecture, UnifiedKernel, Volume

_PE_MACHINES: Final[dict[int, Architecture]] = {0x8664: "x86_64", 0x14C: "i386", 0xAA64: "aarch64"}
_ELF_MACHINES: Final[dict[int, Architecture]] = {62: "x86_64", 3: "i386", 183: "aarch64"}
MOST_SECTIONS: Final = 96
LARGEST_TEXT_BYTES: Final = 1 << 20


def architecture_of(head: bytes) -> Architecture | None:
    """Return the machine that a program or kernel is for, from its first KiB; None where that cannot be told."""
    if head[:4] == b"\x7fELF" and len(head) >= 20:
        return _ELF_MACHINES.get(int.from_bytes(head[18:20], "big" if head[5] == 2 else "little"), "other")
    if head[0x38:0x3C] == b"ARM\x64":
        return "aarch64"
    if head[:2] == b"MZ" and len(head) >= 64:
        at = int.from_bytes(head[60:64], "little")
        if head[at : at + 4] == b"PE\0\0":
            return _PE_MACHINES.get(int.from_bytes(head[at + 4 : at + 6], "little"), "other")
    return "x86_64" if head[0x202:0x206] == b"HdrS" else None


def read_unified(volume: Volume, path: str) -> UnifiedKernel | None:
    """Return what a unified kernel image holds; None where the file is none."""
    head = window(volume, path, 0, 8192)
    if head is None or len(head) < 1024 or head[:2] != b"MZ":
        return None
    at = int.from_bytes(head[60:64], "little")
    if at + 24 > len(head) or head[at : at + 4] != b"PE\0\0":
        return None
    count, optional = struct.unpack_from("<2xH12xH", head, at + 4)
    first = at + 24 + optional
    sections: dict[str, tuple[int, int]] = {}
    for number in range(min(count, MOST_SECTIONS)):
        raw = head[first + number * 40 : first + number * 40 + 40]
        if len(raw) < 40:
            break
        virtual_size, _, raw_size, offset = struct.unpack_from("<IIII", raw, 8)
        name = raw[:8].rstrip(b"\0").decode("ascii", "replace")
        # The size in memory is the exact one; on the disk it is rounded up.
        sections.setdefault(name, (offset, min(virtual_size or raw_size, raw_size)))
    if ".linux" not in sections:
        return None

    def text(name: str) -> str:
        start, length = sections.get(name, (0, 0))
        found = window(volume, path, start, min(length, LARGEST_TEXT_BYTES)) if length else b""
        return (found or b"").decode("utf-8", "replace").strip("\0 \n")

    return UnifiedKernel(
        volume=volume,
        path=path,
        version=text(".uname"),
        pretty_name=parse_os_release(text(".osrel")).pretty_name,
        command_line=" ".join(text(".cmdline").split()),
        linux=sections[".linux"],
        initrd=sections.get(".initrd"),
    )
