"""The commands of failover as an operator types them, with disks as files: results, exit codes, sentences."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli import session
from tests.support.engine import BLOCK, random_blocks
from tests.support.typed import good, run


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk of the VM "web", with one point, written to since."""
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GODWIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "web.img"
    path.write_bytes(random_blocks(1, 8))
    good("init", tmp_path / "store")
    good("protect", "web", "--disk", path)
    good("replicate", "web")
    with path.open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write(random_blocks(2, 1))
    return path


def content(path: str) -> bytes:
    from vhdx.formats import open_disk  # noqa: PLC0415

    with open_disk(Path(path)) as opened:
        return opened.read_at(0, opened.size)


def test_the_whole_circle_with_disks_as_files(disk: Path) -> None:
    assert good("status", "web", "--json").document["standing"] == "protected"
    planned = good("failover", "web", "--planned", "--platform", "files", "--yes", "--dry-run", "--json").document
    assert (planned["point"], planned["generation"], planned["converted_disk"]) == (1, 1, None)

    done = good("failover", "web", "--planned", "--platform", "files", "--yes", "--json").document
    assert (done["standing"], done["point"], done["final_point"]) == ("failed-over", 2, 2)
    recovered = done["machine"]["disks"][0]["address"]
    assert content(recovered) == disk.read_bytes()
    refused = run("replicate", "web")
    assert refused.code == 2
    assert "web is failed-over" in refused.err and "godwit commit web" in refused.err
    again = good("failover", "web", "--json").document
    assert again["resumed"] and again["machine"]["name"] == done["machine"]["name"]

    assert good("commit", "web", "--json").document["standing"] == "committed"
    refused = run("cleanup", "web", "--yes")
    assert refused.code == 2 and "godwit reprotect web" in refused.err
    reprotected = good("reprotect", "web", "--json").document
    assert reprotected["standing"] == "reprotected"
    good("disk", "check", recovered)
    status = good("status", "web")
    assert "reprotected" in status.out and "godwit failback web" in status.out
    assert recovered in status.out

    home = good("failback", "web", "--yes", "--json").document
    assert home["standing"] == "protected"
    assert home["homecoming"]["point"] == home["point"] == 3
    assert not Path(recovered).exists()
    assert good("replicate", "web", "--json").document["changed_blocks"] == 0


def test_an_unplanned_failover_without_the_source_and_without_any_local_state(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = disk.read_bytes()
    disk.unlink()
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "another state"))
    done = good("failover", "web", "--unplanned", "--platform", "files", "--yes")
    assert "web lies ready from point 1 on files" in done.out
    machine = good("status", "web", "--json").document["recovery_machine"]
    found = content(machine["disks"][0]["address"])
    assert found[: 3 * BLOCK] == lost[: 3 * BLOCK] and found[3 * BLOCK : 4 * BLOCK] != lost[3 * BLOCK : 4 * BLOCK]
    assert "machine that counts" not in done.err
    back = good("cleanup", "web", "--yes")
    assert "web is protected" in back.out
    assert not Path(machine["disks"][0]["address"]).exists()


def test_a_passphrase_that_was_typed_reaches_the_server_of_the_disks(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def type_it(question: str, *, confirm: bool = False) -> str:
        asked.append(question)
        return "typed by hand"

    monkeypatch.setattr(session, "ask_passphrase", type_it)
    good("key", "init")
    (tmp_path / "secret.img").write_bytes(disk.read_bytes())
    good("protect", "secret", "--disk", tmp_path / "secret.img", "--encrypt")
    good("replicate", "secret")
    asked.clear()
    test = good("failover", "secret", "--test", "--platform", "files", "--json").document["machine"]
    assert content(test["disks"][0]["address"]) == disk.read_bytes()
    assert len(asked) == 1
    for kept in (tmp_path / "state").rglob("*"):
        assert not kept.is_file() or b"typed by hand" not in kept.read_bytes()
    assert "GODWIT_PASSPHRASE" not in os.environ


def test_a_test_beside_the_source(disk: Path) -> None:
    test = good("failover", "web", "--test", "--platform", "files", "--json").document["machine"]["name"]
    good("replicate", "web")
    listed = good("status", "--json").document["vms"][0]
    assert [one["name"] for one in listed["other_machines"]] == [test]
    assert "1 more machine" in good("status").out
    assert test in good("status", "web").out
    refused = run("cleanup", "web", "--yes")
    assert refused.code == 2 and "--all" in refused.err
    assert good("cleanup", "web", "--test", test, "--dry-run", "--json").document["doomed"][0]["name"] == test
    assert good("cleanup", "web", "--test", test, "--yes", "--json").document["removed"] == [test]
    assert good("status", "web", "--json").document["other_machines"] == []


def test_what_comes_in_the_wrong_order_is_told_what_would_be_right(disk: Path) -> None:
    for command in ("commit", "reprotect", "failback"):
        done = run(command, "web", "--json")
        assert done.code == 2
        assert done.document["error"]["type"] == "StandingError"
        assert "godwit failover web --planned" in done.document["error"]["hint"]
    done = run("failover", "web", "--yes")
    assert done.code == 2 and "--unplanned" in done.err
    done = run("failover", "web", "--unplanned")
    assert done.code == 2 and "--yes" in done.err
    done = run("failover", "web", "--unplanned", "--platform", "abacus", "--yes")
    assert done.code == 2 and "cannot be started on 'abacus'" in done.err
    assert "--platform qemu or " in done.err
    assert good("status", "web", "--json").document["standing"] == "protected"


def test_adopting_by_the_command_line(disk: Path, tmp_path: Path) -> None:
    done = run("adopt", "web")
    assert done.code == 2
    data = bytearray(disk.read_bytes())
    data[440:444], data[510:512] = b"abcd", b"\x55\xaa"
    disk.write_bytes(data)
    good("replicate", "web")
    moved = disk.rename(tmp_path / "moved.img")
    assert "would be" in good("adopt", "web", "--disk", moved, "--dry-run").out
    adopted = good("adopt", "web", "--disk", moved, "--bios-uuid", "x", "--json").document
    assert adopted["disks"][0]["because"] == "its partition table has the same id"
    assert good("replicate", "web", "--json").document["changed_blocks"] == 0
