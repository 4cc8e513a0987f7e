"""A verdict through a history of points: carried on while what it rests upon stays, renewed where that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cli.convertibility import lines
from conversion import inspection
from conversion.finding import RULES_VERSION
from replica import catalog, cycle, history, protection
from replica.catalog import ProtectedVm
from replica.errors import StoreUnavailableError
from replica.generation import verdict as judging
from replica.generation.convertibility import Convertibility, Inspected, Verdict
from replica.generation.freshness import REST, Freshness
from replica.health import journal
from replica.health.observation import EventKind
from replica.health.observing import convertibility_of, observe
from replica.model import Point
from replica.protection import MachineWishes
from replica.stores.memory import MemoryStore
from tests.support import conversion_disks as disks
from tests.support.conversion_disks import PLAIN_SECTORS, plain_places
from tests.support.engine import BLOCK, FakeClock, make_host, random_blocks

pytestmark = pytest.mark.skipif(bool(disks.missing()), reason=disks.missing() or "all is there")

BAD = "PARTLABEL=a / ext4 defaults 0 1\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return a disk that converts, and the same with another fstab, that does not."""
    folder = tmp_path_factory.mktemp("disks")
    made = []
    for name, changes in (("good", {}), ("bad", {"fstab": BAD})):
        (folder / name).mkdir()
        esp = disks.make_esp(folder / name, disks.esp_files())
        root = disks.make_root(folder / name, disks.root_files(**changes))  # type: ignore[arg-type]
        made.append(
            disks.make_disk(plain_places(esp, root), PLAIN_SECTORS).to_file(folder / f"{name}.raw").read_bytes()
        )
    assert len(made[0]) == len(made[1])
    return made[0], made[1]


class Vm:
    """A VM of one disk that converts, and how often its cycles inspected it."""

    def __init__(self, folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, *, inspects: bool = True) -> None:
        self.path = folder / "disk.raw"
        self.path.write_bytes(content)
        self.store = MemoryStore("fresh")
        self.clock = FakeClock()
        self.host = replace(make_host(folder / "state", clock=self.clock), inspects=inspects)
        catalog.init_store(self.store, self.host)
        self.found: ProtectedVm
        self.found, _ = protection.protect(self.store, self.host, tenant="default", name="vm", disks=[self.path])
        self.inspections = 0
        self.seconds = 0.0
        inner = inspection.inspect

        def inspect(device: object) -> object:
            self.inspections += 1
            self.clock.advance(self.seconds)
            return inner(device)  # type: ignore[arg-type]

        monkeypatch.setattr(judging, "inspect", inspect)

    def write(self, content: bytes) -> None:
        """Make the disk hold ``content``, as one that was written to in place."""
        with self.path.open("r+b") as file:
            file.write(content)

    def put(self, block: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(block * BLOCK)
            file.write(data)

    def replicate(self) -> Point:
        return cycle.replicate(self.store, self.host, self.found)

    def events(self) -> list[tuple[str, tuple[int, ...], str]]:
        told = journal.event_keys(self.store, self.found.keys)
        read = [journal.read_event(self.store, one) for one in told if one.kind is EventKind.CONVERTIBILITY]
        return [(one.result, one.points, one.detail) for one in read]


@pytest.fixture
def vm(tmp_path: Path, images: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> Vm:
    return Vm(tmp_path, images[0], monkeypatch)


def said(point: Point) -> Convertibility:
    assert point.convertibility is not None
    return point.convertibility


def unread_block(found: Convertibility) -> int:
    read = {block for first, end in found.inspected[0].blocks for block in range(first, end)}
    return next(block for block in range(found.inspected[0].size // BLOCK) if block not in read)


def test_the_first_point_has_it_and_the_manifest_keeps_it(vm: Vm) -> None:
    point = vm.replicate()
    assert said(point).verdict is Verdict.CONVERTIBLE
    assert history.point(vm.store, vm.found.keys, 1) == point
    assert convertibility_of(point) == "convertible"


def test_nothing_is_inspected_where_nothing_changed(vm: Vm) -> None:
    first = vm.replicate()
    for _ in range(3):
        assert said(vm.replicate()) == said(first)
    assert vm.inspections == 1


def test_nothing_is_inspected_where_something_else_changed(vm: Vm) -> None:
    first = said(vm.replicate())
    vm.put(unread_block(first), random_blocks(1, 1))
    point = vm.replicate()
    assert point.cycle.changed_blocks == 1
    assert said(point) == first
    assert vm.inspections == 1


@pytest.mark.parametrize("zero", [False, True])
def test_any_block_that_was_read_brings_a_new_inspection(vm: Vm, zero: bool) -> None:
    read = [block for first, end in said(vm.replicate()).inspected[0].blocks for block in range(first, end)]
    for number, block in enumerate(read[:: max(1, len(read) // 5)]):
        with vm.path.open("rb") as file:
            file.seek(block * BLOCK)
            old = file.read(BLOCK)
        if zero and not any(old):
            continue
        vm.put(block, bytes(BLOCK) if zero else old[:-1] + bytes([old[-1] ^ 1]))
        before = vm.inspections
        vm.replicate()
        assert vm.inspections == before + 1, number
        vm.put(block, old)
        vm.replicate()


def test_a_change_is_noticed_in_the_very_cycle_and_is_an_event(vm: Vm, images: tuple[bytes, bytes]) -> None:
    vm.replicate()
    vm.write(images[1])
    vm.clock.advance(300)
    second = vm.replicate()
    assert said(second).verdict is Verdict.REFUSED
    assert [one.rule for one in said(second).refusals] == ["fstab-partlabel"]
    assert vm.inspections == 2
    ((result, points, detail),) = vm.events()
    assert (result, points) == ("refused", (2,))
    assert detail.startswith("it was convertible; fstab-partlabel: ")
    seen = observe(vm.store, vm.host, vm.found)
    assert seen.convertibility == "refused"
    vm.clock.advance(300)
    vm.replicate()
    assert len(vm.events()) == 1
    vm.write(images[0])
    vm.clock.advance(300)
    vm.replicate()
    assert [one[0] for one in vm.events()] == ["refused", "convertible"]


def test_an_event_that_cannot_be_written_costs_nothing(
    vm: Vm, images: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm.replicate()
    vm.write(images[1])

    def lost(*_: object) -> None:
        raise StoreUnavailableError("it went away")

    monkeypatch.setattr(journal, "record_event", lost)
    point = vm.replicate()
    assert said(point).verdict is Verdict.REFUSED
    assert vm.replicate().point == 3


def test_new_rules_judge_anew(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.replicate()
    for module in ("replica.generation.freshness", "replica.generation.verdict"):
        monkeypatch.setattr(f"{module}.RULES_VERSION", RULES_VERSION + 1)
    assert said(vm.replicate()).rules == RULES_VERSION + 1
    assert vm.inspections == 2
    vm.replicate()
    assert vm.inspections == 2


def test_an_inspection_that_fails_is_unknown_and_tried_again(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> object:
        raise ValueError("odd")

    with monkeypatch.context() as patched:
        patched.setattr(judging, "inspect", failing)
        point = vm.replicate()
    assert (said(point).verdict, said(point).because) == (
        Verdict.UNKNOWN,
        "the inspection failed: ValueError: odd",
    )
    assert said(vm.replicate()).verdict is Verdict.CONVERTIBLE
    assert [one[0] for one in vm.events()] == ["convertible"]


def test_it_takes_a_hundredth_of_the_time_at_most_and_forgets_no_change(vm: Vm, images: tuple[bytes, bytes]) -> None:
    vm.seconds = 2.0
    vm.replicate()
    vm.write(images[1])
    vm.clock.advance(REST)
    waiting = said(vm.replicate())
    assert (waiting.verdict, waiting.pending, vm.inspections) == (Verdict.CONVERTIBLE, True, 1)
    assert "looks again" in lines(waiting.document())[0]
    vm.clock.advance(REST + 1)  # nothing changed in this cycle; in the one before it did
    assert said(vm.replicate()).verdict is Verdict.REFUSED
    assert vm.inspections == 2


def test_a_clock_that_was_set_back_puts_nothing_off(vm: Vm, images: tuple[bytes, bytes]) -> None:
    vm.seconds = 2.0
    vm.replicate()
    vm.write(images[1])
    vm.clock.jump(-86400)
    assert said(vm.replicate()).verdict is Verdict.REFUSED


def test_it_can_be_switched_off(tmp_path: Path, images: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    vm = Vm(tmp_path, images[0], monkeypatch, inspects=False)
    assert vm.replicate().convertibility is None
    assert vm.inspections == 0
    assert protection.verdict_on(catalog.settings_in_force(vm.store, vm.found), vm.host) is None


def test_a_machine_that_was_described_anew_is_judged_anew(vm: Vm) -> None:
    vm.replicate()
    protection.update(vm.store, vm.host, vm.found, disks=(), wishes=MachineWishes(generation=1))
    assert said(vm.replicate()).verdict is Verdict.NOT_NEEDED
    assert vm.inspections == 1


SIZE = 1 << 30
BEFORE = Convertibility(
    Verdict.CONVERTIBLE,
    FakeClock().now(),
    disk=2,
    rules=RULES_VERSION,
    inspected=(Inspected(0, SIZE, ((0, 1),)), Inspected(2, SIZE, ((0, 1), (5, 7)))),
)


@pytest.mark.parametrize(
    ("disks_now", "holds"),
    [
        ([(0, SIZE), (2, SIZE)], True),
        ([(0, SIZE), (2, SIZE), (3, SIZE)], True),  # one more behind
        ([(0, SIZE), (2, SIZE + BLOCK)], False),  # grown
        ([(0, SIZE), (1, SIZE), (2, SIZE)], False),  # one more before
        ([(2, SIZE)], False),  # one that was before it is gone
        ([(0, SIZE)], False),
    ],
)
def test_other_disks_are_judged_anew(disks_now: Sequence[tuple[int, int]], holds: bool) -> None:
    fresh = Freshness(BEFORE, generation=2, disks=disks_now)
    found = fresh.verdict([], now=BEFORE.judged_at, monotonic=lambda: 0.0)
    assert (found is BEFORE) is holds


def test_where_no_system_was_found_another_disk_may_have_one() -> None:
    nothing = replace(BEFORE, verdict=Verdict.REFUSED, disk=None)
    for count, holds in ((2, True), (3, False)):
        known = [(0, SIZE), (2, SIZE), (3, SIZE)][:count]
        found = Freshness(nothing, generation=2, disks=known).verdict([], now=BEFORE.judged_at, monotonic=lambda: 0.0)
        assert (found is nothing) is holds
