"""What [platforms.libvirt] of the configuration says: which libvirt, which networks, and how machines are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from replica.errors import ConfigurationError
from replica.platforms.networks import read_mapping

DEFAULT_CONNECT: Final = "qemu:///system"
TYPES: Final = ("kvm", "qemu")


@dataclass(frozen=True, slots=True)
class LibvirtSettings:
    """``network`` is one of libvirt's, ``bridge`` one of the host's; without either, adapters go out through the host.

    ``networks``: for networks of the source, other networks of libvirt, or bridges as ``bridge:NAME``.
    Tests have the ``test_network``, or without one adapters whose link is down. ``type`` None: kvm where libvirt can.
    """

    connect: str = DEFAULT_CONNECT
    network: str | None = None
    bridge: str | None = None
    test_network: str | None = None
    type: Literal["kvm", "qemu"] | None = None
    networks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Self:
        """Read the table. Raises ConfigurationError, which names every mistake with its key."""
        known = [one.name for one in fields(cls)]
        mistakes = [
            f"platforms.libvirt: {key!r} is not a setting: there are {', '.join(known)}"
            for key in table
            if key not in known
        ]
        for key in known:
            if key == "networks":
                continue
            value = table.get(key, "")
            if key in table and (not isinstance(value, str) or not value.strip() or not value.isprintable()):
                mistakes.append(f"platforms.libvirt.{key}: should be text, not {value!r:.60}")
        networks: dict[str, str] = {}
        try:
            networks = read_mapping(table.get("networks", {}))
        except ValueError as error:
            mistakes.append(f"platforms.libvirt.networks: {error}")
        if not mistakes:
            mistakes = [f"platforms.libvirt.{one}" for one in _contradictions(table)]
        if mistakes:
            raise ConfigurationError("; ".join(mistakes), hint="correct the configuration and try again")
        return cls(**{**table, "networks": networks})

    @property
    def socket(self) -> str | None:
        """The socket that ``connect`` names, if it names one."""
        named = parse_qs(urlsplit(self.connect).query).get("socket", [])
        return named[0] if named else None


def _contradictions(table: Mapping[str, Any]) -> list[str]:
    """Return what is wrong about values that are of the right types, each beginning with its key."""
    found = []
    connect = table.get("connect", DEFAULT_CONNECT)
    try:
        parts = urlsplit(connect)
        is_qemu, is_remote = parts.scheme in ("qemu", "qemu+unix"), bool(parts.hostname)
    except ValueError:
        is_qemu, is_remote = False, False
    if not is_qemu or is_remote:
        found.append(
            f"connect: {connect!r} is no libvirt of QEMU on this host, where the machines' disks are served: "
            f"{DEFAULT_CONNECT} is"
        )
    if table.get("type", TYPES[0]) not in TYPES:
        found.append(f"type: should be {' or '.join(TYPES)}, not {table['type']!r:.60}")
    if "network" in table and "bridge" in table:
        found.append("bridge: an adapter is in a network or on a bridge: leave one of the two out")
    if "test_network" in table and table["test_network"] == table.get("network"):
        found.append("test_network: is the network of real failovers, from which tests are to be kept apart")
    if "test_network" in table and table["test_network"] in table.get("networks", {}).values():
        found.append("networks: leads into the network of tests, which are to be kept apart")
    return found
