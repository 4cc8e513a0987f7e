"""What units of work run on: this machine, its stores with their limits, and the word to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from replica.catalog import ProtectedVm
from replica.daemon.bandwidth import Bucket
from replica.daemon.limited import LimitedStore
from replica.daemon.stopping import StoppableStore, Stopper, Where
from replica.daemon.terms import AgentTerms
from replica.health.publishing import Publisher
from replica.host import Host
from replica.stores.address import open_store
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import Store
from replica.vault import Vault
from replica.workers import Workers

# Runs a drill of a VM, and returns what the event says of it; raises GodwitError where the drill did not pass.
Drill = Callable[[Store, Host, ProtectedVm], dict[str, object]]
OpenStore = Callable[[str, "Site", Stopper], Store]


@dataclass(slots=True)
class Site:
    """What every unit of work of a process has in common; for any number of threads.

    ``cycles`` stops cycles, ``care`` everything else: that can be given up as soon as the agent is to stop.
    """

    host: Host
    vault: Vault
    workers: Workers
    terms: AgentTerms
    bucket: Bucket
    drill: Drill | None = None
    cycles: Stopper = field(default_factory=Stopper)
    care: Stopper = field(default_factory=Stopper)
    open_store: OpenStore = field(default_factory=lambda: opened)
    collecting: str | None = None  # the id of the VM whose garbage is being collected
    publisher: Publisher | None = None  # of this machine's digests, where it writes any
    progress: dict[str, dict[str, object]] = field(default_factory=dict)  # of cycles under way, by the VM's name
    _stores: dict[tuple[str, bool], Store] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def told_of(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Give what a cycle reports its progress to, for the status file, while the context lasts."""
        since = self.host.clock.now()

        def progress(done_bytes: int, total_bytes: int, phase: str) -> None:
            self.progress[name] = {
                "since": since,
                "phase": phase,
                "done_bytes": done_bytes,
                "total_bytes": total_bytes,
            }
            self.cycles.progress(done_bytes, total_bytes, phase)

        try:
            yield progress
        finally:
            self.progress.pop(name, None)

    def store(self, url: str, *, for_cycles: bool = False, where: Where = Where.ANYWHERE) -> Store:
        """Return the store at the address, which is opened once. Raises StoreError, ConfigurationError."""
        stopper = self.cycles if for_cycles else self.care
        with self._lock:
            found = self._stores.get((url, for_cycles))
            if found is None:
                found = self._stores[url, for_cycles] = self.open_store(url, self, stopper)
        return StoppableStore(found, stopper, where)


def opened(url: str, site: Site, stopper: Stopper) -> ResilientStore:
    """Open a store: limited below the retries and the sealing, so that what counts is what goes over the line."""
    workers = site.workers
    return open_store(
        url,
        workers=(workers.threads + workers.uploads) * site.terms.concurrency,
        patience=Patience(limit_seconds=float(site.terms.patience_seconds)),
        around=lambda bare: site.vault.around(LimitedStore(bare, site.bucket, stopper.sleep)),
        sleep=stopper.sleep,
    )
