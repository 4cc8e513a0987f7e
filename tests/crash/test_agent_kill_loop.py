"""The agent, killed again and again while it replicates real disks to a real S3 server: what it listed stays, restores.

``make check`` runs a short form. GODWIT_SOAK_MINUTES=10 runs it for ten minutes with 20 disks at 10 s, and lets one
agent go on for eight minutes more, to see that its memory stays where it is; GODWIT_SOAK_SEED chooses another run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import random
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from replica import catalog, history, protection
from replica.catalog import ProtectedVm
from replica.daemon import timing
from replica.host import SystemClock, this_host
from replica.keys import point_of
from replica.model import Point
from replica.stores.address import open_store
from tests.support.engine import BLOCK, make_host, random_blocks, restore_disk
from tests.support.servers import S3Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.xdist_group("seaweedfs"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and kills by SIGKILL"),
]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from cli.main import main; main()", "run"]
LIMIT_SECONDS = 120  # after which a test fails rather than hangs
MINUTES = float(os.environ.get("GODWIT_SOAK_MINUTES", "0"))
SEED = int(os.environ.get("GODWIT_SOAK_SEED", "5"))
DISK_BLOCKS = 16
SAMPLE_SECONDS = 0.25
WARM_SECONDS = 150.0  # in which every VM has had cycles, and pruning, verification and garbage their turns


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a run is. ``calm_seconds``: how long the last agent runs without being killed."""

    disks: int
    interval_seconds: int
    killing_seconds: float
    longest_life_seconds: float
    calm_seconds: float


SHORT = Shape(disks=6, interval_seconds=2, killing_seconds=12, longest_life_seconds=5, calm_seconds=4)
LONG = Shape(disks=20, interval_seconds=10, killing_seconds=MINUTES * 60, longest_life_seconds=30, calm_seconds=480)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Disk:
    """A raw disk, and what it held from when to when, by the clock that points are stamped with."""

    path: Path
    found: ProtectedVm
    content: bytearray
    states: list[tuple[float, str]] = field(default_factory=list)  # since when at the earliest, and its digest

    def _hold(self, since: float) -> None:
        self.states.append((since, digest(self.content)))

    def replace(self, draw: random.Random) -> None:
        """Change the disk in one instant, as it must be where it is being read: another file takes its place."""
        self._change(draw)
        temporary = self.path.with_suffix(".new")
        temporary.write_bytes(self.content)
        since = time.time()
        temporary.replace(self.path)
        self._hold(since)

    def write(self, draw: random.Random) -> None:
        """Change the disk in place; nobody reads it."""
        since = time.time()
        for block in self._change(draw):
            with self.path.open("r+b") as file:
                file.seek(block * BLOCK)
                file.write(self.content[block * BLOCK : (block + 1) * BLOCK])
        self._hold(since)

    def _change(self, draw: random.Random) -> list[int]:
        changed = draw.sample(range(DISK_BLOCKS), draw.randint(1, 3))
        for block in changed:
            new = bytes(BLOCK) if draw.random() < 0.1 else random_blocks(draw.randrange(1 << 30), 1)
            self.content[block * BLOCK : (block + 1) * BLOCK] = new
        return changed

    def held(self, since: float, until: float) -> set[str]:
        """Return what the disk held at some instant of that span; the beginning of a state is known to a moment."""
        ends = [begun for begun, _ in self.states[1:]] + [float("inf")]
        return {
            one
            for (begun, one), end in zip(self.states, ends, strict=True)
            if begun <= until and end + CHANGE_SECONDS >= since
        }


CHANGE_SECONDS = 1.0  # a change takes less, from when its time is noted until it is there


@dataclass
class Life:
    """One run of the agent: what it told, how much memory it had when."""

    process: subprocess.Popen[str]
    begun: float = field(default_factory=time.monotonic)
    events: list[dict[str, Any]] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.endswith("\n"):  # the last may be cut off
                self.events.append(json.loads(line))

    def sample(self) -> None:
        try:
            told = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except OSError:
            return
        self.resident.append((time.monotonic() - self.begun, int(told[1]) * mmap.PAGESIZE))

    def is_read(self, vm: str) -> bool:
        """Whether a cycle of that VM is under way, as far as was told by now."""
        last = next((one["event"] for one in reversed(self.events) if one.get("vm") == vm), "")
        return last == "cycle.started"

    def end(self, *, kill: bool) -> int:
        (self.process.kill if kill else self.process.terminate)()
        code = self.process.wait(LIMIT_SECONDS)
        self._reader.join(LIMIT_SECONDS)
        return code


class Lab:
    """VMs of one disk each, a store, and agents that die."""

    def __init__(self, folder: Path, address: str, shape: Shape) -> None:
        self.folder, self.address, self.shape = folder, address, shape
        self.draw = random.Random(SEED)
        self.store = open_store(address, create=True)
        host = this_host(folder / "protecting")
        catalog.init_store(self.store, make_host(clock=SystemClock()))  # type: ignore[arg-type]
        self.disks: dict[str, Disk] = {}
        for number in range(shape.disks):
            name, content = f"vm {number:02}", bytearray(random_blocks(number, DISK_BLOCKS))
            path = folder / f"disk{number}.img"
            path.write_bytes(content)
            found, _ = protection.protect(self.store, host, tenant="default", name=name, disks=[path])
            catalog.update_settings(self.store, host, found, interval_seconds=shape.interval_seconds)
            self.disks[name] = Disk(path, found, content, [(0.0, digest(content))])
        self.lives: list[Life] = []
        self.listed: dict[str, set[int]] = {name: set() for name in self.disks}
        (folder / "godwit.toml").write_text(
            '[agent]\nconcurrency = 3\nrefresh = "5s"\nprune = "1m"\ngc = "2m"\nverify = "100%"\n'
        )

    def start(self) -> Life:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("GODWIT_")}
        given = {
            "GODWIT_STORE": self.address,
            "GODWIT_STATE": str(self.folder / "state"),
            "GODWIT_CONFIG": str(self.folder / "godwit.toml"),
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
        }
        process = subprocess.Popen(
            COMMAND,
            cwd=self.folder,
            env={**kept, **given},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lives.append(Life(process))
        return self.lives[-1]

    def live(self, life: Life, seconds: float) -> None:
        """Let an agent work, while disks change."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert life.process.poll() is None, life.events[-3:]
            chosen = self.draw.choice(sorted(self.disks))
            if not life.is_read(chosen):
                self.disks[chosen].replace(self.draw)
            life.sample()
            time.sleep(SAMPLE_SECONDS)

    def change_at_rest(self) -> None:
        for name in self.draw.sample(sorted(self.disks), len(self.disks) // 2):
            for _ in range(self.draw.randint(1, 3)):
                self.disks[name].write(self.draw)

    def numbers(self, disk: Disk) -> list[int]:
        found = (point_of(info.key) for info in self.store.list(disk.found.keys.manifests))
        return [number for number in found if number is not None]

    def look(self) -> None:
        """Check that whatever was listed before is there still, and that what is new has greater numbers."""
        for name, disk in self.disks.items():
            now, before = self.numbers(disk), self.listed[name]
            assert before <= set(now), f"{name} lost {sorted(before - set(now))}"
            assert all(number > max(before, default=0) for number in set(now) - before), name
            self.listed[name] = set(now)

    def run(self) -> None:
        deadline = time.monotonic() + self.shape.killing_seconds
        while time.monotonic() < deadline:
            life = self.start()
            self.live(life, self.draw.uniform(0.5, self.shape.longest_life_seconds))
            assert life.end(kill=True) == -9
            self.look()
            self.change_at_rest()
        life = self.start()
        self.live(life, self.shape.calm_seconds)
        assert life.end(kill=False) == 0
        assert life.events[-1]["event"] == "agent.stopped"
        self.look()

    # --- what must hold afterwards

    def points(self, disk: Disk) -> list[Point]:
        found = list(history.points(self.store, disk.found.keys))
        assert all(isinstance(one, Point) for one in found), found
        return [one for one in found if isinstance(one, Point)]

    def check_restores(self) -> int:
        """Restore every point of every VM: to what its disk held while the cycle read it."""
        host, restored = this_host(self.folder / "elsewhere"), 0
        for name, disk in self.disks.items():
            for point in self.points(disk):
                back = digest(restore_disk(self.store, host, disk.found, point))
                held = disk.held(point.created_at.timestamp(), point.published_at.timestamp())
                assert back in held, f"point {point.point} of {name}"
                restored += 1
        return restored

    def check_nothing_failed(self) -> Counter[str]:
        events = [one for life in self.lives for one in life.events]
        wrong = [one for one in events if one["level"] == "error"]
        # A disk that was changed while it was read is the one thing that may fail: nothing is published of it.
        assert all("changed while it was being read" in one["message"] for one in wrong), wrong[:3]
        assert not [one for one in events if one["event"] == "cycle.busy"], "a dead agent's lease stood in the way"
        return Counter(one["event"] for one in events)

    def check_missed(self) -> tuple[int, int]:
        """Compare the turns that were reported as missed with those that the points themselves show; return both."""
        period, shown, told = float(self.shape.interval_seconds), 0, 0
        after = self._told_after()
        for name, disk in self.disks.items():
            phase = timing.phase(disk.found.vm.vm_id, "cycle")
            points = self.points(disk)
            for earlier, later in itertools.pairwise(points):
                begun, ended = (one.created_at.timestamp() + timing.tolerance(period) for one in (earlier, later))
                missing = max(0, timing.missed_slots(begun, ended, period, phase) - 1)
                shown += missing
                if (reported := after[name].get(later.point)) is not None:  # else it died before it could tell
                    # A cycle begins a moment before the instant of its point, and a turn may lie between the two.
                    assert abs(reported - missing) <= 1, (name, later.point, reported, missing)
                    told += reported
        return shown, told

    def _told_after(self) -> dict[str, dict[int, int]]:
        """Return by VM and point how many turns were told to be missed before it, 0 where nothing was told."""
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for life in self.lives:
            for one, following in itertools.pairwise(life.events):
                if one["event"] == "cycle.done":
                    missed = following["event"] == "cycle.missed" and following["vm"] == one["vm"]
                    found[one["vm"]][one["point"]] = following["turns"] if missed else 0
        return found


def thirds(resident: list[tuple[float, int]], warm_seconds: float) -> list[float]:
    """Return the median in MiB of what an agent held in each third of its life, once it has done all that it does."""
    warm = [size for at, size in resident if at >= warm_seconds]
    third = len(warm) // 3
    return [statistics.median(warm[number * third : (number + 1) * third]) / (1 << 20) for number in range(3)]


def test_killed_at_any_instant_the_agent_loses_no_point_and_says_what_it_missed(
    tmp_path: Path, seaweedfs: S3Server
) -> None:
    shape = LONG if MINUTES else SHORT
    lab = Lab(tmp_path, seaweedfs.url(f"agent-kills/{secrets.token_hex(6)}"), shape)
    began = datetime.now(UTC)
    try:
        lab.run()
    finally:
        for life in lab.lives:
            life.process.kill()
    told = lab.check_nothing_failed()
    restored = lab.check_restores()
    shown, reported = lab.check_missed()
    numbers = sum(len(one) for one in lab.listed.values())
    assert all(len(one) >= 3 for one in lab.listed.values())
    assert told["cycle.done"] <= restored <= told["cycle.done"] + 3 * len(lab.lives)
    assert shown > 0 and reported > 0, "nothing was missed, so nothing was shown"
    peaks = [max(size for _, size in life.resident) / (1 << 20) for life in lab.lives if life.resident]
    calm = lab.lives[-1].resident
    print(
        f"{datetime.now(UTC) - began}: {len(lab.lives) - 1} kills, {len(lab.disks)} disks, {restored} points of "
        f"{numbers} numbers restored, {sum(len(one.states) for one in lab.disks.values())} states, "
        f"missed turns {shown} shown and {reported} reported, peak RSS of a life {min(peaks):.0f} to "
        f"{max(peaks):.0f} MiB"
    )
    if MINUTES:
        first, second, last = thirds(calm, WARM_SECONDS)
        print(f"RSS of the calm agent by thirds: {first:.1f}, {second:.1f}, {last:.1f} MiB; {dict(told)}")
        assert last <= first * 1.05 + 4, "the agent grows"
