"""A guest of a Hyper-V host that is none, as PowerShell Direct meets it: an account, files, and programs."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.fake_hyperv import FakeGuest
from tests.support.powershell import Cmdlet, PowerShell, run_block
from tests.support.powershell_expressions import Block
from tests.support.powershell_values import PsObject, Thrown


class SecureText:
    """System.Security.SecureString."""

    def __init__(self) -> None:
        self.letters = ""

    def appendchar(self, letter: str) -> None:
        self.letters += letter


class Stream:
    """System.IO.MemoryStream."""

    def __init__(self) -> None:
        self.content = b""

    @property
    def length(self) -> int:
        return len(self.content)

    def toarray(self) -> bytes:
        return self.content


class _Done:
    def wait(self, milliseconds: int) -> bool:
        return True


class _Output:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.basestream = self

    def copytoasync(self, target: Stream) -> _Done:
        target.content = self._content
        return _Done()

    def close(self) -> None:
        """Nothing is read from there."""


class About:
    """System.Diagnostics.ProcessStartInfo."""

    def __init__(self, program: str, arguments: str) -> None:
        self.program, self.arguments = program, arguments
        self.useshellexecute = True
        self.createnowindow = self.redirectstandardinput = False
        self.redirectstandardoutput = self.redirectstandarderror = False


class _Process:
    def __init__(self, ended: tuple[int, bytes, bytes] | None) -> None:
        self._ended = ended
        status, output, errors = ended or (0, b"", b"")
        self.exitcode = status
        self.standardinput, self.standardoutput, self.standarderror = _Output(b""), _Output(output), _Output(errors)

    def waitforexit(self, milliseconds: int) -> bool:
        return self._ended is not None


class _File:
    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0
        self.length = len(content)

    def seek(self, offset: int, origin: str) -> int:
        assert origin == "Begin"
        self._at = offset
        return offset

    def read(self, target: bytearray, offset: int, length: int) -> int:
        piece = self._content[self._at : self._at + min(length, 100_000)]  # a short read is a good read
        target[offset : offset + len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def dispose(self) -> None:
        """It is in memory."""


def _missing(path: str) -> Thrown:
    return Thrown(
        f"Die Datei '{path}' wurde nicht gefunden.", code=-2147024894, types=("System.IO.FileNotFoundException",)
    )


def _base64(data: bytes, offset: int = 0, length: int | None = None) -> str:
    return base64.b64encode(bytes(data)[offset : None if length is None else offset + length]).decode()


def guest_types(here: Callable[[str], Path]) -> dict[str, Any]:
    """Return the .NET classes that scripts use on a host as in a guest; files are looked for by ``here``."""

    def open_(path: str, *how: str) -> _File:
        try:
            return _File(here(path).read_bytes())
        except OSError:
            raise _missing(path) from None

    return {
        "convert": PsObject(ToBase64String=_base64),
        "io.file": PsObject(Open=open_),
        "io.memorystream": Stream,
        "security.securestring": SecureText,
        "management.automation.pscredential": lambda user, secret: PsObject(UserName=user, Password=secret),
        "diagnostics.processstartinfo": About,
    }


def invoke(
    guest: FakeGuest, credential: Any, block: Block, arguments: list[Any], cmdlets: dict[str, Cmdlet]
) -> list[Any]:
    """Run a script block in a guest, which knows nothing of the script that it is in."""
    if (credential.UserName, credential.Password.letters) != (guest.user, guest.password):
        raise Thrown(
            "Die Anmeldeinformationen sind ungültig.",
            category="OpenError",
            types=("System.Management.Automation.Remoting.PSDirectException",),
        )

    def start(about: About) -> _Process:
        assert not about.useshellexecute and about.redirectstandardoutput and about.redirectstandarderror
        if about.program not in guest.programs:
            raise Thrown("Das System kann die angegebene Datei nicht finden", code=-2147467259)
        return _Process(guest.programs[about.program](about.arguments))

    def open_(path: str, *how: str) -> _File:
        if path not in guest.files:
            raise _missing(path)
        return _File(guest.files[path])

    types = {
        **guest_types(Path),
        "diagnostics.process": PsObject(Start=start),
        "io.file": PsObject(Open=open_),
    }
    return run_block(PowerShell({"New-Object": cmdlets["New-Object"]}, types), block, arguments)
