"""What is done with a tenant's key: made, tried, and told apart from others."""

from __future__ import annotations

from dataclasses import dataclass

from replica import catalog, tenantkey
from replica.errors import GodwitError, TenantKeyError, UsageError
from replica.host import Host
from replica.stores.store import Store
from replica.tenantkey import Secret, TenantKey
from replica.vault import Vault


@dataclass(frozen=True, slots=True)
class KeyCheck:
    """What trying a key found: the VMs that it opens, those that are not encrypted, and what is wrong with others."""

    fingerprint: str
    encrypted: tuple[str, ...]
    plain: tuple[str, ...]
    damaged: dict[str, GodwitError]


def init(store: Store, host: Host, tenant: str, secret: Secret) -> TenantKey:
    """Give the tenant its key. Raises UsageError where it has one, or has VMs that a lost one encrypted."""
    catalog.read_store(store)
    if not tenantkey.list_keys(store, tenant):
        for name in catalog.names(store, tenant):
            try:
                catalog.find(store, tenant, name)
            except TenantKeyError as error:
                raise UsageError(
                    f"the VM {name!r} is encrypted by a key that is missing from the store",
                    hint="use the recovery kit as the key file and run 'godwit key rotate'",
                ) from error
            except GodwitError:  # damaged: not for this command to say
                continue
    return tenantkey.init(store, host, tenant, secret)


def check(store: Store, tenant: str, vault: Vault) -> KeyCheck:
    """Try the key on all VMs of the tenant. Raises TenantKeyError where it is not the one."""
    catalog.read_store(store)
    master = vault.unlock(store, tenant)
    encrypted: list[str] = []
    plain: list[str] = []
    damaged: dict[str, GodwitError] = {}
    for name in catalog.names(store, tenant):
        try:
            found = catalog.find(store, tenant, name)
        except GodwitError as error:
            damaged[name] = error
        else:
            (encrypted if vault.is_encrypted(found.keys) else plain).append(name)
    return KeyCheck(tenantkey.fingerprint(master), tuple(encrypted), tuple(plain), damaged)
