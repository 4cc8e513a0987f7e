"""The platforms by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from replica.errors import UsageError
from replica.host import Host
from replica.platforms.files import FilesPlatform
from replica.platforms.platform import Platform
from replica.platforms.qemu import QemuPlatform

_PLATFORMS: Final[dict[str, type[QemuPlatform] | type[FilesPlatform]]] = {"qemu": QemuPlatform, "files": FilesPlatform}
NAMES: Final = tuple(_PLATFORMS)


def open_platform(name: str, host: Host, *, environment: Mapping[str, str] | None = None) -> Platform:
    """Return the platform of that name on this host. Raises UsageError where there is none.

    ``environment`` is that of the servers that read the store for machines: ours unless given.
    """
    found = _PLATFORMS.get(name)
    if found is None:
        raise UsageError(
            f"machines cannot be started on {name!r} by this version", hint=f"say --platform {' or '.join(NAMES)}"
        )
    return found(host, environment=environment)
