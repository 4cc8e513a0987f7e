"""Random layouts of a Linux disk, there and back: every byte as it was, and the same plan whenever it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conversion import grub
from conversion.manifest import Manifest
from conversion.plan import Plan
from conversion.tobios import plan_bios
from conversion.touefi import plan_uefi
from conversion.verify import verify
from conversion.windows.volume import MSR, RECOVERY
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import BASIC_DATA, BIOS_BOOT, LINUX, LVM, SWAP, Place
from tests.support.gpt_disks import SparseDisk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")

OTHERS = [SWAP, LINUX, BASIC_DATA, LVM, MSR, RECOVERY, BIOS_BOOT]


@dataclass(frozen=True)
class Volumes:
    esp: bytes
    root: bytes


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    folder = tmp_path_factory.mktemp("volumes")
    return Volumes(disks.make_esp(folder, disks.esp_files()), disks.make_root(folder, disks.root_files()))


@pytest.fixture(autouse=True)
def quick_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grub, "build_core", disks.cached_core)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[tuple[str, Place]], int]:
    """Partitions in a random order, with gaps or without, their numbers in any order; and the disk's sectors."""
    kinds: list[str | int] = ["esp", "root", *draw(st.lists(st.sampled_from(range(len(OTHERS))), max_size=4))]
    kinds = draw(st.permutations(kinds))
    numbers = draw(st.permutations(range(1, len(kinds) + 3)))
    start = draw(st.sampled_from([2048, 4096, 2500]))
    placed: list[tuple[str, Place]] = []
    for kind, number in zip(kinds, numbers, strict=False):
        sectors = disks.ESP_SECTORS if isinstance(kind, str) else draw(st.integers(64, 5000))
        guid = disks.ESP if kind == "esp" else LINUX if kind == "root" else OTHERS[int(kind)]
        placed.append((str(kind), Place(number, guid, start, sectors)))
        start += sectors + draw(st.sampled_from([0, 0, 1, 2048, 3000]))
    return placed, start + 33 + draw(st.sampled_from([0, 1, 2015, 9000]))


# What is free lies before the EFI system partition alone, so that the rest and it become logical.
NO_GAP: tuple[list[tuple[str, Place]], int] = (
    [
        ("esp", Place(1, disks.ESP, 2048, disks.ESP_SECTORS)),
        ("root", Place(2, LINUX, 2048 + disks.ESP_SECTORS, disks.ESP_SECTORS)),
        *(("1", Place(3 + one, LINUX, 2048 + 2 * disks.ESP_SECTORS + 64 * one, 64)) for one in range(3)),
    ],
    2048 + 2 * disks.ESP_SECTORS + 3 * 64 + 33,
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(layout=layouts())
@example(layout=NO_GAP)
def test_there_and_back_is_the_identity_on_every_byte(
    tmp_path: Path, volumes: Volumes, layout: tuple[list[tuple[str, Place]], int]
) -> None:
    placed, sectors = layout
    contents = {"esp": volumes.esp, "root": volumes.root}
    places = [
        Place(one.number, one.kind, one.start_sector, one.sectors, contents.get(kind, b"")) for kind, one in placed
    ]
    disk = disks.make_disk(places, sectors)
    before = disk.content()

    plan = plan_bios(disk)
    assert disk.content() == before
    if plan.overlay is None:
        # The one thing that such disks can lack: a free sector before what would have to be logical.
        assert {one.rule for one in plan.refusals} == {"too-many-partitions"}
        mapped = [one for one in places if one.kind not in (MSR, BIOS_BOOT)]
        assert len(mapped) > 4
        return
    again = plan_bios(disk)
    encoded = plan.require_manifest().encode()
    assert again.require_manifest().encode() == encoded
    assert list(again.groups()) == list(plan.groups())
    manifest = Manifest.decode(encoded)

    disks.write_plan(disk, plan)
    assert verify(disk, plan, manifest) == ()
    seen = disks.sfdisk_partitions(disk.to_file(tmp_path / "converted.raw"))
    assert plan.layout is not None
    assert seen == sorted((one.first_lba, one.sectors) for one in plan.layout.entries)
    assert {"esp", "root"} <= {kind for kind, one in placed if (one.start_sector, one.sectors) in seen}

    untouched(disk, plan, manifest)
    back = plan_uefi(disk, manifest)
    disks.write_plan(disk, back)
    assert verify(disk, back, manifest) == ()
    assert disk.content() == before
    assert "No problems found" in disks.sgdisk_says(disk.to_file(tmp_path / "restored.raw"))


def untouched(disk: SparseDisk, plan: Plan, manifest: Manifest) -> None:
    """Check that a plan that was made and not written changes nothing."""
    converted = disk.content()
    assert plan_uefi(disk, manifest).overlay is not None
    assert disk.content() == converted
    assert plan.overlay is not None
