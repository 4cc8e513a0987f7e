"""JSON objects as they lie in the store: an envelope, and fields read by type (docs/format.md, 2)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeAlias

import xxhash

from replica.errors import FormatVersionError, IntegrityError

FORMAT = 1
SUITE_NONE = 0
LARGEST_RECORD_BYTES = 64 << 20

Body: TypeAlias = Mapping[str, Any]


def encode(kind: str, body: Body, *, suite: int = SUITE_NONE) -> bytes:
    """Return the object that holds ``body``, which must be JSON as it is."""
    inner = canonical(body)
    return canonical({"body": body, "checksum": _checksum(inner), "format": FORMAT, "kind": kind, "suite": suite})


def decode(kind: str, data: bytes, *, key: str, suite: int = SUITE_NONE) -> Fields:
    """Return the body of the object. ``key`` names it in errors. Raises IntegrityError, FormatVersionError.

    An object of another encryption suite than ``suite`` is refused.
    """
    if len(data) > LARGEST_RECORD_BYTES:
        raise IntegrityError("the object is too large to be what it should be", key=key)
    try:
        outer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError("the object is not valid JSON: it is damaged or not Godwit's", key=key) from error
    if not isinstance(outer, dict):
        raise IntegrityError("the object is not a Godwit record", key=key)
    fields = Fields(outer, key)
    try:
        check_version(fields.integer("format"), fields.integer("suite"), key=key, expected=suite)
    except FormatVersionError as error:
        if _is_ours(kind, outer):
            raise IntegrityError("the object's version is not that of its checksum: it is damaged", key=key) from error
        raise
    if fields.text("kind") != kind:
        found = f"{fields.text('kind')!r:.60}"
        raise IntegrityError(f"the object is a {found} record where a {kind!r} was expected", key=key)
    body = fields.fields("body")
    try:
        checksum = _checksum(canonical(body.values))
    except (ValueError, RecursionError) as error:  # lone surrogates, which JSON can spell; nesting beyond all sense
        raise IntegrityError("the object cannot be what Godwit wrote: it is damaged", key=key) from error
    if checksum != fields.text("checksum"):
        raise IntegrityError("the object's checksum does not match its content: it is damaged", key=key)
    return body


def _is_ours(kind: str, outer: dict[str, Any]) -> bool:
    """Whether an object of another version than this one's was written by this one, so that its version is damaged.

    A later format's checksum covers its number too, so what matches the body alone is of this format. In it no record
    but a VM's has another suite than 0: other records of encrypted VMs are sealed, and no JSON.
    """
    if kind == "vm" and outer["format"] == FORMAT:
        return False
    try:
        return outer.get("checksum") == _checksum(canonical(outer["body"]))
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def check_version(version: int, suite: int, *, key: str, expected: int = SUITE_NONE) -> None:
    """Raise FormatVersionError for an object of a later format or another encryption suite than expected."""
    if version > FORMAT or version < 1:
        raise FormatVersionError(
            f"the object has format {version}, this godwit reads up to {FORMAT}", key=key, hint="use a newer godwit"
        )
    if suite != expected:
        raise FormatVersionError(
            f"the object is encrypted by suite {suite}, which this godwit does not know",
            key=key,
            hint="use a newer godwit",
        )


def canonical(value: Body) -> bytes:
    """Return the one form of JSON that objects are written in."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _checksum(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def time_text(moment: datetime) -> str:
    """Return the moment as UTC RFC 3339 with microseconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Fields:
    """The fields of a decoded JSON object, each read by the type that it must have.

    A field that is missing or of another type raises IntegrityError naming the object and the field.
    """

    __slots__ = ("key", "values")

    def __init__(self, values: Body, key: str) -> None:
        self.values = values
        self.key = key

    def _wrong(self, field: str, wanted: str) -> NoReturn:
        found = "missing" if field not in self.values else f"{self.values[field]!r:.60}"
        raise IntegrityError(f"field {field!r} should be {wanted}, it is {found}", key=self.key)

    def text(self, field: str) -> str:
        """Return a string."""
        value = self.values.get(field)
        if not isinstance(value, str):
            self._wrong(field, "a string")
        return value

    def optional_text(self, field: str) -> str | None:
        """Return a string, or None where the field is null or missing."""
        return None if self.values.get(field) is None else self.text(field)

    def integer(self, field: str, *, least: int = 0, most: int = 2**63 - 1) -> int:
        """Return an integer in [least, most]."""
        value = self.values.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._wrong(field, f"an integer from {least} to {most}")
        return value

    def number(self, field: str) -> float:
        """Return a finite number."""
        value = self.values.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            self._wrong(field, "a number")
        return float(value)

    def truth(self, field: str) -> bool:
        """Return true or false."""
        value = self.values.get(field)
        if not isinstance(value, bool):
            self._wrong(field, "true or false")
        return value

    def hexadecimal(self, field: str, *, digits: int) -> str:
        """Return a string of so many hex digits."""
        value = self.text(field)
        if len(value) != digits or any(c not in "0123456789abcdef" for c in value):
            self._wrong(field, f"{digits} hex digits")
        return value

    def time(self, field: str) -> datetime:
        """Return a moment, in UTC."""
        try:
            moment = datetime.fromisoformat(self.text(field))
            if moment.tzinfo is None:
                self._wrong(field, "a time with its zone")
            return moment.astimezone(UTC)
        except (ValueError, OverflowError):  # the latter beyond the years 1 to 9999 once it is UTC
            self._wrong(field, "a time in RFC 3339")

    def fields(self, field: str) -> Fields:
        """Return an inner object."""
        value = self.values.get(field)
        if not isinstance(value, dict):
            self._wrong(field, "an object")
        return Fields(value, self.key)

    def list_of_fields(self, field: str) -> list[Fields]:
        """Return a list of inner objects."""
        value = self.values.get(field)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._wrong(field, "a list of objects")
        return [Fields(item, self.key) for item in value]

    def integers(self, field: str) -> list[int]:
        """Return a list of integers."""
        value = self.values.get(field)
        if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            self._wrong(field, "a list of integers")
        return list(value)
