"""What a drill checks, as it is written in ``[drill]`` of godwit.toml or in a file of its own (docs/drills.md)."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

from replica.errors import ConfigurationError

MOST_CHECKS: Final = 200
LARGEST_FILE_BYTES: Final = 1 << 20
LONGEST_TEXT: Final = 2000
ANSWER_SECONDS: Final = 300.0
CHECK_SECONDS: Final = 60.0
DRILL_SECONDS: Final = 900.0
LONGEST_SECONDS: Final = 86400.0

_DURATION: Final = re.compile(r"(\d{1,9})([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PORT: Final = range(1, 65536)


class Kind(StrEnum):
    """What a check looks at."""

    POINT = "point"  # every byte of the point is read and compared
    AGENT = "agent"  # the guest's agent answers
    CONSOLE = "console"  # a line of the serial console
    TCP = "tcp"  # a port answers; not in an isolated network
    COMMAND = "command"  # a program's status and output
    SERVICE = "service"  # a unit of systemd is active
    FILE = "file"  # a file's SHA-256
    SCREENSHOT = "screenshot"  # a picture of the console

    @property
    def answers(self) -> bool:
        """Whether a guest that passes it has answered: the time until then is the RTO."""
        return self in (Kind.AGENT, Kind.CONSOLE)

    @property
    def uses_channel(self) -> bool:
        """Whether it needs the way into the guest."""
        return self in (Kind.COMMAND, Kind.SERVICE, Kind.FILE)


@dataclass(frozen=True, slots=True)
class Check:
    """One check. Which of the fields mean anything is a matter of its ``kind``; ``vms`` empty means every VM."""

    kind: Kind
    name: str
    required: bool = True
    timeout_seconds: float = CHECK_SECONDS
    vms: tuple[str, ...] = ()
    match: str | None = None  # a regular expression: a line of the console, or what a command prints
    command: tuple[str, ...] = ()
    status: int = 0
    retry: bool = False  # a command is run again until it passes or its time is up
    service: str = ""
    path: str = ""
    sha256: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """How a VM is drilled. None leaves it to the command, or to the machine's own generation."""

    checks: tuple[Check, ...] = ()
    timeout_seconds: float = DRILL_SECONDS
    platform: str | None = None
    generation: Literal[1, 2] | None = None
    evidence: Path | None = None

    def checks_of(self, vm: str) -> tuple[Check, ...]:
        """Return the checks of a VM. One that tells whether the guest answers is always among them."""
        found = tuple(one for one in self.checks if not one.vms or vm in one.vms)
        if not any(one.kind.answers for one in found):
            found = (ANSWERS, *found)
        return found if self.checks else (*found, PICTURE)


ANSWERS: Final = Check(Kind.AGENT, "the guest answers", timeout_seconds=ANSWER_SECONDS)
PICTURE: Final = Check(Kind.SCREENSHOT, "picture of the console", required=False)


def load(path: Path) -> Terms:
    """Read a file of checks, TOML or (by its name, ``.json``) JSON. Raises ConfigurationError naming every mistake."""
    try:
        with path.open("rb") as file:
            held = file.read(LARGEST_FILE_BYTES + 1)
        if len(held) > LARGEST_FILE_BYTES:
            raise ConfigurationError("the file is too large to be one of checks", path=str(path))
        text = held.decode("utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"the file is neither TOML nor JSON: {error}", path=str(path)) from error
    terms, mistakes = read(values)
    if mistakes:
        raise ConfigurationError("; ".join(mistakes), path=str(path), hint="docs/drills.md lists what checks may say")
    return terms


def read(values: object) -> tuple[Terms, list[str]]:
    """Return terms as they are written down, and what is wrong with them."""
    mistakes: list[str] = []
    if not isinstance(values, Mapping):
        return Terms(), ["drill: should be a table"]
    taken = _Taker("drill", values, mistakes)
    listed = taken.take("check", _list, [])
    if len(listed) > MOST_CHECKS:
        mistakes.append(f"drill.check: at most {MOST_CHECKS} checks")
    checks = [_check(number, one, mistakes) for number, one in enumerate(listed[:MOST_CHECKS], start=1)]
    terms = Terms(
        checks=tuple(one for one in checks if one is not None),
        timeout_seconds=taken.take("timeout", _seconds, DRILL_SECONDS),
        platform=taken.take("platform", _text, None),
        generation=taken.take("generation", _generation, None),
        evidence=taken.take("evidence", _folder, None),
    )
    taken.end()
    return terms, mistakes


# What each kind needs and may have, beside what all have.
_NEEDS: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.CONSOLE: ("match",),
    Kind.TCP: ("port",),
    Kind.COMMAND: ("command",),
    Kind.SERVICE: ("service",),
    Kind.FILE: ("path", "sha256"),
}
_MAY: Final[Mapping[Kind, tuple[str, ...]]] = {Kind.COMMAND: ("status", "match", "retry")}


def _check(number: int, values: object, mistakes: list[str]) -> Check | None:
    where = f"drill.check {number}"
    if not isinstance(values, Mapping):
        mistakes.append(f"{where}: should be a table")
        return None
    taken = _Taker(where, values, mistakes)
    kind = taken.take("kind", Kind, None)
    if kind is None:
        if "kind" not in values:
            mistakes.append(f"{where}: kind is missing: there are {', '.join(Kind)}")
        return None
    needed = _NEEDS.get(kind, ())
    mistakes += [f"{where}: a check of kind {kind.value!r} needs {name}" for name in needed if name not in values]
    found: dict[str, Any] = {
        name: taken.take(name, _FIELDS[name], None) for name in (*needed, *_MAY.get(kind, ())) if name in values
    }
    check = Check(
        kind=kind,
        name=taken.take("name", _text, None) or _name_of(kind, found),
        required=taken.take("required", _truth, kind is not Kind.SCREENSHOT),
        timeout_seconds=taken.take("timeout", _seconds, ANSWER_SECONDS if kind.answers else CHECK_SECONDS),
        vms=taken.take("vms", _words, ()),
        **{name: value for name, value in found.items() if value is not None},
    )
    taken.end()
    return check


def _name_of(kind: Kind, found: Mapping[str, Any]) -> str:
    what = found.get("service") or found.get("path") or found.get("port") or " ".join(found.get("command") or ())
    return f"{kind.value} {what or found.get('match') or ''}".strip()[:200]


@dataclass(slots=True)
class _Taker:
    """Takes values out of a table, noting what is wrong with them and what is left."""

    where: str
    values: Mapping[str, Any]
    mistakes: list[str]
    known: set[str] = field(default_factory=set)

    def take(self, name: str, check: Callable[[Any], Any], default: Any) -> Any:
        self.known.add(name)
        if name not in self.values:
            return default
        try:
            return check(self.values[name])
        except ValueError as error:
            self.mistakes.append(f"{self.where}: {name}: {error}")
            return default

    def end(self) -> None:
        self.mistakes += [
            f"{self.where}: {name!r:.60} is nothing that can be set here"
            for name in self.values
            if name not in self.known
        ]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("should be a list of tables: [[drill.check]]")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > LONGEST_TEXT or "\0" in value:
        raise ValueError("should be text")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("should be true or false")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 31) <= value < 1 << 32:
        raise ValueError("should be a whole number")
    return value


def _port(value: Any) -> int:
    if _whole(value) not in _PORT:
        raise ValueError("should be a port, from 1 to 65535")
    return int(value)


def _generation(value: Any) -> int:
    if _whole(value) not in (1, 2):
        raise ValueError("should be 1 or 2")
    return int(value)


def _seconds(value: Any) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ValueError("should be a time, from 1s to 1d, as 30s or 5m")
    return float(seconds)


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("should be a list of texts")
    return tuple(_text(one) for one in value)


def _pattern(value: Any) -> str:
    try:
        re.compile(_text(value))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return str(value)


def _digest(value: Any) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", _text(value)):
        raise ValueError("should be a SHA-256, 64 hex digits")
    return str(value).lower()


def _folder(value: Any) -> Path:
    try:
        return Path(_text(value)).expanduser()
    except RuntimeError as error:
        raise ValueError("names nobody's home folder") from error


_FIELDS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "match": _pattern,
    "port": _port,
    "command": _words,
    "status": _whole,
    "retry": _truth,
    "service": _text,
    "path": _text,
    "sha256": _digest,
}
