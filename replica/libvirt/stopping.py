"""Shutting down a domain that is replicated, so that its last point loses nothing and costs no more than its changes.

libvirt ends QEMU together with the guest, and what the disks recorded is asked of a running QEMU alone. So once the
guest has shut down, the domain is started again with its processors standing: its disks are read for the last time
through it, and then it is ended. Should we be killed meanwhile, libvirt ends it by itself: it was started by a
connection of ours that is kept open, and goes with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from replica.errors import SourceError
from replica.libvirt.address import LibvirtAddress
from replica.libvirt.virsh import Virsh, VirshError, VirshRefusedError

POLL_SECONDS: Final = 0.5
ASK_AGAIN_SECONDS: Final = 10.0  # a guest that still starts up does not hear the power button
PRESS_SECONDS: Final = 15.0  # an agent that is silent is waited for by libvirt
START_SECONDS: Final = 60.0
END_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 0.1
OFF: Final = "shut off"
STANDING: Final = "paused"
STARTING: Final = "starting up"  # libvirt calls it paused until its QEMU is ready, or does not come up


class StoppedDomain:
    """A domain whose guest is off; ``stands`` where its QEMU is there all the same, and has never run."""

    def __init__(self, virsh: Virsh, name: str) -> None:
        self._virsh = virsh
        self._name = name
        self.stands = False

    def state(self) -> str:
        """Return libvirt's word for its state; while it is being started, "starting up". Raises VirshError."""
        said = self._virsh.ask("domstate", "--domain", self._name, "--reason").strip()
        word, _, reason = said.partition(" (")
        return STARTING if word == STANDING and reason.removesuffix(")") == STARTING else word

    def check(self) -> None:
        """See that it is still off. Raises SourceError."""
        if self.state() != (STANDING if self.stands else OFF):
            raise SourceError("the domain was started again", path=self._name)

    def finish(self) -> None:
        """End its QEMU, in order: what the disks recorded is kept in them."""
        if not self.stands:
            return
        for how in (("--graceful",), ()):
            try:
                self._virsh.ask("destroy", "--domain", self._name, *how, timeout_seconds=END_SECONDS)
                break
            except VirshRefusedError:
                if self.state() == OFF:  # somebody else has ended it
                    break
                if not how:
                    raise
        self.stands = False


@contextmanager
def stopped_domain(
    address: LibvirtAddress, *, timeout_seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[StoppedDomain]:
    """Shut down the domain, which is off while the context lasts. Raises SourceError where it stays on."""
    virsh = Virsh(address.connect)
    domain = StoppedDomain(virsh, address.domain)
    _shut_down(domain, virsh, address.domain, timeout_seconds, sleep)
    with _standing(domain, virsh, address.domain, sleep):
        yield domain


def _shut_down(
    domain: StoppedDomain, virsh: Virsh, name: str, timeout_seconds: float, sleep: Callable[[float], None]
) -> None:
    ask_at = time.monotonic()
    deadline = ask_at + timeout_seconds
    while domain.state() != OFF:
        if time.monotonic() > deadline:
            raise SourceError(
                f"the domain did not shut down within {timeout_seconds:.0f} s",
                path=name,
                hint="shut it down from inside, and fail over again; or say --unplanned",
            )
        if time.monotonic() >= ask_at:
            _press(domain, virsh, name)
            ask_at = time.monotonic() + ASK_AGAIN_SECONDS
        sleep(POLL_SECONDS)


def _press(domain: StoppedDomain, virsh: Virsh, name: str) -> None:
    """Ask the guest's agent, and where it does not hear, press the power button. Raises VirshRefusedError."""
    try:
        virsh.ask("shutdown", "--domain", name, timeout_seconds=PRESS_SECONDS)
    except VirshRefusedError:
        if domain.state() != OFF:
            raise
    except VirshError:  # it may have been heard: what the domain does is looked at
        return


@contextmanager
def _standing(domain: StoppedDomain, virsh: Virsh, name: str, sleep: Callable[[float], None]) -> Iterator[None]:
    """Let the domain's QEMU stand for the time of the context; where that cannot be, its files are read instead."""
    with virsh.connection() as connection:
        connection.tell("start", "--domain", name, "--paused", "--autodestroy")
        deadline = time.monotonic() + START_SECONDS
        while not domain.stands and not connection.complaint() and time.monotonic() < deadline:
            domain.stands = domain.state() == STANDING
            sleep(0 if domain.stands else LOOK_SECONDS)
        try:
            yield
        finally:
            with suppress(SourceError):  # it ends with the connection, at the latest
                domain.finish()
