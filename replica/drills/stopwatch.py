"""The phases of a drill and how long each took, seen from what the test failover asks of provider and platform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from replica.failover.means import Provider
from replica.generation.patched import Conversion
from replica.host import Clock
from replica.model import Point, RecoveryMachine
from replica.platforms.platform import (
    DiskSpec,
    DiskState,
    GuestChannel,
    MachineSpec,
    Platform,
    PlatformName,
    Power,
)


class Phase(StrEnum):
    """A part of a drill, in this order."""

    CHOOSE = "choose"  # a point is chosen, the conversion planned, the intent written
    DEFINE = "define"
    START = "start"
    ANSWER = "first answer"
    CHECKS = "checks"
    CLEANUP = "cleanup"


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a phase took."""

    phase: Phase
    seconds: float


class Stopwatch:
    """Runs from the command on; knows the phase, and those before."""

    def __init__(self, clock: Clock) -> None:
        self._clock: Final = clock
        self._begun = self._since = clock.monotonic()
        self.phase = Phase.CHOOSE
        self.timings: tuple[Timing, ...] = ()

    @property
    def elapsed_seconds(self) -> float:
        """Since the command."""
        return self._clock.monotonic() - self._begun

    def enter(self, phase: Phase) -> None:
        """End the phase that runs, and begin another."""
        self.end()
        self.phase = phase

    def end(self) -> None:
        """End the phase that runs."""
        now = self._clock.monotonic()
        self.timings = (*self.timings, Timing(self.phase, round(now - self._since, 3)))
        self._since = now


@dataclass(frozen=True, slots=True)
class WatchedProvider:
    """A provider that says which machine is about to be made of which point, before anything of it is there."""

    inner: Provider
    about_to_make: Callable[[RecoveryMachine, Point], None]

    def provide(
        self, platform: Platform, machine: RecoveryMachine, point: Point, conversion: Conversion
    ) -> tuple[DiskSpec, ...]:
        """Return what the provider does."""
        self.about_to_make(machine, point)
        bare = platform.inner if isinstance(platform, WatchedPlatform) else platform
        return self.inner.provide(bare, machine, point, conversion)


@dataclass(frozen=True, slots=True)
class WatchedPlatform:
    """A platform that says when it is told to start a machine."""

    inner: Platform
    about_to_start: Callable[[], None]

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return self.inner.name

    def define(self, spec: MachineSpec) -> None:
        """See ``Platform.define``."""
        self.inner.define(spec)

    def start(self, name: str) -> None:
        """See ``Platform.start``."""
        self.about_to_start()
        self.inner.start(name)

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """See ``Platform.stop``."""
        self.inner.stop(name, force=force, timeout_seconds=timeout_seconds)

    def power(self, name: str) -> Power:
        """See ``Platform.power``."""
        return self.inner.power(name)

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """See ``Platform.disks``."""
        return self.inner.disks(name)

    def hydrate(self, name: str) -> None:
        """See ``Platform.hydrate``."""
        self.inner.hydrate(name)

    def channel(self, name: str) -> GuestChannel | None:
        """See ``Platform.channel``."""
        return self.inner.channel(name)

    def screenshot(self, name: str) -> bytes | None:
        """See ``Platform.screenshot``."""
        return self.inner.screenshot(name)

    def delete(self, name: str) -> None:
        """See ``Platform.delete``."""
        self.inner.delete(name)
