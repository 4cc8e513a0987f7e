"""A disk that ran elsewhere as Generation 1 comes home as Generation 2, with what the guest wrote and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from conversion import grub
from conversion.errors import RefusedError
from conversion.inspection import inspect
from conversion.manifest import Manifest
from conversion.tobios import plan_bios
from conversion.verify import verify
from replica.errors import IntegrityError
from replica.failback.departure import converted_ranges
from replica.failback.home import HomeDisk
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import PLAIN_SECTORS, partition_guid, plain_places
from tests.support.engine import BLOCK
from tests.support.gpt_disks import SparseDisk
from tests.support.home_lab import HomeLab, make_home_lab, patch_disk, read_disk
from vhdx.formats import open_disk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")


@pytest.fixture(autouse=True)
def quick_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grub, "build_core", disks.cached_core)


@dataclass(frozen=True)
class Guest:
    """The disk as Generation 2, converted to 1, and a place in it that no file takes."""

    before: bytes
    converted: bytes
    manifest: Manifest
    free: int


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    folder = tmp_path_factory.mktemp("volumes")
    fstab = f"PARTUUID={partition_guid(2)} / ext4 defaults 0 1\n"
    root = disks.make_root(folder, disks.root_files(fstab=fstab, root=f"PARTUUID={partition_guid(2)}"))
    made = disks.make_disk(plain_places(disks.make_esp(folder, disks.esp_files()), root), PLAIN_SECTORS)
    before = made.read_at(0, made.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grub, "build_core", disks.cached_core)
        plan = plan_bios(made)
    converted = bytearray(before)
    for group in plan.groups():
        for offset, data in group:
            converted[offset : offset + len(data)] = data
    free = next(
        at for at in range(len(before) * 3 // 4 // BLOCK * BLOCK, 0, -BLOCK) if not any(converted[at : at + 3 * BLOCK])
    )
    return Guest(before, bytes(converted), plan.require_manifest(), free)


def make(folder: Path, guest: Guest, kind: str, *, unplanned: bool = False) -> HomeLab:
    """Return the VM after its guest has written elsewhere; ``wanted`` is what the home disk is to hold."""
    away, wanted = bytearray(guest.converted), bytearray(guest.before)
    for content in (away, wanted):
        content[guest.free + 512 : guest.free + BLOCK] = b"g" * (BLOCK - 512)
    lab = make_home_lab(folder, [guest.before], [bytes(away)], kind=kind)
    lab.wanted = (bytes(wanted),)
    return lab


@pytest.mark.parametrize("kind", ["vhdx", "raw", "vhd-dynamic"])
def test_it_comes_home_as_generation_2_with_what_the_guest_wrote(tmp_path: Path, guest: Guest, kind: str) -> None:
    lab = make(tmp_path, guest, kind)
    done = lab.bring(conversions={0: guest.manifest}, check_all=True)
    lab.assert_home()
    with open_disk(lab.homes[0]) as disk:
        assert inspect(disk).generation == 2
    # What the conversion wrote is home already, as it was before it: only the guest's own block is written.
    assert done.disks[0].differing_bytes == BLOCK
    assert lab.asked == []
    assert lab.bring(conversions={0: guest.manifest}).disks[0].how == "was-home"


def test_a_fresh_host_gets_generation_2_too(tmp_path: Path, guest: Guest) -> None:
    lab = make(tmp_path, guest, "vhdx")
    path = tmp_path / "fresh.vhdx"
    lab.bring(base=None, homes=[HomeDisk(0, path, new="vhdx")], conversions={0: guest.manifest})
    assert read_disk(path) == lab.wanted[0]


def test_a_touched_boot_disk_is_made_whole(tmp_path: Path, guest: Guest) -> None:
    """Its partition table was overwritten at home: that is asked about, and put right."""
    lab = make(tmp_path, guest, "vhdx")
    patch_disk(lab.homes[0], 512, b"EFI TRAP" + bytes(504))
    lab.bring(conversions={0: guest.manifest}, allow=True)
    assert [one.extents.tolist() for one in lab.asked] == [[[0, BLOCK]]]
    lab.assert_home()


def test_a_way_back_that_is_refused_leaves_the_home_disk(tmp_path: Path, guest: Guest) -> None:
    away = bytearray(guest.converted)
    away[0:512] = bytes(512)  # no partition table is left to go back from
    lab = make_home_lab(tmp_path, [guest.before], [bytes(away)])
    before = lab.homes[0].read_bytes()
    with pytest.raises(RefusedError):
        lab.bring(conversions={0: guest.manifest})
    assert lab.homes[0].read_bytes() == before
    assert len(lab.names()) == 1


def test_a_way_back_that_does_not_verify_leaves_the_home_disk(
    tmp_path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make(tmp_path, guest, "vhdx")
    before = lab.homes[0].read_bytes()

    def found(*arguments: object) -> object:
        assert verify(*arguments) == ()  # type: ignore[arg-type]
        return plan_bios(SparseDisk(1 << 20)).findings

    monkeypatch.setattr("replica.failback.goal.verify", found)
    with pytest.raises(IntegrityError, match="not what it should be"):
        lab.bring(conversions={0: guest.manifest})
    assert lab.homes[0].read_bytes() == before
    assert len(lab.names()) == 1


def test_what_an_attempt_with_other_means_has_written_does_not_shine_through(
    tmp_path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One attempt that knew of no conversion is cut off when its disk is built, the next one knows."""
    lab = make(tmp_path, guest, "vhdx")

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("replica.failback.home.swap", cut_off)
        lab.bring()
    assert len(lab.names()) == 2
    lab.bring(conversions={0: guest.manifest})
    lab.assert_home()


def test_the_ranges_of_a_conversion_are_where_it_wrote(guest: Guest) -> None:
    ranges = converted_ranges(guest.manifest).tolist()
    inside = bytearray(len(guest.before))
    for start, end in ranges:
        inside[start:end] = b"\1" * (end - start)
    differ = [
        at for at in range(0, len(guest.before), 512) if guest.before[at : at + 512] != guest.converted[at : at + 512]
    ]
    assert differ
    assert all(all(inside[at : at + 512]) for at in differ)
