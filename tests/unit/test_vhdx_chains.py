"""Chains of differencing disks: how they are told, and what keeps them from being merged."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tests.support.crash_files import scratch_folder
from vhdx.chain import open_vhdx
from vhdx.create import create_disk
from vhdx.errors import DiskBusyError, DiskError, FormatUnknownError, OsError, ParentError
from vhdx.family import read_family
from vhdx.formats import open_disk
from vhdx.inuse import QEMU, WRITER, user_of
from vhdx.merge import merge_into_parent
from vhdx.merge_chain import held, merge_chain, plan_chain_merge
from vhdx.osfile import OS_FILES, OsFiles, open_file
from vhdx.resize import resize_to
from vhdx.survey import survey_chain, survey_folder
from vhdx.writer import open_writable

MIB = 1 << 20


def child_of(parent: Path, name: str, *, offset: int = 0, size: int | None = None) -> Path:
    path = parent.with_name(name)
    with open_vhdx(parent) as disk:
        size = size or disk.size
    create_disk(path, parent=parent, block_size=MIB, size=size)
    with open_disk(path, writable=True) as disk:
        disk.write_at(offset, name.encode() * 50)
    return path


def guid_of(path: Path) -> UUID:
    with open_vhdx(path) as disk:
        return disk.image.data_write_guid


def read(path: Path) -> bytes:
    with open_vhdx(path) as disk:
        return disk.read_at(0, disk.size)


def merge(top: Path, keep: int = 1) -> None:
    plan = plan_chain_merge(top, keep=keep)
    with held(plan.files) as files:
        merge_chain(plan, files=files)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.vhdx"
    create_disk(path, size=4 * MIB, block_size=MIB)
    with open_disk(path, writable=True) as disk:
        disk.write_at(0, b"base" * 1000)
    return path


@pytest.fixture
def chain(base: Path) -> list[Path]:
    """A base with three above it."""
    paths = [base]
    for number in (1, 2, 3):
        paths.append(child_of(paths[-1], f"c{number}.avhdx", offset=number * MIB))
    return paths


# --- told


def test_a_chain_is_told_from_the_newest_to_the_first(chain: list[Path]) -> None:
    os.utime(chain[1], (1_700_000_000, 1_700_000_000))
    told = survey_chain(chain[-1])
    assert [link.path for link in told.links] == chain[::-1]
    assert [link.depth for link in told.links] == [3, 2, 1, 0]
    assert told.checkpoints == 3
    middle = told.links[2]
    assert middle.modified_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert middle.stored_size == 512 and middle.file_size == chain[1].stat().st_size
    assert (told.above, told.left_over, told.broken) == ((), (), None)
    assert not any(link.used_by or link.branches or link.merge_begun for link in told.links)


def test_what_stands_above_a_file_is_told_by_its_ends(chain: list[Path]) -> None:
    branch = child_of(chain[1], "branch.avhdx")
    assert set(survey_chain(chain[0]).above) == {chain[3], branch}
    assert survey_chain(chain[2]).above == (chain[3],)


def test_a_tree_is_told_branch_by_branch(chain: list[Path]) -> None:
    branch = child_of(chain[1], "branch.avhdx")
    told = survey_folder(chain[0].parent)
    assert [one.path for one in told] == [branch, chain[3]]
    by_path = {link.path: link for link in told[1].links}
    assert by_path[chain[1]].branches == (branch,)
    assert not by_path[chain[0]].branches


def test_a_missing_parent_is_told_with_what_is_left_of_the_chain(chain: list[Path]) -> None:
    chain[1].rename(chain[1].with_name("elsewhere.bin"))
    told = survey_chain(chain[3])
    assert [link.path for link in told.links] == [chain[3], chain[2]]
    assert told.broken is not None and told.broken.path == chain[2]
    assert "missing" in told.broken.error and told.broken.hint


def test_a_parent_that_was_written_to_is_told_with_both_identifiers(chain: list[Path]) -> None:
    with open_disk(chain[1], writable=True) as disk:
        disk.write_at(0, b"changed behind its children's back")
    told = survey_chain(chain[3])
    assert [link.path for link in told.links] == [chain[3], chain[2]]
    assert told.broken is not None and told.broken.path == chain[2]
    assert "has changed since the child was made" in told.broken.error
    # The first two are a chain of their own by now, and the folder's other one is the broken one.
    assert [one.path for one in survey_folder(chain[0].parent)] == [chain[1], chain[3]]


def test_files_that_are_no_vhdx_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "disk.img"
    raw.write_bytes(bytes(MIB))
    with pytest.raises(FormatUnknownError, match="raw"):
        survey_chain(raw)
    with pytest.raises(OsError, match="no folder"):
        survey_folder(tmp_path / "nothing")
    assert survey_folder(tmp_path) == ()


def test_damaged_files_of_a_folder_are_passed_over(chain: list[Path]) -> None:
    broken = chain[0].with_name("broken.vhdx")
    broken.write_bytes(chain[0].read_bytes()[: 128 << 10])
    if sys.platform != "win32":
        os.mkfifo(chain[0].with_name("pipe.vhdx"))
    assert [one.path for one in survey_folder(chain[0].parent)] == [chain[3]]


def test_a_loop_of_parents_ends(chain: list[Path], tmp_path: Path) -> None:
    family = read_family([tmp_path])
    first, last = family.member(chain[1]), family.member(chain[3])
    assert first is not None and last is not None
    family._children[last.key] = [first]
    assert family.above(chain[0]) == ()


# --- in use


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
def test_a_writer_and_qemu_are_told_apart_and_looking_locks_nothing(chain: list[Path]) -> None:
    assert user_of(chain[0]) is None
    with open_writable(chain[3]):
        # This program marks a file as QEMU does, so that QEMU sees it.
        assert user_of(chain[3]) == QEMU
        told = survey_chain(chain[3])
        assert [link.used_by for link in told.links] == [QEMU, None, None, None]
    assert user_of(chain[3]) is None


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the kernel tells of no locks here")
def test_a_program_that_knows_nothing_of_qemu_is_seen_by_its_lock(base: Path) -> None:
    fcntl = pytest.importorskip("fcntl")

    with base.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert user_of(base) == WRITER
        fcntl.flock(file, fcntl.LOCK_SH)
        assert user_of(base) is None
    with pytest.raises(OsError):
        user_of(base.with_name("nothing"))


@pytest.mark.parametrize("who", range(4))
def test_nothing_is_merged_while_any_file_of_the_chain_is_open(chain: list[Path], who: int) -> None:
    plan = plan_chain_merge(chain[3])
    before = [path.read_bytes() for path in chain]
    other = open_file(chain[who], writable=True)
    with pytest.raises(DiskBusyError), held(plan.files):
        pass
    other.close()
    assert [path.read_bytes() for path in chain] == before
    with held(plan.files) as files:
        with pytest.raises(DiskBusyError):
            open_file(chain[who], writable=True)
        merge_chain(plan, files=files)
    for path in (chain[0], chain[3]):
        open_file(path, writable=True).close()


# --- merged


def test_the_newest_stays_and_the_others_go_into_the_first(chain: list[Path]) -> None:
    contents = [read(path) for path in chain]
    plan = plan_chain_merge(chain[3])
    assert (plan.merged, plan.target, plan.kept) == ((chain[1], chain[2]), chain[0], (chain[3],))
    assert plan.data_bytes == 1024
    merge(chain[3])
    assert sorted(chain[0].parent.iterdir()) == [chain[0], chain[3]]
    assert (read(chain[0]), read(chain[3])) == (contents[2], contents[3])
    assert not plan_chain_merge(chain[3]).steps


def test_what_is_kept_is_counted_from_the_newest(chain: list[Path]) -> None:
    assert plan_chain_merge(chain[3], keep=2).kept == (chain[3], chain[2])
    assert plan_chain_merge(chain[3], keep=3).steps == ()
    assert plan_chain_merge(chain[3], keep=99).steps == ()
    with pytest.raises(ParentError, match="newest"):
        plan_chain_merge(chain[3], keep=0)


def test_a_disk_without_a_parent_has_nothing_to_merge(base: Path) -> None:
    plan = plan_chain_merge(base)
    assert (plan.steps, plan.kept, plan.target) == ((), (), base)


def test_age_decides_up_to_the_oldest_that_is_young(chain: list[Path]) -> None:
    for path, written in zip(chain, (100, 200, 900, 300), strict=True):
        os.utime(path, (written, written))
    assert plan_chain_merge(chain[3], modified_before=500).merged == (chain[1],)
    assert plan_chain_merge(chain[3], modified_before=1000).merged == (chain[1], chain[2])
    assert plan_chain_merge(chain[3], modified_before=150).merged == ()
    assert plan_chain_merge(chain[3], keep=2, modified_before=1000).merged == (chain[1],)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_branch_anywhere_in_what_would_change_is_refused_and_named(chain: list[Path], where: int) -> None:
    branch = child_of(chain[where], "branch.avhdx")
    before = {path: path.read_bytes() for path in (*chain, branch)}
    with pytest.raises(ParentError, match="other disks stand on it") as caught:
        plan_chain_merge(chain[3])
    assert caught.value.path == str(chain[where]) and "branch.avhdx" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_branch_above_what_would_change_is_no_matter(chain: list[Path]) -> None:
    branch = child_of(chain[2], "branch.avhdx")
    contents = read(chain[3]), read(branch)
    merge(chain[3], keep=2)
    assert (read(chain[3]), read(branch)) == contents
    assert not chain[1].exists()


def test_a_file_that_is_not_the_newest_is_refused_with_the_one_that_is(chain: list[Path]) -> None:
    with pytest.raises(ParentError, match=r"c3\.avhdx stands above it"):
        plan_chain_merge(chain[1])


def test_a_child_of_another_folder_is_seen_where_that_is_allowed(chain: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    clone = other / "clone.avhdx"
    create_disk(clone, parent=chain[1], block_size=MIB)
    with pytest.raises(ParentError, match=r"clone\.avhdx"):
        plan_chain_merge(chain[3], allowed_folders=[other])


def test_a_chain_across_folders_is_merged_and_stays_linked(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first = child_of(base, "c1.avhdx", offset=MIB)
    top = other / "top.avhdx"
    create_disk(top, parent=first, block_size=MIB)
    with open_writable(top, allowed_folders=[tmp_path]) as disk:
        disk.write_at(2 * MIB, b"top")
        expected = disk.read_at(0, disk.size)
    plan = plan_chain_merge(top, allowed_folders=[tmp_path])
    with held(plan.files) as files:
        merge_chain(plan, allowed_folders=[tmp_path], files=files)
    with open_vhdx(top, allowed_folders=[tmp_path]) as disk:
        assert disk.read_at(0, disk.size) == expected
        assert [link.path.name for link in disk.chain] == ["top.avhdx", "base.vhdx"]


def test_a_larger_link_makes_the_first_file_grow(base: Path) -> None:
    first = child_of(base, "c1.avhdx", size=6 * MIB, offset=5 * MIB)
    top = child_of(first, "c2.avhdx", size=7 * MIB)
    expected = read(top)
    merge(top)
    assert read(top) == expected
    with open_vhdx(base) as disk:
        assert disk.size == 6 * MIB


def test_a_link_smaller_than_what_it_would_go_into_is_refused_before_anything_changes(chain: list[Path]) -> None:
    guid = guid_of(chain[1])  # it is kept, so that its child accepts it as it does a parent of another size
    resize_to(chain[1], 6 * MIB, allowed_folders=(), files=OS_FILES, new_guid=uuid4, data_write_guid=guid)
    before = [path.read_bytes() for path in chain]
    with pytest.raises(ParentError, match="nothing says what is past its end") as caught:
        plan_chain_merge(chain[3])
    assert caught.value.path == str(chain[2])
    assert [path.read_bytes() for path in chain] == before
    merge(chain[3], keep=2)  # the larger one goes into a smaller, which grows
    assert len(read(chain[3])) == 4 * MIB


def test_a_template_beneath_a_clone_is_not_merged_into(base: Path) -> None:
    clone = child_of(base, "clone.vhdx", offset=MIB)
    other = child_of(base, "other.vhdx", offset=MIB)
    assert plan_chain_merge(clone).steps == ()
    first = child_of(clone, "c1.avhdx", offset=2 * MIB)
    top = child_of(first, "c2.avhdx", offset=3 * MIB)
    contents = read(base), read(other), read(top)
    with closing(open_file(base, writable=True)):  # in use by somebody else's clone, for all we know
        plan = plan_chain_merge(top)
        assert (plan.merged, plan.target, plan.kept) == ((first,), clone, (top,))
        assert base not in plan.files
        merge(top)
    assert (read(base), read(other), read(top)) == contents
    assert [link.path for link in survey_chain(top).links] == [top, clone, base]


def test_broken_chains_are_refused(chain: list[Path]) -> None:
    chain[0].rename(chain[0].with_name("gone.bin"))
    with pytest.raises(ParentError, match="missing"):
        plan_chain_merge(chain[3])


# --- merges that were cut off


class CutOffError(Exception):
    """The power went."""


def cut_off(path: Path) -> None:
    """Merge a file into its parent, but for the end: the parent has begun to change."""

    def progress(done: int, total: int, phase: str) -> None:
        raise CutOffError

    with pytest.raises(CutOffError):
        merge_into_parent(path, progress=progress)


class NoRemoving(OsFiles):
    """Files of a machine that goes down when it removes one."""

    def remove(self, path: Path) -> None:
        raise CutOffError


def test_a_merge_of_the_newest_that_was_cut_off_is_left_to_be_finished_by_name(chain: list[Path]) -> None:
    cut_off(chain[3])
    with pytest.raises(ParentError, match="begun and cut off") as caught:
        plan_chain_merge(chain[3])
    assert caught.value.hint == f"finish it: godwit disk merge {chain[3]}"


def test_a_merge_in_the_middle_that_was_cut_off_is_finished_even_where_all_is_kept(chain: list[Path]) -> None:
    expected = read(chain[3])
    cut_off(chain[2])
    assert [link.merge_begun for link in survey_chain(chain[3]).links] == [False, True, False, False]
    plan = plan_chain_merge(chain[3], keep=9)
    assert (plan.finished, plan.merged, plan.kept) == ((chain[2],), (), (chain[3], chain[1]))
    merge(chain[3], keep=9)
    assert read(chain[3]) == expected
    assert [link.path for link in survey_chain(chain[3]).links] == [chain[3], chain[1], chain[0]]


def test_a_file_that_was_only_to_be_removed_is_told_apart_from_a_branch(chain: list[Path]) -> None:
    expected = read(chain[3])
    with pytest.raises(CutOffError):
        merge_into_parent(chain[2], files=NoRemoving())
    told = survey_chain(chain[3])
    assert [link.path for link in told.links] == [chain[3], chain[1], chain[0]]
    assert told.left_over == (chain[2],)
    plan = plan_chain_merge(chain[3])
    assert (plan.finished, plan.merged) == ((chain[2],), (chain[1],))
    assert chain[2] in plan.files
    merge(chain[3])
    assert sorted(chain[0].parent.iterdir()) == [chain[0], chain[3]]
    assert read(chain[3]) == expected


def test_room_is_foretold_by_what_is_written_and_given_back(chain: list[Path]) -> None:
    plan = plan_chain_merge(chain[3])
    assert 0 < plan.growth_bytes < 64 * MIB
    with pytest.raises(DiskError):
        plan_chain_merge(chain[3].with_name("nothing.avhdx"))
