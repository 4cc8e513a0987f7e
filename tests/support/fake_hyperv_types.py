"""The .NET classes that scripts use on a Hyper-V host that is none: its clock, its folders, the texts it keeps."""

from __future__ import annotations

import re
from typing import Any

from tests.support.fake_hyperv import FakeHost
from tests.support.fake_hyperv_guest import guest_types
from tests.support.powershell_values import PsObject


class _Time:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def addseconds(self, seconds: int) -> _Time:
        return _Time(self._seconds + seconds)

    def __gt__(self, other: _Time) -> bool:
        return self._seconds > other._seconds


def host_types(host: FakeHost) -> dict[str, Any]:
    """Return the classes by their names."""

    class Clock:
        @property
        def utcnow(self) -> _Time:
            return _Time(host.now / 1000)

    return {
        "datetime": Clock(),
        "stringcomparison": PsObject(OrdinalIgnoreCase="OrdinalIgnoreCase"),
        "environment": PsObject(GetFolderPath=lambda name: {"CommonApplicationData": "C:\\ProgramData"}[name]),
        "io.path": PsObject(Combine=lambda one, two: f"{one}\\{two}"),
        "string": PsObject(Join=lambda between, parts: between.join(parts)),
        "nullstring": PsObject(Value=None),
        "io.file": Files(host),
        "io.directory": PsObject(CreateDirectory=lambda path: host.here(path).mkdir(parents=True, exist_ok=True)),
    }


class Files:
    """System.IO.File on the host, where the ledgers are texts in memory."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self.open = guest_types(host.here)["io.file"].Open

    def _name(self, path: str) -> str:
        assert re.fullmatch(r"C:\\ProgramData\\Godwit\\[0-9a-f]{32}\.txt(\.new)?", path), path
        return path.rpartition("\\")[2].removesuffix(".txt")

    def exists(self, path: str) -> bool:
        return self._name(path) in self._host.ledgers

    def readalltext(self, path: str) -> str:
        return self._host.ledgers[self._name(path)]

    def writealltext(self, path: str, text: str) -> None:
        self._host.ledgers[self._name(path)] = text

    def appendalltext(self, path: str, text: str) -> None:
        self._host.ledgers[self._name(path)] = self._host.ledgers.get(self._name(path), "") + text

    def replace(self, source: str, target: str, backup: str | None) -> None:
        assert backup is None and self.exists(target)
        self.move(source, target)

    def move(self, source: str, target: str) -> None:
        self._host.ledgers[self._name(target)] = self._host.ledgers.pop(self._name(source))
