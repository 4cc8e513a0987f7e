"""godwit convert on disk images of every format: overlays, copies, in place, and home again byte for byte."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.output import Output
from conversion import grub
from conversion.manifest import Manifest
from replica.generation import convert as generation
from replica.generation.image import Image
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import PLAIN_SECTORS, Place, plain_places
from tests.support.gpt_disks import SparseDisk
from vhdx.convert import convert
from vhdx.create import create_disk
from vhdx.formats import open_disk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")

QEMU = shutil.which("qemu-img") and shutil.which("qemu-io") and shutil.which("qemu-nbd")
needs_qemu = pytest.mark.skipif(not QEMU, reason="qemu-utils is not installed")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def quick_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grub, "build_core", disks.cached_core)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    folder = tmp_path_factory.mktemp("volumes")
    return plain_places(disks.make_esp(folder, disks.esp_files()), disks.make_root(folder, disks.root_files()))


@pytest.fixture
def disk(places: list[Place]) -> SparseDisk:
    return disks.make_disk(places, PLAIN_SECTORS)


def godwit(*arguments: object) -> tuple[int, str, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = run([str(argument) for argument in arguments], output)
    assert isinstance(output.stdout, io.StringIO) and isinstance(output.stderr, io.StringIO)
    assert "Traceback" not in output.stderr.getvalue()
    return code, output.stdout.getvalue(), output.stderr.getvalue()


def done(*arguments: object) -> Any:
    code, out, said = godwit("convert", *arguments, "--json")
    assert code == 0, out + said
    return json.loads(out)


def failed(*arguments: object, code: int = 1) -> str:
    """Run a conversion that must fail with that exit code; return what it says."""
    got, out, said = godwit("convert", *arguments)
    assert got == code, out + said
    return said


def content(path: Path) -> bytes:
    with Image.find(path).opened() as opened:
        return opened.read_at(0, opened.size)


def whole(disk: SparseDisk) -> bytes:
    return disk.read_at(0, disk.size)


def inspected(path: Path) -> Any:
    return json.loads(godwit("inspect", path, "--json")[1])


def make(disk: SparseDisk, path: Path, format_: str) -> Path:
    """Write the disk as an image of that format."""
    raw = disk.to_file(path.with_suffix(".made"))
    if format_ == "raw":
        return raw.rename(path)
    convert(raw, path, format=format_)  # type: ignore[arg-type]
    raw.unlink()
    return path


def assert_restored(path: Path, disk: SparseDisk) -> None:
    """Check that an image holds what the disk does; what a format rounded its size up by is zeros."""
    found, wanted = content(path), whole(disk)
    assert found[: len(wanted)] == wanted and not found[len(wanted) :].strip(b"\0")


# --- overlays


@pytest.mark.parametrize(
    ("format_", "name", "made", "home"),
    [
        ("vhdx", "vm.vhdx", "vm.gen1.vhdx", "vm.gen2.vhdx"),
        pytest.param("raw", "vm.img", "vm.gen1.qcow2", "vm.gen2.qcow2", marks=needs_qemu),
        pytest.param("qcow2", "vm.qcow2", "vm.gen1.qcow2", "vm.gen2.qcow2", marks=needs_qemu),
        pytest.param("vhd", "vm.vhd", "vm.gen1.qcow2", "vm.gen2.qcow2", marks=needs_qemu),
        pytest.param("vhd-dynamic", "vm.vhd", "vm.gen1.qcow2", "vm.gen2.qcow2", marks=needs_qemu),
    ],
)
def test_overlays_by_default_names(
    tmp_path: Path, disk: SparseDisk, format_: str, name: str, made: str, home: str
) -> None:
    path = make(disk, tmp_path / name, format_)
    before = path.read_bytes()
    assert inspected(path)["generation"] == 2
    found = done(path, "--to", "gen1")
    assert (found["target"], found["manifest"]) == (str(tmp_path / made), str(tmp_path / f"{made}.conversion"))
    assert (tmp_path / made).stat().st_size < (40 * MIB if made.endswith("vhdx") else 4 * MIB)
    assert inspected(tmp_path / made)["generation"] == 1
    back = done(tmp_path / made, "--to", "gen2")
    assert (back["target"], back["manifest"]) == (str(tmp_path / home), None)
    assert_restored(tmp_path / home, disk)
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([name, made, f"{made}.conversion", home])


def test_a_differencing_child_and_a_checkpoint_of_the_converted_disk(tmp_path: Path, disk: SparseDisk) -> None:
    base = make(disk, tmp_path / "base.vhdx", "vhdx")
    child = tmp_path / "child.avhdx"
    create_disk(child, parent=base)
    with open_disk(child, writable=True) as opened:
        opened.write_at(disk.size - 600 * 512, b"of the child")
        opened.flush()
    disk.write_at(disk.size - 600 * 512, b"of the child")
    converted = Path(done(child, "--to", "gen1")["target"])
    checkpoint = tmp_path / "checkpoint.avhdx"
    create_disk(checkpoint, parent=converted)
    # The manifest lies beside the converted disk; the guest runs on a child of it.
    back = Path(done(checkpoint, "--to", "gen2", "-o", tmp_path / "home.vhdx")["target"])
    assert_restored(back, disk)
    assert done(converted, "--to", "gen2", "--dry-run")["refused"] is False


def test_a_vhdx_overlay_in_another_folder(tmp_path: Path, disk: SparseDisk) -> None:
    path = make(disk, tmp_path / "vm.vhdx", "vhdx")
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "vm.vhdx"
    done(path, "--to", "gen1", "-o", target)
    assert json.loads(godwit("inspect", target, "--parent-folder", tmp_path, "--json")[1])["generation"] == 1


@needs_qemu
def test_a_qcow2_overlay_lies_beside_its_disk(tmp_path: Path, disk: SparseDisk) -> None:
    path = make(disk, tmp_path / "vm.img", "raw")
    (tmp_path / "elsewhere").mkdir()
    said = failed(path, "--to", "gen1", "-o", tmp_path / "elsewhere" / "vm.qcow2", code=2)
    assert "an overlay must lie in the folder of its disk" in said
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- copies


@pytest.mark.parametrize("format_", ["vhd", "vhd-dynamic", "vhdx", "raw", pytest.param("qcow2", marks=needs_qemu)])
def test_whole_copies_there_and_back(tmp_path: Path, disk: SparseDisk, format_: str) -> None:
    path = make(disk, tmp_path / "vm.vhdx", "vhdx")
    target, home = tmp_path / "copy", tmp_path / "home.raw"
    done(path, "--to", "gen1", "--format", format_, "-o", target, "--for-azure")
    assert inspected(target)["generation"] == 1
    if format_ == "vhd":
        assert (target.stat().st_size - 512) % MIB == 0  # as Azure wants it
    done(target, "--to", "gen2", "--format", "raw", "-o", home)
    if format_ == "vhd" and disk.size % MIB:
        return
    assert_restored(home, disk)


def test_a_disk_that_the_copy_rounded_up_goes_home_with_its_table_at_the_end(
    tmp_path: Path, places: list[Place]
) -> None:
    disk = disks.make_disk(places, PLAIN_SECTORS - 100)
    path = make(disk, tmp_path / "vm.raw", "raw")
    done(path, "--to", "gen1", "--format", "vhd", "-o", tmp_path / "vm.vhd")
    done(tmp_path / "vm.vhd", "--to", "gen2", "--format", "raw", "-o", tmp_path / "home.raw")
    assert (tmp_path / "home.raw").stat().st_size == -(-disk.size // MIB) * MIB
    assert "No problems found" in disks.sgdisk_says(tmp_path / "home.raw")
    first = places[0].start_sector * 512
    assert content(tmp_path / "home.raw")[first : disk.size - 34 * 512] == whole(disk)[first : disk.size - 34 * 512]


# --- in place


@pytest.mark.parametrize("format_", ["raw", "vhdx", "vhd", "vhd-dynamic", pytest.param("qcow2", marks=needs_qemu)])
def test_in_place_there_and_back(tmp_path: Path, disk: SparseDisk, format_: str) -> None:
    path = make(disk, tmp_path / "vm", format_)
    found = done(path, "--to", "gen1", "--in-place", "--yes")
    assert (found["target"], found["manifest"]) == (str(path), f"{path}.conversion")
    assert inspected(path)["generation"] == 1
    assert content(path) != whole(disk)
    done(path, "--to", "gen2", "--in-place", "--yes")
    assert_restored(path, disk)
    assert [item.name for item in tmp_path.iterdir()] == ["vm"]


def test_in_place_asks(tmp_path: Path, disk: SparseDisk) -> None:
    path = make(disk, tmp_path / "vm.raw", "raw")
    assert godwit("convert", path, "--to", "gen1", "--in-place")[0] != 0
    assert content(path) == whole(disk)
    assert "leave out" in failed(path, "--to", "gen1", "--in-place", "-o", tmp_path / "x.vhdx", code=2)


# --- the manifest


@pytest.fixture
def converted(tmp_path: Path, disk: SparseDisk) -> Path:
    path = make(disk, tmp_path / "vm.vhdx", "vhdx")
    return Path(done(path, "--to", "gen1")["target"])


def test_no_manifest_no_way_back(converted: Path) -> None:
    kept = generation.manifest_path(converted)
    kept.rename(kept.with_name("kept"))
    said = failed(converted, "--to", "gen2", code=2)
    assert "without it there is no way back" in said and "--manifest" in said
    done(converted, "--to", "gen2", "--manifest", kept.with_name("kept"))


def test_a_damaged_manifest_is_not_believed(converted: Path) -> None:
    kept = generation.manifest_path(converted)
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(bytes(data))
    said = failed(converted, "--to", "gen2", code=12)
    assert "its checksum does not hold" in said and "another copy" in said
    kept.write_bytes(b"something else")
    assert "no conversion manifest" in failed(converted, "--to", "gen2", code=12)
    kept.unlink()
    kept.mkdir()
    assert "manifest" in failed(converted, "--to", "gen2")
    assert not converted.with_name("vm.gen2.vhdx").exists()


def test_the_manifest_of_another_disk_is_refused(tmp_path: Path, converted: Path, places: list[Place]) -> None:
    moved = [Place(1, one.kind, one.start_sector + 2048, one.sectors, one.content) for one in places[:1]]
    moved += [Place(2, one.kind, one.start_sector + 2048, one.sectors, one.content) for one in places[1:]]
    (tmp_path / "other").mkdir()
    other = make(disks.make_disk(moved, PLAIN_SECTORS + 2048), tmp_path / "other" / "vm.vhdx", "vhdx")
    out = Path(done(other, "--to", "gen1")["target"])
    code, text, _ = godwit("convert", out, "--to", "gen2", "--manifest", generation.manifest_path(converted))
    assert code == 14, text
    assert "It cannot be converted; nothing was written." in text
    assert not out.with_name("vm.gen2.vhdx").exists()


def test_a_manifest_is_for_the_way_back_only(converted: Path) -> None:
    said = failed(converted, "--to", "gen1", "--manifest", generation.manifest_path(converted), code=2)
    assert "for the way back" in said


def test_a_manifest_left_in_place_is_not_overwritten(tmp_path: Path, disk: SparseDisk) -> None:
    path = make(disk, tmp_path / "vm.raw", "raw")
    done(path, "--to", "gen1", "--in-place", "--yes")
    kept = generation.manifest_path(path).read_bytes()
    assert Manifest.decode(kept).size == disk.size
    assert godwit("convert", path, "--to", "gen1", "--in-place", "--yes")[0] == 14
    assert generation.manifest_path(path).read_bytes() == kept


# --- what stands in the way


def test_a_target_that_exists_is_left_alone(tmp_path: Path, disk: SparseDisk) -> None:
    path = make(disk, tmp_path / "vm.vhdx", "vhdx")
    (tmp_path / "vm.gen1.vhdx").write_bytes(b"precious")
    assert "exists" in failed(path, "--to", "gen1")
    assert "exists" in failed(path, "--to", "gen1", "--format", "raw", "-o", tmp_path / "vm.gen1.vhdx")
    assert (tmp_path / "vm.gen1.vhdx").read_bytes() == b"precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["vm.gen1.vhdx", "vm.vhdx"]


def test_names_that_tell_no_kind_of_overlay(tmp_path: Path, disk: SparseDisk) -> None:
    path = make(disk, tmp_path / "vm.raw", "raw")
    assert "--format" in failed(path, "--to", "gen1", "-o", tmp_path / "out.img", code=2)
    assert "needs a VHDX as its parent" in failed(path, "--to", "gen1", "-o", tmp_path / "out.vhdx", code=2)
    assert "--output" in failed(path, "--to", "gen1", "--format", "vhd", code=2)
    assert "No such file" in failed(tmp_path / "none.vhdx", "--to", "gen1")
    assert [item.name for item in tmp_path.iterdir()] == ["vm.raw"]


def test_what_is_not_as_planned_gets_no_name(tmp_path: Path, disk: SparseDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at before it has its name: here one that lost a write."""
    path = make(disk, tmp_path / "vm.vhdx", "vhdx")
    written = generation.write_overlay

    def lossy(source: Any, target: Any, size: Any, ranges: list[tuple[int, bytes]], check: Any) -> None:
        written(source, target, size, ranges[:-1], check)

    monkeypatch.setattr(generation, "write_overlay", lossy)
    said = failed(path, "--to", "gen1", code=12)
    assert "was not written as planned" in said and "nothing was put in force" in said
    assert [item.name for item in tmp_path.iterdir()] == ["vm.vhdx"]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_asked_to_end_it_leaves_nothing(tmp_path: Path, disk: SparseDisk) -> None:
    """SIGTERM comes while GRUB is called: a stand-in of ours, which only says that it runs."""
    path = make(disk, tmp_path / "vm.vhdx", "vhdx")
    programs = tmp_path / "programs"
    programs.mkdir()
    stand_in = programs / "grub-mkimage"
    stand_in.write_text(f"#!/bin/sh\necho $$ > {programs}/runs\nexec sleep 600\n")
    stand_in.chmod(0o755)
    program = Path(sys.executable).with_name("godwit")
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(
        [program, "convert", path, "--to", "gen1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while not (programs / "runs").exists() or not (programs / "runs").read_text().strip():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert sorted(item.name for item in tmp_path.iterdir()) == ["programs", "vm.vhdx"]


@needs_qemu
def test_a_vhd_of_which_qemu_sees_less_gets_no_overlay(tmp_path: Path, disk: SparseDisk) -> None:
    """QEMU goes by the geometry that some programs wrote: the last sectors, and the backup table, would be missing."""
    path = make(disk, tmp_path / "vm.vhd", "vhd")
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        footer = bytearray(file.read(512))
        footer[28:32] = b"vbox"
        footer[56:60] = bytes([0, 100, 4, 17])
        footer[64:68] = bytes(4)
        footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
        file.seek(-512, os.SEEK_END)
        file.write(footer)
    assert "no longer sleeps" in failed(path, "--to", "gen1", code=12)
    assert [item.name for item in tmp_path.iterdir()] == ["vm.vhd"]
    done(path, "--to", "gen1", "--format", "vhd", "-o", tmp_path / "copy.vhd")
