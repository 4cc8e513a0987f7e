"""A drill: a test failover in a network of its own, checks, and cleanup, without which it did not pass.

What it leaves if it is killed is known: the test machine stands in the VM's settings as any other, and a note in this
host's state folder says that it was a drill's, so that the next drill removes it, and none of the tests of people.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from conversion.errors import ConversionError
from replica import catalog
from replica.drills.checking import Examiner, Outcome
from replica.drills.checks import Terms
from replica.drills.stopwatch import Phase, Stopwatch, Timing, WatchedPlatform, WatchedProvider
from replica.errors import (
    ConfigurationError,
    GodwitError,
    LeaseHeldError,
    NoStoreError,
    PlatformError,
    StandingError,
    TenantKeyError,
    UsageError,
)
from replica.failover import failover as failing_over
from replica.failover import settling
from replica.failover.choosing import PassedOver
from replica.failover.failover import DEFAULT_PLATFORM, Order
from replica.failover.means import Means
from replica.model import FailoverKind, Point, RecoveryMachine
from vhdx.errors import DiskError

CLEANUP_WAIT_SECONDS: Final = 900.0  # for a cycle: the first of a VM may take that and longer

# With these nothing was tried yet: they are told to whoever asked, and are no drill that failed.
_REFUSALS: Final = (UsageError, StandingError, ConfigurationError, TenantKeyError, LeaseHeldError, NoStoreError)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Drill:
    """What a drill saw. ``reasons`` is why it did not pass; ``rto_seconds`` from the command to the first answer."""

    begun_at: datetime
    ended_at: datetime
    platform: str
    reasons: tuple[str, ...]
    wanted_point: int | None
    point: Point | None
    machine: RecoveryMachine | None
    passed_over: tuple[PassedOver, ...]
    timings: tuple[Timing, ...]
    rto_seconds: float | None
    outcomes: tuple[Outcome, ...]
    cleaned: bool
    picture: bytes | None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check that is required passed, and the cleanup too."""
        return not self.reasons


def run(means: Means, order: Order, terms: Terms) -> Drill:
    """Make a drill of the VM, and clean up behind it, interrupted or not.

    Raises UsageError, StandingError, ConfigurationError, TenantKeyError and LeaseHeldError where it cannot even be
    begun; whatever goes wrong later is a reason why it failed.
    """
    with trying(means, order, terms) as begin:
        return begin().run()


@contextlib.contextmanager
def trying(means: Means, order: Order, terms: Terms) -> Iterator[Callable[[], Trial]]:
    """Give what begins a trial of the VM, while no other drill of it is made on this host.

    What earlier drills left is removed first. Raises UsageError, LeaseHeldError.
    """
    platform = order.platform or terms.platform or DEFAULT_PLATFORM
    if not means.offer(platform).starts:
        raise UsageError(
            f"platform {platform!r} starts no machines, so there is nothing to see", hint="choose --platform qemu"
        )
    order = replace(order, kind=FailoverKind.TEST, platform=platform, generation=order.generation or terms.generation)
    with means.host.exclusive(f"drill-{means.found.vm.vm_id}") as is_certain:
        notes = _Notes(means)
        told = notes.remove_leftovers() if is_certain else ()
        yield lambda: Trial(means, order, terms, notes, told)


class Trial:
    """One VM being tried: started, looked at, removed. Its clock runs from when it is made."""

    def __init__(self, means: Means, order: Order, terms: Terms, notes: _Notes, told: tuple[str, ...]) -> None:
        self._means = replace(
            means,
            open_platform=lambda name: WatchedPlatform(means.open_platform(name), self._about_to_start),
            provider=WatchedProvider(means.provider, self._about_to_make),
        )
        self._bare = means
        self._order = order
        self._terms = terms
        self._notes = notes
        self._told = told
        self._begun_at = means.host.clock.now()
        self._watch = Stopwatch(means.host.clock)
        self._begun = means.host.clock.monotonic()
        self.machine: RecoveryMachine | None = None
        self._point: Point | None = None
        self._passed_over: tuple[PassedOver, ...] = ()
        self.reasons: list[str] = []
        self._outcomes: list[Outcome] = []
        self.answered_at: float | None = None  # by the host's monotonic clock
        self._picture: bytes | None = None
        self._cleaned = False

    def run(self) -> Drill:
        """Make the drill."""
        try:
            if self.start():
                self.look()
        finally:
            self.clean_up()
        return self.drill()

    def drill(self) -> Drill:
        """Return what was seen."""
        answered = self.answered_at
        return Drill(
            begun_at=self._begun_at,
            ended_at=self._means.host.clock.now(),
            platform=self._order.platform or DEFAULT_PLATFORM,
            reasons=tuple(self.reasons),
            wanted_point=self._order.point,
            point=self._point,
            machine=self.machine,
            passed_over=self._passed_over,
            timings=self._watch.timings,
            rto_seconds=None if answered is None else round(answered - self._begun, 3),
            outcomes=tuple(self._outcomes),
            cleaned=self._cleaned,
            picture=self._picture,
            notes=self._told,
        )

    def _about_to_make(self, machine: RecoveryMachine, point: Point) -> None:
        self.machine, self._point = machine, point
        self._notes.write(machine.name)
        self._watch.enter(Phase.DEFINE)

    def _about_to_start(self) -> None:
        self._watch.enter(Phase.START)

    def start(self) -> bool:
        """Have the machine started; False, with the reason, where it is not. Raises what keeps it from being begun."""
        try:
            done = failing_over.failover(self._means, self._order)
        except (GodwitError, ConversionError, DiskError) as error:
            if self.machine is None and isinstance(error, _REFUSALS):
                raise
            self.reasons.append(f"{self._watch.phase.value}: {error}")
            return False
        self.machine, self._passed_over = done.machine, done.passed_over
        self._watch.enter(Phase.ANSWER)
        return True

    def look(self) -> None:
        """Make the checks of a machine that was started."""
        assert self.machine is not None
        assert self._point is not None, "the provider was asked for its disks"
        if self._order.point is None:
            self._outcomes.append(_newest(self._point, self._passed_over))
        examiner = Examiner(
            self._means.store,
            self._means.host,
            self._means.found,
            self._point,
            self._bare.platform_of(self.machine),
            self.machine.name,
            self._begun + self._terms.timeout_seconds,
            self._means.sleep,
            self._means.workers,
        )
        checks = self._terms.checks_of(self._means.name)
        self._outcomes += [examiner.examine(one) for one in checks if one.kind.answers]
        self._watch.enter(Phase.CHECKS)
        self._outcomes += [examiner.examine(one) for one in checks if not one.kind.answers]
        if examiner.picture is None:
            with contextlib.suppress(GodwitError):  # nobody asked for it, but it may tell what went wrong
                examiner.take_picture()
        self._picture = examiner.picture
        self.answered_at = examiner.answered_at
        if self.answered_at is None:
            self.reasons.append("the guest did not answer")
        self.reasons += [f"{one.name}: {one.observed}" for one in self._outcomes if one.stands_against]

    def clean_up(self) -> None:
        """Remove the machine; what keeps it there is a reason why the drill failed."""
        self._watch.enter(Phase.CLEANUP)
        trouble = None
        try:
            if self.machine is not None:
                self._notes.remove_machine(self.machine)
        except GodwitError as error:
            trouble = str(error)
        self._watch.end()
        self._cleaned = trouble is None
        if trouble is not None:
            self.reasons.append(f"cleanup: {trouble}")


class _Notes:
    """The names of the machines of drills of a VM that are not known to be gone, each a file in the state folder."""

    def __init__(self, means: Means) -> None:
        self._means = means
        state = means.host.state_folder
        self._folder: Path | None = None if state is None else state / "drills" / means.found.vm.vm_id

    def write(self, name: str) -> None:
        """Note a machine before anything of it is made. Raises PlatformError."""
        if self._folder is None:
            return
        with self._errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).touch()

    def remove_leftovers(self) -> tuple[str, ...]:
        """Remove the machines of drills that were killed; return what there is to tell. Raises LeaseHeldError."""
        told = []
        for name in self._noted():
            known = {one.name: one for one in self._tests()}
            if name not in known:
                self._strike(name)
                continue
            try:
                self.remove_machine(known[name])
                told.append(f"{name}, of a drill that was cut off, was removed")
            except (PlatformError, OSError) as error:
                told.append(f"{name}, of a drill that was cut off, is still there: {error}")
        return tuple(told)

    def remove_machine(self, machine: RecoveryMachine) -> None:
        """Remove a machine and its note. Raises PlatformError, LeaseHeldError, StoreError where it stays."""
        self._means.remove(machine)  # it runs on no longer, however long a cycle that is at work has the lease
        if any(one.name == machine.name for one in self._tests()):
            patient = replace(self._means, wait_seconds=max(self._means.wait_seconds, CLEANUP_WAIT_SECONDS))
            settling.cleanup(patient, (machine.name,))
        self._strike(machine.name)

    def _tests(self) -> tuple[RecoveryMachine, ...]:
        state = catalog.settings_in_force(self._means.store, self._means.found).state
        return tuple(one for one in state.beside if one.kind is FailoverKind.TEST)

    def _noted(self) -> list[str]:
        if self._folder is None:
            return []
        with self._errors():
            if not self._folder.is_dir():
                return []
            return sorted(one.name for one in self._folder.iterdir() if _NAME.fullmatch(one.name))

    def _strike(self, name: str) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):  # the next drill finds that the machine is gone
                (self._folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PlatformError(
                f"the notes of drills can be neither read nor written: {error.strerror}", path=str(self._folder)
            ) from error


def _newest(point: Point, passed_over: tuple[PassedOver, ...]) -> Outcome:
    """Return whether the newest point is the one that was started: an older one loses what came since."""
    name = "the newest point restores"
    if not passed_over:
        return Outcome(name, "newest", True, True, f"point {point.point} was started", 0.0)
    why = "; ".join(f"point {one.point}: {one.because}" for one in passed_over[:5])
    return Outcome(name, "newest", True, False, f"point {point.point} was started in its place: {why}"[:1000], 0.0)
