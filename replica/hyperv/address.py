"""Where a disk of a Hyper-V VM is, as text in a VM's protection settings. It holds no credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from replica.errors import UsageError
from replica.source import HYPERV

_VM: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DISK: Final = re.compile(r"(ide|scsi)-[0-9]{1,3}-[0-9]{1,3}")
_HOST: Final = re.compile(r"[A-Za-z0-9._:-]{1,255}")


class Take(StrEnum):
    """How a VM's disks come to stand still."""

    EITHER = "either"  # a recovery checkpoint: applications quiesced where they can be
    CRASH = "crash"  # a recovery checkpoint, nothing quiesced
    APPLICATION = "application"  # a recovery checkpoint with applications quiesced, or none
    CHECKPOINT = "checkpoint"  # none: the newest checkpoint that somebody else made is read


@dataclass(frozen=True, slots=True)
class HypervAddress:
    """A VM by its identifier (names change, and need not be unique), and one of its disks by where it is attached.

    ``host`` is the address of PowerShell remoting, None for this machine. ``maps`` are prefixes of paths as the host
    writes them, and where the same folders are reached from here.
    """

    vm: str  # a GUID in lower case
    disk: str  # controller, its number, location: scsi-0-1
    host: str | None = None
    name: str = ""  # what the VM was called when it was protected; for people alone
    take: Take = Take.EITHER
    maps: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        settings = [
            ("host", self.host or ""),
            ("name", self.name),
            ("take", self.take if self.take != "either" else ""),
        ]
        settings += [("map", f"{there}={here}") for there, here in self.maps]
        query = "&".join(f"{key}={quote(value, safe='')}" for key, value in settings if value)
        return f"{HYPERV}{self.vm}{f'?{query}' if query else ''}#{self.disk}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the address that ``str`` made this text of. Raises UsageError."""
        rest, _, disk = text.removeprefix(HYPERV).partition("#")
        vm, _, query = rest.partition("?")
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=100) if query.count("&") < 100 else []
        one = dict(pairs)
        if (
            not text.startswith(HYPERV)
            or not _VM.fullmatch(vm)
            or not _DISK.fullmatch(unquote(disk))
            or one.get("take", "either") not in list(Take)
        ):
            raise UsageError(f"{text!r:.200} is no address of a Hyper-V VM's disk", hint="protect the VM with --hyperv")
        maps = tuple(parse_map(value) for key, value in pairs if key == "map")
        return cls(vm, disk, one.get("host") or None, one.get("name", ""), Take(one.get("take", "either")), maps)


def parse_map(text: str) -> tuple[str, str]:
    r"""Return the two sides of ``C:\VMs=/mnt/vms``. Raises UsageError."""
    there, equals, here = text.partition("=")
    if not (equals and there and here) or "\0" in text:
        raise UsageError(
            f"{text!r:.200} is no pair of paths", hint=r"write the host's folder first: --host-path C:\VMs=/mnt/vms"
        )
    return there, here


def parse_host(text: str) -> str:
    """Return the address of a host's PowerShell remoting as a URL: HTTPS on port 5986 unless it says otherwise.

    Raises UsageError, also where it holds credentials, which have no place in settings.
    """
    wrong = UsageError(
        "the Hyper-V host is written wrong", hint="write NAME, NAME:PORT, https://NAME:PORT or http://NAME:PORT"
    )
    if "@" in text:
        raise UsageError(
            "the Hyper-V host must not hold credentials",
            hint="give them in GODWIT_HYPERV_USER and GODWIT_HYPERV_PASSWORD",
        )
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        port = parts.port
    except ValueError as error:
        raise wrong from error
    name = parts.hostname or ""
    unwanted = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(name) or unwanted:
        raise wrong
    shown = f"[{name}]" if ":" in name else name
    return f"{parts.scheme}://{shown}:{port or (5986 if parts.scheme == 'https' else 5985)}"
