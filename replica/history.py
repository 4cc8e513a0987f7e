"""A VM's history: its manifests read, found, fenced and published, in the order that docs/ordering.md demands."""

from __future__ import annotations

from collections.abc import Iterator

from replica import lease as leases
from replica import manifest
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    LeaseLostError,
    ObjectExistsError,
    ObjectMissingError,
    UsageError,
)
from replica.host import Host
from replica.keys import VmKeys, point_of
from replica.lease import Lease
from replica.model import Fence, Point
from replica.stores.store import Store


def read(store: Store, keys: VmKeys, number: int) -> Point | Fence:
    """Return the manifest of a number. Raises ObjectMissingError, IntegrityError, FormatVersionError."""
    key = keys.manifest(number)
    return manifest.decode(store.get(key), key=key, vm_id=keys.vm_id, point=number)


def newest_number(store: Store, keys: VmKeys, hint: int) -> int:
    """Return the greatest number that is taken, asking upwards from ``hint``, which is taken or 0."""
    number = hint
    while _taken(store, keys, number + 1):
        number += 1
    return number


def _taken(store: Store, keys: VmKeys, number: int) -> bool:
    try:
        store.head(keys.manifest(number))
    except ObjectMissingError:
        return False
    return True


def point_at_or_before(store: Store, keys: VmKeys, number: int, *, damaged_too: bool = True) -> Point | None:
    """Return the newest point that is not newer than ``number``, skipping fences; None where there is none.

    Raises IntegrityError where its manifest is damaged, or steps over it without ``damaged_too``.
    """
    while number > 0:
        try:
            found = read(store, keys, number)
        except ObjectMissingError:  # pruned
            found = None
        except IntegrityError:
            if damaged_too:
                raise
            found = None
        if isinstance(found, Point):
            return found
        number -= 1
    return None


def newest(store: Store, keys: VmKeys) -> Point | None:
    """Return the newest recovery point, or None where the VM has none yet."""
    state, _ = leases.read(store, keys)
    return point_at_or_before(store, keys, newest_number(store, keys, state.point))


def point(store: Store, keys: VmKeys, number: int) -> Point:
    """Return one recovery point by its number. Raises UsageError where it is none."""
    try:
        found = read(store, keys, number) if number > 0 else None
    except ObjectMissingError:
        found = None
    if not isinstance(found, Point):
        raise UsageError(f"there is no recovery point {number}", hint="'godwit points NAME' lists those that exist")
    return found


def points(store: Store, keys: VmKeys) -> Iterator[Point | IntegrityError | FormatVersionError]:
    """Yield all recovery points, oldest first; what cannot be read comes as its error, so that it hides no other."""
    for info in store.list(keys.manifests):
        number = point_of(info.key)
        if number is None:
            continue
        try:
            found = read(store, keys, number)
        except (IntegrityError, FormatVersionError) as error:
            yield error
        except ObjectMissingError:
            continue
        else:
            if isinstance(found, Point):
                yield found


def publish(store: Store, keys: VmKeys, made: Point | Fence) -> None:
    """Create the manifest. Raises LeaseLostError where another writer has the number."""
    key = keys.manifest(made.point)
    try:
        store.create(key, manifest.encode(made))
    except ObjectExistsError as error:
        raise LeaseLostError(
            f"number {made.point} was taken by another agent; nothing was published",
            key=key,
            hint="stop one of the two agents",
        ) from error


def begin(store: Store, keys: VmKeys, host: Host, lease: Lease) -> Point | None:
    """Find the point that a cycle under ``lease`` continues (None: it is the first), having fenced off older writers.

    Afterwards ``lease.point`` is the greatest number taken, and no writer of an earlier epoch can publish.
    Raises LeaseLostError where a later epoch is met.
    """
    number = newest_number(store, keys, lease.point) if lease.leftovers else lease.point
    if number > lease.point:  # found by asking, maybe after a sleep: the fence of whoever took over may be among them
        _refuse_later_epoch(store, keys, lease, number)
    if lease.was_held:
        number = _fence(store, keys, host, lease, number + 1)
    lease.advance(number)
    # A damaged manifest must not end replication: an older point is as good to compare with, and heals the history.
    previous = point_at_or_before(store, keys, number, damaged_too=False)
    if previous is not None and previous.epoch > lease.epoch:
        raise LeaseLostError(f"point {previous.point} was published under a later epoch", key=keys.lease)
    return previous


def _fence(store: Store, keys: VmKeys, host: Host, lease: Lease, number: int) -> int:
    while True:
        try:
            fence = Fence(keys.vm_id, number, lease.epoch, host.clock.now())
            store.create(keys.manifest(number), manifest.encode(fence))
        except ObjectExistsError:
            # Either the earlier writer was still alive and this is its last point, or our own lost answer.
            _refuse_later_epoch(store, keys, lease, number)
            number += 1
        else:
            return number


def _refuse_later_epoch(store: Store, keys: VmKeys, lease: Lease, number: int) -> None:
    if read(store, keys, number).epoch > lease.epoch:
        raise LeaseLostError(f"number {number} was taken under a later epoch", key=keys.lease)
