"""The way into a guest of a Hyper-V host without any network: PowerShell Direct, and files copied by the host.

Programs are run and files read by PowerShell Direct, which takes a Windows guest and an account of it. Files are
written by the host's guest service interface, which Linux guests have too (hv_fcopy_daemon), and which asks for no
account. The password goes to the host inside the session, and into no command line and no log.
"""

from __future__ import annotations

import base64
import binascii
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from replica.errors import PlatformError
from replica.hyperv.scripts import Script
from replica.hyperv.session import Answer, HypervError, ask
from replica.platforms.hyperv import scripts
from replica.platforms.hyperv.asking import HypervHost

PIECE_BYTES: Final = 1 << 20
POLL_SECONDS: Final = 1.0
_HINT: Final = (
    "PowerShell Direct takes a guest with Windows 10, Windows Server 2016 or later, that is up, and an account of it: "
    "guest_user and guest_password_command in [platforms.hyperv], or GODWIT_GUEST_PASSWORD"
)


class DirectChannel:
    """A ``GuestChannel`` to the guest of the machine with that identifier."""

    def __init__(self, there: HypervHost, name: str, vm: str) -> None:
        self._there = there
        self._name = name
        self._vm = vm

    def ping(self, *, timeout_seconds: float) -> bool:
        """Whether the guest answers: its heartbeat, and where an account is known, PowerShell in it."""
        account = self._there.settings.guest
        password = account.password() if account.user else ""
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = max(1.0, deadline - time.monotonic())
            with self._there.session(self._name) as session:
                answer = ask(
                    session, scripts.PROBE, VmId=self._vm, User=account.user, Password=password, timeout_seconds=left
                )
            if answer.flag("answers"):
                return True
            if deadline - time.monotonic() <= POLL_SECONDS:
                return False
            time.sleep(POLL_SECONDS)

    def execute(self, command: Sequence[str], *, timeout_seconds: float) -> tuple[int, bytes, bytes]:
        """Run a program in the guest; return its status, output and error output. Raises PlatformError."""
        if not command:
            raise PlatformError("there is no command to run in the guest")
        answer = self._direct(
            scripts.EXECUTE,
            timeout_seconds,
            Program=command[0],
            Arguments=subprocess.list2cmdline(command[1:]),  # as programs on Windows take theirs apart
            Most=scripts.MOST_OUTPUT_BYTES,
        )
        state = answer.text("state")
        if state == "running":
            raise PlatformError(
                f"{command[0]} did not end in the guest within {timeout_seconds:.0f} s",
                hint="it is left running there; give it longer with --timeout",
            )
        if state != "ended":
            raise PlatformError(
                f"{command[0]} said more in the guest than {scripts.MOST_OUTPUT_BYTES} bytes",
                hint="have it write a file, and copy that",
            )
        return _number(answer, "status"), _decoded(answer, "output"), _decoded(answer, "errors")

    def write_file(self, path: str, content: bytes, *, timeout_seconds: float) -> None:
        """Write a file in the guest, in the place of one that is there, folders made. Raises PlatformError."""
        settings, name = self._there.settings, f"godwit-copy-{uuid.uuid4().hex}"
        here = settings.files / name
        try:
            _write(here, content)
            with self._there.session(self._name) as session:
                there = f"{settings.folder.rstrip(chr(92))}\\{name}"
                ask(session, scripts.COPY, VmId=self._vm, Source=there, Target=path, timeout_seconds=timeout_seconds)
        finally:
            with suppress(OSError):
                here.unlink(missing_ok=True)

    def read_file(self, path: str, *, timeout_seconds: float, largest_bytes: int = 64 << 20) -> bytes:
        """Read a file of the guest, a MiB at a time. Raises PlatformError, for one that is larger too."""
        content = bytearray()
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = max(1.0, deadline - time.monotonic())
            answer = self._direct(scripts.FETCH, left, Path=path, Offset=len(content), Length=PIECE_BYTES)
            size, data = _number(answer, "size"), _decoded(answer, "data")
            content += data
            if max(size, len(content)) > largest_bytes:
                raise PlatformError(f"{path} holds more than {largest_bytes} bytes", hint="copy a smaller file")
            if len(content) >= size:
                return bytes(content)
            if not data:
                raise PlatformError(f"{path}: the guest reads nothing, and not the end either")
            if time.monotonic() > deadline:
                raise PlatformError(f"{path} was not read within {timeout_seconds:.0f} s", hint="give it longer")

    def _direct(self, script: Script, timeout_seconds: float, **parameters: str | int) -> Answer:
        account = self._there.settings.guest
        password = account.password()
        with self._there.session(self._name) as session:
            try:
                return ask(
                    session,
                    script,
                    VmId=self._vm,
                    User=account.user,
                    Password=password,
                    timeout_seconds=max(1.0, timeout_seconds),
                    **parameters,
                )
            except HypervError as error:
                if error.hint is None:
                    error.hint = _HINT
                error.message = error.message.replace(password, "***")
                raise


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise PlatformError(
            f"cannot write the file that the host is to copy: {error.strerror}",
            path=str(path),
            hint="see share in [platforms.hyperv] of godwit.toml",
        ) from error


def _number(answer: Answer, name: str) -> int:
    text = answer.text(name)
    if not text.removeprefix("-").isdecimal() or len(text) > 20:
        raise PlatformError("the guest answers in an unknown way", hint=f"{name!r} is {text!r:.40}")
    return int(text)


def _decoded(answer: Answer, name: str) -> bytes:
    try:
        return base64.b64decode("".join(answer.text(name).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PlatformError("the guest answers in an unknown way", hint=f"{name!r} is no Base64") from error
