"""Manifests: round trips, the fields of the format, and hostile JSON in every field."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from replica import manifest, record
from replica.block import Digest
from replica.errors import IntegrityError
from replica.keys import PartId
from replica.model import (
    Consistency,
    CycleStatistics,
    DiskRecord,
    Fence,
    Machine,
    MapPartRef,
    MapRef,
    Nic,
    Point,
)
from tests.support.engine import START

VM = "0f" * 16
KEY = "the/manifest"


def part(number: int, first: int, last: int) -> MapPartRef:
    return MapPartRef(PartId(3, 2, number), 10, first, last, 500, f"{number:032x}")


POINT = Point(
    vm_id=VM,
    point=5,
    epoch=4,
    previous=3,
    created_at=START,
    published_at=START + timedelta(seconds=90, microseconds=1),
    consistency=Consistency.CRASH,
    vm_name="größe \u202e",
    machine=Machine(2, 8, 3 << 30, (Nic("00:15:5d:01:02:03", "LAN"), Nic()), True),
    disks=(
        DiskRecord(0, "os", 10 << 30, 512, "vhdx", "scsi", 17, Digest(1, 2**64 - 1), {"path": "C:\\a.vhdx"}),
        DiskRecord(2, "data", 512, 4096, "raw", "scsi", 1, Digest(3, 4)),
    ),
    maps=(
        MapRef(2, (part(0, 0, 10), part(1, 11, 2**48))),
        MapRef(0, (part(2, 5, 5),)),
    ),
    cycle=CycleStatistics(1, 2, 3, 4, 5, 6, 7.125),
)
FENCE = Fence(VM, 5, 4, START)


def decode(data: bytes) -> Point | Fence:
    return manifest.decode(data, key=KEY, vm_id=VM, point=5)


@pytest.mark.parametrize("made", [POINT, FENCE, replace(POINT, disks=(), maps=(), previous=0, vm_name="")])
def test_a_manifest_reads_back_as_it_was(made: Point | Fence) -> None:
    assert decode(manifest.encode(made)) == made


def test_a_manifest_has_the_fields_of_the_format() -> None:
    body = json.loads(manifest.encode(POINT))["body"]
    assert (body["type"], body["point"], body["epoch"], body["previous"], body["vm_id"]) == ("point", 5, 4, 3, VM)
    assert (body["created_at"], body["published_at"]) == ("2026-01-02T03:04:05.000000Z", "2026-01-02T03:05:35.000001Z")
    assert body["machine"] == {
        "generation": 2,
        "firmware": "uefi",
        "secure_boot": True,
        "cpus": 8,
        "memory_bytes": 3 << 30,
        "nics": [{"mac": "00:15:5d:01:02:03", "network": "LAN"}, {"mac": None, "network": None}],
    }
    assert body["disks"][0]["digest"] == "0000000000000001ffffffffffffffff"
    assert body["maps"][0]["parts"][1] == {
        "point": 3,
        "epoch": 2,
        "ordinal": 1,
        "entries": 10,
        "first_key": "000000000000000b",
        "last_key": "0001000000000000",
        "size_bytes": 500,
        "checksum": f"{1:032x}",
    }
    assert json.loads(manifest.encode(FENCE))["body"] == {
        "type": "fence",
        "point": 5,
        "epoch": 4,
        "vm_id": VM,
        "published_at": "2026-01-02T03:04:05.000000Z",
    }


def test_a_manifest_under_another_key_is_refused() -> None:
    for made in (POINT, FENCE):
        for vm_id, point in (("0e" * 16, 5), (VM, 6)):
            with pytest.raises(IntegrityError, match="mixed up"):
                manifest.decode(manifest.encode(made), key=KEY, vm_id=vm_id, point=point)


def body_of(made: Point | Fence) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(manifest.encode(made))["body"]
    return body


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every field within."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found += places(inner, (*path, number))
    return found


def inner(body: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        body = body[step]
    return body


HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1.5, float("inf"), float("nan")),
    *("", "x", "²", "\x1b", "0" * 32, "f" * 16, "../..", "2026-01-01", "9999-12-31T23:59:59-23:59"),
    *([], {}, [1], [None], [{}], {"a": 1}, [[]], "y" * 10_000),
)
OPTIONAL = {"mac", "network"}
FREE = {"vm_name", "name", "format", "bus"}  # any text will do


@pytest.mark.parametrize("made", [POINT, FENCE], ids=["point", "fence"])
def test_a_field_that_is_missing_is_named(made: Point | Fence) -> None:
    for path in places(body_of(made)):
        if not isinstance(path[-1], str) or path[-1] in OPTIONAL | {"firmware", "path"}:
            continue
        body = body_of(made)
        del inner(body, path[:-1])[path[-1]]
        with pytest.raises(IntegrityError) as caught:
            decode(record.encode(manifest.KIND, body))
        assert caught.value.key == KEY
        assert path[-1] in str(caught.value)


@pytest.mark.parametrize("made", [POINT, FENCE], ids=["point", "fence"])
def test_hostile_values_in_every_field_give_a_manifest_or_an_integrity_error(made: Point | Fence) -> None:
    good = body_of(made)
    for path in places(good):
        refused = 0
        for value in HOSTILE:
            body = copy.deepcopy(good)
            inner(body, path[:-1])[path[-1]] = value
            try:
                decode(record.encode(manifest.KIND, body))
            except IntegrityError as error:
                refused += 1
                assert error.key == KEY
                assert len(str(error)) < 300
        least = 0 if path[-1] in {"firmware"} else 8 if path[-1] in OPTIONAL | FREE | {"path"} else len(HOSTILE) - 8
        assert refused >= least, path


def test_many_hostile_values_at_once_give_integrity_errors_alone() -> None:
    drawn = random.Random(1)
    good = body_of(POINT)
    all_places = places(good)
    for _ in range(500):
        body = copy.deepcopy(good)
        for path in drawn.sample(all_places, drawn.randrange(1, 5)):
            try:
                inner(body, path[:-1])[path[-1]] = drawn.choice(HOSTILE)
            except (KeyError, IndexError, TypeError):
                continue  # an outer field was replaced before
        try:
            decode(record.encode(manifest.KIND, body))
        except IntegrityError as error:
            assert error.key == KEY


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("type",), "checkpoint", "type"),
        (("previous",), 5, "previous"),
        (("consistency",), "eventual", "consistency"),
        (("machine", "generation"), 3, "generation"),
        (("machine", "cpus"), 0, "cpus"),
        (("disks", 1, "number"), 0, "twice"),
        (("disks", 0, "number"), 65536, "number"),
        (("disks", 0, "size_bytes"), 0, "size_bytes"),
        (("disks", 0, "size_bytes"), (64 << 40) + 1, "size_bytes"),
        (("disks", 1, "data_blocks"), 2, "data_blocks"),
        (("disks", 0, "digest"), "F" * 32, "digest"),
        (("disks", 0, "sector_size_bytes"), 513, "sector_size_bytes"),
        (("maps", 0, "parts"), [], "parts"),
        (("maps", 0, "parts", 0, "first_key"), f"{11:016x}", "order"),
        (("maps", 0, "parts", 0, "last_key"), f"{11:016x}", "order"),
        (("maps", 0, "parts", 0, "epoch"), 0, "epoch"),
        (("maps", 0, "level"), 65, "level"),
    ],
)
def test_what_contradicts_the_format_is_named(path: tuple[Any, ...], value: object, message: str) -> None:
    body = body_of(POINT)
    inner(body, path[:-1])[path[-1]] = value
    with pytest.raises(IntegrityError, match=message):
        decode(record.encode(manifest.KIND, body))
