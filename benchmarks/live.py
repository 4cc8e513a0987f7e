"""Running domains of libvirt beside virtnbdbackup, which reads them by the same checkpoints and backup jobs.

Each program has a domain of its own, both with the same disk. Whole commands are timed, their start included; between
two of them 1 % of the blocks that hold data is written through QEMU. What is restored is compared with the disk,
untimed.

    apt-get install virtnbdbackup libvirt-daemon-system libvirt-clients
    python -m benchmarks live
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.image import BLOCK, MIB, Content
from benchmarks.peer import Spent, spend
from tests.support.libvirt_host import NOBODY, LibvirtHost, RunningDomain, missing

SIZE_MIB = 4096
DATA_MIB = 1024
CHANGED_SHARE = 0.01
STEPS = ("initial", "delta", "restore")


class _Subject:
    """A program with a domain of its own."""

    name = ""

    def __init__(self, folder: Path, host: LibvirtHost, image: Path, size_mib: int) -> None:
        self.folder = folder / self.name
        self.folder.mkdir()
        self.domain = RunningDomain(host, self.name, ("qcow2",), size_mib * MIB)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, self.domain.files[0]], check=True)
        if os.geteuid() == 0:
            os.chown(self.domain.files[0], NOBODY, NOBODY)
        self.domain.start()
        self.environment = {"HOME": str(self.folder)}
        self.spent: dict[str, list[Spent]] = {step: [] for step in STEPS}
        self.prepare()

    def run(self, *command: object) -> Spent:
        """Run a command of the program."""
        return spend(list(map(str, command)), folder=self.folder, environment=self.environment)

    def prepare(self) -> None:
        """Make what the first backup needs."""

    def back_up(self, *, first: bool) -> Spent:
        """Take what changed."""
        raise NotImplementedError

    def restore(self, target: Path) -> Spent:
        """Restore the newest state into the folder."""
        raise NotImplementedError

    @property
    def stored(self) -> Path:
        """Where it keeps what it took."""
        return self.folder / "store"

    def stored_bytes(self) -> int:
        """Return the bytes of all it keeps."""
        return sum(path.stat().st_size for path in self.stored.rglob("*") if path.is_file())


class _Godwit(_Subject):
    name = "godwit"

    def prepare(self) -> None:
        self.environment |= {"GODWIT_STORE": f"file://{self.stored}", "GODWIT_STATE": str(self.folder / "state")}
        self._godwit("init")
        self._godwit("protect", "vm", "--libvirt", self.domain.name, "--connect", self.domain.host.connect)

    def back_up(self, *, first: bool) -> Spent:
        del first
        return self._godwit("replicate", "vm")

    def restore(self, target: Path) -> Spent:
        return self._godwit("restore", "vm", "--to", target / "disk.qcow2")

    def _godwit(self, *arguments: object) -> Spent:
        return self.run(Path(sys.executable).with_name("godwit"), *arguments, "--quiet")


class _Virtnbdbackup(_Subject):
    name = "virtnbdbackup"

    def back_up(self, *, first: bool) -> Spent:
        level = "full" if first else "inc"
        where = (*self._daemon(), "-d", self.domain.name)
        return self.run(
            "virtnbdbackup", *where, "-o", self.stored, "-l", level, "-z", "--scratchdir", self.domain.host.scratch
        )

    def restore(self, target: Path) -> Spent:
        return self.run("virtnbdrestore", *self._daemon(), "-i", self.stored, "-o", target)

    def _daemon(self) -> tuple[str, ...]:
        # It wants a name and a password for every address of this form; the daemon asks for none.
        return ("-U", self.domain.host.connect, "--user", "any", "--password", "any")


def run(folder: Path, *, runs: int, size_mib: int = SIZE_MIB, data_mib: int = DATA_MIB) -> dict[str, Any] | None:
    """Return the figures; None, with a line that says so, where a program is missing."""
    lacking = [*missing(), *(one for one in ("virtnbdbackup", "virtnbdrestore") if shutil.which(one) is None)]
    if lacking:
        print(f"left out: {', '.join(lacking)}: not installed")
        return None
    image = folder / "image.raw"
    _make(image, size_mib, data_mib)
    drawn = random.Random(7)
    with LibvirtHost() as host:
        subjects = [kind(folder, host, image, size_mib) for kind in (_Godwit, _Virtnbdbackup)]
        for subject in subjects:
            subject.spent["initial"].append(subject.back_up(first=True))
        stored = {subject.name: subject.stored_bytes() for subject in subjects}  # later changes compress to nothing
        for number in range(runs):
            blocks = drawn.sample(range(data_mib * MIB // BLOCK), int(data_mib * MIB // BLOCK * CHANGED_SHARE))
            for subject in subjects:
                for block in blocks:
                    subject.domain.write(0, block * BLOCK, BLOCK, 1 + number % 250)
                subject.spent["delta"].append(subject.back_up(first=False))
        for subject in subjects:
            target = subject.folder / "out"
            target.mkdir()
            subject.spent["restore"].append(subject.restore(target))
            _compare(subject, target)
            subject.domain.kill_soon()
    return {
        subject.name: {
            "stored_bytes": stored[subject.name],
            **{step: [one.seconds for one in subject.spent[step]] for step in STEPS},
        }
        for subject in subjects
    }


def _make(path: Path, size_mib: int, data_mib: int) -> None:
    """Make a raw image whose first part is half noise, half text, and the rest a hole."""
    content = Content(7)
    with path.open("wb") as file:
        for number in range(data_mib):
            file.write(content.noise(MIB) if number % 2 else content.text(MIB))
        file.truncate(size_mib * MIB)


def _compare(subject: _Subject, target: Path) -> None:
    """Compare what was restored with the disk of the domain, which stands still."""
    subject.domain.flush(0)
    (restored,) = [path for path in target.rglob("*") if path.is_file() and path.suffix not in {".xml", ".json"}]
    done = subprocess.run(
        ["qemu-img", "compare", "-U", restored, subject.domain.files[0]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{subject.name} did not restore what the domain holds: {done.stdout}{done.stderr}")


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    own, other = found["godwit"], found["virtnbdbackup"]
    print(f"a running domain of libvirt{'':12}{'godwit s':>10}{'virtnbdbackup s':>17}  times")
    for step in STEPS:
        a, b = statistics.median(own[step]), statistics.median(other[step])
        print(f"  {step:37}{a:>10.2f}{b:>17.2f}  {b / a:.2f}")
    for name, figures in found.items():
        print(f"  {name}: stored {figures['stored_bytes'] / MIB:.1f} MiB first")
    print()
