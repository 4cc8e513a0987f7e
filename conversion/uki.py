"""Unified kernel images: one EFI program with a kernel, its RAM disk and its command line, taken apart for a BIOS.

A BIOS cannot start the whole, GRUB's ``linux`` can start the parts. They are sections of a PE file (PE/COFF
specification, sections 3.3 and 4), named by the UAPI group's Unified Kernel Image specification. Where an image has
several profiles, the first is taken. All fields are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from conversion.errors import DamagedError, UnsupportedError

LARGEST_IMAGE_BYTES: Final = 1 << 30

_PE_OFFSET: Final = 0x3C
_COFF: Final = struct.Struct("<4sHH12xHH")  # signature, machine, sections, size of the optional header, characteristics
_SECTION: Final = struct.Struct("<8sIIII16x")  # name, virtual size and address, raw size and offset
assert (_COFF.size, _SECTION.size) == (24, 40)
_AMD64: Final = 0x8664
_MOST_SECTIONS: Final = 96  # the loader of Windows, on whose format this is, takes no more
_LONGEST_TEXT_BYTES: Final = 64 << 10
_PARTS: Final = frozenset((".linux", ".initrd", ".cmdline", ".osrel", ".uname", ".ucode"))
_HEADER_MAGIC: Final = (0x202, b"HdrS")  # of a kernel that follows the x86 boot protocol


@dataclass(frozen=True, slots=True)
class UnifiedImage:
    """The parts of an image. ``initrds`` are to be loaded in this order; ``version`` is the kernel's, or empty."""

    kernel: bytes
    initrds: tuple[bytes, ...]
    command_line: str
    os_release: str
    version: str

    @property
    def title(self) -> str:
        """Return what a menu calls it: the system's PRETTY_NAME, and the version."""
        name = "Linux"
        for line in self.os_release.splitlines():
            key, equals, value = line.partition("=")
            if equals and key.strip() == "PRETTY_NAME":
                name = value.strip().strip("\"'") or name
        return f"{name} ({self.version})" if self.version else name


def is_unified_image(content: bytes, *, subject: str) -> bool:
    """Tell whether a file is a PE program with a kernel inside; a damaged one is none."""
    try:
        return ".linux" in _sections(content, subject)
    except (DamagedError, UnsupportedError):
        return False


def split_unified_image(content: bytes, *, subject: str) -> UnifiedImage:
    """Return the parts of the image that a file named ``subject`` holds.

    Raises DamagedError where it contradicts itself, UnsupportedError where it is none or of another machine.
    """
    sections = _sections(content, subject)
    kernel = sections.get(".linux")
    if kernel is None:
        raise UnsupportedError("holds no kernel", subject=subject)
    at, magic = _HEADER_MAGIC
    if kernel[at : at + len(magic)] != magic:
        raise UnsupportedError("holds a kernel that does not follow the x86 boot protocol", subject=subject)
    return UnifiedImage(
        kernel=kernel,
        initrds=tuple(sections[name] for name in (".ucode", ".initrd") if sections.get(name)),
        command_line=" ".join(_text(sections, ".cmdline", subject).split("\n")).strip(),
        os_release=_text(sections, ".osrel", subject),
        version=_text(sections, ".uname", subject).strip(),
    )


def _sections(content: bytes, subject: str) -> dict[str, bytes]:
    """Return the parts by name, of the first profile where there are several."""
    if not _PE_OFFSET + 4 <= len(content) <= LARGEST_IMAGE_BYTES or content[:2] != b"MZ":
        raise UnsupportedError("is no EFI program", subject=subject)
    header = int.from_bytes(content[_PE_OFFSET : _PE_OFFSET + 4], "little")
    if header + _COFF.size > len(content):
        raise DamagedError("is an EFI program that ends before its header", subject=subject)
    signature, machine, count, optional_bytes, _ = _COFF.unpack_from(content, header)
    if signature != b"PE\0\0":
        raise UnsupportedError("is no EFI program", subject=subject)
    if machine != _AMD64:
        raise UnsupportedError(f"is a program for machine type {machine:#06x}, not for x86-64", subject=subject)
    table = header + _COFF.size + optional_bytes
    if count > _MOST_SECTIONS or table + count * _SECTION.size > len(content):
        raise DamagedError(f"has a table of {count} sections that cannot be", subject=subject)
    found: dict[str, bytes] = {}
    profiles = 0
    for index in range(count):
        raw_name, virtual_bytes, _, raw_bytes, offset = _SECTION.unpack_from(content, table + index * _SECTION.size)
        name = raw_name.rstrip(b"\0").decode("latin-1")
        if name == ".profile":
            profiles += 1
            if profiles > 1:
                break
        if name not in _PARTS:
            continue
        length = min(virtual_bytes, raw_bytes)  # the rest of either is padding
        if offset + length > len(content):
            raise DamagedError(f"has a section {name} that reaches beyond its end", subject=subject)
        if name in found and not profiles:
            raise DamagedError(f"has two sections {name}", subject=subject)
        found[name] = content[offset : offset + length]
    return found


def _text(sections: dict[str, bytes], name: str, subject: str) -> str:
    content = sections.get(name, b"")
    if len(content) > _LONGEST_TEXT_BYTES:
        raise DamagedError(f"has a section {name} of {len(content)} bytes, too long for text", subject=subject)
    try:
        return content.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise DamagedError(f"has a section {name} that is no UTF-8", subject=subject) from error
