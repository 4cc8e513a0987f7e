"""A turn at a VM: its lease held while its standing is changed, so that whoever comes meanwhile is told so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from replica import catalog, history, lease
from replica.catalog import ProtectedVm
from replica.errors import GodwitError, LeaseHeldError
from replica.failover import transitions
from replica.failover.transitions import Command
from replica.host import Host
from replica.lease import RENEW_AFTER_SECONDS, Lease
from replica.model import Identity, Point, Settings, Standing, State
from replica.stores.store import Store

ASK_AGAIN_SECONDS: Final = 1.0
# In these a lease that is held is most likely that of a cycle; else it is that of an operator.
_REPLICATED: Final = frozenset({Standing.PROTECTED, Standing.REPROTECTED})


class Turn:
    """The right to change where a VM stands. ``settings`` are those in force, ``newest`` the newest readable point."""

    def __init__(self, store: Store, host: Host, found: ProtectedVm, held: Lease, newest: Point | None) -> None:
        self.store = store
        self.host = host
        self.found = found
        self.held = held
        self.newest = newest
        self.settings = catalog.read_settings(store, found.keys, held.settings_version)

    @property
    def state(self) -> State:
        """Where the VM stands."""
        return self.settings.state

    def put(self, after: Settings, command: Command, identities: tuple[Identity, ...] = ()) -> Settings:
        """Put other settings in force. Raises LeaseLostError."""
        self.settings = catalog.enact(
            self.store, self.host, self.found, self.held, self.settings, after, command=command, identities=identities
        )
        return self.settings

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the lease while something else is done that may take long. Raises LeaseLostError once it has ended.

        Nothing else may use the lease meanwhile.
        """
        over = threading.Event()
        failed: list[GodwitError] = []

        def renew() -> None:
            while not over.wait(RENEW_AFTER_SECONDS):
                try:
                    self.held.check()
                except GodwitError as error:
                    if not error.retryable:  # else the next time may be better, and the next change will tell
                        failed.append(error)
                        return

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]


@contextmanager
def turn(
    store: Store,
    host: Host,
    found: ProtectedVm,
    command: Command,
    *,
    take_over: bool = False,
    wait_seconds: float = 0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Turn]:
    """Take a turn for ``command``, if that may come now.

    A cycle that is at work is waited for, as long as ``wait_seconds``, or with ``take_over`` is fenced off: it
    publishes nothing more. Raises StandingError, LeaseHeldError where an operator or a cycle is at work.
    """
    settings = catalog.settings_in_force(store, found)
    transitions.require(found.vm.name, settings.state, command)  # before anything is written
    is_cycles = settings.state.standing in _REPLICATED
    # Not from whoever was faster to change the standing: that is another version then.
    overthrown = settings.version if take_over and is_cycles else None
    retrying = Retrying(
        retry=retry_if_exception_type(LeaseHeldError),
        stop=stop_after_delay(wait_seconds if is_cycles else 0),
        wait=wait_fixed(ASK_AGAIN_SECONDS),
        sleep=sleep,
        reraise=True,
    )
    with ExitStack() as stack:
        held = retrying(lambda: stack.enter_context(lease.holding(store, found.keys, host, take_over=overthrown)))
        newest = history.begin(store, found.keys, host, held)  # whoever held it before publishes nothing more
        taken = Turn(store, host, found, held, newest)
        transitions.require(found.vm.name, taken.state, command)
        yield taken
