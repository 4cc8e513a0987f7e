"""What [platforms.azure] of the configuration file says: where blobs go, and what machines are made like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from replica.errors import ConfigurationError

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
MOST_UPLOADS: Final = 32

_CONTAINER = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?!-)){1,61}[a-z0-9]")
_RESOURCE = re.compile(r"/subscriptions/[^/'\s]+/resourceGroups/[^/'\s]+/providers/[^'\s]+", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.()-]{0,89}")


@dataclass(frozen=True, slots=True)
class Container:
    """A container of blobs: its ``url`` without credentials, and its storage ``account``."""

    url: str
    account: str


@dataclass(frozen=True, slots=True)
class AzureSettings:
    """The settings. Without ``resource_group`` nothing is started: there are blobs, and a template for them.

    ``subnet`` is where machines are, ``test_subnet`` where tests are: without it each has a closed network of its own.
    """

    container: Container
    resource_group: str | None = None
    location: str | None = None
    storage_account_id: str | None = None
    vm_size: str | None = None
    subnet: str | None = None
    test_subnet: str | None = None
    disk_sku: str = "Premium_LRS"
    system: Literal["linux", "windows"] | None = None  # of machines of which it is not known
    verify: Literal["sampled", "full"] = "sampled"
    uploads: int = 8  # pages that are on their way at once, for each disk


def read(table: Mapping[str, Any]) -> AzureSettings:
    """Return the settings that the table says. Raises ConfigurationError naming every mistake."""
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    for name, value in table.items():
        check = _CHECKS.get(name)
        if check is None:
            mistakes.append(f"{name!r} is not a setting: there are {', '.join(_CHECKS)}")
            continue
        try:
            values[name] = check(value)
        except ValueError as error:
            mistakes.append(f"{name}: {error}")
    if "container" not in table:
        mistakes.append('container: is needed, as in container = "https://ACCOUNT.blob.core.windows.net/CONTAINER"')
    if mistakes:
        raise ConfigurationError(
            "; ".join(f"platforms.azure: {one}" for one in sorted(mistakes)), hint="correct [platforms.azure]"
        )
    return AzureSettings(**values)


def _container(value: Any) -> Container:
    text = _text(value)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is no address: {error}") from error
    host = parts.hostname or ""
    if parts.query or parts.username or parts.password:
        # Said without the value: it may be a signature.
        raise ValueError("no credentials belong here: they are taken from the environment")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK):
        raise ValueError(f"{text!r} should begin with https://")
    folders = parts.path.strip("/").split("/")
    is_emulated = host in LOOPBACK  # which has the account in the path
    if len(folders) != (2 if is_emulated else 1) or not _CONTAINER.fullmatch(folders[-1]):
        raise ValueError(f"{text!r} should be https://ACCOUNT.blob.core.windows.net/CONTAINER")
    where = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{where}{'' if port is None else f':{port}'}/{'/'.join(folders)}"
    return Container(url, folders[0] if is_emulated else host.split(".")[0])


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("should be text")
    return value


def _word(value: Any) -> str:
    if not _WORD.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not a name that Azure gives")
    return str(value)


def _resource(value: Any) -> str:
    if not _RESOURCE.fullmatch(_text(value)):
        raise ValueError(f"{value!r} should be a resource's id: /subscriptions/…/resourceGroups/…/providers/…")
    return str(value)


def _system(value: Any) -> str:
    if value not in ("linux", "windows"):
        raise ValueError("should be linux or windows")
    return str(value)


def _verify(value: Any) -> str:
    if value not in ("sampled", "full"):
        raise ValueError("should be sampled or full")
    return str(value)


def _uploads(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_UPLOADS:
        raise ValueError(f"should be a whole number from 1 to {MOST_UPLOADS}")
    return value


_CHECKS: Final = {
    "container": _container,
    "resource_group": _word,
    "location": _word,
    "storage_account_id": _resource,
    "vm_size": _word,
    "subnet": _resource,
    "test_subnet": _resource,
    "disk_sku": _word,
    "system": _system,
    "verify": _verify,
    "uploads": _uploads,
}
