"""The lease: a VM's one replaceable object, the time-bounded right to write, with the epoch that fences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from replica import record
from replica.errors import (
    IntegrityError,
    LeaseHeldError,
    LeaseLostError,
    ObjectChangedError,
    ObjectMissingError,
    StandingError,
    StoreError,
)
from replica.host import Host
from replica.keys import LARGEST_EPOCH, VmKeys
from replica.stores.store import Store

KIND = "lease"
TERM: Final = timedelta(minutes=5)
RENEW_AFTER_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: a process on a machine."""

    host_id: str
    host_name: str
    process: int
    nonce: str


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The lease as it lies in the store. ``point`` is the newest number known to be taken, 0 for none."""

    epoch: int
    held: bool
    holder: Holder | None
    acquired_at: datetime
    expires_at: datetime
    point: int
    settings_version: int
    leftovers: bool


def encode(lease: LeaseRecord) -> bytes:
    """Return the lease object."""
    holder = lease.holder
    return record.encode(
        KIND,
        {
            "epoch": lease.epoch,
            "state": "held" if lease.held else "released",
            "holder": None
            if holder is None
            else {
                "host_id": holder.host_id,
                "host_name": holder.host_name,
                "process": holder.process,
                "nonce": holder.nonce,
            },
            "acquired_at": record.time_text(lease.acquired_at),
            "expires_at": record.time_text(lease.expires_at),
            "point": lease.point,
            "settings_version": lease.settings_version,
            "leftovers": lease.leftovers,
        },
    )


def decode(data: bytes, *, key: str) -> LeaseRecord:
    """Decode a lease object. Raises IntegrityError, FormatVersionError."""
    body = record.decode(KIND, data, key=key)
    state = body.text("state")
    if state not in ("held", "released"):
        raise IntegrityError(f"field 'state' should be held or released, it is {state!r:.60}", key=key)
    holder = None
    if body.values.get("holder") is not None:
        fields = body.fields("holder")
        holder = Holder(
            fields.text("host_id"), fields.text("host_name"), fields.integer("process"), fields.text("nonce")
        )
    return LeaseRecord(
        epoch=body.integer("epoch", most=LARGEST_EPOCH),
        held=state == "held",
        holder=holder,
        acquired_at=body.time("acquired_at"),
        expires_at=body.time("expires_at"),
        point=body.integer("point"),
        settings_version=body.integer("settings_version", least=1),
        leftovers=body.truth("leftovers"),
    )


def read(store: Store, keys: VmKeys) -> tuple[LeaseRecord, str]:
    """Return the lease and its tag. Raises IntegrityError where it is missing."""
    try:
        data, tag = store.get_tagged(keys.lease)
    except ObjectMissingError as error:
        raise IntegrityError(
            "the VM's lease is missing from the store",
            key=keys.lease,
            hint="its points can still be restored; nothing can be added to it",
        ) from error
    return decode(data, key=keys.lease), tag


class Lease:
    """A held lease. Its ``epoch`` goes into everything that is published under it."""

    def __init__(self, store: Store, keys: VmKeys, host: Host, state: LeaseRecord, tag: str, *, was_held: bool) -> None:
        self._store = store
        self._keys = keys
        self._host = host
        self._state = state
        self._tag = tag
        self._renewed = host.clock.monotonic()
        self.was_held = was_held  # the one before was not released: its writer may still be alive

    @property
    def epoch(self) -> int:
        """The fencing token, greater than every one before."""
        return self._state.epoch

    @property
    def point(self) -> int:
        """The newest point number known to be taken."""
        return self._state.point

    @property
    def settings_version(self) -> int:
        """The version of the settings in force."""
        return self._state.settings_version

    @property
    def leftovers(self) -> bool:
        """Whether segments of a cycle that was cut off may lie in the store."""
        return self._state.leftovers

    def renew_if_due(self) -> None:
        """Prolong the term if a good part of it has passed; cheap to call often. Raises LeaseLostError."""
        if self._host.clock.monotonic() - self._renewed >= RENEW_AFTER_SECONDS:
            self.check()

    def check(self) -> None:
        """Prove that the lease is still held, and prolong it. Raises LeaseLostError."""
        self._write(replace(self._state, expires_at=self._host.clock.now() + TERM))

    def advance(self, point: int) -> None:
        """Note that ``point`` is taken; written with the next renewal or the release."""
        self._state = replace(self._state, point=point)

    def settle(self, point: int) -> None:
        """Note that ``point`` was published: nothing that was left over before it is of use any more."""
        self._state = replace(self._state, point=point, leftovers=False)

    def change_settings(self, version: int) -> None:
        """Put another version of the settings in force, at once. Raises LeaseLostError."""
        self._write(replace(self._state, settings_version=version))

    def release(self, *, leftovers: bool = False) -> None:
        """Give the right back, noting ``leftovers`` beside those noted before. Raises LeaseLostError if it was lost."""
        state = replace(self._state, held=False, expires_at=self._host.clock.now())
        self._write(replace(state, leftovers=leftovers or state.leftovers))

    def _write(self, state: LeaseRecord) -> None:
        try:
            self._tag = self._store.replace(self._keys.lease, encode(state), tag=self._tag)
        except (ObjectChangedError, ObjectMissingError) as error:
            raise LeaseLostError(
                "another agent took over this VM", key=self._keys.lease, hint="stop one of the two agents"
            ) from error
        self._state = state
        self._renewed = self._host.clock.monotonic()


def acquire(store: Store, keys: VmKeys, host: Host, *, sole_on_host: bool, take_over: int | None = None) -> Lease:
    """Take the lease under a new epoch.

    ``sole_on_host``: no other process of this machine works on the VM, so that a lease of this machine is a dead one's.
    ``take_over``: whoever holds it while that version of the settings is in force is to publish nothing more, although
    its term has not run out; the fence sees to it.
    Raises LeaseHeldError where another agent's term has not run out or it was faster.
    """
    before, tag = read(store, keys)
    now = host.clock.now()
    holder = before.holder
    dead = before.settings_version == take_over or (
        sole_on_host and holder is not None and holder.host_id == host.host_id
    )
    if before.held and before.expires_at > now and not dead:
        name = holder.host_name if holder else "another machine"
        raise LeaseHeldError(
            f"{name} is at work on this VM; its lease runs until {before.expires_at:%H:%M:%S} UTC",
            hint="wait until it is done; if that machine is gone, the lease can be taken when it has run out",
        )
    if before.epoch == LARGEST_EPOCH:
        raise IntegrityError("the lease's epoch is the last that there is", key=keys.lease)
    state = LeaseRecord(
        epoch=before.epoch + 1,
        held=True,
        holder=Holder(host.host_id, host.host_name, os.getpid(), host.randomness.new_id()),
        acquired_at=now,
        expires_at=now + TERM,
        point=before.point,
        settings_version=before.settings_version,
        leftovers=before.leftovers or before.held,
    )
    try:
        tag = store.replace(keys.lease, encode(state), tag=tag)
    except ObjectChangedError as error:
        raise LeaseHeldError("another agent took this VM's lease at the same moment", hint="try again later") from error
    return Lease(store, keys, host, state, tag, was_held=before.held)


@contextmanager
def holding(store: Store, keys: VmKeys, host: Host, *, take_over: int | None = None) -> Iterator[Lease]:
    """Hold the lease while the context lasts; release it at the end, with leftovers noted if the end is an error.

    ``take_over`` as for ``acquire``.
    """
    with host.exclusive(keys.vm_id) as sole:
        lease = acquire(store, keys, host, sole_on_host=sole, take_over=take_over)
        try:
            yield lease
        except LeaseLostError:
            raise
        except StandingError:  # refused before anything was written
            lease.release()
            raise
        except Exception:
            _release_quietly(lease)
            raise
        except KeyboardInterrupt:
            _release_quietly(lease)
            raise
        lease.release()


def _release_quietly(lease: Lease) -> None:
    """Release after a failure; if that fails too, the first error matters more and the term runs out by itself."""
    try:
        lease.release(leftovers=True)
    except (LeaseLostError, StoreError):
        return
