from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdx.errors import CorruptDiskError, DiskError, UnsupportedDiskError
from vhdx.vhd_structures import (
    DiskType,
    Footer,
    Geometry,
    Header,
    ParentLocator,
    bitmap_size_for,
    decode_footer,
    decode_header,
    geometry_for,
)

FOOTER = Footer(
    kind=DiskType.DYNAMIC,
    original_size=10 << 20,
    current_size=20 << 20,
    identifier=UUID(int=0x123456789),
    created=datetime(2026, 5, 1, 8, tzinfo=UTC),
    data_offset=512,
    geometry=geometry_for(20 << 20),
)
HEADER = Header(
    table_offset=2048,
    entry_count=10,
    block_size=2 << 20,
    parent_identifier=UUID(int=7),
    parent_modified=datetime(2026, 5, 1, 8, tzinfo=UTC),
    parent_name="größe.vhd",
    locators=(ParentLocator(b"W2ru", 512, 24, 1536), ParentLocator(b"W2ku", 512, 24, 4096)),
)


def test_footer_and_header_read_back_as_written() -> None:
    assert decode_footer(FOOTER.encode(), 0) == FOOTER
    assert decode_header(HEADER.encode(), 512) == HEADER


def test_a_footer_of_old_products_lacks_its_last_byte() -> None:
    assert decode_footer(FOOTER.encode()[:-1], 0) == FOOTER


@pytest.mark.parametrize("length", [0, 1, 8, 68, 510])
def test_a_footer_cut_short_is_corrupt(length: int) -> None:
    with pytest.raises(CorruptDiskError, match="cut short"):
        decode_footer(FOOTER.encode()[:length], 0)


@pytest.mark.parametrize("length", [0, 8, 36, 1023])
def test_a_header_cut_short_is_corrupt(length: int) -> None:
    with pytest.raises(CorruptDiskError, match="cut short"):
        decode_header(HEADER.encode()[:length], 512)


@given(position=st.integers(0, 511), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_footer_is_noticed(position: int, bit: int) -> None:
    data = bytearray(FOOTER.encode())
    data[position] ^= 1 << bit
    with pytest.raises(CorruptDiskError):
        decode_footer(bytes(data), 0)


@given(position=st.integers(0, 1023), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_header_is_noticed(position: int, bit: int) -> None:
    data = bytearray(HEADER.encode())
    data[position] ^= 1 << bit
    with pytest.raises(CorruptDiskError):
        decode_header(bytes(data), 512)


@given(data=st.binary(min_size=1024, max_size=1024))
def test_noise_is_refused_with_our_error(data: bytes) -> None:
    for decode, length, cookie in ((decode_footer, 512, b"conectix"), (decode_header, 1024, b"cxsparse")):
        with pytest.raises(DiskError):
            decode((cookie + data)[:length], 0)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"current_size": 0}, CorruptDiskError, "is not a VHD"),
        ({"current_size": (2040 << 30) + 512}, CorruptDiskError, "is not a VHD"),
        ({"current_size": 1000}, CorruptDiskError, "multiple of a sector"),
        ({"kind": 5}, UnsupportedDiskError, "type 5"),
    ],
)
def test_a_well_sealed_footer_of_nonsense_is_refused(change: dict[str, int], error: type, words: str) -> None:
    fields = {name: getattr(FOOTER, name) for name in FOOTER.__dataclass_fields__}
    with pytest.raises(error, match=words):
        decode_footer(Footer(**{**fields, **change}).encode(), 0)


@pytest.mark.parametrize("block_size", [0, 512, 3 << 20, 1 << 31])
def test_block_sizes_that_cannot_be_are_refused(block_size: int) -> None:
    with pytest.raises(CorruptDiskError, match="block size"):
        decode_header(Header(table_offset=2048, entry_count=1, block_size=block_size).encode(), 512)


# The first is a disk made by Windows; the others are what qemu-img 7.2 stores for disks of these sizes.
@pytest.mark.parametrize(
    "size, geometry",
    [
        (10 << 20, Geometry(301, 4, 17)),
        (5257216, Geometry(151, 4, 17)),
        (52432896, Geometry(1004, 6, 17)),
        (104865792, Geometry(1004, 12, 17)),
        (136339456, Geometry(979, 16, 17)),
        (209764352, Geometry(826, 16, 31)),
        (273014784, Geometry(529, 16, 63)),
        (314818560, Geometry(610, 16, 63)),
        (528482304, Geometry(1024, 16, 63)),
        (33286127616, Geometry(64496, 16, 63)),
        (42951106560, Geometry(20561, 16, 255)),
        (136365219840, Geometry(65279, 16, 255)),
        (2040 << 30, Geometry(65535, 16, 255)),
    ],
)
def test_geometry_follows_the_specification(size: int, geometry: Geometry) -> None:
    assert geometry_for(size) == geometry


@given(sectors=st.integers(1, 2040 << 21))
def test_geometry_never_reaches_past_the_disk_and_fits_its_fields(sectors: int) -> None:
    geometry = geometry_for(sectors * 512)
    assert geometry.size <= sectors * 512
    assert geometry.cylinders <= 65535 and geometry.heads <= 16 and geometry.sectors_per_track <= 255


def test_bitmaps_are_padded_to_sectors() -> None:
    assert [bitmap_size_for(size) for size in (4096, 512 << 10, 2 << 20, 4 << 20)] == [512, 512, 512, 1024]
