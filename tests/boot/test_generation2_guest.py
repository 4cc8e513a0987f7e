"""A real Generation 2 guest, on disks that Godwit wrote: it boots, and comes back from the store with its work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import qemu

# Machines take a core each for half a minute: one worker runs these tests one after the other.
pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("machines")]

MIB = 1 << 20
GUEST_WRITES = (
    f"head -c {20 * MIB} /dev/urandom > /var/lib/godwit/data && sha256sum < /var/lib/godwit/data"
    " && echo written by the guest >> /var/lib/godwit/journal"
)
GUEST_READS = "sha256sum < /var/lib/godwit/data"


@dataclass(frozen=True, slots=True)
class Godwit:
    """The command line, with a store to work on."""

    store: str

    def __call__(self, *arguments: str | Path) -> Any:
        """Run a command with --json and return what it says."""
        program = Path(sys.executable).with_name("godwit")
        command = [str(program), *map(str, arguments), "--json"]
        if arguments[0] not in {"disk", "init"}:
            command += ["--store", self.store]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
        return json.loads(done.stdout)


@pytest.fixture
def godwit(tmp_path: Path) -> Godwit:
    return Godwit((tmp_path / "store").as_uri())


@pytest.fixture
def guest(tmp_path: Path, guest_raw: Path, godwit: Godwit) -> Path:
    """The guest as a dynamic VHDX of its own."""
    target = tmp_path / "guest.vhdx"
    godwit("disk", "convert", guest_raw, target)
    return target


def test_boots_from_the_vhdx_that_convert_wrote_and_writes_to_it(guest: Path) -> None:
    first = qemu.boot(guest, commands=GUEST_WRITES)
    assert first.ready == "GODWIT-READY firmware=uefi journal=1 last=built"
    assert first.status == 0

    second = qemu.boot(guest, commands=GUEST_READS)
    assert second.ready == "GODWIT-READY firmware=uefi journal=2 last=written by the guest"
    assert second.output == first.output


def test_comes_back_from_the_store_as_it_was_at_each_point(
    tmp_path: Path, guest_raw: Path, guest: Path, godwit: Godwit
) -> None:
    godwit("init", godwit.store)
    godwit("protect", "vm1", "--disk", guest)
    godwit("replicate", "vm1")
    written = qemu.boot(guest, commands=GUEST_WRITES)
    godwit("replicate", "vm1")
    numbers = [point["point"] for point in godwit("points", "vm1")["points"]]
    assert len(numbers) == 2

    before, after = tmp_path / "before.vhdx", tmp_path / "after.vhdx"
    godwit("restore", "vm1", "--point", str(min(numbers)), "--to", before, "--format", "vhdx")
    godwit("restore", "vm1", "--to", after, "--format", "vhdx")
    assert_same(guest_raw, "raw", before)
    assert_same(guest, "vhdx", after)

    back = qemu.boot(after, commands=GUEST_READS)
    assert back.ready == "GODWIT-READY firmware=uefi journal=2 last=written by the guest"
    assert back.output == written.output


def assert_same(left: Path, left_format: str, right: Path) -> None:
    """Let qemu-img judge that two disks hold the same."""
    done = subprocess.run(
        ["qemu-img", "compare", "-f", left_format, "-F", "vhdx", left, right],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
