"""What may go wrong around a failover, by the commands themselves: a store that vanishes, a full disk, two operators.

Each is told in a sentence, and nothing is lost.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from replica.host import this_host
from replica.monitor import Monitor
from replica.platforms import servant
from replica.platforms.platform import Power
from replica.platforms.qemu import QemuPlatform
from replica.platforms.qemu.files import QemuFiles
from tests.support import running_qemu
from tests.support.engine import random_blocks
from tests.support.line import Line
from tests.support.recovery import wait_until
from tests.support.servers import S3Server
from vhdx.formats import open_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux")

MIB = 1 << 20
needs_qemu = pytest.mark.skipif(bool(running_qemu.missing()), reason=f"not installed: {running_qemu.missing()}")


@dataclass(frozen=True, slots=True)
class Done:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody who types commands on a host of their own."""

    folder: Path
    store: str
    state: str = "state"

    def start(self, *arguments: str | Path, limits: Sequence[str] = ()) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GODWIT_")}
        given = {"GODWIT_STORE": self.store, "GODWIT_STATE": str(self.folder / self.state), "HOME": str(self.folder)}

        return subprocess.Popen(
            [*limits, str(Path(sys.executable).with_name("godwit")), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, **given},
            cwd=self.folder,
        )

    def run(self, *arguments: str | Path, limits: Sequence[str] = ()) -> Done:
        return finished(self.start(*arguments, limits=limits))

    def good(self, *arguments: str | Path) -> Done:
        done = self.run(*arguments)
        assert done.code == 0, done.out + done.err
        return done

    @property
    def platform(self) -> QemuPlatform:
        return QemuPlatform(this_host(self.folder / self.state))


def finished(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate()
    assert "Traceback" not in err and "unexpected" not in err, err
    return Done(process.returncode, out, err)


def a_sentence(done: Done, *words: str) -> None:
    """Check that it says what is wrong, and what can be done, in a few lines."""
    assert done.code not in (0, 130), done
    for word in words:
        assert word in done.err, done.err
    assert len(done.err.splitlines()) <= 6, done.err


# --- a store that vanishes


def guest_that(does: Literal["reads", "writes"]) -> bytes:
    """Return a boot sector that reads or writes a sector of the next MiB at each key. It says W at first, R for each.

    It would say E where the disk gave an error, which no guest is to see: the machine stops before.
    """
    function = "42" if does == "reads" else "43"
    code = bytes.fromhex(
        "31c0 8ed8 8ed0 bc007c"  # segments are zero, the stack below
        "b057 e82100"  # W
        "31c0 cd16"  # wait for a key
        f"be377c b280 b4{function} cd13"  # do with the first disk what the packet says
        "b052 7302 b045 e80b00"  # R, or E where that failed
        "6681063f7c00080000 ebdf"  # 2,048 sectors further; again
        "baf803 ee b00a ee c3"  # say a letter and the end of the line on the serial port
        "1000 0100 0080 0000 0008000000000000"  # the packet: a sector, of 8000h, from sector 2,048
    )
    assert len(code) == 71
    return code.ljust(446, b"\0") + bytes(64) + b"\x55\xaa"


class Guest:
    """The guest of a test machine, as its operator sees it."""

    def __init__(self, platform: QemuPlatform, name: str) -> None:
        self.platform, self.name = platform, name

    def said(self) -> str:
        return "".join(line for line in self.platform.console(self.name).split() if line in ("W", "R", "E"))

    def press(self) -> None:
        with Monitor(str(QemuFiles(self.platform.folder(self.name)).monitor)) as monitor:
            monitor.execute("send-key", keys=[{"type": "qcode", "data": "spc"}])


@pytest.fixture
def line(seaweedfs: S3Server) -> Iterator[Line]:
    made = Line(seaweedfs.endpoint)
    yield made
    made.cut()


@pytest.mark.server
@pytest.mark.xdist_group("seaweedfs")
@needs_qemu
def test_a_store_that_vanishes_in_the_middle_of_a_test_failover(
    tmp_path: Path, seaweedfs: S3Server, line: Line
) -> None:
    address = f"s3://{seaweedfs.bucket}/vanishing/{secrets.token_hex(6)}?endpoint={line.endpoint}"
    operator = Operator(tmp_path, address)
    content = guest_that("reads") + random_blocks(7, 160)[512:]
    (tmp_path / "web.img").write_bytes(content.ljust(64 * MIB, b"\1"))
    operator.good("init", address)
    operator.good("protect", "web", "--disk", tmp_path / "web.img", "--memory", "64M")
    operator.good("replicate", "web")
    machine = operator.good("failover", "web", "--test", "--json").document["machine"]["name"]
    guest = Guest(operator.platform, machine)
    try:
        wait_until(lambda: guest.said() == "W", "the guest waits for a key")
        guest.press()
        wait_until(lambda: guest.said() == "WR", "the guest has read from the store")

        line.cut()
        guest.press()
        # Commands that need the store say so; those of this host's machine alone go on.
        asked = [operator.start("status", "web"), operator.start("cleanup", "web", "--all", "--yes")]
        wait_until(lambda: guest.platform.power(machine) is Power.PAUSED, "the machine was stopped by its disk")
        assert guest.said() == "WR", "the guest saw an error"
        for process in asked:
            done = finished(process)
            a_sentence(done, "hint", line.endpoint.removeprefix("http://"))
            assert done.code in (1, 10)
        assert guest.platform.names() == [machine], "a cleanup that could not be written down removed a machine"
        told = (guest.platform.folder(machine).path / servant.LOG).read_text()
        assert "connect" in told.lower(), told

        line.restore()
        status = operator.good("status", "web", "--json").document
        assert [one["name"] for one in status["other_machines"]] == [machine]
        assert status["standing"] == "protected"
        guest.platform.start(machine)  # it goes on where it stopped
        wait_until(lambda: guest.said() == "WRR", "what could not be read was read")
        operator.good("replicate", "web")
        operator.good("verify", "web", "--full")
        assert operator.good("cleanup", "web", "--all", "--yes", "--json").document["removed"] == [machine]
    finally:
        guest.platform.delete(machine)
    operator.good("restore", "web", "--to", tmp_path / "back.img")
    assert (tmp_path / "back.img").read_bytes() == (tmp_path / "web.img").read_bytes()


# --- a disk without room


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A small file system for the state of a host; only an administrator can make one."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs an administrator on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def protected(tmp_path: Path, disk: bytes) -> tuple[Operator, Path]:
    operator = Operator(tmp_path, (tmp_path / "store").as_uri())
    (tmp_path / "web.img").write_bytes(disk)
    operator.good("init", operator.store)
    operator.good("protect", "web", "--disk", tmp_path / "web.img", "--memory", "64M")
    operator.good("replicate", "web")
    return operator, tmp_path / "web.img"


def make_room(scratch: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", scratch], check=True)


def test_a_recovery_that_finds_no_room_says_so_and_goes_on_with_room(tmp_path: Path, scratch: Path) -> None:
    operator, disk = protected(tmp_path, random_blocks(3, 512))  # 32 MiB, and 24 are there
    elsewhere = replace(operator, state="scratch/state")
    order = ("failover", "web", "--unplanned", "--platform", "files", "--yes")
    a_sentence(elsewhere.run(*order), "No space left on device", str(scratch))
    status = elsewhere.good("status", "web", "--json").document
    assert status["standing"] == "failing-over"
    assert "godwit failover web" in elsewhere.good("status", "web").out
    a_sentence(elsewhere.run(*order), "No space left on device")  # it does not get any better by itself
    make_room(scratch, "96m")
    done = elsewhere.good(*order, "--json").document
    assert done["resumed"] and done["standing"] == "failed-over"
    path = Path(done["machine"]["disks"][0]["address"])
    with open_disk(path) as opened:
        assert opened.read_at(0, opened.size) == disk.read_bytes()
    elsewhere.good("cleanup", "web", "--yes")
    assert operator.good("replicate", "web", "--json").document["changed_blocks"] == 0


def test_files_that_may_not_grow_are_told_the_same_way(tmp_path: Path) -> None:
    """As where a quota ends, or a file system that holds no larger files; needs no administrator."""
    operator, _ = protected(tmp_path, random_blocks(3, 128))
    limits = ("prlimit", f"--fsize={4 * MIB}")
    order = ("failover", "web", "--unplanned", "--platform", "files", "--yes")
    a_sentence(operator.run(*order, limits=limits), "File too large", str(tmp_path / "state"))
    assert operator.good("status", "web", "--json").document["standing"] == "failing-over"
    assert operator.good(*order, "--json").document["standing"] == "failed-over"


@pytest.mark.xdist_group("machines")
@needs_qemu
def test_a_guest_that_writes_to_a_full_disk_stands_still_until_there_is_room(tmp_path: Path, scratch: Path) -> None:
    content = guest_that("writes") + random_blocks(7, 160)[512:]
    operator, _ = protected(tmp_path, content)
    elsewhere = replace(operator, state="scratch/state")
    machine = elsewhere.good("failover", "web", "--test", "--json").document["machine"]["name"]
    guest = Guest(elsewhere.platform, machine)
    try:
        wait_until(lambda: guest.said() == "W", "the guest waits for a key")
        with (scratch / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        guest.press()
        wait_until(lambda: guest.platform.power(machine) is Power.PAUSED, "the machine was stopped by its disk")
        assert guest.said() == "W"
        assert machine in elsewhere.good("status", "web").out
        elsewhere.good("replicate", "web")  # the source does not mind
        (scratch / "ballast").unlink()
        guest.platform.start(machine)
        wait_until(lambda: guest.said() == "WR", "what could not be written was written")
        elsewhere.good("cleanup", "web", "--all", "--yes")
    finally:
        guest.platform.delete(machine)
    assert elsewhere.good("status", "web", "--json").document["other_machines"] == []


# --- two operators


def test_two_operators_who_fail_over_at_once_make_one_machine(tmp_path: Path) -> None:
    operator, disk = protected(tmp_path, random_blocks(3, 128))
    others = [replace(operator, state=name) for name in ("night", "day")]
    order = ("failover", "web", "--unplanned", "--platform", "files", "--yes", "--json")
    dones = [finished(process) for process in [one.start(*order) for one in others]]
    assert 0 in [one.code for one in dones], dones
    for done in dones:
        if done.code != 0:
            assert done.code in (2, 11), done
            told = done.document["error"]
            assert told["message"] and told["hint"], told
    status = operator.good("status", "web", "--json").document
    assert status["standing"] == "failed-over" and status["other_machines"] == []
    (address,) = (one["address"] for one in status["recovery_machine"]["disks"])
    with open_disk(Path(address)) as opened:
        assert opened.read_at(0, opened.size) == disk.read_bytes()
    machines = [one for other in others for one in (tmp_path / other.state / "machines").glob("*/*")]
    assert len(machines) == 1, machines
