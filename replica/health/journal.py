"""The journal of a VM: its events, and what is remembered of points that retention removed (docs/format.md, 8)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from replica import changes, record
from replica.damage import Report
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    ObjectExistsError,
    ObjectMissingError,
    UsageError,
)
from replica.generation.convertibility import Convertibility
from replica.health.observation import Event, EventKind, PointSample
from replica.host import Host
from replica.keys import VmKeys, point_of
from replica.model import Consistency, Point
from replica.record import Fields
from replica.stores.store import Store

EVENT_KIND: Final = "event"
HISTORY_KIND: Final = "history"
LARGEST_PIECE_POINTS: Final = 4096
LARGEST_EVENT_POINTS: Final = 1024
LONGEST_DETAIL: Final = 2000

_RESULT: Final = re.compile(r"[a-z]{1,20}")
_EVENT: Final = re.compile(r"(\d{8}T\d{12}Z)-([a-z]{1,20})-([a-z]{1,20})-[0-9a-f]{8}\.json")
_COLUMNS: Final = (
    "size_bytes",
    "data_bytes",
    "read_bytes",
    "changed_bytes",
    "stored_bytes",
    "chain_files",
)


# --- events


@dataclass(frozen=True, slots=True)
class EventKey:
    """What an event's key tells of it without its being read."""

    key: str
    kind: EventKind
    at: datetime
    result: str


def record_event(store: Store, host: Host, keys: VmKeys, event: Event, *, mark: bool = True) -> str:
    """Write an event create-only, and return its key. It needs no lease. Raises UsageError, StoreError.

    Unless ``mark`` is false it is marked as a change: the agent that looks after the VM does not know of it.
    """
    if not _RESULT.fullmatch(event.result):
        raise UsageError(f"{event.result!r} is no result of an event: one lower-case word is")
    moment = event.at.astimezone(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    key = f"{keys.events}{moment}-{event.kind.value}-{event.result}-{host.randomness.new_id()[:8]}.json"
    body = encode_event(replace(event, host_name=event.host_name or host.host_name))
    store.create(key, record.encode(EVENT_KIND, body))
    if mark:
        changes.mark_event(store, keys, event.at)
    return key


def encode_event(event: Event, longest_detail: int = LONGEST_DETAIL) -> dict[str, Any]:
    """Return an event as JSON's values."""
    return {
        "event": event.kind.value,
        "at": record.time_text(event.at),
        "result": event.result,
        "host_name": event.host_name,
        "points": list(event.points[:LARGEST_EVENT_POINTS]),
        "seconds": round(event.seconds, 3),
        "detail": event.detail[:longest_detail],
    }


def decode_event(body: Fields, kind: EventKind) -> Event:
    """Return the event of that kind. Raises IntegrityError."""
    return Event(
        kind=kind,
        at=body.time("at"),
        result=body.text("result"),
        host_name=body.text("host_name"),
        points=tuple(body.integers("points")[:LARGEST_EVENT_POINTS]),
        seconds=body.number("seconds"),
        detail=body.text("detail"),
    )


def event_keys(store: Store, keys: VmKeys, since: datetime | None = None) -> list[EventKey]:
    """Return what the keys tell of the VM's events after ``since``, in order of time: one LIST for each thousand."""
    prefix = keys.events
    start_after = "" if since is None else prefix + since.astimezone(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    found = (_event_key(info.key, prefix) for info in store.list(prefix, start_after=start_after))
    return [one for one in found if one is not None]


def _event_key(key: str, prefix: str) -> EventKey | None:
    match = _EVENT.fullmatch(key.removeprefix(prefix))
    if match is None or match[2] not in set(EventKind):
        return None  # a later version's
    try:
        at = datetime.strptime(match[1], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=UTC)
    except ValueError:
        return None
    return EventKey(key, EventKind(match[2]), at, match[3])


def read_event(store: Store, told: EventKey) -> Event:
    """Return an event. Raises IntegrityError, FormatVersionError, ObjectMissingError, StoreError."""
    body = record.decode(EVENT_KIND, store.get(told.key), key=told.key)
    if (body.text("event"), body.text("result")) != (told.kind.value, told.result):
        raise IntegrityError("the event is another one than its key says: objects were mixed up", key=told.key)
    return decode_event(body, told.kind)


def verification(report: Report, at: datetime) -> Event:
    """Return the event of a verification: ``damaged`` where any point was found not to restore."""
    lost = sorted({one.point for one in report.verdicts if not one.restores}, reverse=True)
    unknown = [number for one in report.unreadable if one.key and (number := point_of(one.key)) is not None]
    result = "damaged" if lost or report.unreadable else "whole" if report.full else "partial"
    looked = "all that is stored" if report.full else "presence and sizes"
    if report.sample is not None:
        looked += f", and {report.sample.percent:.0f} % of what is stored"
    return Event(EventKind.VERIFY, at, result, points=(*lost, *unknown)[:LARGEST_EVENT_POINTS], detail=looked)


def judgement(point: Point, before: Convertibility, now: Convertibility) -> Event:
    """Return the event of a verdict on convertibility that ``point`` has, and the point before it had not."""
    reasons = "; ".join(f"{one.rule}: {one.message}" for one in now.refusals) or now.because
    return Event(
        EventKind.CONVERTIBILITY,
        now.judged_at,
        now.verdict.replace(" ", ""),
        points=(point.point,),
        detail=f"it was {before.verdict}{f'; {reasons}' if reasons else ''}",
    )


# --- what is remembered of points that were removed


def remember(store: Store, keys: VmKeys, samples: Iterable[PointSample]) -> int:
    """Write down what a report needs of points that are about to be removed; return how many pieces that took.

    Under the VM's lease, before the first of their manifests is deleted. Safe to repeat: a piece that is there
    already is not written again, and points that are in several pieces count once.
    """
    ordered = sorted(samples, key=lambda one: one.point)
    pieces = 0
    for start in range(0, len(ordered), LARGEST_PIECE_POINTS):
        piece = ordered[start : start + LARGEST_PIECE_POINTS]
        key = f"{keys.histories}{piece[-1].point:020}.json"
        try:
            store.create(key, record.encode(HISTORY_KIND, encode_columns(piece)))
        except ObjectExistsError:
            # An earlier attempt's, which was to remove these and maybe more. One that another rule had cut short
            # lacks some: what they were is lost to reports, and to nothing else.
            continue
        pieces += 1
    return pieces


def remembered(store: Store, keys: VmKeys, most_points: int, since: datetime | None = None) -> list[PointSample]:
    """Return up to ``most_points`` of the newest removed points, in ascending number. Damaged pieces are left out.

    Asks one LIST for each thousand pieces, and reads pieces, the newest first, until there are enough points or one
    begins before ``since``.
    """
    found: dict[int, PointSample] = {}
    for info in sorted(store.list(keys.histories), key=lambda one: one.key, reverse=True):
        if point_of(info.key) is None:
            continue
        piece: list[PointSample] = []
        with contextlib.suppress(IntegrityError, FormatVersionError, ObjectMissingError):
            piece = list(decode_columns(record.decode(HISTORY_KIND, store.get(info.key), key=info.key)))
        for one in piece:
            found.setdefault(one.point, one)
        if len(found) >= most_points or (since is not None and any(one.created_at < since for one in piece)):
            break
    return [found[number] for number in sorted(found)][-most_points:]


def encode_columns(samples: Sequence[PointSample]) -> dict[str, Any]:
    """Return columns: times as milliseconds since 1970, durations as milliseconds; names once for all."""
    return {
        "point": [one.point for one in samples],
        "created_at_ms": [_milliseconds(one.created_at) for one in samples],
        "published_at_ms": [_milliseconds(one.published_at) for one in samples],
        "cycle_ms": [round(one.seconds * 1000) for one in samples],
        "consistency": [one.consistency.value for one in samples],
        "found_by": [one.found_by for one in samples],
        "flags": [one.is_first | one.not_quiesced << 1 | one.rewritten << 2 | one.not_followed << 3 for one in samples],
        **{name: [getattr(one, name) for one in samples] for name in _COLUMNS},
    }


def decode_columns(
    body: Fields, *, most: int = LARGEST_PIECE_POINTS, rows: Callable[[int], Iterable[int]] = range
) -> Iterator[PointSample]:
    """Yield points from their columns: those rows that ``rows`` chooses, given how many there are.

    Raises IntegrityError, also where there are more than ``most``.
    """
    numbers = ("point", "created_at_ms", "published_at_ms", "cycle_ms", "flags", *_COLUMNS)
    columns: dict[str, list[Any]] = {name: body.integers(name) for name in numbers}
    columns |= {name: _texts(body, name) for name in ("consistency", "found_by")}
    count = len(columns["point"])
    if count > most or any(len(column) != count for column in columns.values()):
        raise IntegrityError("the columns of remembered points differ in length, or are too long", key=body.key)
    for row in rows(count):
        one = {name: column[row] for name, column in columns.items()}
        try:
            yield PointSample(
                point=one["point"],
                created_at=datetime.fromtimestamp(one["created_at_ms"] / 1000, UTC),
                published_at=datetime.fromtimestamp(one["published_at_ms"] / 1000, UTC),
                consistency=Consistency(one["consistency"]),
                seconds=one["cycle_ms"] / 1000,
                found_by=one["found_by"],
                is_first=bool(one["flags"] & 1),
                not_quiesced=bool(one["flags"] & 2),
                rewritten=bool(one["flags"] & 4),
                not_followed=bool(one["flags"] & 8),
                **{name: one[name] for name in _COLUMNS},
            )
        except (ValueError, OverflowError, OSError) as error:
            raise IntegrityError("a remembered point has no time or consistency that can be", key=body.key) from error


def _texts(body: Fields, name: str) -> list[str]:
    found = body.values.get(name)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise IntegrityError(f"field {name!r} should be a list of strings", key=body.key)
    return found


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
