"""Every write of a repair, crashed at in every way: no point that restored is lost, and the next repair finishes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replica import packer
from replica.errors import GodwitError
from replica.repair import plan, repair
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from replica.verify import restorable, verify
from tests.support.damage import harm, maps, restoring, segments
from tests.support.encryption import encrypted_lab, sealed
from tests.support.engine import BLOCK, WORKERS, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import CrashingStore, CrashMode, RecordingStore, SimulatedCrash, crash_points

ELSEWHERE = "host-b"


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cycle of a few blocks write several segments."""
    monkeypatch.setattr(packer, "SEGMENT_FRAMES", 4)
    monkeypatch.setattr("replica.scan.BATCH_BLOCKS", 2)


def _flip_a_segment(lab: Lab, store: Store) -> None:
    harm(store, segments(lab, 1)[0], "flipped")


def _lose_a_segment_of_each_point(lab: Lab, store: Store) -> None:
    for point in (1, 2):
        harm(store, segments(lab, point)[0], "missing")


def _cut_the_newest_map(lab: Lab, store: Store) -> None:
    harm(store, maps(lab, 2)[0], "cut")


def _flip_manifests_and_a_segment(lab: Lab, store: Store) -> None:
    harm(store, lab.found.keys.manifest(2), "flipped")
    harm(store, segments(lab, 1)[1], "flipped")


DAMAGES = (_flip_a_segment, _lose_a_segment_of_each_point, _cut_the_newest_map, _flip_manifests_and_a_segment)


def _lab(folder: Path, damage: Callable[[Lab, Store], None], *, encrypted: bool) -> Lab:
    """Return a VM of two points, the second of which changed some blocks of the first, with damage in its store."""
    disks = [random_blocks(1, 9), random_blocks(2, 3) + b"tail" * 128]
    beneath = MemoryStore("beneath")
    if encrypted:
        lab = encrypted_lab(folder, disks, beneath, host=make_host())
    else:
        lab = make_lab(folder, disks, store=beneath, host=make_host())
    lab.replicate()
    lab.patch(2 * BLOCK, random_blocks(3, 2))
    lab.patch(BLOCK, random_blocks(4, 1), number=1)
    lab.replicate()
    damage(lab, beneath)
    if encrypted:
        lab.store = sealed(beneath)
    return lab


def _repair(lab: Lab, store: Store, *, machine: str = "host-a") -> None:
    host = lab.host if machine == "host-a" else make_host(name=machine, clock=lab.host.clock)  # type: ignore[arg-type]
    planned = plan(store, host, lab.found, workers=WORKERS)
    if planned.is_needed:
        repair(store, host, lab.found, planned, workers=WORKERS)


def _note_new_points(lab: Lab) -> None:
    """Let every point that a repair made be one of what the disks hold now."""
    for verdict in verify(lab.store, make_host(), lab.found, workers=WORKERS).verdicts:
        lab.published.setdefault(verdict.point, lab.contents())


@pytest.mark.parametrize("encrypted", [False, True], ids=["in clear", "encrypted"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_crash_at_every_write_of_a_repair(
    tmp_path: Path, damage: Callable[[Lab, Store], None], encrypted: bool
) -> None:
    counted = _lab(tmp_path / "count", damage, encrypted=encrypted)
    recording = RecordingStore(counted.store)
    _repair(counted, recording)
    assert len(recording.writes) >= 5
    for at, mode in crash_points(len(recording.writes)):
        if mode is CrashMode.TORN:  # for a store that writes whole objects, the same as before it
            continue
        lab = _lab(tmp_path / f"{at}-{mode.value}", damage, encrypted=encrypted)
        whole = set(restoring(lab))
        crashing = CrashingStore(lab.store, at=at, mode=mode)
        with pytest.raises((SimulatedCrash, GodwitError)):
            _repair(lab, crashing)
        assert crashing.crashed
        _note_new_points(lab)
        assert whole <= set(restoring(lab)), f"{mode.value} write {at}"
        lab.host.clock.advance(3600)  # type: ignore[attr-defined]  # the dead one's lease runs out
        _repair(lab, lab.store)
        _note_new_points(lab)
        report = verify(lab.store, make_host(), lab.found, full=True, workers=WORKERS)
        restores = set(restoring(lab))
        assert not report.unreadable
        assert whole <= restores == set(restorable(report)), f"{mode.value} write {at}"
        assert report.verdicts[-1].restores, f"{mode.value} write {at}"
        assert lab.published[max(restores)] == lab.contents()


def test_another_machine_finishes_what_a_dead_one_began(tmp_path: Path) -> None:
    counted = _lab(tmp_path / "count", _flip_manifests_and_a_segment, encrypted=False)
    recording = RecordingStore(counted.store)
    _repair(counted, recording)
    for at in range(len(recording.writes)):
        lab = _lab(tmp_path / str(at), _flip_manifests_and_a_segment, encrypted=False)
        with pytest.raises(SimulatedCrash):
            _repair(lab, CrashingStore(lab.store, at=at, mode=CrashMode.AFTER))
        lab.host.clock.advance(3600)  # type: ignore[attr-defined]
        _repair(lab, lab.store, machine=ELSEWHERE)
        _note_new_points(lab)
        report = verify(lab.store, make_host(), lab.found, full=True, workers=WORKERS)
        assert report.verdicts[-1].restores
        assert set(restorable(report)) == set(restoring(lab))
