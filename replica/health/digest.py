"""Digests: objects that say of up to a hundred VMs how they stood at an agent's last word (docs/format.md, 8)."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NoReturn

import xxhash
import zstandard

from replica import keys, record, sealing, vault
from replica.errors import FormatVersionError, GodwitError, IntegrityError, TenantKeyError
from replica.health import journal
from replica.health.observation import AgentNote, EventKind, FreeSpace, Observation, PointSample
from replica.model import Standing
from replica.record import LARGEST_RECORD_BYTES, Fields
from replica.sealing import Sealer
from replica.stores.store import Store

MAGIC: Final = b"GWDIGEST"
FORMAT: Final = 1
MOST_VMS: Final = 100
MOST_SAMPLES: Final = 40  # points that are there
MOST_REMEMBERED: Final = 24  # and points that retention removed
MOST_DRILLS: Final = 3
MOST_CHANGES: Final = 32
MOST_DAMAGED: Final = 1024
LONGEST_DETAIL: Final = 300
PURPOSE: Final = b"godwit fleet"

_HEADER: Final = struct.Struct("<8sHBxI16s")
assert _HEADER.size == 32
_LEVEL: Final = 3

Rows = Callable[[int], Iterable[int]]


@dataclass(frozen=True, slots=True)
class Digest:
    """What a machine's agent says of VMs. Who reads an observation puts the present into its ``at``."""

    tenant: str
    number: int
    host_id: str
    host_name: str
    written_at: datetime
    seen: tuple[Observation, ...]

    @property
    def key(self) -> str:
        """The object's key."""
        return keys.digest(self.tenant, self.host_id, self.number)


class Opener:
    """Gives what seals digests of encrypted VMs, asking for the tenant's key once, and only where it is needed."""

    def __init__(self, store: Store, tenant: str) -> None:
        self._store = store
        self._tenant = tenant
        self._lock = threading.Lock()
        self._asked = False
        self._sealer: Sealer | None = None
        self._error: GodwitError | None = None

    def __call__(self) -> Sealer | None:
        """Return it; None where the store stands behind no vault. Raises TenantKeyError, IntegrityError."""
        with self._lock:
            if not self._asked:
                self._asked = True
                try:
                    self._sealer = fleet_sealer(self._store, self._tenant)
                except (TenantKeyError, IntegrityError, FormatVersionError) as error:
                    self._error = error  # trying a passphrase takes half a second: once is enough
        if self._error is not None:
            raise self._error
        return self._sealer


def fleet_sealer(store: Store, tenant: str) -> Sealer | None:
    """Return what seals digests of encrypted VMs; None where the store has no vault. Raises TenantKeyError."""
    before = vault.vault_of(store)
    return None if before is None else Sealer(sealing.derive(before.unlock(store, tenant), PURPOSE))


# --- the object


def encode(digest: Digest, sealer: Sealer | None) -> bytes | bytearray:
    """Return the object; sealed where there is a ``sealer``."""
    body = {
        "tenant": digest.tenant,
        "number": digest.number,
        "host_id": digest.host_id,
        "host_name": digest.host_name,
        "written_at": record.time_text(digest.written_at),
        "vms": [_encode_vm(one) for one in digest.seen],
    }
    # Names of hosts and messages of systems may hold what UTF-8 cannot say: in ASCII they are escaped.
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(text)
    plain = _HEADER.pack(MAGIC, FORMAT, 0, len(text), xxhash.xxh3_128_digest(packed)) + packed
    return plain if sealer is None else sealer.seal(digest.key, plain)


def decode(data: bytes, *, key: str, sealer: Callable[[], Sealer | None], rows: Rows = range) -> tuple[Digest, bool]:
    """Return a digest and whether it was sealed; ``rows`` chooses which points of each VM are read, by their number.

    ``sealer`` is asked only where it is needed. Raises IntegrityError, FormatVersionError, TenantKeyError.
    """
    is_sealed = sealing.is_sealed(data)
    if is_sealed:
        opener = sealer()
        if opener is None:
            raise IntegrityError("the digest is encrypted, and there is no key", key=key)
        data = opener.open(key, data)
    try:
        digest = _decode_body(Fields(_unpack(data, key), key), key, is_sealed=is_sealed, rows=rows)
    except (RecursionError, UnicodeError) as error:
        raise IntegrityError("the digest cannot be what Godwit wrote: it is damaged", key=key) from error
    return digest, is_sealed


def _unpack(data: bytes, key: str) -> dict[str, Any]:
    if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
        _damaged("the object is no digest", key)
    _, version, suite, size, checksum = _HEADER.unpack_from(data)
    if not 1 <= version <= FORMAT or suite:
        raise FormatVersionError(
            f"the digest has format {version}, this godwit reads up to {FORMAT}", key=key, hint="use a newer godwit"
        )
    packed = memoryview(data)[_HEADER.size :]
    if xxhash.xxh3_128_digest(packed) != checksum:
        _damaged("the digest's checksum does not match its content: it is damaged", key)
    if size > LARGEST_RECORD_BYTES:
        _damaged("the digest is too large to be one", key)
    try:
        # The frame says how much it holds: more than that is never made room for.
        if zstandard.frame_content_size(packed) != size:
            _damaged("the digest does not hold what its header says: it is damaged", key)
        text = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size, allow_extra_data=False)
        found = json.loads(text) if len(text) == size else None
    except (zstandard.ZstdError, ValueError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _damaged("the digest does not hold what its header says: it is damaged", key)
    return found


def _damaged(text: str, key: str) -> NoReturn:
    raise IntegrityError(text, key=key)


def _decode_body(body: Fields, key: str, *, is_sealed: bool, rows: Rows) -> Digest:
    digest = Digest(
        tenant=body.text("tenant"),
        number=body.integer("number", most=keys.LARGEST_DIGEST),
        host_id=body.hexadecimal("host_id", digits=32),
        host_name=body.text("host_name"),
        written_at=body.time("written_at"),
        seen=(),
    )
    if not keys.is_tenant(digest.tenant) or digest.key != key:
        _damaged("the digest is another one than its key says: objects were mixed up", key)
    told = body.list_of_fields("vms")
    if len(told) > MOST_VMS:
        _damaged(f"a digest holds at most {MOST_VMS} VMs, this one {len(told)}", key)
    seen = tuple(_decode_vm(one, digest, rows) for one in told)
    # What says of itself that it is encrypted belongs where it is sealed, and the other way round.
    kept = tuple(one for one in seen if one.encrypted == is_sealed)
    return Digest(digest.tenant, digest.number, digest.host_id, digest.host_name, digest.written_at, kept)


# --- one VM


def _encode_vm(seen: Observation) -> dict[str, Any]:
    seen = shortened(seen)
    points = seen.timeline
    present = {one.point for one in seen.samples}
    note, space = seen.agent, seen.free_space
    return {
        "vm_id": seen.vm_id,
        "name": seen.name,
        "encrypted": seen.encrypted,
        "seen_at": record.time_text(seen.known_at),
        "epoch": seen.epoch,
        "settings_version": seen.settings_version,
        "event_at": _time(seen.event_at),
        "protected_since": _time(seen.protected_since),
        "interval_seconds": seen.interval_seconds,
        "retention": seen.retention,
        "retention_since": _time(seen.retention_since),
        "standing": seen.standing.value,
        "standing_since": _time(seen.standing_since),
        "recovery_host": seen.recovery_host,
        "held": seen.lease_held,
        "expires_at": _time(seen.lease_expires_at),
        "leftovers": seen.leftovers,
        "source_host": seen.source_host,
        "listed": seen.listed,
        "damaged": sorted(seen.damaged)[-MOST_DAMAGED:],
        "points": journal.encode_columns(points),
        "removed": [one.point for one in points if one.point not in present],
        "verify": None if seen.last_verify is None else journal.encode_event(seen.last_verify, LONGEST_DETAIL),
        "drills": [journal.encode_event(one, LONGEST_DETAIL) for one in seen.drills[-MOST_DRILLS:]],
        "changes": [[record.time_text(at), became] for at, became in seen.changes[-MOST_CHANGES:]],
        "convertibility": seen.convertibility,
        "free_space": None
        if space is None
        else {"path": space.path, "free_bytes": space.free_bytes, "total_bytes": space.total_bytes},
        "skew_seconds": seen.store_skew_seconds,
        "agent": {
            "state": "" if note is None else note.state,
            "failures": 0 if note is None else note.failures,
            "error": None if note is None or note.error is None else note.error[:LONGEST_DETAIL],
            "hint": None if note is None or note.hint is None else note.hint[:LONGEST_DETAIL],
            "missed": 0 if note is None else note.missed,
            "next_at": None if note is None else _time(note.next_at),
        },
    }


def _decode_vm(body: Fields, digest: Digest, rows: Rows) -> Observation:
    seen_at = body.time("seen_at")
    removed = frozenset(body.integers("removed"))
    points = sorted(
        journal.decode_columns(body.fields("points"), most=MOST_SAMPLES + MOST_REMEMBERED, rows=rows),
        key=lambda one: one.point,
    )
    agent = body.fields("agent")
    return Observation(
        vm_id=body.hexadecimal("vm_id", digits=32),
        name=body.text("name"),
        at=seen_at,
        as_of=seen_at,
        encrypted=body.truth("encrypted"),
        epoch=body.integer("epoch", most=keys.LARGEST_EPOCH),
        settings_version=body.integer("settings_version"),
        event_at=_read_time(body, "event_at"),
        protected_since=_read_time(body, "protected_since"),
        interval_seconds=body.integer("interval_seconds", least=1),
        retention=body.optional_text("retention"),
        retention_since=_read_time(body, "retention_since"),
        standing=_standing(body),
        standing_since=_read_time(body, "standing_since"),
        recovery_host=body.text("recovery_host"),
        lease_held=body.truth("held"),
        lease_expires_at=_read_time(body, "expires_at"),
        leftovers=body.truth("leftovers"),
        source_host=body.text("source_host"),
        listed=body.integer("listed"),
        damaged=frozenset(body.integers("damaged")[-MOST_DAMAGED:]),
        samples=tuple(one for one in points if one.point not in removed),
        remembered=tuple(one for one in points if one.point in removed),
        last_verify=None
        if body.values.get("verify") is None
        else journal.decode_event(body.fields("verify"), EventKind.VERIFY),
        drills=tuple(
            journal.decode_event(one, EventKind.DRILL) for one in body.list_of_fields("drills")[-MOST_DRILLS:]
        ),
        changes=tuple(_changes(body)),
        convertibility=body.optional_text("convertibility"),
        free_space=_free_space(body),
        source_skew_seconds=None if body.values.get("skew_seconds") is None else body.number("skew_seconds"),
        agent=AgentNote(
            host_name=digest.host_name,
            written_at=digest.written_at,
            state=agent.text("state"),
            failures=agent.integer("failures"),
            error=agent.optional_text("error"),
            hint=agent.optional_text("hint"),
            missed=agent.integer("missed"),
            next_at=_read_time(agent, "next_at"),
        ),
    )


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else record.time_text(moment)


def _read_time(body: Fields, name: str) -> datetime | None:
    return None if body.values.get(name) is None else body.time(name)


def _standing(body: Fields) -> Standing:
    try:
        return Standing(body.text("standing"))
    except ValueError as error:
        raise FormatVersionError(
            f"the digest names a standing {body.text('standing')!r:.60} that this godwit does not know",
            key=body.key,
            hint="use a newer godwit",
        ) from error


def _free_space(body: Fields) -> FreeSpace | None:
    if body.values.get("free_space") is None:
        return None
    space = body.fields("free_space")
    return FreeSpace(space.text("path"), space.integer("free_bytes"), space.integer("total_bytes"))


def _changes(body: Fields) -> Iterable[tuple[datetime, str]]:
    told = body.values.get("changes")
    for one in told[-MOST_CHANGES:] if isinstance(told, list) else ():
        if not isinstance(one, list) or len(one) != 2 or not all(isinstance(each, str) for each in one):
            _damaged("field 'changes' should be pairs of a time and a word", body.key)
        yield Fields({"at": one[0]}, body.key).time("at"), one[1]


# --- which points are kept


def shortened(seen: Observation) -> Observation:
    """Return the observation with as many points as a digest holds."""
    samples = thinned(seen.samples, MOST_SAMPLES)
    present = {one.point for one in seen.samples}
    remembered = [one for one in seen.remembered if one.point not in present]
    return replace(seen, samples=samples, remembered=thinned(remembered, MOST_REMEMBERED))


def thinned(points: Iterable[PointSample], most: int) -> tuple[PointSample, ...]:
    """Return at most ``most`` of the points: the oldest, the newest quarter, and between them fewer the older they are.

    One at a time the point goes whose neighbours lie closest together for their age.
    """
    kept = sorted(points, key=lambda one: one.point)
    if len(kept) <= most:
        return tuple(kept)
    ages = [(kept[-1].created_at - one.created_at).total_seconds() for one in kept]
    fixed = max(1, most // 4)
    while len(kept) > most:
        gaps = [(ages[at - 1] - ages[at + 1]) / max(1.0, ages[at]) for at in range(1, len(kept) - fixed)]
        place = 1 + gaps.index(min(gaps))
        del kept[place], ages[place]
    return tuple(kept)


def brief_rows(count: int, newest: int = 4, between: int = 4) -> list[int]:
    """Return which points are enough for a table: the oldest, the newest, and a few between."""
    if count <= newest + between:
        return list(range(count))
    rest = count - newest
    return sorted({*(round(rest * step / between) for step in range(between)), *range(rest, count)})


def order(seen: Observation) -> tuple[int, int, float]:
    """Return what decides which of two words on a VM is the later one."""
    newest = seen.newest
    return seen.epoch, 0 if newest is None else newest.point, seen.known_at.timestamp()
