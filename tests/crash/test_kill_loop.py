"""The real command, killed again and again: what it published restores, and the next run goes on at once."""

from __future__ import annotations

import io
import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from cli import main
from cli.output import Output
from replica import catalog
from replica.stores.address import open_store
from tests.support.engine import BLOCK
from tests.support.servers import S3Server

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
DISK_BYTES = 200 * MIB
PIECE_BYTES = 4 * MIB
DATA_BYTES = 64 * MIB
LIMIT_SECONDS = 120
COMMAND = [sys.executable, "-c", "from cli.main import main; main()"]


def _godwit(*arguments: str | Path, code: int = 0) -> str:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    found = main.run([str(argument) for argument in arguments], output)
    assert isinstance(output.stdout, io.StringIO)
    assert isinstance(output.stderr, io.StringIO)
    assert found == code, output.stderr.getvalue()
    return output.stdout.getvalue()


class _Loop:
    """A VM with one disk, which is replicated by processes that are killed."""

    def __init__(self, folder: Path, address: str, seed: int) -> None:
        self.draw = random.Random(seed)
        self.folder = folder
        self.disk = folder / "disk.img"
        self.states: dict[int, str] = {}  # point → what the disk held, as a digest
        self.kills = self.reused_blocks = 0
        with self.disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        self._rewrite(range(0, 2 * DATA_BYTES, 2 * PIECE_BYTES))
        _godwit("init", address)
        _godwit("protect", "vm", "--disk", self.disk)
        self.store = open_store(address)
        self.segments = catalog.find(self.store, "default", "vm").keys.segments

    def _rewrite(self, offsets: range) -> None:
        with self.disk.open("r+b") as file:
            for offset in offsets:
                file.seek(offset)
                file.write(self.draw.randbytes(PIECE_BYTES))

    def change(self) -> None:
        """Change a few blocks; once there is a point, so much that a cycle takes a while."""
        with self.disk.open("r+b") as file:
            for _ in range(4):
                file.seek(self.draw.randrange(DISK_BYTES // BLOCK) * BLOCK)
                file.write(self.draw.randbytes(BLOCK))
        if self.states:
            start = self.draw.randrange(0, DATA_BYTES, 2 * PIECE_BYTES)
            self._rewrite(range(start, start + 10 * PIECE_BYTES, 2 * PIECE_BYTES))

    def digest(self, path: Path) -> str:
        with path.open("rb") as file:
            found = xxhash.xxh3_128()
            while piece := file.read(PIECE_BYTES):
                found.update(piece)
        return found.hexdigest()

    def points(self) -> list[int]:
        """Verify everything; return the points, all of which restore."""
        report: Any = json.loads(_godwit("verify", "vm", "--full", "--json"))
        assert not report["damaged"]
        return [point["point"] for point in report["points"] if point["restores"]]

    def run(self, stop: Callable[[], bool]) -> None:
        """Replicate in a process of its own, killed once ``stop`` says so. Its lease hinders nobody."""
        process = subprocess.Popen(
            [*COMMAND, "replicate", "vm", "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and not stop() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode in (0, -9), err
        self.kills += process.returncode != 0
        if process.returncode == 0:
            self.reused_blocks += json.loads(out)["reused_blocks"]
        listed = self.points()
        new = set(listed) - self.states.keys()
        assert set(listed) >= self.states.keys(), "points were lost"
        assert len(new) <= 1
        assert new or process.returncode != 0
        for number in new:  # a process may die between the manifest and its end
            self.states[number] = self.digest(self.disk)

    def when_killed(self) -> Callable[[], bool]:
        """Return a moment: some time after a number of segments were stored, or after the start alone."""
        before = sum(1 for _ in self.store.list(self.segments))
        wanted = before + self.draw.randint(0, 1 if self.states else 3)
        pause = self.draw.uniform(0, 0.1) if wanted > before else self.draw.uniform(0.1, 0.6)
        due: float | None = None

        def stop() -> bool:
            nonlocal due
            if due is None and sum(1 for _ in self.store.list(self.segments)) >= wanted:
                due = time.monotonic() + pause
            return due is not None and time.monotonic() >= due

        return stop

    def go(self, kills: int) -> None:
        for _ in range(kills + kills // 2):
            if self.kills == kills:
                break
            self.change()
            self.run(self.when_killed())
        self.change()
        self.run(lambda: False)
        assert self.kills >= kills / 2, "most runs were over before they were killed"
        assert self.reused_blocks > 0, "nothing of what dead processes had stored was used"
        for number, held in self.states.items():
            back = self.folder / f"back-{number}.img"
            _godwit("restore", "vm", "--point", str(number), "--to", back)
            assert back.stat().st_size == DISK_BYTES
            assert self.digest(back) == held
            back.unlink()
        print(f"{self.kills} kills, {len(self.states)} points, {self.reused_blocks} blocks used again")


@pytest.fixture
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GODWIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("GODWIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_alone")
def test_replication_to_a_folder_survives_being_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "store")
    monkeypatch.setenv("GODWIT_STORE", address)
    _Loop(tmp_path, address, seed=1).go(kills=15)


@pytest.mark.server
@pytest.mark.xdist_group("seaweedfs")
@pytest.mark.usefixtures("_alone")
def test_replication_to_an_s3_server_survives_being_killed(
    tmp_path: Path, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = seaweedfs.url(f"kills/{secrets.token_hex(6)}")
    monkeypatch.setenv("GODWIT_STORE", address)
    _Loop(tmp_path, address, seed=2).go(kills=6)
