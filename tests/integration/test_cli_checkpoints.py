"""VMs with checkpoints by the real commands: what is told of their chains, merging them, and that no point is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replica import catalog
from replica.model import Standing
from tests.integration.test_cli_replication import Site, bare, site  # noqa: F401 - fixtures
from tests.support.engine import BLOCK, random_blocks
from vhdx.create import create_disk
from vhdx.formats import open_disk
from vhdx.merge import merge_into_parent

MIB = 1 << 20


def write(path: Path, offset: int, data: bytes) -> None:
    with open_disk(path, writable=True) as disk:
        disk.write_at(offset, data)


def read(path: Path) -> bytes:
    with open_disk(path) as disk:
        return disk.read_at(0, disk.size)


class Guest:
    """A VM of one or more disks in a folder of its own, and what its disks held at each point."""

    def __init__(self, site: Site, *, disks: int = 1, name: str = "web") -> None:  # noqa: F811
        self.site, self.name = site, name
        self.folder = site.folder / f"{name} disks"
        self.folder.mkdir()
        self.chains: list[list[Path]] = []
        self.points: dict[int, list[bytes]] = {}
        for number in range(disks):
            path = self.folder / f"disk{number}.vhdx"
            create_disk(path, size=16 * MIB, block_size=MIB)
            write(path, 0, random_blocks(100 + number, 20))
            self.chains.append([path])

    @property
    def tops(self) -> list[Path]:
        return [chain[-1] for chain in self.chains]

    def checkpoint(self, name: str) -> None:
        """Put a file above each disk, and write to it."""
        for number, chain in enumerate(self.chains):
            path = self.folder / f"disk{number}_{name}.avhdx"
            create_disk(path, parent=chain[-1], block_size=MIB)
            write(path, (2 + len(chain)) * MIB, random_blocks(1000 * number + sum(name.encode()), 2))
            chain.append(path)

    def protect(self, *more: str) -> None:
        options = [word for path in self.tops for word in ("--disk", str(path))]
        self.site.good("protect", self.name, *options, *more)

    def replicate(self) -> dict[str, Any]:
        document = self.site.good("replicate", self.name, "--json").document
        self.points[document["point"]] = [read(path) for path in self.tops]
        assert isinstance(document, dict)
        return document

    def check_points(self) -> None:
        """Restore every point there ever was, and compare all bytes."""
        for number, contents in self.points.items():
            target = self.site.folder / f"restored {number}"
            target.mkdir()
            self.site.good("restore", self.name, "--point", str(number), "--to", target, "--format", "raw")
            restored = sorted(target.iterdir())
            assert [path.read_bytes() for path in restored] == contents, number
            shutil.rmtree(target)

    def merge(self, *more: str) -> Any:
        return self.site.good("checkpoints", "merge", self.name, "--yes", "--json", *more).document

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


@pytest.fixture
def guest(site: Site) -> Guest:  # noqa: F811
    """A VM of one disk with three checkpoints, of which one point was made."""
    made = Guest(site)
    for name in ("a", "b", "c"):
        made.checkpoint(name)
    made.protect()
    made.replicate()
    return made


# --- the way it is meant


def test_a_merged_chain_goes_on_being_protected_and_every_point_restores(guest: Guest) -> None:
    top = guest.tops[0]
    before = read(top)
    document = guest.merge("--keep", "2")
    assert [Path(one).name for one in document["disks"][0]["merged"]] == ["disk0_a.avhdx"]
    assert read(top) == before
    same = guest.replicate()
    assert same["disks"][0]["found_by"] == "scan"  # the files' identifiers say that they were touched
    assert same["changed_blocks"] == 0
    write(top, 10 * MIB, random_blocks(7, 3))
    assert guest.replicate()["changed_blocks"] == 3
    guest.merge()
    assert sorted(path.name for path in guest.folder.iterdir()) == ["disk0.vhdx", "disk0_c.avhdx"]
    guest.replicate()
    guest.chains[0] = [guest.chains[0][0], top]
    guest.checkpoint("d")
    guest.protect("--update")
    tracked = guest.replicate()
    assert tracked["disks"][0]["found_by"] == "chain"  # after a whole comparison, files tell what changed again
    assert tracked["changed_blocks"] == 2
    assert len(guest.points) == 5
    guest.check_points()
    guest.site.good("verify", "web", "--full")


def test_chains_are_listed_by_vm_path_and_folder(guest: Guest) -> None:
    site, top = guest.site, guest.tops[0]  # noqa: F811
    told = site.good("checkpoints", "web").out
    assert "4 files, 3 deep" in told
    assert [line.split()[0] for line in told.splitlines()[3:7]] == [path.name for path in guest.chains[0][::-1]]
    assert "point 1 was read from disk0_c.avhdx, which is as it was" in told
    document = site.good("checkpoints", "list", "web", "--json").document["chains"]
    assert len(document) == 1
    disk = document[0]
    assert (disk["vm"], disk["number"], disk["checkpoints"], disk["error"]) == ("web", 0, 3, None)
    assert [link["depth"] for link in disk["links"]] == [3, 2, 1, 0]
    assert all(link["age_seconds"] < 600 and link["used_by"] is None for link in disk["links"])
    assert disk["replicated"] == {"point": 1, "file": str(top), "unchanged": True}
    every = site.good("checkpoints", "--json").document["chains"]
    assert [(one["vm"], one["path"], one["checkpoints"]) for one in every] == [("web", str(top), 3)]
    for path in (top, guest.folder):
        by_path = site.good("checkpoints", path, "--json").document["chains"]
        assert [(one["vm"], one["path"], one["checkpoints"]) for one in by_path] == [(None, str(top), 3)]
    write(top, 0, b"x")
    assert "and the chain was written to" in site.good("checkpoints", "web").out


def test_disks_that_are_no_vhdx_are_told_as_such(site: Site) -> None:  # noqa: F811
    site.good("protect", "db", "--disk", site.disk("data.img", random_blocks(1, 2)))
    assert "raw, of 1 file: chains of VHDX alone are told here" in site.good("checkpoints", "db").out
    refused = site.run("checkpoints", "merge", "db", "--yes")
    assert refused.code == 1 and "none of its disks is a VHDX" in refused.err
    assert site.run("checkpoints", "nobody").code == 2
    assert site.run("checkpoints", "./nothing.vhdx").code == 1
    assert site.run("checkpoints", "merge", site.folder, "--yes").code == 2


def test_files_that_are_gone_are_told_beside_the_others(site: Site) -> None:  # noqa: F811
    guest = Guest(site, disks=2)
    guest.checkpoint("a")
    guest.protect()
    guest.tops[0].unlink()
    told = site.run("checkpoints", "web")
    assert told.code == 3 and "disk0_a.avhdx" in told.out and "2 files, 1 deep" in told.out


def test_disks_of_a_hypervisor_are_left_to_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    guest = Guest(site)
    guest.protect()
    real = catalog.settings_in_force

    def elsewhere(*arguments: Any) -> Any:
        settings = real(*arguments)
        return replace(settings, sources=(replace(settings.sources[0], path="hyperv:host/web#scsi-0-0"),))

    monkeypatch.setattr(catalog, "settings_in_force", elsewhere)
    told = site.good("checkpoints", "web").out
    assert "read through Hyper-V" in told and "Remove-VMSnapshot" in told
    refused = site.run("checkpoints", "merge", "web", "--yes")
    assert refused.code == 1 and "Remove-VMSnapshot" in refused.err


def test_all_disks_are_merged_to_one_depth(site: Site) -> None:  # noqa: F811
    guest = Guest(site, disks=2)
    for name in ("a", "b", "c", "d"):
        guest.checkpoint(name)
    guest.protect()
    guest.replicate()
    day = 86400
    now = guest.tops[0].stat().st_mtime
    # The second disk's files were written to for longer: of it, less is old.
    for chain, ages in zip(guest.chains, ((9, 9, 9, 9, 0), (9, 9, 1, 1, 0)), strict=True):
        for path, age in zip(chain, ages, strict=True):
            os.utime(path, (now - age * day, now - age * day))
    before = [read(path) for path in guest.tops]
    document = guest.merge("--older-than", "7d")
    assert [[Path(one).stem[-1] for one in disk["merged"]] for disk in document["disks"]] == [["a"], ["a"]]
    assert [len(disk["kept"]) for disk in document["disks"]] == [3, 3]
    assert [read(path) for path in guest.tops] == before
    guest.merge()
    assert [read(path) for path in guest.tops] == before
    guest.replicate()
    guest.check_points()


def test_a_merge_that_was_cut_off_is_told_and_finished(guest: Guest) -> None:
    class CutOffError(Exception):
        pass

    def cut_off(done: int, total: int, phase: str) -> None:
        raise CutOffError

    before = read(guest.tops[0])
    with pytest.raises(CutOffError):
        merge_into_parent(guest.chains[0][1], progress=cut_off)
    told = guest.site.good("checkpoints", "web").out
    assert "the merge of disk0_a.avhdx was cut off: 'godwit checkpoints merge' finishes it" in told
    guest.replicate()  # while it stands so, the chain reads as ever
    assert "whose merge was cut off" in guest.site.good("checkpoints", "merge", "web", "--yes", "--keep", "9").out
    assert not guest.chains[0][1].exists()
    assert read(guest.tops[0]) == before
    guest.replicate()
    guest.check_points()


# --- what is asked first, and what is refused


def test_a_dry_run_changes_nothing_and_nobody_is_asked_without_a_terminal(guest: Guest) -> None:
    before = guest.files()
    done = guest.site.good("checkpoints", "merge", "web", "--dry-run")
    assert "would merge into disk0.vhdx" in done.out
    assert "Remove-VMSnapshot" in done.err  # AVHDX files, and no configuration at hand
    assert guest.site.run("checkpoints", "merge", "web").code == 2
    assert guest.site.run("checkpoints", "merge", "web", "--keep", "0", "--yes").code == 2
    assert guest.files() == before
    quiet = guest.site.good("checkpoints", "merge", "web", "--keep", "9", "--yes")
    assert "nothing to merge" in quiet.out and "Remove-VMSnapshot" not in quiet.err
    assert guest.files() == before


@pytest.mark.parametrize("place", ["Snapshots", "../Virtual Machines", "elsewhere"])
@pytest.mark.parametrize("named", ["disk0.vhdx", "DISK0_B.AVHDX"])
def test_what_a_configuration_of_hyper_v_names_is_not_merged(guest: Guest, place: str, named: str) -> None:
    folder = guest.folder / place
    folder.mkdir()
    record = folder / "7E77503A-A26B-4BB5-9846-396F49A30141.vmcx"
    record.write_bytes(os.urandom(501) + f"D:\\VMs\\web\\{named}\0".encode("utf-16-le") + os.urandom(100))
    before = guest.files()
    options: list[str | Path] = ["--configurations", folder.parent] if place == "elsewhere" else []
    refused = guest.site.run("checkpoints", "merge", "web", "--yes", *options)
    assert refused.code == 1
    assert named.lower() in refused.err and record.name in refused.err and "Remove-VMSnapshot" in refused.err
    assert guest.files() == before


def test_a_machine_s_own_configuration_names_the_newest_file_only_which_stays(guest: Guest) -> None:
    folder = guest.folder / "Virtual Machines"
    folder.mkdir()
    (folder / "web.vmcx").write_bytes(b"\1" + "D:\\VMs\\disk0_c.avhdx\0".encode("utf-16-le"))
    (guest.folder / "notes.xml").write_text("<domain>/disk0.vhdx</domain>")  # none of Hyper-V's
    done = guest.site.good("checkpoints", "merge", "web", "--yes")
    assert "Remove-VMSnapshot" not in done.err
    assert len(list(guest.folder.glob("*vhdx"))) == 2


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils are not installed")
def test_nothing_is_merged_while_qemu_has_any_file_open(guest: Guest) -> None:
    before = guest.files()
    command = ["qemu-io", "-r", "-f", "vhdx", str(guest.chains[0][0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None
        qemu.stdin.write("length\n")
        qemu.stdin.flush()
        assert "16 MiB" in qemu.stdout.readline()
        assert "disk0.vhdx is in use by QEMU" in guest.site.good("checkpoints", "web").out
        for more in (["--dry-run"], ["--yes"]):
            refused = guest.site.run("checkpoints", "merge", "web", *more)
            assert refused.code == 1 and "QEMU has it open" in refused.err and "disk0.vhdx" in refused.err
        qemu.communicate("quit\n")
    assert guest.files() == before
    guest.merge()


def test_one_disk_that_cannot_be_merged_keeps_all_from_it(site: Site) -> None:  # noqa: F811
    guest = Guest(site, disks=2)
    for name in ("a", "b"):
        guest.checkpoint(name)
    guest.protect()
    branch = guest.folder / "disk1_branch.avhdx"
    create_disk(branch, parent=guest.chains[1][1], block_size=MIB)
    before = guest.files()
    refused = site.run("checkpoints", "merge", "web", "--yes")
    assert refused.code == 1 and "disk1_a.avhdx" in refused.err and "disk1_branch.avhdx" in refused.err
    assert guest.files() == before
    told = site.good("checkpoints", "web").out
    assert "disk1_a.avhdx is the parent of other disks too: disk1_branch.avhdx" in told


def test_lack_of_room_is_foretold(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    before = guest.files()
    refused = guest.site.run("checkpoints", "merge", "web", "--yes")
    assert refused.code == 1 and "1048576 are free" in refused.err
    assert guest.files() == before


def test_the_disks_at_home_of_a_vm_that_is_failed_over_are_left_alone(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = catalog.settings_in_force

    def failed_over(*arguments: Any) -> Any:
        settings = real(*arguments)
        return replace(settings, state=replace(settings.state, standing=Standing.FAILED_OVER))

    monkeypatch.setattr(catalog, "settings_in_force", failed_over)
    refused = guest.site.run("checkpoints", "merge", "web", "--yes")
    assert refused.code == 2 and "failed-over" in refused.err and "godwit status web" in refused.err


def test_broken_chains_are_told_with_the_way_out(guest: Guest) -> None:
    guest.chains[0][1].rename(guest.site.folder / "away.avhdx")
    told = guest.site.run("checkpoints", "web")
    assert told.code == 3
    assert "broken at disk0_b.avhdx: its parent is missing" in told.out and "hint: put the parent beside" in told.out
    document = json.loads(guest.site.run("checkpoints", guest.folder, "--json").out)
    assert {Path(one["path"]).name: bool(one["broken"]) for one in document["chains"]} == {
        "disk0.vhdx": False,
        "disk0_c.avhdx": True,
    }
    assert guest.site.run("checkpoints", "merge", "web", "--yes").code == 1


# --- the chain changes between cycles


def reasons_of_health(of: Site) -> list[str]:
    return [one["rule_id"] for one in json.loads(of.run("health", "web", "--json").out)["reasons"]]


def test_a_chain_that_grows_is_followed_and_told_of_until_it_is(site: Site) -> None:  # noqa: F811
    guest = Guest(site)
    guest.protect()
    guest.replicate()
    base = guest.tops[0]
    guest.checkpoint("a")
    # The VM runs on the new file, and nobody told us: the point is of what the old one holds.
    done = site.good("replicate", "web")
    assert str(guest.tops[0]) in done.err and "an earlier state" in done.err
    guest.points[2] = [read(base)]
    told = site.good("checkpoints", "web").out
    assert f"not the newest: {guest.tops[0]} stands above it" in told
    refused = site.run("checkpoints", "merge", "web", "--yes")
    assert refused.code == 1 and "is not the newest file" in refused.err and guest.tops[0].name in refused.err
    assert site.good("replicate", "web", "--json").document["disks"][0]["newer_files"] == [str(guest.tops[0])]
    guest.points[3] = guest.points[2]
    assert "checkpoint-not-followed" in reasons_of_health(site)
    guest.protect("--update")
    followed = guest.replicate()
    assert "checkpoint-not-followed" not in reasons_of_health(site)
    assert (followed["disks"][0]["found_by"], followed["changed_blocks"]) == ("chain", 2)
    assert "an earlier state" not in site.good("replicate", "web").err
    guest.points[5] = guest.points[4]
    guest.check_points()


def test_protecting_a_file_that_is_not_the_newest_says_which_is(site: Site) -> None:  # noqa: F811
    guest = Guest(site)
    guest.checkpoint("a")
    guest.checkpoint("b")
    done = site.good("protect", "web", "--disk", guest.chains[0][0])
    assert f"is not the newest of its chain: {guest.tops[0]} stand" in done.err and "--update" in done.err
    updated = site.good("protect", "web", "--update", "--disk", guest.tops[0], "--json").document
    assert updated["newer_files"] == {} and updated["disks"][0]["number"] == 0


def test_an_applied_checkpoint_and_a_deleted_one_are_noticed(site: Site) -> None:  # noqa: F811
    guest = Guest(site)
    guest.checkpoint("a")
    guest.checkpoint("b")
    guest.protect()
    guest.replicate()
    # Applied: what stood above the checkpoint goes, and a new file takes its place.
    guest.chains[0].pop().unlink()
    guest.checkpoint("again")
    write(guest.tops[0], 12 * MIB, random_blocks(3, 1))
    guest.protect("--update")
    assert guest.replicate()["disks"][0]["found_by"] == "scan"
    # Deleted, with the VM off: the hypervisor merges the file beneath, and then the newest too.
    merge_into_parent(guest.chains[0].pop(1))
    assert guest.replicate()["changed_blocks"] == 0
    merge_into_parent(guest.chains[0].pop())
    lost = site.run("replicate", "web")
    assert lost.code == 1 and "disk0_again.avhdx" in lost.err
    guest.protect("--update")
    last = guest.replicate()
    assert (last["disks"][0]["number"], last["changed_blocks"]) == (0, 0)
    guest.check_points()


def test_blocks_of_one_sector_changed_across_a_merge_are_found(guest: Guest) -> None:
    """The smallest change, made between the merge and the next cycle, in a block that is held by now."""
    write(guest.tops[0], 5 * MIB, b"\1" * BLOCK)
    guest.replicate()
    guest.merge()
    write(guest.tops[0], 5 * MIB + 512, b"\2")
    assert guest.replicate()["changed_blocks"] == 1
    guest.check_points()
