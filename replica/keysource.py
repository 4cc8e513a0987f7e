"""Where a person's key comes from: environment, configuration, a command's output, a question on the terminal."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from replica import tenantkey
from replica.configuration import Configuration
from replica.errors import TenantKeyError
from replica.sealing import KEY_BYTES
from replica.tenantkey import Secret

LARGEST_KEY_BYTES: Final = 1 << 16  # a recovery kit is a page of text
COMMAND_SECONDS: Final = 120.0
KEY_FILE_VARIABLE: Final = "GODWIT_KEY_FILE"
PASSPHRASE_VARIABLE: Final = "GODWIT_PASSPHRASE"
NEW_PASSPHRASE_VARIABLE: Final = "GODWIT_NEW_PASSPHRASE"

Ask = Callable[[str], str | None]  # asks for a passphrase; None where nobody can be asked


def given_secret(configuration: Configuration, environment: Mapping[str, str], ask: Ask) -> Secret | None:
    """Return the secret that opens the tenant's key, or None where none was given.

    The first of: GODWIT_KEY_FILE, GODWIT_PASSPHRASE, ``key_file`` and ``key_command`` of the configuration, the answer
    to a question. Raises TenantKeyError for one that cannot be had.
    """
    if environment.get(KEY_FILE_VARIABLE):
        return read_key_file(Path(environment[KEY_FILE_VARIABLE]))
    if environment.get(PASSPHRASE_VARIABLE):
        return tenantkey.passphrase(environment[PASSPHRASE_VARIABLE])
    if configuration.key_file is not None:
        return read_key_file(configuration.key_file)
    if configuration.key_command:
        return run_key_command(configuration.key_command)
    answer = ask(f"Passphrase of tenant {configuration.tenant}")
    return None if answer is None else tenantkey.passphrase(answer)


def read_key_file(path: Path) -> Secret:
    """Return the secret that a key file holds. Raises TenantKeyError."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_KEY_BYTES)
    except OSError as error:
        raise TenantKeyError(f"the key file cannot be read: {error.strerror}", path=str(path)) from error
    return tenantkey.parse(content, source=str(path))


def make_key_file(path: Path) -> Secret:
    """Return the secret of the key file, made with a random key and for its owner alone where there is none."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key_file(path)
    except OSError as error:
        raise TenantKeyError(f"the key file cannot be made: {error.strerror}", path=str(path)) from error
    _write_durably(handle, path, f"{secrets.token_hex(KEY_BYTES)}\n")
    return read_key_file(path)


def write_recovery_kit(path: Path, tenant: str, url: str, master: bytes) -> None:
    """Write the recovery kit into a new file that its owner alone can read. Raises TenantKeyError."""
    kit = (
        "Godwit recovery kit\n\n"
        f"store   {url}\ntenant  {tenant}\nkey     {tenantkey.fingerprint(master)} (fingerprint)\n\n"
        "Whoever has the next line can read everything that this tenant encrypted, whatever its passphrase.\n"
        "Keep it where you would keep the disks themselves, and not in the store.\n\n"
        f"{tenantkey.recovery_line(master)}\n\n"
        "It is used as a key file: GODWIT_KEY_FILE=this-file godwit restore ...\n"
        "With it, 'godwit key rotate' sets a new passphrase or key file.\n"
    )
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise TenantKeyError("the file exists already", path=str(path), hint="name a new one") from error
    except OSError as error:
        raise TenantKeyError(f"the recovery kit cannot be written: {error.strerror}", path=str(path)) from error
    _write_durably(handle, path, kit)


def _write_durably(handle: int, path: Path, text: str) -> None:
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TenantKeyError(f"the file cannot be written: {error.strerror}", path=str(path)) from error


def run_key_command(command: str | Sequence[str]) -> Secret:
    """Return the secret that a command prints, in the forms that a key file has. Raises TenantKeyError."""
    try:
        arguments = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise TenantKeyError(f"the key command cannot be understood: {error}") from error
    if not arguments:
        raise TenantKeyError("the key command is empty")
    name = arguments[0]
    try:
        done = subprocess.run(arguments, stdin=None, capture_output=True, timeout=COMMAND_SECONDS, check=False)
    except OSError as error:
        raise TenantKeyError(f"the key command cannot be run: {error.strerror}", path=name) from error
    except subprocess.TimeoutExpired as error:
        raise TenantKeyError(f"the key command gave no answer for {COMMAND_SECONDS:.0f} s", path=name) from error
    except ValueError as error:  # a null byte in an argument
        raise TenantKeyError(f"the key command cannot be run: {error}", path=name) from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise TenantKeyError(
            f"the key command failed with exit code {done.returncode}{f': {said[-1]}' if said else ''}", path=name
        )
    return tenantkey.parse(done.stdout[:LARGEST_KEY_BYTES], source=name)
