"""A drill from its command to its record: made, told in evidence, and noted in the store for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replica.catalog import ProtectedVm
from replica.drills import evidence
from replica.drills.checks import Terms
from replica.drills.drill import Drill, run
from replica.drills.evidence import Written
from replica.errors import GodwitError, StoreError, UsageError
from replica.failover.failover import Order
from replica.failover.means import Means
from replica.health.journal import record_event
from replica.health.observation import Event, EventKind
from replica.host import Host
from replica.signing import host_key
from replica.stores.store import Store

FOLDER: Final = "evidence"  # in the state folder, where no other is chosen


@dataclass(frozen=True, slots=True)
class Recorded:
    """A drill with its evidence. ``record`` is its object in the store; ``unrecorded`` is why there is none."""

    drill: Drill
    written: Written
    record: str | None
    unrecorded: str | None = None


def folder_of(host: Host, terms: Terms, wanted: Path | None = None) -> Path:
    """Return the folder of evidence. Raises UsageError where there is none."""
    if wanted is not None or terms.evidence is not None:
        return wanted or terms.evidence or Path()
    if host.state_folder is None:
        raise UsageError("this machine has no state folder for the evidence", hint="choose a folder with --evidence")
    return host.state_folder / FOLDER


def drill(means: Means, order: Order, terms: Terms, folder: Path | None = None) -> Recorded:
    """Make a drill, write its evidence, and record it in the store, which takes one request.

    Raises as ``replica.drills.drill.run``, ConfigurationError where the host has no signing key, and GodwitError where
    the evidence cannot be written.
    """
    key = host_key(means.host.state_folder)  # what would keep it from being told is found before anything is started
    chosen = folder_of(means.host, terms, folder)
    evidence.prepare(chosen)
    made = run(means, order, terms)
    try:
        written = evidence.write(chosen, means, made, key)
    except GodwitError:
        try_to_record(means, event_of(made, None))
        raise
    record, unrecorded = try_to_record(means, event_of(made, written))
    return Recorded(made, written, record, unrecorded)


def event_of(made: Drill, written: Written | None) -> Event:
    """Return what the store is to remember of a drill (docs/format.md, 8)."""
    number = made.point.point if made.point is not None else made.wanted_point
    started = "nothing was started" if made.machine is None else f"Generation {made.machine.generation}"
    good = sum(one.passed for one in made.outcomes)
    told = [f"{started} on {made.platform}", f"{good} of {len(made.outcomes)} checks passed"]
    if written is not None:
        told += [f"evidence {written.document.name} SHA256:{written.sha256}", f"key SHA256:{written.fingerprint}"]
    told += made.reasons
    return Event(
        EventKind.DRILL,
        made.ended_at,
        "passed" if made.passed and written is not None else "failed",
        points=() if number is None else (number,),
        seconds=made.rto_seconds or 0.0,
        detail="; ".join(told).encode("utf-8", "backslashreplace").decode(),  # names may hold what UTF-8 does not
    )


def scheduled(
    means_of: Callable[[Store, Host, ProtectedVm], Means], terms: Terms
) -> Callable[[Store, Host, ProtectedVm], dict[str, object]]:
    """Return what an agent runs for its drills: it takes store, host and VM, as ``means_of`` does.

    Raises GodwitError where the drill did not pass, or was not recorded.
    """

    def work(store: Store, host: Host, found: ProtectedVm) -> dict[str, object]:
        done = drill(means_of(store, host, found), Order(), terms)
        if not done.drill.passed:
            raise GodwitError("the drill failed: " + "; ".join(done.drill.reasons), path=str(done.written.document))
        if done.record is None:
            raise GodwitError(f"the drill passed, and was not recorded: {done.unrecorded}")
        point = done.drill.point
        return {
            "point": None if point is None else point.point,
            "rto_seconds": done.drill.rto_seconds,
            "evidence": str(done.written.document),
        }

    return work


def try_to_record(means: Means, event: Event) -> tuple[str | None, str | None]:
    """Record an event; return its key, or why there is none."""
    try:
        return record_event(means.store, means.host, means.found.keys, event), None
    except StoreError as error:
        return None, str(error)
