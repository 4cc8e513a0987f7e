"""The platforms by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from replica.errors import UsageError
from replica.host import Host
from replica.platforms.files import FilesPlatform
from replica.platforms.platform import Platform
from replica.platforms.qemu import QemuPlatform

_PLATFORMS: Final[dict[str, Callable[[Host], Platform]]] = {"qemu": QemuPlatform, "files": FilesPlatform}


def open_platform(name: str, host: Host) -> Platform:
    """Return the platform of that name on this host. Raises UsageError where there is none."""
    try:
        return _PLATFORMS[name](host)
    except KeyError:
        known = ", ".join(_PLATFORMS)
        raise UsageError(f"there is no platform {name!r} here", hint=f"there are {known}") from None
