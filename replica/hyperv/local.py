"""Windows PowerShell on this machine: the one place that runs powershell.exe. Each question is a process.

The command line is always the same. Script and parameters go to the process as JSON in plain ASCII, and what it prints
comes back as Base64: neither the console's encoding nor its width can touch them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from replica.hyperv.session import MOST_MESSAGE_CHARACTERS, SessionError

PROGRAM: Final = "powershell.exe"
BOOTSTRAP: Final = """
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$Request = [Console]::In.ReadToEnd() | ConvertFrom-Json
$Given = @{}
foreach ($Property in $Request.parameters.PSObject.Properties) { $Given[$Property.Name] = [string]$Property.Value }
$Printed = & ([scriptblock]::Create([string]$Request.script)) @Given | Out-String -Width 2147483647
[Console]::Out.Write([Convert]::ToBase64String([System.Text.Encoding]::UTF8.GetBytes($Printed)))
"""
ENCODED: Final = base64.b64encode(BOOTSTRAP.encode("utf-16-le")).decode("ascii")


class LocalSession:
    """The Hyper-V host that this runs on."""

    def __init__(self, program: str | None = None) -> None:
        """``program`` is the PowerShell to run, None for the system's own."""
        self._program = program or _powershell()

    def run(self, script: str, parameters: Mapping[str, str], *, timeout_seconds: float) -> str:
        """Run a script, as ``Session`` says. Raises SessionError."""
        request = json.dumps({"script": script, "parameters": dict(parameters)}).encode("ascii")
        command = [self._program, "-NoLogo", "-NoProfile", "-NonInteractive", "-EncodedCommand", ENCODED]
        try:
            done = subprocess.run(command, input=request, capture_output=True, timeout=timeout_seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise SessionError(f"PowerShell did not answer within {timeout_seconds:g} s") from error
        except OSError as error:
            raise SessionError(f"{self._program} cannot be run: {error.strerror or error}") from error
        try:
            printed = base64.b64decode(b"".join(done.stdout.split()), validate=True)
        except binascii.Error:
            printed = b""
        if done.returncode or not printed:
            words = " ".join(done.stderr.decode("utf-8", "replace").split())[:MOST_MESSAGE_CHARACTERS]
            raise SessionError(f"PowerShell failed ({done.returncode}): {words or 'it gave no reason'}")
        return printed.decode("utf-8", "replace")

    def close(self) -> None:
        """Nothing is kept open."""


def _powershell() -> str:
    if os.name != "nt":
        raise SessionError(
            "this machine is no Hyper-V host", hint="name the host with --host, which is asked over the network"
        )
    root = Path(os.environ.get("SystemRoot", r"C:\Windows"))  # noqa: SIM112 - its name on Windows
    usual = root / "System32" / "WindowsPowerShell" / "v1.0" / PROGRAM
    found = str(usual) if usual.is_file() else shutil.which(PROGRAM)
    if found is None:
        raise SessionError(f"{PROGRAM} is not installed")
    return found
