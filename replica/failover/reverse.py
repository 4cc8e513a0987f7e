"""Where a recovery machine's first delta begins, made of what its VM's standing holds."""

from __future__ import annotations

from replica.catalog import ProtectedVm
from replica.failback.departure import Departure, departure
from replica.model import Point, Settings
from replica.stores.store import Store


def departure_of(store: Store, found: ProtectedVm, settings: Settings, newest: Point | None) -> Departure | None:
    """Return what tells the disks of a replicated recovery machine from the point that it was started from.

    None where the VM is replicated from its source, or once ``newest`` is another point: what has changed since that
    one is known then. Raises IntegrityError where the manifest of a conversion cannot be read.
    """
    reverse = settings.state.reverse
    if reverse is None or newest is None or newest.point != reverse.point:
        return None
    from replica.failover import conversions  # noqa: PLC0415 - few cycles need any of the converter

    manifests = ((ref.disk, conversions.read(store, found, ref)) for ref in reverse.conversions)
    return departure(reverse.point, reverse.bitmap, manifests)
