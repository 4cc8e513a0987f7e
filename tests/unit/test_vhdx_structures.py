"""The on-disk structures of VHDX: layouts as the specification draws them, round trips, truncation, flipped bits."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhdx.errors import CorruptDiskError
from vhdx.structures import (
    MIB,
    VHDX_PARENT_LOCATOR,
    FileIdentifier,
    FileParameters,
    Header,
    MetadataEntry,
    MetadataTable,
    ParentLocator,
    RegionEntry,
    RegionTable,
    checksum_of,
    decode_bat_entry,
    decode_guid,
    encode_bat_entry,
    encode_guid,
)

HEADER = Header(7, UUID(int=1), UUID(int=2), UUID(int=3), MIB, 2 * MIB)
REGIONS = RegionTable(
    (RegionEntry(UUID(int=5), MIB, MIB, required=True), RegionEntry(UUID(int=6), 2 * MIB, MIB, False))
)
TABLE = MetadataTable((MetadataEntry(UUID(int=9), 65536, 8, True, False, True), MetadataEntry(UUID(int=8), 0, 0)))
LOCATOR = ParentLocator(VHDX_PARENT_LOCATOR, (("parent_linkage", "{x}"), ("relative_path", "..\\Pärent 💽.vhdx")))


def test_guids_are_stored_in_the_mixed_order_of_windows() -> None:
    guid = UUID("00112233-4455-6677-8899-aabbccddeeff")
    assert encode_guid(guid).hex() == "33221100554477668899aabbccddeeff"
    assert decode_guid(encode_guid(guid)) == guid


def test_header_fields_stand_where_the_specification_says() -> None:
    data = HEADER.encode()
    assert len(data) == 4096
    assert data[:4] == b"head"
    assert data[8:16] == (7).to_bytes(8, "little")
    assert data[16:32] == encode_guid(UUID(int=1))
    assert data[48:64] == encode_guid(UUID(int=3))
    assert data[64:68] == b"\0\0\1\0"  # log version 0, version 1
    assert int.from_bytes(data[68:72], "little") == MIB
    assert int.from_bytes(data[72:80], "little") == 2 * MIB


@pytest.mark.parametrize("structure", [HEADER, REGIONS])
def test_checksummed_structures_round_trip_and_notice_any_flipped_bit(structure: Header | RegionTable) -> None:
    data = structure.encode()
    decode = type(structure).decode
    assert decode(data, offset=0) == structure
    assert int.from_bytes(data[4:8], "little") == checksum_of(data)
    for position in (*range(96), len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(CorruptDiskError) as raised:
            decode(bytes(flipped), offset=65536)
        assert raised.value.offset == 65536


@pytest.mark.parametrize("length", [0, 3, 79, 4095])
def test_a_header_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CorruptDiskError, match="cut short"):
        Header.decode(HEADER.encode()[:length], offset=0)


def test_a_table_that_claims_more_entries_than_fit_is_refused() -> None:
    full = RegionTable(tuple(RegionEntry(UUID(int=n), 0, 0, False) for n in range(2047)))
    assert len(RegionTable.decode(full.encode(), offset=0).entries) == 2047
    data = bytearray(TABLE.encode())
    data[10:12] = (2048).to_bytes(2, "little")
    with pytest.raises(CorruptDiskError, match="2048 entries"):
        MetadataTable.decode(bytes(data), offset=0)


def test_metadata_table_and_file_parameters_round_trip() -> None:
    assert MetadataTable.decode(TABLE.encode(), offset=0) == TABLE
    for parameters in (FileParameters(MIB), FileParameters(256 * MIB, True), FileParameters(2 * MIB, False, True)):
        assert FileParameters.decode(parameters.encode(), offset=0) == parameters


@pytest.mark.parametrize("block_size", [0, 1, 3 * MIB, MIB // 2, 512 * MIB, 0xFFFFFFFF])
def test_impossible_block_sizes_are_refused(block_size: int) -> None:
    with pytest.raises(CorruptDiskError, match="block size"):
        FileParameters.decode(FileParameters(block_size).encode(), offset=0)


def test_file_identifier_keeps_the_creator_and_tolerates_a_garbled_one() -> None:
    data = FileIdentifier("Microsoft Windows 10").encode()
    assert len(data) == 65536
    assert FileIdentifier.decode(data).creator == "Microsoft Windows 10"
    assert FileIdentifier.decode(b"vhdxfile" + b"\x00\xd8" * 256).creator


def test_parent_locator_round_trips() -> None:
    assert ParentLocator.decode(LOCATOR.encode(), offset=0) == LOCATOR
    assert LOCATOR.get("relative_path") == "..\\Pärent 💽.vhdx"
    assert LOCATOR.get("volume_path") is None


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_parent_locator_decodes_or_is_refused_and_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(LOCATOR.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    try:
        locator = ParentLocator.decode(bytes(raw[:cut]), offset=0)
    except CorruptDiskError:
        return
    assert sum(len(key) + len(value) for key, value in locator.values) * 2 <= len(raw)


def test_a_parent_locator_whose_strings_overlap_cannot_grow() -> None:
    strings = 60000
    count = 5000
    entry = (20 + 12 * count).to_bytes(4, "little") * 2 + strings.to_bytes(2, "little") * 2
    raw = encode_guid(VHDX_PARENT_LOCATOR) + b"\0\0" + count.to_bytes(2, "little") + entry * count + b"a\0" * strings
    with pytest.raises(CorruptDiskError, match="overlap"):
        ParentLocator.decode(raw, offset=0)


@given(st.sampled_from([0, 1, 2, 3, 6, 7]), st.integers(0, (1 << 44) - 1))
def test_bat_entries_round_trip(state: int, place_mib: int) -> None:
    assert decode_bat_entry(encode_bat_entry(state, place_mib * MIB)) == (state, place_mib * MIB)
