"""godwit drill as an operator types it, with a real QEMU and a boot sector as its guest: results, files, exit codes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from replica.platforms.folder import MachineFolders
from tests.support import running_qemu
from tests.support.recovery import SAID, Recovery
from tests.support.typed import run

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
    pytest.mark.skipif(bool(running_qemu.missing()), reason=f"not installed: {running_qemu.missing()}"),
    pytest.mark.xdist_group("machines"),
]

VM = "web 1"


@pytest.fixture
def recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recovery:
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", f"file://{tmp_path / 'store'}")
    monkeypatch.chdir(tmp_path)
    return Recovery(tmp_path)


def test_a_drill_and_its_evidence(recovery: Recovery, tmp_path: Path) -> None:
    wanted = {"check": [{"kind": "console", "match": f"^{SAID}$", "timeout": "2m"}, {"kind": "screenshot"}]}
    (tmp_path / "checks.json").write_text(json.dumps(wanted))
    done = run("drill", VM, "--checks", tmp_path / "checks.json", "--evidence", tmp_path / "audit", "--json")
    assert done.code == 0, done.out + done.err
    told = done.document
    assert told["verdict"] == "passed" and told["reasons"] == []
    assert [one["passed"] for one in told["checks"]] == [True] * 3
    assert 0 < told["rto_seconds"] < 120
    assert MachineFolders(recovery.host, "qemu").names() == []

    document, page, picture = (Path(told[name]) for name in ("evidence", "page", "picture"))
    assert document.parent == tmp_path / "audit"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page.read_text()
    assert run("evidence", "verify", document, "--key", told["fingerprint"]).code == 0
    assert run("evidence", "verify", page, "--json").document["verified"] is True
    wrong = run("evidence", "verify", document, "--key", "0" * 64)
    assert wrong.code == 12 and "not by the one that was expected" in wrong.err
    document.write_bytes(document.read_bytes().replace(b"passed", b"failed"))
    altered = run("evidence", "verify", document)
    assert altered.code == 12 and "altered" in altered.err

    health = run("health", VM, "--json").document
    assert health["last_drill"]["result"] == "passed"
    assert health["last_drill"]["seconds"] == told["rto_seconds"]
    assert told["fingerprint"] in health["last_drill"]["detail"]


def test_a_drill_that_fails_says_why_and_exits_with_1(recovery: Recovery, tmp_path: Path) -> None:
    (tmp_path / "godwit.toml").write_text(
        f'[drill]\nevidence = "{tmp_path / "audit"}"\n'
        f'[[drill.check]]\nkind = "console"\nmatch = "{SAID}"\ntimeout = "2m"\n'
        '[[drill.check]]\nname = "never said"\nkind = "console"\nmatch = "login:"\ntimeout = "1s"\n'
    )
    done = run("drill", VM)
    assert done.code == 1
    assert "never said: no such line came within" in done.out
    assert "FAILED" in done.out
    (document,) = (tmp_path / "audit").glob("*.json")
    shown = run("evidence", "verify", document)
    assert shown.code == 0 and "failed" in shown.out and "compare it" in shown.err
    assert run("health", VM, "--json").document["last_drill"]["result"] == "failed"
    assert run("status", VM, "--json").document["other_machines"] == []
    assert MachineFolders(recovery.host, "qemu").names() == []


def test_what_cannot_be_drilled_is_refused(recovery: Recovery, tmp_path: Path) -> None:
    assert run("drill", "another").code == 2
    assert run("drill", VM, "--platform", "files").code == 2
    (tmp_path / "checks.toml").write_text("[[check]]\nkind = 'magic'\n")
    wrong = run("drill", VM, "--checks", "checks.toml")
    assert wrong.code == 13 and "drill.check 1: kind" in wrong.err
    assert run("evidence", "verify", tmp_path / "checks.toml").code == 2
    (tmp_path / "none.json").write_text("{}")
    assert run("evidence", "verify", tmp_path / "none.json").code == 12
