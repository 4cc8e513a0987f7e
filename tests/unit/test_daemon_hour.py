"""An hour of an agent with 200 VMs, its real units of work, a store with faults, on a clock that tests move.

GODWIT_LONG=1 gives every VM a cycle each five minutes and restores every point; GODWIT_LONG_SEED chooses another hour.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import math
import os
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from replica import catalog, cycle, history, lease, protection, verify
from replica.catalog import ProtectedVm
from replica.daemon import timing
from replica.daemon.bandwidth import Limits, Window
from replica.daemon.mailbox import Word
from replica.daemon.terms import AgentTerms
from replica.daemon.units import Result, Task, Unit, Verdict
from replica.keys import name as name_key
from replica.model import Point
from replica.stores.memory import MemoryStore
from tests.support.agent_world import World
from tests.support.engine import BLOCK, WORKERS, FakeClock, make_host, restore_disk
from tests.support.store_doubles import Fault, FaultKind
from tests.support.turns import InlineExecutor

LONG = bool(os.environ.get("GODWIT_LONG"))
SEED = int(os.environ.get("GODWIT_LONG_SEED", "11"))
KIB = 1024
RATE = 32 * KIB  # less than may be configured, so that small disks can fill the line
MINUTE = 60.0
HOUR = 3600.0
CONCURRENCY = 4
MINUTELY = tuple(f"vm-{number:03}" for number in range(6))
CUT_OFF = tuple(f"vm-{number:03}" for number in range(3, 43))
AWAY = 14 * MINUTE, 20 * MINUTE

# What a store on a bad day does, to any request: about one in fifty fails somehow.
BAD_DAY = (
    Fault(FaultKind.ERROR, probability=0.006),
    Fault(FaultKind.TIMEOUT, probability=0.006),
    Fault(FaultKind.APPLIED_ERROR, probability=0.006),
    Fault(FaultKind.SLOW_DOWN, probability=0.004),
    Fault(FaultKind.STALE_LIST, ["list"], probability=0.2),
)


@pytest.fixture(autouse=True)
def _in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cycle", "restore", "examination", "garbage", "rewriting", "daemon.units"):
        monkeypatch.setattr(f"replica.{module}.ThreadPoolExecutor", InlineExecutor)


@dataclass
class Cycle:
    """What became of one cycle: when it was begun and over, in seconds since the beginning."""

    begun: float
    ended: float
    verdict: Verdict
    begun_at: float  # by the clock on the wall


@dataclass
class Vm:
    """A VM of one tiny disk."""

    found: ProtectedVm
    path: Path
    held: dict[int, bytes] = field(default_factory=dict)  # by point: what the disk was
    newest: int = 0
    cycles: list[Cycle] = field(default_factory=list)
    running: bool = False

    @property
    def name(self) -> str:
        return self.found.vm.name

    def change(self, draw: random.Random, *, whole: bool = False) -> None:
        """Change something, unless it is being read: what changes then is refused, as it must be."""
        if self.running:
            return
        with self.path.open("r+b") as file:
            if not whole:
                file.seek(draw.randrange(2) * BLOCK)
            file.write(draw.randbytes(2 * BLOCK if whole else draw.choice((64, 640, 6400))))


class Fleet:
    """The VMs, the world of their agent, and account of what happened."""

    def __init__(self, folder: Path, intervals: dict[str, int], terms: AgentTerms, seed: int = SEED) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.draw = random.Random(seed)
        self.store = MemoryStore("hour")
        self.clock = FakeClock()
        self.host = make_host(folder / "state", clock=self.clock)
        self.world = World(
            self.store, self.host, terms, BAD_DAY, seed=seed, before_unit=self._begin, after_unit=self._end
        )
        catalog.init_store(self.store, self.host)
        self.vms: dict[str, Vm] = {}
        for name, seconds in intervals.items():
            self.protect(name, seconds)
        self._open: dict[str, tuple[float, float]] = {}

    def protect(self, name: str, seconds: int) -> Vm:
        path = self.folder / f"{name}.img"
        path.write_bytes(self.draw.randbytes(9000) + bytes(BLOCK - 9000) + self.draw.randbytes(500) * 100)
        with path.open("r+b") as file:
            file.truncate(2 * BLOCK)
        found, _ = protection.protect(self.store, self.host, tenant="default", name=name, disks=[path])
        catalog.update_settings(self.store, self.host, found, interval_seconds=seconds)
        self.vms[name] = Vm(found, path)
        return self.vms[name]

    def _begin(self, unit: Unit) -> None:
        if unit.task is Task.CYCLE and unit.found is not None:
            vm = self.vms[unit.found.vm.name]
            assert not vm.running, f"two cycles of {vm.name} at once"
            vm.running = True
            self._open[vm.name] = self.world.seconds, self.clock.now().timestamp()

    def _end(self, unit: Unit, result: Result) -> None:
        if unit.task is Task.CYCLE and unit.found is not None:
            vm = self.vms[unit.found.vm.name]
            vm.running = False
            begun, begun_at = self._open.pop(vm.name)
            vm.cycles.append(Cycle(begun, self.world.seconds, result.verdict, begun_at))
            self.note(vm)

    def note(self, vm: Vm) -> None:
        """Note what the disk is for the points that have come, told of or not."""
        content = vm.path.read_bytes()
        while True:
            try:
                found = history.read(self.store, vm.found.keys, vm.newest + 1)
            except Exception:  # there is none
                return
            vm.newest += 1
            if isinstance(found, Point):
                vm.held[vm.newest] = content

    def change_now_and_then(self, until: float, every_seconds: float = 5.0) -> None:
        for second in range(int(self.world.seconds), int(until), int(every_seconds)):
            self.world.at(second, lambda: self.vms[self.draw.choice(sorted(self.vms))].change(self.draw))

    # --- what must hold

    def check_points(self, names: list[str], *, every: bool) -> int:
        """Restore points of these VMs: all that were ever listed, or the newest of each; return how many."""
        count = 0
        for name in names:
            vm = self.vms[name]
            there = [one for one in history.points(self.store, vm.found.keys) if isinstance(one, Point)]
            assert [one.point for one in there] == sorted(vm.held), name
            for point in there if every else there[-1:]:
                assert restore_disk(self.store, self.host, vm.found, point) == vm.held[point.point], (name, point.point)
                count += 1
        return count

    def check_turns(self, name: str, seconds: int) -> int:
        """Check that each turn had its point or was told to be missed; return how many were missed."""
        vm, told = self.vms[name], self.world.told("cycle.missed", vm=name)
        phase = timing.phase(vm.found.vm.vm_id, "cycle") * seconds
        done = [one for one in vm.cycles if one.verdict is Verdict.DONE]
        missed = 0
        for earlier, later in itertools.pairwise(done):
            turns = [math.floor((one.begun_at + 1.0 - phase) / seconds) for one in (earlier, later)]
            expected = max(0, turns[1] - turns[0] - 1)
            reported = sum(int(str(one.fields["turns"])) for at, one in told if earlier.ended < at <= later.ended + 1)
            assert reported == expected, (name, later.begun, reported, expected)
            missed += expected
        return missed

    def waits(self, name: str) -> list[float]:
        """Return the times between points of a VM, and from the beginning to the first."""
        moments = [0.0, *(one.begun for one in self.vms[name].cycles if one.verdict is Verdict.DONE)]
        return [later - earlier for earlier, later in itertools.pairwise(moments)]


def check_bandwidth(crossed: list[tuple[float, str, str, int]], rate: int) -> int:
    """Check that over any minute no more went over the line than may, but for an object; return the most that did.

    What is sent again counts again. Leases are counted, and never wait.
    """
    moments = [at for at, *_ in crossed]
    sums = list(itertools.accumulate((size for *_, size in crossed), initial=0))
    largest = max(size for *_, size in crossed)
    most = 0
    for number, at in enumerate(moments):
        end = bisect.bisect_left(moments, at + MINUTE)
        most = max(most, sums[end] - sums[number])
    assert most <= rate * MINUTE + rate + CONCURRENCY * largest, most
    return most


def live_objects() -> Counter[str]:
    """Count what the agent holds: instances of its own classes."""
    gc.collect()
    found: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if str(kind.__module__).startswith("replica."):  # of classes made in C it need not be text
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="the state folder's locks are held by the process there")
def test_an_hour_of_200_vms_with_faults(tmp_path: Path) -> None:
    usual = 300 if LONG else 600
    intervals = {f"vm-{number:03}": (usual if number % 5 else 900) for number in range(195)}
    intervals |= dict.fromkeys(MINUTELY, 60)
    intervals |= {"down": 300, "busy": 300, "robbed": 300, "quickened": 900, "removed": 300}
    assert len(intervals) == 200
    limits = Limits((Window(RATE),))
    terms = AgentTerms(concurrency=CONCURRENCY, limits=limits, grace_seconds=2, prune_seconds=1500, gc_seconds=1500)
    fleet = Fleet(tmp_path, intervals, terms)
    world, vms, clock = fleet.world, fleet.vms, fleet.clock
    # One VM's lease cannot be written, from the beginning to the end.
    down = Fault(FaultKind.ERROR, ["replace"], f"*{vms['down'].found.vm.vm_id}/lease.json")
    world.faulty = type(world.faulty)(fleet.store, (down, *BAD_DAY), seed=SEED, retry_after_seconds=7.0)

    # A part of the store is away for some minutes, and with it forty VMs.
    cut_off = tuple(f"/{vms[name].found.vm.vm_id}/" for name in CUT_OFF)

    def cut(key: str) -> bool:
        return AWAY[0] <= world.seconds < AWAY[1] and any(one in key for one in cut_off)

    world.is_away = cut

    # Another agent has one VM for ten minutes; it renews as agents do.
    other = make_host(tmp_path / "other", name="host-b", clock=clock)
    held = lease.acquire(fleet.store, vms["busy"].found.keys, other, sole_on_host=False)
    for minute in range(1, 10):
        world.at(minute * MINUTE, held.check)
    world.at(10 * MINUTE, held.release)

    # And one takes a VM over in the middle of a cycle: its clock is ahead, so the lease seems to have run out.
    robbed = vms["robbed"]
    ahead = FakeClock(clock.now())
    robber = make_host(tmp_path / "robber", name="host-c", clock=ahead)
    stolen: list[float] = []

    def rob(unit: Unit) -> None:
        fleet._begin(unit)
        if unit.found == robbed.found and unit.task is Task.CYCLE and world.seconds > 900 and not stolen:
            stolen.append(world.seconds)
            world.at(world.seconds + 0.25, steal)

    def steal() -> None:
        assert robbed.running and lease.read(fleet.store, robbed.found.keys)[0].held
        ahead.advance((clock.now() - ahead.now()).total_seconds() + 600)
        cycle.replicate(fleet.store, robber, robbed.found, workers=WORKERS)
        fleet.note(robbed)

    world.before_unit = rob

    # Settings change, a VM comes, one goes.
    world.at(
        15 * MINUTE,
        lambda: catalog.update_settings(fleet.store, other, vms["quickened"].found, interval_seconds=120),
    )
    world.at(20 * MINUTE, lambda: fleet.protect("added", 300))
    world.at(25 * MINUTE, lambda: fleet.store.delete(name_key("default", "removed")))

    # SIGTERM, while the store is so slow that cycles are under way which the grace does not save.
    def slow(seconds: float) -> None:
        world.latency_seconds = seconds

    world.at(33 * MINUTE, lambda: slow(5.0))
    world.at(34 * MINUTE, lambda: world.put(Word.STOP))
    world.at(35 * MINUTE, lambda: slow(0.05))
    counted: list[Counter[str]] = []
    world.at(20 * MINUTE, lambda: counted.append(live_objects()))
    fleet.change_now_and_then(HOUR)
    ending = world.run(HOUR, status_folder=tmp_path / "state")
    stopped = world.seconds
    assert ending.clean
    assert 34 * MINUTE <= stopped <= 34 * MINUTE + 40
    assert world.told("cycle.abandoned"), "nothing was under way"

    # The next start goes on; then so much changes at once that the line is full for minutes.
    world.terms = AgentTerms(concurrency=CONCURRENCY, limits=limits, prune_seconds=1500, gc_seconds=1500)
    for name in list(vms)[:100]:
        world.at(40 * MINUTE, lambda name=name: vms[name].change(fleet.draw, whole=True))  # type: ignore[misc]
    world.at(55 * MINUTE, lambda: counted.append(live_objects()))
    assert world.run(HOUR, status_folder=tmp_path / "state").clean

    report(fleet)
    check_the_hour(fleet, intervals, stopped, bool(stolen))
    check_memory(*counted)


def report(fleet: Fleet) -> None:
    told = Counter(event.name for _, event in fleet.world.events)
    print(f"\n{dict(sorted(told.items()))}; {fleet.world.faulty.fired} faults, {len(fleet.world.crossed)} transfers")


def check_the_hour(fleet: Fleet, intervals: dict[str, int], stopped: float, was_robbed: bool) -> None:
    world, vms = fleet.world, fleet.vms
    assert world.faulty.fired > 200
    assert world.most_at_once == {True: CONCURRENCY, False: 2}  # one thing of care, and a look for VMs
    assert check_bandwidth(world.crossed, RATE) > 0.95 * RATE * MINUTE, "the line was never full"

    # Every turn has its point, or is told to be missed, and nobody waits for long.
    ordinary = [name for name in intervals if name.startswith("vm-")]
    missed = {name: fleet.check_turns(name, intervals[name]) for name in ordinary}
    for name in ordinary:
        away = AWAY[1] - AWAY[0] + 8 * MINUTE if name in CUT_OFF else 0  # and the pause after four failures
        assert max(fleet.waits(name)) <= max(2 * intervals[name] + 180, 420) + away, name
        assert len(fleet.waits(name)) + missed[name] >= HOUR // intervals[name] - 3, name
    # While the line is full, or the agent is started anew, as many may go by as fit into the longest wait of above.
    few = 15 if LONG else 420 // MINUTE
    assert all(missed[name] <= few if name not in CUT_OFF else missed[name] >= 5 for name in MINUTELY), missed
    print(f"{sum(missed.values())} turns missed of {sum(len(fleet.waits(name)) for name in ordinary)}")

    check_retries(fleet, stopped)
    assert not vms["down"].held
    assert len(world.told("cycle.busy", vm="busy")) == 1
    assert min(one.begun for one in vms["busy"].cycles if one.verdict is Verdict.DONE) > 600
    lost = [one for _, one in world.told("cycle.failed", vm="robbed") if one.fields["error"] == "LeaseLostError"]
    assert was_robbed and len(lost) == 1
    assert sorted(vms["robbed"].held)[-1] >= 9
    late = [one.begun for one in vms["quickened"].cycles if one.begun > 35 * MINUTE]
    assert len(late) >= 11
    assert [one.fields["interval_seconds"] for _, one in world.told("vm.changed", vm="quickened")] == [120]
    assert 20 * MINUTE < world.told("vm.added", vm="added")[0][0] <= 21 * MINUTE + 30
    assert len(vms["added"].held) >= 6
    gone = world.told("vm.removed", vm="removed")[0][0]
    assert 25 * MINUTE < gone <= 26 * MINUTE + 30
    assert max(one.begun for one in vms["removed"].cycles) <= gone

    # Every point restores, those included that nobody was told of.
    whole = list(vms) if LONG else [*ordinary[::6], "busy", "robbed", "quickened", "removed", "added"]
    restored = fleet.check_points(whole, every=True)
    restored += fleet.check_points([name for name in vms if name not in whole and name != "down"], every=False)
    assert restored > 300
    assert not verify.verify(fleet.store, fleet.host, vms["robbed"].found, full=True, workers=WORKERS).damaged
    print(f"{restored} points restored of {sum(len(vm.held) for vm in vms.values())}")


def check_retries(fleet: Fleet, stopped: float) -> None:
    """After failures the next attempt comes by the table, later only by what others are under way."""
    by_vm: dict[str | None, list[tuple[float, str, int]]] = defaultdict(list)
    for at, event in fleet.world.told("cycle.failed", "cycle.started"):
        by_vm[event.vm].append((at, event.name, int(str(event.fields.get("failures", 0)))))
    seen = Counter[int]()
    latest = 180 if LONG else 120  # while the line is full
    for vm, told in by_vm.items():
        for (at, name, failures), (following, _, _) in itertools.pairwise(told):
            if name == "cycle.failed" and not at < stopped <= following:
                wanted = timing.RETRY_MINUTES[failures - 1] if failures <= 5 else timing.RETRY_LATER_MINUTES
                assert wanted * MINUTE - 0.01 <= following - at <= wanted * MINUTE + latest, (vm, failures)
                seen[failures] += 1
    assert seen[1] >= 5 and all(seen[number] for number in range(1, 6)), seen
    print(f"retries by failures in a row: {dict(sorted(seen.items()))}")


def check_memory(early: Counter[str], late: Counter[str]) -> None:
    """Half an hour and a thousand cycles later the agent holds no more than before, but for what is under way."""
    ours = "replica.daemon.events.Event"  # which the test keeps
    grown = {kind: (early[kind], count) for kind, count in late.items() if count > 1.1 * early[kind] + 60}
    assert not grown.keys() - {ours}, grown


def _half_an_hour_of_jumps(folder: Path) -> Fleet:
    """24 VMs at two minutes; the clock on the wall is put forward an hour, and back, while cycles are under way."""
    terms = AgentTerms(concurrency=CONCURRENCY, prune_seconds=600, gc_seconds=900)
    fleet = Fleet(folder, {f"vm-{number:02}": 120 for number in range(24)}, terms)
    jumps = {8 * MINUTE: HOUR, 18 * MINUTE: -HOUR}
    jumped: list[float] = []

    def jump(unit: Unit) -> None:
        fleet._begin(unit)
        due = [at for at in jumps if at not in jumped and fleet.world.seconds >= at]
        if due and unit.task is Task.CYCLE:
            jumped.append(due[0])
            fleet.world.at(fleet.world.seconds + 0.3, lambda: fleet.clock.jump(jumps[due[0]]))

    fleet.world.before_unit = jump
    fleet.change_now_and_then(HOUR / 2, every_seconds=1)
    assert fleet.world.run(HOUR / 2, status_folder=folder / "state").clean
    assert jumped == list(jumps)
    return fleet


@pytest.mark.skipif(sys.platform == "win32", reason="the state folder's locks are held by the process there")
def test_a_clock_that_jumps_an_hour_either_way_and_the_same_seed_gives_the_same_hour(tmp_path: Path) -> None:
    fleet = _half_an_hour_of_jumps(tmp_path / "one")
    for name, vm in fleet.vms.items():
        waits = fleet.waits(name)
        assert max(waits) <= 2 * 120 + 60, name
        assert 13 <= len(waits) <= 18, name  # neither stopped nor flooded
        assert len(vm.cycles) <= 20, name
        told = [int(str(one.fields["turns"])) for _, one in fleet.world.told("cycle.missed", vm=name)]
        assert any(28 <= turns <= 31 for turns in told), (name, told)  # by the clock on the wall, an hour went by
    assert not fleet.world.told("vm.stopped", "cycle.busy")
    assert fleet.check_points(list(fleet.vms), every=True) > 300
    again = _half_an_hour_of_jumps(tmp_path / "two")
    assert [(at, one.name, one.vm) for at, one in again.world.events] == [
        (at, one.name, one.vm) for at, one in fleet.world.events
    ]
    assert again.world.crossed == fleet.world.crossed
