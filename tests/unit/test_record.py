"""JSON records: the envelope, the checksum over the body, and fields that come back by type or as one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import xxhash

from replica import record
from replica.errors import FormatVersionError, IntegrityError
from replica.record import Fields

BODY = {"z": 1, "a": {"text": "größe 日本"}, "list": [1, 2], "none": None, "truth": True, "number": 1.5}


def sealed(body_text: str, **outer: object) -> bytes:
    """Return a record whose body is written as given, its checksum right for that text."""
    fields = {"checksum": xxhash.xxh3_128_hexdigest(body_text.encode()), "format": 1, "kind": "k", "suite": 0, **outer}
    rest = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in fields.items())
    return f'{{"body":{body_text},{rest}}}'.encode()


def test_a_record_is_the_canonical_json_that_the_format_describes() -> None:
    inner = json.dumps(BODY, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    checksum = xxhash.xxh3_128_hexdigest(inner.encode())
    expected = f'{{"body":{inner},"checksum":"{checksum}","format":1,"kind":"manifest","suite":0}}'
    assert record.encode("manifest", BODY) == expected.encode()


def test_what_was_encoded_decodes() -> None:
    fields = record.decode("k", record.encode("k", BODY), key="some/key")
    assert dict(fields.values) == BODY
    assert fields.fields("a").text("text") == "größe 日本"


def test_every_truncation_is_refused() -> None:
    data = record.encode("k", BODY)
    for length in range(len(data)):
        with pytest.raises(IntegrityError) as caught:
            record.decode("k", data[:length], key="some/key")
        assert caught.value.key == "some/key"


def test_every_flipped_bit_is_noticed() -> None:
    data = record.encode("k", BODY)
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(IntegrityError):
                record.decode("k", bytes(damaged), key="some/key")


def test_a_later_format_and_an_unknown_suite_are_refused_by_number() -> None:
    later = sealed("{}", format=7, checksum="of more than the body")
    with pytest.raises(FormatVersionError, match="format 7") as caught:
        record.decode("k", later, key="some/key")
    assert "newer" in (caught.value.hint or "")
    with pytest.raises(FormatVersionError, match="suite 3"):
        record.decode("vm", sealed("{}", suite=3, kind="vm"), key="some/key")


def test_a_version_that_its_checksum_belies_is_damage() -> None:
    for version, suite in ((7, 0), (1, 3), (0, 0)):
        with pytest.raises(IntegrityError, match="not that of its checksum"):
            record.decode("k", sealed("{}", format=version, suite=suite), key="some/key")


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"'k'.*'lease'"):
        record.decode("lease", sealed("{}"), key="some/key")


def test_unknown_fields_are_ignored() -> None:
    assert record.decode("k", sealed('{"later":[{}]}', later=1), key="k").values == {"later": [{}]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"17",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        sealed("[]"),
        sealed("null"),
        sealed('"\\ud800"'),
        sealed('{"a":"\\ud800"}'),
        sealed('{"\\udfff":1}'),
        sealed("{}", checksum=5),
        sealed("{}", checksum="0" * 32),
        sealed("{}", format="1"),
        sealed("{}", format=True),
        sealed("{}", format=-1),
        sealed("{}", suite=None),
        sealed("{}", kind=None),
        sealed("{}", kind="\x1b[31m"),
        b'{"body":{},"format":' + b"9" * 5000 + b"}",
    ],
)
def test_hostile_records_are_integrity_errors(data: bytes) -> None:
    with pytest.raises((IntegrityError, FormatVersionError)) as caught:
        record.decode("k", data, key="some/key")
    assert caught.value.key == "some/key"


def test_a_record_past_the_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LARGEST_RECORD_BYTES", 100)
    with pytest.raises(IntegrityError, match="too large"):
        record.decode("k", b"x" * 101, key="some/key")


HOSTILE: tuple[Any, ...] = (None, True, -1, 2**70, 10**400, 1.5, float("nan"), float("inf"), "", "x", "²", [], {}, [1])


@pytest.mark.parametrize(
    "read",
    [
        lambda f: f.text("x"),
        lambda f: f.optional_text("x"),
        lambda f: f.integer("x", least=1, most=10),
        lambda f: f.number("x"),
        lambda f: f.truth("x"),
        lambda f: f.hexadecimal("x", digits=4),
        lambda f: f.time("x"),
        lambda f: f.fields("x"),
        lambda f: f.list_of_fields("x"),
        lambda f: f.integers("x"),
    ],
)
def test_a_field_of_another_type_is_named(read: Callable[[Fields], object]) -> None:
    refused = 0
    for value in (*HOSTILE, "missing"):
        values = {} if value == "missing" else {"x": value}
        try:
            read(Fields(values, "some/key"))
        except IntegrityError as error:
            refused += 1
            assert error.key == "some/key"
            assert "'x'" in error.message
            assert len(error.message) < 200
    assert refused >= len(HOSTILE) // 2


@pytest.mark.parametrize(
    "text",
    [
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        "2026-01-01",
        "2026-01-01T00:00:00",
        "2026-13-01T00:00:00Z",
        "yesterday",
        "2026-01-01T00:00:00Z\n",
    ],
)
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(IntegrityError, match="time"):
        Fields({"x": text}, "some/key").time("x")


def test_times_are_written_in_utc_and_read_back() -> None:
    moment = datetime(2026, 5, 1, 10, 0, 0, 123456, timezone(timedelta(hours=2)))
    assert record.time_text(moment) == "2026-05-01T08:00:00.123456Z"
    read = Fields({"x": record.time_text(moment)}, "k").time("x")
    assert read == moment
    assert read.tzinfo is UTC
