"""Shuts a VM on a Hyper-V host down through its integration service, and sees that it stays off."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Final

from replica.errors import SourceError
from replica.hyperv import connect as connecting
from replica.hyperv.address import HypervAddress
from replica.hyperv.scripts import STOP
from replica.hyperv.session import Answer, ask

QUESTION_SECONDS: Final = 60.0  # for which one question waits
POLL_SECONDS: Final = 2.0


class StoppedVm:
    """A VM that is off."""

    def __init__(self, address: HypervAddress) -> None:
        self._address = address

    def check(self) -> None:
        """See that it is still off. Raises SourceError."""
        if state(self._address) != "Off":
            raise SourceError("the VM was started again", path=self._address.name or self._address.vm)

    def finish(self) -> None:
        """Do nothing: it is off."""


def stop(path: str, timeout_seconds: float, sleep: Callable[[float], None]) -> StoppedVm:
    """Shut the VM of that disk down, and wait. Raises SourceError where it stays on."""
    address = HypervAddress.parse(path)
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = _stop(address, min(QUESTION_SECONDS, max(1.0, deadline - time.monotonic())))
        if answer.text("state") == "Off":
            return StoppedVm(address)
        if time.monotonic() >= deadline:
            why = f": {answer.text('why')}" if answer.text("why") else ""
            raise SourceError(
                f"the guest did not shut down within {timeout_seconds:.0f} s{why}",
                path=address.name or address.vm,
                hint="shut it down from inside, and try again; or say --unplanned",
            )
        sleep(POLL_SECONDS)


def state(address: HypervAddress) -> str:
    """Return the state of the VM, as Hyper-V names it. Raises SourceError."""
    with closing(connecting.connect(address.host)) as session:
        return ask(session, STOP, VmId=address.vm, How="look", timeout_seconds=QUESTION_SECONDS).text("state")


def _stop(address: HypervAddress, seconds: float) -> Answer:
    with closing(connecting.connect(address.host)) as session:
        return ask(session, STOP, VmId=address.vm, How="ask", timeout_seconds=seconds)
