"""A crash while the older files of a chain are merged leaves a chain that reads the same, and can be finished."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.crash_files import RecordingFiles, crash_points, scratch_folder
from vhdx.chain import open_vhdx
from vhdx.check import check_disk
from vhdx.create import create_disk
from vhdx.merge_chain import held, merge_chain, plan_chain_merge
from vhdx.osfile import OS_FILES, Files
from vhdx.survey import survey_chain
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


def make_chain(folder: Path, length: int) -> list[Path]:
    """Make a chain whose disks hide data of each other behind data and behind zeros, and one of which is larger."""
    paths: list[Path] = []
    for number in range(length):
        path = folder / ("base.vhdx" if not number else f"c{number}.avhdx")
        if paths:
            create_disk(path, parent=paths[-1], block_size=MIB, size=(3 if number < 2 else 4) * MIB)
        else:
            create_disk(path, size=3 * MIB, block_size=MIB)
        chance = random.Random(number)
        with open_writable(path) as disk:
            for _ in range(3):
                disk.write_at(chance.randrange(2 * MIB), chance.randbytes(chance.choice([600, 70_000, MIB])))
            if number % 2:
                disk.trim(MIB, MIB)
        paths.append(path)
    return paths


def merge_all(top: Path, files: Files = OS_FILES, *, keep: int = 1) -> None:
    plan = plan_chain_merge(top, keep=keep, files=files)
    with held(plan.files, files=files) as locked:
        merge_chain(plan, files=locked)


def test_a_crash_at_any_write_leaves_the_same_reading_and_is_finished_by_merging_again(
    source: Path, crashed: Path
) -> None:
    keep = 1
    paths = make_chain(source, 3 + keep)
    contents = [read(path) for path in paths]
    kept = paths[-keep:]
    record = RecordingFiles(source)
    merge_all(paths[-1], record, keep=keep)
    assert sorted(source.iterdir()) == sorted([paths[0], *kept])
    removed = sum(effect.kind == "remove" for effect in record.effects)
    assert removed == 2
    states: set[tuple[int, bool, bool]] = set()
    for count, point in enumerate(crash_points(record, seeds=1)):
        point.write_to(crashed)
        here = [crashed / path.name for path in paths]
        for number in range(3, 3 + keep):
            assert read(here[number]) == contents[number], point
        seen = survey_chain(here[-1])
        assert seen.broken is None, point
        begun = any(link.merge_begun for link in seen.links)
        states.add((len(seen.links), begun, bool(seen.left_over)))
        if count % 11 == 0 or (seen.left_over and count % 2):
            merge_all(here[-1], keep=keep)
            assert sorted(crashed.iterdir()) == sorted([here[0], *here[-keep:]]), point
            for number in range(3, 3 + keep):
                assert read(here[number]) == contents[number], point
            assert read(here[0]) == contents[2], point
            for path in (here[0], *here[-keep:]):
                faults = [one for one in check_disk(path).findings if one.severity == "error"]
                assert not faults, f"{point}: {path.name}: {faults}"
    # All three kinds of states were met: between merges, within one, and with a file left over that nothing needs.
    assert {(3 + keep, False, False), (2 + keep, False, False), (1 + keep, False, False)} <= states
    assert any(begun for _, begun, _ in states)
    assert any(left for _, _, left in states)
