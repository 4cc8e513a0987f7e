"""What [platforms.hyperv] says: which host, where files go on it, and how they and its guests are reached."""

from __future__ import annotations

import ntpath
import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from replica.errors import ConfigurationError, PlatformError, UsageError
from replica.hyperv.address import parse_host
from replica.platforms.networks import read_mapping

PASSWORD: Final = "GODWIT_GUEST_PASSWORD"
COMMAND_SECONDS: Final = 60.0
LONGEST_TEXT: Final = 1000
TEMPLATES: Final = ("MicrosoftWindows", "MicrosoftUEFICertificateAuthority", "OpenSourceShieldedVM")
_HOW: Final = {
    "host": "the Hyper-V host",
    "folder": "a folder of that host, such as D:\\Recovery",
    "share": "where that folder is reached from here",
    "switch": "a switch of that host",
    "test_switch": "a private switch of that host",
    "secure_boot_template": " or ".join(TEMPLATES),
    "guest_user": "an account of the guests",
}


@dataclass(frozen=True, slots=True)
class GuestAccount:
    """Who Godwit is in guests. The password is looked for when it is needed, and kept nowhere."""

    user: str = ""
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def password(self) -> str:
        """Return it: GODWIT_GUEST_PASSWORD, else what the command prints. Raises PlatformError."""
        if not self.user:
            raise PlatformError(
                "no account of the guest is known", hint="write guest_user into [platforms.hyperv] of godwit.toml"
            )
        given = self.environment.get(PASSWORD)
        if given:
            return given
        if not self.command:
            raise PlatformError(
                f"the password of {self.user} in the guest is not known",
                hint=f"set {PASSWORD}, or write guest_password_command into [platforms.hyperv] of godwit.toml",
            )
        return self._asked()

    def _asked(self) -> str:
        name = self.command[0]
        hint = "see guest_password_command in [platforms.hyperv] of godwit.toml"
        try:
            done = subprocess.run(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=COMMAND_SECONDS,
                check=False,
                env=dict(self.environment),
            )
        except (OSError, ValueError) as error:
            raise PlatformError(f"the command for the guest's password cannot be run: {error}", hint=hint) from error
        except subprocess.TimeoutExpired:
            raise PlatformError(f"{name} gave no password for {COMMAND_SECONDS:.0f} s", hint=hint) from None
        try:
            text = done.stdout.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            text = ""
        if done.returncode or not text or len(text) > LONGEST_TEXT:
            raise PlatformError(f"{name} gave no password (exit code {done.returncode})", hint=hint)
        return text


@dataclass(frozen=True, slots=True)
class HypervSettings:
    """``host`` is a URL of PowerShell remoting, None for this machine; ``share`` is where ``folder`` is from here."""

    folder: str
    host: str | None = None
    share: Path | None = None
    switch: str = ""
    test_switch: str = ""
    template: str = ""  # of Secure Boot, where what starts is not known
    guest: GuestAccount = field(default_factory=GuestAccount)
    networks: Mapping[str, str] = field(default_factory=dict)  # of the source, and the switches they are here

    @property
    def files(self) -> Path:
        """Where this machine writes the files that the host sees in ``folder``."""
        return Path(self.folder) if self.share is None else self.share

    @property
    def maps(self) -> tuple[tuple[str, str], ...]:
        """How files of the host are reached, as addresses of disks have it."""
        return () if self.share is None else ((self.folder, str(self.share)),)


def read(table: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> HypervSettings:
    """Return the settings of a [platforms.hyperv] table. Raises ConfigurationError, which names all that is wrong."""
    known = {*_HOW, "guest_password_command", "networks"}
    wrong = [f"{name!r} is not a setting" for name in table if name not in known]
    texts: dict[str, str] = {}
    for name, what in _HOW.items():
        value = table.get(name, "")
        if not isinstance(value, str) or len(value) > LONGEST_TEXT or (name in table and not value.strip()):
            wrong.append(f"{name} should be {what}")
        elif any(ord(letter) < 32 for letter in value):
            wrong.append(f"{name} holds control characters")
        else:
            texts[name] = value
    host = _host(texts.get("host", ""), wrong)
    folder = _folder(texts.get("folder", ""), wrong, is_given="folder" in table)
    if host is not None and "share" not in table:
        wrong.append("share is missing: where the folder of the host is reached from here")
    template = texts.get("secure_boot_template", "")
    if template and template not in TEMPLATES:
        wrong.append(f"secure_boot_template should be {_HOW['secure_boot_template']}")
    if texts.get("switch") and texts.get("switch") == texts.get("test_switch"):
        wrong.append("test_switch is to be another than switch: tests would meet what runs")
    networks: dict[str, str] = {}
    try:
        networks = read_mapping(table.get("networks", {}))
    except ValueError as error:
        wrong.append(f"networks {error}")
    if texts.get("test_switch") and texts.get("test_switch") in networks.values():
        wrong.append("networks leads to test_switch: tests would meet what runs")
    command = _command(table.get("guest_password_command", ()), wrong)
    if wrong:
        raise ConfigurationError("platforms.hyperv: " + "; ".join(wrong))
    return HypervSettings(
        folder=folder,
        host=host,
        share=Path(texts["share"]).absolute() if texts.get("share") else None,
        switch=texts.get("switch", ""),
        test_switch=texts.get("test_switch", ""),
        template=template,
        guest=GuestAccount(texts.get("guest_user", ""), command, os.environ if environment is None else environment),
        networks=networks,
    )


def _host(text: str, wrong: list[str]) -> str | None:
    if not text:
        return None
    try:
        return parse_host(text)
    except UsageError as error:
        wrong.append(f"{error.message} ({error.hint})")
        return None


def _folder(text: str, wrong: list[str], *, is_given: bool) -> str:
    if not text:
        if not is_given:
            wrong.append(f"folder is missing: {_HOW['folder']}")
        return text
    if not ntpath.isabs(text) or not ntpath.splitdrive(text)[0]:
        wrong.append(f"folder should be {_HOW['folder']}")
    return ntpath.normpath(text)


def _command(value: Any, wrong: list[str]) -> tuple[str, ...]:
    try:
        words: list[Any] = list(shlex.split(value) if isinstance(value, str) else value)
    except (ValueError, TypeError):
        words = [None]
    if not all(isinstance(one, str) and one and "\0" not in one for one in words):
        wrong.append("guest_password_command should be a command: text, or a list of its words")
        return ()
    return tuple(words)
