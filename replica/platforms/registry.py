"""The platforms by their names, each imported once a machine of it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from replica.errors import ConfigurationError, UsageError
from replica.host import Host
from replica.platforms.platform import Platform

# What [platforms.NAME] of the configuration file says of a platform, not looked at yet.
Table: TypeAlias = Mapping[str, Any]
Opener: TypeAlias = Callable[[Host, Table, Mapping[str, str] | None], Platform]


def _qemu(host: Host, table: Table, environment: Mapping[str, str] | None) -> Platform:
    from replica.platforms.qemu import QemuPlatform  # noqa: PLC0415 - only its machines need it

    _takes_nothing("qemu", table)
    return QemuPlatform(host, environment=environment)


def _libvirt(host: Host, table: Table, environment: Mapping[str, str] | None) -> Platform:
    from replica.platforms.libvirt import LibvirtPlatform  # noqa: PLC0415 - only its machines need it
    from replica.platforms.libvirt.settings import LibvirtSettings  # noqa: PLC0415

    return LibvirtPlatform(host, settings=LibvirtSettings.read(table), environment=environment)


def _files(host: Host, table: Table, environment: Mapping[str, str] | None) -> Platform:
    from replica.platforms.files import FilesPlatform  # noqa: PLC0415 - only its machines need it

    _takes_nothing("files", table)
    return FilesPlatform(host, environment=environment)


def _hyperv(host: Host, table: Table, environment: Mapping[str, str] | None) -> Platform:
    from replica.platforms.hyperv import HypervPlatform, settings  # noqa: PLC0415 - only its machines need it

    return HypervPlatform(host, settings.read(table, environment), environment=environment)


def _azure(host: Host, table: Table, environment: Mapping[str, str] | None) -> Platform:
    from replica.platforms.azure import settings  # noqa: PLC0415 - only its machines need it
    from replica.platforms.azure.platform import AzurePlatform  # noqa: PLC0415

    return AzurePlatform(host, settings.read(table), environment=environment)


_OPENERS: Final[dict[str, Opener]] = {
    "qemu": _qemu,
    "libvirt": _libvirt,
    "files": _files,
    "hyperv": _hyperv,
    "azure": _azure,
}
NAMES: Final = tuple(_OPENERS)


def open_platform(
    name: str,
    host: Host,
    *,
    tables: Mapping[str, Table] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Platform:
    """Return the platform of that name, as seen from this host.

    ``tables``: the configuration's [platforms] section, of which a platform reads the table of its name.
    ``environment`` is that of the servers that read the store for machines: ours unless given. Raises UsageError where
    there is no such platform, ConfigurationError for what its table says wrong.
    """
    opener = _OPENERS.get(name)
    if opener is None:
        raise UsageError(
            f"machines cannot be started on {name!r} by this version", hint=f"say --platform {' or '.join(NAMES)}"
        )
    return opener(host, (tables or {}).get(name, {}), environment)


def _takes_nothing(name: str, table: Table) -> None:
    if table:
        raise ConfigurationError(f"platforms.{name}: {', '.join(map(repr, table))} is not a setting: there is none")
