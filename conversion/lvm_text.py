"""The text in which LVM keeps its metadata: sections in braces, numbers, strings and lists of both."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

from conversion.errors import DamagedError

Value: TypeAlias = int | str | list[int | str] | dict[str, "Value"]

_TOKEN: Final = re.compile(
    r"""(?:\s+|\#[^\n]*)*(?:
        (?P<name>[A-Za-z0-9_.+-]*[A-Za-z_][A-Za-z0-9_.+-]*) | (?P<number>-?\d+(?:\.\d+)?) |
        "(?P<text>(?:[^"\\]|\\.)*)" | (?P<mark>[{}\[\]=,]) | (?P<end>\Z)
    )""",
    re.VERBOSE | re.DOTALL,
)
MOST_DEPTH: Final = 16
MOST_TOKENS: Final = 2_000_000


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._count = 0
        self.kind, self.value = "", ""
        self.go_on()

    def go_on(self) -> None:
        found = _TOKEN.match(self._text, self._at)
        self._count += 1
        if found is None or found.lastgroup is None or self._count > MOST_TOKENS:
            raise _damaged(f"unreadable text at character {self._at}")
        self._at = found.end()
        self.kind, self.value = found.lastgroup, found[found.lastgroup]

    def is_mark(self, mark: str) -> bool:
        return self.kind == "mark" and self.value == mark

    def take(self, mark: str) -> None:
        if not self.is_mark(mark):
            raise _damaged(f"{mark} is missing at character {self._at}")
        self.go_on()


def parse_metadata(raw: bytes) -> dict[str, Value]:
    """Return the sections of LVM metadata. Raises DamagedError."""
    reader = _Reader(raw.rstrip(b"\0").decode("utf-8", "replace"))
    content = _section(reader, depth=0)
    if reader.kind != "end":
        raise _damaged("it ends too early")
    return content


def section(content: dict[str, Value], name: str) -> dict[str, Value]:
    """Return a section by name, an empty one where there is none."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _section(reader: _Reader, depth: int) -> dict[str, Value]:
    if depth > MOST_DEPTH:
        raise _damaged("its sections are nested too deeply")
    found: dict[str, Value] = {}
    while reader.kind in {"name", "number"}:
        name = reader.value
        reader.go_on()
        if reader.is_mark("{"):
            reader.go_on()
            found[name] = _section(reader, depth + 1)
            reader.take("}")
        else:
            reader.take("=")
            found[name] = _list(reader) if reader.is_mark("[") else _scalar(reader)
    return found


def _list(reader: _Reader) -> list[int | str]:
    reader.take("[")
    found: list[int | str] = []
    while not reader.is_mark("]"):
        found.append(_scalar(reader))
        if reader.is_mark(","):
            reader.go_on()
    reader.go_on()
    return found


def _scalar(reader: _Reader) -> int | str:
    if reader.kind == "number" and len(reader.value) < 25:
        value: int | str = int(reader.value.split(".")[0])
    elif reader.kind == "text":
        value = re.sub(r"\\(.)", r"\1", reader.value)
    else:
        raise _damaged(f"a value is missing, there is {reader.value!r}")
    reader.go_on()
    return value


def _damaged(message: str) -> DamagedError:
    return DamagedError(message, subject="the LVM metadata", hint="Check the volume group in the guest: vgck")
