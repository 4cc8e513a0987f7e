"""Failover: a point chosen, the intent written, a machine made of the point and started, and the VM told to be there.

The order of the writes is that of docs/failover.md. Whatever is cut off, the same command goes on from what the
settings say, on this host or on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from replica import catalog, cycle, history
from replica.cycle import Basis
from replica.errors import GodwitError, IntegrityError, PlatformError, StandingError, UsageError
from replica.failover import conversions, transitions
from replica.failover.choosing import Choice, PassedOver, choose
from replica.failover.identity import identities_at_home, identity_of
from replica.failover.means import Means
from replica.failover.proving import prove
from replica.failover.stopping import Stopped
from replica.failover.transitions import Command
from replica.failover.turn import Turn
from replica.generation.patched import Conversion
from replica.model import (
    FailoverKind,
    Home,
    MachineDisk,
    Point,
    RecoveryMachine,
    Settings,
    Standing,
    State,
)
from replica.platforms.platform import Checked, DiskSpec, Guiding, MachineSpec, Particular, Platform, Power, Reporting
from replica.source import is_live
from vhdx.progress import Progress, silent

DEFAULT_PLATFORM = "qemu"


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for. None leaves it open: the kind to what is under way, the point to the newest that verifies,
    the generation to the machine's own if the platform can.

    ``machine`` is the name that a test's machine is to have: where there is one of that name, the test goes on with it.
    """

    kind: FailoverKind | None = None
    point: int | None = None
    platform: str | None = None
    generation: Literal[1, 2] | None = None
    machine: str | None = None


@dataclass(frozen=True, slots=True)
class Failover:
    """What a failover did. ``left``: machines that are not gone yet, since only another host sees them."""

    machine: RecoveryMachine
    standing: Standing
    passed_over: tuple[PassedOver, ...] = ()
    resumed: bool = False  # it went on with what was begun before
    final: Point | None = None  # the last point of a source that was shut down for it
    left: tuple[RecoveryMachine, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a failover would do."""

    point: Point
    passed_over: tuple[PassedOver, ...]
    platform: str
    generation: Literal[1, 2]
    converted_disk: int | None


def failover(means: Means, order: Order, progress: Progress = silent) -> Failover:
    """Start the VM elsewhere. Safe to repeat: what was begun goes on.

    Raises StandingError, UsageError, LeaseHeldError where another operator is at work, IntegrityError where no point
    restores, ConversionError where one cannot start as what is asked for, SourceError where a planned failover would
    lose something, PlatformError, StoreError.
    """
    if order.kind is FailoverKind.TEST:
        return _test(means, order, progress)
    if order.kind is FailoverKind.PLANNED and order.point is not None:
        raise UsageError(
            "a planned failover takes the point that is made once the source is off", hint="leave --point out"
        )
    with means.turn(Command.FAILOVER, take_over=order.kind is FailoverKind.UNPLANNED) as taken:
        return _Failover(means, order, taken, progress).run()


def plan(means: Means, order: Order) -> Plan:
    """Return what a failover would do now; nothing is written. Raises as ``failover``."""
    settings = catalog.settings_in_force(means.store, means.found)
    command = Command.TEST if order.kind is FailoverKind.TEST else Command.FAILOVER
    transitions.require(means.name, settings.state, command)
    machine = settings.state.machine
    number = order.point
    if number is None and machine is not None and command is Command.FAILOVER:
        number = machine.point
    choice = choose(means.store, means.host, means.found, number, workers=means.workers)
    platform, generation, planned = _look_ahead(means, order, choice.point)
    return Plan(choice.point, choice.passed_over, platform, generation, planned.disk)


def _test(means: Means, order: Order, progress: Progress) -> Failover:
    settings = catalog.settings_in_force(means.store, means.found)
    transitions.require(means.name, settings.state, Command.TEST)
    begun = next((one for one in settings.state.beside if one.name == order.machine), None)
    if begun is not None:
        return _go_on_with_test(means, settings.state, begun, progress)
    choice = choose(means.store, means.host, means.found, order.point, workers=means.workers)
    machine, conversion = _machine(means, order, choice.point, FailoverKind.TEST)
    with means.turn(Command.TEST) as taken:
        history.point(means.store, means.found.keys, machine.point)  # under the lease nobody prunes it any more
        state = transitions.add_test(taken.state, machine)
        taken.put(replace(taken.settings, state=state), Command.TEST)
    with _hinted(f"'godwit cleanup {means.name} --test {machine.name}' removes what was made"):
        disks = bring_up(means, machine, choice.point, conversion, progress)
    notes = () if means.offer(machine.platform).starts else _guidance(means.platform_of(machine), machine)
    return Failover(replace(machine, disks=disks), state.standing, choice.passed_over, notes=notes)


def _guidance(platform: Platform, machine: RecoveryMachine) -> tuple[str, ...]:
    """Return where it says how a machine is made of what was prepared, where it does."""
    if not isinstance(platform, Guiding):
        return ()
    return (f"how a machine is made of this is said in {platform.guide_path(machine.name)}",)


def _go_on_with_test(means: Means, state: State, machine: RecoveryMachine, progress: Progress) -> Failover:
    point = history.point(means.store, means.found.keys, machine.point)
    conversion = conversions.kept(means.store, means.found, machine)
    disks = bring_up(means, machine, point, conversion, progress)
    return Failover(replace(machine, disks=disks), state.standing, resumed=True)


def _machine(means: Means, order: Order, point: Point, kind: FailoverKind) -> tuple[RecoveryMachine, Conversion]:
    """Return a machine that is to be made of the point; how its disks are converted is in the store by then."""
    platform, generation, planned = _look_ahead(means, order, point)
    conversion = conversions.keep(means.store, means.found, point.point, planned)
    is_test = kind is FailoverKind.TEST
    machine = RecoveryMachine(
        name=(order.machine if is_test else None) or new_name(means),
        platform=platform,
        kind=kind,
        point=point.point,
        generation=generation,
        isolated=is_test,
        host_id=means.host.host_id,
        host_name=means.host.host_name,
        begun_at=means.host.clock.now(),
        bitmap=None if is_test else f"godwit-since-{point.point}",
        conversions=conversions.refs(point.point, conversion),
    )
    return machine, conversion


def _look_ahead(means: Means, order: Order, point: Point) -> tuple[str, Literal[1, 2], Conversion]:
    """Return the platform, the generation and the conversion of a machine that is to be made of the point.

    What stands against any of them is known by then, and nothing is written yet.
    """
    platform = order.platform or DEFAULT_PLATFORM
    opened = means.open_platform(platform)
    if isinstance(opened, Checked):
        opened.check()
    generation = means.offer(platform).generation(point.machine.generation, order.generation)
    check_machine(means, order, point, generation)
    planned = conversions.plan(means.store, means.host, means.found, point, generation, workers=means.workers)
    return platform, generation, planned


def check_machine(means: Means, order: Order, point: Point, generation: Literal[1, 2]) -> None:
    """Return if the platform takes a machine that is made of the point, as far as it is known. Raises PlatformError."""
    opened = means.open_platform(order.platform or DEFAULT_PLATFORM)
    if isinstance(opened, Particular):
        opened.check_machine(_sketch(means, order, point, generation))


def _sketch(means: Means, order: Order, point: Point, generation: Literal[1, 2]) -> MachineSpec:
    """Return as much of a machine as is known before it is one."""
    disks = tuple(DiskSpec(one.number, one.size, one.bus, sector_size=one.sector_size) for one in point.disks)
    described = replace(point.machine, generation=generation)
    return MachineSpec("", means.name, described, disks, order.kind is FailoverKind.TEST)


def new_name(means: Means) -> str:
    """Return a name for a machine of the VM that no other has."""
    return f"godwit-{means.found.vm.vm_id[:8]}-{means.host.randomness.new_id()[:8]}"


def spec_of(means: Means, platform: Platform, machine: RecoveryMachine, point: Point, with_: Conversion) -> MachineSpec:
    """Return a machine as its platform is to make it."""
    described = replace(
        point.machine,
        generation=machine.generation,
        secure_boot=point.machine.secure_boot and machine.generation == 2,
    )
    disks = means.provider.provide(platform, machine, point, with_)
    system = None if with_.manifest is None else with_.manifest.system
    return MachineSpec(machine.name, means.name, described, disks, machine.isolated, system)


def bring_up(
    means: Means, machine: RecoveryMachine, point: Point, conversion: Conversion, progress: Progress = silent
) -> tuple[MachineDisk, ...]:
    """Make and start a machine that the settings name; return its disks. Safe to repeat. Raises PlatformError."""
    platform = means.platform_of(machine)
    if isinstance(platform, Reporting):
        platform.report_to(progress)
    platform.define(spec_of(means, platform, machine, point, conversion))
    if means.offer(machine.platform).starts:
        platform.start(machine.name)
        power = platform.power(machine.name)
        if power is not Power.RUNNING:
            raise PlatformError(f"the machine {machine.name} was started, and is {power.value} now")
    else:
        platform.hydrate(machine.name)
    return tuple(MachineDisk(one.number, one.address) for one in platform.disks(machine.name))


@contextmanager
def _hinted(hint: str) -> Iterator[None]:
    """Say with whatever goes wrong what can be done about what is there by then."""
    try:
        yield
    except GodwitError as error:
        error.hint = f"{error.hint}; {hint}" if error.hint else hint
        raise


class _Failover:
    """A failover under a turn at the VM."""

    def __init__(self, means: Means, order: Order, turn: Turn, progress: Progress) -> None:
        self._means = means
        self._order = order
        self._turn = turn
        self._progress = progress
        self._passed_over: tuple[PassedOver, ...] = ()
        self._final: Point | None = None
        self._resumed = False

    def run(self) -> Failover:
        """Do what is left to do."""
        standing = self._turn.state.standing
        if standing is Standing.FAILED_OVER and not self._wants_another(self._machine):
            self._resumed = True
            return self._done()
        if standing is Standing.FAILING_OVER:
            self._go_on()
        elif standing is Standing.FAILED_OVER:
            self._intend(self._chosen(), self._machine.kind)
        elif self._order.kind is FailoverKind.PLANNED:
            self._shut_down_and_intend()
        elif self._order.kind is FailoverKind.UNPLANNED:
            self._intend(self._chosen(), FailoverKind.UNPLANNED)
        else:
            raise UsageError(
                f"what kind of failover {self._means.name} is to have was not said",
                hint="say --test, --planned, or --unplanned",
            )
        with _hinted(
            f"'godwit failover {self._means.name}' goes on from here, 'godwit cleanup {self._means.name}' takes it back"
        ):
            return self._start()

    @property
    def _machine(self) -> RecoveryMachine:
        machine = self._turn.state.machine
        assert machine is not None, "checked when it was decoded"
        return machine

    def _wants_another(self, machine: RecoveryMachine) -> bool:
        order = self._order
        asked = (
            (order.point, machine.point),
            (order.platform, machine.platform),
            (order.generation, machine.generation),
        )
        return any(wanted is not None and wanted != is_ for wanted, is_ in asked)

    def _chosen(self) -> Point:
        with self._turn.kept():
            choice: Choice = choose(
                self._means.store,
                self._means.host,
                self._means.found,
                self._order.point,
                workers=self._means.workers,
            )
        self._passed_over = choice.passed_over
        return choice.point

    def _intend(self, point: Point, kind: FailoverKind) -> None:
        with self._turn.kept():
            machine, _ = _machine(self._means, self._order, point, kind)
        self._put_intent(machine)

    def _put_intent(self, machine: RecoveryMachine) -> None:
        settings = self._turn.settings
        newest = self._turn.newest
        assert newest is not None, "a point was chosen"
        home = Home(settings.machine, settings.sources, newest.point)
        known = () if settings.state.home is not None else identities_at_home(settings.machine, newest)
        state = transitions.intend(settings.state, machine, home)
        self._turn.put(replace(settings, state=state), Command.FAILOVER, known)

    def _go_on(self) -> None:
        """Go on with what was begun, on this host if the one where it was cannot be reached from here."""
        machine = self._machine
        if self._wants_another(machine):
            raise StandingError(
                f"{self._means.name} is failing-over already: to point {machine.point} on {machine.platform}, "
                f"Generation {machine.generation}",
                hint=f"'godwit failover {self._means.name}' goes on with that, "
                f"'godwit cleanup {self._means.name}' takes it back",
            )
        self._resumed = True
        if not self._means.is_reachable(machine):
            host = self._means.host
            here = replace(
                machine,
                name=new_name(self._means),
                host_id=host.host_id,
                host_name=host.host_name,
                begun_at=host.clock.now(),
            )
            self._put_intent(here)

    def _shut_down_and_intend(self) -> None:
        before = self._chosen()
        if self._passed_over:
            worst = self._passed_over[0]
            raise IntegrityError(
                f"the newest point {worst.point} does not restore, and what is made next builds upon it: "
                f"{worst.because}",
                hint=f"'godwit repair {self._means.name}' may mend it; --unplanned takes point {before.point}",
            )
        with self._turn.kept():  # what stands against it is known before anything is shut down
            _look_ahead(self._means, self._order, before)
        with final_point(self._means, self._turn, self._progress) as (point, off):
            self._final = point
            self._intend(point, FailoverKind.PLANNED)
            off.finish()

    def _start(self) -> Failover:
        remove_superseded(self._means, self._turn, Command.FAILOVER)
        machine = self._machine
        point = history.point(self._means.store, self._means.found.keys, machine.point)
        conversion = conversions.kept(self._means.store, self._means.found, machine)
        with self._turn.kept():
            disks = bring_up(self._means, machine, point, conversion, self._progress)
            platform = self._means.platform_of(machine)
            identity = identity_of(platform, machine, point.machine)
        settings = self._turn.settings
        self._turn.put(
            replace(settings, state=transitions.started(settings.state, disks)), Command.FAILOVER, (identity,)
        )
        notes: tuple[str, ...] = ()
        if self._means.offer(machine.platform).starts:
            try:
                platform.hydrate(machine.name)
            except PlatformError as error:  # it runs; this can be asked for again
                notes = (f"its disks are not being made whole: {error}",)
        else:
            notes = _guidance(platform, machine)
        return replace(self._done(), notes=notes)

    def _done(self) -> Failover:
        state = self._turn.state
        left = tuple(one for one in state.beside if transitions.is_superseded(one))
        return Failover(self._machine, state.standing, self._passed_over, self._resumed, self._final, left)


@contextmanager
def final_point(means: Means, turn: Turn, progress: Progress) -> Iterator[tuple[Point, Stopped]]:
    """Shut down what is replicated, and give its last point, which is proven to hold all that its disks do.

    The machine is off while the context lasts. Raises SourceError where it is not, or was written to meanwhile.
    """
    with ExitStack() as stack:
        if is_live(turn.settings.sources[0].path):
            progress(0, 0, "shutting down")  # minutes, in some guests
        with turn.kept():
            off = stack.enter_context(means.stopped(turn.settings.sources))
        point = cycle.run(
            means.store,
            means.host,
            means.found,
            turn.held,
            Basis(turn.newest),
            workers=means.workers,
            progress=progress,
            open_disk=means.open_disk,
        )
        turn.newest = point
        prove(turn, point, workers=means.workers, open_disk=means.open_disk)
        off.check()
        yield point, off


def remove_superseded(means: Means, turn: Turn, command: Command) -> None:
    """Remove the machines that counted once and do not any more, where this host sees them. Raises PlatformError."""
    for machine in turn.state.beside:
        if transitions.is_superseded(machine) and means.is_reachable(machine):
            with turn.kept():
                means.remove(machine)
            settings: Settings = turn.settings
            turn.put(replace(settings, state=transitions.struck(settings.state, machine.name)), command)
