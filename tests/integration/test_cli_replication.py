"""The commands of replication as an administrator types them: results, exit codes, sentences, and nothing lost."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli import main
from cli.output import Output
from replica import catalog, lease
from replica.catalog import ProtectedVm
from replica.host import this_host
from replica.stores.address import open_store
from tests.support.engine import BLOCK, make_host, random_blocks

ROOT = Path(__file__).parents[2]


@dataclass(slots=True)
class Done:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@dataclass(slots=True)
class Site:
    """A folder with a store, and a machine's state beside it."""

    folder: Path
    store: Path

    def run(self, *arguments: str | Path) -> Done:
        output = Output(stdout=io.StringIO(), stderr=io.StringIO())
        code = main.run([str(argument) for argument in arguments], output)
        assert isinstance(output.stdout, io.StringIO)
        assert isinstance(output.stderr, io.StringIO)
        done = Done(code, output.stdout.getvalue(), output.stderr.getvalue())
        for text in (done.out, done.err):
            assert "Traceback" not in text
            assert "unexpected" not in text, text
            assert not set(text) & {chr(code) for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0))}
        assert bool(done.code) <= bool(done.err) or done.code in (3, 12)
        return done

    def good(self, *arguments: str | Path) -> Done:
        done = self.run(*arguments)
        assert done.code == 0, done.err
        return done

    def disk(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def objects(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.store)): path.read_bytes()
            for path in self.store.rglob("*")
            if path.is_file() and ".godwit" not in path.parts
        }

    def found(self, name: str) -> ProtectedVm:
        return catalog.find(open_store(str(self.store)), "default", name)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A machine without a store."""
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, tmp_path / "store")


@pytest.fixture
def site(bare: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A machine with a store."""
    bare.good("init", bare.store)
    monkeypatch.setenv("GODWIT_STORE", str(bare.store))
    return bare


# --- the way it is meant


def test_a_vm_goes_the_whole_way(bare: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    system, data = bare.disk("os.img", random_blocks(1, 20) + bytes(512)), bare.disk("data.img", bytes(BLOCK * 40))
    bare.good("init", f"file://{bare.store}")
    monkeypatch.setenv("GODWIT_STORE", f"file://{bare.store}")
    done = bare.good("protect", "web 1", "--disk", system, "--disk", data, "--every", "10m", "--memory", "4G")
    assert "web 1 is protected" in done.out
    first = system.read_bytes(), data.read_bytes()
    assert "point 1" in bare.good("replicate", "web 1").out
    with data.open("r+b") as file:
        file.seek(BLOCK * 3)
        file.write(b"changed")
    assert "1 blocks changed" in bare.good("replicate", "web 1").out
    assert bare.good("points", "web 1").out.count("offline") == 2
    assert "web 1" in bare.good("status").out
    assert "point 2: good" in bare.good("verify", "web 1", "--full").out
    bare.good("restore", "web 1", "--to", bare.folder / "new", "--format", "raw")
    assert (bare.folder / "new" / "os.img").read_bytes() == system.read_bytes()
    assert (bare.folder / "new" / "data.img").read_bytes() == data.read_bytes()
    bare.good("restore", "web 1", "--point", "1", "--disk", "data", "--to", bare.folder / "old.img")
    assert (bare.folder / "old.img").read_bytes() == first[1]
    assert system.read_bytes() == first[0]


def test_every_command_answers_with_one_json_document(bare: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = bare.disk("os.img", random_blocks(1, 3))
    monkeypatch.setenv("GODWIT_STORE", str(bare.store))
    commands: list[list[str | Path]] = [
        ["init", bare.store],
        ["protect", "web", "--disk", disk],
        ["status"],
        ["replicate", "web"],
        ["replicate", "--all"],
        ["points", "web"],
        ["status"],
        ["status", "web"],
        ["restore", "web", "--to", bare.folder / "out.vhdx"],
        ["verify", "web"],
        ["verify", "web", "--full", "--point", "2"],
        ["protect", "web", "--update", "--cpus", "3"],
    ]
    for command in commands:
        document = bare.good(*command, "--json", "--quiet").document
        check_values(document)
    assert document["machine"]["cpus"] == 3
    for wrong in (["points", "nobody"], ["restore", "web"], ["replicate"], ["points", "web", "--no-such"]):
        done = bare.run(*wrong, "--json")
        assert (done.code, done.document["error"]["exit_code"]) == (2, 2)


def check_values(value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            check_values(inner, key)
    elif isinstance(value, list):
        for inner in value:
            check_values(inner, name)
    elif name.endswith("_at") or name == "protected_since":
        assert value is None or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value), (name, value)
    elif name.endswith("_bytes") or name in ("point", "segments", "maps", "objects"):
        assert value is None or type(value) is int, (name, value)


# --- every exit code


def test_2_what_is_not_there_or_contradicts_itself(site: Site) -> None:
    disk = site.disk("os.img", bytes(BLOCK))
    site.good("protect", "web", "--disk", disk)
    before = site.objects()
    for command in (
        ["replicate", "nobody"],
        ["points", "nobody"],
        ["restore", "web", "--to", "x.vhdx"],
        ["restore", "web", "--to", "x.vhdx", "--point", "1"],
        ["restore", "web", "--to", "x.vhdx", "--point", "9" * 30],
        ["restore", "web", "--to", "x.xyz", "--format", "vmdk"],
        ["replicate"],
        ["replicate", "web", "--all"],
        ["protect", "web", "--disk", str(disk)],
        ["protect", "two"],
        ["protect", "two", "--disk", str(disk), "--disk", str(disk)],
        ["protect", "two", "--disk", str(disk), "--nic", "nonsense"],
        ["protect", "two", "--disk", str(disk), "--every", "1s"],
        ["protect", "two", "--disk", str(disk), "--every", "soon"],
        ["protect", "two", "--disk", str(disk), "--generation", "1", "--secure-boot"],
        ["verify", "web", "--point", "0"],
        ["status", "--tenant", "A B"],
        ["nonsense"],
    ):
        assert site.run(*command).code == 2, command
    assert site.objects() == before


def test_10_no_store(bare: Site) -> None:
    disk = bare.disk("os.img", bytes(BLOCK))
    empty = bare.folder / "empty"
    empty.mkdir()
    for command in (["status"], ["replicate", "web"], ["protect", "web", "--disk", str(disk)], ["init"]):
        assert bare.run(*command).code == 10
        if command != ["init"]:
            for address in (empty, bare.folder / "missing"):
                done = bare.run(*command, "--store", address)
                assert done.code == 10
                assert "godwit init" in done.err
    assert list(empty.iterdir()) == []
    assert not (bare.folder / "missing").exists()


def test_11_another_agent_holds_the_lease(site: Site) -> None:
    disk = site.disk("os.img", random_blocks(1, 3))
    site.good("protect", "web", "--disk", disk)
    store = open_store(str(site.store))
    with lease.holding(store, site.found("web").keys, make_host(name="elsewhere")):
        pass
    clock = make_host(name="elsewhere")
    clock.clock.jump((this_host(site.folder / "state").clock.now() - clock.clock.now()).total_seconds())  # type: ignore[attr-defined]
    held = lease.acquire(store, site.found("web").keys, clock, sole_on_host=False)
    before = site.objects()
    for command in (["replicate", "web"], ["protect", "web", "--update", "--cpus", "2"]):
        done = site.run(*command)
        assert done.code == 11
        assert "elsewhere is at work" in done.err
    assert site.objects() == before
    held.release(leftovers=False)
    site.good("replicate", "web")


def test_11_another_process_of_this_machine_is_at_work(site: Site) -> None:
    site.good("protect", "web", "--disk", site.disk("os.img", random_blocks(1, 3)))
    host = this_host(site.folder / "state")
    with host.exclusive(site.found("web").vm.vm_id):
        done = site.run("replicate", "web")
        assert done.code == 11
        assert "on this machine" in done.err


def test_12_a_damaged_store(site: Site) -> None:
    disk = site.disk("os.img", random_blocks(1, 3))
    site.good("protect", "web", "--disk", disk)
    site.good("replicate", "web")
    with disk.open("r+b") as file:
        file.write(b"changed")
    site.good("replicate", "web")
    (segment,) = (site.store / site.found("web").keys.segments / f"{2:020}").iterdir()
    data = bytearray(segment.read_bytes())
    data[70] ^= 1
    segment.write_bytes(bytes(data))
    done = site.run("verify", "web", "--full")
    assert done.code == 12
    assert "point 1: good" in done.out
    assert "point 2: DAMAGED" in done.out
    assert str(segment.relative_to(site.store)) in done.out
    assert site.run("verify", "web", "--full", "--json").document["points"][1]["restores"] is False
    done = site.run("restore", "web", "--to", "out.img")
    assert done.code == 12
    assert str(segment.relative_to(site.store)) in done.err
    assert not (site.folder / "out.img").exists()
    site.good("restore", "web", "--point", "1", "--to", "out.img")
    manifest = site.store / site.found("web").keys.manifest(1)
    manifest.write_bytes(b"{}")
    done = site.run("points", "web")
    assert done.code == 12
    assert " 2 " in done.out
    assert f"{1:020}" in done.err


def test_13_a_wrong_configuration(site: Site) -> None:
    path = site.disk("wrong.toml", b'threads = 0\ntenant = "A"\nstroe = "x"\n')
    done = site.run("status", "--config", path)
    assert done.code == 13
    assert all(word in done.err for word in ("threads", "tenant", "stroe", "wrong.toml"))
    assert site.run("status", "--config", "missing.toml").code == 13
    assert site.run("status", "--store", "ftp://host/x").code == 13
    path.write_text(f'store = "{site.store}"\n')
    site.good("status", "--config", path)


def test_1_and_3_a_disk_that_is_missing_harms_no_other_vm(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.good("protect", name, "--disk", site.disk(f"{name}.img", random_blocks(ord(name), 3)))
    (site.folder / "b.img").unlink()
    done = site.run("replicate", "b")
    assert done.code == 1
    assert "b.img" in done.err
    done = site.run("replicate", "--all", "--json")
    assert done.code == 3
    cycles = done.document["cycles"]
    assert [cycle["vm"] for cycle in cycles] == ["a", "b", "c"]
    assert "b.img" in cycles[1]["error"]["message"]
    assert [cycle.get("point") for cycle in cycles] == [1, None, 1]
    assert site.run("status", "b").code == 0


def test_1_a_disk_that_changes_while_it_is_read_publishes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from replica import packer  # noqa: PLC0415

    disk = site.disk("os.img", random_blocks(1, 3))
    site.good("protect", "web", "--disk", disk)
    add = packer.Packer.add

    def touching(self: packer.Packer, *arguments: Any) -> None:
        os.utime(disk, ns=(1, 1))
        add(self, *arguments)

    monkeypatch.setattr(packer.Packer, "add", touching)
    done = site.run("replicate", "web")
    assert done.code == 1
    assert "changed while it was being read" in done.err
    assert "checkpoint" in done.err
    assert site.good("points", "web").out == ""
    monkeypatch.undo()


# --- interruption


def _processes_environment(site: Site) -> dict[str, str]:
    return {
        **os.environ,
        "GODWIT_STATE": str(site.folder / "state"),
        "GODWIT_STORE": str(site.store),
        "HOME": str(site.folder),
    }


def _start(site: Site, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from cli.main import main; main()", *arguments],
        cwd=ROOT,
        env=_processes_environment(site),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_130_a_first_replication_that_is_interrupted_is_taken_up_by_the_next(
    site: Site, number: signal.Signals, code: int
) -> None:
    disk = site.folder / "big.img"
    drawn = random.Random(1)
    with disk.open("wb") as file:
        for at in range(0, 192 << 20, 8 << 20):  # half of it data that does not shrink, half of it holes
            file.seek(at)
            file.write(drawn.randbytes(4 << 20))
        file.truncate(200 << 20)
    site.good("protect", "big", "--disk", disk)
    segments = site.store / site.found("big").keys.segments
    process = _start(site, "replicate", "big")
    deadline = time.monotonic() + 60
    while (
        process.poll() is None and not any(p.is_file() for p in segments.rglob("*-*")) and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the replication was over before it could be interrupted")
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    assert any(segments.rglob("*-*"))
    assert site.good("points", "big").out == ""
    done = site.good("replicate", "big", "--json").document
    assert done["reused_blocks"] > 0
    assert done["stored_bytes"] < 96 << 20
    site.good("restore", "big", "--to", "back.img")
    assert (site.folder / "back.img").read_bytes() == disk.read_bytes()
    assert site.good("verify", "big", "--full", "--quiet").code == 0


# --- hostile names


@pytest.mark.parametrize(
    "name, taken",
    [
        ("web\nnext", False),
        ("\x1b]0;owned\x07", False),
        ("", False),
        (" ", False),
        ("x" * 5000, False),
        ("bad\udcff", False),
        ("../..", True),
        ("/etc/passwd", True),
        ("日本 größe 😀", True),
        ("\u202egpj.exe", True),
        ("\x9b31mred", True),
        ("--json", True),
        ("%2e%2e", True),
    ],
)
def test_any_vm_name_is_refused_or_harmless(site: Site, name: str, taken: bool) -> None:
    disk = site.disk("os.img", random_blocks(1, 2))
    before = {path for path in site.folder.rglob("*") if site.store not in path.parents}
    done = site.run("protect", "--disk", disk, "--", name)
    assert done.code == (0 if taken else 2)
    if taken:
        site.good("replicate", "--", name)
        for command in (["status"], ["points"], ["verify"], ["status", "--json"]):
            site.good(*command, *([] if command[0] == "status" else ["--", name]))
        assert site.good("status", "--json").document["vms"][0]["name"] == name
        site.good("restore", "--to", "out.img", "--", name)
        (site.folder / "out.img").unlink()
    else:
        assert site.good("status", "--json").document["vms"] == []
    after = {path for path in site.folder.rglob("*") if site.store not in path.parents and "state" not in path.parts}
    assert after <= before | {site.store, site.folder / "state"}


@pytest.mark.parametrize("stem", ["two words", "..x", "new\nline", "\x1b[31m", "日" * 70, "a;b|c", "\u202ex", "-rf"])
def test_any_disk_name_restores_into_the_folder(site: Site, stem: str) -> None:
    disk = site.disk(f"{stem}.img", random_blocks(1, 2))
    site.good("protect", "web", "--disk", disk)
    site.good("replicate", "web")
    site.good("status", "web")
    site.good("restore", "web", "--to", f"{site.folder / 'to'}/", "--format", "raw")
    (restored,) = (site.folder / "to").iterdir()
    assert restored.read_bytes() == disk.read_bytes()
    assert restored.name.isprintable()


# --- files and room


def test_a_restore_never_replaces_a_file_unasked(site: Site) -> None:
    disk = site.disk("os.img", random_blocks(1, 2))
    site.good("protect", "web", "--disk", disk)
    site.good("replicate", "web")
    target = site.disk("precious.img", b"precious")
    done = site.run("restore", "web", "--to", target)
    assert done.code == 1
    assert "exists" in done.err
    assert target.read_bytes() == b"precious"
    site.good("restore", "web", "--to", target, "--overwrite")
    assert target.read_bytes() == disk.read_bytes()


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses to let this process write any file past 1 MiB, as a file system that is full would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_store_that_takes_no_more_loses_nothing(site: Site, request: pytest.FixtureRequest) -> None:
    disk = site.disk("os.img", random_blocks(1, 4))
    site.good("protect", "web", "--disk", disk)
    site.good("replicate", "web")
    disk.write_bytes(random.Random(1).randbytes(4 << 20))
    before = {key for key in site.objects() if "lease" not in key}
    request.getfixturevalue("small_files")
    done = site.run("replicate", "web")
    assert done.code == 1
    assert "godwit: " in done.err
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {key for key in site.objects() if "lease" not in key} >= before
    site.good("verify", "web", "--full")
    site.good("replicate", "web")
    site.good("restore", "web", "--to", "out.img")
    assert (site.folder / "out.img").read_bytes() == disk.read_bytes()


def test_a_target_that_takes_no_more_leaves_nothing(site: Site, request: pytest.FixtureRequest) -> None:
    site.good("protect", "web", "--disk", site.disk("os.img", random.Random(1).randbytes(4 << 20)))
    site.good("replicate", "web")
    kept = site.disk("kept.vhdx", b"precious")
    request.getfixturevalue("small_files")
    for target in ("a.img", "b.vhdx", "c.vhd", "kept.vhdx"):
        done = site.run(
            "restore", "web", "--to", site.folder / "to" / target if target != "kept.vhdx" else kept, "--overwrite"
        )
        assert done.code == 1
        assert "limit" in done.err or "large" in done.err, done.err
    assert list((site.folder / "to").iterdir()) == []
    assert kept.read_bytes() == b"precious"


def test_a_full_file_system_is_a_sentence(site: Site) -> None:
    disk = site.disk("os.img", random.Random(1).randbytes(4 << 20))
    site.good("protect", "web", "--disk", disk)
    site.good("replicate", "web")
    mount = site.folder / "tiny"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = site.run("restore", "web", "--to", mount / "out.img")
        assert done.code in (1, 2)
        assert "free" in done.err
        assert list(mount.iterdir()) == []
        site.good("init", mount / "store")
        store = ("--store", mount / "store")
        site.good("protect", "other", "--disk", disk, *store)
        done = site.run("replicate", "other", *store)
        assert done.code == 1
        assert "space" in done.err.lower() or "room" in done.err.lower()
        assert site.good("points", "other", *store).out == ""
        subprocess.run(["mount", "-o", "remount,size=32m", str(mount)], check=True)
        site.good("replicate", "other", *store)
        site.good("verify", "other", "--full", *store)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


# --- what is imported


@pytest.mark.parametrize(
    "arguments, absent",
    [
        (["--version"], {"numpy", "boto3"}),
        (["status"], {"boto3", "botocore"}),
        (["replicate", "web"], {"boto3", "botocore"}),
    ],
)
def test_what_a_command_does_not_need_is_not_imported(site: Site, arguments: list[str], absent: set[str]) -> None:
    site.good("protect", "web", "--disk", site.disk("os.img", random_blocks(1, 2)))
    script = (
        "import sys\nfrom cli.main import run\n"
        f"code = run({arguments!r})\nprint(code, sorted({absent!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=_processes_environment(site),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "0 []"
