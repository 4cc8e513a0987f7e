"""Marks of change: they tell whoever reads digests that a VM is not as its digest may still say (docs/format.md, 8).

Their keys alone say all, so that one LIST tells what changed. Nothing depends on them but reports.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from replica import keys, record
from replica.errors import StoreError
from replica.keys import VmKeys
from replica.stores.store import Store

KIND: Final = "change"
_MARK: Final = re.compile(r"([0-9a-f]{32})-(?:s(\d{20})|e(\d{8}T\d{12}Z))\.json")
_TIME: Final = "%Y%m%dT%H%M%S%fZ"


@dataclass(frozen=True, slots=True)
class Mark:
    """That a VM has at least this version of settings in force, or an event of this time; one of the two is None."""

    key: str
    vm_id: str
    settings_version: int | None = None
    event_at: datetime | None = None

    def is_known(self, settings_version: int, event_at: datetime | None) -> bool:
        """Whether somebody who knows of that version, and of events until then, knows of this."""
        if self.settings_version is not None:
            return settings_version >= self.settings_version
        return event_at is not None and self.event_at is not None and event_at >= self.event_at


def mark_settings(store: Store, vm_keys: VmKeys, version: int) -> None:
    """Mark that a version of a VM's settings came into force. What keeps it from being written is let pass."""
    _write(store, vm_keys, f"s{version:020}", {"settings_version": version})


def mark_event(store: Store, vm_keys: VmKeys, at: datetime) -> None:
    """Mark that a VM has an event of that time. What keeps it from being written is let pass."""
    _write(store, vm_keys, f"e{at.astimezone(UTC).strftime(_TIME)}", {"event_at": record.time_text(at)})


def _write(store: Store, vm_keys: VmKeys, what: str, body: dict[str, object]) -> None:
    key = f"{keys.changes(vm_keys.tenant)}{vm_keys.vm_id}-{what}.json"
    # Reports are late without it, until the agent looks again; what it tells of is done and must not fail.
    with contextlib.suppress(StoreError):
        store.create(key, record.encode(KIND, {"vm_id": vm_keys.vm_id, **body}))


def listed(store: Store, tenant: str) -> Iterator[Mark]:
    """Yield all marks of the tenant: one LIST for each thousand. Raises StoreError."""
    prefix = keys.changes(tenant)
    for info in store.list(prefix):
        match = _MARK.fullmatch(info.key.removeprefix(prefix))
        if match is None:
            continue  # a later version's
        if match[2] is not None:
            yield Mark(info.key, match[1], settings_version=int(match[2]))
            continue
        with contextlib.suppress(ValueError):
            yield Mark(info.key, match[1], event_at=datetime.strptime(match[3], _TIME).replace(tzinfo=UTC))
