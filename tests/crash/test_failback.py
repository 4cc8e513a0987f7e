"""Coming home, cut off anywhere: the home disk is the old one or the new one, and the next attempt finishes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from replica.errors import IntegrityError, StoreUnavailableError
from replica.failback import building
from replica.failback.goal import Goal
from replica.stores.memory import MemoryStore
from tests.support.crash_files import Effect, _Effecting, scratch_folder
from tests.support.crash_home import RecordingHomeFiles, crash_points
from tests.support.engine import BLOCK, random_blocks
from tests.support.home_lab import HomeLab, changed, make_home_lab, read_disk, write_disk
from vhdx.disk import Disk
from vhdx.errors import DiskError, OsError

CONTENT = random_blocks(1, 24) + bytes(24 * BLOCK)  # 3 MiB, half of it zeros


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch_folder() as made:
        yield made


def make(folder: Path, kind: str) -> HomeLab:
    return make_home_lab(folder / "lab", [CONTENT], [changed(CONTENT, 9, writes=4)], kind=kind)


def elsewhere(lab: HomeLab, folder: Path) -> HomeLab:
    """Return the lab with its home disks in another folder."""
    return dataclasses.replace(lab, homes=tuple(folder / path.name for path in lab.homes))


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
@pytest.mark.parametrize("has_links", [True, False])
def test_a_crash_anywhere_leaves_the_old_disk_or_the_new_and_the_next_attempt_finishes(
    folder: Path, kind: str, has_links: bool
) -> None:
    lab = make(folder, kind)
    crashed = folder / "crashed"
    crashed.mkdir()
    record = RecordingHomeFiles(lab.homes[0].parent, has_links=has_links)
    lab.bring(files=record)
    lab.assert_home()
    renames = [at for at, effect in enumerate(record.effects) if effect.kind in ("hardlink", "link", "replace")]
    after = elsewhere(lab, crashed)
    home, states, finished, absent = after.homes[0], set(), 0, 0
    for number, point in enumerate(crash_points(record, seeds=int(has_links))):
        point.write_to(crashed)
        if home.exists():
            held = read_disk(home)
            assert held in (CONTENT, lab.wanted[0]), point
            states.add(held == CONTENT)
        else:
            assert not has_links, point
            absent += 1
        if number % 15 and not any(at - 1 <= point.ordinal <= at + 2 for at in renames):
            continue
        after.bring()
        after.assert_home()
        finished += 1
    assert states == {True, False}
    assert finished >= 8
    assert bool(absent) is not has_links
    assert after.asked == []


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
@pytest.mark.parametrize("applied", [False, True])
def test_an_error_anywhere_leaves_the_old_disk_or_the_new_and_the_next_attempt_finishes(
    folder: Path, kind: str, applied: bool
) -> None:
    lab = make(folder, kind)
    home = lab.homes[0].parent
    whole = RecordingHomeFiles(home)
    lab.bring(files=whole)
    count = len(whole.effects)
    for ordinal in range(0, count, 13 if kind == "vhdx" else 2):
        for path in home.iterdir():
            path.unlink()
        write_disk(lab.homes[0], CONTENT, kind)
        record = RecordingHomeFiles(home, fail_at=ordinal, applied=applied)
        with pytest.raises(DiskError):
            lab.bring(files=record)
        assert read_disk(lab.homes[0]) in (CONTENT, lab.wanted[0]), ordinal
        lab.bring()
        lab.assert_home()


# -- killed processes -------------------------------------------------------------------------------------------------

SIGKILL = 9  # Windows has no name for it, and does not run this
KILLS = int(os.environ.get("GODWIT_FAILBACK_KILLS", "20"))


class KillingFiles(RecordingHomeFiles):
    """Kills its process just before an effect."""

    kill_at = -1

    def effect(self, effect: Effect) -> _Effecting:
        if len(self.effects) == self.kill_at:
            os.kill(os.getpid(), SIGKILL)
        return super().effect(effect)


def _bring(lab: HomeLab, kill_at: int | None, started: Connection) -> None:
    started.send(None)
    if kill_at is None:
        lab.bring()
        return
    files = KillingFiles(lab.homes[0].parent)
    files.kill_at = kill_at
    lab.bring(files=files)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not forked there")
@pytest.mark.parametrize("kind", ["vhdx", "raw"])
def test_a_home_disk_survives_processes_that_are_killed_again_and_again(folder: Path, kind: str) -> None:
    """Each process goes on with what the one before has left; half of them die after a time, half at an effect."""
    lab = make_home_lab(folder / "lab", [CONTENT], [changed(CONTENT, 9, writes=12)], kind=kind)
    context: Any = multiprocessing.get_context("fork")
    chance = random.Random(f"{kind} 7")
    record, begun = RecordingHomeFiles(lab.homes[0].parent), time.monotonic()
    lab.bring(files=record)
    usual_seconds = time.monotonic() - begun
    killed = 0
    for number in range(KILLS // 2):
        if lab.is_home():
            lab.homes[0].unlink()
            write_disk(lab.homes[0], CONTENT, kind)
        ours, theirs = context.Pipe()
        kill_at = chance.randrange(len(record.effects)) if number % 2 else None
        process = context.Process(target=_bring, args=(lab, kill_at, theirs))
        process.start()
        ours.recv()
        process.join(None if number % 2 else chance.random() * usual_seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -SIGKILL
        assert read_disk(lab.homes[0]) in (CONTENT, lab.wanted[0]), number
    assert killed
    lab.bring()
    lab.assert_home()


# -- a store and a disk that fail -------------------------------------------------------------------------------------


def test_what_was_fetched_before_the_store_failed_is_not_fetched_again(folder: Path) -> None:
    content = random_blocks(1, 300)
    wanted = random_blocks(2, 300)
    lab = make_home_lab(folder / "lab", [content], [wanted])
    before = lab.homes[0].read_bytes()
    total = make_home_lab(folder / "other", [content], [wanted]).bring().fetched_bytes
    allowed = 3

    class Failing(MemoryStore):
        def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
            nonlocal allowed
            if "/segments/" in key:
                allowed -= 1
                if allowed < 0:
                    raise StoreUnavailableError("gone", key=key)
            return lab.store.get(key, start=start, length=length)

    with pytest.raises(StoreUnavailableError):
        lab.bring(store=Failing("home"))
    assert lab.homes[0].read_bytes() == before
    assert len(lab.names()) == 2  # what was begun is kept
    done = lab.bring()
    assert done.fetched_bytes < total * 0.6
    lab.assert_home()


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
def test_a_full_disk_leaves_the_home_disk_and_nothing_else(folder: Path, kind: str) -> None:
    lab = make(folder, kind)
    before = lab.homes[0].read_bytes()

    class Full(RecordingHomeFiles):
        def effect(self, effect: Effect) -> _Effecting:
            if effect.kind == "write" and sum(len(one.data) for one in self.effects) > 3 * BLOCK:
                raise OsError("cannot write: No space left on device", path=str(effect.path))
            return super().effect(effect)

    with pytest.raises(OsError, match="No space"):
        lab.bring(files=Full(lab.homes[0].parent))
    assert lab.homes[0].read_bytes() == before
    assert len(lab.names()) == 1
    lab.bring()
    lab.assert_home()


def test_damage_in_the_store_ends_it_before_anything_is_swapped(folder: Path) -> None:
    lab = make(folder, "vhdx")
    before = lab.homes[0].read_bytes()
    assert isinstance(lab.store, MemoryStore)
    for info in list(lab.store.list("")):
        if "/segments/" in info.key and f"{lab.newest.point:020}" in info.key:
            data = bytearray(lab.store.get(info.key))
            data[len(data) // 2] ^= 1
            lab.store.delete(info.key)
            lab.store.create(info.key, bytes(data))
    with pytest.raises(IntegrityError):
        lab.bring()
    assert lab.homes[0].read_bytes() == before


def test_what_is_built_wrong_is_thrown_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make(folder, "vhdx")
    before = lab.homes[0].read_bytes()
    fill = building._fill

    def filled(disk: Disk, goal: Goal, *others: object) -> None:
        fill(disk, goal, *others)  # type: ignore[arg-type]
        offset = int(goal.stored.data[-1, 0])
        disk.write_at(offset, bytes([disk.read_at(offset, 1)[0] ^ 1]))

    monkeypatch.setattr(building, "_fill", filled)
    with pytest.raises(IntegrityError, match="not what it should be"):
        lab.bring()
    assert lab.homes[0].read_bytes() == before
    assert len(lab.names()) == 1
