"""``godwit failback`` as an operator runs it, killed at any moment: the home disk is the old one or the new one."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from replica import catalog, lease
from replica.host import SystemClock
from replica.stores.address import open_store
from tests.support.engine import make_host
from tests.support.home_lab import patch_disk, read_disk, write_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="recovery machines are made on Linux")

KILLS = int(os.environ.get("GODWIT_FAILBACK_KILLS", "5"))  # `make check` is to be quick; more of them by hand
SIZE = 16 << 20


@dataclass(frozen=True, slots=True)
class Circle:
    """A VM of one disk that was failed over to files, changed there, and is replicated from there."""

    folder: Path
    old: bytes
    new: bytes

    @property
    def home(self) -> Path:
        return self.folder / "home.vhdx"

    def start(self, *arguments: str | Path, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GODWIT_")}
        place = {"GODWIT_STORE": (self.folder / "store").as_uri(), "GODWIT_STATE": str(self.folder / "state")}
        command = [str(Path(sys.executable).with_name("godwit")), *map(str, arguments)]
        return subprocess.Popen(command, stdout=stderr, stderr=stderr, text=True, env={**kept, **place})

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate()
        assert "Traceback" not in err
        return process.returncode, out, err

    def good(self, *arguments: str | Path) -> Any:
        code, out, err = self.run(*arguments, "--json")
        assert code == 0, (arguments, out, err)
        return json.loads(out)


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Circle:
    drawn = random.Random(60)
    folder, old = tmp_path_factory.mktemp("circle") / "now", drawn.randbytes(SIZE)
    folder.mkdir()
    new = bytearray(old)
    made = Circle(folder, old, b"")
    write_disk(made.home, old, "vhdx")
    made.good("init", (folder / "store").as_uri())
    made.good("protect", "web", "--disk", made.home)
    made.good("replicate", "web")
    made.good("failover", "web", "--planned", "--platform", "files", "--yes")
    made.good("commit", "web")
    made.good("reprotect", "web")
    (disk,) = made.good("status", "web")["recovery_machine"]["disks"]
    for _ in range(20):
        offset, data = drawn.randrange(SIZE - 300_000), drawn.randbytes(drawn.randrange(1, 300_000))
        new[offset : offset + len(data)] = data
        patch_disk(Path(disk["address"]), offset, data)
    made.good("replicate", "web")
    shutil.copytree(folder, folder.with_name("before"))
    return Circle(folder, old, bytes(new))


def begin_again(circle: Circle) -> None:
    """Put everything back to where the recovery machine counts; copy2 keeps the times that tell a touched disk."""
    shutil.rmtree(circle.folder)
    shutil.copytree(circle.folder.with_name("before"), circle.folder)


def test_killed_at_any_moment_it_leaves_the_old_disk_or_the_new_and_goes_on(circle: Circle) -> None:
    begin_again(circle)
    begun = time.monotonic()
    circle.good("failback", "web", "--yes")
    usual_seconds = time.monotonic() - begun
    chance = random.Random(61)
    for number in range(KILLS):
        begin_again(circle)
        process = circle.start("failback", "web", "--yes", stderr=subprocess.DEVNULL)
        time.sleep(usual_seconds * chance.uniform(0.4, 1.1))
        process.kill()  # by SIGKILL
        process.wait()
        found = read_disk(circle.home)
        assert found in (circle.old, circle.new), number
        code, _, err = circle.run("failback", "web", "--yes")
        assert code == 0 or (found == circle.new and "web is protected" in err), (number, err)
        assert read_disk(circle.home) == circle.new, number
        status = circle.good("status", "web")
        assert status["standing"] == "protected" and not status["other_machines"], number
        assert {one.name for one in circle.folder.iterdir()} == {"home.vhdx", "store", "state"}
    assert circle.good("replicate", "web")["changed_blocks"] == 0


def test_two_operators_at_once(circle: Circle) -> None:
    """One does it; the other is told who is at work, or that it is done."""
    begin_again(circle)
    both = [circle.start("failback", "web", "--yes") for _ in range(2)]
    said = [one.communicate() for one in both]
    codes = [one.returncode for one in both]
    assert 0 in codes, said
    for code, (_, err) in zip(codes, said, strict=True):
        assert code in (0, 2, 11)
        if code == 2:
            assert "web is protected" in err
        if code == 11:  # by the lease, or before that by a lock of this host
            assert "at work on this VM" in err or "working on the VM" in err
    assert read_disk(circle.home) == circle.new
    assert circle.good("status", "web")["standing"] == "protected"


def test_an_operator_who_is_at_work_is_named(circle: Circle, tmp_path: Path) -> None:
    begin_again(circle)
    circle.good("failback", "web", "--yes")
    circle.good("failover", "web", "--unplanned", "--platform", "files", "--yes")
    store = open_store((circle.folder / "store").as_uri())
    other = make_host(tmp_path / "state", name="night-shift", clock=cast(Any, SystemClock()))
    with lease.holding(store, catalog.find(store, "default", "web").keys, other):
        for command in ("commit", "cleanup"):
            code, _, err = circle.run(command, "web", *(("--yes",) if command == "cleanup" else ()))
            assert code == 11
            assert "night-shift is at work on this VM" in err and "hint" in err
    assert circle.good("commit", "web")["standing"] == "committed"


def test_where_the_recovery_machine_is_lost_the_way_home_is_named(circle: Circle) -> None:
    begin_again(circle)
    (disk,) = circle.good("status", "web")["recovery_machine"]["disks"]
    Path(disk["address"]).unlink()
    code, _, err = circle.run("failback", "web", "--yes")
    assert code == 1
    assert disk["address"] in err and "godwit failback web --lost" in err
    assert circle.good("status", "web")["standing"] == "reprotected"
    circle.good("failback", "web", "--lost", "--yes")
    assert read_disk(circle.home) == circle.new


def test_where_there_is_no_home_any_more_the_recovery_machine_is_left_alone(circle: Circle, tmp_path: Path) -> None:
    begin_again(circle)
    circle.home.unlink()
    code, _, err = circle.run("failback", "web", "--yes")
    assert code == 2
    assert f"{circle.home}: the home disk is not there" in err and "--to" in err
    assert circle.run("failback", "web", "--yes", "--to", tmp_path / "nowhere" / "new.vhdx")[0] == 2
    assert circle.good("status", "web")["standing"] == "reprotected"
    circle.good("failback", "web", "--yes", "--to", tmp_path / "new.vhdx")
    assert read_disk(tmp_path / "new.vhdx") == circle.new
    assert circle.good("replicate", "web")["changed_blocks"] == 0
