"""A platform of recovery machines that exist in memory alone: it counts, refuses, vanishes and crashes by rule.

It outlives the commands and hosts that use it, as a hypervisor does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from replica.errors import PlatformError
from replica.generation.patched import Conversion
from replica.model import Identity, Point, RecoveryMachine
from replica.platforms.platform import (
    DiskSpec,
    DiskState,
    GuestChannel,
    MachineSpec,
    Platform,
    PlatformName,
    Power,
)
from tests.support.store_doubles import CrashMode, SimulatedCrash

CHANGES = ("define", "start", "stop", "hydrate", "delete")


@dataclass(slots=True)
class FakeMachine:
    """A machine that was defined."""

    spec: MachineSpec
    power: Power = Power.OFF
    hydrating: bool = False


@dataclass(slots=True)
class Hypervisor:
    """What is there of machines, whoever asks. ``paths`` gives the file of each of a machine's disks."""

    paths: Callable[[str, int], Path] = lambda name, number: Path(f"/machines/{name}/{number}")
    machines: dict[str, FakeMachine] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def running(self) -> list[str]:
        """Return the names of the machines that run."""
        return [name for name, one in self.machines.items() if one.power is Power.RUNNING]


@dataclass(slots=True)
class FakePlatform:
    """The contract of ``Platform``, on a ``Hypervisor``.

    ``crash_at`` is the ordinal, among the calls that change something, at which the process dies: before it or after.
    ``refuses`` are calls that raise PlatformError; ``stays`` makes deleted machines stay; ``gone`` refuses everything.
    """

    hypervisor: Hypervisor
    crash_at: int | None = None
    crash_mode: CrashMode = CrashMode.BEFORE
    refuses: frozenset[str] = frozenset()
    stays: bool = False
    gone: bool = False
    crashed: bool = False
    _changes: int = 0

    @property
    def name(self) -> PlatformName:
        return "qemu"

    def _call(self, what: str, name: str, work: Callable[[], None]) -> None:
        if self.crashed:
            raise SimulatedCrash("called after the crash")
        if self.gone or what in self.refuses:
            raise PlatformError(f"simulated: {name} cannot {what}")
        if what in CHANGES:
            self.hypervisor.calls.append((what, name))
            chosen = self._changes == self.crash_at
            self._changes += 1
            if chosen and self.crash_mode is CrashMode.BEFORE:
                self.crashed = True
                raise SimulatedCrash(f"before {what}")
            work()
            if chosen:
                self.crashed = True
                raise SimulatedCrash(f"after {what}")

    def _machine(self, name: str) -> FakeMachine:
        try:
            return self.hypervisor.machines[name]
        except KeyError:
            raise PlatformError(f"there is no machine {name!r} here") from None

    def define(self, spec: MachineSpec) -> None:
        def work() -> None:
            before = self.hypervisor.machines.get(spec.name)
            if before is None:
                self.hypervisor.machines[spec.name] = FakeMachine(spec)
            elif before.spec != spec:
                if before.power is not Power.OFF:
                    raise PlatformError(f"{spec.name} exists, is another, and runs")
                before.spec = spec

        self._call("define", spec.name, work)

    def start(self, name: str) -> None:
        def work() -> None:
            self._machine(name).power = Power.RUNNING

        self._call("start", name, work)

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        def work() -> None:
            self._machine(name).power = Power.OFF

        self._call("stop", name, work)

    def power(self, name: str) -> Power:
        self._call("power", name, lambda: None)
        found = self.hypervisor.machines.get(name)
        return Power.GONE if found is None else found.power

    def disks(self, name: str) -> tuple[DiskState, ...]:
        self._call("disks", name, lambda: None)
        machine = self._machine(name)
        return tuple(
            DiskState(one.number, str(self.hypervisor.paths(name, one.number)), machine.hydrating)
            for one in machine.spec.disks
        )

    def hydrate(self, name: str) -> None:
        def work() -> None:
            self._machine(name).hydrating = True

        self._call("hydrate", name, work)

    def channel(self, name: str) -> GuestChannel | None:
        return None

    def screenshot(self, name: str) -> bytes | None:
        return None

    def delete(self, name: str) -> None:
        def work() -> None:
            if not self.stays:
                self.hypervisor.machines.pop(name, None)

        self._call("delete", name, work)

    def identity(self, name: str) -> Identity:
        return Identity("qemu", f"id-of-{name}", f"uuid-of-{name}", ("00:15:5d:00:00:99",))


class FakeProvider:
    """Gives machines their disks as files that are not there."""

    def provide(
        self, platform: Platform, machine: RecoveryMachine, point: Point, conversion: Conversion
    ) -> tuple[DiskSpec, ...]:
        return tuple(
            DiskSpec(one.number, one.size, one.bus, url=f"nbd://{machine.name}/{one.number}", bitmap=machine.bitmap)
            for one in point.disks
        )
