"""The programs that do a like job: how each makes a repository, takes an image in, and gives it back, as commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
PASSWORD = "benchmark"

# A small interpreter in between: the largest resident size that the system reports of a child begins with its parent's.
_LAUNCHER = (
    "import json,os,resource,subprocess,sys,time;out=open(sys.argv[1],'wb');s=time.perf_counter();"
    "r=subprocess.run(sys.argv[2:],stdin=subprocess.DEVNULL,stdout=out,stderr=out);e=time.perf_counter()-s;"
    "u=resource.getrusage(resource.RUSAGE_CHILDREN);"
    "print(json.dumps([r.returncode,e,u.ru_maxrss*1024,u.ru_utime+u.ru_stime]))"
)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a whole command took. ``peak_bytes``: resident memory of the largest of its processes."""

    seconds: float
    peak_bytes: int
    processor_seconds: float


def spend(command: list[str], *, folder: Path, environment: dict[str, str]) -> Spent:
    """Run a command in ``folder`` from start to end. Raises RuntimeError with its last words where it fails."""
    log = folder / "command.log"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(log), *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
    )
    status, seconds, peak_bytes, processor_seconds = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {log.read_text(errors='replace')[-800:]}")
    return Spent(seconds, peak_bytes, processor_seconds)


class Peer:
    """A program under test, with a folder of its own that holds its repository, its caches and nothing else."""

    name = ""
    remark = ""
    steps = frozenset({"initial", "delta", "restore"})
    packages = ""  # what to install where it is missing
    tool = ""  # the program

    def __init__(self, folder: Path, image: Path, tools: Path | None) -> None:
        self.folder = folder / self.name
        self.image = image
        self.points = 0
        self.count: Callable[[], int] | None = None  # counts what is stored where that is not in the folder
        beside = tools / self.name / "bin" if tools else None
        self.program = (beside and shutil.which(self.tool, path=str(beside))) or shutil.which(self.tool) or ""
        self.environment: dict[str, str] = {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}

    @property
    def repository(self) -> Path:
        """What is counted as stored."""
        return self.folder / "repository"

    def version(self) -> str:
        """Return what the program says of itself."""
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        return " ".join((done.stdout or done.stderr).strip().split("\n")[0].split()[:3])

    def run(self, *arguments: str) -> Spent:
        """Run the program."""
        return spend([self.program, *arguments], folder=self.folder, environment=self.environment)

    def fresh(self) -> None:
        """Throw all away, caches too, and begin an empty repository."""
        self.discard()
        self.folder.mkdir(parents=True)
        self.points = 0
        self.prepare()

    def discard(self) -> None:
        """Throw all away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def take(self) -> Spent:
        """Take the image in as the next point."""
        self.points += 1
        return self.run(*self.take_arguments())

    def give_back(self) -> Spent:
        """Restore the newest point to ``restored``, which is removed by ``drop_restored``."""
        (self.folder / "out").mkdir()
        return self.run(*self.restore_arguments())

    def drop_restored(self) -> None:
        """Remove what was restored."""
        shutil.rmtree(self.folder / "out")

    @property
    def restored(self) -> Path:
        """The file that was restored."""
        return self.folder / "out" / self.image.name

    def stored_bytes(self) -> int:
        """Return the bytes of everything in the repository, by the lengths of its files or objects."""
        if self.count is not None:
            return self.count()
        return sum(path.stat().st_size for path in self.repository.rglob("*") if path.is_file())

    def prepare(self) -> None:
        """Make the empty repository."""
        self.repository.mkdir()

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        raise NotImplementedError

    def restore_arguments(self) -> list[str]:
        """Return the arguments that restore the newest point."""
        raise NotImplementedError


class Godwit(Peer):
    """This project, as it comes."""

    name = "godwit"
    remark = "as it comes: zstd 1, 64 KiB blocks, every block hashed and checked, no encryption"
    tool = "godwit"

    def __init__(self, folder: Path, image: Path, tools: Path | None, store: str | None = None) -> None:
        super().__init__(folder, image, tools)
        self.program = str(Path(sys.executable).parent / "godwit")
        self.store = store or str(self.repository)
        self.environment |= {
            "GODWIT_STORE": self.store,
            "GODWIT_STATE": str(self.folder / "state"),
            # An installed program comes with its bytecode; a checkout may be told to keep none.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        }

    def prepare(self) -> None:
        """Make the store and protect the image."""
        self.run("init", "--quiet")
        self.run("protect", "vm", "--disk", str(self.image), "--quiet")

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        return ["replicate", "vm", "--quiet"]

    def restore_arguments(self) -> list[str]:
        """Return the arguments that restore the newest point."""
        return ["restore", "vm", "--to", str(self.restored), "--quiet"]


class Borg(Peer):
    """BorgBackup 1.4 with fixed chunks of 64 KiB."""

    name = "borg"
    remark = "fixed chunks of 64 KiB, zstd 1, no encryption"
    tool = "borg"
    packages = "pip install 'borgbackup==1.4.*' into TOOLS/borg (see the note in benchmarks/peers.py)"

    def prepare(self) -> None:
        """Make the repository."""
        self.environment |= {
            "BORG_BASE_DIR": str(self.folder / "base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        self.run("init", "--encryption", "none", str(self.repository))

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        options = ["--chunker-params=fixed,65536", "--sparse", "-C", "zstd,1"]
        return ["create", *options, f"{self.repository}::{self.points}", str(self.image)]

    def give_back(self) -> Spent:
        """Restore into the current folder: it knows no other."""
        out = self.folder / "out"
        out.mkdir()
        deep = str(len(self.image.parent.parts) - 1)
        arguments = ["extract", "--sparse", "--strip-components", deep, f"{self.repository}::{self.points}"]
        return spend([self.program, *arguments], folder=out, environment=self.environment)


class Restic(Peer):
    """restic, which always encrypts."""

    name = "restic"
    remark = "compression auto; always encrypts, and derives its key anew with each command"
    tool = "restic"
    packages = "apt-get install restic"

    def __init__(self, folder: Path, image: Path, tools: Path | None, store: str | None = None) -> None:
        super().__init__(folder, image, tools)
        self.environment |= {
            "RESTIC_REPOSITORY": store or str(self.repository),
            "RESTIC_PASSWORD": PASSWORD,
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }

    def version(self) -> str:
        """Return what the program says of itself."""
        return (
            subprocess.run([self.program, "version"], capture_output=True, text=True, check=False).stdout[:13].strip()
        )

    def prepare(self) -> None:
        """Make the repository."""
        self.run("init", "--quiet")

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        return ["backup", "--quiet", "--compression", "auto", str(self.image)]

    def restore_arguments(self) -> list[str]:
        """Return the arguments that restore the newest point."""
        return ["restore", "--quiet", "latest", "--target", str(self.folder / "out")]

    @property
    def restored(self) -> Path:
        """The file that was restored: its whole path, or its name alone, by the release."""
        out = self.folder / "out"
        return next((path for path in out.rglob(self.image.name) if path.is_file()), out / self.image.name)


class Casync(Peer):
    """casync, as a block image."""

    name = "casync"
    remark = "chunks by content of 64 KiB on average, its own zstd level (3); checks each chunk's hash"
    tool = "casync"
    packages = "apt-get install casync"

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        index = self.repository / f"{self.points}.caibx"
        return ["make", f"--store={self.repository / 'chunks'}", str(index), str(self.image)]

    def restore_arguments(self) -> list[str]:
        """Return the arguments that restore the newest point."""
        index = self.repository / f"{self.points}.caibx"
        return ["extract", f"--store={self.repository / 'chunks'}", str(index), str(self.restored)]


class Benji(Peer):
    """benji with its store and its SQLite database in files."""

    name = "benji"
    remark = "blocks of 64 KiB, zstd 1, SQLite"
    tool = "benji"
    packages = "pip install benji 0.17 with old pins into TOOLS/benji (see the note in benchmarks/peers.py)"

    def version(self) -> str:
        """Return the version of the installed distribution: the program does not tell it."""
        python = str(Path(self.program).parent / "python")
        code = "from importlib.metadata import version;print('benji', version('benji'))"
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()

    def prepare(self) -> None:
        """Write the configuration and make the database."""
        self.repository.mkdir()
        blocks = self.repository / "blocks"
        blocks.mkdir()
        settings: dict[str, Any] = {
            "configurationVersion": "1",
            "databaseEngine": f"sqlite:///{self.repository / 'benji.sqlite'}",
            "blockSize": 65536,
            "defaultStorage": "local",
            "storages": [
                {
                    "name": "local",
                    "storageId": 1,
                    "module": "file",
                    "configuration": {"path": str(blocks), "activeTransforms": ["zstd"]},
                }
            ],
            "transforms": [{"name": "zstd", "module": "zstd", "configuration": {"level": 1}}],
            "ios": [{"name": "file", "module": "file"}],
        }
        (self.folder / "benji.yaml").write_text(json.dumps(settings))  # JSON is YAML
        self.run(*self._always(), "database-init")

    def _always(self) -> list[str]:
        return ["-c", str(self.folder / "benji.yaml"), "--log-level", "ERROR"]

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        return [*self._always(), "backup", "--uid", f"v{self.points}", f"file:{self.image}", "image"]

    def restore_arguments(self) -> list[str]:
        """Return the arguments that restore the newest point."""
        return [*self._always(), "restore", "--sparse", f"v{self.points}", f"file:{self.restored}"]


class QemuImg(Peer):
    """qemu-img, which converts: no history, no deltas."""

    name = "qemu-img"
    remark = "convert -c to qcow2 with zstd at its own level, clusters of 64 KiB; not kept: no history, no delta"
    tool = "qemu-img"
    packages = "apt-get install qemu-utils"
    steps = frozenset({"initial", "restore"})

    def take_arguments(self) -> list[str]:
        """Return the arguments that take the image in."""
        options = ["-O", "qcow2", "-c", "-o", "compression_type=zstd", "-W", "-m", "8"]
        return ["convert", "-f", "raw", *options, str(self.image), str(self.repository / "image.qcow2")]

    def restore_arguments(self) -> list[str]:
        """Return the arguments that restore the image."""
        options = ["-O", "raw", "-W", "-m", "8"]
        return ["convert", "-f", "qcow2", *options, str(self.repository / "image.qcow2"), str(self.restored)]


class Rsync(Peer):
    """rsync in place onto a plain copy: a mirror that holds one state, shown for the delta alone."""

    name = "rsync"
    remark = "--inplace --no-whole-file onto a plain copy: one state, no history, nothing compressed"
    tool = "rsync"
    packages = "apt-get install rsync"
    steps = frozenset({"delta"})

    def prepare(self) -> None:
        """Make the copy."""
        self.repository.mkdir()
        shutil.copyfile(self.image, self.repository / self.image.name)

    def take_arguments(self) -> list[str]:
        """Return the arguments that bring the copy up to date."""
        options = ["--inplace", "--no-whole-file", "--ignore-times", "--block-size=65536"]
        return [*options, str(self.image), str(self.repository / self.image.name)]


LOCAL: tuple[type[Peer], ...] = (Borg, Restic, Casync, Benji, QemuImg, Rsync)
