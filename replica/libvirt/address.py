"""Where a disk of a libvirt domain is, as text in a VM's protection settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote

from replica.errors import UsageError
from replica.source import LIBVIRT


@dataclass(frozen=True, slots=True)
class LibvirtAddress:
    """A domain, one of its disks by the target that it has there (vda), and the connection; None is libvirt's default.

    ``freeze``: whether the guest's file systems are to be frozen for the instant, where its agent can do that.
    """

    domain: str
    disk: str
    connect: str | None = None
    freeze: bool = True

    def __str__(self) -> str:
        settings = [f"connect={quote(self.connect, safe='')}"] if self.connect else []
        settings += [] if self.freeze else ["freeze=no"]
        query = f"?{'&'.join(settings)}" if settings else ""
        return f"{LIBVIRT}{quote(self.domain, safe='')}{query}#{quote(self.disk, safe='')}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` writes. Raises UsageError."""
        before, _, disk = text.removeprefix(LIBVIRT).partition("#")
        domain, _, query = before.partition("?")
        settings = dict(one.partition("=")[::2] for one in query.split("&") if one)
        connect, freeze = settings.pop("connect", ""), settings.pop("freeze", "yes")
        if not (text.startswith(LIBVIRT) and domain and disk) or settings or freeze not in ("yes", "no"):
            raise UsageError(f"{text!r} is no disk of a libvirt domain", hint="write libvirt:DOMAIN#TARGET")
        return cls(unquote(domain), unquote(disk), unquote(connect) or None, freeze == "yes")
