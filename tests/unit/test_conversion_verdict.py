"""The verdict on an OS disk: short, the grave first, and back from JSON as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conversion.finding import Severity
from replica.generation.verdict import LONGEST_TEXT, Verdict, verdict_of
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import BASIC_DATA, PLAIN_SECTORS, Place, plain_places
from vhdx.raw import RawDisk

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")


def judged(folder: Path, **changes: str) -> Verdict | None:
    (folder / "made").mkdir()
    esp = disks.make_esp(folder / "made", disks.esp_files() | {"EFI/debian/shimx64.efi": b"MZ"})
    root = disks.make_root(folder / "made", disks.root_files(**changes))  # type: ignore[arg-type]
    path = disks.make_disk(plain_places(esp, root), PLAIN_SECTORS).to_file(folder / "disk.raw")
    with RawDisk.open(path) as disk:
        return verdict_of(disk)


def test_a_disk_that_converts(tmp_path: Path) -> None:
    found = judged(tmp_path)
    assert found is not None and found.convertible and found.system == "Debian GNU/Linux 12 (bookworm)"
    assert [(one.rule, one.severity) for one in found.findings] == [("secure-boot", Severity.WARNING)]
    kept = Verdict.from_document(json.loads(json.dumps(found.document())))
    assert kept.document() == found.document()


def test_refusals_come_first_and_texts_are_short(tmp_path: Path) -> None:
    found = judged(tmp_path, fstab=f"PARTLABEL={'x' * 400} / ext4 defaults 0 1\n")
    assert found is not None and not found.convertible
    assert [one.severity for one in found.findings] == [Severity.REFUSAL, Severity.WARNING]
    assert len(found.findings[0].evidence) == LONGEST_TEXT
    assert len(json.dumps(found.document())) < 1000
    assert replace(found, findings=()).document()["findings"] == []


def test_a_disk_of_data_has_none(tmp_path: Path) -> None:
    path = disks.make_disk([Place(1, BASIC_DATA, 2048, 64)], 8192).to_file(tmp_path / "disk.raw")
    with RawDisk.open(path) as disk:
        assert verdict_of(disk) is None
