"""Master boot records: decoded, encoded, chains of logical partitions bounded, sfdisk agreeing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion.errors import DamagedError
from conversion.mbr import (
    MbrEntry,
    decode_record,
    encode_record,
    overrules_gpt,
    protective_mbr,
    read_mbr,
)
from tests.support.gpt_disks import SparseDisk, run

SIZE = 64 << 20


def disk_with(*records: tuple[int, bytes]) -> SparseDisk:
    disk = SparseDisk(SIZE)
    for lba, record in records:
        disk.write_at(lba * 512, record)
    return disk


def chain(*links: tuple[int, list[MbrEntry]]) -> SparseDisk:
    """A disk whose extended partition begins at sector 1000, with records of entries at the given sectors."""
    master = encode_record([MbrEntry(0x0F, 1000, 90000)], signature=7)
    return disk_with((0, master), *((lba, encode_record(entries, base_lba=lba)) for lba, entries in links))


def test_what_is_encoded_is_decoded() -> None:
    entries = [MbrEntry(0x07, 2048, 4096, True), MbrEntry(0, 0, 0), MbrEntry(0x83, 1 << 31, (1 << 31) - 1)]
    raw = encode_record(entries, boot_code=b"code", signature=0xDEADBEEF, mark=b"\x5a\x5a")
    assert len(raw) == 512
    assert raw[0x1B8:0x1BC] == b"\xef\xbe\xad\xde"
    assert raw[0x1BE:0x1CE] == bytes.fromhex("80 202100 07 612100 00080000 00100000".replace(" ", ""))
    assert decode_record(raw) == (b"code".ljust(440, b"\0"), 0xDEADBEEF, b"\x5a\x5a", (*entries, MbrEntry(0, 0, 0)))
    mbr = read_mbr(disk_with((0, raw)))
    assert mbr is not None
    assert [(one.number, one.kind, one.first_lba, one.end_lba, one.active) for one in mbr.partitions] == [
        (1, "primary", 2048, 6144, True),
        (3, "primary", 1 << 31, (1 << 32) - 1, False),
    ]
    assert (mbr.signature, mbr.mark, mbr.is_protective) == (0xDEADBEEF, b"\x5a\x5a", False)


@pytest.mark.parametrize(
    "entries, more",
    [
        ([MbrEntry(7, 1 << 32, 1)], {}),
        ([MbrEntry(7, 1, 1 << 32)], {}),
        ([MbrEntry(256, 1, 1)], {}),
        ([MbrEntry(7, 1, 1)] * 5, {}),
        ([], {"boot_code": bytes(441)}),
        ([], {"signature": 1 << 32}),
        ([], {"mark": b"1"}),
    ],
)
def test_what_does_not_fit_is_not_encoded(entries: list[MbrEntry], more: dict[str, bytes | int]) -> None:
    with pytest.raises(ValueError):
        encode_record(entries, **more)  # type: ignore[arg-type]


def test_a_protective_record_is_that_of_sgdisk(tmp_path: Path) -> None:
    path = SparseDisk(SIZE).to_file(tmp_path / "disk.img")
    run("sgdisk", "-o", str(path))
    assert protective_mbr(SIZE // 512) == SparseDisk.from_file(path).read_at(0, 512)
    mbr = read_mbr(SparseDisk.from_file(path))
    assert mbr is not None
    assert mbr.is_protective
    assert not overrules_gpt(SparseDisk.from_file(path))
    assert protective_mbr(1 << 40)[446 + 12 : 446 + 16] == b"\xff" * 4


def test_a_plain_record_overrules_a_gpt_and_an_empty_or_hybrid_one_does_not() -> None:
    data, guard = MbrEntry(0x83, 2048, 100), MbrEntry(0xEE, 1, 2047)
    assert overrules_gpt(disk_with((0, encode_record([data]))))
    assert not overrules_gpt(disk_with((0, encode_record([]))))
    assert not overrules_gpt(disk_with((0, encode_record([guard, data]))))
    assert not overrules_gpt(SparseDisk(512))


def test_a_volume_or_an_empty_disk_has_no_record() -> None:
    assert read_mbr(SparseDisk(SIZE)) is None
    assert read_mbr(SparseDisk(511)) is None
    assert decode_record(b"\0" * 100) is None
    boot_sector = bytearray(encode_record([MbrEntry(0x83, 1, 1)]))
    boot_sector[446] = 0x20  # text where a status would be
    assert read_mbr(disk_with((0, bytes(boot_sector)))) is None


def test_logical_partitions_are_numbered_from_five_wherever_their_records_lie() -> None:
    disk = chain(
        (1000, [MbrEntry(0x83, 1048, 100), MbrEntry(0x05, 1, 5000)]),
        (1001, [MbrEntry(0x07, 1147, 50), MbrEntry(0x0F, 2, 6000)]),
        (1002, [MbrEntry(0x8E, 2000, 10)]),
    )
    mbr = read_mbr(disk)
    assert mbr is not None
    assert [(one.number, one.type, one.first_lba, one.end_lba, one.ebr_lba) for one in mbr.partitions] == [
        (1, 0x0F, 1000, 91000, None),
        (5, 0x83, 2048, 2148, 1000),
        (6, 0x07, 2148, 2198, 1001),
        (7, 0x8E, 3002, 3012, 1002),
    ]
    assert [one.number for one in mbr.holding_data] == [5, 6, 7]


def test_an_extended_partition_that_was_never_filled_is_empty() -> None:
    mbr = read_mbr(chain())
    assert mbr is not None
    assert [one.kind for one in mbr.partitions] == ["extended"]
    assert mbr.holding_data == ()


@pytest.mark.parametrize(
    "links, problem",
    [
        ([(1000, [MbrEntry(0x83, 10, 1), MbrEntry(5, 0, 1)])], "loops: sector 1000"),
        ([(1000, [MbrEntry(5, 5, 1)]), (1005, [MbrEntry(5, 9, 1)]), (1009, [MbrEntry(5, 5, 1)])], "sector 1005"),
        ([(1000, [MbrEntry(0x83, 10, 1), MbrEntry(5, 70, 1)])], "breaks off at sector 1070"),
        ([(1000, [MbrEntry(0x83, 10, 1), MbrEntry(5, SIZE // 512 - 1000, 1)])], "outside of the disk"),
        ([(1000, [MbrEntry(5, 2**32 - 1, 1)])], "outside of the disk"),
        ([(1000 + n, [MbrEntry(0x83, 200, 1), MbrEntry(5, n + 1, 1)]) for n in range(101)], "more than 100"),
    ],
)
def test_a_broken_chain_is_named(links: list[tuple[int, list[MbrEntry]]], problem: str) -> None:
    with pytest.raises(DamagedError, match=problem) as raised:
        read_mbr(chain(*links))
    assert raised.value.subject == "master boot record"
    assert raised.value.hint


def test_two_chains_cannot_share_a_record() -> None:
    master = encode_record([MbrEntry(0x0F, 1000, 500), MbrEntry(0x05, 1000, 500)])
    with pytest.raises(DamagedError, match="loops"):
        read_mbr(disk_with((0, master), (1000, encode_record([MbrEntry(0x83, 10, 1)]))))


def test_every_truncation_is_read_or_refused() -> None:
    disk = chain((1000, [MbrEntry(0x83, 1048, 100), MbrEntry(0x05, 1, 5000)]), (1001, [MbrEntry(7, 1147, 50)]))
    for size in (0, 1, 511, 512, 513, 1000 * 512, 1000 * 512 + 511, 1001 * 512, 1001 * 512 + 511, 1002 * 512):
        disk.size = size
        try:
            mbr = read_mbr(disk)
        except DamagedError as error:
            assert 512 <= size < 1002 * 512, error
        else:
            assert (mbr is None) is (size < 512)


def test_what_sfdisk_wrote_is_read(tmp_path: Path) -> None:
    path = SparseDisk(SIZE).to_file(tmp_path / "disk.img")
    script = "label: dos\nlabel-id: 0x12345678\nstart=2048,size=4096,type=c,bootable\nstart=8192,size=8192,type=7\n"
    script += "start=20480,size=100000,type=f\nstart=22528,size=2048,type=83\nstart=26624,size=2048,type=82\n"
    run("sfdisk", "-q", str(path), script=script)
    told = json.loads(run("sfdisk", "--json", str(path)))["partitiontable"]["partitions"]
    mbr = read_mbr(SparseDisk.from_file(path))
    assert mbr is not None
    assert mbr.signature == 0x12345678
    found = [(one.number, one.first_lba, one.sectors, f"{one.type:x}", one.active) for one in mbr.partitions]
    assert found == [
        (int(one["node"].removeprefix(str(path))), one["start"], one["size"], one["type"], one.get("bootable", False))
        for one in told
    ]
    assert [one[0] for one in found] == [1, 2, 3, 5, 6]
    # Cylinders, heads and sectors are counted as sfdisk counts them.
    slots = [MbrEntry(one.type, one.first_lba, one.sectors, one.active) for one in mbr.partitions if one.number < 5]
    raw = encode_record(slots, signature=mbr.signature)
    assert raw == SparseDisk.from_file(path).read_at(0, 512)
