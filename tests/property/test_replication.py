"""The engine against a model: disks that are bytearrays, and a dictionary of what they were at each recovery point."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replica import catalog, cycle, history, packer, protection, scan, verify
from replica.errors import GodwitError
from replica.hydrate import restore_files
from replica.lease import TERM
from replica.model import Point
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from replica.vault import Vault
from tests.support.encryption import give_key, vault_for
from tests.support.engine import BLOCK, FakeClock, make_host, random_blocks, restore_disk
from tests.support.store_doubles import CrashingStore, CrashMode, SimulatedCrash
from vhdx.formats import open_disk
from vhdx.osfile import open_file

MOST_BLOCKS = 40
HOSTS = 2


class Replication(RuleBasedStateMachine):
    """Writes to the disks of a VM, cycles by two machines, crashes, and restores of any point."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store: Store = MemoryStore("property")
        self.clock = FakeClock()
        self.hosts = [make_host(self.folder / f"state{n}", name=f"host-{n}", clock=self.clock) for n in range(HOSTS)]
        self.disks: dict[Path, bytearray] = {}
        self.states: dict[int, dict[int, bytes]] = {}  # point → disk number → content
        self.numbers: dict[Path, int] = {}
        self.made = 0

    @initialize(
        blocks=st.integers(1, MOST_BLOCKS),
        tail=st.sampled_from([0, 512, 4096]),
        seed=st.integers(0, 99),
        encrypted=st.booleans(),
    )
    def protect(self, blocks: int, tail: int, seed: int, encrypted: bool) -> None:
        vault: Vault | None = None
        if encrypted:
            give_key(self.store)
            vault = vault_for()
            self.store = vault.around(self.store)
        path = self._new_disk(blocks * BLOCK + tail, seed)
        catalog.init_store(self.store, self.hosts[0])
        self.vm, chosen = protection.protect(
            self.store, self.hosts[0], tenant="default", name="vm", disks=[path], vault=vault
        )
        self.numbers = {Path(one.path): one.number for one in chosen.sources}

    def _new_disk(self, size: int, seed: int) -> Path:
        path = self.folder / f"disk{self.made}.img"
        self.made += 1
        data = bytearray(size)
        filled = random_blocks(seed, max(1, size // BLOCK // 2))[:size]
        data[: len(filled)] = filled
        self.disks[path] = data
        with path.open("wb") as file:
            file.truncate(size)
            file.write(filled)
        return path

    def _disk(self, pick: int) -> tuple[Path, bytearray]:
        return sorted(self.disks.items())[pick % len(self.disks)]

    @rule(pick=st.integers(0, 3), at=st.floats(0, 1), length=st.integers(1, 3 * BLOCK), seed=st.integers(0, 999))
    def write(self, pick: int, at: float, length: int, seed: int) -> None:
        path, data = self._disk(pick)
        offset = int(at * (len(data) - 1))
        new = random_blocks(seed, 4)[: min(length, len(data) - offset)]
        data[offset : offset + len(new)] = new
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(new)

    @rule(pick=st.integers(0, 3), at=st.floats(0, 1), length=st.integers(1, 12 * BLOCK), punched=st.booleans())
    def zero(self, pick: int, at: float, length: int, punched: bool) -> None:
        path, data = self._disk(pick)
        offset = int(at * (len(data) - 1))
        length = min(length, len(data) - offset)
        data[offset : offset + length] = bytes(length)
        file = open_file(path, writable=True)
        if punched:
            file.punch_hole(offset, length)
        else:
            file.pwrite(offset, bytes(length))
        file.close()

    @rule(pick=st.integers(0, 3), sectors=st.integers(1, MOST_BLOCKS * BLOCK // 512))
    def resize(self, pick: int, sectors: int) -> None:
        path, data = self._disk(pick)
        size = sectors * 512
        data[size:] = bytes(max(0, size - len(data)))
        with path.open("r+b") as file:
            file.truncate(size)

    @precondition(lambda self: len(self.disks) < 3)
    @rule(blocks=st.integers(1, 8), seed=st.integers(0, 99))
    def add_disk(self, blocks: int, seed: int) -> None:
        self._new_disk(blocks * BLOCK, seed)
        self._update()

    @precondition(lambda self: len(self.disks) > 1)
    @rule(pick=st.integers(0, 3))
    def remove_disk(self, pick: int) -> None:
        path, _ = self._disk(pick)
        del self.disks[path]
        self._update()

    def _update(self) -> None:
        self.clock.advance(TERM.total_seconds() + 1)
        chosen = protection.update(self.store, self.hosts[0], self.vm, disks=sorted(self.disks))
        self.numbers = {Path(one.path): one.number for one in chosen.sources}

    def _now(self) -> dict[int, bytes]:
        return {self.numbers[path]: bytes(data) for path, data in self.disks.items()}

    @rule(host=st.integers(0, HOSTS - 1))
    def replicate(self, host: int) -> None:

        self.clock.advance(TERM.total_seconds() + 1)
        point = cycle.replicate(self.store, self.hosts[host], self.vm)
        self.states[point.point] = self._now()

    @rule(places=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=6))
    def run_for_a_while(self, places: list[tuple[float, bool]]) -> None:
        """Several cycles with a small change before each, so that maps pile up and merge."""
        for number, (at, is_zero) in enumerate(places):
            if is_zero:
                self.zero(0, at, BLOCK, False)
            else:
                self.write(0, at, BLOCK, number)
            self.replicate(0)

    @rule(host=st.integers(0, HOSTS - 1), at=st.integers(0, 9), mode=st.sampled_from(CrashMode))
    def crash_in_a_cycle(self, host: int, at: int, mode: CrashMode) -> None:

        self.clock.advance(TERM.total_seconds() + 1)
        store = CrashingStore(self.store, at=at, mode=mode)
        newest = max(self.states, default=0)
        try:
            point = cycle.replicate(store, self.hosts[host], self.vm)
            self.states[point.point] = self._now()
        except (SimulatedCrash, GodwitError):
            # The manifest may have been written before the crash: then the point exists.
            for found in history.points(self.store, self.vm.keys):
                assert isinstance(found, Point)
                if found.point > newest:
                    self.states[found.point] = self._now()

    @rule(pick=st.integers(0, 99))
    def restore(self, pick: int) -> None:
        if self.states:
            self._check_point(sorted(self.states)[pick % len(self.states)])

    def _check_point(self, number: int) -> None:
        point = history.point(self.store, self.vm.keys, number)
        held = self.states[number]
        assert {disk.number for disk in point.disks} == set(held)
        for disk, content in held.items():
            assert restore_disk(self.store, make_host(), self.vm, point, disk) == content

    @precondition(lambda self: self.states)
    @rule(format_=st.sampled_from(["vhdx", "vhd-dynamic", "raw"]))
    def restore_to_a_file(self, format_: str) -> None:
        number = max(self.states)
        point = history.point(self.store, self.vm.keys, number)
        path = self.folder / "restored"
        for disk in point.disks:
            restore_files(
                self.store,
                make_host(),
                self.vm,
                point,
                disks=[disk],
                paths=[path],
                format_=format_,  # type: ignore[arg-type]
                overwrite=True,
            )
            with open_disk(path) as opened:
                content = self.states[number][disk.number]
                assert opened.read_at(0, len(content)) == content

    @invariant()
    def points_are_those_published(self) -> None:
        if hasattr(self, "vm"):
            listed = [one.point for one in history.points(self.store, self.vm.keys) if isinstance(one, Point)]
            assert listed == sorted(self.states)

    def teardown(self) -> None:
        try:
            for number in self.states:
                self._check_point(number)
            if self.states:
                assert not verify.verify(self.store, make_host(), self.vm, full=True).damaged
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            # A failure is kept, with all that it refers to, while smaller ones are looked for: let go of the content.
            self.states.clear()
            self.disks.clear()
            for info in list(self.store.list("")):
                self.store.delete(info.key)


class TestReplication(Replication.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=25, stateful_step_count=30, deadline=None)

    @pytest.fixture(autouse=True)
    def _small_units(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make segments, batches, windows and merges small, so that few blocks cross their borders."""
        monkeypatch.setattr(packer, "SEGMENT_FRAMES", 5)
        monkeypatch.setattr(packer, "WAITING_ENTRIES", 7)
        monkeypatch.setattr(scan, "BATCH_BLOCKS", 3)
        monkeypatch.setattr("replica.maptable.PAGE_ENTRIES", 4)
        monkeypatch.setattr("replica.maptable.PART_ENTRIES", 11)
        monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 3)
        monkeypatch.setattr("replica.blockmap.LEVEL_ZERO_ENTRIES", 2)
        monkeypatch.setattr("replica.blockmap.WINDOW_BLOCKS", 16)
        monkeypatch.setattr(scan, "WINDOW_BLOCKS", 16)
