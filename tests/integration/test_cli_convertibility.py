"""What commands say of whether a VM could be started as Generation 1: status, points, health; and the switch."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.output import Output
from replica.generation import freshness
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import PLAIN_SECTORS, plain_places

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")

REMEDY = "Name it by UUID="


class Place:
    """A store, and a VM in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.store = folder, folder / "store"
        monkeypatch.setenv("GODWIT_STORE", f"file://{self.store}")
        monkeypatch.setenv("GODWIT_STATE", str(folder / "state"))
        monkeypatch.setenv("GODWIT_PASSPHRASE", "correct horse battery staple")
        monkeypatch.chdir(folder)
        assert self.run("init", f"file://{self.store}")[0] == 0
        for name, changes in (("good", {}), ("bad", {"fstab": "PARTLABEL=a / ext4 defaults 0 1\n"})):
            (folder / name).mkdir()
            esp = disks.make_esp(folder / name, disks.esp_files())
            root = disks.make_root(folder / name, disks.root_files(**changes))  # type: ignore[arg-type]
            disks.make_disk(plain_places(esp, root), PLAIN_SECTORS).to_file(folder / f"{name}.raw")
        self.become("good")

    def become(self, name: str) -> None:
        (self.folder / "vm.raw").write_bytes((self.folder / f"{name}.raw").read_bytes())

    def run(self, *arguments: object) -> tuple[int, str]:
        output = Output(stdout=io.StringIO(), stderr=io.StringIO())
        code = run([str(one) for one in arguments], output)
        assert isinstance(output.stdout, io.StringIO)
        return code, output.stdout.getvalue()

    def told(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json")[1])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_a_vm_that_stops_converting_is_told_of_everywhere(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshness, "REST", 0)  # the cycles follow each other at once
    place.run("protect", "web", "--disk", "vm.raw")
    assert place.told("status", "web")["convertibility"] is None
    place.run("replicate", "web")
    assert "conversion:   convertible, Debian GNU/Linux 12 (bookworm)" in place.run("status", "web")[1]
    assert place.told("health", "web")["convertibility"] == "convertible"
    assert "not-convertible" not in place.run("health", "web")[1]
    place.become("bad")
    place.run("replicate", "web")
    text = place.run("status", "web")[1]
    assert "conversion:   refused, " in text and "[fstab-partlabel: " in text and REMEDY in text
    first, second = (one["convertibility"] for one in place.told("points", "web")["points"])
    assert (first["verdict"], second["verdict"]) == ("convertible", "refused")
    (finding,) = second["findings"]
    assert finding["rule"] == "fstab-partlabel" and REMEDY in finding["remedy"] and finding["evidence"]
    assert "critical not-convertible" in place.run("health", "web")[1]
    assert place.told("health", "web")["readiness"] == "not ready"
    assert len(list(place.store.glob("**/events/*-convertibility-refused-*.json"))) == 1


def test_of_an_encrypted_vm_it_is_sealed(place: Place) -> None:
    assert place.run("key", "init", "--passphrase")[0] == 0
    place.become("bad")
    assert place.run("protect", "web", "--disk", "vm.raw", "--encrypt")[0] == 0
    assert place.run("replicate", "web")[0] == 0
    assert place.told("status", "web")["convertibility"]["verdict"] == "refused"
    for path in place.store.rglob("*"):
        if path.is_file():
            assert b"fstab-partlabel" not in path.read_bytes() and b"bookworm" not in path.read_bytes(), path


def test_it_can_be_switched_off(place: Place) -> None:
    (place.folder / "godwit.toml").write_text("convertibility = false\n")
    place.run("protect", "web", "--disk", "vm.raw")
    place.run("replicate", "web")
    assert place.told("status", "web")["convertibility"] is None
    assert "conversion:   not known" in place.run("status", "web")[1]
    (place.folder / "godwit.toml").unlink()
    place.run("replicate", "web")
    assert place.told("status", "web")["convertibility"]["verdict"] == "convertible"
