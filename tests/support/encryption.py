"""Encryption for tests: a cheap passphrase, a store with an encrypting vault before it, and a lab on such a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from replica import tenantkey
from replica.host import Host
from replica.stores.store import Store
from replica.tenantkey import Secret
from replica.vault import SealedStore, Vault
from tests.support.engine import Lab, make_host, make_lab

SECRET = Secret("key", bytes(range(32)))
OTHER_SECRET = Secret("key", bytes(range(1, 33)))
CHEAP_SCRYPT = mock.patch.object(tenantkey, "SCRYPT_COST", 16)


def give_key(store: Store, tenant: str = "default", secret: Secret = SECRET) -> None:
    """Give the tenant a key, unless it has one."""
    if not tenantkey.list_keys(store, tenant):
        tenantkey.init(store, make_host(), tenant, secret)


def vault_for(secret: Secret | None = SECRET, *, require: bool = False) -> Vault:
    """Return a vault that is given ``secret``."""
    return Vault(lambda: secret, require=require)


def sealed(store: Store, secret: Secret | None = SECRET) -> SealedStore:
    """Return the store as another process sees it that is given ``secret``."""
    return vault_for(secret).around(store)


def encrypted_lab(
    folder: Path, disks: Sequence[bytes], inner: Store, *, name: str = "web 1", host: Host | None = None
) -> Lab:
    """Return a lab whose VM is encrypted, in ``inner``."""
    give_key(inner)
    vault = vault_for()
    return make_lab(folder, disks, store=vault.around(inner), name=name, host=host, vault=vault)
