"""The whole circle of a disaster by the commands that an operator types, with a real Generation 2 guest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from replica.host import this_host
from replica.platforms.qemu import QemuPlatform
from tests.support import qemu

pytestmark = [
    pytest.mark.boot,
    pytest.mark.xdist_group("machines"),
    pytest.mark.skipif(sys.platform != "linux", reason="recovery machines run on Linux"),
]

MIB = 1 << 20
BOOT_SECONDS = 300
JOURNAL = "/var/lib/godwit/journal"


def write(text: str, name: str, size: int) -> str:
    """Return the commands that leave a line and a file in the guest, and tell what is in the file."""
    file = f"/var/lib/godwit/{name}"
    return f"head -c {size} /dev/urandom > {file}; echo {text} >> {JOURNAL}; sync; sha256sum < {file}"


@dataclass(slots=True)
class Site:
    """A place with a store to reach and a state folder of its own; ``said`` is what the test prints at its end."""

    folder: Path
    said: list[str] = field(default_factory=list)
    more: dict[str, str] = field(default_factory=dict)  # in the environment of commands

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command as an operator does."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GODWIT_")}
        place = {"GODWIT_STORE": (self.folder / "store").as_uri(), "GODWIT_STATE": str(self.state)}
        begun = time.monotonic()
        done = subprocess.run(
            [str(Path(sys.executable).with_name("godwit")), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**kept, **place, **self.more},
        )
        self.said.append(f"{time.monotonic() - begun:6.1f} s  godwit {' '.join(map(str, arguments))[:100]}")
        return done

    def good(self, *arguments: str | Path) -> Any:
        """Run a command that must succeed, and return what it says with --json."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"godwit {arguments}\n{done.stdout}\n{done.stderr[-3000:]}"
        return json.loads(done.stdout)

    def standing(self, name: str = "web") -> str:
        return str(self.good("status", name)["standing"])

    def in_guest(self, commands: str) -> list[str]:
        """Run commands in the recovery machine's guest, once it is up; return the lines that they print."""
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            done = self.run("guest", "exec", "--timeout", "20s", "web", "--", "/bin/sh", "-c", commands)
            if done.returncode == 0:
                return done.stdout.splitlines()
            assert "does not answer" in done.stderr and time.monotonic() < deadline, done.stderr + self.console()
            self.said.pop()
            time.sleep(0.5)

    def console(self) -> str:
        platform = QemuPlatform(this_host(self.state))
        return "".join(platform.console(name)[-3000:] for name in platform.names())

    def remove_machines(self) -> None:
        platform = QemuPlatform(this_host(self.state))
        for name in platform.names():
            platform.delete(name)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.remove_machines()
        print("\n".join(made.said))


@pytest.mark.parametrize("is_lost", [False, True], ids=["planned", "unplanned-all-lost"])
def test_out_as_generation_1_and_home_as_generation_2(site: Site, guest_raw: Path, *, is_lost: bool) -> None:
    home = site.folder / "source" / "guest.vhdx"
    home.parent.mkdir()
    site.good("disk", "convert", guest_raw, home)
    site.good("init", (site.folder / "store").as_uri())
    site.good("protect", "web", "--disk", home, "--cpus", "1", "--memory", "512M", "--nic", "52:54:00:60:d1:70")
    first = site.good("replicate", "web")
    at_home = boot(site, home, write("written at home", "home", 6 * MIB))
    assert at_home.ready == "GODWIT-READY firmware=uefi journal=1 last=built"

    if is_lost:
        last = site.good("replicate", "web")
        shutil.rmtree(home.parent)
        shutil.rmtree(site.state)
        out = site.good("failover", "web", "--unplanned", "--generation", "1", "--platform", "qemu", "--yes")
        assert out["point"] == last["point"] and out["final_point"] is None
    else:
        out = site.good("failover", "web", "--planned", "--generation", "1", "--platform", "qemu", "--yes")
        assert out["point"] == out["final_point"] == 2
    assert site.standing() == "failed-over"
    elsewhere = site.in_guest(f"[ -d /sys/firmware/efi ] || echo bios; cat {JOURNAL}; sha256sum < /var/lib/godwit/home")
    assert elsewhere == ["bios", "built", "written at home", *at_home.output]
    site.good("commit", "web")
    there = site.in_guest(write("written there", "there", 3 * MIB))
    site.good("reprotect", "web")
    reverse = site.good("replicate", "web")
    assert reverse["disks"][0]["found_by"] == "bitmap", reverse["disks"][0]["because"]
    assert site.standing() == "reprotected"

    back_at = home if not is_lost else site.folder / "new.vhdx"
    back = site.good("failback", "web", "--yes", *(("--to", back_at) if is_lost else ()))
    assert site.standing() == "protected" and not QemuPlatform(this_host(site.state)).names()
    reads = f"cat {JOURNAL}; sha256sum < /var/lib/godwit/home; sha256sum < /var/lib/godwit/there"
    again = boot(site, back_at, reads)
    assert again.ready == "GODWIT-READY firmware=uefi journal=3 last=written there"
    assert list(again.output) == ["built", "written at home", "written there", *at_home.output, *there]

    listed = {point["point"]: point for point in site.good("points", "web")["points"]}
    delta, final = listed[2], listed[max(listed)]
    for what, point in (("first", first), ("written at home", delta), ("written there", reverse), ("last", final)):
        site.said.append(
            f"to the store, {what}: {point['read_bytes'] / MIB:.1f} MiB read, {point['stored_bytes'] / MIB:.1f} stored"
        )
    homecoming = back["homecoming"]
    site.said.append(
        f"home: {homecoming['fetched_bytes'] / MIB:.1f} MiB fetched, {homecoming['written_bytes'] / MIB:.1f} written"
    )
    # What the guest wrote, and what a start and an end of its system write beside that: not what the disk holds.
    assert 3 * MIB <= reverse["stored_bytes"] <= reverse["read_bytes"] < 32 * MIB
    assert final["read_bytes"] < 32 * MIB < first["read_bytes"]
    if not is_lost:
        assert 3 * MIB <= homecoming["written_bytes"] < 64 * MIB


def boot(site: Site, disk: Path, commands: str) -> qemu.Boot:
    """Start the VM at home, under OVMF with variables that nothing has used."""
    done = qemu.boot(disk, commands=commands, timeout_seconds=BOOT_SECONDS)
    assert done.status == 0, done.output
    site.said.append(f"{done.total_seconds:6.1f} s  OVMF to power off; up after {done.ready_seconds:.1f} s")
    return done
