"""Unified kernel images: taken apart rightly, and safely where they are damaged or hostile."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.uki import is_unified_image, split_unified_image

KERNEL = (b"\0" * 0x202 + b"HdrS").ljust(2000, b"\x90")
PARTS = {
    ".text": b"code",
    ".osrel": b'NAME=Debian\nPRETTY_NAME="Debian GNU/Linux 12"\n',
    ".cmdline": b"root=UUID=x ro\nquiet\0\0",
    ".uname": b"6.1.0-56",
    ".linux": KERNEL,
    ".initrd": b"the initrd",
}


def image(parts: list[tuple[str, bytes]], *, machine: int = 0x8664, raw_padding: int = 100) -> bytes:
    table_at = 0x80 + 24 + 240
    header = struct.pack("<4sHHIIIHH", b"PE\0\0", machine, len(parts), 0, 0, 0, 240, 0x22)
    content, table = b"", b""
    offset = 0x1000
    for name, part in parts:
        padded = part + b"\xee" * raw_padding
        table += struct.pack(
            "<8sIIIIIIHHI", name.encode(), len(part), 0, len(padded), offset + len(content), 0, 0, 0, 0, 0
        )
        content += padded
    start = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    start = start.ljust(0x80, b"\0") + header
    return (start.ljust(table_at, b"\0") + table).ljust(offset, b"\0") + content


WHOLE = image(list(PARTS.items()))


def test_parts() -> None:
    assert is_unified_image(WHOLE, subject="x")
    found = split_unified_image(WHOLE, subject="x")
    assert found.kernel == KERNEL
    assert found.initrds == (b"the initrd",)
    assert found.command_line == "root=UUID=x ro quiet"
    assert found.version == "6.1.0-56"
    assert found.title == "Debian GNU/Linux 12 (6.1.0-56)"


def test_microcode_comes_first_and_the_rest_may_be_missing() -> None:
    found = split_unified_image(image([(".linux", KERNEL), (".initrd", b"i"), (".ucode", b"u")]), subject="x")
    assert found.initrds == (b"u", b"i")
    assert (found.command_line, found.version, found.title) == ("", "", "Linux")


def test_the_first_of_several_profiles() -> None:
    parts = [(".linux", KERNEL), (".cmdline", b"base")]
    parts += [(".profile", b""), (".cmdline", b"first"), (".profile", b""), (".cmdline", b"second")]
    assert split_unified_image(image(parts), subject="x").command_line == "first"


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", UnsupportedError, "no EFI program"),
        (b"\x7fELF" + bytes(1000), UnsupportedError, "no EFI program"),
        (image([(".text", b"x")]), UnsupportedError, "holds no kernel"),
        (image([(".linux", b"zboot")]), UnsupportedError, "x86 boot protocol"),
        (image(list(PARTS.items()), machine=0xAA64), UnsupportedError, "0xaa64"),
        (image([(".linux", KERNEL), (".linux", KERNEL)]), DamagedError, r"two sections \.linux"),
        (image([(".linux", KERNEL), (".uname", b"\xff")]), DamagedError, "no UTF-8"),
        (image([(".linux", KERNEL), (".cmdline", b"x" * 70_000)]), DamagedError, "too long"),
        (image([(".linux", KERNEL)], raw_padding=0)[:-1], DamagedError, "beyond its end"),
        (WHOLE[:0x3C] + b"\xff\xff\xff\x7f" + WHOLE[0x40:], DamagedError, "before its header"),
        (WHOLE[:0x86] + b"\xff\xff" + WHOLE[0x88:], DamagedError, "65535 sections"),
    ],
)
def test_says_what_is_wrong(content: bytes, error: type[ConversionError], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        split_unified_image(content, subject="/EFI/Linux/x.efi")
    assert raised.value.subject == "/EFI/Linux/x.efi"


@given(st.integers(0, len(WHOLE)))
@settings(deadline=None, max_examples=100)
def test_truncated_anywhere(length: int) -> None:
    try:
        found = split_unified_image(WHOLE[:length], subject="x")
    except (DamagedError, UnsupportedError):
        assert length < len(WHOLE)
    else:
        assert found.kernel == KERNEL


@given(st.integers(0, 0x80 + 24 + 240 + 40 * len(PARTS) - 1), st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_any_byte_of_the_headers_changed(at: int, value: int) -> None:
    content = WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :]
    try:
        found = split_unified_image(content, subject="x")
    except (DamagedError, UnsupportedError):
        return
    assert len(found.kernel) <= len(content)
