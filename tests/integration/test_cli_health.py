from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.output import Output
from replica.health.rules import RULES
from tests.support.engine import random_blocks


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GODWIT_STORE", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    assert godwit("init", f"file://{tmp_path / 'store'}")[0] == 0
    return tmp_path


def godwit(*arguments: str, terminal: bool = False) -> tuple[int, str, str]:
    stdout, stderr = Terminal() if terminal else io.StringIO(), io.StringIO()
    code = run(arguments, Output(stdout=stdout, stderr=stderr))
    return code, stdout.getvalue(), stderr.getvalue()


def protect(folder: Path, name: str, *, replicate: bool = True) -> None:
    disk = folder / f"{len(list(folder.glob('*.raw')))}.raw"
    disk.write_bytes(random_blocks(len(name), 4))
    assert godwit("protect", name, "--disk", str(disk))[0] == 0
    if replicate:
        assert godwit("replicate", name)[0] == 0


def damage(folder: Path, point: int) -> None:
    [manifest] = folder.glob(f"store/tenants/default/vms/*/manifests/{point:020}.json")
    manifest.write_bytes(b"{broken")


def documents(text: str) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(text)["vms"]}


def test_a_fleet_that_is_well_exits_with_0(environment: Path) -> None:
    protect(environment, "web")
    protect(environment, "db")
    code, out, err = godwit("health")
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["db", "normal"], ["web", "normal"]]


def test_3_where_a_vm_is_not_well_and_each_reason_is_told(environment: Path) -> None:
    protect(environment, "web")
    assert godwit("replicate", "web")[0] == 0
    protect(environment, "new", replicate=False)
    damage(environment, 2)
    code, out, _ = godwit("health")
    assert code == 3
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["web", "new"], "the gravest comes first"
    assert RULES["newest-damaged"].remedy in out and "damaged: 2; point 1 of" in out
    assert RULES["no-point"].remedy in out


def test_json_tells_every_reason_in_full(environment: Path) -> None:
    protect(environment, "web")
    assert godwit("replicate", "web")[0] == 0
    damage(environment, 2)
    code, out, _ = godwit("health", "--json")
    web = documents(out)["web"]
    assert (code, web["health"], web["newest_restorable_point"], web["damaged_points"]) == (3, "critical", 1, [2])
    [reason] = web["reasons"]
    assert reason["rule_id"] == "newest-damaged"
    assert (reason["threshold"], reason["observed"], reason["unit"]) == (0, 1, "count")
    assert {doubt["rule_id"] for doubt in web["doubts"]} >= {"drill-never", "verify-never"}
    code, out, _ = godwit("health", "web", "--json")
    assert (code, json.loads(out)["name"]) == (3, "web")


def test_one_vm_is_told_in_full(environment: Path) -> None:
    protect(environment, "web")
    code, out, _ = godwit("health", "web")
    assert code == 0
    assert re.search(r"^readiness: +unproven$", out, re.MULTILINE)
    assert "what stands against readiness:" in out and "drill-never" in out
    assert "free space:" in out
    assert re.search(r"^clock: +unknown: the store tells no time$", out, re.MULTILINE)


@pytest.mark.parametrize(
    "skew, told",
    [(-300.0, "5 min behind the store's"), (45.0, "45 s ahead of the store's"), (-1.2, "that of the store")],
)
def test_how_far_the_clock_is_from_the_store_s_is_told(
    environment: Path, monkeypatch: pytest.MonkeyPatch, skew: float, told: str
) -> None:
    protect(environment, "web", replicate=False)
    monkeypatch.setattr("replica.health.observing.skew_of", lambda _: skew)
    assert f" {told}\n" in godwit("health", "web")[1]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_s_table_keeps_within_its_width(
    environment: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    protect(environment, "a machine with a rather long name, as they are given in some places")
    protect(environment, "web")
    _, out, _ = godwit("health", terminal=True)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(len(line) for line in shown.splitlines()) <= columns
    assert "readiness" in shown and shown.count("normal") == 2 and shown.count("unproven") == 2


def test_the_page_and_the_metrics_are_written_whole(environment: Path) -> None:
    protect(environment, "<script>alert(1)</script>")
    page, metrics = environment / "r.html", environment / "m.prom"
    page.write_text("what was there before")
    code, _, err = godwit("health", "--html", str(page), "--metrics", str(metrics))
    assert code == 0 and f"written: {page}" in err
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert 'godwit_vm_health{vm="<script>alert(1)</script>"} 0.0' in metrics.read_text(encoding="utf-8")
    assert not list(environment.glob(".*.tmp"))


def test_1_where_the_page_cannot_be_written(environment: Path) -> None:
    protect(environment, "web")
    code, _, err = godwit("health", "--html", str(environment / "none" / "r.html"))
    assert code == 1 and "cannot be written" in err


def test_2_for_a_name_that_no_vm_has_and_a_window_that_is_none() -> None:
    code, _, err = godwit("health", "web")
    assert code == 2 and "no VM named 'web'" in err
    code, _, err = godwit("health", "--window", "30m")
    assert code == 2 and "1 hour to 7 days" in err


def test_10_where_there_is_no_store(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GODWIT_STORE", f"file://{environment / 'elsewhere'}")
    assert godwit("health")[0] == 10


def test_an_empty_store_says_what_comes_next() -> None:
    code, out, err = godwit("health")
    assert (code, out) == (0, "") and "godwit protect" in err
