"""A disk with bytes laid over it: every way of reading gives what a plain array would; and conversions as such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.errors import DamagedError, RefusedError
from conversion.manifest import Component, Manifest, Written
from replica.generation.patched import Conversion, PatchedDisk, patched, plan_conversion
from replica.model import Machine
from vhdx.errors import OutOfRangeError, ReadOnlyError
from vhdx.raw import RawDisk

SIZE = 64 << 10
HOLE = (16 << 10, 48 << 10)


@pytest.fixture
def base(tmp_path: Path) -> RawDisk:
    return make_base(tmp_path)


def make_base(folder: Path) -> RawDisk:
    """Return a disk of ones, with a hole that reads as zeros."""
    path = folder / "base.raw"
    with path.open("wb") as file:
        file.write(b"\1" * HOLE[0])
        file.seek(HOLE[1])
        file.write(b"\1" * (SIZE - HOLE[1]))
    return RawDisk.open(path)


@st.composite
def layers(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Ranges that do not overlap, in any order."""
    bounds = sorted(draw(st.sets(st.integers(0, SIZE), max_size=12)))
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    made = [(start, bytes([2 + number]) * (end - start)) for number, (start, end) in enumerate(pairs)]
    return draw(st.permutations(made))


@settings(max_examples=60, deadline=None)
@given(layers(), st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=6))
def test_it_reads_as_an_array_with_the_ranges_written(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, bytes]], reads: list[tuple[int, int]]
) -> None:
    with make_base(tmp_path_factory.mktemp("patched")) as below:
        model = bytearray(below.read_at(0, SIZE))
        holds = np.zeros(SIZE, bool)
        for extents in below.allocated():
            for start, end in extents:
                holds[start:end] = True
        for offset, content in ranges:
            model[offset : offset + len(content)] = content
            holds[offset : offset + len(content)] = True
        disk = PatchedDisk(below, ranges)
        for one, other in [*reads, (0, SIZE)]:
            start, end = min(one, other), max(one, other)
            assert disk.read_at(start, end - start) == model[start:end]
            assert b"".join(disk.read_parts(start, end - start)) == model[start:end]
            buffer = bytearray(end - start)
            disk.read_into(start, buffer)
            assert buffer == model[start:end]
            found = np.zeros(SIZE, bool)
            last = start
            for extents in disk.allocated(start, end):
                for first, stop in extents:
                    assert last <= first < stop <= end
                    found[first:stop] = True
                    last = stop
            assert not (holds[start:end] & ~found[start:end]).any()
            assert not found[:start].any() and not found[end:].any()


def test_it_is_for_reading_and_keeps_to_its_bounds(base: RawDisk) -> None:
    disk = PatchedDisk(base, [(512, b"x" * 512)])
    single = PatchedDisk(base, [(5, b"x"), (6, b"y")])
    assert (single.read_at(4, 4), single.read_at(5, 1), single.read_at(6, 1)) == (b"\1xy\1", b"x", b"y")
    assert (disk.size, disk.sector_size, disk.read_only) == (SIZE, 512, True)
    with pytest.raises(ReadOnlyError):
        disk.write_at(0, b"x")
    with pytest.raises(ReadOnlyError):
        disk.trim(0, 512)
    for offset, length in ((SIZE, 1), (-1, 1), (0, SIZE + 1)):
        with pytest.raises(OutOfRangeError):
            disk.read_at(offset, length)
        with pytest.raises(OutOfRangeError):
            disk.read_parts(offset, length)


def test_ranges_that_overlap_or_lie_outside_are_refused(base: RawDisk) -> None:
    with pytest.raises(ValueError, match="overlap"):
        PatchedDisk(base, [(512, b"x" * 512), (1000, b"y")])
    with pytest.raises(OutOfRangeError):
        PatchedDisk(base, [(SIZE - 1, b"xy")])


def manifest(size: int, *ranges: tuple[int, bytes]) -> Manifest:
    """Return a manifest of a conversion that wrote these ranges."""
    written = tuple(Written(offset, bytes(len(after)), after) for offset, after in ranges)
    parts = tuple(Component(str(number), {}, (one,)) for number, one in enumerate(written))
    return Manifest("linux", size, 512, parts)


def test_a_conversion_is_laid_over_its_disk_alone(base: RawDisk) -> None:
    conversion = Conversion(3, manifest(SIZE, (512, b"x" * 512), (0, b"y" * 512)))
    assert conversion.applied(3, base).read_at(0, 1536) == b"y" * 512 + b"x" * 512 + b"\1" * 512
    assert conversion.applied(2, base) is base
    assert Conversion().applied(3, base) is base


def test_a_manifest_of_another_disk_or_one_that_contradicts_itself_is_refused(base: RawDisk) -> None:
    with pytest.raises(DamagedError, match=f"has {SIZE}"):
        patched(base, manifest(SIZE + 512, (0, b"x" * 512)))
    with pytest.raises(DamagedError, match="contradicts itself"):
        patched(base, manifest(SIZE, (0, b"x" * 512), (0, b"y" * 512)))


def test_a_machine_without_a_disk_to_start_from_is_refused(base: RawDisk) -> None:
    with pytest.raises(RefusedError, match="no disk has an EFI system partition") as caught:
        plan_conversion([(0, base)], Machine(2))
    assert caught.value.exit_code == 14
    assert plan_conversion([(0, base)], Machine(1)) == Conversion()
