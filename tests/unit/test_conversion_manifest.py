"""The conversion manifest: what is written comes back, and a single wrong bit is noticed."""

from __future__ import annotations

import random
import struct

import pytest

from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.manifest import Component, Manifest, Written
from tests.support.block_devices import MemoryDevice

MANIFEST = Manifest(
    "linux",
    1 << 30,
    512,
    (
        Component("places", {}, (Written(17408, bytes(1024), b"core" * 256), Written(40960, b"a" * 512, b"b" * 512))),
        Component("switch", {"number": 1, "text": "ü", "list": [1, None, True]}, (Written(0, bytes(512), b"m" * 512),)),
    ),
)


def test_it_comes_back_as_it_was_written() -> None:
    data = MANIFEST.encode()
    assert Manifest.decode(data) == MANIFEST
    assert Manifest.decode(data).encode() == data
    assert MANIFEST.component("switch") is MANIFEST.components[1]
    assert MANIFEST.component("esp") is None


def test_every_cut_and_every_flipped_bit_is_noticed() -> None:
    data = MANIFEST.encode()
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            Manifest.decode(data[:length])
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ConversionError):
            Manifest.decode(bytes(flipped))


def test_another_version_is_named() -> None:
    data = bytearray(MANIFEST.encode())
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(UnsupportedError, match="version 2"):
        Manifest.decode(bytes(data))


@pytest.mark.parametrize(
    "ranges",
    [
        (Written(1 << 30, b"a", b"b"),),
        (Written(0, bytes(1024), bytes(1024)), Written(512, b"a" * 512, b"b" * 512)),
    ],
)
def test_a_manifest_that_contradicts_itself_is_not_believed(ranges: tuple[Written, ...]) -> None:
    with pytest.raises(DamagedError):
        Manifest.decode(Manifest("windows", 1 << 30, 512, (Component("esp", {}, ranges),)).encode())


def test_a_component_stands_while_every_byte_of_it_does() -> None:
    device = MemoryDevice(bytearray(1 << 16))
    component = MANIFEST.components[0]
    assert not component.stands(device)
    for one in component.ranges:
        device.write_at(one.offset, one.after)
    assert component.stands(device)
    drawn = random.Random(1)
    for one in component.ranges:
        at = one.offset + drawn.randrange(len(one.after))
        held = device.read_at(at, 1)
        device.write_at(at, bytes([held[0] ^ 1]))
        assert not component.stands(device)
        device.write_at(at, held)
