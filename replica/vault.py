"""The vault: what stands between the engine and a store where VMs are encrypted; it seals and opens their objects.

docs/format.md, section 7. Everything that lies under an encrypted VM's prefix is sealed on its way into the store and
opened on its way out, so that nothing above knows of it. VMs that are not encrypted pass through untouched.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from replica import keys, record, sealing, tenantkey
from replica.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectMissingError,
    StoreUnavailableError,
)
from replica.keys import VmKeys
from replica.sealing import CHUNK_BYTES, HEADER_BYTES, STORED_CHUNK_BYTES, Sealer
from replica.stores.store import ObjectData, ObjectInfo, Store
from replica.tenantkey import Secret

VM_KIND: Final = "vm"


class Vault:
    """The keys of one process: the tenants' master keys, opened when first needed, and the VMs' data keys.

    ``secret`` is asked for once, when it is first needed. With ``require`` no VM passes that is not encrypted.
    """

    def __init__(self, secret: Callable[[], Secret | None], *, require: bool = False) -> None:
        self._ask = secret
        self._secret: list[Secret | None] = []  # once it was asked for
        self.require = require
        self._masters: dict[str, bytes] = {}
        self._data_keys: dict[VmKeys, bytes] = {}  # of VMs that were made here and are not in the store yet
        self._sealers: dict[VmKeys, Sealer | None] = {}
        self._lock = threading.RLock()

    def around(self, store: Store) -> SealedStore:
        """Return ``store`` with this vault before it."""
        return SealedStore(store, self)

    def unlock(self, store: Store, tenant: str) -> bytes:
        """Return the tenant's master key. Raises TenantKeyError."""
        with self._lock:
            if tenant not in self._masters:
                if not self._secret:
                    self._secret.append(self._ask())
                self._masters[tenant] = tenantkey.open_master(store, tenant, self._secret[0])
            return self._masters[tenant]

    def admit(self, store: Store, vm_keys: VmKeys) -> None:
        """Let a VM that is about to be made be encrypted, under a new data key. Raises TenantKeyError."""
        self.unlock(store, vm_keys.tenant)
        with self._lock:
            self._data_keys[vm_keys] = sealing.new_key()

    def is_encrypted(self, vm_keys: VmKeys) -> bool:
        """Whether a VM that was met is encrypted."""
        with self._lock:
            return self._sealers.get(vm_keys) is not None

    def seal_vm(self, store: Store, vm_keys: VmKeys, data: bytes) -> bytes:
        """Return the record of a VM as it goes into the store."""
        with self._lock:
            data_key = self._data_keys.get(vm_keys)
            if data_key is None:
                self._refuse_plain(vm_keys)
                self._sealers[vm_keys] = None
                return data
            wrapping = sealing.derive(self.unlock(store, vm_keys.tenant), b"godwit data key")
            sealer = Sealer(data_key)
            body = {
                "vm_id": vm_keys.vm_id,
                "wrapped_key": sealing.wrap(wrapping, data_key, vm_keys.vm.encode()).hex(),
                "sealed": base64.b64encode(sealer.seal(vm_keys.vm, data)).decode(),
            }
            self._sealers[vm_keys] = sealer
        return record.encode(VM_KIND, body, suite=sealing.SUITE)

    def open_vm(self, store: Store, vm_keys: VmKeys, data: bytes) -> bytes:
        """Return the record of a VM from what lies in the store, and know its data key. Raises TenantKeyError."""
        if _suite_of(data) != sealing.SUITE:
            # What is damaged is refused here: it might have been encrypted, and nothing must be written in clear then.
            record.decode(VM_KIND, data, key=vm_keys.vm)
            with self._lock:
                if self._sealers.get(vm_keys) is not None:
                    raise IntegrityError("the VM's record says that it is not encrypted; it was", key=vm_keys.vm)
                self._refuse_plain(vm_keys)
                self._sealers[vm_keys] = None
            return data
        body = record.decode(VM_KIND, data, key=vm_keys.vm, suite=sealing.SUITE)
        if body.text("vm_id") != vm_keys.vm_id:
            raise IntegrityError("the record is that of another VM: objects were mixed up", key=vm_keys.vm)
        wrapping = sealing.derive(self.unlock(store, vm_keys.tenant), b"godwit data key")
        data_key = sealing.unwrap(wrapping, _from_hex(body, "wrapped_key"), vm_keys.vm.encode())
        if data_key is None or len(data_key) != sealing.KEY_BYTES:
            raise IntegrityError(
                "the VM's data key does not open with the tenant's key: it was damaged", key=vm_keys.vm
            )
        sealer = Sealer(data_key)
        try:
            sealed = base64.b64decode(body.text("sealed"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise IntegrityError("field 'sealed' should be base64", key=vm_keys.vm) from error
        plain = sealer.open(vm_keys.vm, sealed)
        with self._lock:
            self._sealers[vm_keys] = sealer
        return plain

    def sealer(self, store: Store, vm_keys: VmKeys, *, writing: bool) -> Sealer | None:
        """Return what seals the VM's objects, None for one that is not encrypted. Asks the store the first time."""
        with self._lock:
            if vm_keys in self._sealers:
                return self._sealers[vm_keys]
            try:
                self.open_vm(store, vm_keys, store.get(vm_keys.vm))
            except ObjectMissingError as error:
                if writing:  # it may have been encrypted: nothing is written in clear on the word of a missing object
                    raise IntegrityError("the VM's record is missing from the store", key=vm_keys.vm) from error
                return None
            return self._sealers[vm_keys]

    def forget(self, vm_keys: VmKeys) -> None:
        """Forget a VM whose record is being deleted."""
        with self._lock:
            self._sealers.pop(vm_keys, None)

    def _refuse_plain(self, vm_keys: VmKeys) -> None:
        if self.require:
            raise ConfigurationError(
                "the VM is not encrypted, and the configuration requires it (require_encryption)",
                path=vm_keys.vm,
                hint="protect it with --encrypt; if it was encrypted, somebody exchanged its record in the store",
            )


class SealedStore:
    """A store behind a vault; the inner one holds what is sealed. Sizes, ranges and tags are as if it were not.

    It belongs inside a ResilientStore: what fails here for want of an answer is repeated there.
    """

    def __init__(self, inner: Store, vault: Vault) -> None:
        self._inner = inner
        self.vault = vault

    @property
    def inner(self) -> Store:
        """The store that holds what is sealed."""
        return self._inner

    @property
    def url(self) -> str:
        """The inner store's address."""
        return self._inner.url

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes or a range of them, opened; see ``Store.get``. Raises IntegrityError too."""
        vm_keys = keys.vm_of(key)
        if vm_keys is None:
            return self._inner.get(key, start=start, length=length)
        if key == vm_keys.vm:
            whole = self.vault.open_vm(self._inner, vm_keys, self._inner.get(key))
            begin = max(0, len(whole) + start) if start < 0 else start
            return whole[begin:] if length is None else whole[begin : begin + length]
        sealer = self.vault.sealer(self._inner, vm_keys, writing=False)
        if sealer is None:
            return self._inner.get(key, start=start, length=length)
        if start == 0 and length is None:
            return sealer.open(key, self._inner.get(key))
        if start < 0 or length is None:
            size = self._size(self._inner.head(key))
            start = max(0, size + start) if start < 0 else start
            length = max(0, size - start) if length is None else length
        return self._range(sealer, key, start, length) if length else b""

    def _range(self, sealer: Sealer, key: str, start: int, length: int) -> bytes:
        first, last = start // CHUNK_BYTES, (start + length - 1) // CHUNK_BYTES
        stored_start = HEADER_BYTES + first * STORED_CHUNK_BYTES
        stored = self._inner.get(key, start=stored_start, length=(last - first + 1) * STORED_CHUNK_BYTES)
        try:
            chunks = sealer.open_chunks(key, stored, first)
        except IntegrityError:
            # Was the answer cut, which asking again may help, or the object changed?
            rest = self._inner.head(key).size - stored_start
            if len(stored) < min(rest, (last - first + 1) * STORED_CHUNK_BYTES):
                raise StoreUnavailableError("the store's answer was cut short", key=key) from None
            raise
        skipped = start - first * CHUNK_BYTES
        return chunks[skipped : skipped + length]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object, opened, and its tag; see ``Store.get_tagged``."""
        data, tag = self._inner.get_tagged(key)
        vm_keys = keys.vm_of(key)
        if vm_keys is None:
            return data, tag
        if key == vm_keys.vm:
            return self.vault.open_vm(self._inner, vm_keys, data), tag
        sealer = self.vault.sealer(self._inner, vm_keys, writing=False)
        return (data if sealer is None else sealer.open(key, data)), tag

    def head(self, key: str) -> ObjectInfo:
        """Return the size of what the object holds, and its tag; see ``Store.head``."""
        return self._translated(self._inner.head(key))

    def _translated(self, info: ObjectInfo) -> ObjectInfo:
        vm_keys = keys.vm_of(info.key)
        if vm_keys is None or info.key == vm_keys.vm:
            return info
        sealer = self.vault.sealer(self._inner, vm_keys, writing=False)
        return info if sealer is None else replace(info, size=self._size(info))

    @staticmethod
    def _size(info: ObjectInfo) -> int:
        size = sealing.plain_size(info.size)
        return info.size if size is None else size  # of no sealed object: reading it will say so

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object, sealed, if none exists; see ``Store.create``."""
        return self._inner.create(key, self._sealed(key, data))

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object, sealed, if its tag still is ``tag``; see ``Store.replace``."""
        return self._inner.replace(key, self._sealed(key, data), tag=tag)

    def _sealed(self, key: str, data: ObjectData) -> ObjectData:
        vm_keys = keys.vm_of(key)
        if vm_keys is None:
            return data
        if key == vm_keys.vm:
            return self.vault.seal_vm(self._inner, vm_keys, bytes(data))
        sealer = self.vault.sealer(self._inner, vm_keys, writing=True)
        return data if sealer is None else sealer.seal(key, data)

    def delete(self, key: str) -> None:
        """Remove the object; see ``Store.delete``."""
        self._inner.delete(key)
        vm_keys = keys.vm_of(key)
        if vm_keys is not None and key == vm_keys.vm:
            self.vault.forget(vm_keys)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects with the sizes of what they hold; see ``Store.list``."""
        return map(self._translated, self._inner.list(prefix, start_after=start_after))

    def close(self) -> None:
        """Close the inner store."""
        self._inner.close()


def vault_of(store: Store) -> Vault | None:
    """Return the vault that stands before a store, None where there is none."""
    inner: object = store
    while inner is not None and not isinstance(inner, SealedStore):
        inner = getattr(inner, "inner", None)
    return None if inner is None else inner.vault


def _suite_of(data: bytes) -> int:
    try:
        outer = json.loads(data)
    except (ValueError, RecursionError):
        return record.SUITE_NONE
    found = outer.get("suite") if isinstance(outer, dict) else None
    return found if isinstance(found, int) else record.SUITE_NONE


def _from_hex(body: record.Fields, field: str) -> bytes:
    return bytes.fromhex(body.hexadecimal(field, digits=2 * (sealing.KEY_BYTES + sealing.CHUNK_OVERHEAD_BYTES)))
