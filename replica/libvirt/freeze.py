"""Freezes a guest's file systems for a moment through libvirt, which owns the guest agent's channel, and thaws them.

As in ``replica.agent`` this is done by a process of its own, which thaws when its pipe closes or its time is over. A
guest that did not answer in time may freeze later: it is thawed all the same, over and over until libvirt says so.
"""

from __future__ import annotations

import contextlib
import re
import select
import sys
import time
from typing import IO, Final

from replica.agent import FREEZE_SECONDS, Quiesced, quiesced_by
from replica.libvirt.virsh import Virsh, VirshError, VirshTimeoutError

THAW_SECONDS: Final = 60.0  # how long thawing is tried
THAW_PAUSE_SECONDS: Final = 0.2
LEAST_THAW_SECONDS: Final = 5.0  # for one attempt
_COUNT: Final = re.compile(r"\b(\d+) filesystem")


def domain_quiesced(
    virsh: Virsh, uuid: str, *, seconds: float = FREEZE_SECONDS
) -> contextlib.AbstractContextManager[Quiesced]:
    """Keep the file systems of a domain's guest frozen while the context lasts, for ``seconds`` at most.

    Never raises by itself: where the guest cannot be frozen, the context runs all the same, and ``held`` stays False.
    """
    return quiesced_by([sys.executable, "-m", "replica.libvirt.freeze", virsh.connect or "", uuid, str(seconds)])


def hold(virsh: Virsh, uuid: str, seconds: float, stdin: IO[str], stdout: IO[str]) -> None:
    """Freeze, say so, wait until stdin ends or the time is over, thaw, and say whether it held until then."""

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            stdout.write(f"{text}\n")
            stdout.flush()

    try:
        frozen = _freeze(virsh, uuid, seconds)
    except VirshTimeoutError as error:
        say(error.message)
        thaw(virsh, uuid)
        return
    except VirshError as error:
        say(error.message)
        return
    outcome = "the guest was kept frozen for too long"
    try:
        if not frozen:
            outcome = "the guest froze no file system"
            say(outcome)
        else:
            say("frozen")
            if select.select([stdin], [], [], seconds)[0]:
                outcome = "held"
    finally:
        thawed = thaw(virsh, uuid)
        if thawed == 0 and outcome == "held":
            outcome = "the guest did not stay frozen"
        say(outcome if thawed is not None else f"the guest could not be thawed: {outcome}")


def _freeze(virsh: Virsh, uuid: str, seconds: float) -> int:
    """Return how many file systems were frozen. Raises VirshError, VirshTimeoutError."""
    try:
        return _counted(virsh.ask("domfsfreeze", "--domain", uuid, timeout_seconds=seconds))
    except VirshTimeoutError:
        raise
    except VirshError:
        # Perhaps a helper that did not live to thaw left it frozen: an agent refuses to freeze twice.
        with contextlib.suppress(VirshError):
            if _counted(virsh.ask("domfsthaw", "--domain", uuid, timeout_seconds=seconds)):
                return _counted(virsh.ask("domfsfreeze", "--domain", uuid, timeout_seconds=seconds))
        raise


def thaw(virsh: Virsh, uuid: str, *, seconds: float = THAW_SECONDS) -> int | None:
    """Thaw until libvirt says that it is done; return how many file systems were frozen, None if it never said so."""
    deadline = time.monotonic() + seconds
    while True:
        left = max(LEAST_THAW_SECONDS, deadline - time.monotonic())
        try:
            return _counted(virsh.ask("domfsthaw", "--domain", uuid, timeout_seconds=left))
        except VirshError:
            if time.monotonic() > deadline:
                return None
        time.sleep(THAW_PAUSE_SECONDS)


def _counted(text: str) -> int:
    """Read "Froze 2 filesystem(s)". Of words that are not understood, one is assumed."""
    found = _COUNT.search(text)
    return int(found[1]) if found else 1


if __name__ == "__main__":
    hold(Virsh(sys.argv[1] or None), sys.argv[2], float(sys.argv[3]), sys.stdin, sys.stdout)
