"""What a store holds: the store's own record, VMs by name, and their protection settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from replica import changes, history, keys, lease, locking, manifest, record
from replica.block import LARGEST_DISK_NUMBER
from replica.errors import (
    IntegrityError,
    LeaseHeldError,
    NoStoreError,
    ObjectExistsError,
    ObjectLockedError,
    ObjectMissingError,
    StoreRefusedError,
    UsageError,
)
from replica.failover import codec
from replica.host import Host
from replica.keys import VmKeys
from replica.lease import Lease, LeaseRecord
from replica.locking import Terms
from replica.model import Change, Identity, Machine, Point, SeedRef, Settings, SourceDisk, Vm
from replica.stores.store import Store
from replica.vault import Vault

DEFAULT_TENANT: Final = "default"


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """The store's own record."""

    store_id: str
    created_at: datetime
    terms: Terms | None = None  # for how long what points need is locked; None where it is not


@dataclass(frozen=True, slots=True)
class ProtectedVm:
    """A VM that was found in a store: where its objects are, and what never changes about it."""

    keys: VmKeys
    vm: Vm


def init_store(store: Store, host: Host, terms: Terms | None = None) -> tuple[StoreRecord, bool]:
    """Make the address a Godwit store; return its record and whether it is new. The caller has probed it.

    With ``terms``, which only a store with locks keeps, what points need is locked from the first object on.
    """
    made = StoreRecord(host.randomness.new_id(), host.clock.now(), terms)
    created_at = record.time_text(made.created_at)
    body = {"store_id": made.store_id, "created_at": created_at, **locking.encode(terms)}
    try:
        store.create(keys.STORE, record.encode("store", body))
    except ObjectExistsError:
        return read_store(store), False
    return made, True


def read_store(store: Store) -> StoreRecord:
    """Return the store's record. Raises NoStoreError where the address holds no Godwit store."""
    try:
        data = store.get(keys.STORE)
    except ObjectMissingError as error:
        raise NoStoreError(
            "there is no Godwit store at this address", key=store.url, hint=f"'godwit init {store.url}' makes one"
        ) from error
    body = record.decode("store", data, key=keys.STORE)
    return StoreRecord(body.text("store_id"), body.time("created_at"), locking.decode(body))


def protect(
    store: Store,
    host: Host,
    *,
    tenant: str,
    name: str,
    machine: Machine,
    sources: tuple[SourceDisk, ...],
    interval_seconds: int,
    compression_level: int,
    retention: str | None = None,
    seed: SeedRef | None = None,
    vault: Vault | None = None,
) -> ProtectedVm:
    """Begin to protect a VM. It exists once its name object does, which is written last.

    ``vault`` is what stands before ``store`` where the VM is to be encrypted, None where it is not.
    Raises UsageError if the name is taken, TenantKeyError.
    """
    name_key = keys.name(tenant, name)
    taken = UsageError(
        f"a VM named {name!r} is protected already",
        hint="choose another name, or change it with 'godwit protect --update'",
    )
    if _exists(store, name_key):
        raise taken
    now = host.clock.now()
    vm = Vm(host.randomness.new_id(), name, now, host.randomness.seed())
    vm_keys = VmKeys(tenant, vm.vm_id)
    next_disk_number = max((one.number for one in sources), default=-1) + 1
    settings = Settings(1, machine, sources, next_disk_number, interval_seconds, compression_level, retention, seed)
    if vault is not None:
        vault.admit(store, vm_keys)
    store.create(vm_keys.vm, _encode_vm(vm))
    assert vault is None or vault.is_encrypted(vm_keys), "the vault does not stand before the store"
    store.create(vm_keys.settings(1), encode_settings(settings))
    store.create(vm_keys.lease, lease.encode(LeaseRecord(0, False, None, now, now, 0, 1, False)))
    try:
        store.create(name_key, record.encode("name", {"vm_id": vm.vm_id, "name": name}))
    except ObjectExistsError as error:
        for key in (vm_keys.lease, vm_keys.settings(1), vm_keys.vm):
            with contextlib.suppress(ObjectLockedError, StoreRefusedError):  # nothing leads to what stays
                store.delete(key)
        raise taken from error
    return ProtectedVm(vm_keys, vm)


def update_settings(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    machine: Machine | None = None,
    sources: tuple[SourceDisk, ...] | None = None,
    interval_seconds: int | None = None,
    compression_level: int | None = None,
    retention: str | None = None,
    based_on: int | None = None,
) -> Settings:
    """Write a new version of the settings with what is given changed, and put it in force.

    ``based_on`` is the version that what is given was worked out from. Raises LeaseHeldError, also where that version
    is no longer in force.
    """
    with lease.holding(store, found.keys, host) as held:
        if based_on is not None and held.settings_version != based_on:
            # A disk that was removed meanwhile would come back under a number that is never to be used again.
            raise LeaseHeldError(
                "another agent changed how this VM is protected at the same moment",
                hint="look at what it is now, and try again",
            )
        history.begin(store, found.keys, host, held)  # a lease that was taken from somebody needs its fence
        before = read_settings(store, found.keys, held.settings_version)
        after = replace(
            before,
            machine=machine or before.machine,
            sources=before.sources if sources is None else sources,
            next_disk_number=max([before.next_disk_number, *(one.number + 1 for one in sources or ())]),
            interval_seconds=interval_seconds or before.interval_seconds,
            compression_level=before.compression_level if compression_level is None else compression_level,
            retention=retention or before.retention,
        )
        return enact(store, host, found, held, before, after, command="protect --update")


def enact(
    store: Store,
    host: Host,
    found: ProtectedVm,
    held: Lease,
    before: Settings,
    after: Settings,
    *,
    command: str,
    identities: tuple[Identity, ...] = (),
) -> Settings:
    """Make ``after`` the next version of the settings after ``before``, put it in force at once, and return it.

    ``held`` is the VM's lease, whose older writers are fenced off; ``command`` and ``identities`` go into the ledger.
    Raises LeaseLostError.
    """
    change = Change(command, host.clock.now(), host.host_id, host.host_name, identities)
    # A version above the one in force may be there from an attempt that was cut off: it is stepped over.
    made = replace(after, version=before.version + 1, previous=before.version, change=change)
    while True:
        try:
            store.create(found.keys.settings(made.version), encode_settings(made))
            break
        except ObjectExistsError:
            made = replace(made, version=made.version + 1)
    held.change_settings(made.version)
    changes.mark_settings(store, found.keys, made.version)
    return made


def find(store: Store, tenant: str, name: str) -> ProtectedVm:
    """Return the VM of that name. Raises UsageError where there is none, NoStoreError where there is no store."""
    key = keys.name(tenant, name)
    try:
        data = store.get(key)
    except ObjectMissingError as error:
        read_store(store)  # says so where it is the whole store that is missing
        raise UsageError(
            f"no VM named {name!r} is protected in this store", hint="'godwit status' lists those that are"
        ) from error
    body = record.decode("name", data, key=key)
    if body.text("name") != name:
        raise IntegrityError("the name in the object is not the one of its key: objects were mixed up", key=key)
    vm_keys = VmKeys(tenant, body.hexadecimal("vm_id", digits=32))
    vm = read_vm(store, vm_keys)
    if vm.name != name:
        raise IntegrityError(f"the name leads to the VM {vm.name!r:.200}: objects were mixed up", key=key)
    return ProtectedVm(vm_keys, vm)


def names(store: Store, tenant: str) -> Iterator[str]:
    """Yield the names of all protected VMs, ascending by key."""
    for info in store.list(keys.names_prefix(tenant)):
        yield keys.name_of(info.key)


def read_settings(store: Store, vm_keys: VmKeys, version: int) -> Settings:
    """Return one version of the protection settings. Raises IntegrityError."""
    key = vm_keys.settings(version)
    try:
        body = record.decode("settings", store.get(key), key=key)
    except ObjectMissingError as error:
        raise IntegrityError("the VM's protection settings are missing from the store", key=key) from error
    if body.integer("version", least=1) != version:
        raise IntegrityError("the settings are another version than their key says: objects were mixed up", key=key)
    state, change, previous = codec.decode(body)
    return Settings(
        version=version,
        machine=manifest.decode_machine(body.fields("machine")),
        sources=codec.decode_sources(body),
        next_disk_number=body.integer("next_disk_number", most=LARGEST_DISK_NUMBER + 1),
        interval_seconds=body.integer("interval_seconds", least=1),
        compression_level=body.integer("compression_level", least=-100, most=22),
        # Not parsed here: a term that only a later version knows must not keep this one from replicating.
        retention=body.optional_text("retention"),
        seed=_read_seed(body),
        state=state,
        change=change,
        previous=previous,
    )


def _read_seed(body: record.Fields) -> SeedRef | None:
    if body.values.get("seed") is None:
        return None
    fields = body.fields("seed")
    return SeedRef(fields.hexadecimal("vm_id", digits=32), fields.integer("point", least=1))


def encode_settings(settings: Settings) -> bytes:
    """Return the settings object."""
    seed = settings.seed
    return record.encode(
        "settings",
        {
            "version": settings.version,
            "machine": manifest.encode_machine(settings.machine),
            "sources": codec.encode_sources(settings.sources),
            "next_disk_number": settings.next_disk_number,
            "interval_seconds": settings.interval_seconds,
            "compression_level": settings.compression_level,
            **({} if settings.retention is None else {"retention": settings.retention}),
            **({} if seed is None else {"seed": {"vm_id": seed.vm_id, "point": seed.point}}),
            **codec.encode(settings),
        },
    )


def settings_in_force(store: Store, found: ProtectedVm) -> Settings:
    """Return the settings in force."""
    state, _ = lease.read(store, found.keys)
    return read_settings(store, found.keys, state.settings_version)


def newest_point(store: Store, found: ProtectedVm) -> Point:
    """Return the newest recovery point. Raises UsageError where there is none yet."""
    newest = history.newest(store, found.keys)
    if newest is None:
        raise UsageError(
            f"{found.vm.name} has no recovery point yet", hint=f"'godwit replicate {found.vm.name}' makes the first"
        )
    return newest


def _exists(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except ObjectMissingError:
        return False
    return True


def _encode_vm(vm: Vm) -> bytes:
    return record.encode(
        "vm",
        {
            "vm_id": vm.vm_id,
            "name": vm.name,
            "created_at": record.time_text(vm.created_at),
            "block_size_bytes": 65536,
            "hash": "xxh3-128",
            "hash_seed": str(vm.hash_seed),
            "wrapped_key": None,
        },
    )


def read_vm(store: Store, vm_keys: VmKeys) -> Vm:
    """Return what never changes about a VM. Raises IntegrityError."""
    key = vm_keys.vm
    try:
        body = record.decode("vm", store.get(key), key=key)
    except ObjectMissingError as error:
        raise IntegrityError("the VM's record is missing from the store", key=key) from error
    seed = body.text("hash_seed")
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 20) or int(seed) >= 1 << 64:
        raise IntegrityError("the VM's hash seed is not a 64-bit number", key=key)
    if (body.text("vm_id"), body.integer("block_size_bytes"), body.text("hash")) != (vm_keys.vm_id, 65536, "xxh3-128"):
        raise IntegrityError("the VM's record names another VM, block size or hash than this godwit knows", key=key)
    return Vm(vm_keys.vm_id, body.text("name"), body.time("created_at").astimezone(UTC), int(seed))
