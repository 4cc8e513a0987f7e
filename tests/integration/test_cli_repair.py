"""godwit verify and repair as an administrator types them: what is damaged, what it costs, and that it is put right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.test_cli_replication import Done, Site
from tests.support.engine import BLOCK, random_blocks


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A machine with a store and a VM of two points."""
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    made = Site(tmp_path, tmp_path / "store")
    made.good("init", made.store)
    made.good("protect", "web", "--disk", made.disk("os.img", random_blocks(1, 20)))
    made.good("replicate", "web")
    _patch(made, 3)
    made.good("replicate", "web")
    return made


def _patch(site: Site, block: int) -> None:
    with (site.folder / "os.img").open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(random_blocks(100 + block, 1))


def _object(site: Site, part: str, point: int) -> Path:
    return next(
        path for path in sorted(site.store.rglob("*")) if f"/{part}/{point:020}" in str(path) and path.is_file()
    )


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _run(site: Site, code: int, *arguments: str) -> Done:
    done = site.run(*arguments)
    assert done.code == code, done.out + done.err
    return done


def test_damage_is_named_and_repaired(site: Site) -> None:
    _flip(_object(site, "segments", 1), 5 * BLOCK)
    quick = site.good("verify", "web")
    assert "point 2: good" in quick.out
    told = _run(site, 12, "verify", "web", "--full")
    assert "point 1: DAMAGED" in told.out
    assert "disk 0 (os): 64 KiB lost, bytes " in told.out
    assert "needed by points 1, 2" in told.out
    assert "points that restore: none" in told.out
    assert "godwit repair web" in told.err
    document = _run(site, 12, "verify", "web", "--full", "--json").document
    (named,) = document["objects"]
    assert named["points"] == [1, 2]
    (disk,) = named["disks"]
    ((start, end),) = disk["ranges_bytes"]
    assert (disk["number"], disk["name"], end - start, disk["damaged_bytes"]) == (0, "os", BLOCK, BLOCK)
    assert document["newest_whole_point"] is None

    before = site.objects()
    planned = _run(site, 12, "repair", "web", "--dry-run")
    assert "a new one would be made, the disks compared with point 2" in planned.out
    assert site.objects() == before
    asked = _run(site, 2, "repair", "web")
    assert "--yes" in asked.err
    assert site.objects() == before
    done = site.good("repair", "web", "--yes")
    assert "point 3, 1 blocks sent" in done.out
    assert "put back: " in done.out
    assert "points that passed: 1-3" in done.out
    assert "points that restore" not in site.good("verify", "web", "--full").out
    site.good("restore", "web", "--to", "back.img")
    assert (site.folder / "back.img").read_bytes() == (site.folder / "os.img").read_bytes()
    assert "nothing to repair" in site.good("repair", "web", "--yes").out


def test_what_stays_lost_is_said_and_the_exit_code_is_12(site: Site) -> None:
    path = _object(site, "segments", 2)
    path.unlink()
    with (site.folder / "os.img").open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write(random_blocks(555, 1))
    done = _run(site, 12, "repair", "web", "--yes")
    assert "points that stay damaged: 2" in done.out
    assert "no longer holds" in done.out
    assert "points that passed: 1, 3" in done.out
    document = _run(site, 12, "repair", "web", "--yes", "--json").document
    assert (document["whole"], document["point"], document["damaged_points"]) == (True, None, [2])
    assert document["unhealed"][0]["key"].endswith(path.name)


def test_a_damaged_manifest_gives_way_and_gc_goes_on(site: Site) -> None:
    path = _object(site, "manifests", 1)
    _flip(path, 100)
    assert _run(site, 12, "gc", "web", "--yes").err
    planned = _run(site, 12, "repair", "web", "--dry-run", "--json").document
    assert (planned["manifests"], planned["resends"]) == ([1], False)
    done = site.good("repair", "web", "--yes", "--json").document
    assert (done["replaced_manifests"], done["point"], done["whole"]) == ([1], None, True)
    site.good("gc", "web", "--yes")
    assert [one["point"] for one in site.good("points", "web", "--json").document["points"]] == [2]


def test_sampled_verification_reports_its_share(site: Site) -> None:
    told = site.good("verify", "web", "--sampled", "1G")
    assert "100.0 % of" in told.out
    assert "day 1 of 1" in told.out
    document = site.good("verify", "web", "--sampled", "50%", "--json").document
    assert document["mode"] == "sampled"
    assert set(document["sample"]) == {
        "day",
        "days",
        "segments",
        "read_bytes",
        "total_segments",
        "total_bytes",
        "percent",
    }
    assert document["sample"]["total_segments"] == 2
    _flip(_object(site, "segments", 1), 1000)
    assert json.loads(_run(site, 12, "verify", "web", "--sampled", "100%", "--json").out)["objects"]


@pytest.mark.parametrize(
    "arguments", [("--sampled", "much"), ("--sampled", "0"), ("--sampled", "120%"), ("--full", "--sampled", "1G")]
)
def test_a_budget_that_makes_no_sense_is_wrong_usage(site: Site, arguments: tuple[str, ...]) -> None:
    _run(site, 2, "verify", "web", *arguments)
