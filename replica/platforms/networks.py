"""Which network of a platform each adapter of a machine is in: by what a plan says, else by the platform's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from replica.errors import PlatformError
from replica.platforms.platform import MachineSpec

OTHERS: Final = "*"  # stands for every network that is not named, and for none
LONGEST_NAME: Final = 1000


def read_mapping(value: Any) -> dict[str, str]:
    """Return names of the source's networks and what each is called on the platform. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError('should be a table: a network of the source, and one of the platform, as in "lan" = "default"')
    for name, network in value.items():
        if not isinstance(network, str) or not network.strip() or not network.isprintable():
            raise ValueError(f"{name!r:.60} should be a network of the platform, not {network!r:.60}")
        if not isinstance(name, str) or not name or max(len(name), len(network)) > LONGEST_NAME:
            raise ValueError(f"{name!r:.60} is no name of a network")
    return dict(value)


def mapped_name(network: str | None, mapping: Mapping[str, str]) -> str | None:
    """Return what a network of the source is called on the platform, None where the mapping does not say."""
    return mapping.get(network or OTHERS, mapping.get(OTHERS))


def networks_of(spec: MachineSpec, mapping: Mapping[str, str]) -> tuple[str | None, ...]:
    """Return the network of each adapter, None for those that are in the platform's one network.

    What the machine is told of by a plan comes before ``mapping``. A machine that is isolated is in none of them.
    """
    if spec.isolated:
        return (None,) * len(spec.machine.nics)
    told = (*spec.networks, *(None,) * len(spec.machine.nics))
    return tuple(
        of_plan or mapped_name(one.network, mapping) for one, of_plan in zip(spec.machine.nics, told, strict=False)
    )


def require_apart(networks: Iterable[str | None], test_network: str | None) -> None:
    """Return if a machine that is no test stays out of the network of tests. Raises PlatformError."""
    if test_network and test_network in networks:
        raise PlatformError(
            f"{test_network!r} is the network of tests, which would meet what runs",
            hint="name another under networks, in the plan or the configuration",
        )
