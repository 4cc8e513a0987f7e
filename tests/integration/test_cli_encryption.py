"""Encryption as an administrator uses it: one flag, the key from anywhere, and one sentence when it is not the one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_cli_replication import Site, bare, site
from tests.support.encryption import CHEAP_SCRYPT
from tests.support.engine import BLOCK, random_blocks

__all__ = ["bare", "site"]  # fixtures

PHRASE = "correct horse battery"
DATA = random_blocks(5, 12)


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    with CHEAP_SCRYPT:
        yield


@pytest.fixture
def locked(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A store with an encrypted VM of one point; the key is given."""
    monkeypatch.setenv("GODWIT_PASSPHRASE", PHRASE)
    site.good("key", "init")
    site.good("protect", "web", "--disk", site.disk("web.img", DATA), "--encrypt")
    site.good("replicate", "web")
    return site


def test_an_encrypted_vm_goes_the_whole_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = site.disk("web.img", DATA)
    monkeypatch.setenv("GODWIT_PASSPHRASE", PHRASE)
    made = site.good("key", "init", "--passphrase", "--json").document
    assert (made["tenant"], made["number"], made["opened_by"]) == ("default", 1, "passphrase")
    assert site.good("protect", "web", "--disk", disk, "--encrypt", "--json").document["encrypted"] is True
    site.good("protect", "plain", "--disk", site.disk("plain.img", random_blocks(6, 2)))
    site.good("replicate", "--all")
    disk.write_bytes(DATA[:BLOCK] + random_blocks(9, 11))
    site.good("replicate", "web")

    assert site.good("status", "web", "--json").document["encrypted"] is True
    assert site.good("status", "plain", "--json").document["encrypted"] is False
    assert "encrypted:    yes" in site.good("status", "web").out
    assert len(site.good("points", "web", "--json").document["points"]) == 2
    assert site.good("verify", "web", "--full", "--json").document["damaged"] is False
    for point, content in ((1, DATA), (2, disk.read_bytes())):
        site.good("restore", "web", "--point", str(point), "--to", site.folder / f"{point}.img")
        assert (site.folder / f"{point}.img").read_bytes() == content

    check = site.good("key", "check", "--json").document
    assert (check["encrypted"], check["not_encrypted"], check["damaged"]) == (["web"], ["plain"], [])
    assert check["fingerprint"] == made["fingerprint"]
    assert "encrypted VMs: web" in site.good("key", "check").out
    shown = site.good("key", "show", "--json").document["keys"]
    assert [(key["number"], key["fingerprint"]) for key in shown] == [(1, made["fingerprint"])]
    assert PHRASE not in "".join(site.good("key", command).out for command in ("show", "check"))

    held = b"".join(site.objects().values())
    assert DATA[:32] not in held
    assert b"web.img" not in held
    assert b"plain.img" in held


@pytest.mark.parametrize(
    "command",
    [
        ["replicate", "web"],
        ["points", "web"],
        ["status", "web"],
        ["restore", "web", "--to", "out.img"],
        ["verify", "web"],
        ["verify", "web", "--full"],
        ["protect", "web", "--update", "--every", "1h"],
        ["protect", "new", "--disk", "web.img", "--encrypt"],
        ["key", "check"],
        ["key", "export", "--to", "kit.txt"],
        ["key", "rotate", "--key-file", "new.key"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("given", ["nothing", "another passphrase", "another key file", "a kit of another tenant"])
def test_13_without_the_right_key_one_sentence_and_nothing_written(
    locked: Site, monkeypatch: pytest.MonkeyPatch, command: list[str], given: str
) -> None:
    monkeypatch.delenv("GODWIT_PASSPHRASE")
    if given == "another passphrase":
        monkeypatch.setenv("GODWIT_PASSPHRASE", PHRASE + "!")
    elif given == "another key file":
        (locked.folder / "other.key").write_text("ab" * 32)
        monkeypatch.setenv("GODWIT_KEY_FILE", str(locked.folder / "other.key"))
    elif given == "a kit of another tenant":
        locked.good("key", "init", "--tenant", "other", "--key-file", locked.folder / "other.key")
        monkeypatch.setenv("GODWIT_KEY_FILE", str(locked.folder / "other.key"))
        locked.good("key", "export", "--tenant", "other", "--to", locked.folder / "other.kit")
        monkeypatch.setenv("GODWIT_KEY_FILE", str(locked.folder / "other.kit"))
    before = locked.objects()
    done = locked.run(*command)
    assert done.code == 13, done
    lines = done.err.splitlines()
    assert len([line for line in lines if line.startswith("godwit: ")]) == 1
    assert (
        "key was given" in lines[0] if given == "nothing" else "does not open" in lines[0] or "not that of" in lines[0]
    )
    assert done.out == ""
    assert locked.objects() == before
    assert not (locked.folder / "out.img").exists()
    assert not (locked.folder / "kit.txt").exists()


def test_3_vms_that_are_not_encrypted_go_on_without_the_key(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    locked.good("protect", "plain", "--disk", locked.disk("plain.img", random_blocks(6, 2)))
    monkeypatch.delenv("GODWIT_PASSPHRASE")
    done = locked.run("replicate", "--all")
    assert done.code == 3
    assert "plain: point 1" in done.out
    assert "web: the data of tenant 'default' is encrypted, and no key was given" in done.err
    status = locked.run("status")
    assert status.code == 3
    assert "no key was given" in status.out
    assert locked.good("status", "plain").code == 0


def test_13_encryption_before_there_is_a_key_is_refused_with_the_way(site: Site) -> None:
    before = site.objects()
    done = site.run("protect", "web", "--disk", site.disk("web.img", DATA), "--encrypt")
    assert done.code == 13
    assert "has no encryption key" in done.err
    assert "hint: 'godwit key init' makes one" in done.err
    assert site.objects() == before


def test_the_key_comes_from_a_file_a_command_or_the_configuration(
    locked: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = locked.folder / "godwit.key"
    rotated = locked.good("key", "rotate", "--key-file", key_file, "--json").document
    assert (rotated["number"], rotated["opened_by"]) == (2, "key")
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert locked.run("points", "web").code == 13  # the passphrase has had its day
    monkeypatch.delenv("GODWIT_PASSPHRASE")
    assert locked.run("points", "web").code == 13
    configuration = locked.folder / "godwit.toml"
    configuration.write_text(f'key_file = "{key_file}"\n')
    locked.good("points", "web")
    script = f"print(open({str(key_file)!r}).read())"
    configuration.write_text(f"key_command = ['{sys.executable}', '-c', \"{script}\"]\n")
    locked.good("points", "web")
    configuration.write_text("")
    monkeypatch.setenv("GODWIT_KEY_FILE", str(key_file))
    locked.good("points", "web")


def test_a_rotation_between_passphrases(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locked.run("key", "rotate").code == 2
    assert "GODWIT_NEW_PASSPHRASE" in locked.run("key", "rotate", "--passphrase").err
    monkeypatch.setenv("GODWIT_NEW_PASSPHRASE", "a quite new one")
    locked.good("key", "rotate", "--passphrase")
    assert locked.run("verify", "web").code == 13
    monkeypatch.setenv("GODWIT_PASSPHRASE", "a quite new one")
    locked.good("verify", "web", "--full")
    locked.good("replicate", "web")


def test_the_recovery_kit_brings_everything_back(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = locked.folder / "kit.txt"
    done = locked.good("key", "export", "--to", kit)
    line = next(line for line in kit.read_text().splitlines() if line.startswith("godwit-recovery-key"))
    assert line.split(":")[1] not in done.out + done.err
    assert locked.run("key", "export", "--to", kit).code == 13  # never overwritten
    monkeypatch.delenv("GODWIT_PASSPHRASE")
    monkeypatch.setenv("GODWIT_KEY_FILE", str(kit))
    for path in (locked.store / "tenants/default/keys").iterdir():
        path.unlink()
    locked.good("restore", "web", "--to", locked.folder / "out.img")
    assert (locked.folder / "out.img").read_bytes() == DATA
    locked.good("key", "rotate", "--key-file", locked.folder / "new.key")
    monkeypatch.setenv("GODWIT_KEY_FILE", str(locked.folder / "new.key"))
    locked.good("verify", "web", "--full")


def test_12_a_damaged_object_of_an_encrypted_vm_is_named(locked: Site) -> None:
    segment = next((locked.store / "tenants/default/vms").rglob("segments/*/*"))
    data = bytearray(segment.read_bytes())
    data[1000] ^= 1
    segment.chmod(0o644)
    segment.write_bytes(data)
    done = locked.run("verify", "web", "--full")
    assert done.code == 12
    assert "/segments/" in done.out
    assert "does not open with the VM's key" in done.out


def test_required_encryption_refuses_what_is_in_clear(locked: Site) -> None:
    locked.good("protect", "plain", "--disk", locked.disk("plain.img", random_blocks(6, 2)))
    (locked.folder / "godwit.toml").write_text("require_encryption = true\n")
    before = locked.objects()
    for command in (["replicate", "plain"], ["protect", "more", "--disk", str(locked.folder / "plain.img")]):
        done = locked.run(*command)
        assert done.code == 13
        assert "the configuration requires it" in done.err
    assert locked.objects() == before
    locked.good("replicate", "web")


@pytest.mark.parametrize(
    "arguments",
    [
        ["key", "init"],
        ["key", "init", "--passphrase"],
        ["key", "init", "--passphrase", "--key-file", "k"],
        ["key", "init", "--key-file", "k", "--key-command", "c"],
    ],
    ids=" ".join,
)
def test_2_keys_are_made_on_clear_words_only(site: Site, arguments: list[str]) -> None:
    before = site.objects()
    assert site.run(*arguments).code == 2
    assert site.objects() == before
    assert not (site.folder / "k").exists()


def test_2_a_second_key_and_a_late_wish_for_encryption_are_refused(locked: Site) -> None:
    assert "has a key already" in locked.run("key", "init").err
    done = locked.run("protect", "web", "--update", "--encrypt")
    assert (done.code, "settled when it is protected" in done.err) == (2, True)


def test_the_script_that_restores_without_godwit_says_that_it_cannot(locked: Site) -> None:
    script = Path(__file__).parents[2] / "docs" / "restore_point.py"
    for further in ([], ["web", "1", "0", locked.folder / "out.img"]):
        done = subprocess.run(
            [sys.executable, script, locked.store, *further], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "encrypted" in done.stderr or "not a Godwit record" in done.stderr


def test_key_show_needs_no_key(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GODWIT_PASSPHRASE")
    assert "a passphrase" in locked.good("key", "show").out
    assert "no key" in locked.good("key", "show", "--tenant", "other").err
    assert locked.run("key", "show", "--store", locked.folder / "nowhere").code == 10


def test_what_is_not_encrypted_never_loads_the_library() -> None:
    script = (
        "import sys, tempfile, pathlib\n"
        "from cli import main\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "(folder / 'd.img').write_bytes(bytes(range(256)) * 256)\n"
        "url = str(folder / 'store')\n"
        "import os; os.environ['GODWIT_STATE'] = str(folder / 'state')\n"
        "codes = [main.run([*words, '--store', url]) for words in (['init'], ['protect', 'a', '--disk', str(folder / "
        "'d.img')], ['replicate', 'a'], ['verify', 'a', '--full'])]\n"
        "assert codes == [0] * 4, codes\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'cryptography']\n"
        "import shutil; shutil.rmtree(folder)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
