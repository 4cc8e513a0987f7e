"""A crash at any write, flush or change of size leaves a VHDX that opens and reads as its contract says."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.crash_files import CrashPoint, RecordingFiles, crash_points, scratch_folder
from tests.support.crash_model import Begun, Flushed, assert_possible
from vhdx.chain import open_vhdx
from vhdx.create import Kind, create_disk
from vhdx.errors import DiskError, ParentError
from vhdx.vhdx import VhdxDisk
from vhdx.writer import open_writable

MIB = 1 << 20
SIZE = 4 * MIB + 4096


class Recorded:
    """A disk being written under a recorder, beside the bytearray that it must read as."""

    def __init__(self, path: Path, *, fail_at: int = -1, applied: bool = False) -> None:
        self.files = RecordingFiles(path.parent, fail_at=fail_at, applied=applied)
        with open_vhdx(path) as disk:
            self.initial = disk.read_at(0, disk.size)
        self.path = path
        self.model = bytearray(self.initial)
        self.disk: VhdxDisk = open_writable(path, files=self.files)

    def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        self.files.mark(Begun(bytes(self.model)))
        self.disk.write_at(offset, data)

    def trim(self, offset: int, length: int) -> None:
        self.model[offset : offset + length] = bytes(length)
        self.files.mark(Begun(bytes(self.model)))
        self.disk.trim(offset, length)

    def flush(self) -> None:
        self.disk.flush()
        self.files.mark(Flushed(bytes(self.model)))

    def close(self) -> None:
        self.disk.close()
        self.files.mark(Flushed(bytes(self.model)))

    def reopen(self) -> None:
        self.close()
        self.disk = open_writable(self.path, files=self.files)


def make_disk(folder: Path, kind: Kind, sector_size: int) -> Path:
    """Make a small disk of a kind; a differencing one has a parent with data in most blocks."""
    path = folder / "disk.vhdx"
    if kind != "differencing":
        create_disk(path, size=SIZE, kind=kind, block_size=MIB, sector_size=sector_size)
        return path
    parent = folder / "parent.vhdx"
    create_disk(parent, size=SIZE, block_size=MIB, sector_size=sector_size)
    with open_writable(parent) as disk:
        for offset in range(0, SIZE, MIB // 2):
            disk.write_at(
                offset, bytes([offset // (MIB // 2) + 1]) * (SIZE - offset if offset + MIB > SIZE else 300_000)
            )
    create_disk(path, parent=parent, block_size=MIB)
    return path


def workload(recorded: Recorded) -> None:
    """Every kind of request, at odd places, with and without flushes between."""
    chance = random.Random(7)
    recorded.write(10, b"first" * 100)
    recorded.flush()
    recorded.write(MIB - 700, chance.randbytes(2000))  # two blocks, partial sectors
    recorded.write(4096, chance.randbytes(8192))
    recorded.flush()
    recorded.write(2 * MIB, chance.randbytes(MIB))  # a whole block
    recorded.trim(0, MIB)  # frees one
    recorded.write(512, b"again" * 300)  # into the freed block
    recorded.flush()
    recorded.trim(MIB + 100, 5000)
    recorded.write(3 * MIB + 9, chance.randbytes(4096))  # takes the place that was freed, in part
    recorded.write(20, b"x")
    recorded.flush()
    recorded.flush()
    recorded.trim(MIB // 2, 2 * MIB)
    recorded.reopen()
    recorded.write(MIB, chance.randbytes(600))
    recorded.trim(4 * MIB, 4096)
    recorded.close()


def check_all(recorded: Recorded, folder: Path, check: Callable[[CrashPoint], None] = lambda point: None) -> int:
    count = 0
    for point in crash_points(recorded.files):
        point.write_to(folder)
        with open_vhdx(folder / recorded.path.name) as disk:
            assert_possible(disk.read_at(0, disk.size), recorded.initial, point.marks, point)
        check(point)
        count += 1
    return count


@pytest.fixture
def crashed() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def again() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def source() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("kind", ["dynamic", "differencing", "fixed"])
def test_every_crash_point_of_writing_reads_as_promised(
    source: Path, crashed: Path, kind: Kind, sector_size: int
) -> None:
    recorded = Recorded(make_disk(source, kind, sector_size))
    workload(recorded)
    assert check_all(recorded, crashed) > 50


def test_after_a_crash_the_disk_can_be_written_on(source: Path, crashed: Path) -> None:
    recorded = Recorded(make_disk(source, "differencing", 512))
    workload(recorded)

    def write_on(point: CrashPoint) -> None:
        if point.ordinal % 3:
            return
        path = crashed / "disk.vhdx"
        with open_writable(path) as disk:
            before = bytearray(disk.read_at(0, disk.size))
            assert_possible(bytes(before), recorded.initial, point.marks, point)
            disk.write_at(MIB - 5, b"0123456789")
            before[MIB - 5 : MIB + 5] = b"0123456789"
        with open_vhdx(path) as disk:
            assert disk.read_at(0, disk.size) == before
            assert not disk.image.replay

    check_all(recorded, crashed, write_on)


def test_replay_to_disk_may_itself_be_cut_off_anywhere(source: Path, crashed: Path, again: Path) -> None:
    recorded = Recorded(make_disk(source, "differencing", 512))
    workload(recorded)
    replays = 0
    for point in crash_points(recorded.files, seeds=1):
        if point.mode not in ("none", "seed 0") or point.ordinal % 5:
            continue
        point.write_to(crashed)
        path = crashed / "disk.vhdx"
        with open_vhdx(path) as disk:
            if not disk.image.replay:
                continue
            expected = disk.read_at(0, disk.size)
        replays += 1
        second = RecordingFiles(crashed)
        open_writable(path, files=second).image.close()
        assert second.effects
        for inner in crash_points(second, seeds=1):
            inner.write_to(again)
            with open_vhdx(again / "disk.vhdx") as disk:
                assert disk.read_at(0, disk.size) == expected, f"{point}, then {inner}"
    assert replays > 3


@pytest.mark.parametrize("applied", [False, True])
def test_an_error_at_any_effect_stops_the_writer_and_loses_nothing_flushed(
    source: Path, crashed: Path, applied: bool
) -> None:
    path = make_disk(source, "differencing", 512)
    clean = RecordingFiles(source)
    recorded = Recorded(path)
    workload(recorded)
    total = len(recorded.files.effects)
    for ordinal in range(0, total, 2):
        for file, inode in clean.base_names.items():
            clean.base[inode].write_to(file)
        failing = Recorded(path, fail_at=ordinal, applied=applied)
        try:
            workload(failing)
        except DiskError:
            if failing.disk.writer is not None:
                with pytest.raises(DiskError):
                    failing.disk.flush()
        failing.disk.close()
        with open_vhdx(path) as disk:
            actual = disk.read_at(0, disk.size)
        assert_possible(actual, failing.initial, (mark for _, mark in failing.files.marks), f"effect {ordinal} fails")


def test_no_crash_lets_a_child_accept_a_parent_that_changed(source: Path, crashed: Path) -> None:
    parent = make_disk(source, "dynamic", 512)
    with open_writable(parent) as disk:
        disk.write_at(0, b"x" * 2 * MIB)
    create_disk(source / "child.vhdx", parent=parent, block_size=MIB)
    recorded = Recorded(parent)
    recorded.write(100, b"y" * 1000)
    recorded.trim(MIB, MIB)
    recorded.close()
    refused = 0
    for point in crash_points(recorded.files):
        point.write_to(crashed)
        try:
            with open_vhdx(crashed / "child.vhdx") as disk:
                assert disk.read_at(0, SIZE) == recorded.initial, point
        except ParentError:
            refused += 1
    assert refused > 5


def test_a_disk_that_was_only_opened_is_not_touched(source: Path) -> None:
    path = make_disk(source, "dynamic", 512)
    before = path.read_bytes()
    open_writable(path).close()
    assert path.read_bytes() == before


def test_the_first_write_of_a_session_changes_both_write_guids_and_close_empties_the_log(source: Path) -> None:
    path = make_disk(source, "dynamic", 512)
    with open_vhdx(path) as disk:
        before = disk.image.header
    with open_writable(path) as disk:
        disk.write_at(0, b"x")
        disk.flush()
        during = disk.image.header
        assert during.log_guid != uuid.UUID(int=0)
    with open_vhdx(path) as disk:
        after = disk.image.header
        assert disk.image.header_faults == (None, None)
    assert before.file_write_guid != after.file_write_guid == during.file_write_guid
    assert before.data_write_guid != after.data_write_guid == during.data_write_guid
    assert after.log_guid == uuid.UUID(int=0)


def test_crashes_after_the_log_has_gone_round_replay_only_what_is_newest(source: Path, crashed: Path) -> None:
    recorded = Recorded(make_disk(source, "differencing", 512))
    for turn in range(120):  # three sectors of the log each, and one more: it has 256
        recorded.write(turn % 4 * MIB + turn % 50 * 4096, bytes([turn + 1]) * 512)
        if turn % 30 == 0:
            recorded.trim(2 * MIB, MIB)
        recorded.flush()
    count = 0
    for point in crash_points(recorded.files, seeds=1, start=len(recorded.files.effects) * 5 // 6):
        count += 1
        point.write_to(crashed)
        with open_vhdx(crashed / "disk.vhdx") as disk:
            assert_possible(disk.read_at(0, disk.size), recorded.initial, point.marks, point)
            plan = disk.image.replay
            assert plan is None or len(plan.entries) <= 2
    recorded.disk.close()
    assert count > 80
