"""The networks of a machine as the platform is to have them: a platform that maps names on the way to ``define``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from replica.failover.means import Means, Provider
from replica.generation.patched import Conversion
from replica.model import Point, RecoveryMachine
from replica.platforms.networks import mapped_name
from replica.platforms.platform import (
    DiskSpec,
    DiskState,
    GuestChannel,
    MachineSpec,
    Platform,
    PlatformName,
    Power,
)

# Platforms that put a machine's adapters into the networks that it is told of. The others know one network at most.
TAKING: Final = frozenset({"libvirt", "hyperv"})


def mapped(means: Means, networks: Mapping[str, str]) -> Means:
    """Return means whose machines are put into other networks."""
    if not networks:
        return means

    return replace(
        means,
        open_platform=lambda name: _around(means.open_platform(name), networks),
        provider=_BareProvider(means.provider),
    )


def _around(inner: Platform, networks: Mapping[str, str]) -> MappedPlatform:
    """Return a platform that has whatever methods beyond the protocol ``inner`` has, which its users look for."""

    def delegate(name: str) -> Callable[..., Any]:
        def call(self: MappedPlatform, *args: Any, **kwargs: Any) -> Any:
            told = [self.mapped(one) if isinstance(one, MachineSpec) else one for one in args]
            return getattr(self.inner, name)(*told, **kwargs)

        return call

    more = [name for name in dir(type(inner)) if not name.startswith("_") and not hasattr(MappedPlatform, name)]
    methods = {name: delegate(name) for name in more if callable(getattr(inner, name, None))}
    made: MappedPlatform = type("MappedPlatform", (MappedPlatform,), methods)(inner, networks)
    return made


@dataclass(frozen=True, slots=True)
class _BareProvider:
    """A provider that sees the platform itself, whose folders it may need."""

    inner: Provider

    def provide(
        self, platform: Platform, machine: RecoveryMachine, point: Point, conversion: Conversion
    ) -> tuple[DiskSpec, ...]:
        """Return what the provider does."""
        bare = platform.inner if isinstance(platform, MappedPlatform) else platform
        return self.inner.provide(bare, machine, point, conversion)


@dataclass(frozen=True)
class MappedPlatform:
    """A platform that is told other networks than the source's."""

    inner: Platform
    networks: Mapping[str, str]

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return self.inner.name

    def define(self, spec: MachineSpec) -> None:
        """See ``Platform.define``."""
        self.inner.define(self.mapped(spec))

    def mapped(self, spec: MachineSpec) -> MachineSpec:
        """Return a machine in the networks that it is to be in; the platform's settings are left what is not said."""
        return replace(spec, networks=tuple(mapped_name(one.network, self.networks) for one in spec.machine.nics))

    def start(self, name: str) -> None:
        """See ``Platform.start``."""
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
