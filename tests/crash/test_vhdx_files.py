"""A crash while a VHDX is created, resized, merged or compacted leaves disks that read right, and can be finished."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.crash_files import CrashPoint, RecordingFiles, crash_points, scratch_folder
from vhdx.chain import open_vhdx, parent_linkages
from vhdx.change import merge_image
from vhdx.check import check_disk
from vhdx.compact import compact_disk
from vhdx.create import create_disk
from vhdx.errors import DiskError
from vhdx.merge import merge_into_parent
from vhdx.resize import resize_disk
from vhdx.writer import open_writable

MIB = 1 << 20


@pytest.fixture
def source() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def crashed() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


def read(path: Path) -> bytes:
    with open_vhdx(path) as disk:
        return disk.read_at(0, disk.size)


def assert_sound(path: Path, where: object, *, after_crash: bool = False) -> None:
    """Fail where a check finds anything worse than unused space, or than what a crash leaves by design."""
    allowed = ("log-dirty", "header", "file-size") if after_crash else ()
    faults = [
        finding
        for finding in check_disk(path).findings
        if finding.severity != "info" and not (finding.severity == "warning" and finding.rule in allowed)
    ]
    assert not faults, f"{where}: {faults}"


def each_crash(
    record: RecordingFiles, folder: Path, check: Callable[[CrashPoint], None], *, seeds: int = 1, least: int = 30
) -> None:
    count = 0
    for point in crash_points(record, seeds=seeds):
        point.write_to(folder)
        try:
            check(point)
        except DiskError as error:
            raise AssertionError(f"{point}: {error}") from error
        count += 1
    assert count >= least, count


def scribble(path: Path, seed: int, *, count: int = 5) -> None:
    chance = random.Random(seed)
    with open_writable(path) as disk:
        for _ in range(count):
            offset = chance.randrange(disk.size)
            length = min(disk.size - offset, chance.choice([600, 5000, 300_000, MIB + 4096]))
            if chance.random() < 0.3:
                disk.trim(offset, length)
            else:
                disk.write_at(offset, chance.randbytes(length))


def make_chain(folder: Path, length: int, *, sector_size: int = 512, size: int = 4 * MIB) -> list[Path]:
    """Make a chain, each of its disks written to."""
    paths: list[Path] = []
    for number in range(length):
        path = folder / f"disk{number}.vhdx"
        if paths:
            create_disk(path, parent=paths[-1], block_size=MIB)
        else:
            create_disk(path, size=size, block_size=MIB, sector_size=sector_size)
        scribble(path, seed=number)
        with open_writable(path) as disk:
            if number % 2:
                disk.write_at(2 * MIB, bytes([number]) * 5000)
            else:
                disk.trim(2 * MIB, MIB)  # a child that hides its parent's data behind zeros
        paths.append(path)
    return paths


@pytest.mark.parametrize("overwrite", [False, True])
def test_creating_a_disk_leaves_the_old_one_or_the_new_one(source: Path, crashed: Path, overwrite: bool) -> None:
    if overwrite:
        create_disk(source / "disk.vhdx", size=MIB, block_size=MIB)
    record = RecordingFiles(source)
    create_disk(source / "disk.vhdx", size=5 * MIB, block_size=MIB, kind="fixed", overwrite=overwrite, files=record)

    def check(point: CrashPoint) -> None:
        path = crashed / "disk.vhdx"
        if not path.exists():
            assert not overwrite
            return
        assert_sound(path, point)
        assert len(read(path)) in ((MIB, 5 * MIB) if overwrite else (5 * MIB,))

    each_crash(record, crashed, check, seeds=2)


def test_a_bulk_disk_appears_whole_or_not_at_all(source: Path, crashed: Path) -> None:
    record = RecordingFiles(source)
    data = random.Random(1).randbytes(MIB + 5000)
    with create_disk(source / "disk.vhdx", bulk=True, size=5 * MIB, block_size=MIB, files=record) as disk:
        disk.prepare(np.array([[MIB, 2 * MIB]], dtype=np.int64))
        disk.write_at(3 * MIB + 7, data[:5000])
        disk.write_at(MIB, data[5000:])
        disk.commit()
    expected = read(source / "disk.vhdx")
    assert expected[MIB : 2 * MIB] == data[5000:]
    seen = set()

    def check(point: CrashPoint) -> None:
        path = crashed / "disk.vhdx"
        seen.add(path.exists())
        if path.exists():
            assert_sound(path, point)
            assert read(path) == expected

    each_crash(record, crashed, check, seeds=2)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, size) for kind in ("dynamic", "fixed", "differencing") for size in (3 * MIB, 9 * MIB)]
    + [("dynamic", 140 << 30), ("differencing", 140 << 30)],  # these need a longer BAT, which moves
)
def test_a_crash_while_resizing_leaves_the_old_size_or_the_new_and_can_be_finished(
    source: Path, crashed: Path, kind: str, size: int
) -> None:
    path = source / "disk.vhdx"
    if kind == "differencing":
        create_disk(source / "parent.vhdx", size=3 * MIB, block_size=MIB)
        scribble(source / "parent.vhdx", seed=3)
        create_disk(path, parent=source / "parent.vhdx", block_size=MIB, size=4 * MIB + 512)
    elif kind == "fixed":
        create_disk(path, size=4 * MIB + 512, block_size=MIB, kind="fixed")
    else:
        create_disk(path, size=4 * MIB + 512, block_size=MIB)
    scribble(path, seed=5, count=8)
    if size < 4 * MIB:
        with open_writable(path) as disk:
            disk.trim(size, disk.size - size)
    before = read(path)
    record = RecordingFiles(source)
    resize_disk(path, size, files=record)
    kept = min(size, len(before))

    def check(point: CrashPoint) -> None:
        victim = crashed / "disk.vhdx"
        with open_vhdx(victim) as disk:
            assert disk.size in (size, len(before)), point
            assert disk.read_at(0, kept) == before[:kept], point
            more = min(disk.size, kept + MIB) - kept
            assert not any(disk.read_at(kept, more)), point
        if point.ordinal % 4 == 0:
            assert_sound(victim, point, after_crash=True)
            resize_disk(victim, size)
            assert_sound(victim, point)
            with open_vhdx(victim) as disk:
                assert disk.size == size
                assert disk.read_at(0, kept) == before[:kept], point

    each_crash(record, crashed, check)


@pytest.mark.parametrize("keep_child", [False, True])
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_crash_while_merging_leaves_every_child_readable_and_can_be_finished(
    source: Path, crashed: Path, sector_size: int, keep_child: bool
) -> None:
    paths = make_chain(source, 4, sector_size=sector_size)
    merged, contents = paths[2], [read(path) for path in paths]
    record = RecordingFiles(source)
    merge_into_parent(merged, keep_child=keep_child, files=record)
    assert read(paths[1]) == contents[2]
    assert read(paths[3]) == contents[3]
    finished = 0
    with open_vhdx(paths[1]) as disk:
        final_guid = disk.image.data_write_guid

    def is_merged(child: Path) -> bool:
        with open_vhdx(child) as disk:
            return parent_linkages(disk.image) == (final_guid,)

    def check(point: CrashPoint) -> None:
        nonlocal finished
        here = [crashed / path.name for path in paths]
        assert read(here[3]) == contents[3], point
        assert read(here[0]) == contents[0], point
        if here[2].exists():
            assert read(here[2]) == contents[2], point
        else:
            assert read(here[1]) == contents[2], point
        with open_vhdx(here[1]):
            pass  # whatever it reads as half way, it opens
        if keep_child and is_merged(here[2]):
            assert read(here[1]) == contents[2], point
        elif point.ordinal % 6 == 0 and here[2].exists():
            finished += 1
            merge_image(here[2])
            assert not here[2].exists()
            assert read(here[1]) == contents[2], point
            assert read(here[3]) == contents[3], point
            assert_sound(here[1], point)
            assert_sound(here[3], point, after_crash=True)

    each_crash(record, crashed, check)
    assert finished > 3


def test_a_crash_while_compacting_never_changes_what_a_disk_or_its_child_reads(source: Path, crashed: Path) -> None:
    path = source / "disk.vhdx"
    create_disk(source / "base.vhdx", size=8 * MIB, block_size=MIB)
    scribble(source / "base.vhdx", seed=1)
    create_disk(path, parent=source / "base.vhdx", block_size=MIB)
    chance = random.Random(11)
    with open_writable(path) as disk:
        for block in (7, 1, 3, 0, 5, 2):  # places in the file in no order
            disk.write_at(block * MIB, chance.randbytes(MIB if block % 2 else 5000))
        disk.write_at(3 * MIB, bytes(MIB))
        disk.trim(7 * MIB, MIB)
        disk.trim(MIB, MIB)
    create_disk(source / "child.vhdx", parent=path, block_size=MIB)
    before = read(path)
    record = RecordingFiles(source)
    result = compact_disk(path, files=record)
    assert result.blocks_moved
    assert result.blocks_released
    assert result.size_after < result.size_before
    assert_sound(path, "after")

    def check(point: CrashPoint) -> None:
        victim = crashed / "disk.vhdx"
        assert read(victim) == before, point
        assert read(crashed / "child.vhdx") == before, point
        if point.ordinal % 4 == 0:
            assert_sound(victim, point, after_crash=True)
            assert compact_disk(victim).size_after == result.size_after, point
            assert read(victim) == before, point

    each_crash(record, crashed, check, seeds=2)


@pytest.mark.parametrize("applied", [False, True])
def test_an_error_anywhere_in_a_merge_can_be_recovered_from_by_merging_again(source: Path, applied: bool) -> None:
    paths = make_chain(source, 4)
    contents = [read(path) for path in paths]
    start = RecordingFiles(source)
    merge_into_parent(paths[2], files=start)
    for ordinal in range(0, len(start.effects), 4):
        start.restore()
        with pytest.raises(DiskError):
            merge_into_parent(paths[2], files=RecordingFiles(source, fail_at=ordinal, applied=applied))
        assert read(paths[3]) == contents[3]
        if paths[2].exists():
            assert read(paths[2]) == contents[2]
            merge_into_parent(paths[2])
        assert read(paths[1]) == contents[2]
        assert read(paths[3]) == contents[3]


def test_merging_again_does_not_leave_a_second_copy_of_what_was_copied(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhdx.merge.FLUSH_SIZE", MIB)
    parent, child = source / "parent.vhdx", source / "child.vhdx"
    create_disk(parent, size=16 * MIB, block_size=MIB)
    create_disk(child, parent=parent, block_size=MIB)
    with open_writable(child) as disk:
        for block in range(0, 16, 2):
            disk.write_at(block * MIB, b"%x" % block * MIB)
    start = RecordingFiles(source)
    merge_into_parent(child, files=start)
    size = parent.stat().st_size
    for ordinal in range(0, len(start.effects), 5):
        start.restore()
        with pytest.raises(DiskError):
            merge_into_parent(child, files=RecordingFiles(source, fail_at=ordinal, applied=False))
        if child.exists():
            merge_into_parent(child)
        assert parent.stat().st_size <= size + MIB, ordinal


@pytest.mark.parametrize("applied", [False, True])
def test_an_error_anywhere_in_creating_leaves_no_file_and_no_name(source: Path, applied: bool) -> None:
    total = RecordingFiles(source)
    create_disk(source / "disk.vhdx", size=MIB, files=total)
    (source / "disk.vhdx").unlink()
    for ordinal in range(len(total.effects) - 1):  # the last one gives the file its name
        with pytest.raises(DiskError):
            create_disk(source / "disk.vhdx", size=MIB, files=RecordingFiles(source, fail_at=ordinal, applied=applied))
        if ordinal:  # an error of creating the temporary file leaves what the system left
            assert list(source.iterdir()) == []
        for path in source.iterdir():
            path.unlink()
