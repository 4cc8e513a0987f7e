"""The tenant's key: a random master key that wraps the VMs' data keys, itself wrapped by what a person keeps.

docs/format.md, section 7. The wrapped master key lies in the store; what opens it never does.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from replica import keys, record, sealing
from replica.errors import (
    FormatVersionError,
    IntegrityError,
    ObjectExistsError,
    ObjectLockedError,
    ObjectMissingError,
    TenantKeyError,
    UsageError,
)
from replica.host import Host
from replica.record import Fields
from replica.stores.store import Store

KIND: Final = "key"
SCRYPT_COST: Final = 1 << 17  # 128 MiB and about half a second for each guess
LARGEST_SCRYPT_COST: Final = 1 << 19
LARGEST_OBJECTS: Final = 64  # key objects that a store may show us
SHORTEST_PASSPHRASE: Final = 8
RECOVERY_PREFIX: Final = "godwit-recovery-key-1:"

_RECOVERY = re.compile(rf"^{RECOVERY_PREFIX}([0-9a-f]{{64}}):([0-9a-f]{{8}})\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Secret:
    """What a person keeps: a passphrase, the 32 bytes of a key file, or the master key itself from the recovery kit."""

    kind: Literal["passphrase", "key", "recovery"]
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TenantKey:
    """A key object: how the master key is wrapped. ``fingerprint`` tells master keys apart and reveals nothing."""

    number: int
    created_at: datetime
    kind: Literal["passphrase", "key"]
    fingerprint: str
    kdf: Mapping[str, Any] = field(repr=False)
    wrapped: bytes = field(repr=False)


def passphrase(text: str) -> Secret:
    """Return a passphrase as a secret. Raises TenantKeyError for one that is too short."""
    if len(text) < SHORTEST_PASSPHRASE:
        raise TenantKeyError(
            f"the passphrase is too short: {SHORTEST_PASSPHRASE} characters are the least",
            hint="several random words are easy to keep",
        )
    return Secret("passphrase", text.encode("utf-8", "surrogateescape"))


def parse(content: bytes, *, source: str) -> Secret:
    """Return the secret that a key file holds or a key command prints. ``source`` names it in errors."""
    if len(content) == sealing.KEY_BYTES:
        return Secret("key", content)
    text = content.decode("ascii", "replace")
    if found := _RECOVERY.search(text):
        if hashlib.sha256(found[1].encode()).hexdigest()[:8] != found[2]:
            raise TenantKeyError("the recovery key has a typing mistake: its check digits do not match", path=source)
        return Secret("recovery", bytes.fromhex(found[1]))
    if re.fullmatch(r"[0-9a-fA-F]{64}\s*", text):
        return Secret("key", bytes.fromhex(text))
    raise TenantKeyError(
        "this is no key: 32 bytes, 64 hex digits or a recovery kit were expected",
        path=source,
        hint="'godwit key init --key-file FILE' makes FILE with a random key where there is none",
    )


def fingerprint(master: bytes) -> str:
    """Return 16 hex digits that tell the master key from others."""
    return sealing.derive(master, b"godwit fingerprint")[:8].hex()


def recovery_line(master: bytes) -> str:
    """Return the line of a recovery kit: the master key with check digits against typing mistakes."""
    digits = master.hex()
    return f"{RECOVERY_PREFIX}{digits}:{hashlib.sha256(digits.encode()).hexdigest()[:8]}"


def init(store: Store, host: Host, tenant: str, secret: Secret) -> TenantKey:
    """Give the tenant its key, wrapped by ``secret``. Raises UsageError where it has one."""
    if list_keys(store, tenant):
        raise _has_one(tenant)
    if secret.kind == "recovery":
        raise UsageError("a recovery kit cannot be a new key", hint="'godwit key rotate' wraps its key anew")
    made, data = _wrap(host, tenant, 1, sealing.new_key(), secret)
    try:
        store.create(keys.tenant_key(tenant, 1), data)
    except ObjectExistsError as error:
        raise _has_one(tenant) from error
    return made


def _has_one(tenant: str) -> UsageError:
    return UsageError(f"tenant {tenant!r} has a key already", hint="'godwit key rotate' changes what opens it")


def list_keys(store: Store, tenant: str) -> list[TenantKey]:
    """Return the tenant's key objects, newest first: one, or more where a rotation was cut off."""
    return [_decode(store.get(key), key, number) for number, key in _numbers(store, tenant)]


def _numbers(store: Store, tenant: str) -> list[tuple[int, str]]:
    found = []
    for info in store.list(keys.tenant_keys(tenant)):
        number = keys.point_of(info.key)
        if number:
            found.append((number, info.key))
        if len(found) > LARGEST_OBJECTS:
            raise IntegrityError("there are too many key objects to be Godwit's", key=keys.tenant_keys(tenant))
    return found[::-1]


def open_master(store: Store, tenant: str, secret: Secret | None) -> bytes:
    """Return the tenant's master key. Raises TenantKeyError for no key, or one that does not open it."""
    damage: list[IntegrityError | FormatVersionError] = []
    kinds: set[str] = set()
    numbers = _numbers(store, tenant)
    if secret is not None and secret.kind == "recovery":
        return secret.data if not numbers else _check_recovery(store, tenant, numbers, secret)
    if not numbers:
        raise TenantKeyError(
            f"tenant {tenant!r} has no encryption key in this store",
            hint="'godwit key init' makes one; of one that was lost, the recovery kit does the work",
        )
    if secret is None:
        raise TenantKeyError(
            f"the data of tenant {tenant!r} is encrypted, and no key was given",
            hint="set GODWIT_KEY_FILE or GODWIT_PASSPHRASE, or write key_file or key_command in godwit.toml",
        )
    # After a rotation that was cut off both secrets are good, so that neither leads to a locked door.
    for number, key in numbers:
        try:
            found = _decode(store.get(key), key, number)
            kinds.add(found.kind)
            master = _unwrap(tenant, found, secret)
        except ObjectMissingError:  # a rotation ended between the listing and now
            continue
        except (IntegrityError, FormatVersionError) as error:
            damage.append(error)
            continue
        if master is not None:
            return master
    if damage:
        raise damage[0]
    what = "passphrase" if secret.kind == "passphrase" else "key"
    fitting = "" if secret.kind in kinds else f", which is opened by a {' or a '.join(sorted(kinds))}"
    raise TenantKeyError(
        f"the {what} that was given does not open the key of tenant {tenant!r}{fitting}", hint="it is another one"
    )


def _check_recovery(store: Store, tenant: str, numbers: list[tuple[int, str]], secret: Secret) -> bytes:
    known = set()
    for number, key in numbers:
        try:
            known.add(_decode(store.get(key), key, number).fingerprint)
        except (IntegrityError, FormatVersionError, ObjectMissingError):  # what the kit is there to do without
            return secret.data
    if fingerprint(secret.data) not in known:
        raise TenantKeyError(f"the recovery kit is not that of tenant {tenant!r}", hint="it is another one")
    return secret.data


def rotate(store: Store, host: Host, tenant: str, current: Secret | None, new: Secret) -> TenantKey:
    """Wrap the same master key by another secret; afterwards ``current`` opens nothing in this store any more.

    Cut off at any instant, one of the two opens it, and the rotation can be repeated. Raises TenantKeyError.
    """
    if new.kind == "recovery":
        raise UsageError("a recovery kit cannot be the new key", hint="choose a passphrase or a key file")
    master = open_master(store, tenant, current)
    before = _numbers(store, tenant)
    made, data = _wrap(host, tenant, max((number for number, _ in before), default=0) + 1, master, new)
    key = keys.tenant_key(tenant, made.number)
    try:
        store.create(key, data)
    except ObjectExistsError as error:
        raise UsageError("somebody else is rotating the key at this moment", hint="try again later") from error
    # Read back and opened before the old one goes: from then on it alone leads to the data.
    if _unwrap(tenant, _decode(store.get(key), key, made.number), new) != master:
        raise IntegrityError("the new key object cannot be opened; the old one is left as it was", key=key)
    locked = []
    for _, old in before:
        try:
            store.delete(old)
        except ObjectLockedError as error:
            locked.append(error)
    if locked:
        raise ObjectLockedError(
            "the new secret opens the tenant's key from now on, but the one before still does: it is "
            f"{max(locked, key=_end).message}; rotate again when that is over",
            key=locked[-1].key,
            until=_end(max(locked, key=_end)),
        )
    return made


def _end(error: ObjectLockedError) -> datetime:
    return error.until or datetime.max.replace(tzinfo=UTC)


def _wrap(host: Host, tenant: str, number: int, master: bytes, secret: Secret) -> tuple[TenantKey, bytes]:
    kdf: dict[str, Any] = {"name": "none"}
    if secret.kind == "passphrase":
        kdf = {"name": "scrypt", "cost": SCRYPT_COST, "block": 8, "parallel": 1, "salt": secrets.token_hex(16)}
    now = record.time_text(host.clock.now())
    body: dict[str, Any] = {"number": number, "created_at": now, "kdf": kdf, "fingerprint": fingerprint(master)}
    wrapped = sealing.wrap(_wrapping_key(secret, kdf), master, _bound(tenant, body))
    data = record.encode(KIND, {**body, "wrapped_key": wrapped.hex()})
    return _decode(data, keys.tenant_key(tenant, number), number), data


def _unwrap(tenant: str, key: TenantKey, secret: Secret) -> bytes | None:
    if key.kind != secret.kind:
        return None
    body = {
        "number": key.number,
        "created_at": record.time_text(key.created_at),
        "kdf": key.kdf,
        "fingerprint": key.fingerprint,
    }
    master = sealing.unwrap(_wrapping_key(secret, key.kdf), key.wrapped, _bound(tenant, body))
    return master if master is not None and len(master) == sealing.KEY_BYTES else None


def _wrapping_key(secret: Secret, kdf: Mapping[str, Any]) -> bytes:
    if secret.kind == "key":
        return sealing.derive(secret.data, b"godwit wrapping key")
    return hashlib.scrypt(
        secret.data,
        salt=bytes.fromhex(kdf["salt"]),
        n=kdf["cost"],
        r=kdf["block"],
        p=kdf["parallel"],
        maxmem=kdf["cost"] * kdf["block"] * 128 + (16 << 20),
        dklen=sealing.KEY_BYTES,
    )


def _bound(tenant: str, body: Mapping[str, Any]) -> bytes:
    return b"godwit tenant key\0" + tenant.encode() + b"\0" + record.canonical(body)


def _decode(data: bytes, key: str, number: int) -> TenantKey:
    body = record.decode(KIND, data, key=key)
    if body.integer("number", least=1, most=keys.LARGEST_POINT) != number:
        raise IntegrityError("the key object is another one than its key says: objects were mixed up", key=key)
    kdf = body.fields("kdf")
    parameters: dict[str, Any] = {"name": kdf.text("name")}
    if parameters["name"] == "scrypt":
        parameters |= _scrypt(kdf)
    elif parameters["name"] != "none":
        raise FormatVersionError(
            f"the key is derived by {parameters['name']!r:.60}, which this godwit does not know",
            key=key,
            hint="use a newer godwit",
        )
    return TenantKey(
        number,
        body.time("created_at"),
        "passphrase" if parameters["name"] == "scrypt" else "key",
        body.hexadecimal("fingerprint", digits=16),
        parameters,
        bytes.fromhex(body.hexadecimal("wrapped_key", digits=2 * (sealing.KEY_BYTES + sealing.CHUNK_OVERHEAD_BYTES))),
    )


def _scrypt(kdf: Fields) -> dict[str, Any]:
    """Return the parameters, within what a store may make us compute."""
    cost = kdf.integer("cost", least=2, most=LARGEST_SCRYPT_COST)
    if cost & (cost - 1):
        raise IntegrityError("the cost of scrypt should be a power of two", key=kdf.key)
    return {
        "cost": cost,
        "block": kdf.integer("block", least=1, most=8),
        "parallel": kdf.integer("parallel", least=1, most=4),
        "salt": kdf.hexadecimal("salt", digits=32),
    }
