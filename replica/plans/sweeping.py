"""Sweeping: deletes runs that ended long ago with their journals, but never a plan's last run."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from replica import keys
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError, StoreError
from replica.keys import PlanKeys
from replica.plans import journal
from replica.stores.store import Store

KEPT: Final = timedelta(days=90)

_OF_PLAN: Final = re.compile(
    r"(?P<plan>[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)"
    r"\.(?:runs/(?P<begun>[0-9]{20})|journal/(?P<run>[0-9]{20})/(?P<entry>[0-9]{10}))\.json"
)


@dataclass(slots=True)
class _Run:
    is_begun: bool = False
    entries: list[int] = field(default_factory=list)


def sweep(store: Store, tenant: str, now: datetime) -> int:
    """Delete runs that ended, or were given up, more than 90 days ago; return how many.

    The last run of a plan stays, and so does one that nobody brought to an end, or whose end cannot be read: it may
    be a later version's. Where the store fails the rest is left for the next time.
    """
    gone = 0
    with suppress(StoreError):
        for plan, runs in _listed(store, tenant).items():
            plan_keys = PlanKeys(tenant, plan)
            last = max((number for number, run in runs.items() if run.is_begun), default=0)
            for number in sorted(number for number in runs if number < last):
                if _is_due(store, plan_keys, number, runs[number], now):
                    # How it was begun goes first: without that there is no run, and what is left of it is found here
                    # again. The other way round a run would be there whose journal is damaged.
                    store.delete(plan_keys.run(number))
                    for entry in runs[number].entries:
                        store.delete(plan_keys.entry(number, entry))
                    gone += 1
    return gone


def _listed(store: Store, tenant: str) -> dict[str, dict[int, _Run]]:
    plans: dict[str, dict[int, _Run]] = {}
    prefix = keys.plans(tenant)
    for info in store.list(prefix):
        match = _OF_PLAN.fullmatch(info.key.removeprefix(prefix))
        if match is None:
            continue
        run = plans.setdefault(match["plan"], {}).setdefault(int(match["begun"] or match["run"]), _Run())
        if match["begun"]:
            run.is_begun = True
        else:
            run.entries.append(int(match["entry"]))
    return plans


def _is_due(store: Store, plan_keys: PlanKeys, number: int, run: _Run, now: datetime) -> bool:
    if not run.is_begun:
        try:  # what an earlier sweep left, unless the listing is behind
            store.head(plan_keys.run(number))
        except ObjectMissingError:
            return True
        return False
    if not run.entries:
        return False
    try:
        ended_at = journal.ended_at(store, plan_keys, number, max(run.entries))
    except (IntegrityError, FormatVersionError, ObjectMissingError):
        return False
    return ended_at is not None and now - ended_at > KEPT
