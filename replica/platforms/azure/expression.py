"""What stands in a template: values, and expressions, told in ARM's JSON and in Bicep from one tree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDENT: Final = "  "


@dataclass(frozen=True, slots=True)
class Expression:
    """Something that Azure works out, as each of the languages says it."""

    arm: str  # without the brackets
    bicep: str


Value: TypeAlias = "Expression | str | int | bool | Sequence[Value] | Mapping[str, Value]"


def arm(value: Value) -> Any:
    """Return what stands for the value in ARM's JSON."""
    if isinstance(value, Expression):
        return f"[{value.arm}]"
    if isinstance(value, str):
        return f"[{value}" if value.startswith("[") else value
    if isinstance(value, Mapping):
        return {name: arm(one) for name, one in value.items()}
    if isinstance(value, Sequence):
        return [arm(one) for one in value]
    return value


def bicep(value: Value, depth: int = 0) -> str:
    """Return what stands for the value in Bicep, its later lines indented by ``depth``."""
    if isinstance(value, Mapping):
        named = [f"{_key(name)}: {bicep(one, depth + 1)}" for name, one in value.items()]
        return _block("{", named, "}", depth)
    if isinstance(value, Expression):
        return value.bicep
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Sequence):
        return _block("[", [bicep(one, depth + 1) for one in value], "]", depth)
    return str(value).lower()  # true, false, and numbers


def _block(opening: str, lines: Sequence[str], closing: str, depth: int) -> str:
    if not lines:
        return opening + closing
    inside = _INDENT * (depth + 1)
    return "\n".join([opening, *(inside + one for one in lines), _INDENT * depth + closing])


def _key(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else quoted(name)


def quoted(text: str) -> str:
    """Return a string of Bicep, which has no expressions in it."""
    for mark, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"), ("${", "\\${")):
        text = text.replace(mark, escaped)
    return f"'{text}'"
