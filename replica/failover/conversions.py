"""Conversions of recovery machines' disks: planned on the point itself, their manifests kept as objects of the VM."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final, Literal

from conversion.errors import ConversionError
from conversion.manifest import LARGEST_CONTENT_BYTES, Manifest
from replica.catalog import ProtectedVm
from replica.errors import IntegrityError, ObjectExistsError, ObjectMissingError, UsageError
from replica.generation.patched import Conversion, plan_conversion
from replica.host import Host
from replica.model import ConversionRef, Point, RecoveryMachine
from replica.stores.store import Store
from replica.view import PointView
from replica.workers import Workers

# The packed content may be as large as what it packs, and what describes it is small beside that.
LARGEST_OBJECT_BYTES: Final = 2 * LARGEST_CONTENT_BYTES


def plan(
    store: Store,
    host: Host,
    found: ProtectedVm,
    point: Point,
    generation: Literal[1, 2],
    *,
    workers: Workers | None = None,
) -> Conversion:
    """Plan what makes the point's disks start as ``generation``; nothing where they do so as they are.

    Raises RefusedError with every reason, UsageError where no way leads there.
    """
    if generation == point.machine.generation:
        return Conversion()
    if generation == 2:
        raise UsageError(
            f"point {point.point} is of a machine of Generation 1, which nothing makes one of Generation 2",
            hint="leave --generation out",
        )
    with ExitStack() as stack:
        views = [
            (disk.number, stack.enter_context(PointView(store, host, found, point, disk, workers=workers)))
            for disk in point.disks
        ]
        return plan_conversion(views, point.machine)


def keep(store: Store, found: ProtectedVm, point: int, planned: Conversion) -> Conversion:
    """Put the manifest of a point's conversion in the store, and return the conversion that counts from now on.

    Where there is a manifest already it is that: a point is converted in one way, whoever asks. Raises StoreError,
    IntegrityError.
    """
    if planned.manifest is None or planned.disk is None:
        return planned
    ref = ConversionRef(point, planned.disk)
    try:
        store.create(found.keys.conversion(ref.point, ref.disk), planned.manifest.encode())
    except ObjectExistsError:
        return Conversion(ref.disk, read(store, found, ref))
    return planned


def refs(point: int, conversion: Conversion) -> tuple[ConversionRef, ...]:
    """Return what the conversion's manifest is called, once it is kept."""
    return () if conversion.disk is None else (ConversionRef(point, conversion.disk),)


def kept(store: Store, found: ProtectedVm, machine: RecoveryMachine) -> Conversion:
    """Return the conversion that a machine's disks have. Raises IntegrityError."""
    if not machine.conversions:
        return Conversion()
    ref = machine.conversions[0]  # it is the disk with the system, and there is one
    return Conversion(ref.disk, read(store, found, ref))


def read(store: Store, found: ProtectedVm, ref: ConversionRef) -> Manifest:
    """Return the manifest of a conversion. Raises IntegrityError where it is missing or damaged."""
    key = found.keys.conversion(ref.point, ref.disk)
    try:
        data = store.get(key, length=LARGEST_OBJECT_BYTES)
    except ObjectMissingError as error:
        raise IntegrityError("the manifest of a conversion is missing from the store", key=key) from error
    try:
        return Manifest.decode(data, name=key)
    except ConversionError as error:
        raise IntegrityError(f"the manifest of a conversion is damaged: {error.message}", key=key) from error
