"""The saved table: a document that is all or nothing, and cannot be made to say what was not so."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import zlib
from typing import Any
from uuid import UUID

import pytest

from conversion.errors import DamagedError
from conversion.gpt import EFI_SYSTEM
from conversion.partition_types import LINUX_DATA, MICROSOFT_RESERVED
from conversion.saved_table import SavedTable, decode_saved_table
from tests.support.gpt_disks import BOOT_CODE, convert, make_disk, make_table

SECTORS = 1 << 18
CORE = b"boot core" * 500
WRONG: list[Any] = [None, -1, 1 << 60, "x", "ff" * 40, [], {}, 1.5, True, [[]] * 3]
ROWS = [
    (1, EFI_SYSTEM, 2048, 40000),
    (2, MICROSOFT_RESERVED, 40000, 60000),
    *((n, LINUX_DATA, 60000 + n * 1000, 61000 + n * 1000) for n in range(3, 9)),
]


def saved() -> SavedTable:
    return convert(make_disk(make_table(ROWS, sectors=SECTORS), SECTORS), boot=1, core=CORE)[1]


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """Make the checksum right again, as an adversary would."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def packed(data: bytes, length: int | None = None) -> dict[str, Any]:
    return {
        "length": len(data) if length is None else length,
        "zlib": base64.b64encode(zlib.compress(data)).decode(),
    }


def test_a_document_is_small_and_comes_back_equal() -> None:
    value = saved()
    text = json.dumps(value.document())
    assert len(text) < 20_000
    back = decode_saved_table(json.loads(text))
    assert back == value
    assert back.document() == value.document()
    assert back.boot_code == BOOT_CODE.ljust(440, b"\0")
    assert back.core_digest == hashlib.sha256(CORE).hexdigest()
    assert back.written_record[:199] == BOOT_CODE
    assert back.original_record[:9] == b"\x90old code"
    assert [one.number for one in back.written_mbr().holding_data] == [1, 2, 3, 5, 6, 7, 8]
    assert saved().document() == value.document()


def test_what_is_saved_covers_all_that_is_written() -> None:
    table = make_table(ROWS, sectors=SECTORS)
    disk = make_disk(table, SECTORS)
    layout, value = convert(disk, boot=1, core=CORE)
    covered = {lba for at, data in value.original for lba in range(at // 512, (at + len(data)) // 512)}
    assert set(range(2048)) <= covered
    assert set(range(SECTORS - 33, SECTORS)) <= covered
    assert {one.ebr_lba for one in layout.entries if one.ebr_lba} <= covered
    for entry in disk.log:
        if entry is not None:
            assert set(range(entry[0] // 512, -(-(entry[0] + len(entry[1])) // 512))) <= covered


@pytest.mark.parametrize("document", [None, 1, "text", [], {}, {"format": 1}, {"format": 1, "sector_bytes": 512}])
def test_what_is_no_document_is_refused(document: object) -> None:
    with pytest.raises(DamagedError) as raised:
        decode_saved_table(document)
    assert raised.value.hint
    assert raised.value.subject == "saved partition table"


def test_every_field_that_is_missing_or_of_another_kind_is_refused() -> None:
    good = json.loads(json.dumps(saved().document()))

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        found = [path] if path else []
        if isinstance(value, dict):
            for key in value:
                found += places(value[key], (*path, key))
        elif isinstance(value, list):
            for index in range(min(len(value), 2)):
                found += places(value[index], (*path, index))
        return found

    tried = 0
    for path in places(good):
        if path == ("sha256",):
            continue
        for wrong in WRONG:
            document = copy.deepcopy(good)
            inner = document
            for step in path[:-1]:
                inner = inner[step]
            if inner[path[-1]] == wrong or (path[-1] == "why" and isinstance(wrong, str)):
                continue
            inner[path[-1]] = wrong
            tried += 1
            with pytest.raises(DamagedError):
                decode_saved_table(signed(document))
        document = copy.deepcopy(good)
        inner = document
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
        if inner != [] and path[-1] != 0 and path[-1] != 1:
            with pytest.raises(DamagedError):
                decode_saved_table(signed(document))
    assert tried > 400


def edited(**changes: Any) -> dict[str, Any]:
    document = json.loads(json.dumps(saved().document()))
    for key, value in changes.items():
        inner = document
        *steps, last = key.split("__")
        for step in steps:
            inner = inner[int(step) if step.isdigit() else step]
        inner[int(last) if last.isdigit() else last] = value
    return signed(document)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"sector_bytes": 4096},
        {"system": "dos"},
        {"sectors": 100},
        {"sectors": SECTORS - 33},
        {"gpt__from_backup": True},
        {"gpt__header_lba": 2},
        {"gpt__header": packed(bytes(512))},
        {"gpt__entries": packed(bytes(128 * 128))},
        {"gpt__entries": packed(bytes(128))},
        {"layout__disk_guid": str(UUID(int=1))},
        {"layout__signature": "1" * 9},
        {"layout__signature": "-1"},
        {"layout__entries__0__number": 9},
        {"layout__entries__0__number": 2},
        {"layout__entries__0__first_lba": 2049},
        {"layout__entries__0__guid": str(UUID(int=1))},
        {"layout__entries__0__type": "0f"},
        {"layout__entries__0__type": "100"},
        {"layout__entries__3__ebr_lba": 100},
        {"layout__entries__3__active": True},
        {"layout__extended": None},
        {"layout__extended__first_lba": 100},
        {"layout__extended__number": 1},
        {"layout__unmapped": []},
        {"layout__boot_partition": 2},
        {"layout__core_lba": 0},
        {"layout__core_lba": SECTORS - 1},
        {"boot_code": packed(bytes(439))},
        {"boot_code": packed(bytes(440), 439)},
        {"boot_code": packed(bytes(100), 440)},
        {"core_bytes": len(CORE) + 512},
        {"core_sha256": "00"},
        {"original": []},
        {"original__0__offset": 512},
        {"original__1__offset": 0},
        {"original__1__offset": SECTORS * 512},
        {"original__0": {"offset": 0, **packed(bytes(511))}},
        {"original__0": {"offset": 0, **packed(b"")}},
        {"original__0": {"offset": 0, "length": 1 << 40, "zlib": packed(bytes(512))["zlib"]}},
        {"original__0": {"offset": 0, **packed(bytes(1 << 20), 512)}},
        {"original__0": {"offset": 0, "length": 512, "zlib": "no base64!"}},
        {"original__0": {"offset": 0, "length": 512, "zlib": base64.b64encode(b"no zlib").decode()}},
    ],
)
def test_what_contradicts_itself_under_a_right_checksum_is_refused(changes: dict[str, Any]) -> None:
    assert decode_saved_table(edited()) == saved()
    with pytest.raises(DamagedError):
        decode_saved_table(edited(**changes))
