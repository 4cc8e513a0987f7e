"""Disks that come home: what is read and written is what differs, and they hold what they are to hold."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import catalog, cycle
from replica.blockmap import BlockMap
from replica.errors import LeaseHeldError, UsageError
from replica.failback import difference
from replica.failback.building import build_overlay
from replica.failback.difference import Dense, dense_window, differing, maps_of
from replica.failback.examination import HomeTouchedError
from replica.failback.home import HomeDisk, forget
from replica.failback.names import HomeFiles, Names
from replica.failback.ranges import extents_from, intersected, subtracted
from replica.failback.swap import swap
from replica.mapstore import MapStore
from replica.stores.memory import MemoryStore
from tests.support.encryption import give_key, vault_for
from tests.support.engine import BLOCK, WORKERS, make_lab, random_blocks
from tests.support.home_lab import HomeLab, changed, make_home_lab, patch_disk, read_disk
from vhdx import qcow2
from vhdx.create import create_disk
from vhdx.disk import Extents
from vhdx.errors import DiskBusyError, DiskError, OsError, ParentError
from vhdx.formats import open_disk

KINDS = ["vhdx", "vhdx-fixed", "raw", "vhd", "vhd-dynamic"]


def content(seed: int = 1) -> bytes:
    """Return a disk of 6 MiB, a third of it zeros."""
    return random_blocks(seed, 32) + bytes(32 * BLOCK) + random_blocks(seed + 1, 32)


def make(folder: Path, kind: str = "vhdx", **options: object) -> HomeLab:
    data = content()
    return make_home_lab(folder, [data], [changed(data, 5)], kind=kind, **options)  # type: ignore[arg-type]


def unequal_blocks(one: bytes, other: bytes) -> list[int]:
    """Return the numbers of the blocks that differ; what is past an end is zeros."""
    size = max(len(one), len(other))
    size += -size % BLOCK
    one, other = one.ljust(size, b"\0"), other.ljust(size, b"\0")
    return [at // BLOCK for at in range(0, size, BLOCK) if one[at : at + BLOCK] != other[at : at + BLOCK]]


# -- what differs -----------------------------------------------------------------------------------------------------


def _blocks(extents: Extents) -> set[int]:
    return {number for start, end in extents.tolist() for number in range(start // BLOCK, -(-end // BLOCK))}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_differs_is_told_by_the_maps_alone(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Against a comparison of the bytes, with points between the two and blocks on both sides of a window's edge."""
    blocks = 24
    kinds = st.lists(st.sampled_from(b"\0abc"), min_size=blocks, max_size=blocks)
    states = data.draw(st.lists(kinds, min_size=2, max_size=4))
    tail = data.draw(st.sampled_from((0, 512, 4096)))
    contents = [b"".join(bytes([one]) * BLOCK for one in state)[: blocks * BLOCK - tail] for state in states]
    lab = make_lab(tmp_path_factory.mktemp("vm"), [contents[0]])
    points = [lab.replicate()]
    for one in contents[1:]:
        lab.write(one)
        points.append(lab.replicate())
    fetch = MapStore(lab.store, lab.found.keys, None).fetch
    base, newest = maps_of(points[0].maps, points[-1].maps, fetch)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("difference", "hashing"):
            patch.setattr(f"replica.failback.{module}.WINDOW_BLOCKS", 8, raising=False)
            patch.setattr(f"replica.failback.{module}.WINDOW_BYTES", 8 * BLOCK, raising=False)
        looked_at = []

        def watched(known: BlockMap, disk: int, number: int) -> Dense:
            looked_at.append(number)
            return dense_window(known, disk, number)

        patch.setattr(difference, "dense_window", watched)
        found = differing(base, newest, 0, len(contents[0]))
    expected = set(unequal_blocks(contents[0], contents[-1]))
    zeros = {at for at in range(blocks) if states[-1][at] == 0}
    assert _blocks(found.data) == expected - zeros
    assert _blocks(found.zeros) == expected & zeros
    ever = {at // 8 for one, other in pairwise(contents) for at in unequal_blocks(one, other)}
    if len(points[-1].maps) == len(points):  # none was merged
        assert set(looked_at) == ever
    assert found.all[-1, 1] <= len(contents[0]) if len(found.all) else True


@settings(max_examples=100, deadline=None)
@given(*[st.lists(st.booleans(), min_size=1, max_size=20)] * 2)
def test_extents_are_subtracted_and_intersected(one: list[bool], other: list[bool]) -> None:
    def extents(flags: list[bool]) -> Extents:
        edges = np.flatnonzero(np.diff(np.array([False, *flags, False]).astype(np.int8)))
        return edges.reshape(-1, 2).astype(np.int64)

    def flags(found: Extents) -> set[int]:
        assert (found[1:, 0] > found[:-1, 1]).all()  # apart from each other
        return {at for start, end in found.tolist() for at in range(start, end)}

    first, second = {at for at, on in enumerate(one) if on}, {at for at, on in enumerate(other) if on}
    assert flags(subtracted(extents(one), extents(other))) == first - second
    assert flags(intersected(extents(one), extents(other))) == first & second
    pairs = [(at, at + 2) for at in sorted(first | second, reverse=True)]
    assert flags(extents_from(pairs)) == {at + more for at in first | second for more in (0, 1)}


# -- coming home ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_comes_home_as_the_newest_point_has_it(tmp_path: Path, kind: str) -> None:
    lab = make(tmp_path, kind)
    done = lab.bring()
    lab.assert_home()
    is_overlay = kind.startswith("vhdx")
    disk = done.disks[0]
    assert (disk.how, disk.compared) == ("overlay" if is_overlay else "copy", not is_overlay)
    assert disk.differing_bytes == len(unequal_blocks(content(), lab.wanted[0])) * BLOCK
    assert lab.asked == []
    again = lab.bring()
    assert (again.disks[0].how, again.disks[0].written_bytes) == ("was-home", 0)
    lab.assert_home()
    assert lab.asked == []


def test_only_what_differs_is_fetched_and_written(tmp_path: Path) -> None:
    data = random_blocks(1, 400)
    wanted = bytearray(data)
    for block in (3, 70, 71, 399):
        wanted[block * BLOCK + 4096 : block * BLOCK + 8192] = os.urandom(4096)
    lab = make_home_lab(tmp_path, [data], [bytes(wanted)])
    done = lab.bring()
    lab.assert_home()
    assert done.disks[0].written_bytes == 4 * BLOCK
    assert done.fetched_bytes < 5 * BLOCK + 100_000  # the frames, and the two points' maps


def test_a_disk_that_did_not_change_is_left_alone(tmp_path: Path) -> None:
    data = content()
    lab = make_home_lab(tmp_path, [data], [data])
    before = lab.homes[0].stat()
    done = lab.bring()
    assert (done.disks[0].how, done.fetched_bytes) == ("was-home", 0)  # its maps are in the cache
    assert lab.homes[0].stat() == before


def test_all_disks_come_home_and_those_of_encrypted_vms(tmp_path: Path) -> None:
    inner = MemoryStore("sealed")
    give_key(inner)
    vault = vault_for()
    datas = [content(1), content(7)]
    lab = make_home_lab(
        tmp_path, datas, [changed(datas[0], 1), changed(datas[1], 2)], store=vault.around(inner), vault=vault
    )
    done = lab.bring(check_all=True)
    lab.assert_home()
    assert [one.how for one in done.disks] == ["overlay", "overlay"]
    assert done.document()["written_bytes"] == sum(one.written_bytes for one in done.disks)


def test_no_disk_is_swapped_before_all_are_built(tmp_path: Path) -> None:
    datas = [content(1), content(7)]
    lab = make_home_lab(tmp_path, datas, [changed(datas[0], 1), changed(datas[1], 2)])
    patch_disk(lab.homes[1], 0, b"unknown")
    with pytest.raises(HomeTouchedError):
        lab.bring()
    assert read_disk(lab.homes[0]) == datas[0]
    lab.bring(allow=True)
    lab.assert_home()


def test_a_vm_whose_disks_were_swapped_in_part_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datas = [content(1), content(7)]
    lab = make_home_lab(tmp_path, datas, [changed(datas[0], 1), changed(datas[1], 2)])
    swaps = 0

    def second_is_cut_off(names: Names, files: HomeFiles, *, overlay: bool) -> None:
        nonlocal swaps
        swaps += 1
        if swaps == 2:
            raise KeyboardInterrupt
        swap(names, files, overlay=overlay)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("replica.failback.home.swap", second_is_cut_off)
        lab.bring()
    assert [read_disk(path) for path in lab.homes] == [lab.wanted[0], datas[1]]
    assert [one.how for one in lab.bring().disks] == ["was-home", "overlay"]
    lab.assert_home()


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed")
def test_a_qcow2_comes_home_as_a_whole_copy(tmp_path: Path) -> None:
    """As of a VM that ran in QEMU: its points were read through the monitor, its home disk is opened at rest."""
    lab = make(tmp_path, "raw")
    path = lab.homes[0].with_suffix(".qcow2")
    qcow2.from_raw(lab.homes[0], path, size=len(content()))
    lab.homes[0].unlink()
    homes = [HomeDisk(0, path)]
    assert lab.bring(homes=homes).disks[0].how == "copy"
    assert (lab.asked, lab.names()) == ([], [path.name])
    qcow2.to_raw(path, tmp_path / "read.img")
    assert (tmp_path / "read.img").read_bytes() == lab.wanted[0]
    assert lab.bring(homes=homes).disks[0].how == "was-home"


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lab = make(tmp_path, kind)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="only 1000 are free"):
        patch.setattr("replica.failback.building.shutil.disk_usage", lambda _: usage._replace(free=1000))
        lab.bring()
    assert lab.names() == [lab.homes[0].name]
    assert read_disk(lab.homes[0]) == content()


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
@pytest.mark.parametrize("size_blocks", [120, 60])
def test_a_disk_that_grew_or_shrank_comes_home(tmp_path: Path, kind: str, size_blocks: int) -> None:
    data = content()
    wanted = changed(data, 3, size=size_blocks * BLOCK)
    lab = make_home_lab(tmp_path, [data], [wanted], kind=kind)
    if size_blocks < 96:  # what lies past the new end is in the base point, and nothing is lost that no point has
        assert lab.bring().disks[0].how == "copy"
    else:
        assert lab.bring().disks[0].how == ("overlay" if kind == "vhdx" else "copy")
    lab.assert_home()
    assert lab.asked == []
    assert lab.bring().disks[0].how == "was-home"


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
def test_old_disks_are_kept_where_that_is_asked_for(tmp_path: Path, kind: str) -> None:
    lab = make(tmp_path, kind)
    kept = lab.bring(keep_old=True).disks[0].kept
    assert kept is not None
    assert kept.name.startswith("disk0.before-failback-2.")
    assert read_disk(kept) == content()
    assert read_disk(lab.homes[0]) == lab.wanted[0]
    assert lab.bring(keep_old=True).disks[0].how == "was-home"
    lab.bring()
    lab.assert_home()


def test_a_disk_above_a_checkpoint_comes_home(tmp_path: Path) -> None:
    """The home disk is a differencing disk itself: only that one changes."""
    data = content()
    lab = make_lab(tmp_path / "x", [data])
    del lab
    home_lab = make_home_lab(tmp_path / "y", [data], [data])
    child = home_lab.homes[0].with_name("disk0_1.avhdx")
    create_disk(child, parent=home_lab.homes[0])
    patch_disk(child, 5 * BLOCK, random_blocks(8, 2))
    state = read_disk(child)
    settings_ = catalog.settings_in_force(home_lab.store, home_lab.found)
    source = replace(settings_.sources[0], path=str(child))
    catalog.update_settings(home_lab.store, home_lab.host, home_lab.found, sources=(source,))
    base = cycle.replicate(home_lab.store, home_lab.host, home_lab.found, workers=WORKERS)
    away = tmp_path / "away.img"
    wanted = changed(state, 4)
    away.write_bytes(wanted)
    catalog.update_settings(home_lab.store, home_lab.host, home_lab.found, sources=(replace(source, path=str(away)),))
    newest = cycle.replicate(home_lab.store, home_lab.host, home_lab.found, workers=WORKERS)
    parent = home_lab.homes[0].read_bytes()
    home_lab.bring(base=base, newest=newest, homes=[HomeDisk(0, child)])
    assert read_disk(child) == wanted
    assert home_lab.homes[0].read_bytes() == parent
    assert home_lab.names() == ["disk0.vhdx", "disk0_1.avhdx"]


# -- a home disk that was touched -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vhdx", "raw"])
def test_a_touched_home_disk_is_noticed_and_overwritten_only_where_that_is_allowed(tmp_path: Path, kind: str) -> None:
    lab = make(tmp_path, kind)
    unchanged = next(at for at in range(33, 60) if at not in unequal_blocks(content(), lab.wanted[0]))
    patch_disk(lab.homes[0], unchanged * BLOCK + 512, b"written at home after all")
    before = lab.homes[0].read_bytes()
    with pytest.raises(HomeTouchedError, match="65536 bytes of it are not"):
        lab.bring()
    assert lab.homes[0].read_bytes() == before
    assert len(lab.names()) == 1
    assert _blocks(lab.asked[0].extents) == {unchanged}
    done = lab.bring(allow=True)
    assert done.disks[0].overwritten_bytes == BLOCK
    lab.assert_home()


def test_a_file_that_only_looks_touched_is_compared_and_nothing_is_asked(tmp_path: Path) -> None:
    lab = make(tmp_path)
    os.utime(lab.homes[0])
    done = lab.bring()
    assert (done.disks[0].compared, lab.asked) == (True, [])
    assert "written to" in done.disks[0].because
    lab.assert_home()


def test_what_was_written_at_home_and_away_alike_is_not_asked_about(tmp_path: Path) -> None:
    lab = make(tmp_path)
    block = unequal_blocks(content(), lab.wanted[0])[0]
    patch_disk(lab.homes[0], block * BLOCK, lab.wanted[0][block * BLOCK : (block + 1) * BLOCK])
    lab.bring()
    assert lab.asked == []
    lab.assert_home()


def test_without_a_base_point_all_that_differs_is_asked_about(tmp_path: Path) -> None:
    lab = make(tmp_path)
    with pytest.raises(HomeTouchedError, match="no point that came from it"):
        lab.bring(base=None)
    assert _blocks(lab.asked[0].extents) == set(unequal_blocks(content(), lab.wanted[0]))
    lab.bring(base=None, allow=True)
    lab.assert_home()


def test_a_home_disk_that_is_written_to_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make(tmp_path)
    build = build_overlay

    def built(*arguments: object, **options: object) -> int:
        patch_disk(lab.homes[0], 40 * BLOCK, b"now of all times")
        return build(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(DiskError, match=r"changed since|was written to while"):
        patch.setattr("replica.failback.home.build_overlay", built)
        lab.bring()
    assert read_disk(lab.homes[0])[40 * BLOCK :].startswith(b"now of all times")
    lab.bring(allow=True)
    lab.assert_home()


# -- other places, other files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["vhdx", "vhd", "raw", "qcow2"])
def test_a_fresh_host_gets_new_files(tmp_path: Path, format_: str) -> None:
    lab = make(tmp_path)
    path = tmp_path / "new" / f"web.{format_}"
    homes = [HomeDisk(0, path, new=format_)]  # type: ignore[arg-type]
    done = lab.bring(base=None, homes=homes)
    assert (done.disks[0].how, [one.name for one in path.parent.iterdir()]) == ("new", [path.name])
    if format_ != "qcow2":
        assert read_disk(path) == lab.wanted[0]
    assert lab.bring(base=None, homes=homes).disks[0].how == "was-home"
    other = tmp_path / "new" / "other.raw"
    other.write_bytes(bytes(len(lab.wanted[0])))
    with pytest.raises(OsError, match="exists"):
        lab.bring(base=None, homes=[HomeDisk(0, other, new="raw")])
    assert not any(other.read_bytes())


def test_disks_without_a_place_and_places_without_a_disk_are_refused_by_name(tmp_path: Path) -> None:
    datas = [content(1), content(7)]
    lab = make_home_lab(tmp_path, datas, [changed(datas[0], 1), datas[1]])
    with pytest.raises(UsageError, match=r"disk 1 \(disk1\) has no place at home"):
        lab.bring(homes=lab.disks()[:1])
    with pytest.raises(UsageError, match="point 2 has no disk 5"):
        lab.bring(homes=[*lab.disks(), HomeDisk(5, tmp_path / "x")])
    with pytest.raises(UsageError, match="named twice"):
        lab.bring(homes=[*lab.disks(), lab.disks()[0]])
    with pytest.raises(UsageError, match="one file"):
        lab.bring(homes=[lab.disks()[0], HomeDisk(1, lab.homes[0])])
    with pytest.raises(DiskError, match="look for the home disk"):
        lab.bring(homes=[lab.disks()[0], HomeDisk(1, tmp_path / "absent.vhdx")])
    assert read_disk(lab.homes[0]) == datas[0]


def test_a_disk_that_was_removed_stays_at_home(tmp_path: Path) -> None:
    datas = [content(1), content(7)]
    lab = make_home_lab(tmp_path, datas, [changed(datas[0], 1), datas[1]])
    source = catalog.settings_in_force(lab.store, lab.found).sources[0]
    catalog.update_settings(lab.store, lab.host, lab.found, sources=(source,))
    newest = cycle.replicate(lab.store, lab.host, lab.found, workers=WORKERS)
    done = lab.bring(newest=newest, homes=lab.disks()[:1])
    assert (done.left, len(done.disks)) == (("disk1",), 1)
    lab.assert_home()


def test_a_disk_that_others_build_on_is_refused(tmp_path: Path) -> None:
    lab = make(tmp_path)
    child = lab.homes[0].with_name("checkpoint.avhdx")
    create_disk(child, parent=lab.homes[0])
    with pytest.raises(ParentError, match=r"other disks build on it: checkpoint\.avhdx"):
        lab.bring()
    assert read_disk(child) == content()


def test_what_builds_on_a_disk_that_was_swapped_in_keeps_it_as_it_is(tmp_path: Path) -> None:
    lab = make(tmp_path)
    lab.bring(keep_old=True)
    child = lab.homes[0].with_name("checkpoint.avhdx")
    create_disk(child, parent=lab.homes[0])
    done = lab.bring()
    assert done.disks[0].kept is not None
    assert "build on it" in done.disks[0].because
    assert read_disk(child) == lab.wanted[0]


def test_files_of_others_are_neither_removed_nor_replaced(tmp_path: Path) -> None:
    lab = make(tmp_path)
    names = Names(lab.homes[0], lab.found.vm.vm_id, lab.newest.point)
    others = [
        names.building.with_name(names.building.name.replace(lab.found.vm.vm_id, "0" * 32)),
        names.before.with_name("disk0.before-failback-1.vhdx"),
        names.home.with_name(".disk0.vhdx.1234.tmp"),
        names.home.with_name(f".disk9.vhdx.{lab.found.vm.vm_id}.2.failback"),
    ]
    ours = [
        names.building.with_name(f".disk0.vhdx.{lab.found.vm.vm_id}.1.failback"),
        names.building.with_name(f".{names.building.name}.0123456789abcdef.tmp"),
    ]
    for path in (*others, *ours):
        path.write_bytes(b"x")
    lab.bring()
    assert lab.names() == sorted(path.name for path in (*others, lab.homes[0]))
    assert read_disk(lab.homes[0]) == lab.wanted[0]


def test_a_file_in_the_way_of_the_old_disk_ends_it_before_anything_is_swapped(tmp_path: Path) -> None:
    lab = make(tmp_path)
    names = Names(lab.homes[0], lab.found.vm.vm_id, lab.newest.point)
    names.before.write_bytes(b"mine")
    with pytest.raises(OsError, match="another file of the name"):
        lab.bring()
    assert (read_disk(lab.homes[0]), names.before.read_bytes()) == (content(), b"mine")


def test_a_file_that_is_named_as_an_old_disk_stays_where_nothing_was_to_do(tmp_path: Path) -> None:
    data = content()
    lab = make_home_lab(tmp_path, [data], [data])
    names = Names(lab.homes[0], lab.found.vm.vm_id, lab.newest.point)
    names.before.write_bytes(b"mine")
    assert lab.bring().disks[0].how == "was-home"
    assert names.before.read_bytes() == b"mine"


def test_an_attempt_that_is_given_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make(tmp_path)

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("replica.failback.swap.relink", cut_off)
        lab.bring()
    assert len(lab.names()) == 3
    forget(lab.host, lab.found, lab.newest, lab.disks())
    assert lab.names() == ["disk0.vhdx"]
    assert read_disk(lab.homes[0]) == content()


def test_a_disk_in_use_and_a_second_operator_are_refused(tmp_path: Path) -> None:
    lab = make(tmp_path)
    with open_disk(lab.homes[0], writable=True), pytest.raises(DiskBusyError):
        lab.bring()
    with lab.host.exclusive(f"{lab.found.vm.vm_id}-failback"), pytest.raises(LeaseHeldError):
        lab.bring()


def test_a_link_to_a_home_disk_stays_a_link(tmp_path: Path) -> None:
    lab = make(tmp_path)
    link = tmp_path / "link.vhdx"
    link.symlink_to(lab.homes[0])
    lab.bring(homes=[HomeDisk(0, link)])
    assert link.is_symlink()
    lab.assert_home()
