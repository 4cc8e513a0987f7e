"""The ledger: what happened to a VM, by whom, and every machine that it ever was; read from its settings' versions."""

from __future__ import annotations

from collections.abc import Iterator

from replica import catalog
from replica.catalog import ProtectedVm
from replica.model import Settings
from replica.stores.store import Store


def versions(store: Store, found: ProtectedVm) -> Iterator[Settings]:
    """Yield the versions of the settings that were ever in force, the newest first.

    Each names the one before it, so that what was written and never put in force is left out. Versions that were
    written before there was a ledger name none: it begins after them.
    """
    settings = catalog.settings_in_force(store, found)
    yield settings
    while settings.previous:
        settings = catalog.read_settings(store, found.keys, settings.previous)
        yield settings
