"""Observations made up for tests of health: a VM that is well, and one that has lived through a month."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from replica.health.observation import Event, EventKind, Observation, PointSample
from replica.model import Consistency

NOW = datetime(2026, 3, 31, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
GIB = 1 << 30


def sample(number: int, age: timedelta, *, now: datetime = NOW, **changes: Any) -> PointSample:
    """Return a point that was taken ``age`` ago, in a cycle of 20 seconds."""
    made = PointSample(
        point=number,
        created_at=now - age,
        published_at=now - age + timedelta(seconds=20),
        consistency=Consistency.CRASH,
        size_bytes=40 * GIB,
        data_bytes=12 * GIB,
        read_bytes=64 << 20,
        changed_bytes=32 << 20,
        stored_bytes=12 << 20,
        seconds=18.0,
        is_first=number == 1,
        found_by="bitmap",
        chain_files=1,
    )
    return replace(made, **changes)


def every(
    interval: timedelta, count: int, *, newest_age: timedelta = 2 * MINUTE, last: int | None = None
) -> tuple[PointSample, ...]:
    """Return ``count`` points at an interval, the newest numbered ``last``, which is ``count`` unless said."""
    top = last or count
    return tuple(sample(top - back, newest_age + back * interval) for back in range(count - 1, -1, -1))


def healthy(**changes: Any) -> Observation:
    """Return a VM at which no rule has anything to find."""
    seen = Observation(
        vm_id="0" * 32,
        name="web 1",
        at=NOW,
        protected_since=NOW - timedelta(days=90),
        interval_seconds=300,
        retention="all:2h,hourly:24,daily:7",
        source_host="host-a",
        lease_expires_at=NOW - 2 * MINUTE,
        samples=(sample(1700, timedelta(days=6, hours=20)), *every(5 * MINUTE, 200, last=2000)),
        listed=60,
        last_verify=Event(EventKind.VERIFY, NOW - timedelta(days=1), "partial"),
        drills=(Event(EventKind.DRILL, NOW - timedelta(days=20), "passed", "host-b", (1200,), 94.0, "guest answered"),),
        convertibility="convertible",
        store_skew_seconds=0.5,
    )
    return replace(seen, **changes)


HOSTILE_NAMES = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "' onmouseover='document.title=1",
    "</style><style>*{display:none}",
    "]]></svg><svg onload=alert(1)>",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "javascript:alert(1)",
    "{{7*7}} ${7*7} %3Cscript%3E",
    "a\u202egnp.exe",
    "zero\u200bwidth",
    "日本語 サーバー",
    "x" * 200,
)


def fleet(count: int, seed: int = 7) -> list[Observation]:
    """Return a fleet in which most VMs are well, some are not, and names are as hostile as they can be."""
    drawn = random.Random(seed)
    made = []
    for number in range(count):
        name = HOSTILE_NAMES[number] if number < len(HOSTILE_NAMES) else f"app-{number:04}"
        points, moment = [], NOW - timedelta(days=6)
        for point in range(1, 161):
            moment += timedelta(hours=6 * 24 / 161)
            busy = 1 + 6 * (9 <= moment.hour < 18) * drawn.random()
            changed = int(busy * 8 * (1 << 20) * (0.5 + drawn.random()))
            seconds = 4 + changed / (4 << 20) * (1 + drawn.random())
            points.append(
                sample(
                    point * 12,
                    NOW - moment,
                    changed_bytes=changed,
                    stored_bytes=int(changed * 0.42),
                    seconds=seconds,
                    published_at=moment + timedelta(seconds=seconds + 2 + 3 * drawn.random()),
                    is_first=point == 1,
                )
            )
        points.append(sample(160 * 12 + 1, drawn.randrange(20, 280) * timedelta(seconds=1)))
        one = healthy(name=name, vm_id=f"{number:032x}", samples=tuple(points), listed=len(points))
        kind = number % 17
        if kind == 3:
            one = replace(one, samples=one.samples[:-60], leftovers=True)
        elif kind == 5:
            one = replace(one, drills=())
        elif kind == 7:
            one = replace(one, damaged=frozenset({160 * 12 + 1}))
        elif kind == 11:
            one = replace(
                one,
                drills=(
                    *one.drills,
                    Event(EventKind.DRILL, NOW - timedelta(days=2), "failed", name, (1,), 600.0, name),
                ),
            )
        elif kind == 13:
            one = Observation("", name, NOW, unread=f"tenants/default/vms/0/lease.json: damaged, it says {name}")
        made.append(one)
    return made
