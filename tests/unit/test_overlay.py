"""A conversion's overlay: reads as a disk that was written to, knows why, and leaves the disk below as it was."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.errors import ConversionError
from conversion.overlay import LARGEST_CHANGES_BYTES, Overlay
from tests.support.block_devices import MemoryDevice

SIZE = 40 * 512


def _device(size: int = SIZE) -> MemoryDevice:
    return MemoryDevice(bytearray(number % 251 for number in range(size)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 2000), st.integers(0, 255)), max_size=10))
def test_it_reads_as_a_disk_that_was_written_to(writes: list[tuple[int, int, int]]) -> None:
    device = _device()
    overlay = Overlay(device)
    model = bytearray(device.read_at(0, SIZE))
    before = bytes(model)
    for offset, length, fill in writes:
        length = min(length, SIZE - offset)
        overlay.write_at(offset, bytes([fill]) * length)
        model[offset : offset + length] = bytes([fill]) * length
    assert overlay.read_at(0, SIZE) == bytes(model)
    assert device.read_at(0, SIZE) == before
    rebuilt = bytearray(before)
    for offset, data in overlay.written():
        assert overlay.before(offset, len(data)) == before[offset : offset + len(data)]
        rebuilt[offset : offset + len(data)] = data
    assert rebuilt == model
    assert sum(length for change in overlay.changes() for _, length in change.extents) == sum(
        len(data) for _, data in overlay.written()
    )


def test_what_ends_up_as_it_was_is_no_change() -> None:
    device = _device()
    overlay = Overlay(device)
    overlay.write_at(100, b"x" * 1000)
    overlay.write_at(100, device.read_at(100, 1000))
    assert list(overlay.written()) == []
    assert overlay.changes() == ()


def test_it_knows_what_was_written_by_whom_and_why() -> None:
    overlay = Overlay(_device())
    with overlay.component("esp"), overlay.because("/bootmgr", "it starts Windows"):
        overlay.write_at(512, b"a" * 1024)
    with overlay.component("switch"), overlay.because("master boot record", "a BIOS reads it"):
        overlay.write_at(0, b"b" * 512)
    assert [offset for offset, _ in overlay.written("esp")] == [512]
    assert [offset for offset, _ in overlay.written("switch")] == [0]
    assert [(one.what, one.why, one.extents) for one in overlay.changes()] == [
        ("/bootmgr", "it starts Windows", ((512, 1024),)),
        ("master boot record", "a BIOS reads it", ((0, 512),)),
    ]


def test_a_plan_outlives_the_disk_that_it_was_made_on() -> None:
    class Closing(MemoryDevice):
        closed = False

        def read_at(self, offset: int, length: int) -> bytes:
            assert not self.closed
            return super().read_at(offset, length)

    device = Closing(bytearray(SIZE))
    overlay = Overlay(device)
    overlay.write_at(700, b"z" * 700)
    device.closed = True
    assert len(list(overlay.written())) == 1
    assert len(overlay.changes()) == 1


def test_a_writer_that_runs_away_is_stopped() -> None:
    overlay = Overlay(MemoryDevice(bytearray(LARGEST_CHANGES_BYTES + (1 << 20))))
    with pytest.raises(ConversionError, match="more than"):
        for offset in range(0, LARGEST_CHANGES_BYTES + 1, 1 << 20):
            overlay.write_at(offset, b"x" * (1 << 20))


def test_ranges_outside_are_refused() -> None:
    overlay = Overlay(_device())
    for offset, length in ((-1, 2), (SIZE - 1, 2)):
        with pytest.raises(ValueError, match="outside"):
            overlay.read_at(offset, length)
        with pytest.raises(ValueError, match="outside"):
            overlay.write_at(offset, bytes(length))
