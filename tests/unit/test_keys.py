"""Object keys: as docs/format.md writes them, in the order of their numbers, safe whatever a VM is called."""

from __future__ import annotations

import random

import pytest

from replica import keys
from replica.errors import IntegrityError, UsageError
from replica.keys import PartId, VmKeys, part_of, point_of
from replica.stores.key import check_key

VM = "0123456789abcdef" * 2
V = VmKeys("default", VM)


def test_keys_are_those_of_the_format() -> None:
    prefix = f"tenants/default/vms/{VM}/"
    part = PartId(12, 3, 45)
    assert keys.STORE == "godwit.json"
    assert keys.name("default", "web 1.a/é") == "tenants/default/names/web%201%2Ea%2F%C3%A9.json"
    assert (V.vm, V.lease) == (f"{prefix}vm.json", f"{prefix}lease.json")
    assert V.settings(7) == f"{prefix}settings/00000000000000000007.json"
    assert V.manifest(12) == f"{prefix}manifests/00000000000000000012.json"
    assert V.map_part(part) == f"{prefix}maps/00000000000000000012/0000000003-000045"
    assert V.segment(part) == f"{prefix}segments/00000000000000000012/0000000003-000045"
    assert V.conversion(12, 3) == f"{prefix}conversions/00000000000000000012-00003"


def test_the_order_of_keys_is_the_order_of_numbers() -> None:
    drawn = random.Random(1)
    numbers = sorted({drawn.randrange(1, 10 ** drawn.randrange(1, 20)) for _ in range(300)})
    parts = sorted(
        PartId(drawn.choice(numbers), drawn.randrange(keys.LARGEST_EPOCH), drawn.randrange(keys.LARGEST_ORDINAL))
        for _ in range(300)
    )
    assert [V.manifest(n) for n in numbers] == sorted(V.manifest(n) for n in numbers)
    assert [V.settings(n) for n in numbers] == sorted(V.settings(n) for n in numbers)
    assert [V.segment(p) for p in parts] == sorted(V.segment(p) for p in parts)


def test_what_a_key_says_is_read_back() -> None:
    part = PartId(2**63, keys.LARGEST_EPOCH, keys.LARGEST_ORDINAL)
    assert part_of(V.segment(part)) == part
    assert part_of(V.map_part(part)) == part
    assert point_of(V.manifest(77)) == 77
    for other in (V.vm, V.lease, V.manifests + "note.txt", V.manifest(1) + ".part", V.segment(part) + "x"):
        assert point_of(other) is None
        assert part_of(other) is None


def test_segments_after_a_point_sort_after_all_of_it_and_before_the_next() -> None:
    edge = V.segments_after(5)
    assert V.segment(PartId(5, keys.LARGEST_EPOCH, keys.LARGEST_ORDINAL)) < edge < V.segment(PartId(6, 0, 0))


HOSTILE = [
    "web",
    "../..",
    "..",
    ".",
    "/etc/passwd",
    "a/b\\c",
    "CON",
    "a%2Fb",
    "~root",
    'quo"te<>|?*:',
    "日本のサーバー",
    "e\u0301",
    "\u202egnp.exe",
    "\x9b31m",
    "😀" * 10,
    "x" * 200,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_that_is_taken_makes_one_valid_key_and_comes_back(name: str) -> None:
    key = keys.name("default", name)
    assert check_key(key) == key
    assert key.count("/") == 3
    assert keys.name_of(key) == name


def test_names_that_differ_have_keys_that_differ() -> None:
    assert len({keys.name("default", name) for name in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize(
    "name", ["", " ", " web", "web ", "a\nb", "a\tb", "\x1b[31mred", "a\0b", "\x7f", "bad\udcff", "x" * 201, "é" * 34]
)
def test_names_that_cannot_be_shown_or_stored_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        keys.encode_name(name)


@pytest.mark.parametrize("tenant", ["", "A", "a_b", "-a", "a-", "a/b", "..", "a" * 64, "é", "a\n"])
def test_a_tenant_is_letters_digits_and_hyphens(tenant: str) -> None:
    with pytest.raises(UsageError):
        keys.check_tenant(tenant)
    with pytest.raises(UsageError):
        VmKeys(tenant, VM)


@pytest.mark.parametrize("tenant", ["a", "default", "0", "a-b", "a" * 63])
def test_good_tenants(tenant: str) -> None:
    assert keys.check_tenant(tenant) == tenant


@pytest.mark.parametrize(
    "vm_id", ["", "..", "../" * 10 + "aa", VM.upper().replace("0", "A"), VM[:-1], VM + "0", VM + "\n"]
)
def test_a_vm_id_that_is_none_reaches_no_key(vm_id: str) -> None:
    with pytest.raises(IntegrityError):
        VmKeys("default", vm_id)
