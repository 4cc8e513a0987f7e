"""Seeded random schedules: two agents in turns, crashes, faults, clocks that jump, disks written to, old points pruned.

The VM's disks are raw files or checkpoint chains; some VMs are encrypted, and their tenant's key is rotated; another
VM is seeded from this one; thin segments are rewritten, and repairs run where there is nothing to repair.
Whatever happens, every point that is listed restores byte for byte to what the disks were when it was taken, no point
that was reported is missing unless pruned, and in the end a cycle that nobody disturbs succeeds.

GODWIT_SOAK says how many schedules to run, GODWIT_SOAK_FIRST from which seed on; GODWIT_SOAK_SEED runs that one alone.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from replica import (
    catalog,
    cycle,
    garbage,
    history,
    lease,
    pins,
    prune,
    repair,
    retention,
    rewriting,
    tenantkey,
    verify,
)
from replica.catalog import ProtectedVm
from replica.errors import GodwitError, LeaseHeldError, LeaseLostError, UsageError
from replica.host import Host
from replica.lease import TERM
from replica.model import Point
from replica.protection import protect, update
from replica.source import OpenDisk, open_for_reading
from replica.stores.memory import MemoryStore
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import ObjectInfo, Store
from replica.tenantkey import Secret
from replica.usage import Terms
from replica.workers import Workers
from tests.support.encryption import OTHER_SECRET, SECRET, give_key, sealed, vault_for
from tests.support.engine import FakeClock, make_host, random_blocks, restore_disk
from tests.support.soak_disks import ChainDisks, RawDisks, SoakDisks
from tests.support.store_doubles import Fault, FaultKind, FaultyStore, SimulatedCrash
from tests.support.turns import Agent, GatedStore, InlineExecutor
from vhdx.disk import Disk
from vhdx.errors import DiskError

SCHEDULES = int(os.environ.get("GODWIT_SOAK", "200"))
FIRST = int(os.environ.get("GODWIT_SOAK_FIRST", "0"))
ONE_SEED = os.environ.get("GODWIT_SOAK_SEED")
SHARES = 4
EVENTS = 50
WORKERS = Workers(threads=1, uploads=1)
THIN = Terms(percent=60, least_gain_bytes=1)
RULE = retention.parse("all:10m,last:2,hourly:2")


class _LaggingStore(MemoryStore):
    """A store whose listings of a VM may lack the object created last, and show the one that was deleted last."""

    def __init__(self) -> None:
        super().__init__("soak")
        self.lags = False
        self.created = ""
        self.deleted: ObjectInfo | None = None

    def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
        tag = super().create(key, data)
        self.created = key
        return tag

    def delete(self, key: str) -> None:
        self.deleted = next((info for info in super().list(key) if info.key == key), self.deleted)
        super().delete(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        found = {info.key: info for info in super().list(prefix, start_after=start_after)}
        if self.lags and "/vms/" in prefix:
            found.pop(self.created, None)
            ghost = self.deleted
            if ghost is not None and ghost.key.startswith(prefix) and ghost.key > start_after:
                found[ghost.key] = ghost
        return iter([found[key] for key in sorted(found)])


class _Job:
    """What an agent was told to do, and what came of it."""

    def __init__(self, name: str, host: Host) -> None:
        self.name = name
        self.host = host
        self.read: dict[Path, bytes] = {}  # the disks as they were when a cycle opened them
        self.point: Point | None = None
        self.pinned: int | None = None
        self.epoch = 0  # of the lease that it took
        self.is_disturbed = False  # by faults, another agent, or whoever writes to the disks


class Schedule:
    """One random schedule and all that must hold of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw = random.Random(seed)
        self.folder = folder
        self.store = _LaggingStore()
        self.hosts = [make_host(folder / f"state{n}", name=f"host-{n}", clock=FakeClock()) for n in range(2)]
        self.agents: list[tuple[Agent, _Job] | None] = [None, None]
        self.published: dict[int, dict[Path, bytes]] = {}  # what is in the store: point → disk file → content
        self.reported: set[int] = set()  # points that a cycle returned
        self.pruned: set[int] = set()
        self.pinned: set[int] = set()
        self.outcomes: Counter[str] = Counter()
        self.fenced = 0  # nothing of an earlier epoch may be published any more
        self.event = 0
        self.asleep_until = [0, 0]  # by agent, the event that wakes it
        self.is_stale = False  # the settings name files that are no longer what is to be protected
        folder.mkdir()
        self.disks: SoakDisks = (ChainDisks if seed % 5 == 3 else RawDisks)(self.draw, folder)
        self.secret: Secret | None = SECRET if seed % 4 == 1 else None  # which opens the key, if any
        catalog.init_store(self.store, self.hosts[0])
        if self.secret is not None:
            give_key(self.store)
        vault = None if self.secret is None else vault_for(self.secret)
        self.view: Store = self.store if vault is None else vault.around(self.store)  # what a reader sees
        self.found, _ = protect(
            self.view, self.hosts[0], tenant="default", name="vm", disks=self.disks.paths, vault=vault
        )
        self.clone = folder / "clone.img"  # the disk of another VM, which is not written to
        self.clone.write_bytes(random_blocks(self.draw.randrange(40), 2) + random_blocks(1, 3))

    # --- what happens

    def run(self) -> None:
        for self.event in range(EVENTS):
            self._happen()
        for turn in range(len(self.agents)):
            while self.agents[turn] is not None:
                self._let_go_on(turn, 1000)
        self.store.lags = False
        self._finish_cleanly()

    def _happen(self) -> None:
        self.store.lags = self.draw.random() < 0.1
        event = self.draw.choices(
            [
                self._work,
                self._write_to_a_disk,
                self._let_time_pass,
                self._jump,
                self._kill,
                self._fall_asleep,
                self._check_points,
            ],
            [60, 12, 14, 5, 6, 6, 3],
        )[0]
        event()

    def _work(self) -> None:
        turn = self.draw.randrange(len(self.agents))
        if self.asleep_until[turn] > self.event:
            turn = 1 - turn
        if self.agents[turn] is None:
            self._start(turn)
        self._let_go_on(turn, self.draw.choice([1, 2, 3, 5, 8, 1000, 1000]))

    def _kill(self) -> None:
        turn = self.draw.randrange(len(self.agents))
        at_work = self.agents[turn]
        if at_work is not None:
            self._others_are_disturbed(turn)
            at_work[0].kill(applied=self.draw.random() < 0.5)
            self._settle(turn)

    def _fall_asleep(self) -> None:
        """Let an agent sleep in the middle of what it does, while the other may do all sorts of things."""
        turn = self.draw.randrange(len(self.agents))
        at_work = self.agents[turn]
        if at_work is None or self.asleep_until[1 - turn] > self.event:
            return
        while self.draw.random() < 0.95 and self.agents[turn] is not None:
            kind, key = at_work[0].next_request
            if kind == "create" and key.startswith(self.found.keys.manifests):  # the worst of all moments
                break
            self._let_go_on(turn, 1)
        self.asleep_until[turn] = self.event + self.draw.choice([2, 4, 8, 20])
        self._clock(self.hosts[1 - turn]).advance(TERM.total_seconds() + 1)

    def _let_time_pass(self) -> None:
        seconds = self.draw.choice([1, 30, 61, 200, TERM.total_seconds() + 1, 3700, 9000])
        for host in self.hosts:
            self._clock(host).advance(seconds)

    def _jump(self) -> None:
        self._clock(self.draw.choice(self.hosts)).jump(self.draw.choice([-3600, 3600]))

    def _write_to_a_disk(self) -> None:
        self.is_stale |= self.disks.change()
        for at_work in self.agents:
            if at_work is not None:
                at_work[1].is_disturbed = True

    @staticmethod
    def _clock(host: Host) -> FakeClock:
        assert isinstance(host.clock, FakeClock)
        return host.clock

    # --- agents

    def _start(self, turn: int) -> None:
        # Now and then the second process of one machine.
        host = self.hosts[turn if self.draw.random() < 0.8 else 1 - turn]
        names = ["replicate", "update", "prune", "pin", "collect", "verify", "rewrite", "repair", "seed", "rotate"]
        job = _Job(self.draw.choices(names, [54, 6, 10, 6, 14, 4, 10, 3, 5, 3])[0], host)
        if self.is_stale and self.draw.random() < 0.7:
            job.name = "update"
        work: Callable[[Store, _Job], None] = getattr(self, f"_{job.name}")
        stores: list[Store] = []
        agent = Agent(f"{job.name} on {host.host_name}", lambda: work(stores[0], job))
        stores.append(self._way_to_the_store(agent, job))
        self.agents[turn] = agent, job
        job.is_disturbed |= self.agents[1 - turn] is not None or self.is_stale
        agent.start()

    def _way_to_the_store(self, agent: Agent, job: _Job) -> Store:
        store: Store = GatedStore(self.store, agent, lambda kind, key: self._note(kind, key, job))
        if self.draw.random() < 0.5:
            job.is_disturbed = True
            chance = self.draw.choice([0.02, 0.1, 0.3])
            kinds = self.draw.sample(list(FaultKind), self.draw.randint(1, 4))
            if job.name == "repair" and self.secret is not None:
                # What is sealed and was read short cannot be told from what is damaged, which repair replaces.
                kinds = [kind for kind in kinds if kind is not FaultKind.SHORT_BODY]
            faults = [Fault(kind, probability=chance) for kind in kinds]
            store = FaultyStore(store, faults, seed=self.draw.randrange(1000))
        if self.draw.random() < 0.7:
            clock = self._clock(job.host)
            store = ResilientStore(
                store,
                Patience(attempts=self.draw.choice([2, 4, 8])),
                sleep=clock.advance,
                clock=clock.monotonic,
                chance=self.draw.random,
            )
        return self._sealed(store)

    def _sealed(self, store: Store) -> Store:
        """Return the store as a process sees it that starts now."""
        if self.secret is None:
            return store
        for secret in (SECRET, OTHER_SECRET):
            try:
                tenantkey.open_master(self.store, "default", secret)
            except GodwitError:
                continue
            self.secret = secret
            return sealed(store, secret)
        raise AssertionError("nothing opens the tenant's key any more")

    def _let_go_on(self, turn: int, requests: int) -> None:
        at_work = self.agents[turn]
        assert at_work is not None
        self._others_are_disturbed(turn)
        if not at_work[0].is_over:
            at_work[0].go_on(requests)
        if at_work[0].is_over:
            self._settle(turn)

    def _others_are_disturbed(self, turn: int) -> None:
        for number, at_work in enumerate(self.agents):
            if number != turn and at_work is not None:
                at_work[1].is_disturbed = True

    def _note(self, kind: str, key: str, job: _Job) -> None:
        """Keep account of the points in the store, request by request."""
        if key == self.found.keys.lease and kind == "replace":
            job.epoch = lease.read(self.view, self.found.keys)[0].epoch
        if not key.startswith(self.found.keys.manifests) or kind not in ("create", "delete"):
            return
        number = int(key.removeprefix(self.found.keys.manifests).removesuffix(".json"))
        if kind == "delete":
            assert job.name == "prune", f"{job.name} deleted point {number}"
            assert any(number < other for other in self.published.keys() - self.pruned), "the newest point was pruned"
            self.pruned.add(number)
            return
        made = history.read(self.view, self.found.keys, number)
        if number not in self.published:
            assert made.epoch == job.epoch
            assert made.epoch >= self.fenced, "a writer whose lease was taken over has published"
            self.fenced = made.epoch
        if isinstance(made, Point):
            self.pruned.discard(number)  # pinned at the last moment, and put back
            if number not in self.published:
                assert job.name in ("replicate", "rewrite", "repair")
                assert bool(made.repeats) == (job.name == "rewrite")
                self.published[number] = dict(self.published[made.repeats] if made.repeats else job.read)

    def _settle(self, turn: int) -> None:
        """Judge how an agent ended."""
        at_work, self.agents[turn] = self.agents[turn], None
        assert at_work is not None
        agent, job = at_work
        error = agent.error
        self.outcomes[f"{job.name}: {type(error).__name__ if error else 'done'}"] += 1
        if error is not None:
            # What a dead process had met before, in work that it had begun, may come up in the place of its death.
            expected = (GodwitError, DiskError, SimulatedCrash) if agent.died else (GodwitError, DiskError)
            if not isinstance(error, expected):
                raise error
            if not job.is_disturbed and not agent.died and not isinstance(error, LeaseHeldError | UsageError):
                raise error
        if error is None:
            # Whoever has done its work under a lease has seen to it that no earlier holder publishes.
            self.fenced = max(self.fenced, job.epoch)
        if job.point is not None:
            self.reported.add(job.point.point)
        if job.pinned is not None:
            self.pinned.add(job.pinned)

    # --- jobs

    def _replicate(self, store: Store, job: _Job) -> None:
        found = self._find(store)
        job.point = cycle.replicate(store, job.host, found, workers=WORKERS, open_disk=self._opener(job))

    @staticmethod
    def _opener(job: _Job) -> OpenDisk:
        def open_disk(path: Path) -> Disk:
            disk = open_for_reading(path)
            job.read[path] = disk.read_at(0, disk.size)
            return disk

        return open_disk

    def _update(self, store: Store, job: _Job) -> None:
        chosen = self.disks.paths[: self.draw.randint(1, 2)]
        update(store, job.host, self._find(store), disks=chosen)
        self.is_stale = chosen != self.disks.paths[: len(chosen)]  # it may have changed while this was at work

    def _rewrite(self, store: Store, job: _Job) -> None:
        found = self._find(store)
        references = garbage.survey(store, "default", workers=WORKERS)
        thin = rewriting.plan(store, job.host, found, THIN, is_lent=references.is_lent)
        done = rewriting.rewrite(store, job.host, found, thin, workers=WORKERS)
        assert not done.damaged or job.is_disturbed
        if done.point:
            job.point = history.point(self.view, self.found.keys, done.point)
            self.outcomes["rewrite: a point"] += 1

    def _repair(self, store: Store, job: _Job) -> None:
        found = self._find(store)
        planned = repair.plan(store, job.host, found, workers=WORKERS)
        done = repair.repair(store, job.host, found, planned, workers=WORKERS, open_disk=self._opener(job))
        job.point = done.point

    def _seed(self, store: Store, job: _Job) -> None:
        """Make the other VM, seeded from this one, or a point more of it."""
        if "clone" not in catalog.names(self.store, "default"):
            vault = getattr(store, "vault", None)
            protect(
                store,
                job.host,
                tenant="default",
                name="clone",
                disks=[self.clone],
                seed_from="vm",
                vault=vault,
            )
        cycle.replicate(store, job.host, catalog.find(store, "default", "clone"), workers=WORKERS)

    def _rotate(self, store: Store, job: _Job) -> None:
        if self.secret is not None:
            new = OTHER_SECRET if self.secret == SECRET else SECRET
            tenantkey.rotate(store, job.host, "default", self.secret, new)

    def _prune(self, store: Store, job: _Job) -> None:
        prune.prune(store, job.host, self._find(store), rule=RULE)

    def _pin(self, store: Store, job: _Job) -> None:
        number = self.draw.choice(sorted(self.published) or [1])
        job.pinned = pins.pin(store, job.host, self._find(store), number).point

    def _collect(self, store: Store, job: _Job) -> None:
        references = garbage.survey(store, "default", workers=WORKERS)
        grace = self.draw.choice([garbage.GRACE, timedelta(minutes=10)])
        for name in catalog.names(store, "default"):
            found = catalog.find(store, "default", name)
            garbage.collect(store, job.host, found, references, grace=grace, workers=WORKERS)

    def _verify(self, store: Store, job: _Job) -> None:
        verify.verify(store, job.host, self._find(store), full=self.draw.random() < 0.5, workers=WORKERS)

    @staticmethod
    def _find(store: Store) -> ProtectedVm:
        return catalog.find(store, "default", "vm")

    # --- what must hold

    def _check_points(self) -> None:
        lags, self.store.lags = self.store.lags, False
        listed = list(history.points(self.view, self.found.keys))
        for one in listed:
            assert isinstance(one, Point), one
            self._check_point(one)
        points = [one for one in listed if isinstance(one, Point)]
        numbers = {one.point for one in points}
        assert numbers == self.published.keys() - self.pruned
        assert not (self.pinned | self.reported) - numbers - (self.pruned - self.pinned), "points were lost"
        epochs = [one.epoch for one in points]
        assert epochs == sorted(set(epochs))
        self._check_clone()
        self.store.lags = lags

    def _check_point(self, point: Point) -> None:
        held = self.published[point.point]
        files = {disk.number: Path(disk.source["files"].partition("\n")[0]) for disk in point.disks}
        assert set(files.values()) == held.keys()
        elsewhere = make_host(name="elsewhere")
        for disk in point.disks:
            restored = restore_disk(self.view, elsewhere, self.found, point, disk.number)
            assert restored == held[files[disk.number]], f"{disk.name} of point {point.point}"

    def _check_clone(self) -> None:
        if "clone" not in catalog.names(self.view, "default"):
            return
        try:
            found = catalog.find(self.view, "default", "clone")
        except GodwitError:  # protecting it was cut off
            return
        for point in history.points(self.view, found.keys):
            assert isinstance(point, Point), point
            assert restore_disk(self.view, make_host(name="elsewhere"), found, point) == self.clone.read_bytes()

    def _finish_cleanly(self) -> None:
        """Once leases have run out, whatever the clocks did: every kind of work succeeds, and nothing is lost by it."""
        for host in self.hosts:
            self._clock(host).advance(24 * 3600)
        self._write_to_a_disk()
        for turn, name in enumerate(["update", "replicate", "prune", "collect", "rewrite", "repair", "collect"]):
            for host in self.hosts:
                self._clock(host).advance(5400)
            job = _Job(name, self.hosts[turn % 2])
            work: Callable[[Store, _Job], None] = getattr(self, f"_{name}")
            work(self._sealed(_Noted(self, job)), job)
            if job.point is not None:
                self.reported.add(job.point.point)
        self._check_points()
        report = verify.verify(self.view, self.hosts[0], self.found, full=True, workers=WORKERS)
        assert not report.damaged, report


class _Noted(GatedStore):
    """A way to the store without gates: only account is kept."""

    def __init__(self, schedule: Schedule, job: _Job) -> None:
        agent = Agent("undisturbed", lambda: None)
        agent.allow(1 << 60)
        super().__init__(schedule.store, agent, lambda kind, key: schedule._note(kind, key, job))


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few blocks cross the borders of everything, and do all work in the thread that asks for it."""
    for module in ("cycle", "restore", "examination", "garbage", "rewriting"):
        monkeypatch.setattr(f"replica.{module}.ThreadPoolExecutor", InlineExecutor)
    for name, value in (
        ("packer.SEGMENT_FRAMES", 3),
        ("packer.WAITING_ENTRIES", 7),
        ("scan.BATCH_BLOCKS", 3),
        ("scan.WINDOW_BLOCKS", 8),
        ("maptable.PAGE_ENTRIES", 4),
        ("maptable.PART_ENTRIES", 7),
        ("blockmap.MERGE_MAPS", 3),
        ("blockmap.LEVEL_ZERO_ENTRIES", 2),
        ("blockmap.WINDOW_BLOCKS", 8),
        ("rewriting.WINDOW_BLOCKS", 8),
        ("healing.WINDOW_BLOCKS", 8),
        ("usage.GAIN_PER_MAP_BYTE", 0),
        ("garbage.BATCH_OBJECTS", 3),
        ("prune.BATCH_POINTS", 2),
    ):
        monkeypatch.setattr(f"replica.{name}", value)


def _seeds(share: int) -> Iterator[int]:
    if ONE_SEED is not None:
        return iter([int(ONE_SEED)] if share == 0 else [])
    return iter(range(FIRST + share, FIRST + SCHEDULES, SHARES))


@pytest.mark.parametrize("share", range(SHARES))
def test_every_point_restores_whatever_the_schedule(share: int, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in _seeds(share):
        schedule = Schedule(seed, tmp_path / str(seed))
        try:
            schedule.run()
        except Exception as error:
            pytest.fail(f"schedule {seed} failed (GODWIT_SOAK_SEED={seed} runs it again): {error!r}")
        outcomes += schedule.outcomes
        shutil.rmtree(schedule.folder)
    print("\n".join(f"{count:6} {outcome}" for outcome, count in sorted(outcomes.items())))
    if ONE_SEED is None:
        # The schedules are worth running only as long as all of this happens in them.
        lost = sum(count for outcome, count in outcomes.items() if outcome.endswith(LeaseLostError.__name__))
        assert lost >= SCHEDULES / SHARES / 25, outcomes
        for outcome in ("replicate: done", "replicate: SimulatedCrash", "rewrite: a point"):
            assert outcomes[outcome] >= SCHEDULES / SHARES / 10, outcomes
        for outcome in ("seed: done", "repair: done", "rotate: done"):
            assert outcomes[outcome] >= SCHEDULES / SHARES / 25, outcomes
