"""godwit plan and drill --plan as an operator types them: with disks as files there and home, with QEMU, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cli import main, session
from tests.support import running_qemu
from tests.support.engine import BLOCK, random_blocks
from tests.support.recovery import boot_sector, wait_until
from tests.support.typed import good, run

needs_qemu = [
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
    pytest.mark.skipif(bool(running_qemu.missing()), reason=f"not installed: {running_qemu.missing()}"),
    pytest.mark.xdist_group("machines"),
]

VMS = ("db", "app", "web")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    good("init", tmp_path / "store")
    return tmp_path


def protect(place: Path, name: str, content: bytes) -> Path:
    disk = place / f"{name}.img"
    disk.write_bytes(content)
    good("protect", name, "--disk", disk, "--memory", "64M", "--cpus", "1")
    good("replicate", name)
    return disk


FILES = """
plan: shop
defaults: {platform: files}
groups:
  - group: data
    consistent_within: 1d
    vms: [db]
  - group: front
    vms:
      - {vm: web, depends_on: [app]}
      - app
    after:
      - host: [sh, -c, 'echo $GODWIT_KIND >> moved']
        runs: [planned, failback]
        repeatable: true
"""


def test_there_and_home_again_with_disks_as_files(place: Path) -> None:
    disks = {name: protect(place, name, random_blocks(number, 4)) for number, name in enumerate(VMS)}
    for disk in disks.values():
        with disk.open("r+b") as file:
            file.seek(BLOCK)
            file.write(random_blocks(9, 1))
    held = {name: disk.read_bytes() for name, disk in disks.items()}
    (place / "shop.yaml").write_text(FILES)
    assert "nothing is wrong" in good("plan", "validate", "shop.yaml").out
    shown = good("plan", "show", "shop.yaml", "--planned").out
    assert shown.index("shut web down") < shown.index("shut db down") < shown.index("start db: point 1")
    assert good("plan", "run", "shop.yaml", "--planned", "--dry-run", "--json").document["problems"] == []
    asked = run("plan", "run", "shop.yaml", "--planned")
    assert asked.code == 2 and "--yes" in asked.err

    done = good("plan", "run", "shop.yaml", "--planned", "--yes", "--json").document
    assert done["over"] and {one["status"] for one in done["steps"]} == {"done"}
    assert [one["point"] for one in done["steps"] if one["id"].endswith("/start")] == [2, 2, 2]
    assert (place / "moved").read_text() == "planned\n"
    over = run("plan", "resume", "shop")
    assert over.code == 2 and "nothing is left to do" in over.err
    status = good("plan", "status", "shop")
    assert "vm/db/start" in status.out and "godwit plan commit shop" in status.err

    assert "committed" in good("plan", "commit", "shop").out
    assert "reprotected" in good("plan", "reprotect", "shop.yaml").out
    wrong = run("plan", "validate", "shop.yaml", "--planned")
    assert wrong.code == 1 and wrong.out.count("reprotected") >= 3
    home = good("plan", "run", "shop.yaml", "--failback", "--yes", "--json").document
    assert home["run"] == 2
    assert [one["id"] for one in home["steps"]] == ["vm/web/home", "vm/app/home", "group/front/after/1", "vm/db/home"]
    for name, disk in disks.items():
        assert disk.read_bytes() == held[name]
    assert {one["standing"] for one in good("status", "--json").document["vms"]} == {"protected"}


def test_what_is_wrong_is_named_with_its_place_and_its_code(place: Path) -> None:
    protect(place, "db", random_blocks(1, 2))
    (place / "bad.yaml").write_text("plan: shop\ngroups:\n  - group: a\n    vms: [{vm: db, timeuot: 3m}]\n")
    wrong = run("plan", "validate", "bad.yaml")
    assert wrong.code == 13 and wrong.out.startswith("bad.yaml:4:20: 'timeuot' is nothing")
    listed = run("plan", "validate", "bad.yaml", "--json")
    assert listed.code == 13 and listed.document["mistakes"][0]["line"] == 4
    for command in (
        ["plan", "show", "bad.yaml"],
        ["plan", "run", "bad.yaml", "--test"],
        ["drill", "--plan", "bad.yaml"],
    ):
        refused = run(*command)
        assert refused.code == 13 and "line 4, column 20" in refused.err
    text = "plan: shop\ngroups:\n  - group: a\n    vms: [{vm: db, point: 7}, ghost]\n"
    (place / "ghost.yaml").write_text(text)
    wrong = run("plan", "validate", "ghost.yaml", "--test", "--json")
    assert wrong.code == 1 and not wrong.document["valid"]
    assert any("ghost" in one for one in wrong.document["problems"])
    refused = run("plan", "run", "ghost.yaml", "--test")
    assert refused.code == 2 and "ghost" in refused.err and "there is no recovery point 7" in refused.err
    for command in (["status", "shop"], ["resume", "shop"], ["cleanup", "shop"], ["status", "No Plan"]):
        assert run("plan", *command).code == 2
    assert run("plan", "run", "ghost.yaml").code == 2
    assert run("drill").code == 2 and run("drill", "db", "--plan", "ghost.yaml").code == 2


def test_an_unplanned_run_stops_at_a_question_and_is_resumed_elsewhere(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect(place, "db", random_blocks(1, 2)).unlink()
    (place / "p.yaml").write_text(
        "plan: p\ndefaults: {platform: files}\nbefore: [{confirm: 'Sure?'}]\ngroups: [{group: g, vms: [db]}]\n"
    )
    stopped = run("plan", "run", "p.yaml", "--unplanned", "--yes")
    assert stopped.code == 1 and "nobody was there to be asked" in stopped.out
    again = run("plan", "run", "p.yaml", "--unplanned", "--yes")
    assert again.code == 2 and "godwit plan resume p" in again.err
    (place / "p.yaml").unlink()
    monkeypatch.setenv("GODWIT_STATE", str(place / "another"))
    good("plan", "resume", "p", "--confirm-all")
    assert good("status", "db", "--json").document["standing"] == "failed-over"
    assert "would be removed: db: " in good("plan", "cleanup", "p", "--dry-run").out
    assert "db: protected; removed" in good("plan", "cleanup", "p", "--yes").out
    assert "nothing to do" in good("plan", "cleanup", "p", "--yes").out


def test_a_passphrase_is_asked_for_once_before_anything_is_begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def type_it(question: str, *, confirm: bool = False) -> str:
        asked.append(threading.current_thread().name)
        return "typed by hand"

    monkeypatch.setattr(session, "ask_passphrase", type_it)
    good("key", "init")
    for name in ("db", "web"):
        (place / f"{name}.img").write_bytes(random_blocks(1, 2))
        good("protect", name, "--disk", place / f"{name}.img", "--encrypt")
        good("replicate", name)
    (place / "p.yaml").write_text("plan: p\ndefaults: {platform: files}\ngroups: [{group: g, vms: [db, web]}]\n")
    asked.clear()
    good("plan", "run", "p.yaml", "--unplanned", "--yes")
    assert asked == ["MainThread"]
    assert "db: protected; removed" in good("plan", "cleanup", "p", "--yes").out


QEMU = """
plan: shop
groups:
  - group: data
    vms:
      - vm: db
        after:
          - wait: {console: UP-db}
            timeout: 2m
  - group: front
    before:
      - host: [sh, -c, 'echo $GODWIT_KIND >> began; while test ! -e go; do sleep 0.05; done']
        name: hold
        runs: [test]
    vms:
      - {vm: web, depends_on: [app]}
      - app
"""


class TestWithQemu:
    """Machines that run."""

    pytestmark = needs_qemu

    def test_a_run_that_was_killed_is_resumed_and_cleaned_up(self, place: Path) -> None:
        for name in VMS:
            protect(place, name, boot_sector(f"UP-{name}").ljust(4 << 20, b"\0"))
        (place / "shop.yaml").write_text(QEMU)
        program = "import sys; from cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "plan", "run", "shop.yaml", "--test"]
        checkout = str(Path(main.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": checkout}
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                wait_until(lambda: (place / "began").exists() or process.poll() is not None, "it was held")
                assert process.poll() is None, (place / "log").read_text()
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
                (place / "go").touch()
        status = good("plan", "status", "shop", "--json").document
        states = {one["id"]: one["status"] for one in status["steps"]}
        assert states == {
            "vm/db/start": "done",
            "vm/db/after/1": "done",
            "group/front/before/1": "under way",
            "vm/app/start": "waiting",
            "vm/web/start": "waiting",
        }
        doubtful = run("plan", "resume", "shop")
        assert doubtful.code == 2 and "--skip group/front/before/1" in doubtful.err
        done = good("plan", "resume", "shop", "--skip", "group/front/before/1", "--json").document
        assert {one["status"] for one in done["steps"]} == {"done", "skipped"}
        assert (place / "began").read_text() == "test\n"
        machines = [one["machine"] for one in done["steps"] if one["machine"]]
        assert len(machines) == 3
        cleaned = good("plan", "cleanup", "shop", "--yes", "--json").document["vms"]
        assert [one["vm"] for one in cleaned] == ["web", "app", "db"]
        assert sorted(one["machines"][0] for one in cleaned) == sorted(machines)

        text = QEMU.replace(
            "plan: shop\n", "plan: shop\ndefaults:\n  checks: [{kind: console, match: UP, timeout: 2m}]\n"
        )
        (place / "shop.yaml").write_text(text)
        told = good("drill", "--plan", "shop.yaml", "--evidence", place / "audit", "--json").document
        assert told["verdict"] == "passed" and [one["vm"] for one in told["vms"]] == ["db", "web", "app"]
        assert 0 < told["groups"][0]["rto_seconds"] < told["rto_seconds"] == told["groups"][1]["rto_seconds"]
        verified = good("evidence", "verify", told["evidence"], "--key", told["fingerprint"])
        assert "web: passed" in verified.out
        assert good("health", "web", "--json").document["last_drill"]["result"] == "passed"
        assert all(good("status", name, "--json").document["other_machines"] == [] for name in VMS)
