"""What every command on a store needs: its options, the store behind them, and this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.sizes import IntegerParameter
from replica import configuration, keysource
from replica.catalog import ProtectedVm, find
from replica.configuration import Configuration
from replica.errors import NoStoreError
from replica.host import Host, this_host
from replica.platforms.platform import Platform
from replica.platforms.registry import open_platform
from replica.stores.address import open_store
from replica.stores.store import Store
from replica.tenantkey import Secret
from replica.vault import Vault

Function = TypeVar("Function", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Session:
    """One command's view: the configuration, this machine, and the store once it is asked for."""

    configuration: Configuration
    host: Host
    vault: Vault
    typed: dict[str, str] = field(default_factory=dict)  # on the terminal, by the variable that would have spared it

    @property
    def environment(self) -> dict[str, str]:
        """The environment of programs that are to read the store on their own, and can ask nobody."""
        return {**os.environ, **self.typed}

    def store(self, *, create: bool = False, url: str | None = None) -> Store:
        """Open the store. Raises NoStoreError where none was given."""
        address = url or self.configuration.store
        if address is None:
            raise NoStoreError(
                "no store was given", hint='say --store URL, set GODWIT_STORE, or write store = "URL" in godwit.toml'
            )
        workers = self.configuration.workers
        threads = workers.threads + workers.uploads
        return open_store(address, create=create, workers=threads, around=self.vault.around)

    def platform(self, name: str) -> Platform:
        """Return the platform of that name, as it is configured. Raises UsageError, ConfigurationError."""
        return open_platform(name, self.host, tables=self.configuration.platforms, environment=self.environment)

    def secret(self, *, is_new: bool = False) -> Secret | None:
        """Return what opens the tenant's key, or None where nothing was given. Raises TenantKeyError.

        ``is_new``: it is about to become the key, so that a passphrase is asked for twice.
        """
        return given_secret(self.configuration, self.typed, is_new=is_new)

    def vm(self, store: Store, name: str) -> ProtectedVm:
        """Find a protected VM. Raises UsageError."""
        return find(store, self.configuration.tenant, name)


def store_options(function: Function) -> Function:
    """Give a command --store, --tenant and --config, and a ``Session`` as its argument ``session``."""

    def wrapped(*args: Any, store: str | None, tenant: str | None, config: Path | None, **kwargs: Any) -> Any:
        loaded = configuration.load(environment=os.environ, file=config, store=store, tenant=tenant)
        typed: dict[str, str] = {}
        vault = Vault(lambda: given_secret(loaded, typed), require=loaded.require_encryption)
        session = Session(loaded, this_host(loaded.state_folder, inspects=loaded.convertibility), vault, typed)
        return function(*args, session=session, **kwargs)

    wrapped.__name__ = function.__name__
    wrapped.__doc__ = function.__doc__
    decorated: Any = wrapped
    decorated.__click_params__ = getattr(function, "__click_params__", [])
    for option in (
        click.option(
            "--config", type=click.Path(path_type=Path, readable=False), metavar="FILE", help="The configuration file."
        ),
        click.option("--tenant", metavar="NAME", help="The tenant in the store.  [default: default]"),
        click.option("--store", metavar="URL", help="The store: file:///folder or s3://bucket/prefix."),
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def given_secret(loaded: Configuration, typed: dict[str, str], *, is_new: bool = False) -> Secret | None:
    """Return what opens the tenant's key: given beforehand, or asked for on a terminal and put into ``typed``.

    Raises TenantKeyError.
    """

    def ask(question: str) -> str | None:
        answer = ask_passphrase(question, confirm=is_new)
        if answer is not None:
            typed[keysource.PASSPHRASE_VARIABLE] = answer
        return answer

    return keysource.given_secret(loaded, os.environ, ask)


def ask_passphrase(question: str, *, confirm: bool = False) -> str | None:
    """Ask for a passphrase on the terminal; None where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    answer: str = click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


class Duration(IntegerParameter):
    """A span of time as a person writes it: 30s, 5m, 2h, 1d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return seconds."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhd])", str(value).strip().lower())
        if not match or not int(match[1]):
            self.fail(f"{value!r} is no duration: write 30s, 5m, 2h or 1d", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


def duration_text(seconds: float) -> str:
    """Return a span of time in at most two units."""
    whole = int(seconds)
    if whole < 60:
        return f"{max(whole, 0)} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 and whole < 600 else f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
