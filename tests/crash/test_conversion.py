"""A conversion in place, cut off at every effect on the files: it starts as one generation or the other, and goes on.

Before the write of the first sector the disk is of the old generation, with its table, its EFI system partition and
its root as they were; from it on it is of the new one. Whatever was cut off, running the command again finishes it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest

from conversion import grub
from conversion.device import Slice
from conversion.errors import ConversionError
from conversion.filesystems.fat import FatFileSystem
from conversion.filesystems.probe import open_filesystem
from conversion.inspection import inspect
from conversion.manifest import Manifest
from conversion.plan import SWITCH, TO_UEFI_ORDER, components
from conversion.tobios import plan_bios
from conversion.touefi import plan_uefi
from conversion.windows.guest import SYSTEM_HIVE
from conversion.windows.hive import Hive
from conversion.windows.hivefile import read_recovered
from replica.generation.convert import convert_generation, journal_path, manifest_path, write_manifest
from replica.generation.image import Image
from tests.support import conversion_disks as disks
from tests.support import windows_disk
from tests.support.conversion_disks import PLAIN_SECTORS, partition_guid, plain_places
from tests.support.crash_files import RecordingFiles, crash_points, scratch_folder
from tests.support.gpt_disks import SparseDisk
from tests.unit.test_hive import everything
from vhdx import qcow2
from vhdx.convert import convert
from vhdx.formats import open_disk

MIB = 1 << 20
SECTOR = 512
# Of the sectors that were under way, how many reached the disk; and crashes of those that there are, evenly spread.
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95) if os.environ.get("GODWIT_SOAK") else (0.5,)
MOST_CRASHES = 1000 if os.environ.get("GODWIT_SOAK") else 14

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")


@pytest.fixture(autouse=True)
def quick_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grub, "build_core", disks.cached_core)


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> SparseDisk:
    """A disk on which fstab must be edited, so that every group of writes has something in it."""
    folder = tmp_path_factory.mktemp("volumes")
    fstab = f"PARTUUID={partition_guid(2)} / ext4 defaults 0 1\n"
    root = disks.make_root(folder, disks.root_files(fstab=fstab, root=f"PARTUUID={partition_guid(2)}"))
    return disks.make_disk(plain_places(disks.make_esp(folder, disks.esp_files()), root), PLAIN_SECTORS)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> SparseDisk:
    if windows_disk.missing():
        pytest.skip(windows_disk.missing())
    path = tmp_path_factory.mktemp("windows") / "disk.raw"
    windows_disk.build(path)
    return SparseDisk.from_file(path)


def content(path: Path) -> dict[int, bytes]:
    return SparseDisk.from_file(path).content()


def generation_of(path: Path) -> int | None:
    with open_disk(path, format="raw") as disk:
        return inspect(disk).generation


def test_to_generation_1(linux: SparseDisk) -> None:
    disk, before = linux, linux.content()
    with scratch_folder() as folder:
        path = disk.to_file(folder / "disk.raw")
        record = RecordingFiles(folder)
        convert_generation(path, 1, in_place=True, files=record)
        converted, manifest = content(path), manifest_path(path).read_bytes()
        allowed = spared(disk)
        for point in crash_points(record, seeds=1):
            point.write_to(folder)
            generation = generation_of(path)
            switched = content(path).get(0) == converted[0]
            assert generation == (1 if switched else 2), str(point)
            if not switched:
                assert_starts_as_before(path, disk, allowed, str(point))
            change = convert_generation(path, 1, in_place=True)
            assert (change.plan.overlay is None) is switched, str(point)
            assert content(path) == converted, str(point)
            assert manifest_path(path).read_bytes() == manifest, str(point)
            convert_generation(path, 2, in_place=True)
            assert content(path) == before, str(point)


def test_back_to_generation_2(linux: SparseDisk) -> None:
    disk, before = linux, linux.content()
    with scratch_folder() as folder:
        path = disk.to_file(folder / "disk.raw")
        convert_generation(path, 1, in_place=True)
        converted = content(path)
        record = RecordingFiles(folder)
        convert_generation(path, 2, in_place=True, files=record)
        assert content(path) == before
        for point in crash_points(record, seeds=1):
            point.write_to(folder)
            switched = content(path).get(0) == before.get(0)
            assert generation_of(path) == (2 if switched else 1), str(point)
            if not switched:
                assert content(path) == converted, str(point)
            if manifest_path(path).exists():  # else it was done, and only the command had not ended
                convert_generation(path, 2, in_place=True)
            assert content(path) == before, str(point)


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_windows_cut_off_between_two_writes(windows: SparseDisk, share: float) -> None:
    before = windows.content()
    with scratch_folder() as folder:
        path = windows.to_file(folder / "disk.raw")
        plan = plan_bios(windows)
        writes = [write for group in plan.groups() for write in group]
        write_manifest(manifest_path(path), plan.require_manifest(), overwrite=False)
        cut = windows.copy()
        for offset, data in writes[: int(len(writes) * share)]:
            cut.write_at(offset, data)
        cut.to_file(path)
        assert_starts_as_before(path, windows, spared(windows), f"{share}")
        convert_generation(path, 1, in_place=True)
        converted = content(path)
        for offset, data in writes:
            cut.write_at(offset, data)
        assert converted == cut.content()

        back = plan_uefi(cut, plan.require_manifest())
        journal = components(back.require(), TO_UEFI_ORDER, {})
        write_manifest(journal_path(path), Manifest("windows", cut.size, 512, journal), overwrite=False)
        writes = [write for group in back.groups() for write in group]
        for offset, data in writes[: int(len(writes) * share)]:
            cut.write_at(offset, data)
        cut.to_file(path)
        assert generation_of(path) == (2 if cut.read_at(0, 512) == windows.read_at(0, 512) else 1)
        convert_generation(path, 2, in_place=True)
        assert content(path) == before
        assert [item.name for item in folder.iterdir()] == ["disk.raw"]


def test_a_patched_table_is_finished_too(linux: SparseDisk) -> None:
    """The guest removed nothing but grew its root: what comes back is no copy of what was there."""
    with scratch_folder() as folder:
        path = linux.to_file(folder / "disk.raw")
        convert_generation(path, 1, in_place=True)
        with path.open("r+b") as file:
            file.seek(446 + 16 + 12)
            file.write((disks.ROOT_SECTORS + 500).to_bytes(4, "little"))
        record = RecordingFiles(folder)
        convert_generation(path, 2, in_place=True, files=record)
        wanted = content(path)
        for point in crash_points(record, seeds=1):
            point.write_to(folder)
            if manifest_path(path).exists() or journal_path(path).exists():
                convert_generation(path, 2, in_place=True)
            assert content(path) == wanted, str(point)
            assert generation_of(path) == 2


def test_a_disk_that_was_used_since_is_not_taken_back(linux: SparseDisk) -> None:
    with scratch_folder() as folder:
        path = linux.to_file(folder / "disk.raw")
        record = RecordingFiles(folder)
        convert_generation(path, 1, in_place=True, files=record)
        switch = next(
            at for at, one in enumerate(record.effects) if one.kind == "write" and one.path == path and one.offset == 0
        )
        point = next(one for one in crash_points(record) if one.ordinal == switch and one.mode == "none")
        point.write_to(folder)
        core = plan_bios(linux).layout
        assert core is not None
        with path.open("r+b") as file:
            file.seek(core.core_lba * 512 + 100)
            file.write(b"what somebody wrote here since")
        held = content(path)
        with pytest.raises(ConversionError, match="used since") as refused:
            convert_generation(path, 1, in_place=True)
        assert refused.value.hint is not None and "move" in refused.value.hint
        assert content(path) == held


def spared(disk: SparseDisk) -> list[tuple[int, int]]:
    """Return what a conversion writes before the switch, (offset, length): elsewhere nothing may have changed."""
    manifest = plan_bios(disk).require_manifest()
    parts = [one for one in manifest.components if one.name != SWITCH]
    return [(one.offset, len(one.after)) for part in parts for one in part.ranges]


def assert_starts_as_before(path: Path, disk: SparseDisk, written: list[tuple[int, int]], said: str) -> None:
    """Check that nothing but what is written changed, that both tables stand, and that the ESP's programs do."""
    now = SparseDisk.from_file(path)
    for offset, length in written:
        now.write_at(offset, disk.read_at(offset, length))
    assert now.content() == disk.content(), said
    with open_disk(path, format="raw") as opened:
        found, original = inspect(opened), inspect(disk)
        assert found.copies is not None and original.copies is not None
        assert found.copies.primary.good and found.copies.backup.good, said
        assert found.copies.table.entries == original.copies.table.entries, said
        esp, esp_before = found.esp, original.esp
        assert esp is not None and esp_before is not None
        fat, fat_before = FatFileSystem(esp.device), FatFileSystem(Slice(disk, esp.device.start, esp.device.size))
        folder = "/EFI/BOOT"
        assert fat.read_file(f"{folder}/BOOTX64.EFI") == fat_before.read_file(f"{folder}/BOOTX64.EFI"), said
        for name in ("/EFI/debian/grub.cfg", "/EFI/Microsoft/Boot/BCD"):
            assert fat.read_file(name) == fat_before.read_file(name), said
        assert found.system == original.system, said


# --- every format


def made(disk: SparseDisk, folder: Path, format_: str) -> Path:
    """Write the disk as an image of that format."""
    raw, path = disk.to_file(folder / "made"), folder / "disk"
    if format_ == "raw":
        return raw.rename(path)
    convert(raw, path, format=format_)  # type: ignore[arg-type]
    raw.unlink()
    return path


def seen(path: Path) -> tuple[int | None, dict[int, bytes]]:
    """Return the generation that an image starts as, and what it holds, by sector."""
    with Image.find(path).opened() as disk:
        blocks = {at: disk.read_at(at, min(MIB, disk.size - at)) for at in range(0, disk.size, MIB)}
        return inspect(disk).generation, {at: block for at, block in blocks.items() if block.strip(b"\0")}


@pytest.mark.parametrize("to", [1, 2])
@pytest.mark.parametrize("format_", ["vhdx", "vhd", "vhd-dynamic"])
def test_each_format_starts_as_one_or_the_other(linux: SparseDisk, format_: str, to: Literal[1, 2]) -> None:
    with scratch_folder() as folder:
        path = made(linux, folder, format_)
        old = seen(path)
        assert old[0] == 2
        if to == 2:
            convert_generation(path, 1, in_place=True)
            old = seen(path)
        record = RecordingFiles(folder)
        convert_generation(path, to, in_place=True, files=record)
        new = seen(path)
        assert (old[0], new[0]) == (3 - to, to)
        points = list(crash_points(record, seeds=1))
        assert len({one.ordinal for one in points}) > 10
        generations = []
        for point in points[:: max(1, len(points) // MOST_CRASHES)]:
            point.write_to(folder)
            generation, held = seen(path)
            generations.append(generation)
            assert generation == (to if held.get(0, b"")[:SECTOR] == new[1][0][:SECTOR] else 3 - to), str(point)
            if to == 1 or manifest_path(path).exists():  # else it was done, and only the command had not ended
                convert_generation(path, to, in_place=True)
            assert seen(path) == new, str(point)
        assert {1, 2} == set(generations)


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
@pytest.mark.parametrize("to", [1, 2])
def test_a_qcow2_is_cut_off_between_any_two_writes(
    linux: SparseDisk, to: Literal[1, 2], monkeypatch: pytest.MonkeyPatch
) -> None:
    with scratch_folder() as folder:
        path = made(linux, folder, "qcow2")
        if to == 2:
            convert_generation(path, 1, in_place=True)
        old, kept = seen(path), {one: one.read_bytes() for one in folder.iterdir()}
        convert_generation(path, to, in_place=True)
        new, real, cut, writes = seen(path), qcow2.write_ranges, 0, 1
        while cut < writes:
            for one in folder.iterdir():
                one.unlink()
            for one, content_ in kept.items():
                one.write_bytes(content_)
            done = 0

            def write(target: Path | str, ranges: Iterable[tuple[int, bytes]], last: int = cut) -> None:
                nonlocal done
                for one in list(ranges):
                    if done == last:
                        raise CutOffError
                    real(target, [one])
                    done += 1

            with monkeypatch.context() as patched:
                patched.setattr(qcow2, "write_ranges", write)
                try:
                    convert_generation(path, to, in_place=True)
                except CutOffError:
                    writes = cut + 2
            generation, held = seen(path)
            assert generation == (to if held[0][:SECTOR] == new[1][0][:SECTOR] else 3 - to), cut
            assert generation == to or {**held, 0: b""}.keys() == {**old[1], 0: b""}.keys(), cut
            if to == 1 or manifest_path(path).exists():
                convert_generation(path, to, in_place=True)
            assert seen(path) == new, cut
            cut += 1
        assert cut > 3


class CutOffError(Exception):
    """What ends the process in the middle of its writes."""


# --- the registry of Windows


def registry(device: SparseDisk, start: int, size: int) -> dict[str, dict[str, tuple[int, bytes]]]:
    """Return every value of the SYSTEM hive as Windows reads it: mended by its logs where it says that it is dirty."""
    filesystem = open_filesystem(Slice(device, start, size))
    assert filesystem is not None
    found = read_recovered(filesystem, SYSTEM_HIVE)
    assert found is not None
    return everything(Hive(found.content))


@pytest.mark.parametrize("to", [1, 2])
def test_the_registry_is_the_old_or_the_new_one_value_by_value(windows: SparseDisk, to: Literal[1, 2]) -> None:
    """Whatever sectors reached the disk before the machine died, and although nobody runs the command again."""
    forth = plan_bios(windows)
    found = forth.inspection.windows
    assert found is not None and found.windows is not None
    start, size = found.windows.device.start, found.windows.device.size
    disk, plan = windows.copy(), forth
    if to == 2:
        for ranges in forth.groups():
            write(disk, ranges)
        plan = plan_uefi(disk, forth.require_manifest())
    old, new = registry(disk, start, size), dict[str, dict[str, tuple[int, bytes]]]()
    states, chance = [], random.Random(to)
    for ranges in plan.groups():
        sectors = [(at + i, data[i : i + SECTOR]) for at, data in ranges for i in range(0, len(data), SECTOR)]
        if any(start <= at < start + size for at, _ in sectors):
            for share in SHARES:
                cut = disk.copy()
                write(cut, [one for one in sectors if chance.random() < share])
                states.append(cut)
        write(disk, ranges)
        states.append(disk.copy())
    new = registry(disk, start, size)
    assert {path for path in old if old[path] != new.get(path)}
    for state in states:
        seen_ = registry(state, start, size)
        assert seen_.keys() <= old.keys() | new.keys()
        assert seen_.keys() >= old.keys() & new.keys()
        for path, values in seen_.items():
            one, other = old.get(path, {}), new.get(path, {})
            assert values.keys() >= one.keys() & other.keys(), path
            assert all(value in (one.get(name), other.get(name)) for name, value in values.items()), path


def write(disk: SparseDisk, ranges: Iterable[tuple[int, bytes]]) -> None:
    for offset, data in ranges:
        disk.write_at(offset, data)
