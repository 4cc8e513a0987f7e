"""godwit prune, gc, pin and unpin as an administrator types them: results, exit codes, questions, sentences."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replica import lease
from replica.host import Host, SystemClock, this_host
from replica.stores.address import open_store
from tests.integration.test_cli_replication import Site, bare, site  # noqa: F401 - fixtures
from tests.support.engine import BLOCK, FakeClock, random_blocks
from tests.unit.test_plan_sweeping import Runs

POINTS = 10  # enough for the maps to be merged once


@pytest.fixture
def history(site: Site) -> Site:  # noqa: F811
    """A VM of several points, each of wholly different content."""
    disk = site.disk("os.img", random_blocks(1, 4))
    site.good("protect", "web", "--disk", disk)
    for turn in range(POINTS):
        disk.write_bytes(random_blocks(100 + turn, 4))
        site.good("replicate", "web")
    return site


def _points(site: Site) -> list[int]:  # noqa: F811
    return [one["point"] for one in site.good("points", "web", "--json").document["points"]]


def _data(site: Site) -> dict[str, bytes]:  # noqa: F811
    return {key: data for key, data in site.objects().items() if "/segments/" in key or "/maps/" in key}


def _let_an_hour_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SystemClock.now
    monkeypatch.setattr(SystemClock, "now", lambda self: now(self) + timedelta(hours=1))


def test_runs_of_plans_that_ended_long_ago_are_deleted(history: Site) -> None:
    runs = Runs(open_store(str(history.store)), FakeClock(datetime(2020, 1, 1, tzinfo=UTC)))
    assert [runs.run("shop"), runs.run("shop")] == [1, 2]
    history.good("gc", "web", "--dry-run")
    assert runs.left("shop") == ([1, 2], [1, 2])
    history.good("gc", "web", "--yes")
    assert runs.left("shop") == ([2], [2])


def test_old_points_are_removed_and_their_room_freed(history: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _data(history)
    assert "removed 0 recovery points, 10 kept" in history.good("prune", "web", "--yes").out
    history.good("protect", "web", "--update", "--keep", "last:2")
    assert history.good("status", "web", "--json").document["retention"] == "last:2"
    done = history.good("prune", "web", "--yes")
    assert "removed 8 recovery points, 2 kept (last:2)" in done.out
    assert "godwit gc web" in done.err
    assert _points(history) == [9, 10]
    first = history.good("gc", "web", "--yes", "--json").document
    assert (first["deleted_objects"], first["condemned_objects"]) == (0, first["waiting_objects"])
    assert _data(history) == before
    _let_an_hour_pass(monkeypatch)
    done = history.good("gc", "--all", "--yes")
    after = _data(history)
    freed = sum(map(len, before.values())) - sum(map(len, after.values()))
    assert f"deleted {first['waiting_objects']} objects" in done.out
    assert freed == first["waiting_bytes"] > 7 * BLOCK
    assert "point 9: good" in history.good("verify", "web", "--full").out
    history.good("restore", "web", "--to", history.folder / "back.img")
    assert (history.folder / "back.img").read_bytes() == random_blocks(100 + POINTS - 1, 4)


def test_segments_that_are_hardly_needed_are_rewritten_and_freed(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = random.Random(1)
    disk = site.disk("os.img", drawn.randbytes(320 * BLOCK))
    site.good("protect", "web", "--disk", disk, "--keep", "last:1")
    site.good("replicate", "web")
    with disk.open("r+b") as file:
        file.write(drawn.randbytes(310 * BLOCK))
    site.good("replicate", "web")
    held = disk.read_bytes()
    planned = site.good("gc", "web", "--dry-run")
    assert "of 2 thin segments that take 20 MiB" in planned.out
    assert site.good("gc", "web", "--yes", "--thin", "0", "--json").document["thin_segments"] == 0
    assert _points(site) == [1, 2]
    done = site.good("gc", "web", "--yes", "--json").document
    assert (done["rewritten_point"], done["thin_segments"]) == (3, 2)
    assert 10 * BLOCK <= done["rewritten_bytes"] < 11 * BLOCK
    assert (done["rewriting_busy"], done["rewriting_damaged"]) == (None, [])
    assert "nothing" not in site.good("gc", "web", "--yes").out
    assert _points(site) == [1, 2, 3]
    site.good("prune", "web", "--yes")
    site.good("gc", "web", "--yes")
    _let_an_hour_pass(monkeypatch)
    before = sum(map(len, _data(site).values()))
    reclaimed = site.good("gc", "web", "--yes", "--json").document["reclaimed_bytes"]
    assert reclaimed == before - sum(map(len, _data(site).values()))
    assert reclaimed > done["thin_bytes"] > 320 * BLOCK
    assert "good" in site.good("verify", "web", "--full").out
    site.good("restore", "web", "--to", site.folder / "back.img")
    assert (site.folder / "back.img").read_bytes() == held


def test_a_dry_run_lists_and_changes_nothing(history: Site) -> None:
    before = history.objects()
    done = history.good("prune", "web", "--keep", "last:8", "--dry-run")
    assert "would remove 2 recovery points, 8 kept" in done.out
    assert done.out.count("  point ") == 2
    document = history.good("prune", "web", "--keep", "last:8", "--dry-run", "--json").document
    assert [one["point"] for one in document["removed"]] == [1, 2]
    assert document["dry_run"] is True
    assert "would delete 0 objects" in history.good("gc", "web", "--dry-run").out
    assert history.objects() == before


def test_2_without_a_terminal_it_asks_for_yes(history: Site) -> None:
    before = history.objects()
    for command in (["prune", "web", "--keep", "last:1"], ["gc", "web"]):
        done = history.run(*command)
        assert done.code == 2
        assert "--yes" in done.err
    assert history.objects() == before


def test_pinned_points_stay_until_they_are_unpinned(history: Site) -> None:
    assert "no recovery point of web is pinned" in history.good("pin", "web").err
    history.good("pin", "web", "3", "--reason", "before the upgrade")
    assert "before the upgrade" in history.good("pin", "web").out
    assert history.good("pin", "web", "--json").document["pins"][0]["point"] == 3
    assert "1 pinned" in history.good("prune", "web", "--keep", "last:1", "--yes").out
    assert _points(history) == [3, 10]
    history.good("unpin", "web", "3")
    history.good("prune", "web", "--keep", "last:1", "--yes")
    assert _points(history) == [10]
    for command in (["pin", "web", "3"], ["unpin", "web", "3"]):
        assert history.run(*command).code == 2


def test_2_a_rule_that_is_none_is_explained(history: Site) -> None:
    for command in (["prune", "web", "--keep", "daily:x"], ["protect", "web", "--update", "--keep", "daily:x"]):
        done = history.run(*command)
        assert done.code == 2
        assert "'daily:x'" in done.err
        assert "all:2h,hourly:24" in done.err


def test_2_gc_wants_one_vm_or_all(history: Site) -> None:
    assert history.run("gc", "--yes").code == 2
    assert history.run("gc", "web", "--all", "--yes").code == 2
    assert history.run("gc", "nobody", "--yes").code == 2


def test_11_another_agent_is_at_work(history: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    history.good("prune", "web", "--keep", "last:1", "--yes")
    history.good("gc", "web", "--yes")
    _let_an_hour_pass(monkeypatch)
    store, here = open_store(str(history.store)), this_host(history.folder / "state")
    elsewhere = Host(here.clock, here.randomness, "f" * 32, "elsewhere", None)
    with lease.holding(store, history.found("web").keys, elsewhere):
        before = history.objects()
        done = history.run("gc", "web", "--yes", "--json")
        assert done.code == 11
        assert "elsewhere" in done.document["busy"]
        assert history.run("gc", "--all", "--yes").code == 3
        assert history.run("prune", "web", "--keep", "last:1", "--yes").code == 0  # nothing to remove
        assert history.objects() == before
    assert "deleted 0" not in history.good("gc", "web", "--yes").out


def test_11_pruning_beside_another_agent_removes_nothing(history: Site) -> None:
    store, here = open_store(str(history.store)), this_host(history.folder / "state")
    elsewhere = Host(here.clock, here.randomness, "f" * 32, "elsewhere", None)
    with lease.holding(store, history.found("web").keys, elsewhere):
        assert history.run("prune", "web", "--keep", "last:1", "--yes").code == 11
    assert len(_points(history)) == POINTS


def test_12_damage_stops_gc_with_a_sentence(history: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    history.good("prune", "web", "--keep", "last:3", "--yes")
    history.good("gc", "web", "--yes")
    _let_an_hour_pass(monkeypatch)
    damaged = history.store / history.found("web").keys.manifest(9)
    damaged.chmod(0o600)
    damaged.write_bytes(damaged.read_bytes().replace(b"crash", b"crasH").replace(b"offline", b"offlinE"))
    before = history.objects()
    for command in (["gc", "web"], ["gc", "--all"]):
        done = history.run(*command, "--yes")
        assert done.code == 12
        assert "nothing was deleted" in done.err
        assert str(Path(history.found("web").keys.manifest(9)).name) in done.err
    assert history.objects() == before
    assert history.run("prune", "web", "--keep", "last:1", "--dry-run").code == 12
