"""Which VMs are this machine's: those all of whose disks can be read here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from replica.errors import SourceError, UsageError
from replica.hyperv.address import HypervAddress
from replica.libvirt.address import LibvirtAddress
from replica.libvirt.virsh import Virsh
from replica.qemu import LiveAddress
from replica.source import HYPERV, LIBVIRT, LIVE


class Here:
    """Looks for disks on this machine. Each libvirt is asked once for all of its domains, so make a new one each time.

    A file must be there and readable, the socket of a QEMU must exist, a libvirt must know the domain, and a
    Hyper-V host must be another machine, or this one.
    """

    def __init__(self) -> None:
        self._domains: dict[str | None, frozenset[str]] = {}

    def missing(self, paths: Iterable[str]) -> str | None:
        """Return the first disk that cannot be read here, None where all can."""
        return next((path for path in paths if not self._has(path)), None)

    def _has(self, path: str) -> bool:
        try:
            if path.startswith(LIBVIRT):
                address = LibvirtAddress.parse(path)
                return address.domain in self._known(address.connect)
            if path.startswith(HYPERV):
                # Another host is asked from anywhere: which agent does it, its configuration says.
                return HypervAddress.parse(path).host is not None or sys.platform == "win32"
            if path.startswith(LIVE):
                path = LiveAddress.parse(path).monitor
            return os.access(path, os.R_OK)
        except (UsageError, OSError, ValueError):
            return False

    def _known(self, connect: str | None) -> frozenset[str]:
        if connect not in self._domains:
            virsh = Virsh(connect)
            try:
                names = virsh.ask("list", "--all", "--name").split("\n")
                ids = virsh.ask("list", "--all", "--uuid").split("\n")
            except SourceError:
                names = ids = []
            self._domains[connect] = frozenset(one.strip() for one in (*names, *ids) if one.strip())
        return self._domains[connect]
