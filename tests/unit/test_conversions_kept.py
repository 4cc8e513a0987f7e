"""Conversion manifests as objects of a VM: kept once, sealed where the VM is, and refused where they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion.manifest import Component, Manifest, Written
from replica.errors import IntegrityError
from replica.failover import conversions
from replica.generation.patched import Conversion
from replica.model import ConversionRef
from replica.stores.memory import MemoryStore
from tests.support.encryption import encrypted_lab
from tests.support.engine import BLOCK, Lab, make_lab, random_blocks

REF = ConversionRef(1, 0)


def manifest(after: bytes) -> Manifest:
    return Manifest("linux", 4 * BLOCK, 512, (Component("switch", {}, (Written(0, bytes(len(after)), after),)),))


def lab(folder: Path, *, encrypted: bool) -> tuple[Lab, MemoryStore]:
    disks, inner = [random_blocks(1, 4)], MemoryStore("lab")
    made = encrypted_lab(folder, disks, inner) if encrypted else make_lab(folder, disks, store=inner)
    made.replicate()
    return made, inner


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_the_first_conversion_of_a_point_is_the_one_that_counts(tmp_path: Path, encrypted: bool) -> None:
    vm, inner = lab(tmp_path, encrypted=encrypted)
    first, second = manifest(b"a" * 512), manifest(b"b" * 512)
    assert conversions.keep(vm.store, vm.found, 1, Conversion(0, first)).manifest == first
    assert conversions.keep(vm.store, vm.found, 1, Conversion(0, second)).manifest == first
    assert conversions.read(vm.store, vm.found, REF) == first
    key = vm.found.keys.conversion(1, 0)
    assert (inner.get(key) == first.encode()) is not encrypted


def test_one_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    vm, _ = lab(tmp_path, encrypted=False)
    key = vm.found.keys.conversion(1, 0)
    with pytest.raises(IntegrityError, match="missing"):
        conversions.read(vm.store, vm.found, REF)
    vm.store.create(key, manifest(b"a" * 512).encode()[:-1])
    with pytest.raises(IntegrityError, match="damaged") as caught:
        conversions.read(vm.store, vm.found, REF)
    assert caught.value.key == key
    with pytest.raises(IntegrityError):
        conversions.keep(vm.store, vm.found, 1, Conversion(0, manifest(b"a" * 512)))


def test_nothing_is_kept_where_nothing_is_converted(tmp_path: Path) -> None:
    vm, _ = lab(tmp_path, encrypted=False)
    assert conversions.refs(1, conversions.keep(vm.store, vm.found, 1, Conversion())) == ()
    assert not list(vm.store.list(f"{vm.found.keys.prefix}conversions/"))
