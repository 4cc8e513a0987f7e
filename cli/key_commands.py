"""godwit key init, check, show, rotate, export: a tenant's encryption key."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.output import Output, output_options
from cli.session import Session, ask_passphrase, store_options
from replica import catalog, keyring, keysource, tenantkey
from replica.tenantkey import Secret, TenantKey

Function = TypeVar("Function", bound=Callable[..., Any])


def new_key_options(function: Function) -> Function:
    """Give a command --passphrase, --key-file and --key-command."""
    decorated = function
    for option in (
        click.option("--key-command", metavar="COMMAND", help="A command that prints the key, as a key file holds it."),
        click.option(
            "--key-file",
            type=click.Path(path_type=Path, readable=False, dir_okay=False),
            metavar="FILE",
            help="A file with 32 random bytes or 64 hex digits; made where there is none.",
        ),
        click.option("--passphrase", is_flag=True, help="A passphrase, asked for twice."),
    ):
        decorated = option(decorated)
    return decorated


def _new_secret(passphrase: bool, key_file: Path | None, key_command: str | None, variable: str) -> Secret | None:
    """Return the secret that the options name; None for no option. ``variable`` may hold the passphrase instead."""
    if sum((passphrase, key_file is not None, key_command is not None)) > 1:
        raise click.UsageError("say one of --passphrase, --key-file and --key-command")
    if key_file is not None:
        return keysource.make_key_file(key_file)
    if key_command is not None:
        return keysource.run_key_command(key_command)
    if not passphrase:
        return None
    text = os.environ.get(variable) or ask_passphrase("New passphrase", confirm=True)
    if text is None:
        raise click.UsageError(f"a passphrase can be asked for on a terminal only; elsewhere set {variable}")
    return tenantkey.passphrase(text)


@click.command()
@new_key_options
@store_options
@output_options
def init(output: Output, passphrase: bool, key_file: Path | None, key_command: str | None, *, session: Session) -> None:
    """Give the tenant its encryption key, opened by what you choose here.

    Without an option it is opened by the key that is given otherwise. Afterwards VMs can be protected with --encrypt.
    Without the key nothing that is encrypted can ever be restored: keep it, or a recovery kit, apart from the store.
    """
    secret = _new_secret(passphrase, key_file, key_command, keysource.PASSPHRASE_VARIABLE)
    secret = secret or session.secret(is_new=True)
    if secret is None:
        raise click.UsageError("say --passphrase, --key-file FILE or --key-command COMMAND")
    tenant = session.configuration.tenant
    made = keyring.init(session.store(), session.host, tenant, secret)

    def render() -> None:
        output.line(f"tenant {tenant} has a key, opened by {_opened_by(made)} (fingerprint {made.fingerprint})")
        output.note(
            "next: godwit key export --to FILE writes a recovery kit; godwit protect NAME --disk PATH --encrypt"
        )

    output.show({"tenant": tenant, **_document(made)}, render)


@click.command()
@store_options
@output_options
def check(output: Output, *, session: Session) -> int | None:
    """Try the key that is given on every VM of the tenant.

    Exits with 13 if it is not the one, with 12 if it is and the record of a VM is damaged.
    """
    tenant = session.configuration.tenant
    found = keyring.check(session.store(), tenant, session.vault)

    def render() -> None:
        output.line(f"the key opens tenant {tenant} (fingerprint {found.fingerprint})")
        output.line(f"encrypted VMs: {', '.join(found.encrypted) or 'none'}")
        if found.plain:
            output.line(f"not encrypted: {', '.join(found.plain)}")
        for name, error in found.damaged.items():
            output.line(f"{name}: {error}")

    document = {
        "tenant": tenant,
        "fingerprint": found.fingerprint,
        "encrypted": found.encrypted,
        "not_encrypted": found.plain,
        "damaged": [{"vm": name, "message": str(error)} for name, error in found.damaged.items()],
    }
    output.show(document, render)
    return 12 if found.damaged else None


@click.command()
@store_options
@output_options
def show(output: Output, *, session: Session) -> None:
    """Show which key the tenant has and what opens it. No secret is shown, and none is needed."""
    store = session.store()
    catalog.read_store(store)
    tenant = session.configuration.tenant
    found = tenantkey.list_keys(store, tenant)

    def render() -> None:
        if not found:
            output.note(f"tenant {tenant} has no key: 'godwit key init' makes one")
            return
        output.table(
            ["key", "fingerprint", "opened by", "since (UTC)"],
            [(one.number, one.fingerprint, _opened_by(one), f"{one.created_at:%Y-%m-%d %H:%M:%S}") for one in found],
            right=(0,),
        )
        if len(found) > 1:
            output.note("a rotation was cut off: each of these opens the data; run 'godwit key rotate' again")

    output.show({"tenant": tenant, "keys": [_document(one) for one in found]}, render)


@click.command()
@new_key_options
@store_options
@output_options
def rotate(
    output: Output, passphrase: bool, key_file: Path | None, key_command: str | None, *, session: Session
) -> None:
    """Change what opens the tenant's key: the one that is given is replaced by what you choose here.

    The data stays as it is, and so does a recovery kit. Cut off at any instant, one of the two keys opens it.
    GODWIT_NEW_PASSPHRASE may hold the new passphrase.
    """
    new = _new_secret(passphrase, key_file, key_command, keysource.NEW_PASSPHRASE_VARIABLE)
    if new is None:
        raise click.UsageError("say --passphrase, --key-file FILE or --key-command COMMAND for the new key")
    store = session.store()
    catalog.read_store(store)
    tenant = session.configuration.tenant
    made = tenantkey.rotate(store, session.host, tenant, session.secret(), new)

    def render() -> None:
        output.line(f"tenant {tenant}: the key is now opened by {_opened_by(made)} (fingerprint {made.fingerprint})")

    output.show({"tenant": tenant, **_document(made)}, render)


@click.command()
@click.option(
    "--to",
    "to",
    required=True,
    type=click.Path(path_type=Path, readable=False, dir_okay=False),
    metavar="FILE",
    help="The file to make; only its owner can read it.",
)
@store_options
@output_options
def export(output: Output, to: Path, *, session: Session) -> None:
    """Write the recovery kit: the tenant's master key as text, to be printed and kept in a safe.

    It opens everything that the tenant encrypts, now and later, and is used as a key file is.
    """
    store = session.store()
    catalog.read_store(store)
    tenant = session.configuration.tenant
    master = session.vault.unlock(store, tenant)
    keysource.write_recovery_kit(to, tenant, store.url, master)
    document = {"tenant": tenant, "path": to, "fingerprint": tenantkey.fingerprint(master)}

    def render() -> None:
        output.line(f"{to}: the recovery kit of tenant {tenant} (fingerprint {tenantkey.fingerprint(master)})")
        output.note("print it, put it into a safe, and delete the file")

    output.show(document, render)


def _opened_by(key: TenantKey) -> str:
    return "a passphrase" if key.kind == "passphrase" else "a key file or command"


def _document(key: TenantKey) -> dict[str, Any]:
    opened_by = "passphrase" if key.kind == "passphrase" else "key"
    return {
        "number": key.number,
        "fingerprint": key.fingerprint,
        "opened_by": opened_by,
        "created_at": key.created_at,
    }
