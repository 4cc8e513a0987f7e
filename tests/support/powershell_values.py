"""The values of a PowerShell for tests: hashtables, objects and errors; how they are compared, cast and looked into."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

_CASTS = {"int": 32, "long": 64, "uint16": 16, "uint64": 64, "byte": 8}


class NotKnownError(AssertionError):
    """The script uses what this PowerShell does not know."""


class Table(dict[str, Any]):
    """A hashtable: keys whatever their case, which they keep."""

    def key(self, key: str) -> str:
        return next((one for one in self if one.casefold() == str(key).casefold()), str(key))

    def __getitem__(self, key: str) -> Any:
        return dict.get(self, self.key(key))

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self, self.key(key), value)

    def containskey(self, key: str) -> bool:
        return self.key(key) in self

    def contains(self, key: str) -> bool:
        return self.key(key) in self


class PsObject:
    """An object with the given properties, as ConvertFrom-Json makes them; others cannot be set."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)


class Thrown(Exception):  # noqa: N818 - PowerShell's own word
    """A terminating error: what a cmdlet refuses with, or a script throws."""

    def __init__(
        self, message: str, *, category: str = "NotSpecified", code: int = -2146233088, types: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.category = category
        self.hresult = code
        self.data = Table()
        self.types = ("System.Exception", *types)
        self.innerexception: Thrown | None = None


def truth(value: Any) -> bool:
    """Return what PowerShell takes a value for in a condition."""
    if isinstance(value, list):
        return truth(value[0]) if len(value) == 1 else bool(value)
    return isinstance(value, Table | PsObject) or bool(value) or not (isinstance(value, str | int) or value is None)


def text_of(value: Any) -> str:
    """Return what [string] makes of a value."""
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    return "" if value is None else str(value)


def compared(left: Any, operator: str, right: Any) -> bool:
    """Compare as PowerShell does: texts whatever their case, the right one turned into what the left one is."""
    if operator in ("-contains", "-notcontains"):
        return any(compared(one, "-eq", right) for one in left) is (operator == "-contains")
    if isinstance(left, list):
        raise NotKnownError("a list is compared")
    if operator == "-like":
        return fnmatch.fnmatchcase(text_of(left).casefold(), text_of(right).casefold())
    if operator == "-cnotmatch":
        return re.search(right, text_of(left)) is None
    if isinstance(left, str) and right is not None:
        left, right = left.casefold(), text_of(right).casefold()
    elif isinstance(left, bool) or left is None or right is None:
        pass
    elif isinstance(left, int):
        right = int(right)
    tests: dict[str, Callable[[], bool]] = {
        "-eq": lambda: bool(left == right),
        "-ne": lambda: bool(left != right),
        "-lt": lambda: bool(left < right),
        "-le": lambda: bool(left <= right),
        "-gt": lambda: bool(left > right),
        "-ge": lambda: bool(left >= right),
    }
    if operator not in tests:
        raise NotKnownError(f"there is no operator {operator}")
    return tests[operator]()


def member(owner: Any, name: str) -> Any:
    """Return a property, whatever its case. Of an object that has none of that name it is null; of a list, each's."""
    low = name.lower()
    if owner is None:
        return None
    if isinstance(owner, list):
        return len(owner) if low in ("count", "length") else collapsed([member(one, name) for one in owner])
    if isinstance(owner, str | bytes | bytearray) and low == "length":
        return len(owner)
    if isinstance(owner, Table):
        return len(owner) if low == "count" else owner.get(owner.key(name))
    if low == "count" and member_name(owner, name) is None:
        return 1
    known = member_name(owner, name)
    return None if known is None else getattr(owner, known)


def member_name(owner: Any, name: str) -> str | None:
    """Return the name that Python has for a member, None where there is none."""
    return next((one for one in dir(owner) if one.lower() == name.lower()), None)


def unrolled(value: Any) -> list[Any]:
    """Return what a value puts into a pipeline."""
    return list(value) if isinstance(value, list) else [value]


def collapsed(values: list[Any]) -> Any:
    """Return what is left of a pipeline's output in a variable."""
    return None if not values else values[0] if len(values) == 1 else values


def cast(type_: str, value: Any) -> Any:  # noqa: PLR0911 - a type each
    """Return a value as that type makes it. Raises Thrown."""
    low = type_.lower()
    if low == "string":
        return text_of(value)
    if low in ("bool", "switch"):
        return truth(value)
    if low in _CASTS:
        number = 0 if value is None else int(value)
        if not -(1 << _CASTS[low]) < number < 1 << _CASTS[low]:
            raise Thrown(f"Cannot convert value {value!r} to {type_}: too large", category="InvalidArgument")
        return number
    if low == "guid":
        text = text_of(value)
        if not re.fullmatch(r"\{?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\}?", text):
            raise Thrown(f"Cannot convert value {text!r} to type System.Guid.", category="InvalidArgument")
        return text.strip("{}").lower()
    if low == "uint64[]":
        return [cast("uint64", one) for one in unrolled(value)]
    if low == "byte[]":
        return bytes(value)
    if low == "string[]":
        return [text_of(one) for one in unrolled(value)]
    if low == "hashtable":
        return value
    raise NotKnownError(f"there is no type {type_}")


def text_method(text: str, name: str, given: list[Any]) -> Any:
    """Call a method of a text."""
    if name in ("startswith", "endswith"):
        low = len(given) > 1 and given[1] == "OrdinalIgnoreCase"
        one, start = (text.casefold(), given[0].casefold()) if low else (text, given[0])
        return one.startswith(start) if name == "startswith" else one.endswith(start)
    if name == "split":
        return text.split(given[0])
    if name == "tochararray":
        return list(text)
    if name == "trimend":
        return text.rstrip(given[0])
    raise NotKnownError(f"texts have no method {name}")
